//! lb-agent on a node, and what its subcommands say.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::{Cluster, Node, Place, Process};

/// How long an agent may take from start to completeness, and from a change to the maps.
const PATIENCE: Duration = Duration::from_secs(30);

/// The part of `lb-agent status -o json` that tests look at.
#[derive(Debug, Clone, Deserialize)]
pub struct Status {
    /// The process.
    pub agent: AgentStatus,
    /// The hooks.
    pub programs: Vec<ProgramStatus>,
    /// How full the maps are.
    pub maps: Vec<MapStatus>,
    /// What was refused, and why.
    pub drops: Vec<DropStatus>,
    /// What could not be used.
    pub problems: Vec<Problem>,
}

/// The process, as it last told of itself.
#[derive(Debug, Clone, Deserialize)]
pub struct AgentStatus {
    /// Some agent holds the pin path.
    pub running: bool,
    /// Its process id.
    pub pid: u32,
    /// How many batches it has applied.
    pub applies: u64,
    /// Everything was applied at least once.
    pub complete: bool,
}

/// A hook.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ProgramStatus {
    /// Name of the program.
    pub name: String,
    /// Whether it is attached.
    pub attached: bool,
    /// Hash of its instructions.
    pub tag: String,
}

/// A map.
#[derive(Debug, Clone, Deserialize)]
pub struct MapStatus {
    /// Its name.
    pub name: String,
    /// Entries in use.
    pub used: u64,
}

/// A drop counter.
#[derive(Debug, Clone, Deserialize)]
pub struct DropStatus {
    /// Label of the reason.
    pub reason: String,
    /// How often.
    pub count: u64,
}

/// Something that could not be used.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Problem {
    /// Where.
    pub place: String,
    /// What.
    pub message: String,
}

impl Status {
    /// How many entries of a map are in use.
    ///
    /// # Errors
    /// Where there is no such map.
    pub fn used(&self, map: &str) -> Result<u64> {
        let map = self
            .maps
            .iter()
            .find(|m| m.name == map)
            .with_context(|| format!("no map {map}"))?;
        Ok(map.used)
    }

    /// How often something was refused.
    ///
    /// # Errors
    /// Where there is no such reason.
    pub fn dropped(&self, reason: &str) -> Result<u64> {
        let drop = self
            .drops
            .iter()
            .find(|d| d.reason == reason)
            .with_context(|| format!("no reason {reason}"))?;
        Ok(drop.count)
    }
}

/// An agent that runs on a node. It is killed when this is dropped; what it has pinned stays as long as the cluster.
pub struct Agent {
    node: String,
    place: Place,
    program: PathBuf,
    manifests: PathBuf,
    pin_path: PathBuf,
    log: PathBuf,
    process: Process,
}

impl Agent {
    /// Starts `program run` on a node, with its cgroup and pin path, and `more` arguments.
    ///
    /// # Errors
    /// Where it cannot be started; that it ends later is told by [`Self::wait_ready`].
    pub fn start(cluster: &Cluster, node: &Node, program: &Path, manifests: &Path, more: &[&str]) -> Result<Self> {
        let pin_path = cluster.pin_path(node.name());
        let log = cluster.scratch().join(format!("lb-agent-{}.log", node.name()));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .with_context(|| format!("making {}", log.display()))?;
        let mut command = node.command(program)?;
        command
            .arg("run")
            .arg("--manifests")
            .arg(manifests)
            .args(["--node-name", node.name()]);
        command
            .arg("--cgroup")
            .arg(node.cgroup())
            .arg("--pin-path")
            .arg(&pin_path)
            .args(more);
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("the agent's log")?)
            .stderr(file);
        Ok(Self {
            node: node.name().to_owned(),
            place: Place::clone(node),
            program: program.to_owned(),
            manifests: manifests.to_owned(),
            process: Process::spawn(&mut command)?,
            pin_path,
            log,
        })
    }

    /// Name of the node.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Kills it as `kill -9` does, if it runs; what it has pinned stays.
    ///
    /// # Errors
    /// Where the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        if !self.process.is_running()? {
            return Ok(());
        }
        self.process.signal(Signal::SIGKILL)?;
        self.process.wait(PATIENCE).map(drop)
    }

    /// The folder that it pins below.
    #[must_use]
    pub fn pin_path(&self) -> &Path {
        &self.pin_path
    }

    /// Waits until the agent has applied everything that the manifests say now.
    ///
    /// # Errors
    /// Where it ends, or is not ready in time, or `interrupted` says so.
    pub fn wait_ready(&mut self, interrupted: &dyn Fn() -> bool) -> Result<()> {
        self.wait("ready", interrupted, |agent| {
            let status = agent.status()?;
            ensure!(status.agent.running && status.agent.complete, "{:?}", status.agent);
            agent.verify()
        })
    }

    /// Waits until `check` succeeds.
    ///
    /// # Errors
    /// Where the agent ends, or the check fails for too long; with the check's last words and the agent's log.
    pub fn wait(
        &mut self,
        what: &str,
        interrupted: &dyn Fn() -> bool,
        check: impl Fn(&Self) -> Result<()>,
    ) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while let Err(last) = check(self) {
            if interrupted() {
                bail!("interrupted");
            }
            if !self.process.is_running()? {
                bail!("lb-agent on {} has ended:\n{}", self.node, self.log_tail());
            }
            if Instant::now() >= deadline {
                bail!("lb-agent on {} is not {what}: {last:#}\n{}", self.node, self.log_tail());
            }
            std::thread::sleep(Duration::from_millis(30));
        }
        Ok(())
    }

    /// Whether the maps hold what the manifests ask for.
    ///
    /// # Errors
    /// Where they do not, with the differences.
    pub fn verify(&self) -> Result<()> {
        let output = self.call(
            ["verify".as_ref(), "--manifests".as_ref(), self.manifests.as_os_str()],
            true,
        )?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// `lb-agent status`.
    ///
    /// # Errors
    /// Where it fails.
    pub fn status(&self) -> Result<Status> {
        self.json(&["status"])
    }

    /// A subcommand's answer in JSON.
    ///
    /// # Errors
    /// Where it fails, or its answer is not of that type.
    pub fn json<T: DeserializeOwned>(&self, arguments: &[&str]) -> Result<T> {
        let text = self.ask(&[arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("not as expected: {text}"))
    }

    /// A subcommand's output.
    ///
    /// # Errors
    /// Where it fails, with its error output.
    pub fn ask(&self, arguments: &[&str]) -> Result<String> {
        let output = self.call(arguments, false)?;
        ensure!(
            output.status.success(),
            "lb-agent {arguments:?}: {}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs a subcommand with this agent's pin path.
    ///
    /// # Errors
    /// Where it cannot be run; its own failure is in the result.
    pub fn call<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>, with_node: bool) -> Result<Output> {
        let mut command = self.place.command(&self.program)?;
        command.args(arguments).arg("--pin-path").arg(&self.pin_path);
        if with_node {
            command.args(["--node-name", &self.node]);
        }
        command.output().context("running lb-agent")
    }

    /// The end of what the agent has logged.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}
