//! FILTER: networks with addresses that FRONTENDS or NODE_ADDRS has.
//!
//! Most destinations are neither of a Service nor of the node. A bit that is not set settles that by one load, in place of a look-up in
//! each of the hashes. A bit that is set settles nothing: other addresses of the network have it too, and other networks. There is one
//! bit for a network and not for an address, since the bits have to stay in the innermost cache: a load from memory costs as much
//! as a look-up that is cached. Service addresses have few networks of their own.

use super::Addr;
use crate::mix::mix;

/// Number of bits in FILTER, which takes 16 KiB.
pub const FILTER_BITS: u32 = 1 << 17;

/// Number of entries of FILTER, which have 64 bits each.
pub const FILTER_WORDS: u32 = FILTER_BITS / u64::BITS;

/// The bit of a network in FILTER: 256 addresses that differ in the last byte only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FilterBit(u32);

impl FilterBit {
    /// 2^64 divided by the golden ratio.
    const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
    /// The second word of an address without the last byte.
    const NETWORK: u64 = u64::from_ne_bytes([0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0]);

    /// Returns the bit of an address, whose words have the byte order of memory.
    #[inline(always)]
    #[must_use]
    pub const fn of([first, last]: [u64; 2]) -> Self {
        // The product keeps two addresses apart whose words are exchanged.
        let mixed = mix(first.wrapping_mul(Self::MULTIPLIER) ^ (last & Self::NETWORK));
        Self((mixed >> (u64::BITS - FILTER_BITS.ilog2())) as u32)
    }

    /// Returns the index of the entry of FILTER that has the bit.
    #[inline(always)]
    #[must_use]
    pub const fn word(self) -> u32 {
        self.0 / u64::BITS
    }

    /// Returns the entry in which only this bit is set.
    #[inline(always)]
    #[must_use]
    pub const fn mask(self) -> u64 {
        1 << (self.0 % u64::BITS)
    }

    /// Returns whether the bit is set in its entry.
    #[inline(always)]
    #[must_use]
    pub const fn is_in(self, word: u64) -> bool {
        word & self.mask() != 0
    }

    /// Returns the bits that are set in an entry, by its index.
    pub fn all_in(index: u32, word: u64) -> impl Iterator<Item = Self> {
        let bits = (0..u64::BITS).map(move |bit| Self(index * u64::BITS + bit));
        bits.filter(move |bit| bit.is_in(word))
    }
}

impl From<Addr> for FilterBit {
    fn from(addr: Addr) -> Self {
        Self::of(zerocopy::transmute!(addr))
    }
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;
    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    use std::collections::BTreeSet;

    fn bit(ip: impl Into<IpAddr>) -> FilterBit {
        Addr::from(ip.into()).into()
    }

    #[test]
    fn every_bit_has_a_place_of_its_own() {
        let bit = FilterBit(FILTER_BITS - 1);
        assert_eq!((bit.word(), bit.mask()), (FILTER_WORDS - 1, 1 << 63));
        assert!(FilterBit::all_in(7, 1 << 5 | 1).eq([FilterBit(7 * 64), FilterBit(7 * 64 + 5)]));
    }

    /// The bits are in pinned maps: another hash needs another name of the map.
    #[test]
    fn bits_are_the_same_in_every_build() {
        for (addr, number) in [("10.96.0.10", 86_026), ("192.0.2.1", 9_403), ("fd00:96::a", 99_036)] {
            assert_eq!(bit(addr.parse::<IpAddr>().unwrap()), FilterBit(number), "{addr}");
        }
    }

    #[test]
    fn addresses_share_a_bit_if_only_the_last_byte_differs() {
        let v4 = |last: u32| bit(Ipv4Addr::from(0x0a60_0000 | last));
        assert_eq!(v4(0), v4(255));
        assert_ne!(v4(0), v4(256));
        let v6 = |last: u128| bit(Ipv6Addr::from(0xfd00_0096 << 96 | last));
        assert_eq!(v6(0), v6(255));
        assert_ne!(v6(0), v6(256));
    }

    /// The addresses of Services are taken at random from a range that is much larger: here every 97th of a /12 and of a /108.
    #[test]
    fn few_networks_of_pods_have_the_bit_of_a_service() {
        let v4 = |net: u32, host: u32| bit(Ipv4Addr::from(net | host));
        let v6 = |net: u128, host: u32| bit(Ipv6Addr::from(0xfd00 << 112 | net << 96 | u128::from(host)));
        let services: BTreeSet<_> = (0..10_000)
            .map(|service| service * 97)
            .flat_map(|host| [v4(0x0a60_0000, host), v6(0x96, host)])
            .collect();
        // Of 4,096 networks in each family.
        let expected = f64::from(FILTER_BITS) * -f64::exp_m1(-2.0 * 3_790.0 / f64::from(FILTER_BITS));
        assert!(
            (services.len() as f64 / expected - 1.0).abs() < 0.05,
            "{}",
            services.len()
        );
        let hosts = (0..20_000).map(|network| network << 8);
        let pods: BTreeSet<_> = hosts
            .flat_map(|host| {
                [
                    v4(0x0a00_0000, host & 0x5f_ffff),
                    v4(0xac10_0000, host & 0xf_ffff),
                    v6(0x244, host),
                ]
            })
            .collect();
        let hits = pods.intersection(&services).count();
        assert!(hits * 100 < pods.len() * 8, "{hits} of {}", pods.len());
    }
}
