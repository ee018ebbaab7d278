//! `fuzz`: random input for as long as one likes. What fails is kept below `tests/fuzz/regressions`.

use std::process::ExitCode;

use anyhow::Context as _;
use clap::ValueEnum;

use crate::command::cargo;
use crate::root;

/// Arguments of `fuzz`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// For how long, each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// What is fuzzed [default: all]
    target: Option<Target>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Target {
    /// Bytes of a manifest
    Manifests,
    /// Runs of changes, faults and restarts against maps in memory
    Apply,
}

/// Runs the targets one after another.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let targets = args
        .target
        .map_or(vec![Target::Manifests, Target::Apply], |one| vec![one]);
    let mut well = true;
    for target in targets {
        let test = match target {
            Target::Manifests => "fuzz::tests::damaged_manifests",
            Target::Apply => "fuzz::tests::random_runs",
        };
        let status = cargo()
            .current_dir(root())
            .args(["test", "-p", "lb-agent", "--lib", "--", "--exact", "--nocapture", test])
            .env("LB_FUZZ_SECONDS", args.seconds.to_string())
            .status();
        well &= status.context("cannot run cargo")?.success();
    }
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
