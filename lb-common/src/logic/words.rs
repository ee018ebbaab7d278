//! Addresses as the data plane computes with them.

use crate::abi::Addr;

/// An address as four words, each with the byte order of memory (so network order, read as a native integer).
///
/// [`Addr`] is what maps hold, readable byte by byte; handled by value it would be taken apart into sixteen registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Words(pub [u32; 4]);

impl Words {
    const MAPPED: u32 = 0xffff_u32.to_be();

    /// An IPv4 address, v4-mapped; `addr` as it is in memory, in network order.
    #[inline(always)]
    #[must_use]
    pub const fn from_v4(addr: u32) -> Self {
        Self([0, 0, Self::MAPPED, addr])
    }

    /// The IPv4 address that is mapped here, if one is; in network order.
    #[inline(always)]
    #[must_use]
    pub const fn to_v4(self) -> Option<u32> {
        let [a, b, c, d] = self.0;
        if a | b | (c ^ Self::MAPPED) == 0 { Some(d) } else { None }
    }

    /// Equality without a branch for each word.
    #[inline(always)]
    #[must_use]
    pub const fn same(self, other: Self) -> bool {
        let ([a, b, c, d], [e, f, g, h]) = (self.0, other.0);
        (a ^ e) | (b ^ f) | (c ^ g) | (d ^ h) == 0
    }
}

impl From<Addr> for Words {
    fn from(addr: Addr) -> Self {
        let word = |i: usize| {
            let b = &addr.bytes[i..];
            u32::from_ne_bytes([b[0], b[1], b[2], b[3]])
        };
        Self([word(0), word(4), word(8), word(12)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn agrees_with_addr(bytes: [u8; 16], v4: [u8; 4]) {
            let addr = Addr { bytes };
            prop_assert_eq!(Words::from(addr).to_v4(), addr.to_v4().map(u32::from_ne_bytes));
            let mapped = Addr::from_v4(v4);
            prop_assert_eq!(Words::from(mapped), Words::from_v4(u32::from_ne_bytes(v4)));
            prop_assert_eq!(Words::from(mapped).to_v4(), Some(u32::from_ne_bytes(v4)));
            prop_assert_eq!(Words::from(addr).same(Words::from(mapped)), addr == mapped);
            prop_assert!(Words::from(addr).same(Words::from(addr)));
        }
    }
}
