//! `verify`: compares the maps with the desired state, computed again from the source.

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
use lb_core::names::text;
use lb_core::verify::Drift;

#[derive(Debug, Args)]
pub(super) struct VerifyArgs {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    pin: PinArgs,
    /// Configuration file of kube-proxy that is passed to `run`, if any
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Output format: a table, or JSON
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

/// Comparisons before a difference is reported: a running agent may be applying a change.
const TRIES: usize = 5;
/// Delay between two comparisons.
const PAUSE: Duration = Duration::from_millis(100);

/// Timeout for the initial lists of the API server.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Reads all objects of the source.
fn objects(source: &SourceArgs) -> anyhow::Result<Batch> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut source = source.open().await?;
        let mut problems = Vec::new();
        let first = async {
            loop {
                let batch = source.next().await?;
                if batch.complete || source.is_local() {
                    return Ok(batch);
                }
                problems = batch.problems;
            }
        };
        let result = tokio::time::timeout(TIMEOUT, first).await;
        result.unwrap_or_else(|_| {
            let problems: Vec<_> = problems.iter().map(ToString::to_string).collect();
            anyhow::bail!(
                "the API server did not return all objects within {TIMEOUT:?}; {}",
                problems.join("; ")
            )
        })
    })
}

/// Returns every address of the node, in its network namespace, which need not be that of the calling thread.
fn addresses(netns: u64) -> anyhow::Result<BTreeSet<Addr>> {
    if sys::netns_cookie()? == netns {
        return Ok(addrs::all()?);
    }
    let visit = Namespaces::new()?.visit(&BTreeSet::from([netns]), |_| addrs::all());
    match visit.visited.into_values().next() {
        Some(addresses) => Ok(addresses?),
        None => anyhow::bail!(
            "the node's network namespace ({netns}) was not found: run this in the host's process namespace (hostPID)"
        ),
    }
}

/// Returns the name of the node that the maps are for: the given one, or that of the last agent on these maps; `None` if neither is
/// known. Which endpoints are local, and which the topology selects, follows from the name.
fn node_name<'a>(given: Option<&'a str>, agent: Option<&'a str>) -> Option<&'a str> {
    given.or(agent).filter(|name| !name.is_empty())
}

/// Returns the warning about a given name that the last agent did not have.
fn name_warning(given: Option<&str>, agent: Option<&str>) -> Option<String> {
    let agent = agent.filter(|name| !name.is_empty())?;
    let given = given.filter(|name| *name != agent)?;
    Some(format!(
        "warning: the node is {given} by --node-name, NODE_NAME or --config, but {agent} for the last agent on these maps: \
         sets that depend on the node can differ"
    ))
}

pub(super) fn verify(mut args: VerifyArgs) -> anyhow::Result<ExitCode> {
    let config = args.config.as_deref().map(Config::read).transpose()?;
    if let Some(config) = &config {
        args.source.complete(config);
    }
    let maps = args.pin.open()?;
    let state = maps.state();
    let (given, agent) = (
        args.source.node_name.as_deref(),
        state.as_ref().and_then(|state| text(&state.node)),
    );
    if let Some(warning) = name_warning(given, agent) {
        output::warn(&warning);
    }
    let node = match node_name(given, agent) {
        Some(name) => name.to_owned(),
        None => args.source.node()?,
    };
    // If no agent has run yet, the calling thread's network namespace is used.
    let netns = state.map_or_else(sys::netns_cookie, |state| Ok(state.netns))?;
    let mut drifts: Vec<Drift> = Vec::new();
    for n in 0..TRIES {
        if n > 0 {
            thread::sleep(PAUSE);
        }
        let batch = objects(&args.source)?;
        for problem in &batch.problems {
            output::warn(&format!("warning: {problem}"));
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
        output::print("the maps are as they should be")?;
    }
    Ok(if drifts.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_the_node_is_the_given_one_or_that_of_the_last_agent() {
        for (given, agent, expected, warns) in [
            (None, None, None, false),
            (None, Some("n1"), Some("n1"), false),
            (Some("n1"), None, Some("n1"), false),
            (Some("n1"), Some("n1"), Some("n1"), false),
            (Some("n2"), Some("n1"), Some("n2"), true),
            (None, Some(""), None, false),
            (Some("n1"), Some(""), Some("n1"), false),
        ] {
            assert_eq!(node_name(given, agent), expected, "{given:?}, {agent:?}");
            let warning = name_warning(given, agent);
            assert_eq!(warning.is_some(), warns, "{given:?}, {agent:?}");
            if let Some(warning) = warning {
                assert!(warning.contains("is n2 by --node-name"), "{warning}");
            }
        }
    }
}
