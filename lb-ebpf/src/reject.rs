//! Responses to rejected packets: TCP RST and ICMP errors.
//!
//! The program turns the packet itself into the response, and sends it back. The kernel may leave the packet's checksum to
//! the device that it leaves by (`CHECKSUM_PARTIAL`: all packets of local sockets, also through veth). The device then
//! stores a checksum at the offset of the original one, over everything from the original transport header on. A program
//! can neither read nor change this state. But in this state, the kernel's helper ignores changes to the part of the
//! checksum that the device will compute: see [`is_partial`].

use core::mem::offset_of;

use aya_ebpf::bindings::{BPF_F_INGRESS, TC_ACT_SHOT, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC};
use aya_ebpf::helpers::generated::{bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail};
use lb_common::abi::{DropReason, RejectWith, ip_protocol};
use lb_common::logic::checksum::Sum;
use lb_common::logic::headers::DONT_FRAGMENT;
use lb_common::logic::ip128::Ip128;
use lb_common::logic::packet::{Bytes as _, ETHERNET, Packet, tcp_flags};
use network_types::eth::EthHdr;
use network_types::icmp::Icmpv4Hdr;
use network_types::ip::{Ipv4Hdr, Ipv6Hdr};
use network_types::tcp::TcpHdr;
use network_types::udp::UdpHdr;

use crate::count;
use crate::packet_ctx::{CtxRef, outcome, steps};
use crate::skb::Skb;

/// Time to live of the responses that lb sends.
const TTL: u8 = 64;

outcome! {
    /// The response to a packet.
    pub(crate) enum Response {
        /// The packet became a response.
        Sent,
        /// The packet must not be responded to.
        None,
    }
}

steps! {
    pub(super) fn reset(skb, ctx) -> Response;
    pub(super) fn icmp(skb, ctx) -> ();
}

/// Length of the header of an ICMP error, in both families.
const ICMP_LEN: usize = size_of::<Icmpv4Hdr>();

/// Returns type and code of an ICMP error for IPv4 (RFC 792, RFC 1191) or IPv6 (RFC 4443), and the word after its checksum.
#[inline(always)]
const fn icmp_header(reject_with: RejectWith, mtu: u32, is_v4: bool) -> ([u8; 2], u32) {
    let (v4, v6, rest) = match reject_with {
        RejectWith::TooBig if is_v4 => ([3, 4], [2, 0], (mtu & 0xffff).to_be()),
        RejectWith::TooBig => ([3, 4], [2, 0], mtu.to_be()),
        RejectWith::TimeExceeded => ([11, 0], [3, 0], 0),
        // Port unreachable. The caller responds to no packet that is passed on or dropped.
        RejectWith::Refused | RejectWith::Pass | RejectWith::Drop => ([3, 3], [1, 4], 0),
    };
    (if is_v4 { v4 } else { v6 }, rest)
}

/// Returns whether the checksum of the packet is left to the device. Changes the checksum if it is not.
#[inline(always)]
fn is_partial(skb: Skb, at: usize) -> Result<bool, DropReason> {
    let before = skb.half(at).ok_or(DropReason::RewriteFailed)?;
    skb.l4_csum_replace(at, Sum::ZERO.add(u32::from(1_u16.to_be())), 0)?;
    let after = skb.half(at).ok_or(DropReason::RewriteFailed)?;
    Ok(before == after)
}

/// Returns the sum of the pseudo-header that the checksums of TCP, UDP and ICMPv6 include (RFC 9293, RFC 8200).
#[inline(always)]
fn pseudo_header(from: Ip128, to: Ip128, proto: u8, len: u16) -> Sum {
    let (Ip128([a, b]), Ip128([c, d])) = (from, to);
    let sum = if let (Some(from), Some(to)) = (from.to_v4(), to.to_v4()) {
        Sum::ZERO.add(from).add(to)
    } else {
        Sum::ZERO.add_u64(a).add_u64(b).add_u64(c).add_u64(d)
    };
    sum.add(u32::from(u16::from(proto).to_be())).add(u32::from(len.to_be()))
}

/// Writes the IP header of a response with a payload of `payload` bytes.
#[inline(always)]
fn write_ip(skb: Skb, ctx: CtxRef, proto: u8, payload: u16) -> Result<(), DropReason> {
    let (from, to) = (ctx.packet.dst, ctx.packet.src);
    if let (Some(from), Some(to)) = (from.to_v4(), to.to_v4()) {
        let len = payload + Ipv4Hdr::LEN as u16;
        let word = |a: u16, b: u16| {
            let ([a, b], [c, d]) = (a.to_be_bytes(), b.to_be_bytes());
            u32::from_ne_bytes([a, b, c, d])
        };
        // A packet that must not be fragmented needs no identification (RFC 6864).
        let mut words = [
            word(0x4500, len),
            word(0, DONT_FRAGMENT),
            word(u16::from_be_bytes([TTL, proto]), 0),
            from,
            to,
        ];
        let sum = words.iter().fold(Sum::ZERO, |sum, word| sum.add(*word));
        words[2] = u32::from_ne_bytes({
            let [a, b] = sum.checksum().to_ne_bytes();
            [TTL, proto, a, b]
        });
        return skb.store(ctx.ip_offset(), &words);
    }
    let [a, b] = payload.to_be_bytes();
    let start = u64::from_ne_bytes([0x60, 0, 0, 0, a, b, proto, TTL]);
    skb.store(ctx.ip_offset(), &[start, from.0[0], from.0[1], to.0[0], to.0[1]])
}

/// Sends the response back to the sender of the packet.
#[inline(always)]
fn send_back(skb: Skb, mut ctx: CtxRef) -> Result<(), DropReason> {
    if ctx.at_egress {
        // The response goes to the socket, as if it had arrived by the device that the packet was about to leave by. Its
        // destination is the address of that device, which is the source of the packet.
        if ctx.ip_offset() == ETHERNET {
            let quarter = |at| skb.word(at).ok_or(DropReason::RewriteFailed);
            let half = |at| skb.half(at).ok_or(DropReason::RewriteFailed);
            let source = offset_of!(EthHdr, src_addr);
            let (first, last) = (half(source)?, quarter(source + 2)?);
            skb.store(0, &first.to_be())?;
            skb.store(2, &last)?;
        }
        // SAFETY: the helper has two integer arguments.
        ctx.verdict = unsafe { bpf_redirect(skb.ifindex(), BPF_F_INGRESS.into()) as i32 };
        return Ok(());
    }
    if ctx.ip_offset() == ETHERNET {
        let half = |at| skb.half(at).map(u16::to_be).ok_or(DropReason::RewriteFailed);
        let (dst, src) = (offset_of!(EthHdr, dst_addr), offset_of!(EthHdr, src_addr));
        let swapped = [
            half(src)?,
            half(src + 2)?,
            half(src + 4)?,
            half(dst)?,
            half(dst + 2)?,
            half(dst + 4)?,
        ];
        skb.store(0, &swapped)?;
    }
    // SAFETY: the helper has two integer arguments.
    ctx.verdict = unsafe { bpf_redirect(skb.ifindex(), 0) as i32 };
    Ok(())
}

/// Sends the response to a rejected packet, and returns the verdict. If the response cannot be built, the packet is
/// dropped without one.
#[inline(always)]
pub(crate) fn respond(skb: Skb, mut ctx: CtxRef, reject_with: RejectWith) -> i32 {
    ctx.reject_with = reject_with;
    let result = if ctx.packet.is_tcp() && reject_with == RejectWith::Refused {
        step::reset(skb, ctx)
    } else {
        step::icmp(skb, ctx).map(|()| Response::Sent)
    };
    match result {
        Ok(Response::Sent) => ctx.verdict,
        Ok(Response::None) => TC_ACT_SHOT,
        Err(reason) => {
            count::dropped(reason);
            TC_ACT_SHOT
        }
    }
}

/// Step: turns a TCP segment into an RST (RFC 9293, 3.5.2). An RST gets no response.
#[inline(always)]
fn reset(skb: Skb, ctx: CtxRef) -> Result<Response, DropReason> {
    let Packet {
        flags,
        transport_len,
        dst,
        src,
        ..
    } = ctx.packet;
    if flags & tcp_flags::RST != 0 {
        return Ok(Response::None);
    }
    let at = ctx.transport_offset();
    let word = |from: usize| skb.word(at + from).map(u32::from_be).ok_or(DropReason::RewriteFailed);
    let (seq, ack) = (word(offset_of!(TcpHdr, seq))?, word(offset_of!(TcpHdr, ack_seq))?);
    let header = usize::from(transport_len);
    let payload = (skb.len() as usize).saturating_sub(at + header) as u32;
    let counts = |flag: u8| u32::from(flags & flag != 0);
    let (seq, ack, flags) = if flags & tcp_flags::ACK != 0 {
        (ack, 0, tcp_flags::RST)
    } else {
        let end = seq.wrapping_add(payload + counts(tcp_flags::SYN) + counts(tcp_flags::FIN));
        (0, end, tcp_flags::RST | tcp_flags::ACK)
    };
    let partial = is_partial(skb, at + offset_of!(TcpHdr, check))?;
    // SAFETY: the context is that of the running program, and the other arguments are integers.
    if unsafe { bpf_skb_change_tail(skb.as_ptr(), (at + TcpHdr::LEN) as u32, 0) } != 0 {
        return Err(DropReason::RewriteFailed);
    }
    write_ip(skb, ctx, ip_protocol::TCP, TcpHdr::LEN as u16)?;
    let ports = ctx.tuple().reversed().ports();
    let start = [ports, seq.to_be(), ack.to_be(), u32::from_ne_bytes([0x50, flags, 0, 0])];
    let sum = pseudo_header(dst, src, ip_protocol::TCP, TcpHdr::LEN as u16);
    let checksum = if partial {
        sum.fold()
    } else {
        start.iter().fold(sum, |sum, word| sum.add(*word)).checksum()
    };
    let [a, b] = checksum.to_ne_bytes();
    let [p, q, r, s] = start;
    skb.store(at, &[p, q, r, s, u32::from_ne_bytes([a, b, 0, 0])])?;
    send_back(skb, ctx)?;
    Ok(Response::Sent)
}

/// Step: turns a packet into an ICMP error that quotes its headers.
#[inline(always)]
fn icmp(skb: Skb, ctx: CtxRef) -> Result<(), DropReason> {
    let Packet { dst, src, .. } = ctx.packet;
    let (is_v4, is_tcp) = (ctx.packet.is_v4(), ctx.packet.is_tcp());
    let (reject_with, mtu) = (ctx.reject_with, ctx.mtu);
    let ip = ctx.packet.ip_len();
    // The whole TCP header is quoted: if the checksum is left to the device, `bpf_skb_change_tail` does not shorten the
    // packet to less than its checksum field.
    let quoted = if is_tcp { TcpHdr::LEN } else { UdpHdr::LEN };
    let at = ctx.transport_offset();
    let checksum_at = if is_tcp {
        at + offset_of!(TcpHdr, check)
    } else {
        at + offset_of!(UdpHdr, check)
    };
    let kept = skb.half(checksum_at).ok_or(DropReason::RewriteFailed)?;
    let partial = is_partial(skb, checksum_at)?;
    skb.store(checksum_at, &kept.to_be())?;
    // SAFETY: the context is that of the running program, and the other arguments are integers.
    if unsafe { bpf_skb_change_tail(skb.as_ptr(), (at + quoted) as u32, 0) } != 0 {
        return Err(DropReason::RewriteFailed);
    }
    let mut sum = sum_of(skb, ctx.ip_offset(), ip)?;
    if partial {
        // The checksum that the device stores makes the sum from the transport header on zero, including the current value of
        // the checksum field.
        sum = sum.add(u32::from(!kept.to_be()));
    } else {
        sum = sum.plus(sum_of(skb, at, quoted)?);
    }
    let room = (ICMP_LEN + ip) as i32;
    // SAFETY: the context is that of the running program, and the other arguments are integers.
    if unsafe { bpf_skb_adjust_room(skb.as_ptr(), room, BPF_ADJ_ROOM_MAC, 0) } != 0 {
        return Err(DropReason::RewriteFailed);
    }
    let ([kind, code], rest) = icmp_header(reject_with, mtu, is_v4);
    let len = (ICMP_LEN + ip + quoted) as u16;
    sum = sum.add(u32::from_ne_bytes([kind, code, 0, 0])).add(rest);
    let proto = if is_v4 {
        ip_protocol::ICMP
    } else {
        sum = sum.plus(pseudo_header(dst, src, ip_protocol::ICMPV6, len));
        ip_protocol::ICMPV6
    };
    write_ip(skb, ctx, proto, len)?;
    let [c, d] = sum.checksum().to_ne_bytes();
    skb.store(at, &[u32::from_ne_bytes([kind, code, c, d]), rest])?;
    send_back(skb, ctx)
}

/// Returns the sum of `len` bytes: a multiple of four, and at most the length of an IPv6 header.
#[inline(always)]
fn sum_of(skb: Skb, at: usize, len: usize) -> Result<Sum, DropReason> {
    let mut sum = Sum::ZERO;
    for word in 0..Ipv6Hdr::LEN / 4 {
        if word * 4 >= len {
            break;
        }
        sum = sum.add(skb.word(at + word * 4).ok_or(DropReason::RewriteFailed)?);
    }
    Ok(sum)
}
