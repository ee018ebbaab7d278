//! SNAT ports: source ports of this node, for flows with replies that must come back to this node.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::{
    BPF_F_CURRENT_NETNS, bpf_sock_tuple, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 as Tuple4,
    bpf_sock_tuple__bindgen_ty_1__bindgen_ty_2 as Tuple6,
};
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release};
use lb_common::abi::{DropReason, ip_protocol};
use lb_common::logic::selection;

use crate::ct::{self, Claim, ReplyTuple};
use crate::maps::CONFIG;
use crate::packet_ctx::{CtxRef, outcome, steps};
use crate::skb::Skb;
use crate::volatile::{self, read_once};

/// Number of ports that are tried for a flow before it is refused.
const PORTS_TRIED: u32 = 16;

outcome! {
    /// The search for a socket of this node that would receive the replies.
    pub(crate) enum Port {
        /// No socket uses the source port.
        Free,
        /// A socket would receive the replies.
        InUse,
    }
}

steps! {
    pub(super) fn check_port(skb, ctx) -> Port;
}

/// Finds a source port such that replies to it belong to this flow only and to no socket, and inserts the reply
/// direction.
///
/// # Errors
/// Returns [`DropReason::SnatPortsExhausted`] if no port was free after [`PORTS_TRIED`] tries.
#[inline(always)]
pub(crate) fn claim(skb: Skb, mut ctx: CtxRef) -> Result<(), DropReason> {
    let config = CONFIG.get_ptr(0).ok_or(DropReason::SnatPortsExhausted)?;
    // SAFETY: the pointer is to a value of the map; the agent may store to it at any time.
    let (first, last) = unsafe { (read_once!((*config).snat_first), read_once!((*config).snat_last)) };
    // The port of the client's last flow is tried first. A server that still has that connection (TIME_WAIT) accepts a
    // SYN as a new connection if its sequence number or its timestamp is later (RFC 1122, 4.2.2.13; RFC 6191). That
    // holds for a SYN from the client port of the last flow, but not always for a SYN of another client.
    let mut last_port = (first..=last).contains(&ctx.last_port).then_some(ctx.last_port);
    for tried in 0..PORTS_TRIED {
        // SAFETY: the helper has no arguments.
        let random = unsafe { bpf_get_prandom_u32() };
        ctx.entry.src_port = last_port
            .take()
            .or_else(|| selection::port(first, last, random))
            .ok_or(DropReason::SnatPortsExhausted)?;
        if step::check_port(skb, ctx)? == Port::InUse {
            continue;
        }
        // A closed connection keeps its port, for late segments, as long as other ports are free.
        let may_evict = tried >= PORTS_TRIED / 2;
        if ct::step::claim_reply_direction(ctx)? == Claim::Inserted
            || may_evict
                && ct::step::evict_closed(ctx)? == ReplyTuple::Free
                && ct::step::claim_reply_direction(ctx)? == Claim::Inserted
        {
            return Ok(());
        }
    }
    Err(DropReason::SnatPortsExhausted)
}

/// Step: checks whether a socket of this node would receive the replies to the translated packet, so that its source port is
/// in use.
#[inline(always)]
fn check_port(skb: Skb, ctx: CtxRef) -> Result<Port, DropReason> {
    let translated = ctx.entry.translated();
    let mut room = MaybeUninit::<bpf_sock_tuple>::uninit();
    // SAFETY: the kernel's structure has integers only, for which zero bytes are valid.
    let tuple = unsafe { volatile::zeroed(&mut room) };
    // The tuple of the reply.
    let (sport, dport) = (translated.dst_port.to_be(), translated.src_port.to_be());
    let len = if let (Some(saddr), Some(daddr)) = (translated.dst.to_v4(), translated.src.to_v4()) {
        tuple.__bindgen_anon_1.ipv4 = Tuple4 {
            saddr,
            daddr,
            sport,
            dport,
        };
        size_of::<Tuple4>()
    } else {
        tuple.__bindgen_anon_1.ipv6 = Tuple6 {
            saddr: translated.dst.to_quarters(),
            daddr: translated.src.to_quarters(),
            sport,
            dport,
        };
        size_of::<Tuple6>()
    };
    let (skb, at, len) = (skb.as_ptr().cast(), &raw mut *tuple, len as u32);
    // SAFETY: the context is that of the running program, `len` is the size of the variant of the tuple that was stored, and
    // the socket is released.
    unsafe {
        let socket = if ctx.packet.proto == ip_protocol::TCP {
            bpf_sk_lookup_tcp(skb, at, len, BPF_F_CURRENT_NETNS as u64, 0)
        } else {
            bpf_sk_lookup_udp(skb, at, len, BPF_F_CURRENT_NETNS as u64, 0)
        };
        if socket.is_null() {
            return Ok(Port::Free);
        }
        bpf_sk_release(socket.cast());
    }
    Ok(Port::InUse)
}
