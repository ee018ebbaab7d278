//! Lists of backends in little memory.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use super::Member;

/// Backends of one family, in the order in which they were collected. Clones share one allocation.
///
/// A cluster may have hundreds of thousands of backends. Here an IPv4 backend takes 8 bytes, less than half of a [`Member`].
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Members(
    /// One word for each IPv4 backend, three for each IPv6 backend. The first of them has the IPv4 address in bits 32 to 63,
    /// the port in bits 16 to 31, and [`IPV6`] and [`LOCAL`]. The other two are the IPv6 address.
    Arc<[u64]>,
);

const LOCAL: u64 = 1;
const IPV6: u64 = 2;

impl Members {
    /// Returns the backends.
    pub fn iter(&self) -> impl Iterator<Item = Member> + Clone {
        self.0.chunks_exact(self.stride()).map(unpack)
    }

    /// Returns the number of backends.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len() / self.stride()
    }

    /// Returns whether there is no backend.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the position of the backend with an address and a port, if the list is sorted.
    pub(crate) fn position(&self, addr: IpAddr, port: u16) -> Option<usize> {
        let key_at = |at: usize| {
            let member = unpack(&self.0[at * self.stride()..][..self.stride()]);
            (member.addr, member.port)
        };
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low.midpoint(high);
            if key_at(middle) < (addr, port) {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        (low < self.len() && key_at(low) == (addr, port)).then_some(low)
    }

    /// Returns whether two lists share one allocation.
    #[cfg(test)]
    pub(crate) fn is_shared_with(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// Returns the number of words of each backend.
    fn stride(&self) -> usize {
        let is_ipv6 = self.0.first().is_some_and(|first| first & IPV6 != 0);
        if is_ipv6 { 3 } else { 1 }
    }
}

impl FromIterator<Member> for Members {
    fn from_iter<I: IntoIterator<Item = Member>>(members: I) -> Self {
        let members: Vec<_> = members.into_iter().collect();
        // All empty lists share one allocation.
        if members.is_empty() {
            return Self::default();
        }
        let flags = |member: &Member| u64::from(member.port) << 16 | if member.local { LOCAL } else { 0 };
        let ipv4 = members.iter().map(|member| match member.addr {
            IpAddr::V4(ip) => Some(u64::from(ip.to_bits()) << 32 | flags(member)),
            IpAddr::V6(_) => None,
        });
        let ipv6 = members.iter().flat_map(|member| {
            let ip = match member.addr {
                IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                IpAddr::V6(ip) => ip,
            };
            let bits = ip.to_bits();
            [flags(member) | IPV6, (bits >> 64) as u64, bits as u64]
        });
        Self(ipv4.collect::<Option<_>>().unwrap_or_else(|| ipv6.collect()))
    }
}

/// Returns the backend in one or three words.
fn unpack(words: &[u64]) -> Member {
    let addr = match words[1..] {
        [high, low] => Ipv6Addr::from_bits(u128::from(high) << 64 | u128::from(low)).to_canonical(),
        _ => Ipv4Addr::from_bits((words[0] >> 32) as u32).into(),
    };
    Member {
        addr,
        port: (words[0] >> 16) as u16,
        local: words[0] & LOCAL != 0,
    }
}

impl fmt::Debug for Members {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(addr: &str, port: u16, local: bool) -> Member {
        let addr = addr.parse().unwrap();
        Member { addr, port, local }
    }

    #[test]
    fn members_round_trip_and_are_found() {
        let ipv4 = [
            member("0.0.0.1", 1, true),
            member("10.0.0.1", 80, false),
            member("10.0.0.1", 443, true),
            member("255.255.255.255", 65535, true),
        ];
        let ipv6 = [
            member("::1", 65535, true),
            member("fd00::1", 80, false),
            member("fd00::1", 443, true),
            member("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 1, false),
        ];
        for sorted in [&[], &ipv4[..], &ipv6, &[ipv4[3], ipv6[1]]] {
            let list = Members::from_iter(sorted.iter().copied());
            assert_eq!(list.iter().collect::<Vec<_>>(), sorted);
            assert_eq!((list.len(), list.is_empty()), (sorted.len(), sorted.is_empty()));
            for (at, member) in sorted.iter().enumerate() {
                assert_eq!(list.position(member.addr, member.port), Some(at));
                assert_eq!(list.position(member.addr, member.port - 1), None);
            }
        }
    }
}
