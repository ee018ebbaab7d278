//! What the packet path works with, and how it is cut into steps.
//!
//! A step is a global function (`BTF_FUNC_GLOBAL`): the verifier looks at each once and by itself, whoever calls it and
//! however often, and for a caller its result is any number. Else it would follow every path through all of them, ten times
//! the ctx at every start of the agent. All that steps share stands in SCRATCH, since such a function is given nothing
//! but numbers and the context.

use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use lb_common::abi::{DropReason, Frontend};
use lb_common::logic::connect::Set;
use lb_common::logic::packet::Packet;
use lb_common::logic::route::Destination;
use lb_common::logic::translation::{RejectWith, Tuple};

use crate::backend::Choice;
use crate::ct::{Entry, Key};
use crate::maps::SCRATCH;
use crate::send::Hop;

/// What a step says, or why the packet is not translated.
pub(crate) type Result = core::result::Result<bool, DropReason>;

/// A packet, and what came of it so far.
pub(crate) struct PacketCtx {
    pub(crate) packet: Packet,
    /// Length of the link layer's header.
    link: u8,
    pub(crate) at_egress: bool,
    /// What the kernel is told.
    pub(crate) verdict: i32,
    /// Zero where no service was found.
    pub(crate) service: u32,
    /// How long a packet may be, for [`DropReason::TooBig`].
    pub(crate) mtu: u32,
    /// What to answer, where it is refused.
    pub(crate) answer: RejectWith,
    /// Why the last step failed, if it did.
    reason: DropReason,
    /// The source port that the client's last flow like this one had behind this node, where it is over; zero else.
    pub(crate) last_port: u16,
    /// What a new flow asks for.
    pub(crate) frontend: Frontend,
    pub(crate) key: Key,
    pub(crate) entry: Entry,
    /// That of another flow, which is in the way of this one.
    pub(crate) other: Entry,
    pub(crate) chosen: Chosen,
    pub(crate) hop: Hop,
}

/// What a new flow gets.
#[derive(Clone, Copy)]
pub(crate) struct Chosen {
    pub(crate) backend: Choice,
    pub(crate) set: Set,
    /// The client is a pod of this node.
    pub(crate) here: bool,
    /// The source becomes this node's.
    pub(crate) snat: bool,
}

impl PacketCtx {
    #[inline(always)]
    pub(crate) const fn destination(&self) -> Destination {
        Destination {
            addr: self.packet.dst,
            port: self.packet.dst_port,
            proto: self.packet.proto,
        }
    }

    #[inline(always)]
    pub(crate) const fn is(&self) -> Tuple {
        Tuple::of(&self.packet)
    }

    /// Offset of the IP header.
    #[inline(always)]
    pub(crate) fn ip(&self) -> usize {
        self.link.into()
    }

    /// Offset of the transport header.
    #[inline(always)]
    pub(crate) fn transport(&self) -> usize {
        self.ip() + self.packet.ip_len()
    }
}

/// This CPU's [`PacketCtx`]. A handle and no reference: each step has its own, and changes what its caller sees.
#[derive(Clone, Copy)]
pub(crate) struct CtxRef(NonNull<PacketCtx>);

impl CtxRef {
    /// The kernel runs one program at a tc hook at a time on a CPU, with softirqs off.
    #[inline(always)]
    fn here() -> Option<Self> {
        SCRATCH.get_ptr_mut(0).and_then(NonNull::new).map(Self)
    }

    /// Of a packet.
    #[inline(always)]
    pub(crate) fn begin(packet: Packet, link: usize, at_egress: bool) -> Option<Self> {
        let mut ctx = Self::here()?;
        ctx.packet = packet;
        ctx.link = link as u8;
        ctx.at_egress = at_egress;
        ctx.verdict = TC_ACT_UNSPEC;
        ctx.service = 0;
        ctx.last_port = 0;
        ctx.key = Key::new(&ctx.is(), packet.proto);
        Some(ctx)
    }

    /// Does a step; what a global function returns.
    #[inline(always)]
    pub(crate) fn enter(step: impl FnOnce(Self) -> Result) -> u32 {
        let Some(mut ctx) = Self::here() else {
            return FAILED;
        };
        match step(ctx) {
            Ok(result) => result.into(),
            Err(reason) => {
                ctx.reason = reason;
                FAILED
            }
        }
    }

    /// What a step came to.
    #[inline(always)]
    pub(crate) fn leave(self, result: u32) -> Result {
        match result {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(self.reason),
        }
    }
}

const FAILED: u32 = 2;

impl Deref for CtxRef {
    type Target = PacketCtx;

    #[inline(always)]
    fn deref(&self) -> &PacketCtx {
        // SAFETY: a value of the map, of which zero bytes are one. No reference lives on while a step runs: they are of
        // `self`'s life, and steps are given copies.
        unsafe { self.0.as_ref() }
    }
}

impl DerefMut for CtxRef {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut PacketCtx {
        // SAFETY: as above.
        unsafe { self.0.as_mut() }
    }
}

/// Makes a step of a function of packet and [`CtxRef`], or of [`CtxRef`] alone: what is not used is not passed, and the
/// verifier would miss it.
macro_rules! step {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($skb:ident, $ctx:pat_param) $body:block) => {
        $(#[$doc])*
        #[inline(always)]
        $vis fn $name(skb: $crate::skb::Skb, ctx: $crate::packet_ctx::CtxRef) -> $crate::packet_ctx::Result {
            #[unsafe(export_name = concat!("lb_step_", stringify!($name)))]
            #[inline(never)]
            extern "C" fn $name(skb: *mut aya_ebpf::bindings::__sk_buff) -> u32 {
                $crate::packet_ctx::CtxRef::enter(
                    #[inline(always)]
                    |$ctx| {
                        let $skb = $crate::skb::Skb::new(skb);
                        $body
                    },
                )
            }
            ctx.leave($name(skb.as_ptr()))
        }
    };
    ($(#[$doc:meta])* $vis:vis fn $name:ident($ctx:pat_param) $body:block) => {
        $(#[$doc])*
        #[inline(always)]
        $vis fn $name(ctx: $crate::packet_ctx::CtxRef) -> $crate::packet_ctx::Result {
            #[unsafe(export_name = concat!("lb_step_", stringify!($name)))]
            #[inline(never)]
            extern "C" fn $name() -> u32 {
                $crate::packet_ctx::CtxRef::enter(
                    #[inline(always)]
                    |$ctx| $body,
                )
            }
            ctx.leave($name())
        }
    };
}

pub(crate) use step;
