//! Hooks on packets: tc ingress and egress. They see what no socket hook has translated.
//!
//! Verdicts are `TC_ACT_UNSPEC` for all that goes on, so that other programs at the hook run as well.

use core::ptr;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::btf_maps::lpm_trie::Key as Prefix;
use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use lb_common::abi::{Addr, DropReason, EventKind, FrontendKind, SourceRange, cluster_flags, ct_flags, device_flags};
use lb_common::logic::connect;
use lb_common::logic::ct::Phase;
use lb_common::logic::ip128::Ip128;
use lb_common::logic::packet::{self, ETHERNET, Packet, tcp_flags};
use lb_common::logic::route;
use lb_common::logic::select;
use lb_common::logic::tcp_state;
use lb_common::logic::translation::{RejectWith, Tuple, reject_with};

use crate::backend::{self, Client, Serving};
use crate::count::{self, TraceEvent};
use crate::ct::{self, CtLookup, Entry};
use crate::listener;
use crate::map_tables::MapTables;
use crate::maps::{CLUSTER_CIDRS, CONFIG, DEVICES, SOURCE_RANGES};
use crate::packet_ctx::{Chosen, CtxRef, PacketCtx, step};
use crate::reject;
use crate::send;
use crate::skb::Skb;
use crate::volatile;

/// How many ports are tried for one flow before it is refused.
const PORTS_TRIED: u32 = 16;

/// What came in by a device with a link layer.
#[classifier]
pub(crate) fn lb_ingress(ctx: TcContext) -> i32 {
    verdict(&ctx, ETHERNET, false)
}

/// What goes out by such a device.
#[classifier]
pub(crate) fn lb_egress(ctx: TcContext) -> i32 {
    verdict(&ctx, ETHERNET, true)
}

/// What came in by a device without a link layer.
#[classifier]
pub(crate) fn lb_ingress_l3(ctx: TcContext) -> i32 {
    verdict(&ctx, 0, false)
}

/// What goes out by such a device.
#[classifier]
pub(crate) fn lb_egress_l3(ctx: TcContext) -> i32 {
    verdict(&ctx, 0, true)
}

#[inline(always)]
fn verdict(ctx: &TcContext, link: usize, at_egress: bool) -> i32 {
    let skb = Skb::new(ctx.skb.skb);
    skb.pull();
    let packet = match packet::parse(&skb, link) {
        Ok(packet) => packet,
        Err(None) => return TC_ACT_UNSPEC,
        Err(Some(reason)) => {
            count::dropped(reason);
            return TC_ACT_UNSPEC;
        }
    };
    let Some(mut ctx) = CtxRef::begin(packet, link, at_egress) else {
        return TC_ACT_UNSPEC;
    };
    if let Err(reason) = translate(skb, ctx) {
        ctx.verdict = refuse(skb, ctx, reason);
    }
    ctx.verdict
}

/// Counts, tells and gives the answer to a packet that is not translated.
#[inline(always)]
fn refuse(skb: Skb, ctx: CtxRef, reason: DropReason) -> i32 {
    count::dropped(reason);
    let answer = reject_with(reason);
    if ctx.service != 0 && matches!(answer, RejectWith::Refused | RejectWith::Drop) {
        count::connection(ctx.service, false);
    }
    let event = TraceEvent::rejected(ctx.destination(), ctx.service, reason);
    count::packet_event(&ctx.packet, &event);
    match answer {
        RejectWith::Pass => TC_ACT_UNSPEC,
        RejectWith::Drop => TC_ACT_SHOT,
        answer => reject::with(skb, ctx, answer),
    }
}

#[inline(always)]
fn translate(skb: Skb, ctx: CtxRef) -> Result<(), DropReason> {
    if existing(skb, ctx)? || !begin(skb, ctx)? || existing(skb, ctx)? {
        return Ok(());
    }
    // What the other packet began is over already: this one has no way, and comes again.
    Err(DropReason::RewriteFailed)
}

step! {
    /// A packet that belongs to a flow. False: it does not.
    fn existing(skb, mut ctx) {
        let Some(found) = CtLookup::of(&ctx.key) else {
            return Ok(false);
        };
        found.read(&mut ctx.entry);
        if ctx.entry.has(ct_flags::EGRESS) != ctx.at_egress {
            return Ok(true);
        }
        if skb.has_vlan() {
            return Err(DropReason::Vlan);
        }
        let Packet { flags, .. } = ctx.packet;
        ctx.service = ctx.entry.service;
        let is_tcp = ctx.packet.is_tcp();
        let is_reply = ctx.entry.has(ct_flags::REPLY);
        if !is_reply && !goes_on(ctx, &found)? {
            ctx.last_port = ctx.entry.src_port;
            ct::forget(&ctx.key, &ctx.entry);
            return Ok(false);
        }
        if found.is_new && is_established(ctx) {
            ct::establish(ctx)?;
        } else {
            found.touch(flags, is_tcp);
            if found.is_new && !is_reply && ctx.packet.begins() {
                // Sent again. The other direction may have been forgotten.
                ct::claim_answers(ctx)?;
            }
        }
        if !ctx.entry.has(ct_flags::FORWARD) {
            return deliver(skb, ctx);
        }
        if !send::route(skb, ctx)? {
            return Err(DropReason::NoRoute);
        }
        forward(skb, ctx)
    }
}

/// Whether a flow that was new is one to be kept: with a datagram's answer, and with the segment by which a client says that
/// it has the server's. Before that, nobody may be there who asked.
#[inline(always)]
fn is_established(ctx: CtxRef) -> bool {
    let PacketCtx { packet, key, entry, .. } = &*ctx;
    let is_reply = entry.has(ct_flags::REPLY);
    if !packet.is_tcp() {
        return is_reply;
    }
    !is_reply && packet.flags & (tcp_flags::SYN | tcp_flags::RST) == 0 && ct::other_state(key, entry) != 0
}

/// Whether a packet of a client still goes where the flow's went.
#[inline(always)]
fn goes_on(ctx: CtxRef, found: &CtLookup) -> Result<bool, DropReason> {
    let PacketCtx { packet, key, entry, .. } = &*ctx;
    if !packet.is_tcp() {
        let set = entry.set().ok_or(DropReason::BadKind)?;
        let serving = Serving::of(entry.service, set).ok_or(DropReason::BadServiceIndex)?;
        return Ok(serving.again(entry.backend, entry.generation).is_some());
    }
    let there = backend::is_current(entry.backend, entry.generation);
    if packet.begins() {
        let states = [found.state(), ct::other_state(key, entry)];
        return Ok(there && !Phase::of(true, states).is_end());
    }
    if !there {
        // The flow will soon be removed.
        found.touch(tcp_flags::RST, true);
        return Err(DropReason::BackendGone);
    }
    Ok(true)
}

/// Whether the packet may go one hop further, where it goes one.
#[inline(always)]
fn lives(ctx: CtxRef) -> Result<(), DropReason> {
    if ctx.entry.is_hop() && ctx.packet.ttl <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    Ok(())
}

/// Changes a packet as its entry says, and leaves it to the stack.
#[inline(always)]
fn deliver(skb: Skb, mut ctx: CtxRef) -> Result<bool, DropReason> {
    lives(ctx)?;
    send::rewrite(skb, ctx)?;
    if ctx.entry.has(ct_flags::AGAIN) {
        ctx.verdict = send::receive_again(skb);
    }
    Ok(true)
}

step! {
    /// Changes a packet as its entry says, and sends it to the next hop.
    fn forward(skb, mut ctx) {
        lives(ctx)?;
        let mut mtu = 0;
        let fits = ctx.hop.fits(skb, &mut mtu);
        ctx.mtu = mtu;
        fits?;
        send::rewrite(skb, ctx)?;
        if ctx.ip() == 0 {
            // The kernel takes a header of the link layer off, and drops what has none.
            skb.add_link_header()?;
        }
        ctx.verdict = ctx.hop.send();
        Ok(true)
    }
}

step! {
    /// A packet that belongs to no flow. True: another packet of its flow was faster.
    fn begin(skb, mut ctx) {
        let maps = MapTables {
            ctx: skb.as_ptr().cast(),
        };
        ctx.service = 0;
        let to = ctx.destination();
        if ctx.at_egress && !skb.has_socket() {
            // Nothing has translated it, and it may have nowhere to go but back.
            return if route::is_service_address(&maps, to.addr) {
                Err(DropReason::Untranslated)
            } else {
                Ok(false)
            };
        }
        if ctx.packet.is_tcp() && !ctx.packet.begins() {
            // A connection that began before lb, or that another has translated: whoever knows it will see it.
            return Ok(false);
        }
        let Some(frontend) = route::packet_frontend(&maps, to)? else {
            return Ok(false);
        };
        if skb.has_vlan() {
            return Err(DropReason::Vlan);
        }
        ctx.service = frontend.service;
        ctx.frontend = frontend;
        choose(ctx)?;
        find_way(skb, ctx)?;
        if !claim(skb, ctx)? {
            return Ok(true);
        }
        count::connection(ctx.service, true);
        let event = TraceEvent::served(EventKind::Translated, to, ctx.service, ctx.chosen.backend);
        count::packet_event(&ctx.packet, &event);
        if ctx.entry.has(ct_flags::FORWARD) {
            forward(skb, ctx)?;
        } else {
            deliver(skb, ctx)?;
        }
        Ok(false)
    }
}

step! {
    /// Finds how packets of a new flow get to its backend, and makes its entry.
    fn find_way(skb, mut ctx) {
        let Chosen { backend, set, here, .. } = ctx.chosen;
        let wanted = Tuple {
            dst: backend.addr,
            dst_port: backend.port,
            ..ctx.is()
        };
        ctx.entry = Entry::new(&wanted, backend, ctx.service, set);
        let is_beyond = send::route(skb, ctx)?;
        if !is_beyond && ctx.at_egress {
            return Err(DropReason::NoRoute);
        }
        let elsewhere = ctx.hop.device() != skb.ifindex();
        // Up the stack, where answers come by as well: on the way from another device than the client's.
        let through = !is_beyond || !ctx.at_egress && elsewhere && (backend.is_local() || here);
        let at_egress = ctx.at_egress;
        let way = match through {
            true if has_come_by_bridge(skb) => ct_flags::AGAIN,
            true => 0,
            false if at_egress => ct_flags::EGRESS | ct_flags::FORWARD,
            false => ct_flags::FORWARD,
        };
        ctx.entry.set_way(way);
        ctx.chosen.snat = !through && (elsewhere || !at_egress);
        if ctx.chosen.snat {
            let source = source_address(ctx.hop.device(), ctx.packet.src)?;
            ctx.entry.set_source(source);
        }
        Ok(true)
    }
}

step! {
    /// Finds what a new flow gets.
    fn choose(mut ctx) {
        let frontend = ctx.frontend;
        let client = ctx.packet.src;
        let place = place(client);
        let inside = ctx.at_egress || place & cluster_flags::INSIDE != 0;
        ctx.chosen.here = place & cluster_flags::HERE != 0;
        let set = connect::set_for_packet(frontend, inside)?;
        ctx.chosen.set = set;
        let serving = Serving::of(frontend.service, set).ok_or(DropReason::BadServiceIndex)?;
        if frontend.kind == FrontendKind::LoadBalancer as u8
            && serving.has_source_ranges()
            && !is_in_range(frontend.service, client)
        {
            return Err(DropReason::SourceNotAllowed);
        }
        ctx.chosen.backend = serving.choose(|| Client::addr(client))?;
        Ok(true)
    }
}

/// [`cluster_flags`] of an address.
#[inline(always)]
fn place(addr: Ip128) -> u32 {
    let key = Prefix::new(128, Addr::from(addr));
    CLUSTER_CIDRS.get(&key).map_or(0, |flags| {
        // SAFETY: a reference to a value of the map.
        unsafe { ptr::from_ref(flags).read_volatile() }
    })
}

/// Whether a load-balancer address of a service is for a client.
#[inline(always)]
fn is_in_range(service: u32, addr: Ip128) -> bool {
    let range = SourceRange {
        service,
        addr: Addr::from(addr),
    };
    SOURCE_RANGES.get(&Prefix::new(160, range)).is_some()
}

/// Whether a packet has come by a bridge, whose own rules may have shown it to conntrack.
#[inline(always)]
fn has_come_by_bridge(skb: Skb) -> bool {
    DEVICES.get_ptr(skb.ifindex()).is_some_and(|device| {
        // SAFETY: the pointer is to a value of the map.
        let flags = unsafe { (&raw const (*device).flags).read_volatile() };
        flags & device_flags::BRIDGE != 0
    })
}

/// The address of this node that packets to a device have for a source.
#[inline(always)]
fn source_address(device: u32, client: Ip128) -> Result<Ip128, DropReason> {
    let device = DEVICES.get_ptr(device).ok_or(DropReason::NoSourceAddress)?;
    // SAFETY: the pointer is to a value of the map.
    let addr = unsafe {
        if client.is_v4() {
            volatile::load(&raw const (*device).v4)
        } else {
            volatile::load(&raw const (*device).v6)
        }
    };
    if addr.is_unset() {
        return Err(DropReason::NoSourceAddress);
    }
    Ok(addr)
}

step! {
    /// Makes a flow known, in both directions. Where the source is the node's, or answers could be those of another flow,
    /// with a source port of the node's. False, and nothing is made known, where another packet of the flow was faster.
    fn claim(skb, mut ctx) {
        if ctx.chosen.snat || !ct::claim_answers(ctx)? {
            claim_port(skb, ctx)?;
        }
        let state = tcp_state::after(0, ctx.packet.flags);
        ctx.entry.set_state(state);
        let is_first = ct::claim(&ctx.key, &ctx.entry);
        if !is_first {
            ct::forget_answers(&ctx.key, &ctx.entry);
        }
        Ok(is_first)
    }
}

/// Finds a source port with which answers are this flow's only, and no socket's, and claims them.
#[inline(always)]
fn claim_port(skb: Skb, mut ctx: CtxRef) -> Result<(), DropReason> {
    let config = CONFIG.get_ptr(0).ok_or(DropReason::SnatPortsExhausted)?;
    // SAFETY: the pointer is to a value of the map; the agent may store to it at any time.
    let (first, last) = unsafe {
        (
            (&raw const (*config).snat_first).read_volatile(),
            (&raw const (*config).snat_last).read_volatile(),
        )
    };
    // A server that still has the last connection from there (TIME_WAIT) takes a SYN for a new one if its sequence number or
    // its timestamp is later (RFC 1122, 4.2.2.13; RFC 6191): those of one client's port are, those of another client need not be.
    let mut again = (first..=last).contains(&ctx.last_port).then_some(ctx.last_port);
    for tried in 0..PORTS_TRIED {
        // SAFETY: the helper takes nothing.
        let random = unsafe { bpf_get_prandom_u32() };
        ctx.entry.src_port = again
            .take()
            .or_else(|| select::port(first, last, random))
            .ok_or(DropReason::SnatPortsExhausted)?;
        if listener::hears(skb, ctx)? {
            continue;
        }
        // A connection that was closed keeps its port for stray segments, while there are others.
        let may_replace = tried >= PORTS_TRIED / 2;
        if ct::claim_answers(ctx)? || may_replace && ct::replace_closed(ctx)? && ct::claim_answers(ctx)? {
            return Ok(());
        }
    }
    Err(DropReason::SnatPortsExhausted)
}
