//! Pseudo-random choices that a seed reproduces.

use crate::monotonic_ns;

/// A generator of pseudo-random numbers (SplitMix64), for the choices of a test.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// Creates a generator. Two generators with the same seed yield the same numbers.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Creates a generator with the seed of the environment variable `LB_SEED`, or else of the clock, and prints the seed.
    ///
    /// # Panics
    /// If `LB_SEED` is not a number.
    #[must_use]
    pub fn from_env() -> Self {
        let seed = match std::env::var("LB_SEED") {
            Ok(text) => text.parse().expect("LB_SEED is a number"),
            Err(_) => monotonic_ns(),
        };
        println!("set LB_SEED={seed} to repeat these choices");
        Self::new(seed)
    }

    /// Returns any number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Returns a number in `0..end`.
    ///
    /// # Panics
    /// If `end` is zero.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next_u64() % end
    }

    /// Returns true in half of all cases.
    pub fn next_bool(&mut self) -> bool {
        self.below(2) == 1
    }

    /// Removes any element from a list and returns it.
    ///
    /// # Panics
    /// If the list is empty.
    pub fn take<T>(&mut self, from: &mut Vec<T>) -> T {
        let at = self.below(from.len() as u64) as usize;
        from.swap_remove(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_seeds_yield_equal_numbers() {
        let numbers = |seed| {
            let mut random = Random::new(seed);
            [random.next_u64(), random.below(10), random.next_bool().into()]
        };
        assert_eq!(numbers(1), numbers(1));
        assert_ne!(numbers(1), numbers(2));
    }
}
