//! Counters: DROPS by reason, and STATS by service index.

use lb_common::abi::{DropReason, FIRST_DROP, ServiceIndex, ServiceStats, moving};

use crate::maps::{DROPS, MOVE, STATS, STATS_OLD, inserts_into_new, is_moving};
use crate::volatile::{read_once, write_once};

/// Increments the counter of a reason.
#[inline(always)]
pub(crate) fn dropped(reason: DropReason) {
    if let Some(count) = DROPS.get_ptr_mut(reason as u32) {
        // SAFETY: the pointer is to this CPU's value of the map, and a program does not migrate while it runs.
        unsafe { *count += 1 }
    }
}

/// Increments the number of connections that were translated to a backend of a service, by service index.
#[inline(always)]
pub(crate) fn connected(service: ServiceIndex) {
    if let Some(counters) = Counters::find(service) {
        counters.connected();
    }
}

/// The counters of a service on this CPU.
pub(crate) struct Counters(*mut ServiceStats);

impl Counters {
    /// Returns the counters of a service index; `None` if it is out of range.
    #[inline(always)]
    fn find(service: ServiceIndex) -> Option<Self> {
        stats(service.get()).map(Self)
    }

    /// Returns the counters of a service index, and loads them into the cache. If it is out of range, returns those of index zero,
    /// which no service has.
    #[inline(always)]
    pub(crate) fn prefetch(service: ServiceIndex) -> Option<Self> {
        let counters = Self::find(service).or_else(|| Self::find(ServiceIndex::NONE))?;
        // SAFETY: the pointer is to this CPU's value of the map, and the field is aligned.
        let _ = unsafe { read_once!((*counters.0).connections) };
        Some(counters)
    }

    /// Increments the number of connections that were translated to a backend.
    #[inline(always)]
    pub(crate) fn connected(&self) {
        // SAFETY: the pointer is to this CPU's value of the map, and a program does not migrate while it runs.
        unsafe { (*self.0).connections += 1 }
    }
}

/// Increments the number of refused connections of a service, by service index.
#[inline(always)]
pub(crate) fn refused(service: ServiceIndex) {
    if let Some(stats) = stats(service.get()) {
        // SAFETY: the pointer is to this CPU's value of the map, and a program does not migrate while it runs.
        unsafe { (*stats).refused += 1 }
    }
}

/// Returns the counters of a service index on this CPU.
#[inline(always)]
fn stats(service: u32) -> Option<*mut ServiceStats> {
    if is_moving(moving::STATS) && !inserts_into_new() {
        return STATS_OLD.get_ptr_mut(service);
    }
    STATS.get_ptr_mut(service)
}

/// Adds the sum of the old counters of a service index to the new ones, unless [`lb_common::abi::Move::counted`] shows that it was added.
/// Returns false if the index is out of range.
#[inline(never)]
pub(crate) fn add_old(service: u32, connections: u64, refused: u64) -> bool {
    let Some(stats) = STATS.get_ptr_mut(service) else {
        return false;
    };
    if begins(service) {
        // SAFETY: the pointer is to this CPU's value of the map.
        unsafe {
            (*stats).connections += connections;
            (*stats).refused += refused;
        }
    }
    true
}

/// Adds the old counter of a drop reason, by its number, to the new one, unless [`lb_common::abi::Move::counted`] shows that it was added.
/// Returns false if the number is out of range.
#[inline(never)]
pub(crate) fn add_old_drops(reason: u32, count: u64) -> bool {
    let Some(drops) = DROPS.get_ptr_mut(reason) else {
        return false;
    };
    if begins(FIRST_DROP.saturating_add(reason)) {
        // SAFETY: the pointer is to this CPU's value of the map.
        unsafe { *drops += count }
    }
    true
}

/// Returns whether the counter with a number of [`lb_common::abi::Move::counted`] was not added before, and marks it as added.
#[inline(always)]
fn begins(counter: u32) -> bool {
    let Some(state) = MOVE.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: the pointer is to a value of the map, and the field is aligned. Only the agent with the lock of the pin path runs this
    // program.
    unsafe {
        let is_first = counter >= read_once!((*state).counted);
        if is_first {
            write_once!((*state).counted, counter + 1);
        }
        is_first
    }
}
