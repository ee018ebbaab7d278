//! Counters: DROPS by reason, and STATS by service index.

use lb_common::abi::{DropReason, ServiceIndex};

use crate::maps::{DROPS, STATS};

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
    if let Some(stats) = STATS.get_ptr_mut(service.get()) {
        // SAFETY: the pointer is to this CPU's value of the map, and a program does not migrate while it runs.
        unsafe { (*stats).connections += 1 }
    }
}

/// Increments the number of refused connections of a service, by service index.
#[inline(always)]
pub(crate) fn refused(service: ServiceIndex) {
    if let Some(stats) = STATS.get_ptr_mut(service.get()) {
        // SAFETY: the pointer is to this CPU's value of the map, and a program does not migrate while it runs.
        unsafe { (*stats).refused += 1 }
    }
}
