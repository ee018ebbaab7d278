//! Changing a packet, and sending it on without the stack.

use core::mem::zeroed;
use core::ptr;

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS,
    bpf_check_mtu_flags, bpf_check_mtu_ret, bpf_fib_lookup, bpf_redir_neigh,
};
use aya_ebpf::helpers::generated::{bpf_check_mtu, bpf_fib_lookup as fib_lookup, bpf_redirect_neigh};
use lb_common::abi::{DropReason, ip_protocol};
use lb_common::logic::packet::Packet;
use lb_common::logic::translation::Tuple;

use crate::conntrack::Entry;
use crate::skb::{MAY_BE_ZERO, Skb};

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;

/// The next hop on the way to an address.
pub(crate) struct Hop {
    device: u32,
    neighbour: bpf_redir_neigh,
}

/// Looks for the way of a packet that becomes `to`, as the kernel would if it came in here like that. False: it is here.
///
/// # Errors
/// [`DropReason::NoRoute`]
#[inline(never)]
pub(crate) fn route(skb: Skb, packet: &Packet, entry: &Entry, hop: &mut Hop) -> Result<bool, DropReason> {
    let to = entry.to();
    // SAFETY: the kernel's structure is plain data, and all zero bytes is a value of it.
    let mut params: bpf_fib_lookup = unsafe { zeroed() };
    params.ifindex = skb.ifindex();
    params.l4_protocol = packet.proto;
    if let (Some(src), Some(dst)) = (to.src.to_v4(), to.dst.to_v4()) {
        params.family = AF_INET;
        params.__bindgen_anon_2.tos = packet.tos;
        params.__bindgen_anon_3.ipv4_src = src;
        params.__bindgen_anon_4.ipv4_dst = dst;
    } else {
        params.family = AF_INET6;
        params.__bindgen_anon_3.ipv6_src = to.src.to_quarters();
        params.__bindgen_anon_4.ipv6_dst = to.dst.to_quarters();
    }
    let len = size_of::<bpf_fib_lookup>() as i32;
    // SAFETY: the parameters are as long as is said.
    let result = unsafe { fib_lookup(skb.as_ptr().cast(), &raw mut params, len, 0) };
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
    hop.device = params.ifindex;
    hop.neighbour.nh_family = params.family.into();
    // SAFETY: the destination is now that of the next hop, of the family that the parameters say; an IPv4 address is the
    // first of four words.
    hop.neighbour.__bindgen_anon_1.ipv6_nh = unsafe { params.__bindgen_anon_4.ipv6_dst };
    Ok(true)
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

/// Gives a packet other addresses and ports. `hop`: it also loses one of its time to live, as on every hop.
///
/// # Errors
/// [`DropReason::RewriteFailed`]; the packet is then of no use.
#[inline(never)]
pub(crate) fn rewrite<const LINK: usize>(
    skb: Skb,
    packet: &Packet,
    entry: &Entry,
    hop: bool,
) -> Result<(), DropReason> {
    let new = entry.to();
    let old = Tuple::of(packet);
    let (addresses, ports) = (old.addresses_to(&new), old.ports_to(&new));
    let is_v4 = packet.is_v4();
    let transport = LINK + packet.ip_len();
    let (checksum, flags) = if packet.proto == ip_protocol::UDP {
        (transport + 6, MAY_BE_ZERO)
    } else {
        (transport + 16, 0)
    };
    if let (Some(src), Some(dst)) = (new.src.to_v4(), new.dst.to_v4()) {
        skb.store(LINK + 12, &[src, dst])?;
        let mut header = addresses;
        if hop {
            let ttl = packet.ttl.wrapping_sub(1);
            skb.store(LINK + 8, &ttl)?;
            let word = |ttl: u8| u32::from(u16::from_ne_bytes([ttl, packet.proto]));
            header = header.sub(word(packet.ttl)).add(word(ttl));
        }
        skb.replace_l3(LINK + 10, header)?;
    } else {
        skb.store(LINK + 8, &[new.src.0, new.dst.0])?;
        if hop {
            skb.store(LINK + 7, &packet.ttl.wrapping_sub(1))?;
        }
    }
    skb.replace_l4_addresses(checksum, addresses, is_v4, flags)?;
    skb.replace_l4(checksum, ports, flags)?;
    skb.store(transport, &new.ports())
}
