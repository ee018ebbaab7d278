//! IP addresses as the maps store them.

use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::layout;

/// An IPv6 address, or a v4-mapped IPv4 address; bytes in network order.
///
/// Because of the alignment of 4 the compiler does not copy it byte by byte through `memcpy`, which the kernel target
/// does not have.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(4))]
pub struct Addr {
    /// The bytes, in network order.
    pub bytes: [u8; 16],
}

layout!(Addr: size 16, align 4 { bytes: 0 });

impl Addr {
    /// The all-zero address `::`. No service has it, so it also means "none".
    pub const UNSPECIFIED: Self = Self { bytes: [0; 16] };

    /// Returns the v4-mapped form of an IPv4 address; its bytes are in network order.
    #[inline(always)]
    #[must_use]
    pub const fn from_v4(b: [u8; 4]) -> Self {
        Self {
            bytes: [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, b[0], b[1], b[2], b[3]],
        }
    }

    /// Returns the address that has the bytes of two words.
    #[inline(always)]
    #[must_use]
    pub const fn from_words(words: &[u64; 2]) -> &Self {
        zerocopy::transmute_ref!(words)
    }

    /// Returns the bytes of the mapped IPv4 address in network order, if this is one.
    #[inline(always)]
    #[must_use]
    pub const fn to_v4(self) -> Option<[u8; 4]> {
        match self.bytes {
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a, b, c, d] => Some([a, b, c, d]),
            _ => None,
        }
    }

    /// Returns the socket address with a port in host byte order; a v4-mapped address becomes an IPv4 one.
    #[must_use]
    pub fn socket(self, port: u16) -> SocketAddr {
        SocketAddr::new(self.into(), port)
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => Self { bytes: ip.octets() },
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(ip: Ipv4Addr) -> Self {
        Self::from_v4(ip.octets())
    }
}

impl From<Addr> for IpAddr {
    fn from(addr: Addr) -> Self {
        match addr.to_v4() {
            Some(b) => Self::V4(b.into()),
            None => Self::V6(Ipv6Addr::from(addr.bytes)),
        }
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&IpAddr::from(*self), f)
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
