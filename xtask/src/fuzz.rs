//! `fuzz`: random input for a given time. Input that fails is kept below `tests/fuzz/regressions`.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::ValueEnum;

use crate::command::{cargo, clean_command};
use crate::setup::{self, Scope};
use crate::test::{self, LongTest};
use crate::workspace::root;

/// Flag of libFuzzer for the longest input: a packet of Ethernet, with some room.
const LONGEST: &str = "-max_len=1600";

/// Arguments of `fuzz`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Seconds for each target
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Target to run [default: all]
    target: Option<Target>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Target {
    /// Bytes of a manifest
    Manifests,
    /// Sequences of changes, faults and restarts against maps in memory
    Apply,
    /// Bytes of a packet against the parser, by cargo-fuzz
    Parse,
    /// Rewrite of a packet and its checksums, by cargo-fuzz
    Rewrite,
    /// Packets to the programs in the kernel, as root
    Packets,
}

/// Runs the targets one after another.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut well = true;
    for target in args.target.map_or(Target::value_variants().to_vec(), |one| vec![one]) {
        well &= match target {
            Target::Manifests => of_agent("fuzz::tests::damaged_manifests", args.seconds)?,
            Target::Apply => of_agent("fuzz::tests::random_runs", args.seconds)?,
            Target::Parse => by_cargo_fuzz("parse", args.seconds)?,
            Target::Rewrite => by_cargo_fuzz("rewrite", args.seconds)?,
            Target::Packets => in_kernel(args.seconds)?,
        };
    }
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn of_agent(test: &str, seconds: u64) -> anyhow::Result<bool> {
    let status = cargo()
        .current_dir(root())
        .args(["test", "-p", "lb-agent", "--lib", "--", "--exact", "--nocapture", test])
        .env("LB_FUZZ_SECONDS", seconds.to_string())
        .status();
    Ok(status.context("cannot run cargo")?.success())
}

/// Runs a target of `tests/fuzz`. New interesting input stays below `target`; `cargo fuzz cmin` selects the part of it that
/// is worth a place in the tree.
fn by_cargo_fuzz(target: &str, seconds: u64) -> anyhow::Result<bool> {
    if which::which("cargo-fuzz").is_err() || which::which("rustup").is_err() {
        println!(
            "{target} needs cargo-fuzz and a nightly compiler: `cargo install cargo-fuzz --locked`, `rustup toolchain install \
             nightly`"
        );
        return Ok(false);
    }
    let fuzz = root().join("tests/fuzz");
    let found = root().join("target/fuzz/corpus").join(target);
    fs::create_dir_all(&found).with_context(|| format!("making {}", found.display()))?;
    let regressions = fuzz.join("regressions").join(target);
    let status = clean_command("rustup")
        .args(["run", "nightly", "cargo", "fuzz", "run", "--fuzz-dir"])
        .arg(&fuzz)
        .arg("--target-dir")
        .arg(root().join("target/fuzz"))
        .arg(target)
        .args([&found, &fuzz.join("corpus").join(target)])
        .args(["--", LONGEST, "-print_final_stats=1"])
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-artifact_prefix={}", as_folder(&regressions)))
        .status();
    Ok(status.context("cannot run rustup")?.success())
}

/// Returns a prefix for the names of files in a folder: libFuzzer only appends the name.
fn as_folder(path: &Path) -> String {
    format!("{}/", path.display())
}

fn in_kernel(seconds: u64) -> anyhow::Result<bool> {
    if setup::run(Scope::All)? != ExitCode::SUCCESS {
        bail!("the setup is not complete");
    }
    let done = test::run_long(LongTest {
        target: "tc_programs",
        test: "random::random_packets_are_translated_correctly_or_left_alone",
        variable: ("LB_FUZZ_SECONDS", seconds.to_string()),
        kubernetes: false,
    })?;
    Ok(done == ExitCode::SUCCESS)
}
