//! A process whose sockets a test opens, uses and closes one by one, in a place of the cluster.

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{ChildStdin, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;

use crate::{Place, Process, Testbed, patience};

/// How long a command may take, beside what it is told to take.
const ANSWER: Duration = Duration::from_secs(20);

/// What a call returned.
pub type Called<T> = std::result::Result<T, Errno>;

/// The process. Its sockets are named by the test. Dropping it kills it.
#[derive(Debug)]
pub struct Sockets {
    process: Process,
    commands: ChildStdin,
}

impl Sockets {
    /// Starts the process.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(bed: &Testbed, place: &Place) -> Result<Self> {
        let mut command = place.command(bed.program())?;
        command.arg("sockets").stdin(Stdio::piped());
        let mut process = Process::spawn_ready(&mut command, patience(ANSWER))?;
        let commands = process.take_stdin().context("no standard input")?;
        Ok(Self { process, commands })
    }

    /// Binds a UDP socket: `udp("a", "0.0.0.0:0")`.
    ///
    /// # Errors
    /// When the process does not answer, as for all methods here.
    pub fn udp(&mut self, name: &str, local: &str) -> Result<Called<()>> {
        self.done(&format!("udp {name} {local}"))
    }

    /// Connects a UDP socket.
    ///
    /// # Errors
    /// See [`Self::udp`].
    pub fn connect(&mut self, name: &str, to: SocketAddr) -> Result<Called<()>> {
        self.done(&format!("connect {name} {to}"))
    }

    /// Opens a TCP connection.
    ///
    /// # Errors
    /// See [`Self::udp`].
    pub fn tcp(&mut self, name: &str, to: SocketAddr) -> Result<Called<()>> {
        self.done(&format!("tcp {name} {to}"))
    }

    /// Listens for TCP connections.
    ///
    /// # Errors
    /// See [`Self::udp`].
    pub fn listen(&mut self, name: &str, local: SocketAddr) -> Result<Called<()>> {
        self.done(&format!("listen {name} {local}"))
    }

    /// Serves UDP: each datagram is answered by the name and what it says.
    ///
    /// # Errors
    /// See [`Self::udp`].
    pub fn serve(&mut self, name: &str, local: SocketAddr) -> Result<Called<()>> {
        self.done(&format!("serve {name} {local}"))
    }

    /// Says a word on a connected socket; the answer, after the address that it came from for UDP. No answer within a
    /// second is EAGAIN.
    ///
    /// # Errors
    /// See [`Self::udp`].
    pub fn ask(&mut self, name: &str, word: &str) -> Result<Called<String>> {
        self.call(&format!("ask {name} {word}"), ANSWER)
    }

    /// The same on a UDP socket, to an address.
    ///
    /// # Errors
    /// See [`Self::udp`].
    pub fn ask_at(&mut self, name: &str, word: &str, to: SocketAddr) -> Result<Called<String>> {
        self.call(&format!("ask {name} {word} {to}"), ANSWER)
    }

    /// Begins to connect UDP sockets as fast as it can; the last 500 stay open. [`Self::churned`] waits for the end.
    ///
    /// # Errors
    /// See [`Self::udp`].
    pub fn churn(&mut self, to: SocketAddr, time: Duration) -> Result<()> {
        self.tell(&format!("churn {to} {}", time.as_millis()))
    }

    /// How many sockets [`Self::churn`] has connected.
    ///
    /// # Errors
    /// See [`Self::udp`].
    pub fn churned(&mut self) -> Result<Called<u64>> {
        let answer = self.answer(ANSWER * 2)?;
        answer.map_or_else(|errno| Ok(Err(errno)), |count| Ok(Ok(count.parse()?)))
    }

    /// Closes a socket.
    ///
    /// # Errors
    /// See [`Self::udp`].
    pub fn close(&mut self, name: &str) -> Result<()> {
        self.done(&format!("close {name}"))?
            .with_context(|| format!("closing {name}"))
    }

    fn done(&mut self, command: &str) -> Result<Called<()>> {
        Ok(self.call(command, ANSWER)?.map(drop))
    }

    fn call(&mut self, command: &str, time: Duration) -> Result<Called<String>> {
        self.tell(command)?;
        self.answer(time)
    }

    fn tell(&mut self, command: &str) -> Result<()> {
        writeln!(self.commands, "{command}").context("telling a process what to do")
    }

    fn answer(&mut self, time: Duration) -> Result<Called<String>> {
        let line = self.process.line(patience(time))?;
        match line.split_once(' ') {
            Some(("ok", told)) => Ok(Ok(told.trim_end().to_owned())),
            Some(("error", errno)) => Ok(Err(Errno::from_raw(errno.parse()?))),
            _ => bail!("no answer: {line}"),
        }
    }
}
