//! Session affinity: expiry of entries.

use super::idle::{self, SECOND};

/// Returns whether an entry that was last used at `used` is valid at `now`, both in nanoseconds. `timeout`: in seconds.
#[inline(always)]
#[must_use]
pub const fn holds(used: u64, now: u64, timeout: u32) -> bool {
    !idle::is_over(used, now, timeout as u64 * SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holds_until_the_timeout() {
        assert!(holds(5 * SECOND, 5 * SECOND, 1));
        assert!(holds(5 * SECOND, 6 * SECOND - 1, 1));
        assert!(!holds(5 * SECOND, 6 * SECOND, 1));
        // The coarse clock of another CPU may be behind.
        assert!(holds(6 * SECOND, 5 * SECOND, 1));
        assert!(holds(0, 86_399 * SECOND, 86_400));
    }
}
