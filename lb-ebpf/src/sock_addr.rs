//! Hooks on socket addresses: connect and getpeername.

use core::ptr;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::{
    bpf_get_netns_cookie, bpf_get_prandom_u32, bpf_get_socket_cookie, bpf_ktime_get_coarse_ns, bpf_set_retval,
};
use aya_ebpf::macros::cgroup_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::abi::{DropReason, Frontend, SetWord};
use lb_common::logic::connect::{self, Set};
use lb_common::logic::words::Words;

use crate::maps::{BACKEND_SLOTS, FRONTENDS, SERVICES};
use crate::sockets::Connected;
use crate::words::{Destination, Key};
use crate::{count, sockets, words};

/// Verdicts of `cgroup_sock_addr` programs.
const DENY: i32 = 0;
const ALLOW: i32 = 1;

/// A connection that lb refuses.
struct Refusal {
    to: Destination,
    /// Zero where no service was found.
    service: u32,
    reason: DropReason,
}

/// `connect()` with an IPv4 destination: a frontend is replaced by one of its backends.
#[cgroup_sock_addr(connect4)]
pub(crate) fn lb_connect4(ctx: SockAddrContext) -> i32 {
    match try_connect4(&ctx) {
        Ok(()) => ALLOW,
        Err(refusal) => refuse(&ctx, &refusal),
    }
}

/// `getpeername()` of an IPv4 socket: who asked for a frontend sees the frontend.
#[cgroup_sock_addr(getpeername4)]
pub(crate) fn lb_getpeername4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the context is that of the running program.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    if let Some((addr, port)) = sockets::original(cookie, destination4(&ctx))
        && let Some(addr) = addr.to_v4()
    {
        set_destination4(&ctx, addr, port);
    }
    ALLOW
}

#[inline(always)]
fn try_connect4(ctx: &SockAddrContext) -> Result<(), Refusal> {
    let to = destination4(ctx);
    let mut key = Key::of(to);
    let Some(frontend) = frontend(&key) else {
        key.become_address_mark();
        return match frontend(&key) {
            None => Ok(()),
            Some(_) => Err(Refusal {
                to,
                service: 0,
                reason: DropReason::NoSuchPort,
            }),
        };
    };
    let refusal = |reason| Refusal {
        to,
        service: frontend.service,
        reason,
    };
    let set = connect::set_for_socket(frontend).map_err(refusal)?;
    let set = set_word(frontend.service, set).ok_or(refusal(DropReason::BadServiceIndex))?;
    // SAFETY: the helper takes nothing.
    let random = unsafe { bpf_get_prandom_u32() };
    let slot = connect::slot(set, random).map_err(refusal)?;
    let slot = BACKEND_SLOTS.get(slot).ok_or(refusal(DropReason::BadSlot))?;
    // SAFETY: the reference is to a value of the map, and a published slot is not changed.
    let backend_addr = unsafe { words::load(&raw const slot.addr) };
    let addr = backend_addr.to_v4().ok_or(refusal(DropReason::BadFamily))?;
    set_destination4(ctx, addr, slot.port);
    count::connection(frontend.service, true);
    sockets::remember(&Connected {
        // SAFETY: the context is that of the running program.
        cookie: unsafe { bpf_get_socket_cookie(ctx.as_ptr()) },
        // SAFETY: the context is that of the running program.
        netns: unsafe { bpf_get_netns_cookie(ctx.as_ptr()) },
        // SAFETY: the helper takes nothing.
        time: unsafe { bpf_ktime_get_coarse_ns() },
        original: to,
        backend_addr,
        backend_port: slot.port,
        backend: slot.backend,
        generation: slot.generation,
        service: frontend.service,
    });
    Ok(())
}

/// Counts and tells a refusal, and makes `connect()` return its errno.
#[inline(always)]
fn refuse(ctx: &SockAddrContext, refusal: &Refusal) -> i32 {
    count::dropped(refusal.reason);
    if refusal.service != 0 {
        count::connection(refusal.service, false);
    }
    count::refused(ctx.as_ptr(), refusal.to, refusal.service, refusal.reason);
    // SAFETY: the helper takes a negative errno; without it the kernel would return EPERM.
    unsafe { bpf_set_retval(-connect::errno(refusal.reason)) };
    DENY
}

/// The frontend with a key, read by one load.
#[inline(always)]
fn frontend(key: &Key) -> Option<Frontend> {
    let value = FRONTENDS.get_ptr(key.as_key())?;
    // SAFETY: the pointer is to a value of the map, 8 bytes and aligned so; `lb_frontend_swap` may store to it.
    Some(Frontend::from_word(unsafe { ptr::read_volatile(value.cast::<u64>()) }))
}

/// One set word of a service, read by one load: base and length always belong together.
#[inline(always)]
fn set_word(service: u32, set: Set) -> Option<SetWord> {
    let service = SERVICES.get_ptr(service)?;
    let word = match set {
        // SAFETY: the pointer is to a value of the map.
        Set::Internal => unsafe { &raw const (*service).internal },
        // SAFETY: the pointer is to a value of the map.
        Set::External => unsafe { &raw const (*service).external },
        // SAFETY: the pointer is to a value of the map.
        Set::Cluster => unsafe { &raw const (*service).cluster },
    };
    // SAFETY: a set word is 8 bytes and aligned so; the agent may store to it at any time.
    Some(SetWord::from_word(unsafe { ptr::read_volatile(word.cast::<u64>()) }))
}

/// The IPv4 destination (or peer) that the context holds.
#[inline(always)]
fn destination4(ctx: &SockAddrContext) -> Destination {
    let at = ctx.sock_addr;
    // SAFETY: the verifier checks loads from the context; they must be of the whole field.
    let addr = unsafe { ptr::read_volatile(&raw const (*at).user_ip4) };
    // SAFETY: as above.
    let port = unsafe { ptr::read_volatile(&raw const (*at).user_port) };
    // SAFETY: as above.
    let proto = unsafe { ptr::read_volatile(&raw const (*at).protocol) };
    Destination {
        addr: Words::from_v4(addr),
        port: u16::from_be(port as u16),
        proto: proto as u8,
    }
}

/// Replaces the IPv4 destination (or peer) that the context holds; `addr` in network order, `port` in host order.
#[inline(always)]
fn set_destination4(ctx: &SockAddrContext, addr: u32, port: u16) {
    let at = ctx.sock_addr;
    // SAFETY: the verifier checks stores to the context; they must be of the whole field.
    unsafe { ptr::write_volatile(&raw mut (*at).user_ip4, addr) };
    // SAFETY: as above.
    unsafe { ptr::write_volatile(&raw mut (*at).user_port, u32::from(port.to_be())) };
}
