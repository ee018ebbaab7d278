//! Idle time by the clocks of several CPUs, in nanoseconds. One clock may be ahead of another, so the time of last use can
//! be in the future.

/// Nanoseconds of a second.
pub const SECOND: u64 = 1_000_000_000;

/// Returns whether an entry that was last used at `used` has been idle for `timeout` at `now`.
#[inline(always)]
#[must_use]
pub const fn is_over(used: u64, now: u64, timeout: u64) -> bool {
    now.saturating_sub(used) >= timeout
}

/// Returns whether the time of last use has to be written: at most once a second, so that the CPUs of many packets or
/// connections do not contend for a cache line.
#[inline(always)]
#[must_use]
pub const fn needs_refresh(used: u64, now: u64) -> bool {
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
        assert!(!needs_refresh(5, 6));
        assert!(needs_refresh(5, SECOND + 5));
        assert!(!needs_refresh(6, 5));
    }
}
