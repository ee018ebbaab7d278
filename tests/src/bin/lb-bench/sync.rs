//! `sync`: time from objects to maps for all numbers of Services, each in a process of its own, with table, JSON and limits.

use std::env::current_exe;
use std::fs;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, ensure};
use comfy_table::Table;
use serde::Serialize;

use crate::measure::Measured;
use crate::report::{self, Check, Named, Reporting, table};

#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Numbers of Services
    #[arg(long, value_delimiter = ',', default_values_t = [1_000, 10_000, 30_000])]
    services: Vec<u32>,
    /// Endpoints of each Service
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    endpoints: u32,
    /// Measured changes of one endpoint
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..))]
    changes: u32,
    #[command(flatten)]
    reporting: Reporting,
}

/// Number of Services that the change of one endpoint is compared with.
const SMALL: u32 = 10;

/// Number of Services, and endpoints of each, that the limits apply to.
const LARGE: (u32, u32) = (30_000, 10);

/// Report, as the JSON file contains it.
#[derive(Debug, Serialize)]
struct Report {
    kernel: String,
    /// Measurements with objects in memory.
    sizes: Vec<Measured>,
    /// Measurements with objects from files.
    from_manifests: Vec<Measured>,
    checks: Vec<Check<Named>>,
}

pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let mut numbers = options.services.clone();
    numbers.push(SMALL);
    numbers.sort_unstable();
    numbers.dedup();
    ensure!(numbers[0] > 0, "the number of Services must not be zero");
    let measure_all = |manifests| {
        let each = numbers.iter().map(|services| measure(*services, options, manifests));
        each.collect::<Result<Vec<_>>>()
    };
    let (sizes, from_manifests) = (measure_all(false)?, measure_all(true)?);
    let checks = checks(&sizes, &from_manifests);
    report::print([
        ("objects in memory", size_table(&sizes)),
        ("objects from manifests", manifest_table(&from_manifests)),
        ("limits", report::check_table("what", &checks)),
    ])?;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the kernel's release")?;
    let report = Report {
        kernel: kernel.trim().into(),
        sizes,
        from_manifests,
        checks,
    };
    options.reporting.write("sync.json", &report)?;
    let complete = report.checks.first().map(drop);
    options.reporting.verdict(
        &report.checks,
        complete.with_context(|| format!("the limits apply to {LARGE:?}: measure that size")),
    )
}

/// Measures one number of Services in a process of its own.
fn measure(services: u32, options: &Options, manifests: bool) -> Result<Measured> {
    let program = current_exe().context("finding this program")?;
    let output = Command::new(program)
        .arg("sync-one")
        .args(["--services", &services.to_string()])
        .args(["--endpoints", &options.endpoints.to_string()])
        .args(["--changes", &options.changes.to_string()])
        .args(manifests.then_some("--manifests"))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("starting this program")?;
    ensure!(
        output.status.success(),
        "measuring {services} Services: {}",
        output.status
    );
    serde_json::from_slice(&output.stdout).context("reading what was measured")
}

/// Returns the limits of the measured numbers of Services.
fn checks(sizes: &[Measured], from_manifests: &[Measured]) -> Vec<Check<Named>> {
    fn find(sizes: &[Measured], services: u32) -> Option<&Measured> {
        sizes.iter().find(|m| m.services == services)
    }
    let (Some(small), Some(large), Some(from_files)) =
        (find(sizes, SMALL), find(sizes, LARGE.0), find(from_manifests, LARGE.0))
    else {
        return Vec::new();
    };
    if large.endpoints != LARGE.1 {
        return Vec::new();
    }
    let check = |what, measured, limit| Check::at_most(limit, Named { what }, measured);
    vec![
        check("30,000 Services x 10 endpoints applied (s)", large.first_seconds, 1.0),
        check("one change at that size, p99 (ms)", large.change_p99_seconds * 1e3, 1.0),
        check(
            "one change at that size / with 10 Services, p50",
            large.change_p50_seconds / small.change_p50_seconds,
            2.0,
        ),
        check(
            "resident memory at that size, without maps (MB)",
            megabytes(large.own_bytes()),
            70.0,
        ),
        check("the same from manifests (MB)", megabytes(from_files.own_bytes()), 85.0),
    ]
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

fn size_table(sizes: &[Measured]) -> Table {
    let mut table = table(&[
        "Services x endpoints",
        "first (ms)",
        "written (MB)",
        "change p50 (us)",
        "p99 (us)",
        "written (B)",
        "resident (MB)",
        "its own",
        "peak",
        "maps (MB)",
    ]);
    for m in sizes {
        table.add_row([
            format!("{} x {}", m.services, m.endpoints),
            format!("{:.1}", m.first_seconds * 1e3),
            format!("{:.1}", megabytes(m.first_bytes)),
            format!("{:.1}", m.change_p50_seconds * 1e6),
            format!("{:.1}", m.change_p99_seconds * 1e6),
            format!("{:.0}", m.change_bytes),
            format!("{:.1}", megabytes(m.resident_bytes)),
            format!("{:.1}", megabytes(m.own_bytes())),
            format!("{:.1}", megabytes(m.peak_bytes)),
            format!("{:.1}", megabytes(m.map_bytes)),
        ]);
    }
    table
}

fn manifest_table(from_manifests: &[Measured]) -> Table {
    let mut table = table(&[
        "Services x endpoints",
        "size (MB)",
        "parse (ms)",
        "apply (ms)",
        "resident (MB)",
        "its own",
        "peak",
    ]);
    for m in from_manifests {
        let (bytes, seconds) = m.parsed.map_or((0, 0.0), |parsed| (parsed.bytes, parsed.seconds));
        table.add_row([
            format!("{} x {}", m.services, m.endpoints),
            format!("{:.1}", megabytes(bytes)),
            format!("{:.1}", seconds * 1e3),
            format!("{:.1}", m.first_seconds * 1e3),
            format!("{:.1}", megabytes(m.resident_bytes)),
            format!("{:.1}", megabytes(m.own_bytes())),
            format!("{:.1}", megabytes(m.peak_bytes)),
        ]);
    }
    table
}
