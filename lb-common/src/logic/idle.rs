//! How long something was not used, by clocks of several CPUs: one may be ahead of another, and what was used by it is in
//! the future. All in nanoseconds.

/// A second.
pub const SECOND: u64 = 1_000_000_000;

/// Whether what was last used at `used` is idle at `now` for as long as it may be.
#[inline(always)]
#[must_use]
pub const fn is_over(used: u64, now: u64, timeout: u64) -> bool {
    now.saturating_sub(used) >= timeout
}

/// Whether the time of last use is to be written: at most once a second, so that many packets or connections do not fight
/// for a cache line.
#[inline(always)]
#[must_use]
pub const fn is_to_refresh(used: u64, now: u64) -> bool {
    is_over(used, now, SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_over_when_it_was_idle_for_its_time() {
        assert!(!is_over(5, 14, 10));
        assert!(is_over(5, 15, 10));
        assert!(!is_over(20, 15, 10), "by the clock of another CPU it is in the future");
    }

    #[test]
    fn refreshes_once_a_second() {
        assert!(!is_to_refresh(5, 6));
        assert!(is_to_refresh(5, SECOND + 5));
        assert!(!is_to_refresh(6, 5));
    }
}
