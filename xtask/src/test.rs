//! `test` and `bless`.

use std::ffi::OsString;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail};

use crate::artifacts::{Built, TestProgram, build_tests};
use crate::command::{cargo, clean_command};
use crate::libtest::{self, Tally};
use crate::privilege::{as_root, search_path};
use crate::run;
use crate::setup;
use crate::vm;

/// Whole-system tests at a time in one test program: each builds a cluster of its own.
const SYSTEM_TESTS: &str = "--test-threads=2";

/// What golden tests have in the name of their file or of the test.
const GOLDEN: &str = "golden";

/// Arguments of `test`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Run only tests whose name contains this
    filter: Option<String>,
    /// Leave out format, lints and documentation
    #[arg(long)]
    no_lint: bool,
    /// Check at the end that the demo works (as `cargo xtask run --check` does)
    #[arg(long)]
    demo: bool,
    /// Instead of all that, run the tests that need a kernel on Debian's kernel of this version, in a virtual machine;
    /// may be given several times
    #[arg(long, value_name = "VERSION")]
    vm: Vec<String>,
}

/// Runs every check; the last line tells how many passed.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    let mut sum = Tally::default();
    let scope = if args.vm.is_empty() {
        setup::Scope::All
    } else {
        setup::Scope::Machines
    };
    let ready = step("setup", || match setup::run(scope)? {
        ExitCode::SUCCESS => Ok(()),
        _ => bail!("the setup is not complete"),
    });
    sum += ready;
    if ready.failed > 0 {
        return Ok(conclude(sum));
    }
    if !args.vm.is_empty() {
        return Ok(conclude(on_kernels(&args.vm, args.filter.as_deref())));
    }
    sum += step("leftovers", run::clean_as_root);
    if !args.no_lint {
        sum += step("format", || call(cargo().args(["fmt", "--all", "--check"])));
        sum += step("lints", || {
            call(cargo().args([
                "clippy",
                "--workspace",
                "--all-targets",
                "--features",
                "lb-tests/bench",
                "--",
                "-D",
                "warnings",
            ]))
        });
        sum += step("documentation", || {
            call(
                cargo()
                    .args(["doc", "--workspace", "--no-deps"])
                    .env("RUSTDOCFLAGS", "-D warnings"),
            )
        });
    }
    sum += tests(&Selection::Filter(args.filter.as_deref()));
    if args.demo {
        sum += step("demo", run::check_demo);
    }
    Ok(conclude(sum))
}

/// Has the golden tests accept what they see.
pub(crate) fn bless() -> anyhow::Result<ExitCode> {
    if setup::run(setup::Scope::All)? != ExitCode::SUCCESS {
        bail!("the setup is not complete");
    }
    Ok(conclude(tests(&Selection::Golden)))
}

/// Which tests to run.
#[derive(Debug)]
enum Selection<'a> {
    /// All, or those that contain this.
    Filter(Option<&'a str>),
    /// Golden tests, which are to write down what they see.
    Golden,
}

impl Selection<'_> {
    /// The filter for the tests of `program`.
    fn filter(&self, program: &str) -> Option<&str> {
        match self {
            Self::Filter(filter) => *filter,
            Self::Golden => (!program.contains(GOLDEN)).then_some(GOLDEN),
        }
    }
}

/// Builds tests and runs those that need a kernel on several.
fn on_kernels(versions: &[String], filter: Option<&str>) -> Tally {
    let mut built = Built::default();
    let mut sum = step("build", || {
        built = build_tests()?;
        Ok(())
    });
    if sum.failed > 0 {
        return sum;
    }
    println!("== virtual machines");
    for (version, result) in vm::run(versions, &built, filter) {
        let tally = counted(&format!("Linux {version}"), || match result? {
            none if none == Tally::default() => bail!("no test matches"),
            some => Ok(some),
        });
        println!("{} passed, {} failed", tally.passed, tally.failed);
        sum += tally;
    }
    sum
}

/// Builds and runs tests.
fn tests(selection: &Selection<'_>) -> Tally {
    let mut built = Built::default();
    let mut sum = step("build", || {
        built = build_tests()?;
        Ok(())
    });
    if sum.failed > 0 {
        return sum;
    }
    let mut env = vec![("PATH", search_path())];
    match built.programs() {
        Ok(programs) => {
            env.push(("LB_AGENT", programs.agent.into()));
            env.push(("LB_TESTBED", programs.testbed.into()));
        }
        Err(error) => {
            sum += step("programs", || Err(error));
        }
    }
    if matches!(selection, Selection::Golden) {
        env.push(("LB_BLESS", "1".into()));
    }
    let mut ran = Tally::default();
    for program in &built.tests {
        let title = format!("tests of {} ({})", program.package, program.target);
        ran += counted(&title, || {
            let mut command = test_command(program, &env)?;
            command.args(selection.filter(&program.target));
            libtest::run(&mut command)
        });
    }
    if let Selection::Filter(filter) = selection {
        ran += counted("examples in the documentation", || {
            let mut command = cargo();
            command
                .args(["test", "--doc", "--workspace", "--exclude", "lb-ebpf", "--"])
                .args(*filter);
            libtest::run(&mut command)
        });
    }
    if ran == Tally::default() {
        sum += step("selection", || bail!("no test matches"));
    }
    sum += ran;
    sum
}

/// The command that runs `program` as `cargo test` would, as root where that is needed.
fn test_command(program: &TestProgram, env: &[(&str, OsString)]) -> anyhow::Result<Command> {
    let mut env = env.to_vec();
    env.push(("CARGO_MANIFEST_DIR", program.dir.clone().into()));
    env.push(("CARGO_PKG_NAME", program.package.clone().into()));
    let mut command = if program.needs_root() {
        let what = format!("the test program {} of {}", program.target, program.package);
        let mut command = as_root(&program.path, &env, &what)?;
        command.arg(SYSTEM_TESTS);
        command
    } else {
        let mut command = clean_command(&program.path);
        command.envs(env);
        command
    };
    command.current_dir(&program.dir);
    Ok(command)
}

/// A check by a command's exit code.
fn call(command: &mut Command) -> anyhow::Result<()> {
    let program = command.get_program().to_os_string();
    let status = command
        .status()
        .with_context(|| format!("cannot run {}", program.display()))?;
    if status.success() {
        return Ok(());
    }
    bail!("failed ({status})")
}

/// One check, under a headline.
fn step(title: &str, check: impl FnOnce() -> anyhow::Result<()>) -> Tally {
    counted(title, || check().map(|()| Tally::one(true)))
}

/// Some checks, under a headline; an error counts as one that failed.
fn counted(title: &str, checks: impl FnOnce() -> anyhow::Result<Tally>) -> Tally {
    println!("== {title}");
    checks().unwrap_or_else(|error| {
        println!("{title}: {error:#}");
        Tally::one(false)
    })
}

/// The last line, and the exit code.
fn conclude(sum: Tally) -> ExitCode {
    println!("{} passed, {} failed", sum.passed, sum.failed);
    ExitCode::from(u8::from(sum.failed > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_tests_are_found_by_file_or_by_name() {
        assert_eq!(Selection::Golden.filter("golden_policy"), None);
        assert_eq!(Selection::Golden.filter("lb_agent"), Some("golden"));
        assert_eq!(Selection::Filter(Some("snat")).filter("golden_policy"), Some("snat"));
    }

    #[test]
    fn errors_count() {
        let failed = step("a step that fails", || bail!("on purpose"));
        assert_eq!(failed, Tally { passed: 0, failed: 1 });
        assert_eq!(conclude(failed), ExitCode::from(1));
        assert_eq!(conclude(step("a step", || Ok(()))), ExitCode::SUCCESS);
    }
}
