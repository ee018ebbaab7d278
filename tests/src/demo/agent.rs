//! lb-agent on a node, and what its subcommands say.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;

use super::signals::Signals;
use crate::{Cluster, Node, Process};

/// How long an agent may take from start to completeness.
const START: Duration = Duration::from_secs(30);

/// `lb-agent status -o json`.
#[derive(Debug, Deserialize)]
pub(super) struct Status {
    pub(super) agent: AgentStatus,
    #[serde(default)]
    pub(super) problems: Vec<serde_json::Value>,
}

/// The part of [`Status`] about the process.
#[derive(Debug, Deserialize)]
pub(super) struct AgentStatus {
    pub(super) running: bool,
    #[serde(default)]
    pub(super) pid: Option<u32>,
    #[serde(default)]
    pub(super) applies: Option<u64>,
    #[serde(default)]
    pub(super) complete: bool,
}

/// A row of `lb-agent service list -o json`.
#[derive(Debug, Deserialize)]
pub(super) struct ServiceRow {
    pub(super) namespace: String,
    pub(super) name: String,
    #[serde(default)]
    pub(super) connections: u64,
    #[serde(default)]
    pub(super) refused: u64,
}

/// An agent that runs on a node.
pub(super) struct Agent {
    node: String,
    program: PathBuf,
    manifests: PathBuf,
    pin_path: PathBuf,
    log: PathBuf,
    process: Process,
}

impl Agent {
    pub(super) fn start(cluster: &Cluster, node: &Node, program: &Path, manifests: &Path) -> Result<Self> {
        let pin_path = cluster.pin_path(node.name());
        let log = cluster.scratch().join(format!("lb-agent-{}.log", node.name()));
        let file = File::create(&log).with_context(|| format!("making {}", log.display()))?;
        let mut command = node.command(program)?;
        command
            .arg("run")
            .arg("--manifests")
            .arg(manifests)
            .args(["--node-name", node.name()])
            .arg("--cgroup")
            .arg(node.cgroup())
            .arg("--pin-path")
            .arg(&pin_path)
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("the agent's log")?)
            .stderr(file);
        Ok(Self {
            node: node.name().to_owned(),
            program: program.to_owned(),
            manifests: manifests.to_owned(),
            process: Process::spawn(&mut command)?,
            pin_path,
            log,
        })
    }

    pub(super) fn node(&self) -> &str {
        &self.node
    }

    pub(super) fn is_running(&mut self) -> Result<bool> {
        self.process.is_running()
    }

    /// Waits until the agent has applied everything.
    pub(super) fn wait_ready(&mut self, cluster: &Cluster, signals: &Signals) -> Result<()> {
        let deadline = Instant::now() + START;
        loop {
            let last = match self.status(cluster) {
                Ok(status) if status.agent.running && status.agent.complete => break,
                Ok(status) => format!("{status:?}"),
                Err(error) => format!("{error:#}"),
            };
            if signals.arrived() {
                bail!("interrupted");
            }
            if !self.process.is_running()? {
                bail!("lb-agent on {} has ended:\n{}", self.node, self.log_tail());
            }
            if Instant::now() >= deadline {
                bail!("lb-agent on {} is not ready: {last}\n{}", self.node, self.log_tail());
            }
            signals.sleep(Duration::from_millis(50));
        }
        self.verify(cluster)
    }

    /// Whether the maps hold what the manifests ask for.
    pub(super) fn verify(&self, cluster: &Cluster) -> Result<()> {
        let manifests = self.manifests.to_str().context("the manifests' path is not UTF-8")?;
        self.ask(
            cluster,
            &["verify", "--manifests", manifests, "--node-name", &self.node],
        )
        .map(drop)
    }

    pub(super) fn status(&self, cluster: &Cluster) -> Result<Status> {
        let text = self.ask(cluster, &["status", "-o", "json"])?;
        serde_json::from_str(&text).with_context(|| format!("not a status: {text}"))
    }

    pub(super) fn services(&self, cluster: &Cluster) -> Result<Vec<ServiceRow>> {
        let text = self.ask(cluster, &["service", "list", "-o", "json"])?;
        serde_json::from_str(&text).with_context(|| format!("not a list of services: {text}"))
    }

    fn ask(&self, cluster: &Cluster, arguments: &[&str]) -> Result<String> {
        let program = self.program.to_str().context("the agent's path is not UTF-8")?;
        let pin_path = self.pin_path.to_str().context("the pin path is not UTF-8")?;
        let arguments = [arguments, &["--pin-path", pin_path]].concat();
        cluster.node(&self.node).run(program, &arguments)
    }

    /// The end of what the agent has logged.
    pub(super) fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}
