//! Trace events: records of EVENTS, written only while CONFIG requests their kind.

use core::ffi::c_void;

use aya_ebpf::helpers::{
    bpf_get_current_pid_tgid, generated::bpf_get_netns_cookie, generated::bpf_get_socket_cookie,
    generated::bpf_ktime_get_coarse_ns,
};
use lb_common::abi::{DropReason, EventKind, ServiceIndex};
use lb_common::logic::frontend::Destination;
use lb_common::logic::ip128::Ip128;
use lb_common::logic::packet::Packet;

use crate::backend::SelectedBackend;
use crate::count;
use crate::maps::{CONFIG, EVENTS};
use crate::volatile::{self, read_once};

/// A trace event before it is written to EVENTS.
pub(crate) struct TraceEvent {
    kind: EventKind,
    to: Destination,
    backend_addr: Ip128,
    backend_port: u16,
    service: ServiceIndex,
    reason: u32,
}

impl TraceEvent {
    /// Returns the event of a call or packet that got a backend.
    #[inline(always)]
    pub(crate) fn served(kind: EventKind, to: Destination, service: ServiceIndex, choice: SelectedBackend) -> Self {
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
    pub(crate) fn refused(to: Destination, service: ServiceIndex, reason: DropReason) -> Self {
        Self::not_served(EventKind::Refused, to, service, reason)
    }

    /// Returns the event of a rejected packet.
    #[inline(always)]
    pub(crate) fn rejected(to: Destination, service: ServiceIndex, reason: DropReason) -> Self {
        Self::not_served(EventKind::Rejected, to, service, reason)
    }

    #[inline(always)]
    fn not_served(kind: EventKind, to: Destination, service: ServiceIndex, reason: DropReason) -> Self {
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

/// Writes an event of a socket if its kind is enabled. If it is not, the cost is one load.
#[inline(always)]
pub(crate) fn socket_event(ctx: *mut c_void, event: &TraceEvent) {
    if !is_enabled(event.kind) {
        return;
    }
    // SAFETY: `ctx` is the context of the running program.
    let origin = unsafe {
        EventOrigin {
            cookie: bpf_get_socket_cookie(ctx),
            netns: bpf_get_netns_cookie(ctx),
            pid: (bpf_get_current_pid_tgid() >> 32) as u32,
            client: (Ip128([0; 2]), 0),
        }
    };
    write(&origin, event);
}

/// Writes an event of a packet if its kind is enabled.
#[inline(always)]
pub(crate) fn packet_event(packet: &Packet, event: &TraceEvent) {
    if !is_enabled(event.kind) {
        return;
    }
    let origin = EventOrigin {
        cookie: 0,
        netns: 0,
        pid: 0,
        client: (packet.src, packet.src_port),
    };
    write(&origin, event);
}

/// The socket, process or client of a trace event; zero for values that do not apply.
struct EventOrigin {
    cookie: u64,
    netns: u64,
    pid: u32,
    client: (Ip128, u16),
}

/// Returns whether CONFIG requests events of a kind.
#[inline(always)]
fn is_enabled(kind: EventKind) -> bool {
    CONFIG.get_ptr(0).is_some_and(|config| {
        // SAFETY: the pointer is to a value of the map, which has the size and alignment of its type; the agent may
        // store to it at any time.
        let events = unsafe { read_once!((*config).events) };
        events & kind.bit() != 0
    })
}

/// Writes an event to EVENTS. An event for which the buffer has no room is counted as [`DropReason::EventLost`].
#[inline(always)]
fn write(origin: &EventOrigin, event: &TraceEvent) {
    let Some(mut entry) = EVENTS.reserve(0) else {
        return count::dropped(DropReason::EventLost);
    };
    let at = entry.as_mut_ptr();
    // SAFETY: the entry is reserved for one event, and no reader gets it before `submit`.
    unsafe {
        (&raw mut (*at).time).write(bpf_ktime_get_coarse_ns());
        (&raw mut (*at).cookie).write(origin.cookie);
        (&raw mut (*at).netns).write(origin.netns);
        volatile::store_addr(&raw mut (*at).client, origin.client.0);
        volatile::store_addr(&raw mut (*at).addr, event.to.addr);
        volatile::store_addr(&raw mut (*at).backend_addr, event.backend_addr);
        (&raw mut (*at).port).write(event.to.port);
        (&raw mut (*at).backend_port).write(event.backend_port);
        (&raw mut (*at).proto).write(event.to.proto);
        (&raw mut (*at).kind).write(event.kind as u8);
        (&raw mut (*at).client_port).write(origin.client.1);
        (&raw mut (*at).service).write(event.service);
        (&raw mut (*at).reason).write(event.reason);
        (&raw mut (*at).pid).write(origin.pid);
        (&raw mut (*at).pad).write(0);
    }
    entry.submit(0);
}
