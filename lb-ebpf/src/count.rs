//! Counters and events.

use core::ffi::c_void;
use core::ptr;

use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid, generated::bpf_get_netns_cookie, generated::bpf_get_socket_cookie,
    generated::bpf_ktime_get_coarse_ns,
};
use lb_common::abi::{DropReason, EventKind, ServiceStats};
use lb_common::logic::route::Destination;
use lb_common::logic::words::Words;

use crate::backend::Choice;
use crate::maps::{CONFIG, DROPS, EVENTS, STATS};
use crate::words;

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

/// Something that whoever traces wants to know.
pub(crate) struct Happening {
    kind: EventKind,
    to: Destination,
    backend_addr: Words,
    backend_port: u16,
    service: u32,
    reason: u32,
}

impl Happening {
    /// A call was given a backend.
    #[inline(always)]
    pub(crate) fn served(kind: EventKind, to: Destination, service: u32, choice: Choice) -> Self {
        Self {
            kind,
            to,
            backend_addr: choice.addr,
            backend_port: choice.port,
            service,
            reason: 0,
        }
    }

    /// A call was refused.
    #[inline(always)]
    pub(crate) fn refused(to: Destination, service: u32, reason: DropReason) -> Self {
        Self {
            kind: EventKind::Refused,
            to,
            backend_addr: Words([0; 2]),
            backend_port: 0,
            service,
            reason: reason as u32,
        }
    }
}

/// Writes an event, if somebody asks for its kind. Costs one load where nobody does.
#[inline(always)]
pub(crate) fn event(ctx: *mut c_void, what: &Happening) {
    let Some(config) = CONFIG.get_ptr(0) else {
        return;
    };
    // SAFETY: a value of CONFIG is as long and as aligned as its type; the agent may store to it at any time.
    let events = unsafe { ptr::read_volatile(&raw const (*config).events) };
    if events & what.kind.bit() == 0 {
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
        words::store(&raw mut (*at).client, Words([0; 2]));
        words::store(&raw mut (*at).addr, what.to.addr);
        words::store(&raw mut (*at).backend_addr, what.backend_addr);
        (&raw mut (*at).port).write(what.to.port);
        (&raw mut (*at).backend_port).write(what.backend_port);
        (&raw mut (*at).proto).write(what.to.proto);
        (&raw mut (*at).kind).write(what.kind as u8);
        (&raw mut (*at).client_port).write(0);
        (&raw mut (*at).service).write(what.service);
        (&raw mut (*at).reason).write(what.reason);
        (&raw mut (*at).pid).write((bpf_get_current_pid_tgid() >> 32) as u32);
        (&raw mut (*at).pad2).write(0);
    }
    entry.submit(0);
}
