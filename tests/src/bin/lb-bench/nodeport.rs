//! `nodeport`: costs of packets from outside in lb's programs and equal programs in C, packet by packet, and requests of a
//! client outside the cluster, compared with kube-proxy's rules.
//!
//! All traffic stays in network namespaces of the test bed, which have no route to the outside.

pub(crate) mod http;
mod packets;
mod requests;

use std::process::ExitCode;

use anyhow::{Context as _, Result};
use comfy_table::Table;
use indicatif::ProgressBar;
use serde::Serialize;

use crate::programs;
use crate::report::{self, Check, HasLimits, Machine, Reporting, cells, percent_cells, table};
use crate::sizes::progress;
use packets::{Case, Cost};
use requests::Requests;

/// Limit of the ratio of lb's program to the one in C, both above an empty program.
const LIMIT: f64 = 1.5;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Number of other Services
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    services: u32,
    /// Rounds of each comparison
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,
    #[command(flatten)]
    reporting: Reporting,
}

/// Report, as the JSON file contains it.
#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    services: u32,
    rounds: u32,
    costs: Vec<Cost>,
    requests: Vec<Requests>,
    checks: Vec<Check<Case>>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let mut report = Report {
        machine: Machine::this()?,
        services: options.services,
        rounds: options.rounds,
        costs: Vec::new(),
        requests: Vec::new(),
        checks: Vec::new(),
    };
    let bar = progress("node ports".to_owned())?;
    bar.set_message("packets");
    if which::which(programs::CLANG).is_ok() {
        report.costs = costs(options, &bar)?;
    } else {
        eprintln!("clang is not installed, so programs in C are not compared");
    }
    report.requests = requests(options, &bar)?;
    bar.finish_and_clear();
    report.checks = report::check_limits(&report.costs);
    report::print([
        ("packets", cost_table(&report.costs, &report.checks)),
        ("requests", request_table(&report.requests)),
    ])?;
    options.reporting.write("nodeport.json", &report)?;
    let complete = report.checks.first().map(drop);
    options.reporting.verdict(
        &report.checks,
        complete.context("the limits are ratios to programs in C: install clang"),
    )
}

/// Each cost has one limit.
impl HasLimits for Cost {
    type Figure = Case;

    fn checks(&self) -> Vec<Check<Case>> {
        vec![Check::at_most(LIMIT, self.case, self.ratio.median)]
    }
}

/// Measures the costs of packets.
fn costs(options: &Options, bar: &ProgressBar) -> Result<Vec<Cost>> {
    bar.set_length(u64::from(options.rounds) + 1);
    let mut bed = packets::TestBed::new(options.services, programs::compile(packets::SOURCE)?)?;
    let subjects = bed.subjects()?;
    let costs = report::compare_again_if_exceeded(bar, || bed.compare(&subjects, options.rounds, || bar.inc(1)))?;
    bed.take_down()?;
    Ok(costs)
}

/// Measures the rate of requests of a client outside the cluster, in half as many rounds, because these are long.
fn requests(options: &Options, bar: &ProgressBar) -> Result<Vec<Requests>> {
    let rounds = options.rounds.div_ceil(2);
    bar.set_message("rules and maps");
    let mut bed = requests::TestBed::new(options.services)?;
    bar.set_message("requests");
    bar.set_position(0);
    bar.set_length(requests::ticks(rounds));
    let requests = bed.measure(rounds, || bar.inc(1))?;
    bed.take_down()?;
    Ok(requests)
}

fn request_table(requests: &[Requests]) -> Table {
    let mut table = table(&[
        "requests",
        "family",
        "by",
        "per second",
        "p50 (us)",
        "p99 (us)",
        "of direct (%)",
        "quartiles",
        "lb / this",
        "quartiles",
    ]);
    for one in requests {
        let [percent, percent_quartiles] = percent_cells(one.way, one.of_direct);
        let compared = one.way.has_rules().then_some(one.lb_to_this);
        let [ratio, quartiles] = cells(compared, |value| format!("{value:.2}"));
        table.add_row([
            one.kind.label(),
            one.kind.family.label().to_owned(),
            one.way.label().to_owned(),
            format!("{:.0}", one.rate),
            format!("{:.0}", one.p50),
            format!("{:.0}", one.p99),
            percent,
            percent_quartiles,
            ratio,
            quartiles,
        ]);
    }
    table
}

fn cost_table(costs: &[Cost], checks: &[Check<Case>]) -> Table {
    let mut table = table(&[
        "packet",
        "hook",
        "family",
        "protocol",
        "lb (ns)",
        "C (ns)",
        "empty (ns)",
        "lb / C",
        "95 %",
        "quartiles",
        "at most",
        "",
    ]);
    for (cost, check) in costs.iter().zip(checks) {
        let text = |value: f64| format!("{value:.2}");
        let [ratio, quartiles] = cells(Some(cost.ratio), text);
        table.add_row([
            cost.case.packet.label().to_owned(),
            cost.case.hook.label().to_owned(),
            cost.case.family.label().to_owned(),
            cost.case.protocol().to_owned(),
            format!("{:.0}", cost.lb),
            format!("{:.0}", cost.c),
            format!("{:.0}", cost.empty),
            ratio,
            format!("{}..{}", text(cost.interval.0), text(cost.interval.1)),
            quartiles,
            format!("{:.1}", check.limit),
            check.verdict().to_owned(),
        ]);
    }
    table
}
