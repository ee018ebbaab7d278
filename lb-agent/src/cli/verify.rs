//! `verify`: the maps against what the source says, computed anew.

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Args;

use super::{Format, PinArgs, SourceArgs, output};
use crate::desired::Desired;
use crate::model::Batch;
use crate::verify::Drift;

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    pin: PinArgs,
    /// A table for people, or JSON for programs
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// An agent that runs may be in the middle of a change: what differs is looked at again.
const TRIES: usize = 5;
const PAUSE: Duration = Duration::from_millis(100);

/// How long the API server may take to tell everything.
const PATIENCE: Duration = Duration::from_secs(60);

/// Everything that the source says now.
fn objects(source: &SourceArgs) -> anyhow::Result<Batch> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut source = source.open().await?;
        let mut problems = Vec::new();
        let first = async {
            loop {
                let batch = source.next().await?;
                if batch.complete || source.is_here() {
                    return Ok(batch);
                }
                problems = batch.problems;
            }
        };
        let result = tokio::time::timeout(PATIENCE, first).await;
        result.unwrap_or_else(|_| {
            let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
            anyhow::bail!(
                "the API server has not told everything within {PATIENCE:?}; {}",
                problems.join("; ")
            )
        })
    })
}

pub(super) fn verify(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let node = args.source.node()?;
    let maps = args.pin.open()?;
    let mut drifts: Vec<Drift> = Vec::new();
    for n in 0..TRIES {
        if n > 0 {
            thread::sleep(PAUSE);
        }
        let batch = objects(&args.source)?;
        for problem in &batch.problems {
            output::complain(&format!("warning: {problem}"));
        }
        let desired = Desired::of(batch.changes, &node);
        drifts = crate::verify::verify(&desired, &maps.dump()?);
        if drifts.is_empty() {
            break;
        }
    }
    if args.output == Format::Json || !drifts.is_empty() {
        output::rows(args.output, ["FIELD", "DRIFT"], &drifts, |d| {
            [d.field.clone(), d.message.clone()]
        })?;
    } else {
        output::say("the maps are as they should be")?;
    }
    Ok(if drifts.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
