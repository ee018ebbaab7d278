//! Agent calls: XDP programs that the agent runs by `BPF_PROG_TEST_RUN` and never attaches.

use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use lb_common::abi::{DeviceSwap, DropReason, Event, FrontendSwap, MoveItem, MoveRequest};

use crate::atomic::Shared;
use crate::maps::{DEVICES, EVENTS, FRONTENDS};
use crate::{backend, count, ct, device, sockets, udp_dests};

/// Stores a new value in an existing entry of FRONTENDS, in place and with two 8-byte stores. Never attached: the agent
/// runs it by `BPF_PROG_TEST_RUN` with a [`FrontendSwap`] as packet.
///
/// Returns `XDP_PASS` if the value was stored, `XDP_DROP` if there is no such entry, and `XDP_ABORTED` if the packet is
/// too short.
#[xdp]
pub(crate) fn lb_frontend_swap(ctx: XdpContext) -> u32 {
    let at = ctx.data();
    if at + size_of::<FrontendSwap>() > ctx.data_end() {
        return XDP_ABORTED;
    }
    let request = at as *const FrontendSwap;
    // SAFETY: the bounds were checked, and every bit pattern is a `FrontendSwap`. `BPF_PROG_TEST_RUN` aligns the packet: it begins 256
    // bytes behind the start of an allocation (`bpf_prog_test_run_xdp`, XDP_PACKET_HEADROOM).
    let request = unsafe { request.read() };
    let Some(value) = FRONTENDS.get_ptr_mut(request.key) else {
        return XDP_DROP;
    };
    let words = value.cast::<u64>();
    // SAFETY: the pointer is to a value of the map, which is two words and is aligned to 8 bytes.
    let (first, second) = unsafe { (Shared::new(words), Shared::new(words.add(1))) };
    let [service, set] = request.value;
    first.exchange(service);
    second.exchange(set);
    XDP_PASS
}

/// Replaces the value of an existing entry of DEVICES in place. Never attached: the agent runs it by `BPF_PROG_TEST_RUN`
/// with a [`DeviceSwap`] as packet.
///
/// Returns `XDP_PASS` if the value was replaced, `XDP_DROP` if there is no such entry, and `XDP_ABORTED` if the packet is
/// too short.
#[xdp]
pub(crate) fn lb_device_swap(ctx: XdpContext) -> u32 {
    let at = ctx.data();
    if at + size_of::<DeviceSwap>() > ctx.data_end() {
        return XDP_ABORTED;
    }
    let request = at as *const DeviceSwap;
    // SAFETY: the bounds were checked, and every bit pattern is a `DeviceSwap`; packet data is not aligned.
    let index = unsafe { (&raw const (*request).index).read_unaligned() };
    let Some(entry) = DEVICES.get_ptr_mut(index) else {
        return XDP_DROP;
    };
    // SAFETY: the pointer is to a value of the map, the bounds of the request were checked, and only the agent that holds
    // the lock of the pin path runs this program.
    unsafe { device::replace(entry, &raw const (*request).value) };
    XDP_PASS
}

/// Writes a trace event of the agent to EVENTS. Never attached: the agent runs it by `BPF_PROG_TEST_RUN` with an
/// [`Event`] as packet, since user space cannot write to a ring buffer.
///
/// Returns `XDP_PASS` if the event was written, `XDP_DROP` if the buffer has no room (counted as
/// [`DropReason::EventLost`]), and `XDP_ABORTED` if the packet is too short.
#[xdp]
pub(crate) fn lb_event(ctx: XdpContext) -> u32 {
    let at = ctx.data();
    if at + size_of::<Event>() > ctx.data_end() {
        return XDP_ABORTED;
    }
    let Some(mut entry) = EVENTS.reserve(0) else {
        count::dropped(DropReason::EventLost);
        return XDP_DROP;
    };
    // SAFETY: the bounds were checked, and every bit pattern is an `Event`; packet data is not aligned.
    unsafe {
        let event = (at as *const Event).read_unaligned();
        entry.as_mut_ptr().write(event);
    }
    entry.submit(0);
    XDP_PASS
}

/// Copies an entry from an old map to the new one during a move. Never attached: the agent runs it by `BPF_PROG_TEST_RUN`
/// with a [`MoveRequest`] as packet.
///
/// Returns `XDP_PASS` if nothing of the entry is left to be copied, `XDP_DROP` if the new map has no room for it, and
/// `XDP_ABORTED` if the packet is too short, the item is unknown, or this object is not the one for moves.
#[xdp]
pub(crate) fn lb_move(ctx: XdpContext) -> u32 {
    let at = ctx.data();
    if !cfg!(feature = "moving") || at + size_of::<MoveRequest>() > ctx.data_end() {
        return XDP_ABORTED;
    }
    // SAFETY: the bounds were checked, and every bit pattern is a `MoveRequest`; packet data is not aligned.
    let request = unsafe { (at as *const MoveRequest).read_unaligned() };
    let Some(item) = MoveItem::from_u32(request.item) else {
        return XDP_ABORTED;
    };
    let [service, connections, refused, ..] = request.key;
    let done = match item {
        MoveItem::Ct => ct::copy_established(request.ct_key()),
        MoveItem::CtNew => ct::copy_unreplied(request.ct_key()),
        MoveItem::Affinity => backend::copy_affinity(&request.affinity_key()),
        MoveItem::Socket => sockets::copy_record(request.key[0]),
        MoveItem::MptcpSocket => sockets::copy_record_by_key(request.key[0]),
        MoveItem::UdpDests => udp_dests::copy(request.key[0]),
        MoveItem::LateUdpDests => udp_dests::copy_late(request.key[0]),
        MoveItem::Counters => count::add_old(service as u32, connections, refused),
        MoveItem::Drops => count::add_old_drops(request.key[0] as u32, request.key[1]),
    };
    if done { XDP_PASS } else { XDP_DROP }
}
