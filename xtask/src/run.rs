//! `run` and `clean`.

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
    /// Run the demo without waiting for a person; fail if anything is not as it should be
    #[arg(long, conflicts_with = "agent_arguments")]
    check: bool,
    /// The same on Debian's kernel of this version, in a virtual machine; may be given several times
    #[arg(long, value_name = "VERSION", conflicts_with = "agent_arguments")]
    vm: Vec<String>,
    /// An agent that is built already, for the call of this command by itself as root
    #[arg(long, hide = true, value_name = "PATH", requires = "testbed")]
    agent: Option<PathBuf>,
    /// The same for the test bed's helper
    #[arg(long, hide = true, value_name = "PATH")]
    testbed: Option<PathBuf>,
    /// Arguments for lb-agent, to run it on this machine in place of the demo
    #[arg(last = true, value_name = "ARGS")]
    agent_arguments: Vec<OsString>,
}

/// Shows the demo, or runs the agent.
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
    // In place of this process: signals and the exit code are the program's own.
    let error = command.exec();
    Err(error).with_context(|| format!("cannot run {}", command.get_program().display()))
}

/// The demo on these kernels; it fails if one of them does.
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

/// The demo as a check among others, with this agent if there is one already.
pub(crate) fn check_demo(agent: Option<&Path>) -> anyhow::Result<()> {
    let programs = build_release(agent)?.programs()?;
    let status = demo_command(&programs, true)?.status().context("cannot run the demo")?;
    if status.success() {
        return Ok(());
    }
    bail!("the demo failed ({status})")
}

/// This program itself as root, with the demo of what is built.
fn demo_command(programs: &Programs, check: bool) -> anyhow::Result<Command> {
    let mut command = myself_as_root("the demo")?;
    command.arg("run").arg("--agent").arg(&programs.agent);
    command.arg("--testbed").arg(&programs.testbed);
    command.args(check.then_some("--check"));
    Ok(command)
}

/// This program as root.
fn myself_as_root(what: &str) -> anyhow::Result<Command> {
    as_root(&current_program()?, &[("PATH", search_path())], what)
}

/// Removes what interrupted tests left, as root.
pub(crate) fn clean_as_root() -> anyhow::Result<()> {
    if is_root() {
        for line in testbed::remove_leftovers()? {
            println!("removed {line}");
        }
        return Ok(());
    }
    let status = myself_as_root("removing leftovers")?
        .arg("clean")
        .status()
        .context("cannot run sudo")?;
    if status.success() {
        return Ok(());
    }
    bail!("removing leftovers failed ({status})")
}

/// Removes what interrupted tests left.
pub(crate) fn clean() -> anyhow::Result<ExitCode> {
    clean_as_root()?;
    Ok(ExitCode::SUCCESS)
}
