//! Upgrades from the builds of earlier commits, and the way to a later layout of maps and back, under load. `cargo xtask test
//! --upgrade` builds those agents.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lb_common::abi::VERSION;
use lb_tests::workload::Workload;
use lb_tests::{Agent, RunningAgent, scaled_timeout};
use libtest_mimic::{Arguments, Trial};

/// Environment variable with the paths of the earlier agents, separated by colons. Each agent is in a folder that is named
/// after its commit.
const EARLIER: &str = "LB_EARLIER_AGENTS";
/// Environment variable with the path of this build's agent with the feature `made-up-layout`.
const MADE_UP: &str = "LB_MADE_UP_LAYOUT_AGENT";
/// Environment variable with the number of upgrades of each test.
const ROUNDS: &str = "LB_UPGRADES";

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let earlier = variable(EARLIER);
    let made_up = PathBuf::from(variable(MADE_UP));
    let mut trials: Vec<_> = env::split_paths(&earlier).map(from_earlier).collect();
    let killed = made_up.clone();
    trials.push(trial("upgrade_to_a_made_up_layout_and_back", move || {
        upgrade_and_back(&made_up)
    }));
    trials.push(trial("upgrade_to_a_made_up_layout_killed_on_the_way", move || {
        interrupted_upgrade(&killed)
    }));
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn variable(name: &str) -> OsString {
    let value = env::var_os(name).filter(|value| !value.is_empty());
    value.unwrap_or_else(|| panic!("{name} is not set: run `cargo xtask test --upgrade`"))
}

fn trial(name: &str, test: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    Trial::test(name, move || test().map_err(|error| format!("{error:?}").into()))
}

fn from_earlier(earlier: PathBuf) -> Trial {
    let commit = earlier.parent().and_then(Path::file_name);
    let commit = commit.map(|name| name.to_string_lossy().chars().take(7).collect::<String>());
    let name = format!("upgrade_from_{}", commit.as_deref().unwrap_or("unknown"));
    trial(&name, move || upgrade(&earlier))
}

/// Returns the number of upgrades of each test.
fn rounds() -> Result<u64> {
    env::var(ROUNDS).map_or(Ok(2), |rounds| rounds.parse()).context(ROUNDS)
}

/// Fails if both agents are the same build.
fn check_builds(one: &Path, other: &Path) -> Result<()> {
    let content = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    ensure!(content(one)? != content(other)?, "both agents are the same build");
    Ok(())
}

/// Goes from the agent of an earlier commit to the present one, under load. The earlier agent refuses the pins of a later layout,
/// so each round begins without pins.
fn upgrade(earlier: &Path) -> Result<()> {
    let present = Agent::find()?;
    check_builds(earlier, &present)?;
    for _ in 0..rounds()? {
        let mut workload = Workload::new(&[])?;
        let agent = &mut workload.fixture.agents[0];
        agent.kill()?;
        agent.output(&["cleanup"])?;
        agent.start_again_as(earlier)?;
        agent.wait_ready(&|| false)?;
        workload.run(1, |fixture, _| replace(&mut fixture.agents[0], &present, VERSION))?;
    }
    Ok(())
}

/// Goes from the present agent to one with a later layout and back, under load.
fn upgrade_and_back(made_up: &Path) -> Result<()> {
    let present = Agent::find()?;
    check_builds(made_up, &present)?;
    let mut workload = Workload::new(&[])?;
    workload.run(2 * rounds()?, |fixture, round| {
        let (program, layout) = if round % 2 == 0 {
            (made_up, VERSION + 1)
        } else {
            (&*present, VERSION)
        };
        replace(&mut fixture.agents[0], program, layout)
    })
}

/// Starts an agent with a later layout, kills it while it replaces maps, and goes back to the present one, under load.
fn interrupted_upgrade(made_up: &Path) -> Result<()> {
    let present = Agent::find()?;
    check_builds(made_up, &present)?;
    let mut workload = Workload::new(&[])?;
    workload.run(rounds()?, |fixture, round| {
        let agent = &mut fixture.agents[0];
        agent.kill()?;
        agent.start_again_as(made_up)?;
        let next = agent.pin_path().join(format!("v{}/next", VERSION + 1));
        let deadline = Instant::now() + scaled_timeout(Duration::from_secs(30));
        while !next.exists() {
            ensure!(Instant::now() < deadline, "no maps are replaced");
            thread::sleep(Duration::from_millis(1));
        }
        // Loading the programs takes most of the time.
        thread::sleep(scaled_timeout(Duration::from_millis(150 * (round + 1))));
        agent.kill()?;
        println!("killed, while next exists: {}", next.exists());
        replace(agent, &present, VERSION)
    })
}

/// Kills the agent, starts `program`, and fails if that reports a problem, such as lost maps, or leaves pins of another layout.
fn replace(agent: &mut RunningAgent, program: &Path, layout: u32) -> Result<()> {
    agent.kill()?;
    agent.start_again_as(program)?;
    agent.wait_ready(&|| false)?;
    agent.check_layout(layout)?;
    agent.check_problems()
}
