//! `nodeport`: what packets from outside cost: lb's programs beside the same work in C, packet by packet, and requests of
//! a client outside the cluster against kube-proxy's rules.
//!
//! Everything happens in network namespaces of the test bed, none of which has a way out.

mod packets;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use comfy_table::Table;
use indicatif::ProgressBar;
use serde::Serialize;

use crate::programs;
use crate::report::{self, Machine, range, table};
use crate::sizes::progress;
use packets::{Case, Cost};

/// lb's program / that in C, both above a program that does nothing.
const LIMIT: f64 = 1.5;

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Number of other Services
    #[arg(long, default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    services: u32,
    /// Rounds of each comparison
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,
    /// Folder for the results as JSON
    #[arg(long)]
    out: PathBuf,
    /// Fail where a limit is exceeded
    #[arg(long)]
    check: bool,
}

/// A limit, and how it was met.
#[derive(Debug, Serialize)]
struct Check {
    #[serde(flatten)]
    case: Case,
    limit: f64,
    measured: f64,
    met: bool,
}

/// Everything, as the JSON file holds it.
#[derive(Debug, Serialize)]
struct Report {
    machine: Machine,
    services: u32,
    rounds: u32,
    costs: Vec<Cost>,
    checks: Vec<Check>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let mut report = Report {
        machine: Machine::this()?,
        services: options.services,
        rounds: options.rounds,
        costs: Vec::new(),
        checks: Vec::new(),
    };
    let bar = progress("packets".to_owned())?;
    if which::which(programs::CLANG).is_ok() {
        report.costs = costs(options, &bar)?;
    } else {
        eprintln!("no clang, so nothing is compared with C; install clang for that");
    }
    bar.finish_and_clear();
    report.checks = report.costs.iter().map(check).collect();
    report::print([("packets", cost_table(&report.costs))])?;
    report::write(&options.out, "nodeport.json", &report)?;
    if !options.check {
        return Ok(ExitCode::SUCCESS);
    }
    ensure!(!report.checks.is_empty(), "the limits are ratios to C: install clang");
    Ok(if report.checks.iter().all(|check| check.met) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn check(cost: &Cost) -> Check {
    let measured = cost.ratio.median;
    Check {
        case: cost.case,
        limit: LIMIT,
        measured,
        met: measured <= LIMIT,
    }
}

/// What packets cost. Where a limit is exceeded, all is measured once more, as for the other programs: both are told, and
/// the second counts.
fn costs(options: &Options, bar: &ProgressBar) -> Result<Vec<Cost>> {
    bar.set_length(u64::from(options.rounds) + 1);
    let mut bed = packets::Bed::new(options.services, programs::compile(packets::SOURCE)?)?;
    let subjects = bed.subjects()?;
    let mut costs = bed.compare(&subjects, options.rounds, || bar.inc(1))?;
    if costs.iter().any(|cost| !check(cost).met) {
        bar.suspend(|| eprintln!("a limit is exceeded: once more"));
        bar.inc_length(u64::from(options.rounds) + 1);
        let again = bed.compare(&subjects, options.rounds, || bar.inc(1))?;
        for (cost, again) in costs.iter_mut().zip(again).filter(|(cost, _)| !check(cost).met) {
            let Case { packet, family, .. } = cost.case;
            let both = format!(
                "{}, {}, {}: {:.3}, once more {:.3} (at most {LIMIT})",
                packet.label(),
                family.label(),
                cost.case.protocol(),
                cost.ratio.median,
                again.ratio.median
            );
            bar.suspend(|| eprintln!("{both}"));
            *cost = again;
        }
    }
    bed.take_down()?;
    Ok(costs)
}

fn cost_table(costs: &[Cost]) -> Table {
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
    for cost in costs {
        let ratio = |value: f64| format!("{value:.2}");
        let verdict = if check(cost).met { "met" } else { "EXCEEDED" };
        table.add_row([
            cost.case.packet.label().to_owned(),
            cost.case.hook.label().to_owned(),
            cost.case.family.label().to_owned(),
            cost.case.protocol().to_owned(),
            format!("{:.0}", cost.lb),
            format!("{:.0}", cost.c),
            format!("{:.0}", cost.empty),
            ratio(cost.ratio.median),
            range(&ratio(cost.interval.0), &ratio(cost.interval.1)),
            range(&ratio(cost.ratio.low), &ratio(cost.ratio.high)),
            format!("{LIMIT:.1}"),
            verdict.to_owned(),
        ]);
    }
    table
}
