//! Servers and load: how tests run the helper binary `lb-testbed`, and what it answers.
//!
//! A server writes its name on every connection, so that a client knows which backend it has reached. All times are
//! nanoseconds of `CLOCK_MONOTONIC` (see [`crate::monotonic_ns`]).

use std::collections::BTreeMap;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::{Netns, Process, scaled_timeout};

/// How long a process of the bed may take to start.
const START: Duration = Duration::from_secs(20);
/// How long a connection may take whose first SYN is lost.
const RESENT: Duration = Duration::from_secs(5);

/// What `lb-testbed connect` did.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Connections tried, failed ones included.
    pub connections: u64,
    /// How many of them failed.
    pub failure_count: u64,
    /// The first 100 failures.
    pub failures: Vec<Failure>,
    /// Connections per name that a server gave.
    pub per_backend: BTreeMap<String, u64>,
    /// The same, per address asked (as `ADDR:PORT`).
    pub per_target: BTreeMap<String, BTreeMap<String, u64>>,
    /// Connections per source address that the server saw; empty unless it runs with `--report-source`.
    pub per_source: BTreeMap<String, u64>,
    /// Connections whose peer was not the address asked; 0 without `--peer-check`.
    pub peer_mismatches: u64,
    /// The first 100 of them.
    pub mismatches: Vec<Mismatch>,
    /// From the first connection to the last.
    pub elapsed_ns: u64,
}

impl Summary {
    /// Fails with the reasons unless every connection succeeded and, where checked, every peer was the address asked.
    ///
    /// # Errors
    /// See above.
    pub fn all_well(&self) -> Result<()> {
        ensure!(self.connections > 0, "no connection was tried");
        ensure!(
            self.failure_count == 0 && self.peer_mismatches == 0,
            "{} of {} connections failed, {} had another peer: {:?} {:?}",
            self.failure_count,
            self.connections,
            self.peer_mismatches,
            self.failures.iter().take(5).collect::<Vec<_>>(),
            self.mismatches.iter().take(5).collect::<Vec<_>>(),
        );
        Ok(())
    }

    /// Connections that reached `backend`.
    #[must_use]
    pub fn reached(&self, backend: &str) -> u64 {
        self.per_backend.get(backend).copied().unwrap_or_default()
    }
}

/// A connection that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The address asked.
    pub to: SocketAddr,
    /// The error number; 0 where there was none (the end of the stream before a name).
    pub errno: i32,
    /// The error in words, as `ConnectionRefused`.
    pub kind: String,
    /// When `connect` was called.
    pub at_ns: u64,
    /// What failed.
    pub step: ConnectStep,
}

/// A connection whose `getpeername` did not give the address asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    /// The address asked.
    pub to: SocketAddr,
    /// What `getpeername` gave.
    pub peer: SocketAddr,
    /// When `connect` was called.
    pub at_ns: u64,
}

/// A step of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConnectStep {
    /// `connect` itself.
    Connect,
    /// `getpeername` and socket options.
    Peer,
    /// Sending the request or the echo.
    Write,
    /// Reading the backend's name or the echo.
    Read,
}

/// What `lb-testbed connect --hold` tells at its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldSummary {
    /// Connections that were opened.
    pub held: u64,
    /// Those that still answered at the end.
    pub live: u64,
    /// Opened connections per backend.
    pub per_backend: BTreeMap<String, u64>,
    /// Those per backend that still answered.
    pub live_per_backend: BTreeMap<String, u64>,
    /// Those that could not be opened, or did not answer any more; the first 100.
    pub failures: Vec<Failure>,
}

/// One line of a log that `lb-testbed connect --log` wrote: `START END TARGET BACKEND`, or for a failure
/// `START END TARGET !ERRNO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// When `connect` was called.
    pub start_ns: u64,
    /// When the name had been read, or the failure was known.
    pub end_ns: u64,
    /// The address asked.
    pub to: SocketAddr,
    /// The backend's name or the error number.
    pub outcome: Result<String, i32>,
}

impl Record {
    /// Reads a log.
    ///
    /// # Errors
    /// When it cannot be read or is not one.
    pub fn read_log(path: &Path) -> Result<Vec<Self>> {
        let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        text.lines()
            .map(|line| Self::parse(line).with_context(|| format!("not a record: {line:?}")))
            .collect()
    }

    /// The line of the log, without its end.
    #[must_use]
    pub fn line(&self) -> String {
        let outcome = match &self.outcome {
            Ok(name) => name.clone(),
            Err(errno) => format!("!{errno}"),
        };
        format!("{} {} {} {outcome}", self.start_ns, self.end_ns, self.to)
    }

    /// Reads a line of a log.
    #[must_use]
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.splitn(4, ' ');
        let start_ns = words.next()?.parse().ok()?;
        let end_ns = words.next()?.parse().ok()?;
        let to = words.next()?.parse().ok()?;
        let outcome = words.next()?;
        let outcome = match outcome.strip_prefix('!') {
            Some(errno) => Err(errno.parse().ok()?),
            None => Ok(outcome.to_owned()),
        };
        Some(Self {
            start_ns,
            end_ns,
            to,
            outcome,
        })
    }
}

/// What a client shall do. See `lb-testbed connect --help`.
#[derive(Debug, Clone)]
pub struct Connect {
    targets: Vec<SocketAddr>,
    count: Option<u64>,
    seconds: Option<f64>,
    rate: Option<f64>,
    threads: u16,
    timeout: Duration,
    peer_check: bool,
    http: bool,
    refused: bool,
    log: Option<PathBuf>,
}

impl Connect {
    /// Connections to these addresses in turn, one thread, a second of patience with each. Without count or time, as
    /// many as the binary's bounds let through.
    #[must_use]
    pub fn to(targets: &[SocketAddr]) -> Self {
        Self {
            targets: targets.to_vec(),
            count: None,
            seconds: None,
            rate: None,
            threads: 1,
            timeout: scaled_timeout(Duration::from_secs(1)),
            peer_check: false,
            http: false,
            refused: false,
            log: None,
        }
    }

    /// So many connections.
    #[must_use]
    pub fn count(mut self, count: u64) -> Self {
        self.count = Some(count);
        self
    }

    /// For so long.
    #[must_use]
    pub fn seconds(mut self, seconds: f64) -> Self {
        self.seconds = Some(seconds);
        self
    }

    /// At most so many connections a second, all threads together.
    #[must_use]
    pub fn rate(mut self, rate: f64) -> Self {
        self.rate = Some(rate);
        self
    }

    /// So many at once.
    #[must_use]
    pub fn threads(mut self, threads: u16) -> Self {
        self.threads = threads;
        self
    }

    /// Patience with each step of a connection.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Compares `getpeername` with the address asked.
    #[must_use]
    pub fn peer_check(mut self) -> Self {
        self.peer_check = true;
        self
    }

    /// Sends a GET request; the backend's name is the first line of the answer's body.
    #[must_use]
    pub fn http(mut self) -> Self {
        self.http = true;
        self
    }

    /// Connections that the programs of lb refuse, before a packet is sent; all others count as failed. There is no end
    /// to them but time or [`Load::stop`], and they are many: a million a second.
    #[must_use]
    pub fn refused(mut self) -> Self {
        self.refused = true;
        self.count = Some(u64::MAX);
        self
    }

    /// Writes a line per connection to a file; see [`Record::read_log`].
    #[must_use]
    pub fn log(mut self, path: &Path) -> Self {
        self.log = Some(path.to_owned());
        self
    }

    fn arguments(&self) -> Vec<String> {
        let mut arguments = vec!["connect".to_owned()];
        let mut add = |flag: &str, value: String| arguments.push(format!("--{flag}={value}"));
        for target in &self.targets {
            add("to", target.to_string());
        }
        if let Some(count) = self.count {
            add("count", count.to_string());
        }
        if let Some(seconds) = self.seconds {
            add("seconds", seconds.to_string());
        }
        if let Some(rate) = self.rate {
            add("rate", rate.to_string());
        }
        if let Some(log) = &self.log {
            add("log", log.display().to_string());
        }
        add("threads", self.threads.to_string());
        add("timeout-ms", self.timeout.as_millis().to_string());
        if self.peer_check {
            arguments.push("--peer-check".to_owned());
        }
        if self.http {
            arguments.push("--http".to_owned());
        }
        if self.refused {
            arguments.push("--refused".to_owned());
        }
        arguments
    }
}

/// The helper binary `lb-testbed`. Integration tests of this package find it at `env!("CARGO_BIN_EXE_lb-testbed")`.
#[derive(Debug, Clone)]
pub struct Testbed {
    program: PathBuf,
}

impl Testbed {
    /// The binary at `program`.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
        }
    }

    /// Where the binary is.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Starts a server in `place` that writes a name on each connection; `listen` has entries `ADDR:PORT[=NAME]`.
    ///
    /// # Errors
    /// When it does not listen in time.
    pub fn serve(&self, netns: &Netns, listen: &[&str]) -> Result<Process> {
        self.serve_with(netns, listen, &[])
    }

    /// As [`Self::serve`], with more flags: `--echo`, `--http`, `--report-source`.
    ///
    /// # Errors
    /// When it does not listen in time.
    pub fn serve_with(&self, netns: &Netns, listen: &[&str], flags: &[&str]) -> Result<Process> {
        let mut command = netns.command(&self.program)?;
        command.arg("serve").args(flags).stdin(Stdio::null());
        for listen in listen {
            command.arg(format!("--listen={listen}"));
        }
        Process::spawn_ready(&mut command, scaled_timeout(START))
            .with_context(|| format!("serving {listen:?} in {}", netns.name()))
    }

    /// Runs a client in `place` to its end.
    ///
    /// # Errors
    /// When it cannot be run. Failed connections are no error here: see [`Summary::all_well`].
    pub fn connect(&self, netns: &Netns, connect: &Connect) -> Result<Summary> {
        let arguments = connect.arguments();
        let program = self.program.to_str().context("the path of lb-testbed is not UTF-8")?;
        let output = netns.run(program, &arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
        serde_json::from_str(&output).with_context(|| format!("not a summary: {output}"))
    }

    /// Starts a client in `place` that goes on until [`Load::stop`] (or its own bounds).
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, netns: &Netns, connect: &Connect) -> Result<Load> {
        let directory = tempfile::tempdir().context("making a scratch directory")?;
        let stop = directory.path().join("stop");
        let mut command = netns.command(&self.program)?;
        command
            .args(connect.arguments())
            .arg("--until-file")
            .arg(&stop)
            .stdin(Stdio::null());
        Ok(Load {
            process: Process::spawn_reading(&mut command)?,
            _directory: directory,
            stop,
        })
    }

    /// Opens `connections` in `place` and keeps them open; the server runs with `--echo`. A SYN that is lost may be sent again,
    /// after a second.
    ///
    /// # Errors
    /// When they are not all tried in time. Those that fail are in [`HeldSummary::failures`].
    pub fn hold(&self, netns: &Netns, targets: &[SocketAddr], connections: u32) -> Result<HeldConnections> {
        let mut command = netns.command(&self.program)?;
        command
            .args(Connect::to(targets).timeout(scaled_timeout(RESENT)).arguments())
            .arg(format!("--hold={connections}"))
            .stdin(Stdio::piped());
        Ok(HeldConnections {
            process: Process::spawn_ready(&mut command, scaled_timeout(START))?,
        })
    }
}

/// A client that runs until told to stop. Dropping it kills it.
#[derive(Debug)]
pub struct Load {
    process: Process,
    _directory: TempDir,
    stop: PathBuf,
}

impl Load {
    /// Whether it runs still.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn is_running(&mut self) -> Result<bool> {
        self.process.is_running()
    }

    /// Lets it finish the connections it has begun, and returns what it did.
    ///
    /// # Errors
    /// When it does not end well and in time.
    pub fn stop(mut self) -> Result<Summary> {
        fs::write(&self.stop, "").with_context(|| format!("writing {}", self.stop.display()))?;
        let line = self.process.line(scaled_timeout(START))?;
        serde_json::from_str(&line).with_context(|| format!("not a summary: {line}"))
    }
}

/// A client that keeps connections open. Dropping it kills it.
#[derive(Debug)]
pub struct HeldConnections {
    process: Process,
}

impl HeldConnections {
    /// Has every connection echo a line, and tells how many did.
    ///
    /// # Errors
    /// When the client does not answer in time.
    pub fn finish(mut self) -> Result<HeldSummary> {
        drop(self.process.take_stdin());
        let line = self.process.line(scaled_timeout(START))?;
        serde_json::from_str(&line).with_context(|| format!("not an account of held connections: {line}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_survive_the_log() {
        for outcome in [Ok("a backend".to_owned()), Err(111)] {
            let record = Record {
                start_ns: 5,
                end_ns: 70,
                to: "10.96.0.80:80".parse().unwrap(),
                outcome,
            };
            assert_eq!(Record::parse(&record.line()), Some(record));
        }
        assert_eq!(Record::parse("5 70 10.96.0.80:80"), None);
    }
}
