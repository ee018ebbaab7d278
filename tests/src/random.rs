//! Choices that can be repeated.

use crate::monotonic_ns;

/// A generator of pseudo-random numbers (SplitMix64), for choices that a test makes.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The same seed gives the same numbers.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Seeded by the environment variable `LB_SEED`, or else by the clock; prints how to have the same again.
    ///
    /// # Panics
    /// When `LB_SEED` is not a number.
    #[must_use]
    pub fn from_env() -> Self {
        let seed = match std::env::var("LB_SEED") {
            Ok(text) => text.parse().expect("LB_SEED is a number"),
            Err(_) => monotonic_ns(),
        };
        println!("choices as with LB_SEED={seed}");
        Self::new(seed)
    }

    /// Any number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number in `0..end`.
    ///
    /// # Panics
    /// When `end` is zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next_u64() % end
    }

    /// Heads or tails.
    pub fn next_bool(&mut self) -> bool {
        self.below(2) == 1
    }

    /// Takes an element out of a list.
    ///
    /// # Panics
    /// When the list is empty.
    pub fn take<T>(&mut self, from: &mut Vec<T>) -> T {
        let at = self.below(from.len() as u64) as usize;
        from.swap_remove(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_decides() {
        let numbers = |seed| {
            let mut random = Random::new(seed);
            [random.next_u64(), random.below(10), random.next_bool().into()]
        };
        assert_eq!(numbers(1), numbers(1));
        assert_ne!(numbers(1), numbers(2));
    }
}
