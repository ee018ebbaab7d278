//! The per-CPU context of the packet path, and the global functions ("steps") that the verifier checks separately.
//!
//! The verifier checks a global function (`BTF_FUNC_GLOBAL`) once and in isolation, however often it is called, and a
//! caller may rely on nothing about its result. Without these boundaries the verifier would follow every path through all
//! steps: ten times the work at every start of the agent. A global function returns a number, and takes the program's context,
//! numbers, or pointers that it has to check for null. So the steps share their state in SCRATCH.

use core::ops::{Deref, DerefMut};
use core::ptr::NonNull;

use aya_ebpf::bindings::TC_ACT_UNSPEC;
use aya_ebpf::btf_maps::PerCpuArray;
use aya_ebpf::macros::btf_map;
use lb_common::abi::{CtEntryWords, CtKeyWords, DropReason, Frontend, RejectWith, ServiceIndex, Set};
use lb_common::logic::frontend::Destination;
use lb_common::logic::packet::Packet;
use lb_common::logic::translation::Tuple;

use crate::backend::SelectedBackend;
use crate::next_hop::NextHop;

/// Scratch of the packet path: one record on each CPU. It is not pinned, and not part of the registry of maps.
#[btf_map]
static SCRATCH: PerCpuArray<PacketCtx, 1> = PerCpuArray::new();

/// A packet and the results of the steps so far: the value of SCRATCH.
pub(crate) struct PacketCtx {
    /// The packet as it arrived.
    pub(crate) packet: Packet,
    /// Length of the link-layer header.
    link_len: u8,
    pub(crate) at_egress: bool,
    /// Verdict of the program.
    pub(crate) verdict: i32,
    /// Service index; zero if no service was found.
    pub(crate) service: ServiceIndex,
    /// Maximum length of the packet, for [`DropReason::TooBig`].
    pub(crate) mtu: u32,
    /// Response to a packet that is not translated.
    pub(crate) reject_with: RejectWith,
    /// Error of the last step that failed.
    reason: DropReason,
    /// Source port at this node of the client's last flow with this tuple, if that flow is over; otherwise zero.
    pub(crate) last_port: u16,
    /// Frontend of a new flow.
    pub(crate) frontend: Frontend,
    /// Key of the packet's flow.
    pub(crate) key: CtKeyWords,
    /// Entry of the packet's flow: a copy of the one in the maps, or the one of a new flow.
    pub(crate) entry: CtEntryWords,
    /// Entry of the opposite direction that is being inserted, or of another flow that has the reply tuple of this flow.
    pub(crate) other_entry: CtEntryWords,
    /// Backend and delivery of a new flow.
    pub(crate) selection: Selection,
    /// Next hop of a packet that the program forwards.
    pub(crate) next_hop: NextHop,
}

/// The results of the steps that select the backend of a new flow and plan its delivery.
#[derive(Clone, Copy)]
pub(crate) struct Selection {
    pub(crate) backend: SelectedBackend,
    pub(crate) set: Set,
    /// The client is a pod of this node.
    pub(crate) client_is_local: bool,
    /// The source address becomes one of this node.
    pub(crate) snat: bool,
}

impl PacketCtx {
    /// Returns the destination of the packet as it arrived.
    #[inline(always)]
    pub(crate) const fn destination(&self) -> Destination {
        Destination {
            addr: self.packet.dst,
            port: self.packet.dst_port,
            proto: self.packet.proto,
        }
    }

    /// Returns the tuple of the packet as it arrived.
    #[inline(always)]
    pub(crate) const fn tuple(&self) -> Tuple {
        Tuple::of(&self.packet)
    }

    /// Returns the offset of the IP header.
    #[inline(always)]
    pub(crate) fn ip_offset(&self) -> usize {
        self.link_len.into()
    }

    /// Returns the offset of the transport header.
    #[inline(always)]
    pub(crate) fn transport_offset(&self) -> usize {
        self.ip_offset() + self.packet.ip_len()
    }
}

/// A copyable handle of this CPU's [`PacketCtx`], not a reference: every step has its own, and all change the same value.
#[derive(Clone, Copy)]
pub(crate) struct CtxRef(NonNull<PacketCtx>);

impl CtxRef {
    /// Returns this CPU's context. The kernel runs one program of a tc hook at a time on a CPU, with softirqs disabled.
    #[inline(always)]
    pub(crate) fn scratch() -> Option<Self> {
        SCRATCH.get_ptr_mut(0).and_then(NonNull::new).map(Self)
    }

    /// Starts the context of a packet. `link_len`: length of the link-layer header.
    #[inline(always)]
    pub(crate) fn begin(packet: Packet, link_len: usize, at_egress: bool) -> Option<Self> {
        let mut ctx = Self::scratch()?;
        ctx.packet = packet;
        ctx.link_len = link_len as u8;
        ctx.at_egress = at_egress;
        ctx.verdict = TC_ACT_UNSPEC;
        ctx.service = ServiceIndex::NONE;
        ctx.last_port = 0;
        ctx.key = CtKeyWords::new(&ctx.tuple(), packet.proto);
        Some(ctx)
    }

    /// Runs a step, and returns the number that its global function returns.
    #[inline(always)]
    pub(crate) fn enter<T: StepResult>(step: impl FnOnce(Self) -> Result<T, DropReason>) -> u32 {
        let Some(mut ctx) = Self::scratch() else {
            return FAILED;
        };
        match step(ctx) {
            Ok(result) => result.to_number(),
            Err(reason) => {
                ctx.reason = reason;
                FAILED
            }
        }
    }

    /// Returns the result of a step, from the number that its global function returned.
    #[inline(always)]
    pub(crate) fn leave<T: StepResult>(self, number: u32) -> Result<T, DropReason> {
        T::from_number(number).ok_or(self.reason)
    }
}

/// The number of every step that failed. The error is in [`PacketCtx::reason`].
const FAILED: u32 = 2;

impl Deref for CtxRef {
    type Target = PacketCtx;

    #[inline(always)]
    fn deref(&self) -> &PacketCtx {
        // SAFETY: the pointer is to the value of SCRATCH, which no other program uses while this one runs. Zero bytes, the
        // value's first content, are valid for every field. A reference borrows `self`, and a step gets a copy of it, so
        // none is alive while a step changes the value.
        unsafe { self.0.as_ref() }
    }
}

impl DerefMut for CtxRef {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut PacketCtx {
        // SAFETY: the pointer is to the value of SCRATCH, which no other program uses while this one runs. The reference
        // borrows `self` mutably, and steps, the only holders of copies, have returned or wait for this one.
        unsafe { self.0.as_mut() }
    }
}

/// The result of a step, as a number that a global function can return.
pub(crate) trait StepResult: Sized {
    /// Returns the number of the result. It is not [`FAILED`].
    fn to_number(self) -> u32;
    /// Returns the result with a number; `None` for every other number, since the verifier assumes nothing about it.
    fn from_number(number: u32) -> Option<Self>;
}

impl StepResult for () {
    #[inline(always)]
    fn to_number(self) -> u32 {
        0
    }

    #[inline(always)]
    fn from_number(number: u32) -> Option<()> {
        (number == 0).then_some(())
    }
}

/// Defines an enum of two outcomes that a step returns.
macro_rules! outcome {
    ($(#[$doc:meta])* $vis:vis enum $name:ident {
        $(#[$first_doc:meta])* $first:ident, $(#[$second_doc:meta])* $second:ident,
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq)]
        $vis enum $name {
            $(#[$first_doc])* $first,
            $(#[$second_doc])* $second,
        }

        impl $crate::packet_ctx::StepResult for $name {
            #[inline(always)]
            fn to_number(self) -> u32 {
                self as u32
            }

            #[inline(always)]
            fn from_number(number: u32) -> Option<Self> {
                match number {
                    0 => Some(Self::$first),
                    1 => Some(Self::$second),
                    _ => None,
                }
            }
        }
    };
}

/// Defines the module `step` with the global function of each step. A step is a function of the surrounding module with
/// the packet and the context, or the context alone, as arguments. An unused packet must not be passed: the verifier
/// rejects a global function with an argument that has no type that it can check.
///
/// `step::select_backend(ctx)` calls the global function; a direct call of `select_backend(ctx)` would compile the step into its caller.
macro_rules! steps {
    ($($vis:vis fn $name:ident($($arg:ident),+) -> $result:tt;)*) => {
        pub(crate) mod step {
            $($crate::packet_ctx::step! { $vis fn $name($($arg),+) -> $result; })*
        }
    };
}

/// Defines the global function of one step; see [`steps`].
macro_rules! step {
    ($vis:vis fn $name:ident(skb, ctx) -> $result:tt;) => {
        #[inline(always)]
        $vis fn $name(
            skb: $crate::skb::Skb,
            ctx: $crate::packet_ctx::CtxRef,
        ) -> Result<$crate::packet_ctx::step_result!($result), lb_common::abi::DropReason> {
            #[unsafe(export_name = concat!("lb_step_", stringify!($name)))]
            #[inline(never)]
            extern "C" fn $name(skb: *mut aya_ebpf::bindings::__sk_buff) -> u32 {
                $crate::packet_ctx::CtxRef::enter(
                    #[inline(always)]
                    |ctx| super::$name($crate::skb::Skb::new(skb), ctx),
                )
            }
            ctx.leave($name(skb.as_ptr()))
        }
    };
    ($vis:vis fn $name:ident(ctx) -> $result:tt;) => {
        #[inline(always)]
        $vis fn $name(
            ctx: $crate::packet_ctx::CtxRef,
        ) -> Result<$crate::packet_ctx::step_result!($result), lb_common::abi::DropReason> {
            #[unsafe(export_name = concat!("lb_step_", stringify!($name)))]
            #[inline(never)]
            extern "C" fn $name() -> u32 {
                $crate::packet_ctx::CtxRef::enter(
                    #[inline(always)]
                    |ctx| super::$name(ctx),
                )
            }
            ctx.leave($name())
        }
    };
}

/// The type of a step's result, as the module `step` refers to it.
macro_rules! step_result {
    (()) => {
        ()
    };
    ($result:ident) => {
        super::$result
    };
}

pub(crate) use {outcome, step, step_result, steps};
