//! CT and CT_NEW: flows of packets.

use core::ptr;

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use lb_common::abi::{CtEntry, CtKey, DropReason, ct_flags};
use lb_common::logic::connect::Set;
use lb_common::logic::ct::Phase;
use lb_common::logic::idle;
use lb_common::logic::ip128::Ip128;
use lb_common::logic::tcp_state;
use lb_common::logic::translation::{Tuple, opposite};

use crate::backend::Choice;
use crate::maps::{CT, CT_NEW};
use crate::packet_ctx::{PacketCtx, step};
use crate::volatile;

/// A [`CtKey`] in memory: what packets of one direction of a flow are.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Key {
    src: [u64; 2],
    dst: [u64; 2],
    src_port: u16,
    dst_port: u16,
    /// The protocol, and zeros.
    rest: u32,
}

const _: () = assert!(size_of::<Key>() == size_of::<CtKey>());

impl Key {
    #[inline(always)]
    pub(crate) fn new(tuple: &Tuple, proto: u8) -> Self {
        Self {
            src: tuple.src.0,
            dst: tuple.dst.0,
            src_port: tuple.src_port,
            dst_port: tuple.dst_port,
            rest: u32::from_ne_bytes([proto, 0, 0, 0]),
        }
    }

    #[inline(always)]
    fn tuple(&self) -> Tuple {
        Tuple {
            src: Ip128(self.src),
            dst: Ip128(self.dst),
            src_port: self.src_port,
            dst_port: self.dst_port,
        }
    }

    /// IANA protocol number.
    #[inline(always)]
    pub(crate) fn proto(&self) -> u8 {
        self.rest.to_ne_bytes()[0]
    }

    #[inline(always)]
    fn as_key(&self) -> &CtKey {
        // SAFETY: same size, no less aligned, the fields are where the key's are, and every bit pattern is a key.
        unsafe { &*ptr::from_ref(self).cast::<CtKey>() }
    }
}

/// A [`CtEntry`] in memory: what they become.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Entry {
    src: [u64; 2],
    dst: [u64; 2],
    pub(crate) src_port: u16,
    dst_port: u16,
    pub(crate) backend: u32,
    pub(crate) generation: u32,
    pub(crate) service: u32,
    seen: u64,
    flags: u16,
    state: u8,
    set: u8,
    pad: u32,
}

const _: () = assert!(size_of::<Entry>() == size_of::<CtEntry>());

impl Entry {
    /// Of a new flow.
    #[inline(always)]
    pub(crate) fn new(to: &Tuple, choice: Choice, service: u32, set: Set) -> Self {
        Self {
            src: to.src.0,
            dst: to.dst.0,
            src_port: to.src_port,
            dst_port: to.dst_port,
            backend: choice.backend,
            generation: choice.generation,
            service,
            seen: now(),
            flags: 0,
            state: 0,
            set: set as u8,
            pad: 0,
        }
    }

    /// What a packet becomes.
    #[inline(always)]
    pub(crate) fn to(&self) -> Tuple {
        Tuple {
            src: Ip128(self.src),
            dst: Ip128(self.dst),
            src_port: self.src_port,
            dst_port: self.dst_port,
        }
    }

    #[inline(always)]
    pub(crate) fn set_source(&mut self, addr: Ip128) {
        self.src = addr.0;
    }

    /// How packets from client to backend go: [`ct_flags`].
    #[inline(always)]
    pub(crate) fn set_way(&mut self, way: u16) {
        self.flags = way;
    }

    #[inline(always)]
    pub(crate) fn set_state(&mut self, state: u8) {
        self.state = state;
    }

    #[inline(always)]
    pub(crate) fn set(&self) -> Option<Set> {
        Set::from_u8(self.set)
    }

    #[inline(always)]
    pub(crate) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Whether the packet loses one of its time to live, as on every hop: what is sent on at ingress, and what is received
    /// once more. So none goes round for ever, whatever Services have for backends.
    #[inline(always)]
    pub(crate) fn is_hop(&self) -> bool {
        self.has(ct_flags::FORWARD | ct_flags::AGAIN) && !self.has(ct_flags::EGRESS)
    }

    /// What the packets of the other direction are.
    #[inline(always)]
    pub(crate) fn other_key(&self, key: &Key) -> Key {
        Key::new(&self.to().reversed(), key.proto())
    }

    /// What the packets of the other direction become; `key` is what those of this one are.
    #[inline(always)]
    fn other(&self, key: &Key) -> Self {
        let to = key.tuple().reversed();
        Self {
            src: to.src.0,
            dst: to.dst.0,
            src_port: to.src_port,
            dst_port: to.dst_port,
            flags: opposite(self.flags),
            state: 0,
            ..*self
        }
    }

    #[inline(always)]
    fn as_entry(&self) -> &CtEntry {
        // SAFETY: same size and alignment, the fields are where the entry's are, and every bit pattern is one.
        unsafe { &*ptr::from_ref(self).cast::<CtEntry>() }
    }
}

/// The entry of a packet.
pub(crate) struct CtLookup {
    at: *mut CtEntry,
    /// It stands in CT_NEW.
    pub(crate) is_new: bool,
}

impl CtLookup {
    #[inline(always)]
    pub(crate) fn of(key: &Key) -> Option<Self> {
        if let Some(at) = CT.get_ptr_mut(key.as_key()) {
            return Some(Self { at, is_new: false });
        }
        CT_NEW.get_ptr_mut(key.as_key()).map(|at| Self { at, is_new: true })
    }

    /// Copies what is there.
    #[inline(always)]
    pub(crate) fn read(&self, to: &mut Entry) {
        // SAFETY: the pointer is to a value of the map, which is as long and as aligned. What does not change of an entry
        // changes only where the element is used again; who reads that of another flow then sends one packet astray, which
        // no checksum of a connection takes for its own.
        unsafe { volatile::copy(self.at.cast::<Entry>(), to) }
    }

    #[inline(always)]
    pub(crate) fn state(&self) -> u8 {
        // SAFETY: the pointer is to a value of the map.
        unsafe { (&raw const (*self.at).state).read_volatile() }
    }

    /// A packet has come: says when, at most once a second, and what it says of the connection.
    #[inline(always)]
    pub(crate) fn touch(&self, flags: u8, is_tcp: bool) {
        let now = now();
        // SAFETY: as above; programs on other CPUs write the same, or a little older.
        unsafe {
            if idle::is_to_refresh((&raw const (*self.at).seen).read_volatile(), now) {
                (&raw mut (*self.at).seen).write_volatile(now);
            }
            let state = self.state();
            let after = if is_tcp { tcp_state::after(state, flags) } else { state };
            if after != state {
                (&raw mut (*self.at).state).write_volatile(after);
            }
        }
    }
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: the helper takes nothing.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// Whether packets like these belong to a flow.
#[inline(always)]
fn is_taken(key: &Key) -> bool {
    CT.get_ptr(key.as_key()).is_some() || CT_NEW.get_ptr(key.as_key()).is_some()
}

/// Puts a direction of a new flow into CT_NEW. False where there is one already.
#[inline(always)]
pub(crate) fn claim(key: &Key, entry: &Entry) -> bool {
    CT_NEW
        .insert(key.as_key(), entry.as_entry(), u64::from(BPF_NOEXIST))
        .is_ok()
}

step! {
    /// The same with the direction of the answers. False where answers like those already belong to a flow.
    pub(crate) fn claim_answers(ctx) {
        let PacketCtx { key, entry, .. } = &*ctx;
        let other_key = entry.other_key(key);
        Ok(!is_taken(&other_key) && claim(&other_key, &entry.other(key)))
    }
}

step! {
    /// Forgets the flow that has the answers which this one would have, if both of its sides have said that they send no
    /// more. One that was reset stays: anybody may have sent that. False where it stays.
    pub(crate) fn replace_closed(mut ctx) {
        let other_key = ctx.entry.other_key(&ctx.key);
        let Some(found) = CtLookup::of(&other_key) else {
            return Ok(true);
        };
        found.read(&mut ctx.other);
        let other = &ctx.other;
        let is_closed = Phase::of(true, [found.state(), other_state(&other_key, other)]) == Phase::Closed;
        if is_closed {
            forget(&other_key, other);
        }
        Ok(is_closed)
    }
}

/// Forgets both directions.
#[inline(never)]
pub(crate) fn forget(key: &Key, entry: &Entry) {
    let other_key = entry.other_key(key);
    for key in [key, &other_key] {
        let _ = CT.remove(key.as_key());
        let _ = CT_NEW.remove(key.as_key());
    }
}

/// Forgets the answers to a flow that is not to be.
#[inline(never)]
pub(crate) fn forget_answers(key: &Key, entry: &Entry) {
    let _ = CT_NEW.remove(entry.other_key(key).as_key());
}

/// The state of the other direction; zero where it is not known.
#[inline(never)]
pub(crate) fn other_state(key: &Key, entry: &Entry) -> u8 {
    CtLookup::of(&entry.other_key(key)).map_or(0, |other| other.state())
}

step! {
    /// Moves both directions of a flow to CT.
    ///
    /// # Errors
    /// [`DropReason::ConntrackFull`]; both stay where they are.
    pub(crate) fn establish(mut ctx) {
        ctx.entry.seen = now();
        ctx.entry.state = tcp_state::after(ctx.entry.state, ctx.packet.flags);
        let PacketCtx { key, entry, .. } = &*ctx;
        let other_key = entry.other_key(key);
        let mut other = entry.other(key);
        if let Some(at) = CT_NEW.get_ptr(other_key.as_key()) {
            // SAFETY: the pointer is to a value of the map.
            other.state = unsafe { (&raw const (*at).state).read_volatile() };
        }
        // Who finds one direction in CT must find the other.
        if !keep(&other_key, &other) || !keep(key, entry) {
            let _ = CT.remove(other_key.as_key());
            return Err(DropReason::ConntrackFull);
        }
        let _ = CT_NEW.remove(key.as_key());
        let _ = CT_NEW.remove(other_key.as_key());
        Ok(true)
    }
}

/// Puts a direction into CT, unless it is there.
#[inline(always)]
fn keep(key: &Key, entry: &Entry) -> bool {
    match CT.insert(key.as_key(), entry.as_entry(), u64::from(BPF_NOEXIST)) {
        Ok(()) => true,
        Err(error) => error == EEXIST,
    }
}

const EEXIST: i32 = -17;
