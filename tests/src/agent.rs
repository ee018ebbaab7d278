//! lb-agent on a node, and what its subcommands say.

use std::env;
use std::ffi::{OsStr, OsString};
use std::fmt::Debug;
use std::fs::{self, OpenOptions};
use std::net::IpAddr;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::{Cluster, Netns, Node, Process, pause_between_polls, scaled_timeout};

/// How long an agent may take from start to completeness, and from a change to the maps.
const PATIENCE: Duration = Duration::from_secs(30);

/// The part of `lb-agent status -o json` that tests look at.
#[derive(Debug, Clone, Deserialize)]
pub struct Status {
    /// The process.
    pub agent: AgentStatus,
    /// The hooks.
    pub programs: Vec<ProgramStatus>,
    /// The devices.
    pub devices: Vec<DeviceStatus>,
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

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct DeviceStatus {
    /// Its name.
    pub name: String,
    /// Its index.
    pub index: u32,
    /// How programs are attached to it, if they are.
    pub attached: Option<String>,
    /// Source of IPv4 packets that leave by it.
    pub source_v4: Option<IpAddr>,
    /// Source of IPv6 packets.
    pub source_v6: Option<IpAddr>,
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

/// The capabilities that the systemd unit grants, as setpriv(1) has a bounding set: `-all,+bpf,+net_admin`.
///
/// # Errors
/// Where the unit cannot be read, or says nothing of them.
pub fn unit_capabilities() -> Result<String> {
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/lb-agent.service");
    let text = fs::read_to_string(unit).with_context(|| format!("reading {unit}"))?;
    let granted = text
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .with_context(|| format!("no capabilities in {unit}"))?;
    let names = granted.split_whitespace().map(|name| name.trim_start_matches("CAP_"));
    Ok(names.fold("-all".to_owned(), |set, name| format!("{set},+{}", name.to_lowercase())))
}

/// How the agent of a node is started, and asked: binary, manifests and pins. Several processes of it may be started,
/// one after the other or at once.
#[derive(Debug, Clone)]
pub struct Agent {
    program: PathBuf,
    netns: Netns,
    cgroup: PathBuf,
    pin_path: PathBuf,
    /// The flags of `run` and `verify` that say where Services come from.
    source: Vec<OsString>,
    log: PathBuf,
    env: Vec<(String, String)>,
}

impl Agent {
    /// The agent of a node, its manifests in a file or folder.
    #[must_use]
    pub fn new(cluster: &Cluster, node: &Node, program: &Path, manifests: &Path) -> Self {
        Self::with_source(cluster, node, program, vec!["--manifests".into(), manifests.into()])
    }

    /// The agent of a node that has its Services from API servers, and who it is there from a kubeconfig.
    #[must_use]
    pub fn with_api_server(cluster: &Cluster, node: &Node, program: &Path, kubeconfig: &Path, servers: &str) -> Self {
        let flags = [
            "--kubeconfig".into(),
            kubeconfig.into(),
            "--kube-apiserver".into(),
            servers.into(),
        ];
        Self::with_source(cluster, node, program, flags.into())
    }

    fn with_source(cluster: &Cluster, node: &Node, program: &Path, source: Vec<OsString>) -> Self {
        Self {
            program: program.to_owned(),
            netns: Netns::clone(node),
            cgroup: node.cgroup().to_owned(),
            pin_path: cluster.pin_path(node.name()),
            source,
            log: cluster.scratch().join(format!("lb-agent-{}.log", node.name())),
            env: Vec::new(),
        }
    }

    /// The same with an environment variable for `run`.
    #[must_use]
    pub fn with_env(&self, name: &str, value: &str) -> Self {
        let mut new = self.clone();
        new.env.push((name.into(), value.into()));
        new
    }

    /// The same, told which networks are inside the cluster: `run` and `verify` alike.
    #[must_use]
    pub fn with_cluster_cidr(&self, networks: &str) -> Self {
        let mut new = self.clone();
        new.source.extend(["--cluster-cidr".into(), networks.into()]);
        new
    }

    /// Where the binary is: what the environment variable `LB_AGENT` says, or else `lb-agent` in the folder of the
    /// binary `beside`.
    ///
    /// # Errors
    /// When there is no such binary.
    pub fn find(beside: &Path) -> Result<PathBuf> {
        let program = match env::var_os("LB_AGENT") {
            Some(path) => PathBuf::from(path),
            None => beside.with_file_name("lb-agent"),
        };
        ensure!(
            program.is_file(),
            "there is no {}: build it (`cargo build -p lb-agent`), or say in LB_AGENT where it is",
            program.display()
        );
        Ok(program)
    }

    /// Name of the node.
    #[must_use]
    pub fn node(&self) -> &str {
        self.netns.name()
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
        let log = OpenOptions::new().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("opening {}", self.log.display()))?;
        let mut command = self.netns.command(&self.program)?;
        command.arg("run").args(&self.source).args(["--node-name", self.node()]);
        command
            .arg("--cgroup")
            .arg(&self.cgroup)
            .arg("--pin-path")
            .arg(&self.pin_path)
            .args(flags);
        command.envs(self.env.iter().cloned());
        command
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
        self.wait(process, "ready", &|| false, Self::is_complete)
    }

    /// Whether the process has applied everything. What an earlier one told of itself is there until this one is ready.
    fn is_complete(&self, pid: u32) -> Result<()> {
        let agent = self.status()?.agent;
        ensure!(agent.running && agent.complete && agent.pid == pid, "{agent:?}");
        Ok(())
    }

    /// Waits until `check` succeeds; it gets the process id.
    fn wait(
        &self,
        process: &mut Process,
        what: &str,
        interrupted: &dyn Fn() -> bool,
        check: impl Fn(&Self, u32) -> Result<()>,
    ) -> Result<()> {
        let deadline = Instant::now() + scaled_timeout(PATIENCE);
        loop {
            let asked = Instant::now();
            let Err(last) = check(self, process.id()) else {
                return Ok(());
            };
            if interrupted() {
                bail!("interrupted");
            }
            if !process.is_running()? {
                bail!("lb-agent on {} has ended:\n{}", self.node(), self.log_tail());
            }
            if Instant::now() >= deadline {
                bail!(
                    "lb-agent on {} is not {what}: {last:#}\n{}",
                    self.node(),
                    self.log_tail()
                );
            }
            pause_between_polls(asked);
        }
    }

    /// Runs a subcommand to its end and returns what it writes.
    ///
    /// # Errors
    /// When it does not succeed; the message has all its output.
    pub fn output<T: AsRef<OsStr> + Debug>(&self, arguments: &[T]) -> Result<String> {
        let mut command = self.netns.command(&self.program)?;
        let output = command.args(arguments).arg("--pin-path").arg(&self.pin_path).output();
        let output = output.context("running lb-agent")?;
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        ensure!(
            output.status.success(),
            "lb-agent {arguments:?}: {}: {}{}",
            output.status,
            text(&output.stdout),
            text(&output.stderr)
        );
        Ok(text(&output.stdout))
    }

    /// The answer of a subcommand with `-o json`.
    ///
    /// # Errors
    /// When it does not succeed, or its answer is not of that type.
    pub fn json<T: DeserializeOwned>(&self, arguments: &[&str]) -> Result<T> {
        let text = self.output(&[arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("not as expected: {text}"))
    }

    /// Connections and flows that the programs have counted for a Service, at all its ports or at one by its name.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn connections(&self, service: &str, port_name: Option<&str>) -> Result<u64> {
        #[derive(Deserialize)]
        struct Row {
            name: String,
            port_name: String,
            connections: u64,
        }
        let mut rows: Vec<Row> = self.json(&["service", "list"])?;
        rows.retain(|row| row.name == service && port_name.is_none_or(|port| row.port_name == port));
        ensure!(!rows.is_empty(), "no Service {service} with a port {port_name:?}");
        Ok(rows.iter().map(|row| row.connections).sum())
    }

    /// `lb-agent status`.
    ///
    /// # Errors
    /// When it does not succeed.
    pub fn status(&self) -> Result<Status> {
        self.json(&["status"])
    }

    /// Whether the maps hold what the source asks for now.
    ///
    /// # Errors
    /// When they do not, with the differences.
    pub fn verify(&self) -> Result<()> {
        let words = ["verify", "--node-name", self.node()].map(OsString::from);
        self.output(&[&words, self.source.as_slice()].concat()).map(drop)
    }

    /// The end of what all its processes have logged.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

/// An agent with its process, which is killed when this is dropped; what it has pinned stays as long as the cluster.
#[derive(Debug)]
pub struct RunningAgent {
    agent: Agent,
    process: Process,
}

impl Deref for RunningAgent {
    type Target = Agent;

    fn deref(&self) -> &Agent {
        &self.agent
    }
}

impl RunningAgent {
    /// Starts an agent; that it ends later is told by [`Self::wait_ready`].
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(agent: Agent, flags: &[&str]) -> Result<Self> {
        let process = agent.start(flags)?;
        Ok(Self { agent, process })
    }

    /// Starts it once more, after [`Self::kill`].
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_again(&mut self) -> Result<()> {
        self.process = self.agent.start(&[])?;
        Ok(())
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Kills it as `kill -9` does, if it runs; what it has pinned stays.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        if !self.process.is_running()? {
            return Ok(());
        }
        self.process.signal(Signal::SIGKILL)?;
        self.process.wait(scaled_timeout(PATIENCE)).map(drop)
    }

    /// Waits until the agent has applied everything that its source says now.
    ///
    /// # Errors
    /// When it ends, or is not ready in time, or `interrupted` says so.
    pub fn wait_ready(&mut self, interrupted: &dyn Fn() -> bool) -> Result<()> {
        self.agent.wait(&mut self.process, "ready", interrupted, |agent, pid| {
            agent.is_complete(pid)?;
            agent.verify()
        })
    }

    /// Waits until `check` succeeds.
    ///
    /// # Errors
    /// When the agent ends, or the check fails for too long; with its last words and the agent's log.
    pub fn wait(&mut self, what: &str, check: impl Fn(&Agent) -> Result<()>) -> Result<()> {
        self.agent
            .wait(&mut self.process, what, &|| false, |agent, _| check(agent))
    }
}
