//! Hooks on socket addresses: connect, sendmsg, recvmsg and getpeername, for both families.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_ktime_get_coarse_ns, bpf_ktime_get_ns, bpf_set_retval};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::abi::{DropReason, EventKind, ip_protocol};
use lb_common::logic::decide::{self, SocketFrontend};
use lb_common::logic::log::Hook;
use lb_common::logic::route::Destination;

use crate::backend::{Choice, Client, Serving};
use crate::count;
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
    service: u32,
    reason: DropReason,
}

/// `connect()` with an IPv4 destination: replaces a frontend by one of its backends.
#[cgroup_sock_addr(connect4)]
pub(crate) fn lb_connect4(ctx: SockAddrContext) -> i32 {
    let hook = Hook::Connect4;
    verdict(&ctx, hook, try_connect::<V4>(&ctx, hook))
}

/// `connect()` with an IPv6 destination, including v4-mapped ones: replaces a frontend by one of its backends.
#[cgroup_sock_addr(connect6)]
pub(crate) fn lb_connect6(ctx: SockAddrContext) -> i32 {
    let hook = Hook::Connect6;
    verdict(&ctx, hook, try_connect::<V6>(&ctx, hook))
}

/// `sendmsg()` with an IPv4 destination.
#[cgroup_sock_addr(sendmsg4)]
pub(crate) fn lb_sendmsg4(ctx: SockAddrContext) -> i32 {
    let hook = Hook::Sendmsg4;
    verdict(&ctx, hook, try_send::<V4>(&ctx, hook))
}

/// `sendmsg()` with an IPv6 destination.
#[cgroup_sock_addr(sendmsg6)]
pub(crate) fn lb_sendmsg6(ctx: SockAddrContext) -> i32 {
    let hook = Hook::Sendmsg6;
    verdict(&ctx, hook, try_send::<V6>(&ctx, hook))
}

/// `recvmsg()` of an IPv4 socket: replaces the source of a backend's datagram by the frontend of the request.
#[cgroup_sock_addr(recvmsg4)]
pub(crate) fn lb_recvmsg4(ctx: SockAddrContext) -> i32 {
    received::<V4>(&ctx, Hook::Recvmsg4);
    ALLOW
}

/// `recvmsg()` of an IPv6 socket, also for datagrams over IPv4: replaces the source of a backend's datagram by the frontend.
#[cgroup_sock_addr(recvmsg6)]
pub(crate) fn lb_recvmsg6(ctx: SockAddrContext) -> i32 {
    received::<V6>(&ctx, Hook::Recvmsg6);
    ALLOW
}

/// `getpeername()` of an IPv4 socket: replaces the backend by the frontend that the process connected to.
#[cgroup_sock_addr(getpeername4)]
pub(crate) fn lb_getpeername4(ctx: SockAddrContext) -> i32 {
    peer_name::<V4>(&ctx, Hook::Getpeername4);
    ALLOW
}

/// `getpeername()` of an IPv6 socket: replaces the backend by the frontend that the process connected to.
#[cgroup_sock_addr(getpeername6)]
pub(crate) fn lb_getpeername6(ctx: SockAddrContext) -> i32 {
    peer_name::<V6>(&ctx, Hook::Getpeername6);
    ALLOW
}

/// Returns the service index and set of a destination, or `None` if this hook does not translate it.
#[inline(always)]
fn serving(tables: &MapTables, to: Destination) -> Result<Option<(u32, Serving)>, Refusal> {
    let refusal = |service, reason| Refusal { to, service, reason };
    let frontend = match decide::socket_frontend(tables, node_only(), to).map_err(|reason| refusal(0, reason))? {
        SocketFrontend::Found(frontend) => frontend,
        SocketFrontend::None | SocketFrontend::OtherNamespace => return Ok(None),
    };
    let service = frontend.service;
    let admission = decide::admit_socket(tables, frontend).map_err(|reason| refusal(service, reason))?;
    Ok(admission.map(|admission| (service, Serving::new(service, admission))))
}

#[inline(always)]
fn try_connect<F: Family>(ctx: &SockAddrContext, hook: Hook) -> Result<(), Refusal> {
    let to = destination::<F>(ctx);
    let maps = MapTables { ctx: ctx.as_ptr() };
    let Some((service, serving)) = serving(&maps, to)? else {
        if to.proto == ip_protocol::UDP {
            // The socket may have been connected to a service before.
            sockets::forget(cookie(ctx));
        }
        return Ok(());
    };
    let refusal = |reason| Refusal { to, service, reason };
    let choice = serving.choose(|| Client::netns(maps.netns())).map_err(refusal)?;
    let new = Connected {
        cookie: cookie(ctx),
        netns: maps.netns(),
        // SAFETY: the helper has no arguments.
        time: unsafe { bpf_ktime_get_coarse_ns() },
        original: to,
        choice,
        service,
    };
    let remembered = match mptcp::of_subflow(ctx) {
        None => sockets::remember(&new),
        Some(key) => sockets::remember_as(key, &new),
    };
    if let Err(reason) = remembered {
        if to.proto == ip_protocol::UDP {
            return Err(refusal(DropReason::UdpSocketsFull));
        }
        count::dropped(reason);
    }
    if !set_destination::<F>(ctx, choice.addr, choice.port) {
        return Err(refusal(DropReason::BadFamily));
    }
    log::socket_translated(hook, to, choice.addr, choice.port);
    count::connected(service);
    trace::socket_event(
        ctx.as_ptr(),
        &TraceEvent::served(EventKind::Connected, to, service, choice),
    );
    Ok(())
}

#[inline(always)]
fn try_send<F: Family>(ctx: &SockAddrContext, hook: Hook) -> Result<(), Refusal> {
    let to = destination::<F>(ctx);
    let maps = MapTables { ctx: ctx.as_ptr() };
    let Some((service, serving)) = serving(&maps, to)? else {
        return Ok(());
    };
    let refusal = |reason| Refusal { to, service, reason };
    let choice = match connected_again(&serving, cookie(ctx), to) {
        Some(choice) => choice,
        None => choose_for_flow(&maps, &serving, cookie(ctx), to, service).map_err(refusal)?,
    };
    if !set_destination::<F>(ctx, choice.addr, choice.port) {
        return Err(refusal(DropReason::BadFamily));
    }
    log::socket_translated(hook, to, choice.addr, choice.port);
    trace::socket_event(ctx.as_ptr(), &TraceEvent::served(EventKind::Sent, to, service, choice));
    Ok(())
}

/// Returns the backend of a socket that is connected to this destination. The socket would not receive the replies of
/// another backend.
#[inline(always)]
fn connected_again(serving: &Serving, cookie: u64, to: Destination) -> Option<Choice> {
    serving.reusable_backend(Record::of(cookie)?.backend(to)?)
}

/// Returns the backend that an unconnected socket has for a destination if it is usable. Otherwise chooses and stores
/// another one.
#[inline(always)]
fn choose_for_flow(
    maps: &MapTables,
    serving: &Serving,
    cookie: u64,
    to: Destination,
    service: u32,
) -> Result<Choice, DropReason> {
    // The coarse clock would give requests within one tick (1 ms or more) the same time, and their order would be lost.
    // SAFETY: the helper has no arguments.
    let now = unsafe { bpf_ktime_get_ns() };
    let old = UdpDests::of(cookie).and_then(|flows| flows.ask(to, now));
    if let Some(old) = old
        && let Some(choice) = serving.reusable_backend(old.id)
    {
        return Ok(choice);
    }
    let new = serving.choose(|| Client::netns(maps.netns()))?;
    let claimed = UdpDests::of_or_new(cookie)?.claim(to, old, new, service, maps.netns(), now);
    if claimed.replaced {
        count::dropped(DropReason::UdpFlowReplaced);
    }
    count::connected(service);
    Ok(claimed.choice)
}

#[inline(always)]
fn received<F: Family>(ctx: &SockAddrContext, hook: Hook) {
    let source = destination::<F>(ctx);
    let cookie = cookie(ctx);
    let mut asked = Record::of(cookie).and_then(|record| record.original(source));
    if asked.is_none()
        && let Some(flows) = UdpDests::of(cookie)
    {
        // The clock is read only here: most sockets have no entry, and it costs more than the rest of this function.
        // SAFETY: the helper has no arguments.
        let now = unsafe { bpf_ktime_get_ns() };
        asked = flows.answer(source, now);
    }
    if let Some((addr, port)) = asked {
        set_destination::<F>(ctx, addr, port);
        log::socket_translated(hook, source, addr, port);
    }
}

#[inline(always)]
fn peer_name<F: Family>(ctx: &SockAddrContext, hook: Hook) {
    let record = match mptcp::of_peer(ctx) {
        None => Record::of(cookie(ctx)),
        Some(key) => Record::keyed(key),
    };
    let peer = destination::<F>(ctx);
    if let Some((addr, port)) = record.and_then(|record| record.original(peer)) {
        set_destination::<F>(ctx, addr, port);
        log::socket_translated(hook, peer, addr, port);
    }
}

#[inline(always)]
fn cookie(ctx: &SockAddrContext) -> u64 {
    // SAFETY: the context is that of the running program.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}

/// Counts, traces and logs a refusal, and makes the call return its errno.
#[inline(always)]
fn verdict(ctx: &SockAddrContext, hook: Hook, result: Result<(), Refusal>) -> i32 {
    let Err(Refusal { to, service, reason }) = result else {
        return ALLOW;
    };
    count::dropped(reason);
    if service != 0 {
        count::refused(service);
    }
    trace::socket_event(ctx.as_ptr(), &TraceEvent::refused(to, service, reason));
    log::socket_refused(hook, to, service, reason);
    // SAFETY: the helper takes a negative errno; without it the kernel would return EPERM.
    unsafe { bpf_set_retval(-reason.errno().number) };
    DENY
}
