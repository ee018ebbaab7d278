//! Sockets in a cluster that a test drives call by call, a process that connects sockets in a loop, and UDP servers.

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::{ChildStdin, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::{Netns, Process, Testbed, scaled_timeout};

/// Time limit for the start of a scripted socket, and for one call.
const CALL: Duration = Duration::from_secs(10);

/// Family and protocol of a socket.
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

/// A system call on the socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SocketCall {
    /// `close`, and `socket` again.
    Reopen,
    /// `bind`.
    Bind(SocketAddr),
    /// `connect`. The address of an IPv4 destination is of AF_INET, also on an AF_INET6 socket.
    Connect(SocketAddr),
    /// `connect` with AF_UNSPEC.
    Disconnect,
    /// `send`.
    Send(String),
    /// `sendto`. An AF_INET6 socket sends to an IPv4 destination by its v4-mapped address.
    SendTo(SocketAddr, String),
    /// `recvfrom`, with a time limit.
    Receive,
    /// `getpeername`.
    PeerName,
    /// `getsockname`.
    Name,
    /// `SO_COOKIE`.
    Cookie,
}

/// The result of a call.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum CallResult {
    /// The call succeeded and has no value.
    Done,
    /// The call failed with this error number.
    Failed(i32),
    /// The source and the received text. A v4-mapped source stays v4-mapped.
    Received(Option<SocketAddr>, String),
    /// An address.
    Address(SocketAddr),
    /// A number.
    Number(u64),
}

/// A socket in a process of its own.
#[derive(Debug)]
pub struct ScriptedSocket {
    process: Process,
    stdin: ChildStdin,
}

impl Testbed {
    /// Creates a socket in `netns`.
    ///
    /// # Errors
    /// If the process or its socket cannot be created.
    pub fn scripted_socket(&self, netns: &Netns, kind: SocketKind) -> Result<ScriptedSocket> {
        let mut command = netns.command(self.program())?;
        command
            .args(["scripted-socket", "--kind", &format!("{kind:?}")])
            .stdin(Stdio::piped());
        let mut process = Process::spawn_ready(&mut command, scaled_timeout(CALL))?;
        let stdin = process.take_stdin().context("no standard input")?;
        Ok(ScriptedSocket { process, stdin })
    }

    /// Connects one socket after another in `netns`, as fast as possible. The last 2000 stay open.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub fn churn(&self, netns: &Netns, kind: SocketKind, to: SocketAddr) -> Result<SocketChurn> {
        let mut command = netns.command(self.program())?;
        command
            .args(["churn", "--kind", &format!("{kind:?}"), "--to", &to.to_string()])
            .stdin(Stdio::piped());
        let mut process = Process::spawn_ready(&mut command, scaled_timeout(CALL))?;
        let stdin = process.take_stdin().context("no standard input")?;
        Ok(SocketChurn { process, stdin })
    }

    /// Starts a UDP server in `netns`; `listen` has entries `ADDR:PORT=NAME`. The server answers each datagram with its
    /// name, a blank and the payload.
    ///
    /// # Errors
    /// If the server is not ready in time.
    pub fn serve_datagrams(&self, netns: &Netns, listen: &[&str]) -> Result<Process> {
        self.serve_datagrams_with(netns, listen, &[])
    }

    /// Starts a UDP server like [`Self::serve_datagrams`], with more flags (`--report-source`).
    ///
    /// # Errors
    /// If the server is not ready in time.
    pub(crate) fn serve_datagrams_with(&self, netns: &Netns, listen: &[&str], flags: &[&str]) -> Result<Process> {
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
    /// Makes one call and returns its result; a failed call is [`CallResult::Failed`].
    ///
    /// # Errors
    /// If the process has ended or does not answer in time.
    pub fn call(&mut self, call: &SocketCall) -> Result<CallResult> {
        writeln!(self.stdin, "{}", serde_json::to_string(call)?).context("writing to a scripted socket")?;
        let line = self.process.line(scaled_timeout(CALL))?;
        serde_json::from_str(&line).with_context(|| format!("not the result of a call: {line}"))
    }

    /// The id of the process that owns the socket.
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

    /// Calls `connect`, which must succeed.
    ///
    /// # Errors
    /// If the call fails.
    pub fn connect(&mut self, to: SocketAddr) -> Result<()> {
        self.done(&SocketCall::Connect(to))
    }

    /// Calls `sendto`, which must succeed.
    ///
    /// # Errors
    /// If the call fails.
    pub fn send_to(&mut self, to: SocketAddr, text: &str) -> Result<()> {
        self.done(&SocketCall::SendTo(to, text.to_owned()))
    }

    /// Calls `send`, which must succeed.
    ///
    /// # Errors
    /// If the call fails.
    pub fn send(&mut self, text: &str) -> Result<()> {
        self.done(&SocketCall::Send(text.to_owned()))
    }

    /// Calls `recvfrom`, which must succeed, and returns the source and the text. A v4-mapped source is returned as IPv4.
    ///
    /// # Errors
    /// If the call fails.
    pub fn receive(&mut self) -> Result<(Option<SocketAddr>, String)> {
        match self.call(&SocketCall::Receive)? {
            CallResult::Received(from, text) => Ok((from.map(plain), text)),
            other => bail!("receiving: {other:?}"),
        }
    }

    /// Returns the address of `getpeername`. A v4-mapped address is returned as IPv4.
    ///
    /// # Errors
    /// If the call fails.
    pub fn peer(&mut self) -> Result<SocketAddr> {
        match self.call(&SocketCall::PeerName)? {
            CallResult::Address(address) => Ok(plain(address)),
            other => bail!("getpeername: {other:?}"),
        }
    }

    /// Returns the socket's `SO_COOKIE`.
    ///
    /// # Errors
    /// If the call fails.
    pub fn cookie(&mut self) -> Result<u64> {
        match self.call(&SocketCall::Cookie)? {
            CallResult::Number(cookie) => Ok(cookie),
            other => bail!("SO_COOKIE: {other:?}"),
        }
    }

    /// Sends a text to a UDP server by `sendto` and returns the name of the server. The reply must come from `to`.
    ///
    /// # Errors
    /// If no reply arrives, or it has another source or text.
    pub fn exchange(&mut self, to: SocketAddr, text: &str) -> Result<String> {
        self.send_to(to, text)?;
        self.receive_reply(to, text)
    }

    /// Waits for the reply to a text that was sent to `by`, and returns the name of the server; see [`Self::exchange`].
    ///
    /// # Errors
    /// If no reply arrives, or it has another source or text.
    pub fn receive_reply(&mut self, by: SocketAddr, text: &str) -> Result<String> {
        let (from, reply) = self.receive()?;
        ensure!(
            from == Some(by),
            "the reply to {text:?} came from {from:?}, not {by}: {reply:?}"
        );
        match reply.split_once(' ') {
            Some((name, rest)) if rest == text => Ok(name.to_owned()),
            _ => bail!("the reply to {text:?} was {reply:?}"),
        }
    }

    /// Makes a call that must fail and returns its error number.
    ///
    /// # Errors
    /// If the call succeeds.
    pub fn errno(&mut self, call: &SocketCall) -> Result<i32> {
        match self.call(call)? {
            CallResult::Failed(errno) => Ok(errno),
            other => bail!("{call:?}: {other:?}, not an error"),
        }
    }
}

/// A process that connects one socket after another. Dropping this closes its last sockets.
#[derive(Debug)]
pub struct SocketChurn {
    process: Process,
    stdin: ChildStdin,
}

impl SocketChurn {
    /// Stops connecting and returns the number of sockets that were connected.
    ///
    /// # Errors
    /// If a socket could not be connected.
    pub fn stop(&mut self) -> Result<u64> {
        // If the process has ended, reading its next line fails.
        let _ = self.stdin.write_all(b"\n");
        let line = self.process.line(scaled_timeout(CALL))?;
        line.parse().with_context(|| format!("not a number: {line}"))
    }
}

/// Converts a v4-mapped address to IPv4.
#[must_use]
pub fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
