//! The demo's check: is every answer right, and is the spread even?

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail};

use super::cluster::DemoCluster;
use super::curl::{CurlResult, call};
use super::manifests::ServicePort;
use super::print_line;
use super::signals::Signals;
use crate::load::Summary;
use crate::{Connect, chi_squared_p, scaled_timeout};

/// Connections per Service and round, from all places together.
const SAMPLES: u64 = 400;

/// A spread less likely than this counts as uneven. One in a thousand even ones fails; both of two rounds, one in a
/// million.
const LEAST_P: f64 = 0.001;

/// How long the connections from one place may take: far more than they need, and the check of a broken system has
/// an end.
const LONGEST: Duration = Duration::from_secs(5);

/// What was found, printed as it comes.
struct CheckResults {
    failed: u32,
}

impl CheckResults {
    fn note(&mut self, well: bool, what: &str) -> Result<()> {
        if !well {
            self.failed += 1;
        }
        print_line(&format!("{}  {what}", if well { "  ok" } else { "FAIL" }))
    }
}

/// Runs all checks; whether all were passed.
pub(super) fn run(demo: &mut DemoCluster, signals: &Signals) -> Result<bool> {
    let mut results = CheckResults { failed: 0 };
    for service in &demo.services {
        if signals.arrived() {
            bail!("interrupted");
        }
        print_line(&format!(
            "{}/{} at {}",
            service.namespace, service.name, service.frontend
        ))?;
        curl(demo, service, &mut results)?;
        spread(demo, service, signals, &mut results)?;
    }
    print_line("the nodes")?;
    machine(demo, &mut results)?;
    if results.failed == 0 {
        print_line("all well")?;
    } else {
        print_line(&format!("{} checks failed", results.failed))?;
        for agent in &demo.agents {
            print_line(&format!(
                "the log of lb-agent on {}:\n{}",
                agent.node(),
                agent.log_tail()
            ))?;
        }
    }
    Ok(results.failed == 0)
}

/// Real curl from everywhere.
fn curl(demo: &DemoCluster, service: &ServicePort, results: &mut CheckResults) -> Result<()> {
    for (client, netns, address) in demo.client_targets(service) {
        let (well, text) = match call(netns, address)? {
            CurlResult::From(name) => (service.backends.iter().any(|backend| backend.pod == name), name),
            CurlResult::Failed(why) => (false, why),
        };
        results.note(well, &format!("curl from {client} to {address}: {text}"))?;
    }
    Ok(())
}

/// Many connections from everywhere, counted per backend.
fn spread(demo: &DemoCluster, service: &ServicePort, signals: &Signals, results: &mut CheckResults) -> Result<()> {
    let targets = demo.client_targets(service);
    let each = SAMPLES.div_ceil(targets.len() as u64);
    for round in 1..=2 {
        let mut counts: BTreeMap<&str, u64> = service.backends.iter().map(|backend| (&*backend.pod, 0)).collect();
        let mut right = true;
        for (client, netns, address) in &targets {
            if signals.arrived() {
                bail!("interrupted");
            }
            let connect = Connect::to(&[*address])
                .count(each)
                .seconds(scaled_timeout(LONGEST).as_secs_f64())
                .threads(4)
                .http()
                .peer_check();
            let summary = demo.testbed.connect(netns, &connect)?;
            let trouble = trouble(&summary, each, &counts);
            right &= trouble.is_none();
            if round == 1 || trouble.is_some() {
                let text = trouble
                    .as_deref()
                    .unwrap_or("all answered, all peers are who was asked");
                results.note(
                    trouble.is_none(),
                    &format!("{} connections from {client}: {text}", summary.connections),
                )?;
            }
            for (name, count) in &mut counts {
                *count += summary.reached(name);
            }
        }
        if counts.len() < 2 || !right {
            return Ok(());
        }
        let p = chi_squared_p(&counts.values().copied().collect::<Vec<_>>());
        let even = p > LEAST_P;
        let text: Vec<String> = counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
        let text = format!("spread: {} (chi-squared p = {p:.4})", text.join(", "));
        if even || round == 2 {
            return results.note(even, &text);
        }
        print_line(&format!("      {text}: once more"))?;
    }
    Ok(())
}

/// What is wrong with the answers that a client got.
fn trouble(summary: &Summary, wanted: u64, backends: &BTreeMap<&str, u64>) -> Option<String> {
    if let Err(error) = summary.all_well() {
        return Some(format!("{error:#}"));
    }
    if summary.connections < wanted {
        return Some(format!("{wanted} take more than {:?}", scaled_timeout(LONGEST)));
    }
    let strangers: Vec<&str> = summary
        .per_backend
        .keys()
        .map(String::as_str)
        .filter(|name| !backends.contains_key(name))
        .collect();
    (!strangers.is_empty()).then(|| format!("answers from {strangers:?}, which are not its backends"))
}

/// What the agents may and may not have done to the nodes.
fn machine(demo: &mut DemoCluster, results: &mut CheckResults) -> Result<()> {
    for (node, before) in demo.cluster.nodes().iter().zip(&demo.rules_before) {
        let same = node.ruleset()? == *before;
        let text = if same { "not touched" } else { "changed" };
        results.note(same, &format!("{}: iptables and nftables rules {text}", node.name()))?;
        let addresses = node.addresses()?;
        let taken = demo
            .services
            .iter()
            .find(|service| addresses.contains(&service.frontend.ip()));
        let text = taken.map_or_else(
            || "no virtual address is on an interface".to_owned(),
            |service| format!("{} is on an interface", service.frontend.ip()),
        );
        results.note(taken.is_none(), &format!("{}: {text}", node.name()))?;
    }
    for agent in &mut demo.agents {
        let runs = agent.process().is_running()?;
        let text = if runs { "runs" } else { "has ended" };
        results.note(runs, &format!("{}: lb-agent {text}", agent.node()))?;
        let result = agent.verify();
        let text = result.as_ref().map_or_else(
            |error| format!("lb-agent verify: {error:#}"),
            |()| "lb-agent verify finds the maps as they should be".to_owned(),
        );
        results.note(result.is_ok(), &format!("{}: {text}", agent.node()))?;
    }
    Ok(())
}
