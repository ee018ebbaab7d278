//! Servers and load generators: how tests run the helper program `lb-testbed`, and its results.
//!
//! A server writes its name on every connection, so that a client can identify the backend. All times are nanoseconds of
//! `CLOCK_MONOTONIC` (see [`crate::monotonic_ns`]).

use std::collections::BTreeMap;
use std::env;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::{Netns, Process, scaled_timeout};

/// Time limit for the start of a process of the test bed.
const START: Duration = Duration::from_secs(20);
/// Time limit for a connection after the loss of its first SYN.
const SYN_RETRY_TIMEOUT: Duration = Duration::from_secs(5);

/// The result of `lb-testbed connect`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// Attempted connections, including failed ones.
    pub connections: u64,
    /// Number of failed connections.
    pub failure_count: u64,
    /// The first 100 failures.
    pub failures: Vec<Failure>,
    /// Connections per server name.
    pub per_backend: BTreeMap<String, u64>,
    /// Connections per server name, for each requested address (`ADDR:PORT`).
    pub per_target: BTreeMap<String, BTreeMap<String, u64>>,
    /// Connections per source address that the server saw; empty unless the server runs with `--report-source`.
    pub per_source: BTreeMap<String, u64>,
    /// Connections with another peer than the requested address; 0 without `--peer-check`.
    pub peer_mismatches: u64,
    /// The first 100 connections with another peer.
    pub mismatches: Vec<Mismatch>,
    /// Time from the first connection to the last.
    pub elapsed_ns: u64,
}

impl Summary {
    /// Checks that every connection succeeded and, with `--peer-check`, that every peer was the requested address.
    ///
    /// # Errors
    /// If that is not so, or there was no connection; the message contains the first failures.
    pub fn all_well(&self) -> Result<()> {
        ensure!(self.connections > 0, "no connection was attempted");
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

    /// Returns the number of connections that reached `backend`.
    #[must_use]
    pub fn reached(&self, backend: &str) -> u64 {
        self.per_backend.get(backend).copied().unwrap_or_default()
    }
}

/// A failed connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The requested address.
    pub to: SocketAddr,
    /// The error number; 0 if there was none, as for a stream that ended before a name.
    pub errno: i32,
    /// The name of the error's kind, for example `ConnectionRefused`.
    pub kind: String,
    /// Time of the call of `connect`.
    pub at_ns: u64,
    /// The step that failed.
    pub step: ConnectStep,
}

/// A connection with another `getpeername` than the requested address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mismatch {
    /// The requested address.
    pub to: SocketAddr,
    /// The address that `getpeername` returned.
    pub peer: SocketAddr,
    /// Time of the call of `connect`.
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

/// The result of `lb-testbed connect --hold`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldSummary {
    /// Number of opened connections.
    pub held: u64,
    /// Number of connections that still echoed at the end.
    pub live: u64,
    /// Opened connections per backend.
    pub per_backend: BTreeMap<String, u64>,
    /// Connections per backend that still echoed at the end.
    pub live_per_backend: BTreeMap<String, u64>,
    /// The first 100 connections that could not be opened, or did not echo any more.
    pub failures: Vec<Failure>,
}

/// One line of a log of `lb-testbed connect --log`: `START END TARGET BACKEND`, or `START END TARGET !ERRNO` for a failed
/// connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Time of the call of `connect`.
    pub start_ns: u64,
    /// Time at which the name was read, or the connection failed.
    pub end_ns: u64,
    /// The requested address.
    pub to: SocketAddr,
    /// The backend's name or the error number.
    pub outcome: Result<String, i32>,
}

impl Record {
    /// Reads a log.
    ///
    /// # Errors
    /// If the file cannot be read, or a line is not a record.
    pub fn read_log(path: &Path) -> Result<Vec<Self>> {
        let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
        text.lines()
            .map(|line| Self::parse(line).with_context(|| format!("not a record: {line:?}")))
            .collect()
    }

    /// Returns the record as a line of the log, without a newline.
    #[must_use]
    pub fn line(&self) -> String {
        let outcome = match &self.outcome {
            Ok(name) => name.clone(),
            Err(errno) => format!("!{errno}"),
        };
        format!("{} {} {} {outcome}", self.start_ns, self.end_ns, self.to)
    }

    /// Parses a line of a log.
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

/// The options of a client. See `lb-testbed connect --help`.
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
    /// Creates options for connections to these addresses in turn, on one thread, with a timeout of one second. Without a
    /// count or a time, the client stops at the default limits of `lb-testbed`.
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

    /// Sets the number of connections.
    #[must_use]
    pub fn count(mut self, count: u64) -> Self {
        self.count = Some(count);
        self
    }

    /// Sets the time after which the client stops.
    #[must_use]
    pub fn seconds(mut self, seconds: f64) -> Self {
        self.seconds = Some(seconds);
        self
    }

    /// Sets the highest number of connections per second, of all threads together.
    #[must_use]
    pub fn rate(mut self, rate: f64) -> Self {
        self.rate = Some(rate);
        self
    }

    /// Sets the number of threads, which is the number of simultaneous connections.
    #[must_use]
    pub fn threads(mut self, threads: u16) -> Self {
        self.threads = threads;
        self
    }

    /// Sets the timeout of each step of a connection.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Compares `getpeername` with the requested address.
    #[must_use]
    pub fn peer_check(mut self) -> Self {
        self.peer_check = true;
        self
    }

    /// Sends a GET request on each connection. The backend's name is the first line of the response's body.
    #[must_use]
    pub fn http(mut self) -> Self {
        self.http = true;
        self
    }

    /// Expects that lb's programs refuse every connection before a packet is sent; all others count as failed. The number
    /// of connections is not limited: the client runs until its time or [`Load::stop`], at about a million per second.
    #[must_use]
    pub fn refused(mut self) -> Self {
        self.refused = true;
        self.count = Some(u64::MAX);
        self
    }

    /// Writes one line per connection to a file; see [`Record::read_log`].
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

/// Returns the helper program of this build: the value of the environment variable `LB_TESTBED`, or else `lb-testbed` in
/// the directory to which cargo writes programs.
///
/// # Panics
/// If the path of the calling program is not known.
#[must_use]
pub fn testbed() -> Testbed {
    Testbed::new(env::var_os("LB_TESTBED").map_or_else(
        || {
            let own = env::current_exe().expect("the path of this program");
            let folder = own.parent().expect("a program is in a directory");
            // Cargo writes test programs to the subdirectory `deps`.
            let folder = if folder.ends_with("deps") {
                folder.parent().expect("`deps` has a parent")
            } else {
                folder
            };
            folder.join("lb-testbed")
        },
        PathBuf::from,
    ))
}

/// The helper program `lb-testbed`; see [`testbed`].
#[derive(Debug, Clone)]
pub struct Testbed {
    program: PathBuf,
}

impl Testbed {
    /// Creates a handle of the program at this path.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self {
            program: program.into(),
        }
    }

    /// The path of the program.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Starts a server in `netns` that writes a name on each connection; `listen` has entries `ADDR:PORT[=NAME]`.
    ///
    /// # Errors
    /// If the server does not listen in time.
    pub fn serve(&self, netns: &Netns, listen: &[&str]) -> Result<Process> {
        self.serve_with(netns, listen, &[])
    }

    /// Starts a server like [`Self::serve`], with more flags: `--echo`, `--http`, `--report-source`.
    ///
    /// # Errors
    /// If the server does not listen in time.
    pub fn serve_with(&self, netns: &Netns, listen: &[&str], flags: &[&str]) -> Result<Process> {
        let mut command = netns.command(&self.program)?;
        command.arg("serve").args(flags).stdin(Stdio::null());
        for listen in listen {
            command.arg(format!("--listen={listen}"));
        }
        Process::spawn_ready(&mut command, scaled_timeout(START))
            .with_context(|| format!("serving {listen:?} in {}", netns.name()))
    }

    /// Runs a client in `netns` until it exits.
    ///
    /// # Errors
    /// If the client cannot be run. Failed connections are not an error here; see [`Summary::all_well`].
    pub fn connect(&self, netns: &Netns, connect: &Connect) -> Result<Summary> {
        let arguments = connect.arguments();
        let program = self.program.to_str().context("the path of lb-testbed is not UTF-8")?;
        let output = netns.run(program, &arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
        serde_json::from_str(&output).with_context(|| format!("not a summary: {output}"))
    }

    /// Starts a client in `netns` that connects until [`Load::stop`] or its own limits.
    ///
    /// # Errors
    /// If the client cannot be started.
    pub fn start(&self, netns: &Netns, connect: &Connect) -> Result<Load> {
        let directory = tempfile::tempdir().context("creating a scratch directory")?;
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

    /// Opens `connections` connections in `netns` and keeps them open. The server must run with `--echo`. The timeout allows
    /// the kernel to send a lost SYN again, which it does after one second.
    ///
    /// # Errors
    /// If not all connections are attempted in time. Failed ones are in [`HeldSummary::failures`].
    pub fn hold(&self, netns: &Netns, targets: &[SocketAddr], connections: u32) -> Result<HeldConnections> {
        let mut command = netns.command(&self.program)?;
        command
            .args(
                Connect::to(targets)
                    .timeout(scaled_timeout(SYN_RETRY_TIMEOUT))
                    .arguments(),
            )
            .arg(format!("--hold={connections}"))
            .stdin(Stdio::piped());
        Ok(HeldConnections {
            process: Process::spawn_ready(&mut command, scaled_timeout(START))?,
        })
    }
}

/// A client that connects until it is stopped. Dropping this kills the client.
#[derive(Debug)]
pub struct Load {
    process: Process,
    _directory: TempDir,
    stop: PathBuf,
}

impl Load {
    /// Returns whether the client still runs.
    ///
    /// # Errors
    /// If waiting for the process fails.
    pub fn is_running(&mut self) -> Result<bool> {
        self.process.is_running()
    }

    /// Stops the client after the connections that it has begun, and returns its result.
    ///
    /// # Errors
    /// If the client does not end in time, or without a result.
    pub fn stop(mut self) -> Result<Summary> {
        fs::write(&self.stop, "").with_context(|| format!("writing {}", self.stop.display()))?;
        let line = self.process.line(scaled_timeout(START))?;
        serde_json::from_str(&line).with_context(|| format!("not a summary: {line}"))
    }
}

/// A client that keeps connections open. Dropping this kills the client.
#[derive(Debug)]
pub struct HeldConnections {
    process: Process,
}

impl HeldConnections {
    /// Sends a line on every connection, and returns how many echoed it.
    ///
    /// # Errors
    /// If the client does not answer in time.
    pub fn finish(mut self) -> Result<HeldSummary> {
        drop(self.process.take_stdin());
        let line = self.process.line(scaled_timeout(START))?;
        serde_json::from_str(&line).with_context(|| format!("not a summary of held connections: {line}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_parsed_from_its_line() {
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
