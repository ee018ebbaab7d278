//! lb-agent on a node, as a process.

use std::env;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::{Cluster, Node, Place, Process};

/// How long an agent may take from start to completeness.
const START: Duration = Duration::from_secs(30);

/// How the agent of a node is started, and asked: binary, manifests and pins. Several processes of it may be started,
/// one after the other or at once.
#[derive(Debug, Clone)]
pub struct Agent {
    program: PathBuf,
    place: Place,
    cgroup: PathBuf,
    pin_path: PathBuf,
    manifests: PathBuf,
    log: PathBuf,
}

impl Agent {
    /// The agent of a node, its manifests in a file or folder. The binary is what the environment variable `LB_AGENT`
    /// says, or else `lb-agent` in the folder of the binary `beside`.
    ///
    /// # Errors
    /// When there is no such binary.
    pub fn new(cluster: &Cluster, node: &Node, manifests: &Path, beside: &Path) -> Result<Self> {
        let program = match env::var_os("LB_AGENT") {
            Some(path) => PathBuf::from(path),
            None => beside.with_file_name("lb-agent"),
        };
        ensure!(
            program.is_file(),
            "there is no {}: build it (`cargo build -p lb-agent`), or say in LB_AGENT where it is",
            program.display()
        );
        Ok(Self {
            program,
            place: Place::clone(node),
            cgroup: node.cgroup().to_owned(),
            pin_path: cluster.pin_path(node.name()),
            manifests: manifests.to_owned(),
            log: cluster.scratch().join(format!("lb-agent-{}.log", node.name())),
        })
    }

    /// The folder that it pins below.
    #[must_use]
    pub fn pin_path(&self) -> &Path {
        &self.pin_path
    }

    /// Starts `lb-agent run`, with more flags; returns at once.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, flags: &[&str]) -> Result<Process> {
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .with_context(|| format!("opening {}", self.log.display()))?;
        let mut command = self.place.command(&self.program)?;
        command
            .arg("run")
            .arg("--manifests")
            .arg(&self.manifests)
            .args(["--node-name", self.place.name()])
            .arg("--cgroup")
            .arg(&self.cgroup)
            .arg("--pin-path")
            .arg(&self.pin_path)
            .args(flags)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("the agent's log")?)
            .stderr(log);
        Process::spawn(&mut command)
    }

    /// Starts `lb-agent run`, and waits until it has applied everything and its programs are attached.
    ///
    /// # Errors
    /// When it ends, or is not ready in time; the message has the end of its log.
    pub fn start_ready(&self, flags: &[&str]) -> Result<Process> {
        let mut process = self.start(flags)?;
        self.wait_ready(&mut process)?;
        Ok(process)
    }

    /// Waits until the process has applied everything and its programs are attached.
    ///
    /// # Errors
    /// As [`Self::start_ready`].
    pub fn wait_ready(&self, process: &mut Process) -> Result<()> {
        let deadline = Instant::now() + START;
        loop {
            // What an earlier process told of itself is there until this one is ready.
            let last = match self.ask_json(&["status"]) {
                Ok(status)
                    if status["agent"]["pid"] == process.id()
                        && status["agent"]["running"] == true
                        && status["agent"]["complete"] == true =>
                {
                    return Ok(());
                }
                Ok(status) => status["agent"].to_string(),
                Err(error) => format!("{error:#}"),
            };
            if !process.is_running()? {
                bail!("the agent has ended:\n{}", self.log_tail());
            }
            if Instant::now() >= deadline {
                bail!("the agent is not ready: {last}\n{}", self.log_tail());
            }
            sleep(Duration::from_millis(10));
        }
    }

    /// Runs a subcommand to its end and returns what it writes.
    ///
    /// # Errors
    /// When it does not succeed; the message has its error output.
    pub fn ask(&self, arguments: &[&str]) -> Result<String> {
        let program = self.program.to_str().context("the agent's path is not UTF-8")?;
        let pin_path = self.pin_path.to_str().context("the pin path is not UTF-8")?;
        let arguments = [arguments, &["--pin-path", pin_path]].concat();
        self.place.run(program, &arguments)
    }

    /// Runs a subcommand with `-o json`.
    ///
    /// # Errors
    /// When it does not succeed, or what it writes is not JSON.
    pub fn ask_json(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.ask(&[arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("not JSON: {text}"))
    }

    /// Whether the maps hold what the manifests ask for.
    ///
    /// # Errors
    /// When they do not.
    pub fn verify(&self) -> Result<()> {
        let manifests = self.manifests.to_str().context("the manifests' path is not UTF-8")?;
        let arguments = ["verify", "--manifests", manifests, "--node-name", self.place.name()];
        self.ask(&arguments).map(drop)
    }

    /// The end of what all its processes have logged.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}
