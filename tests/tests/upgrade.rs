//! Upgrades from the builds of earlier commits, and back, under load. `cargo xtask test --upgrade` builds those commits.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use lb_tests::workload::Workload;
use lb_tests::{Agent, RunningAgent};
use libtest_mimic::{Arguments, Trial};

/// Environment variable with the paths of the earlier agents, separated by colons. Each agent is in a folder that is named
/// after its commit.
const VARIABLE: &str = "LB_EARLIER_AGENTS";
/// Environment variable with the number of upgrades of each test, and as many steps back.
const ROUNDS: &str = "LB_UPGRADES";

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let agents = env::var_os(VARIABLE);
    let agents: Vec<_> = agents.iter().flat_map(env::split_paths).collect();
    assert!(
        !agents.is_empty(),
        "{VARIABLE} is not set: run `cargo xtask test --upgrade`"
    );
    let trials = agents.into_iter().map(trial).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn trial(earlier: PathBuf) -> Trial {
    let commit = earlier.parent().and_then(Path::file_name);
    let commit = commit.map(|name| name.to_string_lossy().chars().take(7).collect::<String>());
    let name = format!("upgrade_from_{}_and_back", commit.as_deref().unwrap_or("unknown"));
    Trial::test(name, move || {
        upgrade(&earlier).map_err(|error| format!("{error:?}").into())
    })
}

/// Goes from the agent of an earlier commit to the present one and back, under load.
fn upgrade(earlier: &Path) -> Result<()> {
    let present = Agent::find()?;
    let content = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    ensure!(
        content(earlier)? != content(&present)?,
        "both agents are the same build"
    );
    let rounds: u64 = env::var(ROUNDS)
        .map_or(Ok(2), |rounds| rounds.parse())
        .context(ROUNDS)?;
    let mut workload = Workload::new(&[])?;
    replace(&mut workload.fixture.agents[0], earlier)?;
    workload.run(2 * rounds, |fixture, round| {
        let program = if round % 2 == 0 { &*present } else { earlier };
        replace(&mut fixture.agents[0], program)
    })
}

/// Kills the agent, and starts `program`.
fn replace(agent: &mut RunningAgent, program: &Path) -> Result<()> {
    agent.kill()?;
    agent.start_again_as(program)?;
    agent.wait_ready(&|| false)
}
