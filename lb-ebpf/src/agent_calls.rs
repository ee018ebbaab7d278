//! Agent calls: XDP programs that the agent runs by `BPF_PROG_TEST_RUN` and never attaches.

use aya_ebpf::bindings::xdp_action::{XDP_ABORTED, XDP_DROP, XDP_PASS};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use lb_common::abi::{DeviceSwap, DropReason, Event, FrontendSwap};

use crate::atomic::Shared;
use crate::maps::{DEVICES, EVENTS, FRONTENDS};
use crate::{count, device};

/// Stores a new value in an existing entry of FRONTENDS, in place and with one 8-byte store. Never attached: the agent
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
    // SAFETY: the bounds were checked, and every bit pattern is a `FrontendSwap`; packet data is not aligned.
    let request = unsafe { request.read_unaligned() };
    let Some(value) = FRONTENDS.get_ptr_mut(request.key) else {
        return XDP_DROP;
    };
    // SAFETY: the pointer is to a value of the map, which has 8 bytes and is aligned to 8 bytes.
    let value = unsafe { Shared::new(value.cast::<u64>()) };
    value.exchange(request.value);
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
