//! The check of the demo: every response is right, the distribution is even, and the nodes are as before.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail};

use super::cluster::DemoCluster;
use super::curl::{self, CurlResult};
use super::manifests::ServicePort;
use super::print_line;
use super::signals::Signals;
use crate::load::Summary;
use crate::{Connect, chi_squared_p, scaled_timeout};

/// Connections per Service port and round, from all clients together.
const SAMPLES: u64 = 400;

/// A distribution with a lower p-value counts as uneven. One in a thousand even ones is below it; in both of two rounds,
/// one in a million.
const MIN_P: f64 = 0.001;

/// Time limit for the connections of one client: far more than they need, but a check of a broken system ends.
const TIMEOUT: Duration = Duration::from_secs(5);

/// The number of failed checks. Each result is printed at once.
struct CheckResults {
    failed: u32,
}

impl CheckResults {
    fn record(&mut self, passed: bool, what: &str) -> Result<()> {
        if !passed {
            self.failed += 1;
        }
        print_line(&format!("{}  {what}", if passed { "  ok" } else { "FAIL" }))
    }
}

/// Runs all checks and returns whether all have passed.
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
        check_curl(demo, service, &mut results)?;
        check_distribution(demo, service, signals, &mut results)?;
    }
    print_line("the nodes")?;
    check_nodes(demo, &mut results)?;
    if results.failed == 0 {
        print_line("all checks passed")?;
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

/// Checks one request by curl from every client.
fn check_curl(demo: &DemoCluster, service: &ServicePort, results: &mut CheckResults) -> Result<()> {
    for (client, netns, address) in demo.client_targets(service) {
        let (passed, text) = match curl::request(netns, address)? {
            CurlResult::From(name) => (service.backends.iter().any(|backend| backend.pod == name), name),
            CurlResult::Failed(why) => (false, why),
        };
        results.record(passed, &format!("curl from {client} to {address}: {text}"))?;
    }
    Ok(())
}

/// Checks many connections from every client, and their distribution over the backends.
fn check_distribution(
    demo: &DemoCluster,
    service: &ServicePort,
    signals: &Signals,
    results: &mut CheckResults,
) -> Result<()> {
    let targets = demo.client_targets(service);
    let each = SAMPLES.div_ceil(targets.len() as u64);
    for round in 1..=2 {
        let mut counts: BTreeMap<&str, u64> = service.backends.iter().map(|backend| (&*backend.pod, 0)).collect();
        let mut all_passed = true;
        for (client, netns, address) in &targets {
            if signals.arrived() {
                bail!("interrupted");
            }
            let connect = Connect::to(&[*address])
                .count(each)
                .seconds(scaled_timeout(TIMEOUT).as_secs_f64())
                .threads(4)
                .http()
                .peer_check();
            let summary = demo.testbed.connect(netns, &connect)?;
            let failure = find_failure(&summary, each, &counts);
            all_passed &= failure.is_none();
            if round == 1 || failure.is_some() {
                let text = failure
                    .as_deref()
                    .unwrap_or("all succeeded, all peers are the requested address");
                results.record(
                    failure.is_none(),
                    &format!("{} connections from {client}: {text}", summary.connections),
                )?;
            }
            for (name, count) in &mut counts {
                *count += summary.reached(name);
            }
        }
        if counts.len() < 2 || !all_passed {
            return Ok(());
        }
        let p = chi_squared_p(&counts.values().copied().collect::<Vec<_>>());
        let even = p > MIN_P;
        let text: Vec<String> = counts.iter().map(|(name, count)| format!("{name} {count}")).collect();
        let text = format!("distribution: {} (chi-squared p = {p:.4})", text.join(", "));
        if even || round == 2 {
            return results.record(even, &text);
        }
        print_line(&format!("      {text}: a second round follows"))?;
    }
    Ok(())
}

/// Returns the first failure in the results of a client, if there is one.
fn find_failure(summary: &Summary, wanted: u64, backends: &BTreeMap<&str, u64>) -> Option<String> {
    if let Err(error) = summary.all_well() {
        return Some(format!("{error:#}"));
    }
    if summary.connections < wanted {
        return Some(format!(
            "{wanted} connections take more than {:?}",
            scaled_timeout(TIMEOUT)
        ));
    }
    let others: Vec<&str> = summary
        .per_backend
        .keys()
        .map(String::as_str)
        .filter(|name| !backends.contains_key(name))
        .collect();
    (!others.is_empty()).then(|| format!("answered by {others:?}, which are not its backends"))
}

/// Checks that the agents run, that their maps are right, and that they have not changed rules and addresses of the nodes.
fn check_nodes(demo: &mut DemoCluster, results: &mut CheckResults) -> Result<()> {
    for (node, before) in demo.cluster.nodes().iter().zip(&demo.rules_before) {
        let same = node.ruleset()? == *before;
        let text = if same { "unchanged" } else { "changed" };
        results.record(same, &format!("{}: iptables and nftables rules {text}", node.name()))?;
        let addresses = node.addresses()?;
        let taken = demo
            .services
            .iter()
            .find(|service| addresses.contains(&service.frontend.ip()));
        let text = taken.map_or_else(
            || "no cluster IP is on an interface".to_owned(),
            |service| format!("{} is on an interface", service.frontend.ip()),
        );
        results.record(taken.is_none(), &format!("{}: {text}", node.name()))?;
    }
    for agent in &mut demo.agents {
        let runs = agent.process().is_running()?;
        let text = if runs { "is running" } else { "has ended" };
        results.record(runs, &format!("{}: lb-agent {text}", agent.node()))?;
        let result = agent.verify();
        let text = result.as_ref().map_or_else(
            |error| format!("lb-agent verify: {error:#}"),
            |()| "lb-agent verify: the maps have the desired state".to_owned(),
        );
        results.record(result.is_ok(), &format!("{}: {text}", agent.node()))?;
    }
    Ok(())
}
