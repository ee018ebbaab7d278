//! `connect`: costs of a connection to a Service, compared with a direct one, kube-proxy's rules, equal programs in C, and the
//! floor of a connect hook.
//!
//! All traffic stays in network namespaces of the test bed, which have no route to the outside.

pub(crate) mod kube_proxy;
mod latency;
mod plot;
mod removal;

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use aya::sys::{Stats, enable_stats};
use comfy_table::Table;
use indicatif::ProgressBar;
use lb_core::model::Protocol;
use serde::Serialize;

use crate::cost::{self, Call, Cost, Step};
use crate::objects::Services;
use crate::report::{self, CallInScenario, Check, Machine, cells, table};
use crate::scenario::Scenario;
use crate::sizes::{self, Options};
use crate::testbed::{Loading, TestBed, Way};
use crate::worker::Task;
use latency::Latency;
use removal::RemovalCost;

/// Sockets for the programs of one maker in one round.
const SOCKETS: u32 = 1000;
/// Calls of `getpeername` for the programs of one maker in one round.
const PEERS: u32 = 1000;

const WAYS: [Way; 6] = [
    Way::Direct,
    Way::DirectAgain,
    Way::Lb,
    Way::C,
    Way::KubeProxyNftables,
    Way::KubeProxyIptables,
];

/// Report, as the JSON file contains it.
#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    endpoints: u32,
    rounds: u32,
    costs: Vec<Cost>,
    removals: Vec<RemovalCost>,
    latencies: Vec<Latency>,
    loading: Vec<Loading>,
    checks: Vec<Check<CallInScenario>>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let mut report = Report {
        machine: Machine::this()?,
        endpoints: options.endpoints,
        rounds: options.rounds,
        costs: Vec::new(),
        removals: Vec::new(),
        latencies: Vec::new(),
        loading: Vec::new(),
        checks: Vec::new(),
    };
    sizes::each(options, Protocol::Tcp, |services, object, bar| {
        measure(services, object, bar, &mut report)
    })?;
    report.checks = report::check_limits(&report.costs);
    report::print([
        ("connect()", latency_table(&report.latencies)),
        ("runs of a program", report::cost_table(&report.costs)),
        ("steps of connect() (ns)", removal::table(&report.removals)),
        ("kube-proxy's rules", loading_table(&report.loading)),
        ("limits", report::check_table("figure", &report.checks)),
    ])?;
    options.reporting.write("connect.json", &report)?;
    plot::draw(&report, &options.reporting.out)?;
    let complete = report::is_complete(&report.checks);
    options.reporting.verdict(&report.checks, complete)
}

/// Measures one number of Services in one family.
fn measure(services: Services, object: Option<&[u8]>, bar: &ProgressBar, whole: &mut Report) -> Result<()> {
    let rounds = whole.rounds;
    let mut bed = TestBed::new(services, object, &WAYS)?;
    let scenarios = Scenario::all(services);
    bar.set_length(2 * (u64::from(rounds) + 1) + removal::ticks(rounds) + latency::ticks(&bed, rounds));
    bar.set_message("programs");
    let statistics = enable_stats(Stats::RunTime)?;
    let ask = Step {
        task: Task::Ask,
        count: SOCKETS,
        calls: &[Call::Connect, Call::Close],
    };
    let asked = report::compare_again_if_exceeded(bar, || {
        cost::compare(&mut bed, &scenarios, &[ask], rounds, || bar.inc(1))
    })?;
    let removals = removal::measure(&mut bed, rounds, || bar.inc(1))?;
    bed.bring_up_backends()?;
    let peer = Step {
        task: Task::Peer,
        count: PEERS,
        calls: &[Call::Getpeername],
    };
    let hot: Vec<_> = scenarios.into_iter().filter(Scenario::is_hot).collect();
    let peers = cost::compare(&mut bed, &hot, &[peer], rounds, || bar.inc(1))?;
    drop(statistics);
    whole.costs.extend(asked.into_iter().chain(peers));
    whole.removals.extend(removals);
    bar.set_message("connections");
    whole.latencies.extend(latency::measure(&bed, rounds, || bar.inc(1))?);
    whole
        .loading
        .push(bed.take_down()?.context("kube-proxy's rules were loaded")?);
    Ok(())
}

fn latency_table(latencies: &[Latency]) -> Table {
    let mut table = table(&[
        "Services",
        "family",
        "to",
        "by",
        "p50 (us)",
        "p99 (us)",
        "above direct (us)",
        "quartiles",
        "connections/s",
    ]);
    for l in latencies {
        let compared = (l.way != Way::Direct).then_some(l.above_direct);
        let [above, quartiles] = cells(compared, |value| format!("{value:.2}"));
        table.add_row([
            l.scenario.services.to_string(),
            l.scenario.family.label().to_owned(),
            l.scenario.label(),
            l.way.label().to_owned(),
            format!("{:.2}", l.p50),
            format!("{:.2}", l.p99),
            above,
            quartiles,
            format!("{:.0}", l.rate),
        ]);
    }
    table
}

fn loading_table(loading: &[Loading]) -> Table {
    let mut table = table(&["Services", "family", "nft (s)", "iptables (s)", "by"]);
    for loading in loading {
        table.add_row([
            loading.services.to_string(),
            loading.family.label().to_owned(),
            format!("{:.2}", loading.nftables_seconds),
            format!("{:.2}", loading.iptables_seconds),
            loading.iptables_program.to_owned(),
        ]);
    }
    table
}
