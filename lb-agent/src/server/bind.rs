//! Addresses that servers listen on.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::str::FromStr;

use nix::sys::socket::{setsockopt, sockopt};
use tokio::net::{TcpListener, TcpSocket};

/// Maximum number of connections that wait to be accepted.
const BACKLOG: u32 = 128;

/// The address of a server in kube-proxy's form: with or without a port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BindAddress {
    /// The address; the unspecified address of either family means all addresses of both.
    pub ip: IpAddr,
    /// The port in host byte order; `None` for the default of the server.
    pub port: Option<u16>,
}

/// The error of a text that is not an address.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("not an address such as 0.0.0.0:10256 or [::1]:10249")]
pub struct NotAnAddress;

impl BindAddress {
    /// Returns the address with its port, or with `port` if it has none.
    #[must_use]
    pub fn with_port(self, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip, self.port.unwrap_or(port))
    }
}

impl FromStr for BindAddress {
    type Err = NotAnAddress;

    fn from_str(text: &str) -> Result<Self, NotAnAddress> {
        if let Ok(at) = text.parse::<SocketAddr>() {
            return Ok(Self {
                ip: at.ip(),
                port: Some(at.port()),
            });
        }
        // As in Go, an empty host means every address.
        if let Some(port) = text.strip_prefix(':').and_then(|port| port.parse().ok()) {
            return Ok(Self {
                ip: Ipv6Addr::UNSPECIFIED.into(),
                port: Some(port),
            });
        }
        let ip = text.parse().map_err(|_| NotAnAddress)?;
        Ok(Self { ip, port: None })
    }
}

impl fmt::Display for BindAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.port {
            Some(port) => SocketAddr::new(self.ip, port).fmt(f),
            None => self.ip.fmt(f),
        }
    }
}

/// Listens on an address. The unspecified address of either family means both, as in Go: one socket serves IPv4 and
/// IPv6, or IPv4 alone if the kernel has no IPv6.
///
/// # Errors
/// Returns the error of the system call.
pub(crate) fn listen(at: SocketAddr) -> io::Result<TcpListener> {
    if !at.ip().is_unspecified() {
        return listen_with(at, None);
    }
    let everywhere = SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), at.port());
    match listen_with(everywhere, Some(false)) {
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => listen_with(at, None),
        result => result,
    }
}

fn listen_with(at: SocketAddr, v6_only: Option<bool>) -> io::Result<TcpListener> {
    let socket = if at.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        TcpSocket::new_v6()?
    };
    // Connections of a previous agent may still be in TIME_WAIT.
    socket.set_reuseaddr(true)?;
    if let Some(v6_only) = v6_only {
        setsockopt(&socket, sockopt::Ipv6V6Only, &v6_only)?;
    }
    socket.bind(at)?;
    socket.listen(BACKLOG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_parsed_as_by_kube_proxy() {
        for (text, expected) in [
            ("0.0.0.0:10256", "0.0.0.0:10256"),
            ("127.0.0.1", "127.0.0.1:7"),
            ("[::1]:80", "[::1]:80"),
            ("::1", "[::1]:7"),
            ("::", "[::]:7"),
            (":9000", "[::]:9000"),
        ] {
            let address: BindAddress = text.parse().unwrap();
            assert_eq!(address.with_port(7).to_string(), expected, "{text}");
        }
        for text in ["", "localhost:80", "1.2.3.4:", "1.2.3.4:65536", "[::1]", "10249"] {
            assert_eq!(text.parse::<BindAddress>(), Err(NotAnAddress), "{text}");
        }
    }
}
