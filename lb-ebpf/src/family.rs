//! The difference between the hooks of IPv4 and IPv6: the fields of the context that hold the address.

use aya_ebpf::bindings::bpf_sock_addr;
use aya_ebpf::programs::SockAddrContext;
use lb_common::logic::frontend::Destination;
use lb_common::logic::ip128::Ip128;

use crate::volatile::{read_once, write_once};

/// The address fields of a hook's context.
///
/// The verifier accepts only loads and stores of whole fields, and of the halves of IPv6 addresses. Volatile accesses
/// keep the compiler from splitting or merging them.
pub(crate) trait Family {
    /// Returns the address in the context: the destination, or after the call the peer or source.
    fn address(at: *const bpf_sock_addr) -> Ip128;

    /// Replaces the address. Returns false, and changes nothing, if the address is of another family.
    fn set_address(at: *mut bpf_sock_addr, addr: Ip128) -> bool;
}

/// Hooks that see an IPv4 address.
pub(crate) struct V4;

impl Family for V4 {
    #[inline(always)]
    fn address(at: *const bpf_sock_addr) -> Ip128 {
        // SAFETY: the verifier checks loads from the context.
        Ip128::from_v4(unsafe { read_once!((*at).user_ip4) })
    }

    #[inline(always)]
    fn set_address(at: *mut bpf_sock_addr, addr: Ip128) -> bool {
        let Some(addr) = addr.to_v4() else { return false };
        // SAFETY: the verifier checks stores to the context.
        unsafe { write_once!((*at).user_ip4, addr) };
        true
    }
}

/// Hooks that see an IPv6 address, or a v4-mapped IPv4 address, which is the form of addresses in maps.
pub(crate) struct V6;

impl Family for V6 {
    #[inline(always)]
    fn address(at: *const bpf_sock_addr) -> Ip128 {
        // SAFETY: the verifier checks loads from the context.
        unsafe {
            let at = (&raw const (*at).user_ip6).cast::<u64>();
            Ip128([at.read_volatile(), at.add(1).read_volatile()])
        }
    }

    #[inline(always)]
    fn set_address(at: *mut bpf_sock_addr, Ip128([first, last]): Ip128) -> bool {
        // SAFETY: the verifier checks stores to the context.
        unsafe {
            let at = (&raw mut (*at).user_ip6).cast::<u64>();
            at.write_volatile(first);
            at.add(1).write_volatile(last);
        }
        true
    }
}

/// Returns the destination, peer or source in the context.
#[inline(always)]
pub(crate) fn destination<F: Family>(ctx: &SockAddrContext) -> Destination {
    let at = ctx.sock_addr;
    // SAFETY: the verifier checks loads from the context.
    let port = unsafe { read_once!((*at).user_port) };
    Destination {
        addr: F::address(at),
        port: u16::from_be(port as u16),
        proto: protocol(ctx) as u8,
    }
}

/// Replaces address and port (host byte order) in the context. Returns false if the address is of another family.
#[inline(always)]
pub(crate) fn set_destination<F: Family>(ctx: &SockAddrContext, addr: Ip128, port: u16) -> bool {
    let at = ctx.sock_addr;
    if !F::set_address(at, addr) {
        return false;
    }
    // SAFETY: the verifier checks stores to the context.
    unsafe { write_once!((*at).user_port, u32::from(port.to_be())) };
    true
}

/// Returns the socket's protocol, which is more than 8 bits wide for MPTCP.
#[inline(always)]
pub(crate) fn protocol(ctx: &SockAddrContext) -> u32 {
    // SAFETY: the verifier checks loads from the context.
    unsafe { read_once!((*ctx.sock_addr).protocol) }
}
