//! A socket somewhere in a cluster that does what a test says, call by call; and one that is made anew all the while.

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{ChildStdin, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::{Netns, Process, Testbed, scaled_timeout};

/// How long a puppet may take to start, or for one call.
const CALL: Duration = Duration::from_secs(10);

/// What kind of socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SocketKind {
    /// AF_INET, SOCK_STREAM.
    Tcp4,
    /// AF_INET6, SOCK_STREAM; not IPv6 only.
    Tcp6,
    /// AF_INET, SOCK_DGRAM.
    Udp4,
    /// AF_INET6, SOCK_DGRAM; not IPv6 only.
    Udp6,
    /// AF_INET, SOCK_STREAM, IPPROTO_MPTCP.
    Mptcp4,
    /// AF_INET6, SOCK_STREAM, IPPROTO_MPTCP.
    Mptcp6,
}

/// A call on the socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SocketCall {
    /// `bind`.
    Bind(SocketAddr),
    /// `connect`: the address of an IPv4 destination is of AF_INET, whatever the socket is.
    Connect(SocketAddr),
    /// `connect` with AF_UNSPEC.
    Disconnect,
    /// `send`.
    Send(String),
    /// `sendto`: to an IPv4 destination on an AF_INET6 socket with a v4-mapped address.
    SendTo(SocketAddr, String),
    /// `recvfrom` with a time limit.
    Receive,
    /// `getpeername`.
    PeerName,
    /// `getsockname`.
    Name,
    /// `SO_COOKIE`.
    Cookie,
}

/// What a call returned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CallResult {
    /// It succeeded.
    Done,
    /// It failed, with this error number.
    Failed(i32),
    /// What was received, and from whom (v4-mapped addresses as they are).
    Received(Option<SocketAddr>, String),
    /// An address.
    Address(SocketAddr),
    /// A number.
    Number(u64),
}

/// A socket of a process of its own.
#[derive(Debug)]
pub struct ScriptedSocket {
    process: Process,
    stdin: ChildStdin,
}

impl Testbed {
    /// Makes a socket in `place`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn scripted_socket(&self, netns: &Netns, kind: SocketKind) -> Result<ScriptedSocket> {
        let mut command = netns.command(self.program())?;
        command
            .args(["scripted-socket", "--kind", &format!("{kind:?}")])
            .stdin(Stdio::piped());
        let mut process = Process::spawn_ready(&mut command, scaled_timeout(CALL))?;
        let stdin = process.take_stdin().context("no standard input")?;
        Ok(ScriptedSocket { process, stdin })
    }

    /// Connects one socket after the other in `place`, as fast as it can; the last 2000 stay open.
    ///
    /// # Errors
    /// When the process cannot be started.
    pub fn churn(&self, netns: &Netns, kind: SocketKind, to: SocketAddr) -> Result<SocketChurn> {
        let mut command = netns.command(self.program())?;
        command
            .args(["churn", "--kind", &format!("{kind:?}"), "--to", &to.to_string()])
            .stdin(Stdio::piped());
        let mut process = Process::spawn_ready(&mut command, scaled_timeout(CALL))?;
        let stdin = process.take_stdin().context("no standard input")?;
        Ok(SocketChurn { process, stdin })
    }

    /// Starts a server of datagrams in `place`; `listen` has entries `ADDR:PORT=NAME`. It answers each datagram with its
    /// name, a blank and what it got.
    ///
    /// # Errors
    /// When it is not ready in time.
    pub fn serve_datagrams(&self, netns: &Netns, listen: &[&str]) -> Result<Process> {
        self.serve_datagrams_with(netns, listen, &[])
    }

    /// The same, with more flags: `--report-source`.
    ///
    /// # Errors
    /// When it is not ready in time.
    pub fn serve_datagrams_with(&self, netns: &Netns, listen: &[&str], flags: &[&str]) -> Result<Process> {
        let mut command = netns.command(self.program())?;
        command.arg("serve-datagrams").args(flags).stdin(Stdio::null());
        for listen in listen {
            command.arg(format!("--listen={listen}"));
        }
        Process::spawn_ready(&mut command, scaled_timeout(CALL))
            .with_context(|| format!("serving {listen:?} in {}", netns.name()))
    }
}

impl ScriptedSocket {
    /// Makes one call.
    ///
    /// # Errors
    /// When the process is gone; an error of the call is an [`CallResult`].
    pub fn call(&mut self, call: &SocketCall) -> Result<CallResult> {
        writeln!(self.stdin, "{}", serde_json::to_string(call)?).context("writing to a puppet")?;
        let line = self.process.line(scaled_timeout(CALL))?;
        serde_json::from_str(&line).with_context(|| format!("not an answer: {line}"))
    }

    /// The id of its process.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    fn done(&mut self, call: &SocketCall) -> Result<()> {
        match self.call(call)? {
            CallResult::Done => Ok(()),
            other => bail!("{call:?}: {other:?}"),
        }
    }

    /// `connect` that must succeed.
    ///
    /// # Errors
    /// When it does not.
    pub fn connect(&mut self, to: SocketAddr) -> Result<()> {
        self.done(&SocketCall::Connect(to))
    }

    /// `sendto` that must succeed.
    ///
    /// # Errors
    /// When it does not.
    pub fn send_to(&mut self, to: SocketAddr, text: &str) -> Result<()> {
        self.done(&SocketCall::SendTo(to, text.to_owned()))
    }

    /// `send` that must succeed.
    ///
    /// # Errors
    /// When it does not.
    pub fn send(&mut self, text: &str) -> Result<()> {
        self.done(&SocketCall::Send(text.to_owned()))
    }

    /// `recvfrom` that must succeed: the source, with v4-mapped addresses made plain, and the text.
    ///
    /// # Errors
    /// When it does not.
    pub fn receive(&mut self) -> Result<(Option<SocketAddr>, String)> {
        match self.call(&SocketCall::Receive)? {
            CallResult::Received(from, text) => Ok((from.map(plain), text)),
            other => bail!("receiving: {other:?}"),
        }
    }

    /// `getpeername`, with v4-mapped addresses made plain.
    ///
    /// # Errors
    /// When it fails.
    pub fn peer(&mut self) -> Result<SocketAddr> {
        match self.call(&SocketCall::PeerName)? {
            CallResult::Address(address) => Ok(plain(address)),
            other => bail!("getpeername: {other:?}"),
        }
    }

    /// `SO_COOKIE`.
    ///
    /// # Errors
    /// When it fails.
    pub fn cookie(&mut self) -> Result<u64> {
        match self.call(&SocketCall::Cookie)? {
            CallResult::Number(cookie) => Ok(cookie),
            other => bail!("SO_COOKIE: {other:?}"),
        }
    }

    /// Sends a question to a datagram server by `sendto`, and returns the name of the server; the answer must come from
    /// `to`.
    ///
    /// # Errors
    /// When there is no answer, or it is another's.
    pub fn exchange(&mut self, to: SocketAddr, question: &str) -> Result<String> {
        self.send_to(to, question)?;
        self.receive_reply(to, question)
    }

    /// Waits for the answer to a question; see [`Self::exchange`].
    ///
    /// # Errors
    /// When there is no answer, or it is another's.
    pub fn receive_reply(&mut self, by: SocketAddr, question: &str) -> Result<String> {
        let (from, text) = self.receive()?;
        ensure!(
            from == Some(by),
            "{question:?} was answered by {from:?}, not {by}: {text:?}"
        );
        match text.split_once(' ') {
            Some((name, rest)) if rest == question => Ok(name.to_owned()),
            _ => bail!("{question:?} was answered with {text:?}"),
        }
    }

    /// The error number of a call that must fail.
    ///
    /// # Errors
    /// When it succeeds.
    pub fn errno(&mut self, call: &SocketCall) -> Result<i32> {
        match self.call(call)? {
            CallResult::Failed(errno) => Ok(errno),
            other => bail!("{call:?}: {other:?}, not an error"),
        }
    }
}

/// A process that connects one socket after the other. Its last sockets are closed when this is dropped.
#[derive(Debug)]
pub struct SocketChurn {
    process: Process,
    stdin: ChildStdin,
}

impl SocketChurn {
    /// Makes no more, and returns how many there were.
    ///
    /// # Errors
    /// When one could not be connected.
    pub fn stop(&mut self) -> Result<u64> {
        // Where it has ended, that shows in the next line.
        let _ = self.stdin.write_all(b"\n");
        let line = self.process.line(scaled_timeout(CALL))?;
        line.parse().with_context(|| format!("no number: {line}"))
    }
}

/// A v4-mapped address as the IPv4 address that it is.
#[must_use]
pub fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
