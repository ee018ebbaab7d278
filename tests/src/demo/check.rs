//! The demo's check: is every answer right, and is the spread even?

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Result, bail};

use super::callers::{Answer, call};
use super::manifests::ServicePort;
use super::say;
use super::signals::Signals;
use super::stage::Stage;
use crate::load::Summary;
use crate::{Connect, chi_squared_p, patience};

/// Connections per Service and round, from all places together.
const SAMPLES: u64 = 400;

/// A spread less likely than this counts as uneven. One in a thousand even ones fails; both of two rounds, one in a
/// million.
const LEAST_P: f64 = 0.001;

/// How long the connections from one place may take: far more than they need, and the check of a broken system has
/// an end.
const LONGEST: Duration = Duration::from_secs(5);

/// What was found, printed as it comes.
struct Findings {
    failed: u32,
}

impl Findings {
    fn note(&mut self, well: bool, what: &str) -> Result<()> {
        if !well {
            self.failed += 1;
        }
        say(&format!("{}  {what}", if well { "  ok" } else { "FAIL" }))
    }
}

/// Runs all checks; whether all were passed.
pub(super) fn run(stage: &mut Stage, signals: &Signals) -> Result<bool> {
    let mut findings = Findings { failed: 0 };
    for service in &stage.services {
        if signals.arrived() {
            bail!("interrupted");
        }
        say(&format!(
            "{}/{} at {}",
            service.namespace, service.name, service.frontend
        ))?;
        curl(stage, service, &mut findings)?;
        spread(stage, service, signals, &mut findings)?;
    }
    say("the nodes")?;
    machine(stage, &mut findings)?;
    if findings.failed == 0 {
        say("all well")?;
    } else {
        say(&format!("{} checks failed", findings.failed))?;
        for agent in &stage.agents {
            say(&format!(
                "the log of lb-agent on {}:\n{}",
                agent.node(),
                agent.log_tail()
            ))?;
        }
    }
    Ok(findings.failed == 0)
}

/// Real curl from everywhere.
fn curl(stage: &Stage, service: &ServicePort, findings: &mut Findings) -> Result<()> {
    for (place_name, place, address) in stage.calls(service) {
        let (well, text) = match call(place, address)? {
            Answer::From(name) => (service.backends.iter().any(|backend| backend.pod == name), name),
            Answer::Failed(why) => (false, why),
        };
        findings.note(well, &format!("curl from {place_name} to {address}: {text}"))?;
    }
    Ok(())
}

/// Many connections from everywhere, counted per backend.
fn spread(stage: &Stage, service: &ServicePort, signals: &Signals, findings: &mut Findings) -> Result<()> {
    let places = stage.calls(service);
    let each = SAMPLES.div_ceil(places.len() as u64);
    for round in 1..=2 {
        let mut counts: BTreeMap<&str, u64> = service.backends.iter().map(|backend| (&*backend.pod, 0)).collect();
        let mut right = true;
        for (place_name, place, address) in &places {
            if signals.arrived() {
                bail!("interrupted");
            }
            let connect = Connect::to(&[*address])
                .count(each)
                .seconds(patience(LONGEST).as_secs_f64())
                .threads(4)
                .http()
                .peer_check();
            let summary = stage.testbed.connect(place, &connect)?;
            let trouble = trouble(&summary, each, &counts);
            right &= trouble.is_none();
            if round == 1 || trouble.is_some() {
                let text = trouble
                    .as_deref()
                    .unwrap_or("all answered, all peers are who was asked");
                findings.note(
                    trouble.is_none(),
                    &format!("{} connections from {place_name}: {text}", summary.connections),
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
            return findings.note(even, &text);
        }
        say(&format!("      {text}: once more"))?;
    }
    Ok(())
}

/// What is wrong with the answers that a client got.
fn trouble(summary: &Summary, wanted: u64, backends: &BTreeMap<&str, u64>) -> Option<String> {
    if let Err(error) = summary.all_well() {
        return Some(format!("{error:#}"));
    }
    if summary.connections < wanted {
        return Some(format!("{wanted} take more than {:?}", patience(LONGEST)));
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
fn machine(stage: &mut Stage, findings: &mut Findings) -> Result<()> {
    for (node, before) in stage.cluster.nodes().iter().zip(&stage.rules_before) {
        let same = node.ruleset()? == *before;
        let text = if same { "not touched" } else { "changed" };
        findings.note(same, &format!("{}: iptables and nftables rules {text}", node.name()))?;
        let addresses = node.addresses()?;
        let taken = stage
            .services
            .iter()
            .find(|service| addresses.contains(&service.frontend.ip()));
        let text = taken.map_or_else(
            || "no virtual address is on an interface".to_owned(),
            |service| format!("{} is on an interface", service.frontend.ip()),
        );
        findings.note(taken.is_none(), &format!("{}: {text}", node.name()))?;
    }
    for agent in &mut stage.agents {
        let runs = agent.process().is_running()?;
        let text = if runs { "runs" } else { "has ended" };
        findings.note(runs, &format!("{}: lb-agent {text}", agent.node()))?;
        let result = agent.verify();
        let text = result.as_ref().map_or_else(
            |error| format!("lb-agent verify: {error:#}"),
            |()| "lb-agent verify finds the maps as they should be".to_owned(),
        );
        findings.note(result.is_ok(), &format!("{}: {text}", agent.node()))?;
    }
    Ok(())
}
