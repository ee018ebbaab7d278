//! Hooks on packets: tc ingress and egress.

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;

/// What came in by a device with a link layer.
#[classifier]
pub(crate) fn lb_ingress(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

/// What goes out by such a device.
#[classifier]
pub(crate) fn lb_egress(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

/// What came in by a device without a link layer.
#[classifier]
pub(crate) fn lb_ingress_l3(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}

/// What goes out by such a device.
#[classifier]
pub(crate) fn lb_egress_l3(_ctx: TcContext) -> i32 {
    TC_ACT_UNSPEC
}
