//! Hooks on socket addresses: connect, sendmsg, recvmsg and getpeername, for both families.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns, bpf_set_retval};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::abi::{DropReason, EventKind, Frontend, ServiceIndex, ip_protocol};
use lb_common::logic::decide::{self, SocketFrontend};
use lb_common::logic::frontend::Destination;
use lb_common::logic::log::Hook;
use lb_common::logic::selection;

use crate::backend::{Client, SelectedBackend, ServiceSet};
use crate::count::{self, Counters};
use crate::family::{Family, V4, V6, destination, set_destination};
use crate::log;
use crate::map_tables::MapTables;
use crate::maps::node_only;
use crate::mptcp;
use crate::sockets::{self, Connected, Record};
use crate::trace::{self, TraceEvent};
use crate::udp_dests::UdpDests;

/// Verdicts of `cgroup_sock_addr` programs.
const DENY: i32 = 0;
const ALLOW: i32 = 1;

/// A call that a hook refuses.
struct Refusal {
    to: Destination,
    /// Service index; zero if no service was found.
    service: ServiceIndex,
    reason: DropReason,
}

/// `connect()` with an IPv4 destination: replaces a frontend by one of its backends.
#[cgroup_sock_addr(connect4)]
pub(crate) fn lb_connect4(ctx: SockAddrContext) -> i32 {
    connect::<V4>(&ctx, Hook::Connect4)
}

/// `connect()` with an IPv6 destination, including v4-mapped ones: replaces a frontend by one of its backends.
#[cgroup_sock_addr(connect6)]
pub(crate) fn lb_connect6(ctx: SockAddrContext) -> i32 {
    connect::<V6>(&ctx, Hook::Connect6)
}

/// `sendmsg()` with an IPv4 destination: replaces a frontend by the socket's backend for it.
#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn lb_sendmsg4(ctx: SockAddrContext) -> i32 {
    let hook = Hook::Sendmsg4;
    verdict(&ctx, Some(hook), try_send::<V4>(&ctx, hook))
}

/// `sendmsg()` with an IPv6 destination: replaces a frontend by the socket's backend for it.
#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn lb_sendmsg6(ctx: SockAddrContext) -> i32 {
    let hook = Hook::Sendmsg6;
    verdict(&ctx, Some(hook), try_send::<V6>(&ctx, hook))
}

/// `recvmsg()` of an IPv4 socket: replaces the source of a backend's datagram by the frontend of the request.
#[cgroup_sock_addr(recvmsg4)]
pub(crate) fn lb_recvmsg4(ctx: SockAddrContext) -> i32 {
    translate_source::<V4>(&ctx, Hook::Recvmsg4);
    ALLOW
}

/// `recvmsg()` of an IPv6 socket, also for datagrams over IPv4: replaces the source of a backend's datagram by the frontend.
#[cgroup_sock_addr(recvmsg6)]
pub(crate) fn lb_recvmsg6(ctx: SockAddrContext) -> i32 {
    translate_source::<V6>(&ctx, Hook::Recvmsg6);
    ALLOW
}

/// `getpeername()` of an IPv4 socket: replaces the backend by the frontend that the process connected to.
#[cgroup_sock_addr(getpeername4)]
pub(crate) fn lb_getpeername4(ctx: SockAddrContext) -> i32 {
    translate_peer::<V4>(&ctx);
    ALLOW
}

/// `getpeername()` of an IPv6 socket: replaces the backend by the frontend that the process connected to.
#[cgroup_sock_addr(getpeername6)]
pub(crate) fn lb_getpeername6(ctx: SockAddrContext) -> i32 {
    translate_peer::<V6>(&ctx);
    ALLOW
}

/// Runs the hook of `connect()`, in a copy with log lines or in one without. The verifier follows the copy without them by
/// default, and processes fewer instructions there than in one copy that checks the level at each line.
#[inline(always)]
fn connect<F: Family>(ctx: &SockAddrContext, hook: Hook) -> i32 {
    if log::is_on() {
        verdict(ctx, Some(hook), try_connect::<F>(ctx, Some(hook)))
    } else {
        verdict(ctx, None, try_connect::<F>(ctx, None))
    }
}

/// Returns the frontend of a destination, or `None` if it has none.
#[inline(always)]
fn find_frontend(tables: &MapTables, to: Destination) -> Result<Option<Frontend>, Refusal> {
    let refusal = |reason| Refusal {
        to,
        service: ServiceIndex::NONE,
        reason,
    };
    match decide::socket_frontend(tables, node_only(), to).map_err(refusal)? {
        SocketFrontend::Found(frontend) => Ok(Some(frontend)),
        SocketFrontend::None | SocketFrontend::OtherNamespace => Ok(None),
    }
}

/// Returns the service and set of a frontend, or `None` if this hook does not translate its destination.
#[inline(always)]
fn find_service_set(tables: &MapTables, to: Destination, frontend: Frontend) -> Result<Option<ServiceSet>, Refusal> {
    let service = frontend.service;
    let admission = decide::admit_socket(tables, frontend).map_err(|reason| Refusal { to, service, reason })?;
    Ok(admission.map(|admission| ServiceSet::new(service, admission)))
}

/// Removes the record of a socket that connects to something else than a service: a UDP socket may have been connected to a service
/// before.
#[inline(always)]
fn forget(ctx: &SockAddrContext, to: Destination) {
    if to.proto == ip_protocol::UDP {
        sockets::remove(cookie(ctx));
    }
}

/// Selects a backend for a connecting socket, stores the record of the socket, and replaces the destination.
#[inline(always)]
fn try_connect<F: Family>(ctx: &SockAddrContext, log: Option<Hook>) -> Result<(), Refusal> {
    let to = destination::<F>(ctx);
    let maps = MapTables { ctx: ctx.as_ptr() };
    let Some(frontend) = find_frontend(&maps, to)? else {
        forget(ctx, to);
        return Ok(());
    };
    let (cookie, service) = (cookie(ctx), frontend.service);
    let refusal = |reason| Refusal { to, service, reason };
    // These two and the slot of the backend are probably not cached. None of the three depends on another, so the processor waits for
    // all at once. Neither of the two is ever missing, but the verifier does not know that.
    let place = sockets::Place::prefetch(cookie).ok_or(refusal(DropReason::SocketsFull))?;
    let counters = Counters::prefetch(service).ok_or(refusal(DropReason::BadServiceIndex))?;
    // SAFETY: the helper has no arguments.
    let time = unsafe { bpf_ktime_get_coarse_ns() };
    let random = selection::number_of_socket(cookie, time);
    let netns = maps.netns();
    let selected = if let Some(selected) = SelectedBackend::of_frontend(frontend, random) {
        selected
    } else {
        let Some(service_set) = find_service_set(&maps, to, frontend)? else {
            forget(ctx, to);
            return Ok(());
        };
        service_set.select(random, || Client::netns(netns)).map_err(refusal)?
    };
    let new = Connected {
        cookie,
        netns,
        time,
        original: to,
        backend: selected,
        service,
    };
    let inserted = match mptcp::key_in_connect(ctx) {
        None => place.insert(&new),
        Some(key) => sockets::insert_by_key(key, &new),
    };
    if let Err(reason) = inserted {
        if to.proto == ip_protocol::UDP {
            return Err(refusal(DropReason::UdpSocketsFull));
        }
        count::dropped(reason);
    }
    if !set_destination::<F>(ctx, selected.addr, selected.port) {
        return Err(refusal(DropReason::BadFamily));
    }
    if let Some(hook) = log {
        log::socket_translated(hook, to, selected.addr, selected.port);
    }
    counters.connected();
    trace::socket_event(
        ctx.as_ptr(),
        &TraceEvent::served(EventKind::Connected, to, service, selected),
    );
    Ok(())
}

/// Replaces the destination of a datagram by the backend that the socket has for it, or by a new one.
#[inline(always)]
fn try_send<F: Family>(ctx: &SockAddrContext, hook: Hook) -> Result<(), Refusal> {
    let to = destination::<F>(ctx);
    let maps = MapTables { ctx: ctx.as_ptr() };
    let Some(frontend) = find_frontend(&maps, to)? else {
        return Ok(());
    };
    let service = frontend.service;
    let Some(service_set) = find_service_set(&maps, to, frontend)? else {
        return Ok(());
    };
    let refusal = |reason| Refusal { to, service, reason };
    let selected = match connected_backend(&service_set, cookie(ctx), to) {
        Some(selected) => selected,
        None => select_for_unconnected(&maps, &service_set, cookie(ctx), to, service).map_err(refusal)?,
    };
    if !set_destination::<F>(ctx, selected.addr, selected.port) {
        return Err(refusal(DropReason::BadFamily));
    }
    log::socket_translated(hook, to, selected.addr, selected.port);
    trace::socket_event(
        ctx.as_ptr(),
        &TraceEvent::served(EventKind::Sent, to, service, selected),
    );
    Ok(())
}

/// Returns the backend of a socket that is connected to this destination. The socket would not receive the replies of
/// another backend.
#[inline(always)]
fn connected_backend(service_set: &ServiceSet, cookie: u64, to: Destination) -> Option<SelectedBackend> {
    service_set.reusable_backend(Record::find(cookie)?.backend(to)?)
}

/// Returns the backend that an unconnected socket has for a destination if it is usable. Otherwise selects and stores
/// another one.
#[inline(always)]
fn select_for_unconnected(
    maps: &MapTables,
    service_set: &ServiceSet,
    cookie: u64,
    to: Destination,
    service: ServiceIndex,
) -> Result<SelectedBackend, DropReason> {
    // The coarse clock would give requests within one tick (1 ms or more) the same time, and their order would be lost.
    // SAFETY: the helper has no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let old = UdpDests::find(cookie).and_then(|dests| dests.request(to, now));
    if let Some(old) = old
        && let Some(selected) = service_set.reusable_backend(old.reference)
    {
        return Ok(selected);
    }
    let random = selection::number_of_socket(cookie, now);
    let new = service_set.select(random, || Client::netns(maps.netns()))?;
    let stored = UdpDests::find_or_insert(cookie)?.store(to, old, new, service, maps.netns(), now);
    if stored.evicted {
        count::dropped(DropReason::UdpFlowReplaced);
    }
    count::connected(service);
    Ok(stored.backend)
}

/// Replaces the source of a datagram from a backend by the destination that the socket sent the request to.
#[inline(always)]
fn translate_source<F: Family>(ctx: &SockAddrContext, hook: Hook) {
    let source = destination::<F>(ctx);
    let cookie = cookie(ctx);
    let mut requested = Record::find(cookie).and_then(|record| record.original(source));
    if requested.is_none()
        && let Some(dests) = UdpDests::find(cookie)
    {
        // The clock is read only here: most sockets have no entry, and it costs more than the rest of this function.
        // SAFETY: the helper has no arguments.
        let now = unsafe { bpf_ktime_get_ns() };
        requested = dests.reply(source, now);
        // A request may have been stored in the old entry while the agent copied it.
        if requested.is_none()
            && let Some(old) = UdpDests::find_old(cookie)
        {
            requested = old.reply(source, now);
        }
    }
    if let Some((addr, port)) = requested {
        // Before the change, which costs the verifier fewer instructions than after it.
        log::socket_translated(hook, source, addr, port);
        set_destination::<F>(ctx, addr, port);
    }
}

/// Replaces the peer of a socket, if it is the backend, by the destination that the process connected to.
#[inline(always)]
fn translate_peer<F: Family>(ctx: &SockAddrContext) {
    let record = match mptcp::key_in_getpeername(ctx) {
        None => Record::find(cookie(ctx)),
        Some(key) => Record::find_by_key(key),
    };
    if let Some((addr, port)) = record.and_then(|record| record.original(destination::<F>(ctx))) {
        set_destination::<F>(ctx, addr, port);
    }
}

/// Returns the cookie of the socket.
#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is that of the running program.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// Counts, traces and logs a refusal, and makes the call return its errno.
#[inline(always)]
fn verdict(ctx: &SockAddrContext, log: Option<Hook>, result: Result<(), Refusal>) -> i32 {
    let Err(Refusal { to, service, reason }) = result else {
        return ALLOW;
    };
    count::dropped(reason);
    if let Some(hook) = log {
        log::socket_refused(hook, to, service, reason);
    }
    if !service.is_none() {
        count::refused(service);
    }
    trace::socket_event(ctx.as_ptr(), &TraceEvent::refused(to, service, reason));
    // SAFETY: the helper takes a negative errno; without it the kernel would return EPERM.
    unsafe { bpf_set_retval(-reason.errno().number) };
    DENY
}
