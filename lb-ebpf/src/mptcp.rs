//! MPTCP sockets: the connect hook runs with the first subflow, every other hook with the socket itself, and their cookies
//! differ. Both hooks can obtain the address of the socket in the kernel, which is the key of its record.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::bpf_skc_to_mptcp_sock;
use aya_ebpf::programs::{SockAddrContext, SockContext};
use lb_common::abi::ip_protocol;

use crate::family::protocol;
use crate::volatile::read_once;

/// IPPROTO_MPTCP.
const MPTCP: u32 = 262;

/// Returns, in connect, the key of the MPTCP socket that this socket is a subflow of.
#[inline(always)]
pub(crate) fn key_in_connect(ctx: &SockAddrContext) -> Option<u64> {
    if protocol(ctx) != u32::from(ip_protocol::TCP) {
        return None;
    }
    // SAFETY: the verifier checks loads from the context.
    let sk = unsafe { read_once!((*ctx.sock_addr).__bindgen_anon_1.sk) };
    // SAFETY: the socket is that of the context.
    let mptcp = unsafe { bpf_skc_to_mptcp_sock(sk.cast()) };
    (!mptcp.is_null()).then_some(mptcp as u64)
}

/// Returns, in getpeername, the key of the socket if it is an MPTCP socket.
#[inline(always)]
pub(crate) fn key_in_getpeername(ctx: &SockAddrContext) -> Option<u64> {
    // SAFETY: the verifier checks loads from the context.
    let sk = unsafe { read_once!((*ctx.sock_addr).__bindgen_anon_1.sk) };
    (protocol(ctx) == MPTCP).then_some(sk as u64)
}

/// Returns, in release, the key of the socket if it is an MPTCP socket. The context of this hook is the socket.
#[inline(always)]
pub(crate) fn key_in_release(ctx: &SockContext) -> Option<u64> {
    // SAFETY: the verifier checks loads from the context.
    let protocol = unsafe { read_once!((*ctx.sock).protocol) };
    (protocol == MPTCP).then_some(ctx.as_ptr() as u64)
}
