//! `verify`: the maps against what the source says, computed anew.

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Args;

use super::{Format, PinArgs, SourceArgs, output};
use crate::desired::Desired;
use crate::source::manifests::ManifestSource;
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

pub(super) fn verify(args: &VerifyArgs) -> anyhow::Result<ExitCode> {
    let node = args.source.node()?;
    let maps = args.pin.open()?;
    let mut drifts: Vec<Drift> = Vec::new();
    for n in 0..TRIES {
        if n > 0 {
            thread::sleep(PAUSE);
        }
        let batch = ManifestSource::new(args.source.manifests.clone()).rescan();
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
