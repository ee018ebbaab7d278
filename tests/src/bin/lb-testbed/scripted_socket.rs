//! `lb-testbed scripted-socket`: a socket that makes the calls on standard input; see `lb_tests::scripted_socket`.

use std::io::stdin;
use std::net::{Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use lb_tests::scripted_socket::{CallResult, SocketCall, SocketKind};
use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, MsgFlags, SockaddrStorage, setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};

use crate::print_line;

/// The longest datagram, in bytes.
const MAX_DATAGRAM: usize = 65_536;

/// Flags of `lb-testbed scripted-socket`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Kind of socket
    #[arg(long, value_parser = parse_kind)]
    kind: SocketKind,
    /// Timeout of sending and receiving, in milliseconds
    #[arg(long, default_value_t = 2000)]
    timeout_ms: i64,
}

pub(crate) fn parse_kind(text: &str) -> Result<SocketKind, String> {
    serde_json::from_value(text.into()).map_err(|error| error.to_string())
}

/// Creates a socket. An IPv6 socket is not IPv6 only.
pub(crate) fn open(kind: SocketKind) -> Result<OwnedFd> {
    let family = family(kind);
    let (socket_type, protocol) = match kind {
        SocketKind::Tcp4 | SocketKind::Tcp6 => (libc::SOCK_STREAM, 0),
        SocketKind::Udp4 | SocketKind::Udp6 => (libc::SOCK_DGRAM, 0),
        SocketKind::Mptcp4 | SocketKind::Mptcp6 => (libc::SOCK_STREAM, libc::IPPROTO_MPTCP),
    };
    // SAFETY: `socket` takes integers only.
    let fd = Errno::result(unsafe { libc::socket(family as i32, socket_type | libc::SOCK_CLOEXEC, protocol) })
        .context("creating a socket")?;
    // SAFETY: `socket` returned a new descriptor, which has no other owner.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    if family == AddressFamily::Inet6 {
        setsockopt(&socket, sockopt::Ipv6V6Only, &false).context("IPV6_V6ONLY")?;
    }
    Ok(socket)
}

fn family(kind: SocketKind) -> AddressFamily {
    match kind {
        SocketKind::Tcp4 | SocketKind::Udp4 | SocketKind::Mptcp4 => AddressFamily::Inet,
        SocketKind::Tcp6 | SocketKind::Udp6 | SocketKind::Mptcp6 => AddressFamily::Inet6,
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let family = family(options.kind);
    let mut socket = open_with_timeout(options)?;
    print_line("ready")?;
    for line in stdin().lines() {
        let line = line.context("reading standard input")?;
        let call = serde_json::from_str(&line).with_context(|| format!("not a call: {line}"))?;
        let result = match make_call(options, &mut socket, family, &call) {
            Ok(result) => result,
            Err(error) => match error.downcast_ref::<Errno>() {
                Some(errno) => CallResult::Failed(*errno as i32),
                None => return Err(error),
            },
        };
        print_line(&serde_json::to_string(&result)?)?;
    }
    Ok(())
}

/// Creates a socket with the timeout of the options.
fn open_with_timeout(options: &Options) -> Result<OwnedFd> {
    let socket = open(options.kind)?;
    let timeout = TimeVal::milliseconds(options.timeout_ms);
    setsockopt(&socket, sockopt::ReceiveTimeout, &timeout).context("SO_RCVTIMEO")?;
    setsockopt(&socket, sockopt::SendTimeout, &timeout).context("SO_SNDTIMEO")?;
    Ok(socket)
}

fn make_call(options: &Options, socket: &mut OwnedFd, family: AddressFamily, call: &SocketCall) -> Result<CallResult> {
    let fd = socket.as_raw_fd();
    Ok(match call {
        SocketCall::Reopen => {
            *socket = open_with_timeout(options)?;
            CallResult::Done
        }
        SocketCall::Bind(to) => {
            socket::bind(fd, &mapped(*to, family))?;
            CallResult::Done
        }
        SocketCall::Connect(to) => {
            socket::connect(fd, &SockaddrStorage::from(*to))?;
            CallResult::Done
        }
        SocketCall::Disconnect => {
            disconnect(socket)?;
            CallResult::Done
        }
        SocketCall::Send(text) => {
            socket::send(fd, text.as_bytes(), MsgFlags::empty())?;
            CallResult::Done
        }
        SocketCall::SendTo(to, text) => {
            socket::sendto(fd, text.as_bytes(), &mapped(*to, family), MsgFlags::empty())?;
            CallResult::Done
        }
        SocketCall::Receive => {
            let mut buffer = vec![0; MAX_DATAGRAM];
            let (length, from) = socket::recvfrom::<SockaddrStorage>(fd, &mut buffer)?;
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            CallResult::Received(from.and_then(|from| address(&from)), text)
        }
        SocketCall::PeerName => named(&socket::getpeername(fd)?)?,
        SocketCall::Name => named(&socket::getsockname(fd)?)?,
        SocketCall::Cookie => CallResult::Number(cookie(socket)?),
    })
}

/// Returns the address for a socket of this family: an IPv4 address for an AF_INET6 socket is v4-mapped.
fn mapped(to: SocketAddr, family: AddressFamily) -> SockaddrStorage {
    match to {
        SocketAddr::V4(v4) if family == AddressFamily::Inet6 => {
            let ip: Ipv6Addr = v4.ip().to_ipv6_mapped();
            SocketAddrV6::new(ip, v4.port(), 0, 0).into()
        }
        to => to.into(),
    }
}

fn address(from: &SockaddrStorage) -> Option<SocketAddr> {
    let v4 = from.as_sockaddr_in().map(|v4| SocketAddr::V4((*v4).into()));
    v4.or_else(|| from.as_sockaddr_in6().map(|v6| SocketAddr::V6((*v6).into())))
}

fn named(from: &SockaddrStorage) -> Result<CallResult> {
    match address(from) {
        Some(address) => Ok(CallResult::Address(address)),
        None => bail!("{from:?} is not an IP address"),
    }
}

/// Calls `connect` with AF_UNSPEC, which `nix` cannot express.
fn disconnect(socket: &OwnedFd) -> Result<()> {
    // SAFETY: `sockaddr` is plain data, for which all bytes zero is a valid value.
    let mut unspecified: libc::sockaddr = unsafe { std::mem::zeroed() };
    unspecified.sa_family = libc::AF_UNSPEC as u16;
    let length = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: the pointer and the length describe `unspecified`, which outlives the call.
    Errno::result(unsafe { libc::connect(socket.as_raw_fd(), &raw const unspecified, length) })?;
    Ok(())
}

fn cookie(socket: &OwnedFd) -> Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: `cookie` is valid for writes of `length` bytes, and `length` is valid for reads and writes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    Errno::result(result)?;
    Ok(cookie)
}
