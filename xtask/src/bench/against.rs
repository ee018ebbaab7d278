//! `bench --against COMMIT`: this workspace and a commit, measured in turn.
//!
//! Each is measured by its own `lb-bench`, which has the agent of its tree as a library: a commit with another layout of
//! maps or another interface inside can be compared too. Their reports, in JSON, are matched by the names of the figures.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde::Serialize;

use super::compare::{self, Pair, Row, Verified, VerifiedRow};
use super::figures::{self, Figures};
use crate::artifacts::{build_bench, build_bench_of};
use crate::commits::{check_out, resolve};
use crate::privilege::{as_root, search_path};
use crate::workspace::root;

/// Arguments of `--against`.
#[derive(Debug, clap::Args)]
pub(crate) struct Against {
    /// Compare this workspace with COMMIT: run both in turn, and fail if this workspace is slower or harder to verify.
    /// Works with connect, udp and nodeport, or all three
    #[arg(long = "against", global = true, value_name = "COMMIT")]
    pub(crate) commit: Option<String>,
    /// Number of pairs of runs for --against, at least 10
    #[arg(long, global = true, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(10..))]
    pairs: u32,
    /// Highest ratio new / old of a figure for --against; the lower bound of its 95 % interval counts
    #[arg(long, global = true, value_name = "RATIO", default_value_t = 1.03)]
    limit: f64,
    /// Highest ratio new / old of a program's verified instructions for --against
    #[arg(long, global = true, value_name = "RATIO", default_value_t = 1.03)]
    verified_limit: f64,
}

/// One of the two that are compared: a name, and the path of its `lb-bench`.
#[derive(Debug)]
struct Side {
    name: &'static str,
    program: PathBuf,
}

/// A benchmark of `lb-bench` and its arguments.
#[derive(Debug)]
pub(crate) struct Benchmark {
    /// Name of the subcommand, and of the report without its extension.
    pub(crate) name: &'static str,
    /// Its arguments, without the number of rounds.
    pub(crate) arguments: Vec<OsString>,
    /// Rounds of each comparison in one run.
    pub(crate) rounds: u32,
}

/// The result, as `against.json` contains it.
#[derive(Debug, Serialize)]
struct Report {
    commit: String,
    pairs: u32,
    figures: Vec<Row>,
    verified: Vec<VerifiedRow>,
}

/// Measures both sides and compares them.
///
/// # Errors
/// If a build or a run fails, or if a report cannot be read.
pub(crate) fn run(against: &Against, commit: &str, benchmarks: &[Benchmark], out: &Path) -> Result<ExitCode> {
    let commit = resolve(commit)?;
    let sides = build(&commit)?;
    let [new, old] = &sides;
    let scratch = tempfile::tempdir().context("cannot create a folder for the reports")?;

    let mut verified = [Verified::new(), Verified::new()];
    for (side, found) in sides.iter().zip(&mut verified) {
        for benchmark in benchmarks {
            println!("verified instructions: {} of {}", benchmark.name, side.name);
            merge(found, read_verified(side, &new.program, benchmark, scratch.path())?);
        }
    }
    let mut pairs = Vec::new();
    for number in 1..=against.pairs {
        let begin = Instant::now();
        let mut pair = Pair::default();
        for benchmark in benchmarks {
            // Each side runs first in half of the pairs: the first run heats the processor for the second.
            let order = if number % 2 == 0 { [new, old] } else { [old, new] };
            for side in order {
                let figures = measure(side, benchmark, scratch.path())?;
                let found = if side.name == new.name {
                    &mut pair.new
                } else {
                    &mut pair.old
                };
                found.extend(figures);
            }
        }
        pairs.push(pair);
        let seconds = begin.elapsed().as_secs();
        println!("pair {number} of {}: {seconds} s", against.pairs);
    }

    let report = Report {
        figures: compare::compare(&pairs, against.limit),
        verified: compare::compare_verified(&verified[0], &verified[1], against.verified_limit),
        pairs: against.pairs,
        commit,
    };
    println!("{}\n", compare::table(&report.figures));
    println!("{}\n", compare::verified_table(&report.verified));
    let out = root().join(out);
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let path = out.join("against.json");
    let json = serde_json::to_string_pretty(&report).context("cannot write JSON")?;
    fs::write(&path, json + "\n").with_context(|| format!("cannot write {}", path.display()))?;

    let slower = report.figures.iter().filter(|row| row.is_exceeded()).count();
    let harder = report.verified.iter().filter(|row| row.is_exceeded()).count();
    let compared = report.figures.iter().filter(|row| row.ratio.is_ok()).count();
    ensure!(compared > 0, "the two builds have no figure in common");
    println!(
        "{compared} figures compared, {slower} above the limit; {} programs, {harder} above the limit",
        report.verified.len()
    );
    Ok(if slower + harder == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Builds this workspace and the commit. The commit's worktree and its target folder stay below
/// `target/bench/against/HASH`, so the next comparison with it need not build it again.
fn build(commit: &str) -> Result<[Side; 2]> {
    let folder = root().join("target/bench/against").join(commit);
    let source = check_out(commit, &folder)?;
    println!("building {commit}");
    let old = build_bench_of(&source, &folder.join("target"))?.program("lb-bench")?;
    println!("building this workspace");
    let new = build_bench()?.program("lb-bench")?;
    Ok([
        Side {
            name: "this workspace",
            program: new,
        },
        Side {
            name: "the commit",
            program: old,
        },
    ])
}

/// The arguments of `lb-bench` for one run that writes its report into `out`.
fn arguments(benchmark: &Benchmark, rounds: u32, out: &Path) -> Vec<OsString> {
    let mut words = vec![benchmark.name.into()];
    words.extend(benchmark.arguments.iter().cloned());
    words.extend(["--rounds".into(), rounds.to_string().into(), "--out".into(), out.into()]);
    words
}

/// Runs a benchmark of one side and returns its figures.
fn measure(side: &Side, benchmark: &Benchmark, out: &Path) -> Result<Figures> {
    let mut command = as_root(&side.program, &[("PATH", search_path())], "the benchmark")?;
    command.args(arguments(benchmark, benchmark.rounds, out));
    run_quietly(&mut command, side, benchmark)?;
    let path = out.join(format!("{}.json", benchmark.name));
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let report = serde_json::from_str(&text).with_context(|| format!("{} is not JSON", path.display()))?;
    // The next run must not be mistaken for this one if it writes no report.
    remove(&path)?;
    figures::read(benchmark.name, &report)
}

/// Runs a benchmark of one side once, for the verified instructions of the programs that it loads. `observer` is the
/// `lb-bench` of this workspace, which also understands a run of an older one.
fn read_verified(side: &Side, observer: &Path, benchmark: &Benchmark, out: &Path) -> Result<Verified> {
    let path = out.join("verified.json");
    let mut command = as_root(observer, &[("PATH", search_path())], "the benchmark")?;
    command
        .arg("observe")
        .arg("--to")
        .arg(&path)
        .arg("--")
        .arg(&side.program);
    command.args(arguments(benchmark, 1, out));
    run_quietly(&mut command, side, benchmark)?;
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    remove(&path)?;
    let verified: Verified =
        serde_json::from_str(&text).with_context(|| format!("{} has another shape", path.display()))?;
    ensure!(
        !verified.is_empty(),
        "{} of {} loads no program",
        benchmark.name,
        side.name
    );
    Ok(verified)
}

/// Runs a benchmark without its tables; its output is in the error if it fails.
fn run_quietly(command: &mut Command, side: &Side, benchmark: &Benchmark) -> Result<()> {
    let output = command
        .current_dir(root())
        .stdin(Stdio::null())
        .output()
        .context("cannot run the benchmark")?;
    ensure!(
        output.status.success(),
        "{} of {} failed ({}):\n{}",
        benchmark.name,
        side.name,
        output.status,
        String::from_utf8_lossy(&output.stderr).trim_end()
    );
    Ok(())
}

/// Removes a file that a benchmark wrote as root, in a folder of this process.
fn remove(path: &Path) -> Result<()> {
    fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))
}

/// Adds the programs of one benchmark to those of others. The benchmarks of one build load the same object, so a program
/// has one number; if it has two, the higher one counts.
fn merge(all: &mut Verified, more: Verified) {
    for (program, verified) in more {
        let known = all.entry(program).or_default();
        *known = verified.max(*known);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_of_several_benchmarks_are_merged() {
        let mut all = Verified::from([("a".to_owned(), 2), ("b".to_owned(), 9)]);
        merge(&mut all, Verified::from([("a".to_owned(), 3), ("c".to_owned(), 1)]));
        let expected = [("a", 3), ("b", 9), ("c", 1)];
        assert_eq!(all, expected.map(|(name, number)| (name.to_owned(), number)).into());
    }

    #[test]
    fn arguments_name_rounds_and_folder() {
        let benchmark = Benchmark {
            name: "udp",
            arguments: vec!["--services".into(), "1000".into()],
            rounds: 20,
        };
        let words = arguments(&benchmark, 1, Path::new("/x"));
        assert_eq!(words, ["udp", "--services", "1000", "--rounds", "1", "--out", "/x"]);
    }
}
