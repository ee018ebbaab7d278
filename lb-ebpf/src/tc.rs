//! Hooks on packets: tc ingress and egress. They see what no socket hook has translated.
//!
//! Verdicts are `TC_ACT_UNSPEC` for all that goes on, so that other programs at the hook run as well.

use core::ptr;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::btf_maps::lpm_trie::Key as Prefix;
use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use lb_common::abi::{Addr, DropReason, EventKind, Frontend, FrontendKind, SourceRange, cluster_flags, ct_flags};
use lb_common::logic::connect;
use lb_common::logic::conntrack::Phase;
use lb_common::logic::packet::{self, ETHERNET, Packet, tcp_flags};
use lb_common::logic::route::{self, Destination};
use lb_common::logic::select;
use lb_common::logic::tcp_state;
use lb_common::logic::translation::{Answer, Tuple, answer};
use lb_common::logic::words::Words;

use crate::backend::{self, Choice, Client, Serving};
use crate::conntrack::{self, Entry, Found, Key};
use crate::count::{self, Happening};
use crate::listener;
use crate::maps::{CLUSTER_CIDRS, CONFIG, DEVICES, SCRATCH, SOURCE_RANGES};
use crate::reject;
use crate::send::{self, Hop};
use crate::skb::Skb;
use crate::tables::Maps;
use crate::words;

/// How many ports are tried for one flow before it is refused.
const PORTS_TRIED: u32 = 16;

/// What came in by a device with a link layer.
#[classifier]
pub(crate) fn lb_ingress(ctx: TcContext) -> i32 {
    verdict::<ETHERNET>(&ctx, false)
}

/// What goes out by such a device.
#[classifier]
pub(crate) fn lb_egress(ctx: TcContext) -> i32 {
    verdict::<ETHERNET>(&ctx, true)
}

/// What came in by a device without a link layer.
#[classifier]
pub(crate) fn lb_ingress_l3(ctx: TcContext) -> i32 {
    verdict::<0>(&ctx, false)
}

/// What goes out by such a device.
#[classifier]
pub(crate) fn lb_egress_l3(ctx: TcContext) -> i32 {
    verdict::<0>(&ctx, true)
}

/// A packet, and what came of it so far. Every step is a function of its own, and all that they share stands in
/// SCRATCH: together it is more than a program's stack, and what the verifier does not know it need not try out.
pub(crate) struct Work {
    packet: Packet,
    at_egress: bool,
    /// What the kernel is told, where nothing refuses the packet.
    verdict: i32,
    /// Zero where no service was found.
    service: u32,
    /// How long a packet may be, for [`DropReason::TooBig`].
    mtu: u32,
    key: Key,
    entry: Entry,
    chosen: Chosen,
    hop: Hop,
}

impl Work {
    /// This CPU's. The kernel runs one program at a tc hook at a time on a CPU, with softirqs off. Zero bytes are a value.
    #[inline(always)]
    fn here() -> Option<&'static mut Self> {
        // SAFETY: nobody else has it, see above.
        SCRATCH.get_ptr_mut(0).map(|work| unsafe { &mut *work })
    }

    #[inline(always)]
    const fn destination(&self) -> Destination {
        Destination {
            addr: self.packet.dst,
            port: self.packet.dst_port,
            proto: self.packet.proto,
        }
    }

    #[inline(always)]
    const fn is(&self) -> Tuple {
        Tuple::of(&self.packet)
    }

    #[inline(always)]
    fn key_of_packet(&self) -> Key {
        Key::new(&self.is(), self.packet.proto)
    }
}

#[inline(always)]
fn verdict<const LINK: usize>(ctx: &TcContext, at_egress: bool) -> i32 {
    let skb = Skb::new(ctx.skb.skb);
    skb.pull();
    let packet = match packet::parse::<LINK>(&skb) {
        Ok(packet) => packet,
        Err(None) => return TC_ACT_UNSPEC,
        Err(Some(reason)) => {
            count::dropped(reason);
            return TC_ACT_UNSPEC;
        }
    };
    let Some(work) = Work::here() else {
        return TC_ACT_UNSPEC;
    };
    work.packet = packet;
    work.at_egress = at_egress;
    work.verdict = TC_ACT_UNSPEC;
    work.service = 0;
    work.key = work.key_of_packet();
    match translate::<LINK>(skb, work) {
        Ok(()) => work.verdict,
        Err(reason) => refuse::<LINK>(skb, work, reason),
    }
}

/// Counts, tells and gives the answer to a packet that is not translated.
#[inline(never)]
fn refuse<const LINK: usize>(skb: Skb, work: &Work, reason: DropReason) -> i32 {
    let Work { packet, at_egress, .. } = work;
    count::dropped(reason);
    let answer = answer(reason);
    if work.service != 0 && matches!(answer, Answer::Refused | Answer::Drop) {
        count::connection(work.service, false);
    }
    let happening = Happening::rejected(work.destination(), work.service, reason);
    count::packet_event(packet, &happening);
    match answer {
        Answer::Pass => TC_ACT_UNSPEC,
        Answer::Drop => TC_ACT_SHOT,
        Answer::Refused if packet.is_tcp() => reject::reset::<LINK>(skb, packet, *at_egress),
        answer => reject::icmp::<LINK>(skb, packet, answer, work.mtu, *at_egress),
    }
}

#[inline(always)]
fn translate<const LINK: usize>(skb: Skb, work: &mut Work) -> Result<(), DropReason> {
    if existing::<LINK>(skb, work)? == New::No || begin::<LINK>(skb, work)? == Begun::Yes {
        return Ok(());
    }
    if existing::<LINK>(skb, work)? == New::No {
        return Ok(());
    }
    // What the other packet began is over already: this one has no way, and comes again.
    Err(DropReason::RewriteFailed)
}

/// Whether a packet may begin a flow.
#[derive(PartialEq, Eq)]
#[repr(u32)]
enum New {
    No,
    Maybe,
}

/// A packet that belongs to a flow.
#[inline(never)]
fn existing<const LINK: usize>(skb: Skb, work: &mut Work) -> Result<New, DropReason> {
    let Some(found) = Found::of(&work.key) else {
        return Ok(New::Maybe);
    };
    work.entry = found.read();
    if work.entry.has(ct_flags::EGRESS) != work.at_egress {
        return Ok(New::No);
    }
    if skb.has_vlan() {
        return Err(DropReason::Vlan);
    }
    let Packet { flags, .. } = work.packet;
    work.service = work.entry.service;
    if work.entry.has(ct_flags::REPLY) {
        if found.is_new && flags & tcp_flags::RST == 0 {
            conntrack::establish(&work.key, &mut work.entry, flags)?;
        } else {
            found.touch(flags, work.packet.is_tcp());
        }
    } else {
        if !goes_on(work, &found)? {
            conntrack::forget(&work.key, &work.entry);
            return Ok(New::Maybe);
        }
        found.touch(flags, work.packet.is_tcp());
        if found.is_new && work.packet.begins() {
            // Sent again. The other direction may have been forgotten.
            conntrack::claim_answers(&work.key, &work.entry);
        }
    }
    if !work.entry.has(ct_flags::FORWARD) {
        send::rewrite::<LINK>(skb, &work.packet, &work.entry, false)?;
        return Ok(New::No);
    }
    if !send::route(skb, &work.packet, &work.entry, &mut work.hop)? {
        return Err(DropReason::NoRoute);
    }
    forward::<LINK>(skb, work)?;
    Ok(New::No)
}

/// Whether a packet of a client still goes where the flow's went.
#[inline(always)]
fn goes_on(work: &Work, found: &Found) -> Result<bool, DropReason> {
    let Work { packet, key, entry, .. } = work;
    if !packet.is_tcp() {
        let set = entry.set().ok_or(DropReason::BadKind)?;
        let serving = Serving::of(entry.service, set).ok_or(DropReason::BadServiceIndex)?;
        return Ok(serving.again(entry.backend, entry.generation).is_some());
    }
    let there = backend::is_current(entry.backend, entry.generation);
    if packet.begins() {
        let states = [found.state(), conntrack::other_state(key, entry)];
        return Ok(there && !Phase::of(true, states).is_end());
    }
    if !there {
        // The flow will soon be removed.
        found.touch(tcp_flags::RST, true);
        return Err(DropReason::BackendGone);
    }
    Ok(true)
}

/// Changes a packet as its entry says, and sends it to the next hop.
#[inline(never)]
fn forward<const LINK: usize>(skb: Skb, work: &mut Work) -> Result<(), DropReason> {
    if work.packet.ttl <= 1 && !work.at_egress {
        return Err(DropReason::TtlExceeded);
    }
    work.hop.fits(skb, &mut work.mtu)?;
    send::rewrite::<LINK>(skb, &work.packet, &work.entry, !work.at_egress)?;
    work.verdict = work.hop.send();
    Ok(())
}

/// Whether a packet is done with.
#[derive(PartialEq, Eq)]
#[repr(u32)]
enum Begun {
    Yes,
    /// Another packet of the flow was faster.
    ByAnother,
}

/// A packet that belongs to no flow.
#[inline(never)]
fn begin<const LINK: usize>(skb: Skb, work: &mut Work) -> Result<Begun, DropReason> {
    let maps = Maps {
        ctx: skb.as_ptr().cast(),
    };
    work.service = 0;
    let to = work.destination();
    if work.at_egress && !skb.has_socket() {
        // Nothing has translated it, and it may have nowhere to go but back.
        return if route::is_service_address(&maps, to.addr) {
            Err(DropReason::Untranslated)
        } else {
            Ok(Begun::Yes)
        };
    }
    if work.packet.is_tcp() && !work.packet.begins() {
        // A connection that began before lb, or that another has translated: whoever knows it will see it.
        return Ok(Begun::Yes);
    }
    let Some(frontend) = route::packet_frontend(&maps, to)? else {
        return Ok(Begun::Yes);
    };
    if skb.has_vlan() {
        return Err(DropReason::Vlan);
    }
    work.service = frontend.service;
    choose(work, frontend)?;
    find_way(skb, work)?;
    if !claim(skb, work)? {
        return Ok(Begun::ByAnother);
    }
    count::connection(work.service, true);
    let happening = Happening::served(EventKind::Translated, to, work.service, work.chosen.backend);
    count::packet_event(&work.packet, &happening);
    if work.entry.has(ct_flags::FORWARD) {
        forward::<LINK>(skb, work)?;
    } else {
        send::rewrite::<LINK>(skb, &work.packet, &work.entry, false)?;
    }
    Ok(Begun::Yes)
}

/// Finds how packets of a new flow get to its backend, and makes its entry.
#[inline(never)]
fn find_way(skb: Skb, work: &mut Work) -> Result<(), DropReason> {
    let Chosen { backend, set, here, .. } = work.chosen;
    let wanted = Tuple {
        dst: backend.addr,
        dst_port: backend.port,
        ..work.is()
    };
    work.entry = Entry::new(&wanted, backend, work.service, set, 0);
    let is_beyond = send::route(skb, &work.packet, &work.entry, &mut work.hop)?;
    if !is_beyond && work.at_egress {
        return Err(DropReason::NoRoute);
    }
    let elsewhere = work.hop.device() != skb.ifindex();
    // Up the stack, where answers come by as well: on the way from another device than the client's.
    let through = !is_beyond || !work.at_egress && elsewhere && (backend.is_local() || here);
    work.entry.set_way(work.at_egress, !through);
    work.chosen.snat = !through && (elsewhere || !work.at_egress);
    if work.chosen.snat {
        let source = source_address(work.hop.device(), work.packet.src)?;
        work.entry.set_source(source);
    }
    Ok(())
}

/// What a new flow gets.
#[derive(Clone, Copy)]
struct Chosen {
    backend: Choice,
    set: connect::Set,
    /// The client is a pod of this node.
    here: bool,
    /// The source becomes this node's.
    snat: bool,
}

/// Finds what a new flow gets.
#[inline(never)]
fn choose(work: &mut Work, frontend: Frontend) -> Result<(), DropReason> {
    let client = work.packet.src;
    let place = place(client);
    let inside = work.at_egress || place & cluster_flags::INSIDE != 0;
    work.chosen.here = place & cluster_flags::HERE != 0;
    work.chosen.set = connect::set_for_packet(frontend, inside)?;
    let serving = Serving::of(frontend.service, work.chosen.set).ok_or(DropReason::BadServiceIndex)?;
    if frontend.kind == FrontendKind::LoadBalancer as u8
        && serving.has_source_ranges()
        && !is_in_range(frontend.service, client)
    {
        return Err(DropReason::SourceNotAllowed);
    }
    work.chosen.backend = serving.choose(|| Client::addr(client))?;
    Ok(())
}

/// [`cluster_flags`] of an address.
#[inline(always)]
fn place(addr: Words) -> u32 {
    let key = Prefix::new(128, Addr::from(addr));
    CLUSTER_CIDRS.get(&key).map_or(0, |flags| {
        // SAFETY: a reference to a value of the map.
        unsafe { ptr::from_ref(flags).read_volatile() }
    })
}

/// Whether a load-balancer address of a service is for a client.
#[inline(always)]
fn is_in_range(service: u32, addr: Words) -> bool {
    let range = SourceRange {
        service,
        addr: Addr::from(addr),
    };
    SOURCE_RANGES.get(&Prefix::new(160, range)).is_some()
}

/// The address of this node that packets to a device have for a source.
#[inline(always)]
fn source_address(device: u32, client: Words) -> Result<Words, DropReason> {
    let device = DEVICES.get_ptr(device).ok_or(DropReason::NoSourceAddress)?;
    // SAFETY: the pointer is to a value of the map.
    let addr = unsafe {
        if client.is_v4() {
            words::load(&raw const (*device).v4)
        } else {
            words::load(&raw const (*device).v6)
        }
    };
    if addr.is_unset() {
        return Err(DropReason::NoSourceAddress);
    }
    Ok(addr)
}

/// Makes a flow known, in both directions. Where the source is the node's, or answers could be those of another flow, with
/// a source port of the node's. False, and nothing is made known, where another packet of the flow was faster.
#[inline(never)]
fn claim(skb: Skb, work: &mut Work) -> Result<bool, DropReason> {
    let Work { key, entry, .. } = work;
    if work.chosen.snat || !conntrack::claim_answers(key, entry) {
        claim_port(skb, key, entry)?;
    }
    entry.set_state(tcp_state::after(0, work.packet.flags));
    if conntrack::claim(key, entry) {
        return Ok(true);
    }
    conntrack::forget_answers(key, entry);
    Ok(false)
}

/// Finds a source port with which answers are this flow's only, and no socket's, and claims them.
#[inline(never)]
fn claim_port(skb: Skb, key: &Key, entry: &mut Entry) -> Result<(), DropReason> {
    let config = CONFIG.get_ptr(0).ok_or(DropReason::SnatPortsExhausted)?;
    // SAFETY: the pointer is to a value of the map; the agent may store to it at any time.
    let (first, last) = unsafe {
        (
            (&raw const (*config).snat_first).read_volatile(),
            (&raw const (*config).snat_last).read_volatile(),
        )
    };
    for _ in 0..PORTS_TRIED {
        // SAFETY: the helper takes nothing.
        let random = unsafe { bpf_get_prandom_u32() };
        entry.src_port = select::port(first, last, random).ok_or(DropReason::SnatPortsExhausted)?;
        if !listener::hears(skb, key.proto(), &entry.to()) && conntrack::claim_answers(key, entry) {
            return Ok(());
        }
    }
    Err(DropReason::SnatPortsExhausted)
}
