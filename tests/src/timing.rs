//! Fewer repetitions and more patience on a slow machine.

use std::env;
use std::sync::LazyLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::Result;

/// The variable that says how many times slower than others this machine is, as a virtual one may be.
const VARIABLE: &str = "LB_SLOW";

/// Waiting longer than this many times would hide a hang.
const MOST_PATIENCE: u32 = 5;

static SLOW: LazyLock<u32> = LazyLock::new(|| factor(env::var(VARIABLE).ok().as_deref()));

/// What a value of the variable means.
fn factor(value: Option<&str>) -> u32 {
    let Some(value) = value else { return 1 };
    match value.parse() {
        Ok(slow) if slow > 0 => slow,
        _ => panic!("{VARIABLE} is a number from 1, not {value:?}"),
    }
}

/// How many times longer than elsewhere tests wait on a machine that `LB_SLOW` calls `slow` times slower.
#[must_use]
pub fn timeout_factor(slow: u32) -> u32 {
    slow.min(MOST_PATIENCE)
}

/// How many repetitions of `count` this machine shall make: all, or on one that `LB_SLOW` calls so many times slower,
/// fewer by that factor; which is told on standard output. Only for numbers that are large to find what is rare.
///
/// # Panics
/// When `LB_SLOW` is not a number from 1.
///
/// ```
/// assert_eq!(lb_tests::scaled(100_000), 100_000);
/// ```
#[must_use]
pub fn scaled_count(count: u64) -> u64 {
    scaled_count_above(count, 1)
}

/// The same, but not fewer than `least`: what the statistic needs that is made of them.
///
/// # Panics
/// As [`scaled_count`].
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

/// How long to wait for what takes `time` at most on this machine, unless `LB_SLOW` calls it slow.
///
/// # Panics
/// As [`scaled_count`].
#[must_use]
pub fn scaled_timeout(time: Duration) -> Duration {
    time * timeout_factor(*SLOW)
}

/// Waits before a question is asked again that was asked at `asked`: twice as long as the answer took, since to ask is
/// to start a program, and whoever is asked about needs the processor.
pub fn pause_between_polls(asked: Instant) {
    sleep((asked.elapsed() * 2).max(Duration::from_millis(10)));
}

/// Waits until `check` succeeds, for what controllers and agents do in their own time.
///
/// # Errors
/// When it does not, with its last words.
pub fn eventually<T>(what: &str, check: impl FnMut() -> Result<T>) -> Result<T> {
    eventually_within(Duration::from_secs(20), what, check)
}

/// The same with another limit.
///
/// # Errors
/// When it does not, with its last words.
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
    fn factors() {
        assert_eq!([factor(None), factor(Some("1")), factor(Some("20"))], [1, 1, 20]);
        assert_eq!([1, 3, 20].map(timeout_factor), [1, 3, 5]);
    }

    #[test]
    fn repetitions() {
        assert_eq!(fewer(1000, 1, 1), 1000);
        assert_eq!(fewer(1000, 1, 20), 50);
        assert_eq!(fewer(1000, 80, 20), 80);
        assert_eq!([fewer(7, 1, 20), fewer(7, 10, 20)], [1, 7]);
    }

    #[test]
    #[should_panic(expected = "LB_SLOW is a number from 1")]
    fn no_time_at_all() {
        factor(Some("0"));
    }
}
