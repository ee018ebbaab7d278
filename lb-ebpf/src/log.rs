//! Log lines of the programs, for `lb-agent run --ebpf-log`.
//!
//! The loader sets `AYA_LOG_LEVEL`, a constant for the verifier. With a level below that of a line, the verifier removes
//! the call and the code of the line. Each line is a global function of its own: the verifier checks it once, and its stack
//! frame adds to that of its caller only. Such a function takes at most five numbers, so lines of sockets get their values
//! packed, and lines of packets read the packet's context.

use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_log_ebpf::macro_support::{Level, level_enabled};
use aya_log_ebpf::{debug, warn};
use lb_common::abi::{DropReason, ServiceIndex};
use lb_common::logic::frontend::Destination;
use lb_common::logic::ip128::Ip128;
use lb_common::logic::log::{Decision, Hook};

use crate::packet_ctx::CtxRef;

/// The values of a socket's line that fit into one number.
#[derive(Clone, Copy)]
struct Packed(u64);

impl Packed {
    #[inline(always)]
    fn new(hook: Hook, to: Destination, other_port: u16) -> Self {
        let ([a, b], [c, d]) = (to.port.to_ne_bytes(), other_port.to_ne_bytes());
        Self(u64::from_ne_bytes([a, b, c, d, to.proto, hook as u8, 0, 0]))
    }

    #[inline(always)]
    fn port(self) -> u16 {
        let [a, b, ..] = self.0.to_ne_bytes();
        u16::from_ne_bytes([a, b])
    }

    #[inline(always)]
    fn other_port(self) -> u16 {
        let [_, _, c, d, ..] = self.0.to_ne_bytes();
        u16::from_ne_bytes([c, d])
    }

    #[inline(always)]
    fn proto(self) -> u8 {
        self.0.to_ne_bytes()[4]
    }

    #[inline(always)]
    fn hook(self) -> u8 {
        self.0.to_ne_bytes()[5]
    }
}

#[inline(always)]
fn bytes(addr: Ip128) -> [u8; 16] {
    let ([a, b, c, d, e, f, g, h], [i, j, k, l, m, n, o, p]) = (addr.0[0].to_ne_bytes(), addr.0[1].to_ne_bytes());
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
}

#[inline(always)]
fn pid() -> u32 {
    (bpf_get_current_pid_tgid() >> 32) as u32
}

/// Returns whether any line is logged.
#[inline(always)]
pub(crate) fn is_on() -> bool {
    level_enabled(Level::Warn)
}

/// Logs that a hook has replaced the address and port of a socket's call.
#[inline(always)]
pub(crate) fn socket_translated(hook: Hook, from: Destination, addr: Ip128, port: u16) {
    if level_enabled(Level::Debug) {
        let Ip128([a, b]) = from.addr;
        let Ip128([c, d]) = addr;
        lb_log_socket_translated(a, b, Packed::new(hook, from, port).0, c, d);
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn lb_log_socket_translated(a: u64, b: u64, packed: u64, c: u64, d: u64) -> u32 {
    let packed = Packed(packed);
    debug!(
        &(),
        "hook#{} proto#{} pid {} [{:i}]:{} => [{:i}]:{}",
        packed.hook(),
        packed.proto(),
        pid(),
        bytes(Ip128([a, b])),
        packed.port(),
        bytes(Ip128([c, d])),
        packed.other_port()
    );
    0
}

/// Logs that a hook has refused a socket's call.
#[inline(always)]
pub(crate) fn socket_refused(hook: Hook, to: Destination, service: ServiceIndex, reason: DropReason) {
    if level_enabled(Level::Warn) {
        let Ip128([a, b]) = to.addr;
        lb_log_socket_refused(a, b, Packed::new(hook, to, 0).0, service.get(), reason as u32);
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn lb_log_socket_refused(a: u64, b: u64, packed: u64, service: u32, reason: u32) -> u32 {
    let packed = Packed(packed);
    warn!(
        &(),
        "hook#{} proto#{} pid {} [{:i}]:{} service {} refused reason#{}",
        packed.hook(),
        packed.proto(),
        pid(),
        bytes(Ip128([a, b])),
        packed.port(),
        service,
        reason
    );
    0
}

#[inline(always)]
fn hook(at_egress: bool) -> u8 {
    if at_egress {
        Hook::Egress as u8
    } else {
        Hook::Ingress as u8
    }
}

/// Logs that a packet was translated, if it was.
#[inline(always)]
pub(crate) fn packet_translated(ctx: CtxRef, decision: impl FnOnce() -> Decision) {
    if level_enabled(Level::Debug) && !ctx.service.is_none() {
        lb_log_packet_translated(decision() as u32);
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn lb_log_packet_translated(decision: u32) -> u32 {
    let Some(ctx) = CtxRef::scratch() else { return 0 };
    let (from, to) = (ctx.tuple(), ctx.entry.translated());
    debug!(
        &(),
        "hook#{} proto#{} [{:i}]:{} > [{:i}]:{} decision#{} service {} => [{:i}]:{} > [{:i}]:{}",
        hook(ctx.at_egress),
        ctx.packet.proto,
        bytes(from.src),
        from.src_port,
        bytes(from.dst),
        from.dst_port,
        decision,
        ctx.service.get(),
        bytes(to.src),
        to.src_port,
        bytes(to.dst),
        to.dst_port
    );
    0
}

/// Logs that a packet was not translated.
#[inline(always)]
pub(crate) fn packet_rejected(reason: DropReason) {
    if level_enabled(Level::Warn) {
        lb_log_packet_rejected(reason as u32);
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn lb_log_packet_rejected(reason: u32) -> u32 {
    let Some(ctx) = CtxRef::scratch() else { return 0 };
    let from = ctx.tuple();
    warn!(
        &(),
        "hook#{} proto#{} [{:i}]:{} > [{:i}]:{} service {} rejected reason#{}",
        hook(ctx.at_egress),
        ctx.packet.proto,
        bytes(from.src),
        from.src_port,
        bytes(from.dst),
        from.dst_port,
        ctx.service.get(),
        reason
    );
    0
}
