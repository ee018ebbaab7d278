//! Hooks on sockets: release.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::helpers::generated::bpf_get_socket_cookie;
use aya_ebpf::macros::cgroup_sock;
use aya_ebpf::programs::SockContext;

use crate::sockets;

/// A socket is closed: its record goes.
#[cgroup_sock(sock_release)]
pub(crate) fn lb_sock_release(ctx: SockContext) -> i32 {
    // SAFETY: the context is that of the running program.
    sockets::forget(unsafe { bpf_get_socket_cookie(ctx.as_ptr()) });
    1
}
