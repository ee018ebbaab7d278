//! Changing a packet, and sending it on without the stack.

use core::mem::MaybeUninit;
use core::ptr;

use aya_ebpf::bindings::{
    BPF_F_INGRESS, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED,
    BPF_FIB_LKUP_RET_SUCCESS, bpf_check_mtu_flags, bpf_check_mtu_ret, bpf_fib_lookup, bpf_redir_neigh,
};
use aya_ebpf::helpers::generated::{bpf_check_mtu, bpf_fib_lookup as fib_lookup, bpf_redirect, bpf_redirect_neigh};
use lb_common::abi::{DropReason, ip_protocol};
use lb_common::logic::packet::Packet;

use crate::packet_ctx::step;
use crate::skb::{MAY_BE_ZERO, Skb};
use crate::volatile;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// The next hop on the way to an address.
pub(crate) struct Hop {
    device: u32,
    neighbour: bpf_redir_neigh,
}

step! {
    /// Looks for the way of a packet that becomes what its entry says, as the kernel would if it came in here like that.
    /// False: it is here.
    ///
    /// # Errors
    /// [`DropReason::NoRoute`]
    pub(crate) fn route(skb, mut ctx) {
        let to = ctx.entry.to();
        let (proto, tos) = (ctx.packet.proto, ctx.packet.tos);
        let mut room = MaybeUninit::<bpf_fib_lookup>::uninit();
        // SAFETY: the kernel's structure is plain data, and all zero bytes is a value of it.
        let params = unsafe { volatile::zero(&mut room) };
        params.ifindex = skb.ifindex();
        params.l4_protocol = proto;
        if let (Some(src), Some(dst)) = (to.src.to_v4(), to.dst.to_v4()) {
            params.family = AF_INET;
            params.__bindgen_anon_2.tos = tos;
            params.__bindgen_anon_3.ipv4_src = src;
            params.__bindgen_anon_4.ipv4_dst = dst;
        } else {
            params.family = AF_INET6;
            params.__bindgen_anon_3.ipv6_src = to.src.to_quarters();
            params.__bindgen_anon_4.ipv6_dst = to.dst.to_quarters();
        }
        let len = size_of::<bpf_fib_lookup>() as i32;
        // SAFETY: the parameters are as long as is said.
        let result = unsafe { fib_lookup(skb.as_ptr().cast(), &raw mut *params, len, 0) };
        if result == i64::from(BPF_FIB_LKUP_RET_NOT_FWDED) {
            return Ok(false);
        }
        // Whether the packet is too long is asked later, of the segments that it may have to become.
        let known = result == i64::from(BPF_FIB_LKUP_RET_SUCCESS)
            || result == i64::from(BPF_FIB_LKUP_RET_NO_NEIGH)
            || result == i64::from(BPF_FIB_LKUP_RET_FRAG_NEEDED);
        if !known {
            return Err(DropReason::NoRoute);
        }
        ctx.hop.device = params.ifindex;
        ctx.hop.neighbour.nh_family = params.family.into();
        // SAFETY: the destination is now that of the next hop, of the family that the parameters say; an IPv4 address is
        // the first of four words.
        ctx.hop.neighbour.__bindgen_anon_1.ipv6_nh = unsafe { params.__bindgen_anon_4.ipv6_dst };
        Ok(true)
    }
}

impl Hop {
    /// Index of the device that it is beyond.
    #[inline(always)]
    pub(crate) const fn device(&self) -> u32 {
        self.device
    }

    /// Whether the packet goes through as it is. What it becomes has the same length.
    ///
    /// # Errors
    /// [`DropReason::TooBig`]; `mtu` is then the number of bytes, from the IP header on, that would.
    #[inline(always)]
    pub(crate) fn fits(&self, skb: Skb, mtu: &mut u32) -> Result<(), DropReason> {
        *mtu = 0;
        // SAFETY: the place for the answer is as long as the helper's type.
        let result = unsafe {
            let flags = u64::from(bpf_check_mtu_flags::BPF_MTU_CHK_SEGS);
            bpf_check_mtu(skb.as_ptr().cast(), self.device, ptr::from_mut(mtu), 0, flags)
        };
        if result == i64::from(bpf_check_mtu_ret::BPF_MTU_CHK_RET_SUCCESS) {
            Ok(())
        } else {
            Err(DropReason::TooBig)
        }
    }

    /// Sends the packet there; the verdict.
    #[inline(always)]
    pub(crate) fn send(&mut self) -> i32 {
        let len = size_of::<bpf_redir_neigh>() as i32;
        // SAFETY: the parameters are as long as is said.
        unsafe { bpf_redirect_neigh(self.device, &raw mut self.neighbour, len, 0) as i32 }
    }
}

/// Has the device that a packet came by receive it once more; the verdict.
#[inline(always)]
pub(crate) fn receive_again(skb: Skb) -> i32 {
    // SAFETY: the helper takes two numbers.
    unsafe { bpf_redirect(skb.ifindex(), u64::from(BPF_F_INGRESS)) as i32 }
}

step! {
    /// Gives a packet the addresses and ports of its entry, and counts a hop.
    ///
    /// # Errors
    /// [`DropReason::RewriteFailed`]; the packet is then of no use.
    pub(crate) fn rewrite(skb, ctx) {
        let Packet { proto, ttl, .. } = ctx.packet;
        let hop = ctx.entry.is_hop();
        let new = ctx.entry.to();
        let old = ctx.is();
        let (addresses, ports) = (old.addresses_to(&new), old.ports_to(&new));
        let is_v4 = ctx.packet.is_v4();
        let (ip, transport) = (ctx.ip(), ctx.transport());
        let (checksum, flags) = if proto == ip_protocol::UDP {
            (transport + 6, MAY_BE_ZERO)
        } else {
            (transport + 16, 0)
        };
        if let (Some(src), Some(dst)) = (new.src.to_v4(), new.dst.to_v4()) {
            skb.store(ip + 12, &[src, dst])?;
            let mut header = addresses;
            if hop {
                let less = ttl.wrapping_sub(1);
                skb.store(ip + 8, &less)?;
                let word = |ttl: u8| u32::from(u16::from_ne_bytes([ttl, proto]));
                header = header.sub(word(ttl)).add(word(less));
            }
            skb.replace_l3(ip + 10, header)?;
        } else {
            skb.store(ip + 8, &[new.src.0, new.dst.0])?;
            if hop {
                skb.store(ip + 7, &ttl.wrapping_sub(1))?;
            }
        }
        skb.replace_l4_addresses(checksum, addresses, is_v4, flags)?;
        skb.replace_l4(checksum, ports, flags)?;
        skb.store(transport, &new.ports())?;
        Ok(true)
    }
}
