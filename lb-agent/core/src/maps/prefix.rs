//! Keys of LPM tries: networks, as the programs compare addresses with them.

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use lb_common::abi::{Addr, ServiceIndex, SourceRange};

/// A key of an LPM trie: the first `len` bits of `data`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix<T> {
    /// The value that starts with the bits of the key.
    pub data: T,
    /// Number of bits.
    pub len: u32,
}

/// Length of the prefix that all v4-mapped addresses share, in bits.
const MAPPED: u8 = 96;
/// Length of the service index before the address in a key of SOURCE_RANGES, in bits.
const INDEX: u32 = 32;

/// Returns a network without host bits, and as IPv4 if it is written v4-mapped. Two results are equal if and only if
/// their keys in the maps are equal.
#[must_use]
pub fn normal(net: IpNet) -> IpNet {
    if let IpNet::V6(v6) = net
        && let Some(v4) = v6.addr().to_ipv4_mapped()
        && let Some(len) = v6.prefix_len().checked_sub(MAPPED)
        && let Ok(v4) = Ipv4Net::new(v4, len)
    {
        return IpNet::V4(v4.trunc());
    }
    net.trunc()
}

/// Returns whether an IPv6 network contains the v4-mapped addresses, which represent IPv4 in the maps.
#[must_use]
pub(crate) fn covers_v4(net: &IpNet) -> bool {
    let all_v4 = Ipv6Net::new(std::net::Ipv4Addr::UNSPECIFIED.to_ipv6_mapped(), MAPPED);
    matches!((net, all_v4), (IpNet::V6(net), Ok(all_v4)) if net.contains(&all_v4))
}

/// A key of CLUSTER_CIDRS.
impl From<IpNet> for Prefix<Addr> {
    fn from(net: IpNet) -> Self {
        let net = normal(net);
        let mapped = if net.addr().is_ipv4() { MAPPED } else { 0 };
        Self {
            data: net.addr().into(),
            len: u32::from(mapped) + u32::from(net.prefix_len()),
        }
    }
}

impl Prefix<SourceRange> {
    /// Returns the key of SOURCE_RANGES that allows a network to use a service.
    #[must_use]
    pub fn of(service: ServiceIndex, net: IpNet) -> Self {
        let Prefix { data: addr, len } = Prefix::<Addr>::from(net);
        Self {
            data: SourceRange { service, addr },
            len: INDEX + len,
        }
    }

    /// Returns the network, if [`Self::of`] can return this key.
    #[must_use]
    pub fn network(&self) -> Option<IpNet> {
        let len = u8::try_from(self.len.checked_sub(INDEX)?).ok()?;
        let net = normal(network(self.data.addr, len)?);
        (Self::of(self.data.service, net) == *self).then_some(net)
    }

    /// Returns whether it allows an address to use a service.
    #[must_use]
    pub fn admits(&self, service: ServiceIndex, addr: Addr) -> bool {
        let net = || self.network().map(Prefix::<Addr>::from);
        self.data.service == service && net().is_some_and(|net| net.contains(addr))
    }
}

/// Returns the network of the first bits of an address, as IPv6.
fn network(addr: Addr, len: u8) -> Option<IpNet> {
    Ipv6Net::new(addr.bytes.into(), len).ok().map(IpNet::V6)
}

impl Prefix<Addr> {
    /// Returns the network, if the key is that of a network.
    #[must_use]
    pub fn network(&self) -> Option<IpNet> {
        let net = normal(network(self.data, u8::try_from(self.len).ok()?)?);
        (Self::from(net) == *self).then_some(net)
    }

    /// Returns whether an address is in the network.
    #[must_use]
    pub fn contains(&self, addr: Addr) -> bool {
        let net = u8::try_from(self.len)
            .ok()
            .and_then(|len| Ipv6Net::new(self.data.bytes.into(), len).ok());
        net.is_some_and(|net| net.contains(&std::net::Ipv6Addr::from(addr.bytes)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    fn key(text: &str) -> Prefix<Addr> {
        net(text).into()
    }

    fn addr(text: &str) -> Addr {
        text.parse::<std::net::IpAddr>().unwrap().into()
    }

    #[test]
    fn networks_are_as_the_maps_have_addresses() {
        for (text, data, len) in [
            ("10.1.0.0/16", "10.1.0.0", 112),
            ("10.1.2.3/16", "10.1.0.0", 112),
            ("0.0.0.0/0", "0.0.0.0", 96),
            ("192.0.2.1/32", "192.0.2.1", 128),
            ("fd00:1::/32", "fd00:1::", 32),
            ("::/0", "::", 0),
            ("::ffff:10.0.0.0/104", "10.0.0.0", 104),
        ] {
            let expected = Prefix { data: addr(data), len };
            assert_eq!(key(text), expected, "{text}");
            assert_eq!(key(text).network(), Some(normal(net(text))), "{text}");
            let range = Prefix::of(ServiceIndex::new(7), net(text));
            assert_eq!((range.len, range.data.service.get()), (32 + len, 7), "{text}");
            assert_eq!(range.network(), Some(normal(net(text))), "{text}");
        }
    }

    #[test]
    fn what_no_network_gives_is_none() {
        let odd = |len| Prefix {
            data: addr("10.0.0.1"),
            len,
        };
        assert_eq!(odd(129).network(), None);
        assert_eq!(odd(104).network(), None, "host bits");
        let range = |len| Prefix {
            data: SourceRange {
                service: ServiceIndex::new(1),
                addr: addr("10.0.0.0"),
            },
            len,
        };
        assert_eq!(range(31).network(), None);
        assert_eq!(range(161).network(), None);
        assert_eq!(range(32 + 104).network(), Some(net("10.0.0.0/8")));
    }

    #[test]
    fn a_range_admits_its_own_to_its_service() {
        let (own, other) = (ServiceIndex::new(3), ServiceIndex::new(4));
        let range = Prefix::of(own, net("10.0.0.0/8"));
        assert!(range.admits(own, addr("10.255.0.1")));
        assert!(!range.admits(own, addr("11.0.0.1")));
        assert!(!range.admits(other, addr("10.255.0.1")));
        assert!(!range.admits(own, addr("::a00:1")));
        assert!(Prefix::of(own, net("0.0.0.0/0")).admits(own, addr("192.0.2.1")));
        assert!(!Prefix::of(own, net("0.0.0.0/0")).admits(own, addr("fd00::1")));
    }

    #[test]
    fn short_networks_of_ipv6_cover_ipv4() {
        for (text, covers) in [
            ("::/0", true),
            ("::/80", true),
            ("::/81", false),
            ("::ffff:0:0/95", true),
            ("2000::/3", false),
            ("0.0.0.0/0", false),
        ] {
            assert_eq!(covers_v4(&net(text)), covers, "{text}");
        }
    }
}
