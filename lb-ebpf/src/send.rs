//! Route lookup of the translated packet, and its translation.

use core::mem::{MaybeUninit, offset_of};

use aya_ebpf::bindings::{
    BPF_F_INGRESS, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED,
    BPF_FIB_LKUP_RET_SUCCESS, bpf_fib_lookup,
};
use aya_ebpf::helpers::generated::{bpf_fib_lookup as fib_lookup, bpf_redirect};
use lb_common::abi::{DropReason, ip_protocol};
use lb_common::logic::packet::Packet;
use network_types::ip::{Ipv4Hdr, Ipv6Hdr};
use network_types::tcp::TcpHdr;
use network_types::udp::UdpHdr;

use crate::packet_ctx::{CtxRef, outcome, steps};
use crate::skb::{MAY_BE_ZERO, Skb};
use crate::volatile;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

outcome! {
    /// The route of a translated packet.
    pub(crate) enum Route {
        /// The destination is an address of this node, or the kernel does not forward.
        ThisNode,
        /// The packet goes to [`crate::packet_ctx::PacketCtx::next_hop`].
        NextHop,
    }
}

steps! {
    pub(crate) fn route(skb, ctx) -> Route;
    pub(crate) fn rewrite(skb, ctx) -> ();
}

/// Step: looks up the route of the translated packet, as the kernel does for a packet that arrives at this device.
///
/// # Errors
/// Returns [`DropReason::NoRoute`] if the lookup fails.
#[inline(always)]
fn route(skb: Skb, mut ctx: CtxRef) -> Result<Route, DropReason> {
    let translated = ctx.entry.translated();
    let (proto, tos) = (ctx.packet.proto, ctx.packet.tos);
    let mut room = MaybeUninit::<bpf_fib_lookup>::uninit();
    // SAFETY: the kernel's structure has integers only, for which zero bytes are valid.
    let params = unsafe { volatile::zeroed(&mut room) };
    params.ifindex = skb.ifindex();
    params.l4_protocol = proto;
    if let (Some(src), Some(dst)) = (translated.src.to_v4(), translated.dst.to_v4()) {
        params.family = AF_INET;
        params.__bindgen_anon_2.tos = tos;
        params.__bindgen_anon_3.ipv4_src = src;
        params.__bindgen_anon_4.ipv4_dst = dst;
    } else {
        params.family = AF_INET6;
        params.__bindgen_anon_3.ipv6_src = translated.src.to_quarters();
        params.__bindgen_anon_4.ipv6_dst = translated.dst.to_quarters();
    }
    let len = size_of::<bpf_fib_lookup>() as i32;
    // SAFETY: the context is that of the running program, and `len` is the size of the parameters.
    let result = unsafe { fib_lookup(skb.as_ptr().cast(), &raw mut *params, len, 0) };
    if result == i64::from(BPF_FIB_LKUP_RET_NOT_FWDED) {
        return Ok(Route::ThisNode);
    }
    // The length of the packet is checked later, for the segments that it may be split into.
    let known = result == i64::from(BPF_FIB_LKUP_RET_SUCCESS)
        || result == i64::from(BPF_FIB_LKUP_RET_NO_NEIGH)
        || result == i64::from(BPF_FIB_LKUP_RET_FRAG_NEEDED);
    if !known {
        return Err(DropReason::NoRoute);
    }
    ctx.next_hop.device = params.ifindex;
    ctx.next_hop.neighbour.nh_family = params.family.into();
    // SAFETY: the helper has stored the address of the next hop here, of the family in the parameters. An IPv4 address is
    // the first of the four words, all of which are initialized.
    ctx.next_hop.neighbour.__bindgen_anon_1.ipv6_nh = unsafe { params.__bindgen_anon_4.ipv6_dst };
    Ok(Route::NextHop)
}

/// Makes the device of the hook receive the packet again, and returns the verdict.
#[inline(always)]
pub(crate) fn receive_again(skb: Skb) -> i32 {
    // SAFETY: the helper has two integer arguments.
    unsafe { bpf_redirect(skb.ifindex(), u64::from(BPF_F_INGRESS)) as i32 }
}

/// Step: gives a packet the addresses and ports of its entry, and decrements its time to live if the entry requires that.
///
/// # Errors
/// Returns [`DropReason::RewriteFailed`]. The packet may then be changed in part, and must be dropped.
#[inline(always)]
fn rewrite(skb: Skb, ctx: CtxRef) -> Result<(), DropReason> {
    let Packet { proto, ttl, .. } = ctx.packet;
    let decrements_ttl = ctx.entry.decrements_ttl();
    let new = ctx.entry.translated();
    let old = ctx.tuple();
    let (addresses, ports) = (old.addresses_to(&new), old.ports_to(&new));
    let is_v4 = ctx.packet.is_v4();
    let (ip, transport) = (ctx.ip_offset(), ctx.transport_offset());
    let (checksum, flags) = if proto == ip_protocol::UDP {
        (transport + offset_of!(UdpHdr, check), MAY_BE_ZERO)
    } else {
        (transport + offset_of!(TcpHdr, check), 0)
    };
    if let (Some(src), Some(dst)) = (new.src.to_v4(), new.dst.to_v4()) {
        skb.store(ip + offset_of!(Ipv4Hdr, src_addr), &[src, dst])?;
        let mut header = addresses;
        if decrements_ttl {
            let less = ttl.wrapping_sub(1);
            skb.store(ip + offset_of!(Ipv4Hdr, ttl), &less)?;
            let word = |ttl: u8| u32::from(u16::from_ne_bytes([ttl, proto]));
            header = header.sub(word(ttl)).add(word(less));
        }
        skb.l3_csum_replace(ip + offset_of!(Ipv4Hdr, check), header)?;
    } else {
        skb.store(ip + offset_of!(Ipv6Hdr, src_addr), &[new.src.0, new.dst.0])?;
        if decrements_ttl {
            skb.store(ip + offset_of!(Ipv6Hdr, hop_limit), &ttl.wrapping_sub(1))?;
        }
    }
    skb.l4_csum_replace_addrs(checksum, addresses, is_v4, flags)?;
    skb.l4_csum_replace(checksum, ports, flags)?;
    skb.store(transport, &new.ports())
}
