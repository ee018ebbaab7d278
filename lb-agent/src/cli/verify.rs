//! `verify`: the maps against what the source says, computed anew.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use clap::Args;
use lb_common::abi::Addr;

use super::{Format, PinArgs, SourceArgs, output};
use crate::config::Config;
use crate::maps::sys;
use crate::node::addrs;
use crate::node::netns::Namespaces;
use lb_core::desired::{Desired, Site};
use lb_core::model::Batch;
use lb_core::verify::Drift;

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    pin: PinArgs,
    /// The configuration file of kube-proxy that `run` was given, if any
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
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

/// Every address of the node, whose network namespace need not be that of the calling thread.
fn addresses(netns: u64) -> anyhow::Result<BTreeSet<Addr>> {
    if sys::netns_cookie()? == netns {
        return Ok(addrs::all()?);
    }
    let visit = Namespaces::new()?.visit(&BTreeSet::from([netns]), |_| addrs::all());
    match visit.visited.into_values().next() {
        Some(addresses) => Ok(addresses?),
        None => anyhow::bail!("the node's network namespace ({netns}) cannot be entered: are all processes in sight?"),
    }
}

pub(super) fn verify(mut args: VerifyArgs) -> anyhow::Result<ExitCode> {
    let config = args.config.as_deref().map(Config::read).transpose()?;
    if let Some(config) = &config {
        args.source.complete(config);
    }
    let node = args.source.node()?;
    let maps = args.pin.open()?;
    // Without an agent that ever ran, nothing is there to be compared with.
    let netns = maps.state().map_or_else(sys::netns_cookie, |state| Ok(state.netns))?;
    let mut drifts: Vec<Drift> = Vec::new();
    for n in 0..TRIES {
        if n > 0 {
            thread::sleep(PAUSE);
        }
        let batch = objects(&args.source)?;
        for problem in &batch.problems {
            output::complain(&format!("warning: {problem}"));
        }
        let site = Site {
            node: node.clone(),
            inside: args.source.inside(config.as_ref()).to_vec(),
            addresses: addresses(netns)?,
        };
        let desired = Desired::of(batch.changes, site);
        drifts = lb_core::verify::verify(&desired, &maps.dump()?);
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
