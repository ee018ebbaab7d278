//! `run`, which starts the demo or the agent, and `clean`, which removes leftovers of tests.

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, bail};

use crate::artifacts::build_release;
use crate::privilege::{as_root, is_root, search_path};
use crate::setup::{self, Scope};
use crate::testbed::{self, Programs};
use crate::vm::{self, Job};
use crate::workspace::current_program;

/// Arguments of `run`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Run the demo without waiting for input; fail if one of its checks fails
    #[arg(long, conflicts_with = "agent_arguments")]
    check: bool,
    /// Run the checked demo on Debian's kernel of this version, in a virtual machine; can be repeated
    #[arg(long, value_name = "VERSION", conflicts_with = "agent_arguments")]
    vm: Vec<String>,
    /// Path of the agent, for the call of this command by itself as root
    #[arg(long, hide = true, value_name = "PATH", requires = "testbed")]
    agent: Option<PathBuf>,
    /// Path of the test bed's helper, for the call of this command by itself as root
    #[arg(long, hide = true, value_name = "PATH")]
    testbed: Option<PathBuf>,
    /// Arguments of lb-agent; it runs on this machine instead of the demo
    #[arg(last = true, value_name = "ARGS")]
    agent_arguments: Vec<OsString>,
}

/// Runs the demo or the agent.
pub(crate) fn run(args: &Args) -> anyhow::Result<ExitCode> {
    if let (Some(agent), Some(testbed)) = (&args.agent, &args.testbed) {
        let programs = Programs {
            agent: agent.clone(),
            testbed: testbed.clone(),
        };
        testbed::demo(&programs, args.check)?;
        return Ok(ExitCode::SUCCESS);
    }
    if !args.vm.is_empty() {
        return in_machines(&args.vm);
    }
    let scope = if args.agent_arguments.is_empty() {
        Scope::All
    } else {
        Scope::Build
    };
    let ready = setup::run(scope)?;
    if ready != ExitCode::SUCCESS {
        return Ok(ready);
    }
    let programs = build_release(None)?.programs()?;
    let mut command = if args.agent_arguments.is_empty() {
        demo_command(&programs, args.check)?
    } else {
        let mut command = as_root(&programs.agent, &[], "lb-agent")?;
        command.args(&args.agent_arguments);
        command
    };
    // The program replaces this process, so it receives the signals and determines the exit code.
    let error = command.exec();
    Err(error).with_context(|| format!("cannot run {}", command.get_program().display()))
}

/// Runs the demo on these kernels; fails if one of them does.
fn in_machines(versions: &[String]) -> anyhow::Result<ExitCode> {
    let ready = setup::run(Scope::Machines)?;
    if ready != ExitCode::SUCCESS {
        return Ok(ready);
    }
    let job = Job::demo(&build_release(None)?.programs()?)?;
    let mut well = true;
    for (version, result) in vm::run(versions, &job) {
        let tally = result.with_context(|| format!("the demo on Linux {version}"))?;
        let word = if tally.failed == 0 { "works" } else { "failed" };
        println!("the demo on Linux {version} {word}");
        well &= tally.failed == 0;
    }
    Ok(if well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs the demo as one check among others, with this agent if it is built already.
pub(crate) fn check_demo(agent: Option<&Path>) -> anyhow::Result<()> {
    let programs = build_release(agent)?.programs()?;
    let status = demo_command(&programs, true)?.status().context("cannot run the demo")?;
    if status.success() {
        return Ok(());
    }
    bail!("the demo failed ({status})")
}

/// Returns a command of this program as root that runs the demo with the given programs.
fn demo_command(programs: &Programs, check: bool) -> anyhow::Result<Command> {
    let mut command = this_program_as_root("the demo")?;
    command.arg("run").arg("--agent").arg(&programs.agent);
    command.arg("--testbed").arg(&programs.testbed);
    command.args(check.then_some("--check"));
    Ok(command)
}

/// Returns a command of this program as root.
fn this_program_as_root(what: &str) -> anyhow::Result<Command> {
    as_root(&current_program()?, &[("PATH", search_path())], what)
}

/// Removes the leftovers of interrupted tests as root; prints a line for each.
pub(crate) fn clean_as_root() -> anyhow::Result<()> {
    if is_root() {
        for line in testbed::remove_leftovers()? {
            println!("removed {line}");
        }
        return Ok(());
    }
    let status = this_program_as_root("removing leftovers")?
        .arg("clean")
        .status()
        .context("cannot run sudo")?;
    if status.success() {
        return Ok(());
    }
    bail!("removing leftovers failed ({status})")
}

/// Removes the leftovers of interrupted tests.
pub(crate) fn clean() -> anyhow::Result<ExitCode> {
    clean_as_root()?;
    Ok(ExitCode::SUCCESS)
}
