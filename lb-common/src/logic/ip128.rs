//! IP addresses as two 64-bit words, the form in which programs compute with them.

use crate::abi::Addr;

/// An address as two words, each with the byte order of memory (so network order, read as a native integer).
///
/// Map values contain an [`Addr`], whose bytes a person can read in a dump. The compiler would split an [`Addr`] that is passed
/// by value into its sixteen bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ip128(pub [u64; 2]);

/// Returns the word that has the bytes of two halves in memory.
const fn word(first: u32, last: u32) -> u64 {
    let ([a, b, c, d], [e, f, g, h]) = (first.to_ne_bytes(), last.to_ne_bytes());
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

/// Returns the halves of a word, in the order of memory.
const fn halves(word: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = word.to_ne_bytes();
    (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]))
}

impl Ip128 {
    const MAPPED: u32 = 0xffff_u32.to_be();
    const LOOPBACK_V4: Self = Self::from_v4(0x7f00_0001_u32.to_be());
    const LOOPBACK_V6: Self = Self([0, word(0, 1_u32.to_be())]);

    /// Returns the v4-mapped form of an IPv4 address; `addr` has the byte order of memory, so network order.
    #[inline(always)]
    #[must_use]
    pub const fn from_v4(addr: u32) -> Self {
        Self([0, word(Self::MAPPED, addr)])
    }

    /// Returns the address with four words of 32 bits, each with the byte order of memory.
    #[inline(always)]
    #[must_use]
    pub const fn from_quarters([a, b, c, d]: [u32; 4]) -> Self {
        Self([word(a, b), word(c, d)])
    }

    /// Returns the four words of 32 bits, each with the byte order of memory.
    #[inline(always)]
    #[must_use]
    pub const fn to_quarters(self) -> [u32; 4] {
        let ((a, b), (c, d)) = (halves(self.0[0]), halves(self.0[1]));
        [a, b, c, d]
    }

    /// Returns the mapped IPv4 address with the byte order of memory, if this is one.
    #[inline(always)]
    #[must_use]
    pub const fn to_v4(self) -> Option<u32> {
        if self.is_v4() { Some(halves(self.0[1]).1) } else { None }
    }

    /// Returns whether the address is a v4-mapped IPv4 address.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(self) -> bool {
        let [high, low] = self.0;
        high == 0 && halves(low).0 == Self::MAPPED
    }

    /// Returns whether the address is in 127.0.0.0/8 or is `::1`.
    #[inline(always)]
    #[must_use]
    pub const fn is_loopback(self) -> bool {
        // Most IPv6 addresses are settled here.
        if self.0[0] != 0 {
            return false;
        }
        match self.to_v4() {
            Some(v4) => v4 & 0xff00_0000_u32.to_be() == 0x7f00_0000_u32.to_be(),
            None => self.same(Self::LOOPBACK_V6),
        }
    }

    /// Returns the address zero of the same family: `::ffff:0.0.0.0` or `::`.
    #[inline(always)]
    #[must_use]
    pub const fn unspecified(self) -> Self {
        if self.is_v4() { Self::from_v4(0) } else { Self([0, 0]) }
    }

    /// Returns the address that the kernel uses for this one as a destination: loopback for zero.
    #[inline(always)]
    #[must_use]
    pub const fn or_loopback(self) -> Self {
        // Most IPv6 addresses are settled here.
        if self.0[0] != 0 {
            return self;
        }
        if self.same(Self::from_v4(0)) {
            Self::LOOPBACK_V4
        } else if self.same(Self([0, 0])) {
            Self::LOOPBACK_V6
        } else {
            self
        }
    }

    /// Returns whether all bytes are zero.
    #[inline(always)]
    #[must_use]
    pub const fn is_unset(self) -> bool {
        self.0[0] | self.0[1] == 0
    }

    /// Returns whether two addresses are equal, without a branch for each word.
    #[inline(always)]
    #[must_use]
    pub const fn same(self, other: Self) -> bool {
        let ([a, b], [c, d]) = (self.0, other.0);
        (a ^ c) | (b ^ d) == 0
    }
}

impl From<Addr> for Ip128 {
    fn from(addr: Addr) -> Self {
        let [a, b, c, d, e, f, g, h, rest @ ..] = addr.bytes;
        Self([u64::from_ne_bytes([a, b, c, d, e, f, g, h]), u64::from_ne_bytes(rest)])
    }
}

impl From<Ip128> for Addr {
    fn from(Ip128(words): Ip128) -> Self {
        let mut bytes = [0; 16];
        for (to, word) in bytes.chunks_exact_mut(8).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        Self { bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    use proptest::prelude::*;

    #[test]
    fn zero_is_loopback_as_a_destination() {
        let words = |ip: IpAddr| Ip128::from(Addr::from(ip));
        let (any4, any6) = (words(Ipv4Addr::UNSPECIFIED.into()), words(Ipv6Addr::UNSPECIFIED.into()));
        assert_eq!(any4.or_loopback(), words(Ipv4Addr::LOCALHOST.into()));
        assert_eq!(any6.or_loopback(), words(Ipv6Addr::LOCALHOST.into()));
        assert!(words(Ipv6Addr::LOCALHOST.into()).is_loopback());
        assert_eq!(any4.unspecified(), any4);
        assert_eq!(words(Ipv6Addr::LOCALHOST.into()).unspecified(), any6);
        let odd = Ip128::from_quarters([0, 0, 7, 0]);
        assert_eq!(odd.or_loopback(), odd);
        assert_eq!(
            Ip128::from_quarters([1, 2, 3, 4]),
            Addr::from(Ip128::from_quarters([1, 2, 3, 4])).into()
        );
    }

    proptest! {
        #[test]
        fn agrees_with_addr(bytes: [u8; 16], v4: [u8; 4]) {
            let addr = Addr { bytes };
            prop_assert_eq!(Ip128::from(addr).to_v4(), addr.to_v4().map(u32::from_ne_bytes));
            let mapped = Addr::from_v4(v4);
            prop_assert_eq!(Ip128::from(mapped), Ip128::from_v4(u32::from_ne_bytes(v4)));
            prop_assert_eq!(Ip128::from(mapped).to_v4(), Some(u32::from_ne_bytes(v4)));
            prop_assert_eq!(Ip128::from(addr).same(Ip128::from(mapped)), addr == mapped);
            prop_assert!(Ip128::from(addr).same(Ip128::from(addr)));
            prop_assert_eq!(Addr::from(Ip128::from(addr)), addr);
            for addr in [addr, mapped] {
                let (ip, words) = (IpAddr::from(addr), Ip128::from(addr));
                prop_assert_eq!(words.is_v4(), ip.is_ipv4());
                prop_assert_eq!(words.is_loopback(), ip.is_loopback());
                prop_assert_eq!(words.unspecified().is_v4(), ip.is_ipv4());
                prop_assert_eq!(words.or_loopback(), words, "none of them is zero, but for chance");
            }
        }

        #[test]
        fn loopback_is_seen(rest: [u8; 3]) {
            let ip = IpAddr::from([127, rest[0], rest[1], rest[2]]);
            prop_assert!(Ip128::from(Addr::from(ip)).is_loopback());
        }
    }
}
