//! Counters and events.

use core::ffi::c_void;

use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid, generated::bpf_get_netns_cookie, generated::bpf_get_socket_cookie,
    generated::bpf_ktime_get_coarse_ns,
};
use lb_common::abi::{DropReason, EventKind, ServiceStats};
use lb_common::logic::ip128::Ip128;
use lb_common::logic::packet::Packet;
use lb_common::logic::route::Destination;

use crate::backend::Choice;
use crate::maps::{CONFIG, DROPS, EVENTS, STATS};
use crate::volatile::{self, read_once};

/// Increments the counter of a reason.
#[inline(always)]
pub(crate) fn dropped(reason: DropReason) {
    if let Some(count) = DROPS.get_ptr_mut(reason as u32) {
        // SAFETY: the pointer is to this CPU's value of the map, and a program does not migrate while it runs.
        unsafe { *count += 1 }
    }
}

/// Increments the counter of a service's connections, or of its refusals if not `connected`.
#[inline(always)]
pub(crate) fn connection(service: u32, connected: bool) {
    if let Some(stats) = STATS.get_ptr_mut(service) {
        // SAFETY: the pointer is to this CPU's value of the map, and a program does not migrate while it runs.
        let ServiceStats { connections, refused } = unsafe { &mut *stats };
        if connected {
            *connections += 1;
        } else {
            *refused += 1;
        }
    }
}

/// A trace event before it is written to EVENTS.
pub(crate) struct TraceEvent {
    kind: EventKind,
    to: Destination,
    backend_addr: Ip128,
    backend_port: u16,
    service: u32,
    reason: u32,
}

impl TraceEvent {
    /// Returns the event of a call or packet that got a backend.
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

    /// Returns the event of a refused call.
    #[inline(always)]
    pub(crate) fn refused(to: Destination, service: u32, reason: DropReason) -> Self {
        Self::not_served(EventKind::Refused, to, service, reason)
    }

    /// Returns the event of a rejected packet.
    #[inline(always)]
    pub(crate) fn rejected(to: Destination, service: u32, reason: DropReason) -> Self {
        Self::not_served(EventKind::Rejected, to, service, reason)
    }

    #[inline(always)]
    fn not_served(kind: EventKind, to: Destination, service: u32, reason: DropReason) -> Self {
        Self {
            kind,
            to,
            backend_addr: Ip128([0; 2]),
            backend_port: 0,
            service,
            reason: reason as u32,
        }
    }
}

/// Writes an event of a socket if its kind is enabled. Otherwise the cost is one load.
#[inline(always)]
pub(crate) fn event(ctx: *mut c_void, what: &TraceEvent) {
    if !is_asked_for(what.kind) {
        return;
    }
    // SAFETY: `ctx` is the context of the running program.
    let whose = unsafe {
        Whose {
            cookie: bpf_get_socket_cookie(ctx),
            netns: bpf_get_netns_cookie(ctx),
            pid: (bpf_get_current_pid_tgid() >> 32) as u32,
            client: (Ip128([0; 2]), 0),
        }
    };
    write(&whose, what);
}

/// Writes an event of a packet if its kind is enabled.
#[inline(always)]
pub(crate) fn packet_event(packet: &Packet, what: &TraceEvent) {
    if !is_asked_for(what.kind) {
        return;
    }
    let whose = Whose {
        cookie: 0,
        netns: 0,
        pid: 0,
        client: (packet.src, packet.src_port),
    };
    write(&whose, what);
}

/// The socket, process or client of a trace event; zero for values that do not apply.
struct Whose {
    cookie: u64,
    netns: u64,
    pid: u32,
    client: (Ip128, u16),
}

#[inline(always)]
fn is_asked_for(kind: EventKind) -> bool {
    CONFIG.get_ptr(0).is_some_and(|config| {
        // SAFETY: the pointer is to a value of the map, which has the size and alignment of its type; the agent may
        // store to it at any time.
        let events = unsafe { read_once!((*config).events) };
        events & kind.bit() != 0
    })
}

#[inline(always)]
fn write(whose: &Whose, what: &TraceEvent) {
    let Some(mut entry) = EVENTS.reserve(0) else {
        return dropped(DropReason::EventLost);
    };
    let at = entry.as_mut_ptr();
    // SAFETY: the entry is reserved for one event, and no reader gets it before `submit`.
    unsafe {
        (&raw mut (*at).time).write(bpf_ktime_get_coarse_ns());
        (&raw mut (*at).cookie).write(whose.cookie);
        (&raw mut (*at).netns).write(whose.netns);
        volatile::store_addr(&raw mut (*at).client, whose.client.0);
        volatile::store_addr(&raw mut (*at).addr, what.to.addr);
        volatile::store_addr(&raw mut (*at).backend_addr, what.backend_addr);
        (&raw mut (*at).port).write(what.to.port);
        (&raw mut (*at).backend_port).write(what.backend_port);
        (&raw mut (*at).proto).write(what.to.proto);
        (&raw mut (*at).kind).write(what.kind as u8);
        (&raw mut (*at).client_port).write(whose.client.1);
        (&raw mut (*at).service).write(what.service);
        (&raw mut (*at).reason).write(what.reason);
        (&raw mut (*at).pid).write(whose.pid);
        (&raw mut (*at).pad).write(0);
    }
    entry.submit(0);
}
