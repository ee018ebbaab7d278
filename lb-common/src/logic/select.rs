//! Random selection of a member of a set, and of a port.

/// Maps a random 32-bit number evenly to `0..len`. Returns zero if `len` is zero.
///
/// The function multiplies instead of using `%`: the verifier keeps the bound, and a multiplication costs less than a
/// division. The result is biased by at most `len / 2^32` (Lemire, "Fast Random Integer Generation in an Interval",
/// 2019).
#[inline(always)]
#[must_use]
pub const fn pick(random: u32, len: u16) -> u32 {
    ((random as u64 * len as u64) >> 32) as u32
}

/// Maps a random 32-bit number evenly to the ports `first..=last`. Returns `None` if the range is empty.
#[inline(always)]
#[must_use]
pub const fn port(first: u16, last: u16, random: u32) -> Option<u16> {
    if first == 0 || last < first {
        return None;
    }
    let count = last as u64 - first as u64 + 1;
    Some(first + ((random as u64 * count) >> 32) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn stays_in_bounds(random: u32, len in 1..=u16::MAX) {
            prop_assert!(pick(random, len) < u32::from(len));
        }
    }

    #[test]
    fn every_member_has_the_same_share() {
        for len in [1_u16, 2, 3, 7, 10] {
            let mut counts = [0_u32; 10];
            for i in 0..100_000_u32 {
                counts[pick(i * (u32::MAX / 100_000), len) as usize] += 1;
            }
            for count in &counts[..len as usize] {
                assert!(
                    count.abs_diff(100_000 / u32::from(len)) <= 1 + u32::from(len),
                    "{len}: {counts:?}"
                );
            }
        }
    }
}
