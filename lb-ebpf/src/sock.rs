//! Hooks on sockets: bind and release.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::{bpf_get_socket_cookie, bpf_set_retval};
use aya_ebpf::macros::cgroup_sock;
use aya_ebpf::programs::SockContext;
use lb_common::abi::{DropReason, ip_protocol};
use lb_common::logic::frontend::{self, Destination, Tables as _};
use lb_common::logic::ip128::Ip128;

use crate::map_tables::MapTables;
use crate::volatile::read_once;
use crate::{count, mptcp, sockets, udp_dests};

/// Verdicts of `cgroup_sock` programs.
const DENY: i32 = 0;
const ALLOW: i32 = 1;

/// `bind()` of an IPv4 socket: refuses node ports in the node's network namespace.
#[cgroup_sock(post_bind4)]
pub(crate) fn lb_post_bind4(ctx: SockContext) -> i32 {
    // SAFETY: the verifier checks loads from the context.
    let addr = unsafe { read_once!((*ctx.sock).src_ip4) };
    post_bind(&ctx, Ip128::from_v4(addr))
}

/// `bind()` of an IPv6 socket, also to a v4-mapped address: refuses node ports in the node's network namespace.
#[cgroup_sock(post_bind6)]
pub(crate) fn lb_post_bind6(ctx: SockContext) -> i32 {
    let word = |i: usize| {
        // SAFETY: the verifier checks loads from the context.
        unsafe { read_once!((*ctx.sock).src_ip6[i]) }
    };
    post_bind(&ctx, Ip128::from_quarters([word(0), word(1), word(2), word(3)]))
}

#[inline(always)]
fn post_bind(ctx: &SockContext, addr: Ip128) -> i32 {
    // SAFETY: the verifier checks loads from the context.
    let (port, proto) = unsafe { (read_once!((*ctx.sock).src_port), read_once!((*ctx.sock).protocol)) };
    let maps = MapTables { ctx: ctx.as_ptr() };
    let to = Destination {
        addr,
        port: port as u16,
        proto: proto as u8,
    };
    if !maps.is_on_node() || !frontend::binds_node_port(&maps, to) {
        return ALLOW;
    }
    let reason = DropReason::NodePortTaken;
    count::dropped(reason);
    // SAFETY: the helper takes a negative errno; without it the kernel would return EPERM.
    unsafe { bpf_set_retval(-reason.errno().number) };
    DENY
}

/// Release of a closed socket: deletes its record and its UDP destinations.
#[cgroup_sock(sock_release)]
pub(crate) fn lb_sock_release(ctx: SockContext) -> i32 {
    if let Some(key) = mptcp::key_in_release(&ctx) {
        sockets::remove_by_key(key);
        return ALLOW;
    }
    // SAFETY: the context is that of the running program.
    let cookie = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    sockets::remove(cookie);
    // SAFETY: the verifier checks loads from the context.
    let protocol = unsafe { read_once!((*ctx.sock).protocol) };
    if protocol == u32::from(ip_protocol::UDP) {
        udp_dests::remove(cookie);
    }
    ALLOW
}
