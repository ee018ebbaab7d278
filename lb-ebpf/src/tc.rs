//! tc programs of devices, at ingress and egress. They translate packets that no socket hook has translated.
//!
//! The verdict of every packet that continues is `TC_ACT_UNSPEC`, so that other programs at the hook run as well.

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use lb_common::abi::{DropReason, EventKind, RejectWith, ServiceIndex, ct_flags};
use lb_common::logic::ct::{self as ct_logic, Action, FlowState, Match};
use lb_common::logic::decide::{self, Arrival};
use lb_common::logic::delivery::{self, Facts};
use lb_common::logic::log::Decision;
use lb_common::logic::packet::{self, ETHERNET, tcp_flags};
use lb_common::logic::tcp_state;
use lb_common::logic::translation::Tuple;

use crate::backend::{self, Client, ServiceSet};
use crate::count;
use crate::ct::{self, Claim, CtLookup};
use crate::device;
use crate::log;
use crate::map_tables::MapTables;
use crate::packet_ctx::{CtxRef, PacketCtx, Selection, outcome, steps};
use crate::reject;
use crate::send::{self, Route};
use crate::skb::Skb;
use crate::snat_port;
use crate::trace::{self, TraceEvent};

/// Ingress program of devices with a link-layer header.
#[classifier]
pub(crate) fn lb_ingress(ctx: TcContext) -> i32 {
    verdict(&ctx, ETHERNET, false)
}

/// Egress program of devices with a link-layer header.
#[classifier]
pub(crate) fn lb_egress(ctx: TcContext) -> i32 {
    verdict(&ctx, ETHERNET, true)
}

/// Ingress program of devices without a link-layer header.
#[classifier]
pub(crate) fn lb_ingress_l3(ctx: TcContext) -> i32 {
    verdict(&ctx, 0, false)
}

/// Egress program of devices without a link-layer header.
#[classifier]
pub(crate) fn lb_egress_l3(ctx: TcContext) -> i32 {
    verdict(&ctx, 0, true)
}

outcome! {
    /// The search for a packet's flow.
    enum Lookup {
        /// The packet belongs to no flow.
        Miss,
        /// The packet belongs to a flow, and was translated if this hook translates it.
        Done,
    }
}

outcome! {
    /// The handling of a packet that belongs to no flow.
    enum NewFlow {
        /// The packet started a flow and was translated, or lb does not translate it.
        Done,
        /// Another packet of the flow has inserted the flow concurrently.
        LostRace,
    }
}

steps! {
    pub(super) fn existing_flow(skb, ctx) -> Lookup;
    pub(super) fn new_flow(skb, ctx) -> NewFlow;
    pub(super) fn select_backend(ctx) -> ();
    pub(super) fn plan_delivery(skb, ctx) -> ();
    pub(super) fn insert_flow(skb, ctx) -> Claim;
    pub(super) fn forward(skb, ctx) -> ();
}

/// Runs the program: parses the packet, translates or rejects it, and returns the verdict. `link_len`: length of the link-layer
/// header.
#[inline(always)]
fn verdict(ctx: &TcContext, link_len: usize, at_egress: bool) -> i32 {
    let skb = Skb::new(ctx.skb.skb);
    skb.pull();
    let packet = match packet::parse(&skb, link_len) {
        Ok(packet) => packet,
        Err(None) => return TC_ACT_UNSPEC,
        Err(Some(reason)) => {
            count::dropped(reason);
            return TC_ACT_UNSPEC;
        }
    };
    let Some(mut ctx) = CtxRef::begin(packet, link_len, at_egress) else {
        return TC_ACT_UNSPEC;
    };
    match translate(skb, ctx) {
        Ok(lookup) => log::packet_translated(ctx, || decision(ctx, lookup)),
        Err(reason) => {
            log::packet_rejected(reason);
            ctx.verdict = refuse(skb, ctx, reason);
        }
    }
    ctx.verdict
}

/// Returns the decision about a translated packet, for the log.
#[inline(always)]
fn decision(ctx: CtxRef, lookup: Lookup) -> Decision {
    match lookup {
        Lookup::Miss => Decision::NewFlow,
        Lookup::Done if ctx.entry.has(ct_flags::REPLY) => Decision::Reply,
        Lookup::Done => Decision::Request,
    }
}

/// Translates a packet as its flow requires, and starts a flow if it has none. Returns whether it had one.
///
/// # Errors
/// Returns the reason if the packet is not translated.
#[inline(always)]
fn translate(skb: Skb, ctx: CtxRef) -> Result<Lookup, DropReason> {
    match step::existing_flow(skb, ctx)? {
        Lookup::Done => return Ok(Lookup::Done),
        Lookup::Miss => {}
    }
    match step::new_flow(skb, ctx)? {
        NewFlow::Done => return Ok(Lookup::Miss),
        NewFlow::LostRace => {}
    }
    match step::existing_flow(skb, ctx)? {
        Lookup::Done => Ok(Lookup::Done),
        // The concurrent flow is already gone. The packet is dropped, and the client retransmits it.
        Lookup::Miss => Err(DropReason::RewriteFailed),
    }
}

/// Counts and traces a packet that is not translated, and sends the response to it.
#[inline(always)]
fn refuse(skb: Skb, ctx: CtxRef, reason: DropReason) -> i32 {
    count::dropped(reason);
    let reject_with = reason.reject_with();
    let is_refusal = match reject_with {
        RejectWith::Refused | RejectWith::Drop => true,
        RejectWith::Pass | RejectWith::TooBig | RejectWith::TimeExceeded => false,
    };
    if !ctx.service.is_none() && is_refusal {
        count::refused(ctx.service);
    }
    let event = TraceEvent::rejected(ctx.destination(), ctx.service, reason);
    trace::packet_event(&ctx.packet, &event);
    match reject_with {
        RejectWith::Pass => TC_ACT_UNSPEC,
        RejectWith::Drop => TC_ACT_SHOT,
        RejectWith::Refused | RejectWith::TooBig | RejectWith::TimeExceeded => reject::respond(skb, ctx, reject_with),
    }
}

/// Step: translates a packet of an existing flow.
#[inline(always)]
fn existing_flow(skb: Skb, mut ctx: CtxRef) -> Result<Lookup, DropReason> {
    let Some(found) = CtLookup::find(&ctx.key) else {
        return Ok(Lookup::Miss);
    };
    found.read(&mut ctx.entry);
    if !ct_logic::is_translated_here(ctx.entry.flags, ctx.at_egress, skb.has_vlan())? {
        return Ok(Lookup::Done);
    }
    ctx.service = ctx.entry.service;
    match next_action(ctx, &found)? {
        Action::Restart => {
            ctx.last_port = ctx.entry.src_port;
            ct::remove(&ctx.key, &ctx.entry);
            return Ok(Lookup::Miss);
        }
        Action::Reset => {
            found.touch(tcp_flags::RST, true);
            return Err(DropReason::BackendGone);
        }
        Action::Establish => ct::step::establish(ctx)?,
        Action::Refresh => found.touch(ctx.packet.flags, ctx.packet.is_tcp()),
        Action::Reclaim => {
            found.touch(ctx.packet.flags, ctx.packet.is_tcp());
            ct::step::claim_reply_direction(ctx)?;
        }
    }
    if ctx.entry.has(ct_flags::FORWARD) {
        match send::step::route(skb, ctx)? {
            Route::ThisNode => return Err(DropReason::NoRoute),
            Route::NextHop => step::forward(skb, ctx)?,
        }
    } else {
        deliver(skb, ctx)?;
    }
    Ok(Lookup::Done)
}

/// The flow of a packet, in the maps.
struct Flow<'a> {
    ctx: CtxRef,
    found: &'a CtLookup,
}

impl FlowState for Flow<'_> {
    #[inline(always)]
    fn backend_is_usable(&self) -> Result<bool, DropReason> {
        let entry = &self.ctx.entry;
        let set = entry.set().ok_or(DropReason::BadKind)?;
        let service_set = ServiceSet::find(entry.service, set).ok_or(DropReason::BadServiceIndex)?;
        Ok(service_set.reusable_backend(entry.backend).is_some())
    }

    #[inline(always)]
    fn backend_is_current(&self) -> bool {
        backend::is_current(self.ctx.entry.backend)
    }

    #[inline(always)]
    fn state(&self) -> u8 {
        self.found.state()
    }

    #[inline(always)]
    fn reverse_state(&self) -> u8 {
        ct::reverse_state(&self.ctx.key, &self.ctx.entry)
    }
}

/// Returns the action for the packet of a flow.
#[inline(always)]
fn next_action(ctx: CtxRef, found: &CtLookup) -> Result<Action, DropReason> {
    let PacketCtx { packet, entry, .. } = &*ctx;
    let matched = Match {
        packet,
        flags: entry.flags,
        is_unreplied: found.is_unreplied,
    };
    ct_logic::next(matched, &Flow { ctx, found })
}

/// Checks the time to live of a packet that this node forwards.
#[inline(always)]
fn check_ttl(ctx: CtxRef) -> Result<(), DropReason> {
    if ctx.entry.decrements_ttl() && ctx.packet.ttl <= 1 {
        return Err(DropReason::TtlExceeded);
    }
    Ok(())
}

/// Translates a packet as its entry specifies, and passes it to the stack.
#[inline(always)]
fn deliver(skb: Skb, mut ctx: CtxRef) -> Result<(), DropReason> {
    check_ttl(ctx)?;
    send::step::rewrite(skb, ctx)?;
    if ctx.entry.has(ct_flags::RECEIVE_AGAIN) {
        ctx.verdict = send::receive_again(skb);
    }
    Ok(())
}

/// Step: translates a packet as its entry specifies, and sends it to the next hop.
#[inline(always)]
fn forward(skb: Skb, mut ctx: CtxRef) -> Result<(), DropReason> {
    check_ttl(ctx)?;
    let mut mtu = 0;
    let checked = ctx.next_hop.check_mtu(skb, &mut mtu);
    ctx.mtu = mtu;
    checked?;
    send::step::rewrite(skb, ctx)?;
    if ctx.ip_offset() == 0 {
        // bpf_redirect_neigh removes a link-layer header, and drops a packet without one.
        skb.add_link_header()?;
    }
    ctx.verdict = ctx.next_hop.redirect();
    Ok(())
}

/// Step: starts the flow of a packet, if lb translates it.
#[inline(always)]
fn new_flow(skb: Skb, mut ctx: CtxRef) -> Result<NewFlow, DropReason> {
    let tables = MapTables {
        ctx: skb.as_ptr().cast(),
    };
    ctx.service = ServiceIndex::NONE;
    let to = ctx.destination();
    let arrival = Arrival {
        at_egress: ctx.at_egress,
        has_socket: skb.has_socket(),
        has_vlan: skb.has_vlan(),
        can_start_flow: decide::can_start_flow(&ctx.packet),
    };
    let Some(frontend) = decide::packet_frontend(&tables, arrival, to)? else {
        return Ok(NewFlow::Done);
    };
    ctx.service = frontend.service;
    ctx.frontend = frontend;
    step::select_backend(ctx)?;
    step::plan_delivery(skb, ctx)?;
    match step::insert_flow(skb, ctx)? {
        Claim::Exists => return Ok(NewFlow::LostRace),
        Claim::Inserted => {}
    }
    count::connected(ctx.service);
    let event = TraceEvent::served(EventKind::Translated, to, ctx.service, ctx.selection.backend);
    trace::packet_event(&ctx.packet, &event);
    if ctx.entry.has(ct_flags::FORWARD) {
        step::forward(skb, ctx)?;
    } else {
        deliver(skb, ctx)?;
    }
    Ok(NewFlow::Done)
}

/// Step: selects the backend of a new flow.
#[inline(always)]
fn select_backend(mut ctx: CtxRef) -> Result<(), DropReason> {
    let client = ctx.packet.src;
    let tables = MapTables {
        ctx: core::ptr::null_mut(),
    };
    let admission = decide::admit_packet(&tables, ctx.frontend, client, ctx.at_egress)?;
    ctx.selection.client_is_local = admission.client_is_local;
    ctx.selection.set = admission.set;
    let service_set = ServiceSet::new(ctx.frontend.service, admission);
    ctx.selection.backend = service_set.select(backend::random(), || Client::addr(client))?;
    Ok(())
}

/// Step: decides how packets of a new flow get to its backend, and prepares its entry.
#[inline(always)]
fn plan_delivery(skb: Skb, mut ctx: CtxRef) -> Result<(), DropReason> {
    let Selection {
        backend,
        set,
        client_is_local,
        ..
    } = ctx.selection;
    let translated = Tuple {
        dst: backend.addr,
        dst_port: backend.port,
        ..ctx.tuple()
    };
    let service = ctx.service;
    ctx.entry.begin(&translated, backend.reference, service, set, ct::now());
    let route = send::step::route(skb, ctx)?;
    let facts = Facts {
        at_egress: ctx.at_egress,
        has_next_hop: route == Route::NextHop,
        changes_device: ctx.next_hop.device != skb.ifindex(),
        backend_is_local: backend.is_local(),
        client_is_local,
    };
    let delivery = delivery::decide(facts, || device::is_bridge(skb.ifindex()))?;
    ctx.entry.flags = delivery.flags;
    ctx.selection.snat = delivery.snat;
    if delivery.snat {
        let source = device::source_address(ctx.next_hop.device, ctx.packet.src)?;
        ctx.entry.set_source(source);
    }
    Ok(())
}

/// Step: inserts both directions of a flow. The flow gets a source port of the node if its source address is the
/// node's, or if its reply tuple belongs to another flow. If another packet of the flow has inserted it concurrently,
/// nothing is inserted.
#[inline(always)]
fn insert_flow(skb: Skb, mut ctx: CtxRef) -> Result<Claim, DropReason> {
    if ctx.selection.snat || ct::step::claim_reply_direction(ctx)? == Claim::Exists {
        snat_port::claim(skb, ctx)?;
    }
    let state = tcp_state::after(0, ctx.packet.flags);
    ctx.entry.state = state;
    let claim = ct::claim(&ctx.key, &ctx.entry);
    if claim == Claim::Exists {
        ct::remove_reply_direction(&ctx.key, &ctx.entry);
    }
    Ok(claim)
}
