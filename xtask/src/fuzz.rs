//! `fuzz`: random input for as long as one likes. What fails is kept below `tests/fuzz/regressions`.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use clap::ValueEnum;

use crate::command::{cargo, clean_command};
use crate::setup::{self, Scope};
use crate::test::{self, Long};
use crate::workspace::root;

/// The longest packet: one of Ethernet, with something to spare.
const LONGEST: &str = "-max_len=1600";

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
    /// Bytes of a packet, by cargo-fuzz
    Parse,
    /// What becomes of a packet and its checksums, by cargo-fuzz
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

/// A target of `tests/fuzz`. What it finds interesting stays below `target`; `cargo fuzz cmin` chooses what is worth a place
/// in the tree.
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

/// libFuzzer only puts the name of a file behind it.
fn as_folder(path: &Path) -> String {
    format!("{}/", path.display())
}

fn in_kernel(seconds: u64) -> anyhow::Result<bool> {
    if setup::run(Scope::All)? != ExitCode::SUCCESS {
        bail!("the setup is not complete");
    }
    let done = test::long(Long {
        target: "tc_programs",
        test: "random::random_packets_are_translated_correctly_or_left_alone",
        variable: ("LB_FUZZ_SECONDS", seconds.to_string()),
        kubernetes: false,
    })?;
    Ok(done == ExitCode::SUCCESS)
}
