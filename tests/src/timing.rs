//! Timeouts and repetition counts that adapt to a slow machine, and polling.

use std::env;
use std::sync::LazyLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;

/// Environment variable with the number of times that this machine is slower than others, for example because it is
/// emulated.
const VARIABLE: &str = "LB_SLOW";

/// Highest factor for timeouts: longer ones would hide a hang.
const MAX_TIMEOUT_FACTOR: u32 = 5;

static SLOW: LazyLock<u32> = LazyLock::new(|| factor(env::var(VARIABLE).ok().as_deref()));

/// Parses the value of the variable.
fn factor(value: Option<&str>) -> u32 {
    let Some(value) = value else { return 1 };
    match value.parse() {
        Ok(slow) if slow > 0 => slow,
        _ => panic!("{VARIABLE} must be a number from 1, not {value:?}"),
    }
}

/// Returns the factor of timeouts on a machine that is `slow` times slower, as `LB_SLOW` sets it.
#[must_use]
pub fn timeout_factor(slow: u32) -> u32 {
    slow.min(MAX_TIMEOUT_FACTOR)
}

/// Returns the number of repetitions for this machine: `count`, divided by `LB_SLOW` if that is set. A reduced number is
/// printed to standard output. Use it only for counts that are large in order to find rare failures.
///
/// # Panics
/// If `LB_SLOW` is not a number from 1.
///
/// ```
/// assert_eq!(lb_tests::scaled_count(100_000), 100_000);
/// ```
#[must_use]
pub fn scaled_count(count: u64) -> u64 {
    scaled_count_above(count, 1)
}

/// Returns the number of repetitions for this machine like [`scaled_count`], but at least `least`: the number of samples
/// that the statistic of the test needs.
///
/// # Panics
/// If `LB_SLOW` is not a number from 1.
#[must_use]
pub fn scaled_count_above(count: u64, least: u64) -> u64 {
    let few = fewer(count, least, *SLOW);
    if few < count {
        println!("{few} repetitions of {count} ({VARIABLE}={})", *SLOW);
    }
    few
}

fn fewer(count: u64, least: u64, slow: u32) -> u64 {
    (count / u64::from(slow)).max(least).min(count)
}

/// Returns the timeout for this machine: `time`, multiplied by [`timeout_factor`] if `LB_SLOW` is set.
///
/// # Panics
/// If `LB_SLOW` is not a number from 1.
#[must_use]
pub fn scaled_timeout(time: Duration) -> Duration {
    time * timeout_factor(*SLOW)
}

/// Waits before the next poll, after one that began at `start`. The pause is twice as long as the poll took, because a
/// poll starts a program, and the polled process needs the processor.
pub fn pause_between_polls(start: Instant) {
    sleep((start.elapsed() * 2).max(Duration::from_millis(10)));
}

/// Waits up to 20 seconds until `check` succeeds, for work that controllers and agents do asynchronously.
///
/// # Errors
/// If it does not succeed in time: the last error of `check`.
pub fn eventually<T>(what: &str, check: impl FnMut() -> Result<T>) -> Result<T> {
    eventually_within(Duration::from_secs(20), what, check)
}

/// Waits up to `limit` until `check` succeeds.
///
/// # Errors
/// If it does not succeed in time: the last error of `check`.
pub fn eventually_within<T>(limit: Duration, what: &str, mut check: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + scaled_timeout(limit);
    loop {
        match check() {
            Ok(value) => return Ok(value),
            Err(last) if Instant::now() >= deadline => return Err(last.context(format!("not in time: {what}"))),
            Err(_) => sleep(Duration::from_millis(20)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeout_factor_is_limited() {
        assert_eq!([factor(None), factor(Some("1")), factor(Some("20"))], [1, 1, 20]);
        assert_eq!([1, 3, 20].map(timeout_factor), [1, 3, 5]);
    }

    #[test]
    fn repetitions_shrink_to_the_minimum() {
        assert_eq!(fewer(1000, 1, 1), 1000);
        assert_eq!(fewer(1000, 1, 20), 50);
        assert_eq!(fewer(1000, 80, 20), 80);
        assert_eq!([fewer(7, 1, 20), fewer(7, 10, 20)], [1, 7]);
    }

    #[test]
    #[should_panic(expected = "LB_SLOW must be a number from 1")]
    fn zero_is_refused() {
        factor(Some("0"));
    }
}
