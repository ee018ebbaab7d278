//! The clock that the programs take time stamps from, and the clock of a thread.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

/// Returns CLOCK_MONOTONIC in nanoseconds, as `bpf_ktime_get_ns` does. (The call fails on no Linux kernel.)
pub(crate) fn monotonic_ns() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| {
        now.tv_sec().unsigned_abs() * 1_000_000_000 + now.tv_nsec().unsigned_abs()
    })
}

/// Returns the processor time that the calling thread has used. (The call fails on no Linux kernel.)
pub(crate) fn thread_cpu_time() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map_or(Duration::ZERO, Into::into)
}
