//! Session affinity: whether what is remembered still holds.

const SECOND: u64 = 1_000_000_000;

/// Whether an entry that was last used at `used` still holds at `now` (both in nanoseconds); `timeout` in seconds.
#[inline(always)]
#[must_use]
pub const fn holds(used: u64, now: u64, timeout: u32) -> bool {
    now.saturating_sub(used) < timeout as u64 * SECOND
}

/// Whether the time of last use is to be written: at most once a second, so that many connections of one client do not
/// fight for a cache line.
#[inline(always)]
#[must_use]
pub const fn is_to_refresh(used: u64, now: u64) -> bool {
    now.saturating_sub(used) >= SECOND
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

    #[test]
    fn refreshes_once_a_second() {
        assert!(!is_to_refresh(5, 6));
        assert!(is_to_refresh(5, SECOND + 5));
        assert!(!is_to_refresh(6, 5));
    }
}
