//! Sockets of a network namespace, as sock_diag(7) lists and destroys them.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;

use netlink_packet_sock_diag::constants::{
    AF_INET, AF_INET6, IPPROTO_TCP, IPPROTO_UDP, TCP_CLOSE, TCP_ESTABLISHED, TCP_LISTEN,
};
use netlink_packet_sock_diag::inet::{ExtensionFlags, InetRequest, InetResponseHeader, SocketId, StateFlags};
use netlink_packet_sock_diag::{SockDiagDestroy, SockDiagMessage};
use netlink_sys::protocols::NETLINK_SOCK_DIAG;

use super::netlink::{Listing, Netlink};

/// IANA number of a protocol whose sockets are listed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub(crate) enum Protocol {
    /// The subflows of MPTCP sockets are TCP sockets.
    Tcp = IPPROTO_TCP,
    Udp = IPPROTO_UDP,
}

impl Protocol {
    pub(crate) const ALL: [Self; 2] = [Self::Tcp, Self::Udp];
}

/// A socket that the kernel can find by its addresses: one that is bound, by bind(), connect() or its first send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Socket {
    /// `bpf_get_socket_cookie`.
    pub(crate) cookie: u64,
    pub(crate) protocol: Protocol,
    /// AF_INET or AF_INET6; sockets of the latter may have v4-mapped addresses.
    pub(crate) family: u8,
    /// `enum tcp_state`, for UDP too: 1 is connected, 7 is unconnected.
    pub(crate) state: u8,
    pub(crate) local: SocketAddr,
    /// All zero if it is not connected.
    pub(crate) remote: SocketAddr,
    /// The device that it is bound to; usually zero.
    pub(crate) interface: u32,
}

impl Socket {
    /// Whether connect() has made it send to this address, be it in v4-mapped form, and it may still do so: a UDP
    /// socket that has a peer; a TCP socket from connect() on, until the connection is over for both sides.
    pub(crate) fn is_connected_to(&self, peer: SocketAddr) -> bool {
        let has_peer = match self.protocol {
            Protocol::Udp => self.state == TCP_ESTABLISHED,
            Protocol::Tcp => !matches!(self.state, TCP_CLOSE | TCP_LISTEN),
        };
        has_peer && canonical(self.remote) == canonical(peer)
    }

    fn new(protocol: Protocol, header: &InetResponseHeader) -> Self {
        let id = &header.socket_id;
        Self {
            cookie: cookie_of(id.cookie),
            protocol,
            family: header.family,
            state: header.state,
            local: SocketAddr::new(id.source_address, id.source_port),
            remote: SocketAddr::new(id.destination_address, id.destination_port),
            interface: id.interface_id,
        }
    }

    fn id(&self) -> SocketId {
        SocketId {
            source_port: self.local.port(),
            destination_port: self.remote.port(),
            source_address: self.local.ip(),
            destination_address: self.remote.ip(),
            interface_id: self.interface,
            cookie: cookie_bytes(self.cookie),
        }
    }
}

/// An address without the v4-mapped form.
pub(crate) fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// The kernel passes a cookie as two words, the lower first (`sock_diag_save_cookie`).
fn cookie_of(bytes: [u8; 8]) -> u64 {
    let [a, b, c, d, e, f, g, h] = bytes;
    let low = u32::from_ne_bytes([a, b, c, d]);
    let high = u32::from_ne_bytes([e, f, g, h]);
    u64::from(high) << 32 | u64::from(low)
}

fn cookie_bytes(cookie: u64) -> [u8; 8] {
    let [a, b, c, d] = (cookie as u32).to_ne_bytes();
    let [e, f, g, h] = ((cookie >> 32) as u32).to_ne_bytes();
    [a, b, c, d, e, f, g, h]
}

/// Sockets of one network namespace, by cookie.
pub(crate) type Sockets = BTreeMap<u64, Socket>;

/// The sockets of the network namespace of the calling thread.
///
/// # Errors
/// Returns the errors of [`SockDiag::list`].
pub(crate) fn list_sockets(protocols: &[Protocol]) -> io::Result<Sockets> {
    let mut diag = SockDiag::open()?;
    let mut sockets = Sockets::new();
    for protocol in protocols {
        sockets.extend(diag.list(*protocol)?.into_iter().map(|socket| (socket.cookie, socket)));
    }
    Ok(sockets)
}

/// The result of destroying a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Destroyed {
    /// The next call on the socket fails with ECONNABORTED.
    Yes,
    /// The socket does not exist any more, or has other addresses now.
    Gone,
}

/// sock_diag of the network namespace that the thread was in when this was opened.
pub(crate) struct SockDiag(Netlink);

impl SockDiag {
    /// Opens sock_diag in the network namespace of the calling thread.
    ///
    /// # Errors
    /// Returns the error of the system call.
    pub(crate) fn open() -> io::Result<Self> {
        Netlink::open(NETLINK_SOCK_DIAG).map(Self)
    }

    /// Lists all sockets of a protocol, IPv4 and IPv6, except the remains of closed TCP sockets (TIME_WAIT).
    ///
    /// # Errors
    /// Returns the kernel's error, or [`io::ErrorKind::Interrupted`] if the listing may be incomplete.
    pub(crate) fn list(&mut self, protocol: Protocol) -> io::Result<Vec<Socket>> {
        let mut sockets = Vec::new();
        for family in [AF_INET, AF_INET6] {
            let listing = self.0.list(request(family, protocol, any(family)), |message| {
                if let SockDiagMessage::InetResponse(response) = message {
                    sockets.push(Socket::new(protocol, &response.header));
                }
            });
            match listing {
                Ok(Listing::Whole) => {}
                Ok(Listing::Interrupted) => return Err(io::ErrorKind::Interrupted.into()),
                // No IPv6 in this kernel.
                Err(error) if family == AF_INET6 && error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(sockets)
    }

    /// `SOCK_DESTROY` of the one socket that has this cookie and these addresses.
    ///
    /// # Errors
    /// Returns the kernel's error: EOPNOTSUPP if it is built without `CONFIG_INET_DIAG_DESTROY`, EPERM without
    /// `CAP_NET_ADMIN`.
    pub(crate) fn destroy(&mut self, socket: &Socket) -> io::Result<Destroyed> {
        let request = request(socket.family, socket.protocol, socket.id());
        match self.0.change(SockDiagDestroy::new(request)) {
            Ok(()) => Ok(Destroyed::Yes),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Destroyed::Gone),
            Err(error) => Err(error),
        }
    }

    /// Requests the destruction of a socket that does not exist: returns the error of a kernel that does not support
    /// it.
    pub(crate) fn probe(&mut self, protocol: Protocol) -> io::Result<()> {
        // A listing first, since the handler is a module that is loaded when it is needed.
        self.list(protocol)?;
        let request = request(AF_INET, protocol, any(AF_INET));
        match self.0.change(SockDiagDestroy::new(request)) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => Err(error),
            _ => Ok(()),
        }
    }
}

fn any(family: u8) -> SocketId {
    if family == AF_INET {
        SocketId::new_v4()
    } else {
        SocketId::new_v6()
    }
}

fn request(family: u8, protocol: Protocol, socket_id: SocketId) -> SockDiagMessage {
    SockDiagMessage::InetRequest(InetRequest {
        family,
        protocol: protocol as u8,
        extensions: ExtensionFlags::empty(),
        states: StateFlags::all().difference(StateFlags::TIME_WAIT),
        socket_id,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cookies_keep_their_value() {
        for cookie in [0, 1, 0x1_0000_0002, u64::MAX] {
            assert_eq!(cookie_of(cookie_bytes(cookie)), cookie);
        }
        assert_eq!(&cookie_bytes(0x1_0000_0002)[..4], 2_u32.to_ne_bytes());
    }
}
