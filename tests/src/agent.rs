//! lb-agent on a node of the test bed: its processes and the output of its subcommands.

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

use crate::{Cluster, Netns, Node, Process, pause_between_polls, scaled_timeout, testbed};

/// Time limit for an agent to apply everything after its start, and to apply a change.
const READY_TIMEOUT: Duration = Duration::from_secs(90);

/// The part of the output of `lb-agent status -o json` that tests use.
#[derive(Debug, Clone, Deserialize)]
pub struct Status {
    /// The agent's process.
    pub agent: AgentStatus,
    /// The programs of the cgroup hooks.
    pub programs: Vec<ProgramStatus>,
    /// The network devices.
    pub devices: Vec<DeviceStatus>,
    /// The maps and their numbers of entries.
    pub maps: Vec<MapStatus>,
    /// The drop counters, one per reason.
    pub drops: Vec<DropStatus>,
    /// The problems that the agent reports.
    pub problems: Vec<Problem>,
}

/// The state of the agent's process, as it last stored it.
#[derive(Debug, Clone, Deserialize)]
pub struct AgentStatus {
    /// Whether an agent holds the lock of the pin path.
    pub running: bool,
    /// The process id of the agent.
    pub pid: u32,
    /// The number of batches that the agent has applied.
    pub applies: u64,
    /// Whether the agent has applied everything at least once.
    pub complete: bool,
}

/// The program of a cgroup hook.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct ProgramStatus {
    /// Name of the program.
    pub name: String,
    /// Whether the program is attached.
    pub attached: bool,
    /// The kernel's hash of the program's instructions.
    pub tag: String,
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct DeviceStatus {
    /// The device's name.
    pub name: String,
    /// The device's index.
    pub index: u32,
    /// How programs are attached to the device, if they are.
    pub attached: Option<String>,
    /// Source address of IPv4 packets that leave by the device.
    pub source_v4: Option<IpAddr>,
    /// Source address of IPv6 packets that leave by the device.
    pub source_v6: Option<IpAddr>,
}

/// A map.
#[derive(Debug, Clone, Deserialize)]
pub struct MapStatus {
    /// The map's name.
    pub name: String,
    /// Number of entries in use.
    pub used: u64,
}

/// A drop counter.
#[derive(Debug, Clone, Deserialize)]
pub struct DropStatus {
    /// The label of the drop reason.
    pub reason: String,
    /// How often packets or calls were refused for it.
    pub count: u64,
}

/// A problem that the agent reports.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Problem {
    /// The object that the problem concerns.
    pub place: String,
    /// The text of the problem.
    pub message: String,
}

impl Status {
    /// Returns how many entries of a map are in use.
    ///
    /// # Errors
    /// If there is no such map.
    pub fn used(&self, map: &str) -> Result<u64> {
        let map = self
            .maps
            .iter()
            .find(|m| m.name == map)
            .with_context(|| format!("no map {map}"))?;
        Ok(map.used)
    }

    /// Returns the counter of a drop reason.
    ///
    /// # Errors
    /// If there is no such reason.
    pub fn dropped(&self, reason: &str) -> Result<u64> {
        let drop = self
            .drops
            .iter()
            .find(|d| d.reason == reason)
            .with_context(|| format!("no reason {reason}"))?;
        Ok(drop.count)
    }
}

/// Returns the capabilities that the systemd unit grants, in the form of a bounding set of setpriv(1):
/// `-all,+bpf,+net_admin`.
///
/// # Errors
/// If the unit cannot be read, or does not set `CapabilityBoundingSet`.
pub fn unit_capabilities() -> Result<String> {
    let unit = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/lb-agent.service");
    let text = fs::read_to_string(unit).with_context(|| format!("reading {unit}"))?;
    let granted = text
        .lines()
        .find_map(|line| line.strip_prefix("CapabilityBoundingSet="))
        .with_context(|| format!("no CapabilityBoundingSet in {unit}"))?;
    let names = granted.split_whitespace().map(|name| name.trim_start_matches("CAP_"));
    Ok(names.fold("-all".to_owned(), |set, name| format!("{set},+{}", name.to_lowercase())))
}

/// The binary, source and pin path of a node's agent, to start it and to run its subcommands. Several of its processes may
/// be started, one after another or at the same time.
#[derive(Debug, Clone)]
pub struct Agent {
    program: PathBuf,
    netns: Netns,
    cgroup: PathBuf,
    pin_path: PathBuf,
    /// The flags of `run` and `verify` that set the source of Services.
    source: Vec<OsString>,
    log: PathBuf,
}

impl Agent {
    /// Creates the agent of a node that reads manifests from a file or directory.
    #[must_use]
    pub fn new(cluster: &Cluster, node: &Node, program: &Path, manifests: &Path) -> Self {
        Self::with_source(cluster, node, program, vec!["--manifests".into(), manifests.into()])
    }

    /// Creates the agent of a node that reads Services from API servers, with the credentials of a kubeconfig.
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
        }
    }

    /// Returns a copy of this agent with `--cluster-cidr` for both `run` and `verify`.
    #[must_use]
    pub fn with_cluster_cidr(&self, networks: &str) -> Self {
        let mut new = self.clone();
        new.source.extend(["--cluster-cidr".into(), networks.into()]);
        new
    }

    /// Returns the path of the lb-agent binary: the value of the environment variable `LB_AGENT`, or else `lb-agent` in the
    /// directory of [`testbed`]'s binary.
    ///
    /// # Errors
    /// If there is no such binary.
    pub fn find() -> Result<PathBuf> {
        let program = match env::var_os("LB_AGENT") {
            Some(path) => PathBuf::from(path),
            None => testbed().program().with_file_name("lb-agent"),
        };
        ensure!(
            program.is_file(),
            "{} does not exist: build it (`cargo build -p lb-agent`), or set LB_AGENT to its path",
            program.display()
        );
        Ok(program)
    }

    /// The name of the node.
    #[must_use]
    pub fn node(&self) -> &str {
        self.netns.name()
    }

    /// The agent's pin path.
    #[must_use]
    pub fn pin_path(&self) -> &Path {
        &self.pin_path
    }

    /// Starts `lb-agent run` with additional flags, without waiting for it to be ready.
    ///
    /// # Errors
    /// If the process cannot be started.
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
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("the agent's log")?)
            .stderr(log);
        Process::spawn(&mut command)
    }

    /// Starts `lb-agent run` and waits until it has applied everything and its programs are attached.
    ///
    /// # Errors
    /// If the process ends, or is not ready in time; the message contains the end of its log.
    pub fn start_ready(&self, flags: &[&str]) -> Result<Process> {
        let mut process = self.start(flags)?;
        self.wait_ready(&mut process)?;
        Ok(process)
    }

    /// Waits until the process has applied everything and its programs are attached.
    ///
    /// # Errors
    /// If the process ends, or is not ready in time; the message contains the end of its log.
    pub fn wait_ready(&self, process: &mut Process) -> Result<()> {
        self.wait(process, "ready", &|| false, Self::is_complete)
    }

    /// Checks that the process has applied everything. The state of an earlier process stays visible until this one is
    /// ready.
    fn is_complete(&self, pid: u32) -> Result<()> {
        let agent = self.status()?.agent;
        ensure!(agent.running && agent.complete && agent.pid == pid, "{agent:?}");
        Ok(())
    }

    /// Waits until `check`, which gets the process id, succeeds.
    fn wait(
        &self,
        process: &mut Process,
        what: &str,
        interrupted: &dyn Fn() -> bool,
        check: impl Fn(&Self, u32) -> Result<()>,
    ) -> Result<()> {
        let deadline = Instant::now() + scaled_timeout(READY_TIMEOUT);
        loop {
            let start = Instant::now();
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
            pause_between_polls(start);
        }
    }

    /// Runs a subcommand until it exits and returns its standard output.
    ///
    /// # Errors
    /// If the subcommand fails; the message contains all its output.
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

    /// Runs a subcommand with `-o json` and returns its parsed output.
    ///
    /// # Errors
    /// If the subcommand fails, or its output does not have that type.
    pub fn json<T: DeserializeOwned>(&self, arguments: &[&str]) -> Result<T> {
        let text = self.output(&[arguments, &["-o", "json"]].concat())?;
        serde_json::from_str(&text).with_context(|| format!("unexpected output: {text}"))
    }

    /// Returns how many connections and flows the programs have counted for a Service, at all its ports or at the named
    /// one.
    ///
    /// # Errors
    /// If there is no such Service or port.
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

    /// Returns the output of `lb-agent status`.
    ///
    /// # Errors
    /// If the subcommand fails.
    pub fn status(&self) -> Result<Status> {
        self.json(&["status"])
    }

    /// Runs `lb-agent verify`, which compares the maps with the desired state of the source.
    ///
    /// # Errors
    /// If they differ; the message contains the differences.
    pub fn verify(&self) -> Result<()> {
        let arguments = ["verify", "--node-name", self.node()].map(OsString::from);
        self.output(&[&arguments, self.source.as_slice()].concat()).map(drop)
    }

    /// Checks that the agent reports no problem, except that it does not serve the whole machine.
    ///
    /// # Errors
    /// If it reports one, or `status` fails.
    pub fn check_problems(&self) -> Result<()> {
        let problems = self.status()?.problems;
        ensure!(problems.iter().all(|p| p.place.starts_with("cgroup")), "{problems:?}");
        Ok(())
    }

    /// Checks that the pin path has the pins of this layout, and of no other one.
    ///
    /// # Errors
    /// If it has other directories, or cannot be read.
    pub fn check_layout(&self, layout: u32) -> Result<()> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.pin_path).with_context(|| format!("listing {}", self.pin_path.display()))? {
            found.push(entry?.file_name());
        }
        ensure!(
            found == [&*format!("v{layout}")],
            "{found:?} below the pin path, not v{layout}"
        );
        Ok(())
    }

    /// The log, which all processes of this agent share.
    #[must_use]
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// Returns the last lines of the log, which all processes of this agent share.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }
}

/// An agent with its process. Dropping this kills the process; its pins stay as long as the cluster.
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
    /// Starts an agent. If it ends early, [`Self::wait_ready`] reports that.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub fn start(agent: Agent, flags: &[&str]) -> Result<Self> {
        let process = agent.start(flags)?;
        Ok(Self { agent, process })
    }

    /// Starts the agent again, after [`Self::kill`].
    ///
    /// # Errors
    /// If the process cannot be started.
    pub fn start_again(&mut self) -> Result<()> {
        self.start_again_with(&[])
    }

    /// Starts the agent again with additional flags, after [`Self::kill`].
    ///
    /// # Errors
    /// If the process cannot be started.
    pub fn start_again_with(&mut self, flags: &[&str]) -> Result<()> {
        self.process = self.agent.start(flags)?;
        Ok(())
    }

    /// Starts another build of the agent, after [`Self::kill`]. Subcommands are run with it from then on.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub fn start_again_as(&mut self, program: &Path) -> Result<()> {
        program.clone_into(&mut self.agent.program);
        self.start_again()
    }

    /// The agent's process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Kills the process by SIGKILL, if it runs. Its pins stay.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn kill(&mut self) -> Result<()> {
        if !self.process.is_running()? {
            return Ok(());
        }
        self.process.signal(Signal::SIGKILL)?;
        self.process.wait(scaled_timeout(READY_TIMEOUT)).map(drop)
    }

    /// Waits until the agent has applied everything that its source contains now.
    ///
    /// # Errors
    /// If the process ends or is not ready in time, or `interrupted` returns true.
    pub fn wait_ready(&mut self, interrupted: &dyn Fn() -> bool) -> Result<()> {
        self.agent.wait(&mut self.process, "ready", interrupted, |agent, pid| {
            agent.is_complete(pid)?;
            agent.verify()
        })
    }

    /// Waits until `check` succeeds.
    ///
    /// # Errors
    /// If the agent ends or the check fails for too long; the message contains the last error and the agent's log.
    pub fn wait(&mut self, what: &str, check: impl Fn(&Agent) -> Result<()>) -> Result<()> {
        self.agent
            .wait(&mut self.process, what, &|| false, |agent, _| check(agent))
    }
}
