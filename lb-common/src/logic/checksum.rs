//! The Internet checksum (RFC 1071), as sums and differences.
//!
//! Words have their memory order. The sum does not depend on the byte order, as long as all words have the same one.

/// A ones' complement sum of words that is not folded to 16 bits yet: the kernel's `__wsum`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sum(u64);

impl Sum {
    /// The empty sum.
    pub const ZERO: Self = Self(0);

    /// Adds a word. A single 16-bit value must be at an even offset of the packet.
    #[inline(always)]
    #[must_use]
    pub const fn add(self, word: u32) -> Self {
        Self(self.0 + word as u64)
    }

    /// Adds another sum.
    #[inline(always)]
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        self.add(other.to_u32())
    }

    /// Subtracts a word.
    #[inline(always)]
    #[must_use]
    pub const fn sub(self, word: u32) -> Self {
        self.add(!word)
    }

    /// Adds the two words of a 64-bit value.
    #[inline(always)]
    #[must_use]
    pub const fn add_u64(self, words: u64) -> Self {
        self.add(words as u32).add((words >> 32) as u32)
    }

    /// Subtracts the two words of a 64-bit value.
    #[inline(always)]
    #[must_use]
    pub const fn sub_u64(self, words: u64) -> Self {
        self.add_u64(!words)
    }

    /// Returns the sum folded to 32 bits.
    #[inline(always)]
    #[must_use]
    pub const fn to_u32(self) -> u32 {
        let once = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        ((once & 0xffff_ffff) + (once >> 32)) as u32
    }

    /// Returns the sum folded to 16 bits, not inverted.
    #[inline(always)]
    #[must_use]
    pub const fn fold(self) -> u16 {
        let sum = self.to_u32();
        let once = (sum & 0xffff) + (sum >> 16);
        ((once & 0xffff) + (once >> 16)) as u16
    }

    /// Returns the checksum in memory order: the inverted sum, folded to 16 bits.
    #[inline(always)]
    #[must_use]
    pub const fn checksum(self) -> u16 {
        !self.fold()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn sum(bytes: &[u8]) -> Sum {
        bytes.chunks(4).fold(Sum::ZERO, |sum, chunk| {
            let mut word = [0; 4];
            for (to, byte) in word.iter_mut().zip(chunk) {
                *to = *byte;
            }
            sum.add(u32::from_ne_bytes(word))
        })
    }

    #[test]
    fn a_header_of_rfc_791() {
        let mut header = [
            0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0, 0, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7,
        ];
        let checksum = sum(&header).checksum().to_ne_bytes();
        assert_eq!(checksum, [0xb8, 0x61]);
        header[10] = checksum[0];
        header[11] = checksum[1];
        assert_eq!(sum(&header).checksum(), 0);
    }

    proptest! {
        #[test]
        fn a_difference_is_as_good_as_a_new_sum(before in any::<[u32; 9]>(), at in 0_usize..9, new: u32) {
            let whole = |words: &[u32]| words.iter().fold(Sum::ZERO, |sum, word| sum.add(*word));
            let mut after = before;
            after[at] = new;
            let old = whole(&before).checksum();
            let changed = Sum::ZERO.add((!old).into()).sub(before[at]).add(new);
            // 0 and 0xffff are the same in ones' complement.
            prop_assert_eq!(changed.checksum() % 0xffff, whole(&after).checksum() % 0xffff);
        }

        #[test]
        fn words_by_two_are_words(words: u64, other: u32) {
            let (low, high) = (words as u32, (words >> 32) as u32);
            prop_assert_eq!(Sum::ZERO.add(other).add_u64(words).fold(), Sum::ZERO.add(other).add(low).add(high).fold());
            prop_assert_eq!(
                Sum::ZERO.add(other).sub_u64(words).fold(),
                Sum::ZERO.add(other).sub(low).sub(high).fold()
            );
        }
    }
}
