//! Sockets of this node, as the packet path asks for them.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{
    BPF_F_CURRENT_NETNS, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as Tuple4,
    bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as Tuple6,
};
use aya_ebpf::helpers::generated::{bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release};
use lb_common::abi::ip_protocol;

use crate::packet_ctx::step;
use crate::volatile;

step! {
    /// Whether a socket of this node would get the answers to the packet that its entry makes of it, so that the source
    /// port is not free.
    pub(crate) fn hears(skb, ctx) {
        let packet = ctx.entry.to();
        let mut room = MaybeUninit::<bpf_sock_tuple>::uninit();
        // SAFETY: the kernel's structure is plain data, and all zero bytes is a value of it.
        let tuple = unsafe { volatile::zero(&mut room) };
        // Of the answer.
        let (sport, dport) = (packet.dst_port.to_be(), packet.src_port.to_be());
        let len = if let (Some(saddr), Some(daddr)) = (packet.dst.to_v4(), packet.src.to_v4()) {
            tuple.__bindgen_anon_1.ipv4 = Tuple4 {
                saddr,
                daddr,
                sport,
                dport,
            };
            size_of::<Tuple4>()
        } else {
            tuple.__bindgen_anon_1.ipv6 = Tuple6 {
                saddr: packet.dst.to_quarters(),
                daddr: packet.src.to_quarters(),
                sport,
                dport,
            };
            size_of::<Tuple6>()
        };
        let (skb, at, len) = (skb.as_ptr().cast(), &raw mut *tuple, len as u32);
        // SAFETY: the context is that of the running program, and the tuple is as long as is said. What is found is
        // released.
        unsafe {
            let socket = if ctx.packet.proto == ip_protocol::TCP {
                bpf_sk_lookup_tcp(skb, at, len, BPF_F_CURRENT_NETNS as u64, 0)
            } else {
                bpf_sk_lookup_udp(skb, at, len, BPF_F_CURRENT_NETNS as u64, 0)
            };
            if socket.is_null() {
                return Ok(false);
            }
            bpf_sk_release(socket.cast());
        }
        Ok(true)
    }
}
