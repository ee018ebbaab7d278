//! Counters and events.

use core::ptr;

use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid, generated::bpf_get_netns_cookie, generated::bpf_get_socket_cookie,
    generated::bpf_ktime_get_coarse_ns,
};
use lb_common::abi::{DropReason, ServiceStats, event_mask};

use crate::maps::{CONFIG, DROPS, EVENTS, STATS};
use crate::words::{self, Destination};

/// Counts one more of a reason.
#[inline(always)]
pub(crate) fn dropped(reason: DropReason) {
    if let Some(count) = DROPS.get_ptr_mut(reason as u32) {
        // SAFETY: the slot is this CPU's own, and programs do not migrate while they run.
        unsafe { *count += 1 }
    }
}

/// Counts for a service: `connected` or refused.
#[inline(always)]
pub(crate) fn connection(service: u32, connected: bool) {
    if let Some(stats) = STATS.get_ptr_mut(service) {
        // SAFETY: the slot is this CPU's own, and programs do not migrate while they run.
        let ServiceStats { connections, refused } = unsafe { &mut *stats };
        if connected {
            *connections += 1;
        } else {
            *refused += 1;
        }
    }
}

/// Tells the agent of a refused connection, if it wants to know.
#[inline(always)]
pub(crate) fn refused(ctx: *mut core::ffi::c_void, to: Destination, service: u32, reason: DropReason) {
    let Some(config) = CONFIG.get_ptr(0) else {
        return;
    };
    // SAFETY: a value of CONFIG is as long and as aligned as its type; the agent may store to it at any time.
    let events = unsafe { ptr::read_volatile(&raw const (*config).events) };
    if events & event_mask::REFUSED == 0 {
        return;
    }
    let Some(mut entry) = EVENTS.reserve(0) else {
        return dropped(DropReason::EventLost);
    };
    let at = entry.as_mut_ptr();
    // SAFETY: the entry is reserved for one event, and `ctx` is the context of the running program.
    unsafe {
        (&raw mut (*at).time).write(bpf_ktime_get_coarse_ns());
        (&raw mut (*at).cookie).write(bpf_get_socket_cookie(ctx));
        (&raw mut (*at).netns).write(bpf_get_netns_cookie(ctx));
        words::store(&raw mut (*at).addr, to.addr);
        (&raw mut (*at).port).write(to.port);
        (&raw mut (*at).proto).write(to.proto);
        (&raw mut (*at).pad).write(0);
        (&raw mut (*at).service).write(service);
        (&raw mut (*at).reason).write(reason as u32);
        (&raw mut (*at).pid).write((bpf_get_current_pid_tgid() >> 32) as u32);
    }
    entry.submit(0);
}
