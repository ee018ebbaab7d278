//! A hash of one word.

/// Mixes the bits of a word, so that every bit of the result depends on all of them: the finalizer of SplitMix64 (Steele, Lea and
/// Flood, "Fast Splittable Pseudorandom Number Generators", 2014). The high bits are the best.
#[inline(always)]
#[must_use]
pub(crate) const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb)
}
