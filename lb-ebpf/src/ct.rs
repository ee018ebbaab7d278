//! CT and CT_NEW: the flows of the packet path.

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use lb_common::abi::{CtEntry, CtEntryWords, CtKeyWords, DropReason};
use lb_common::errno::EEXIST;
use lb_common::logic::ct::Phase;
use lb_common::logic::idle;
use lb_common::logic::tcp_state;

use crate::maps::{CT, CT_NEW};
use crate::packet_ctx::{CtxRef, PacketCtx, outcome, steps};
use crate::volatile::{self, read_once, write_once};

outcome! {
    /// The insertion of a direction of a flow.
    pub(crate) enum Claim {
        /// The direction was inserted.
        First,
        /// Its tuple belongs to a flow already; nothing was inserted.
        Lost,
    }
}

outcome! {
    /// The replacement of a flow by another one.
    pub(crate) enum Replace {
        /// The tuple is free.
        Free,
        /// The tuple belongs to a flow that has not ended.
        InUse,
    }
}

steps! {
    pub(crate) fn claim_replies(ctx) -> Claim;
    pub(crate) fn replace_closed(ctx) -> Replace;
    pub(crate) fn establish(ctx) -> ();
}

/// The entry that a lookup found.
pub(crate) struct CtLookup {
    at: *mut CtEntry,
    /// The entry is in CT_NEW.
    pub(crate) is_unreplied: bool,
}

impl CtLookup {
    /// Looks a key up in CT, then in CT_NEW.
    #[inline(always)]
    pub(crate) fn of(key: &CtKeyWords) -> Option<Self> {
        if let Some(at) = CT.get_ptr_mut(key.as_key()) {
            return Some(Self {
                at,
                is_unreplied: false,
            });
        }
        CT_NEW
            .get_ptr_mut(key.as_key())
            .map(|at| Self { at, is_unreplied: true })
    }

    /// Copies the entry.
    #[inline(always)]
    pub(crate) fn read(&self, to: &mut CtEntryWords) {
        // SAFETY: the pointer is to a value of the map, which has the size and alignment of a `CtEntryWords`. The fields that do
        // not change during a flow change if the kernel reuses the element for another key. A program that reads such a
        // mixture sends one packet to a wrong destination, and no connection there accepts its checksum.
        unsafe { volatile::copy(self.at.cast::<CtEntryWords>(), to) }
    }

    #[inline(always)]
    pub(crate) fn state(&self) -> u8 {
        // SAFETY: the pointer is to a value of the map, and a `u8` needs no alignment.
        unsafe { read_once!((*self.at).state) }
    }

    /// Records a packet: its time, at most once a second, and the TCP flags of a segment.
    #[inline(always)]
    pub(crate) fn touch(&self, flags: u8, is_tcp: bool) {
        let now = now();
        // SAFETY: the pointer is to a value of the map. Programs on other CPUs write the same values, or slightly older ones.
        unsafe {
            if idle::is_to_refresh(read_once!((*self.at).seen), now) {
                write_once!((*self.at).seen, now);
            }
            let state = self.state();
            let after = if is_tcp { tcp_state::after(state, flags) } else { state };
            if after != state {
                write_once!((*self.at).state, after);
            }
        }
    }
}

#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: the helper has no arguments.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// Returns whether a tuple belongs to a flow.
#[inline(always)]
fn is_taken(key: &CtKeyWords) -> bool {
    CT.get_ptr(key.as_key()).is_some() || CT_NEW.get_ptr(key.as_key()).is_some()
}

/// Inserts a direction of a new flow into CT_NEW, unless the map has its key.
#[inline(always)]
pub(crate) fn claim(key: &CtKeyWords, entry: &CtEntryWords) -> Claim {
    match CT_NEW.insert(key.as_key(), entry.as_entry(), u64::from(BPF_NOEXIST)) {
        Ok(()) => Claim::First,
        Err(_) => Claim::Lost,
    }
}

/// Step: inserts the direction of the replies, unless their tuple belongs to a flow.
#[inline(always)]
fn claim_replies(ctx: CtxRef) -> Result<Claim, DropReason> {
    let PacketCtx { key, entry, .. } = &*ctx;
    let reverse_key = entry.reverse_key(key);
    if is_taken(&reverse_key) {
        return Ok(Claim::Lost);
    }
    Ok(claim(&reverse_key, &entry.reversed(key)))
}

/// Step: deletes another flow with the reply tuple of this flow, if both sides of that flow have closed it. A flow that
/// was reset stays, since the RST may be forged.
#[inline(always)]
fn replace_closed(mut ctx: CtxRef) -> Result<Replace, DropReason> {
    let other_key = ctx.entry.reverse_key(&ctx.key);
    let Some(found) = CtLookup::of(&other_key) else {
        return Ok(Replace::Free);
    };
    found.read(&mut ctx.other);
    let other = &ctx.other;
    if Phase::of(true, [found.state(), reverse_state(&other_key, other)]) != Phase::Closed {
        return Ok(Replace::InUse);
    }
    forget(&other_key, other);
    Ok(Replace::Free)
}

/// Deletes both directions of a flow.
#[inline(never)]
pub(crate) fn forget(key: &CtKeyWords, entry: &CtEntryWords) {
    let reverse_key = entry.reverse_key(key);
    for key in [key, &reverse_key] {
        let _ = CT.remove(key.as_key());
        let _ = CT_NEW.remove(key.as_key());
    }
}

/// Deletes the direction of the replies of a flow that was not inserted.
#[inline(never)]
pub(crate) fn forget_replies(key: &CtKeyWords, entry: &CtEntryWords) {
    let _ = CT_NEW.remove(entry.reverse_key(key).as_key());
}

/// Returns the TCP state of the opposite direction, or zero if that direction has no entry.
#[inline(never)]
pub(crate) fn reverse_state(key: &CtKeyWords, entry: &CtEntryWords) -> u8 {
    CtLookup::of(&entry.reverse_key(key)).map_or(0, |found| found.state())
}

/// Step: moves both directions of a flow to CT.
///
/// # Errors
/// Returns [`DropReason::ConntrackFull`] if CT has no room. Both directions then stay in CT_NEW.
#[inline(always)]
fn establish(mut ctx: CtxRef) -> Result<(), DropReason> {
    ctx.entry.seen = now();
    ctx.entry.state = tcp_state::after(ctx.entry.state, ctx.packet.flags);
    let PacketCtx { key, entry, .. } = &*ctx;
    let reverse_key = entry.reverse_key(key);
    let mut reversed = entry.reversed(key);
    if let Some(at) = CT_NEW.get_ptr(reverse_key.as_key()) {
        // SAFETY: the pointer is to a value of the map, and a `u8` needs no alignment.
        reversed.state = unsafe { read_once!((*at).state) };
    }
    // A program that finds one direction in CT must find the opposite one there.
    if !keep(&reverse_key, &reversed) || !keep(key, entry) {
        let _ = CT.remove(reverse_key.as_key());
        return Err(DropReason::ConntrackFull);
    }
    let _ = CT_NEW.remove(key.as_key());
    let _ = CT_NEW.remove(reverse_key.as_key());
    Ok(())
}

/// Inserts a direction into CT if it has no entry. Returns whether CT contains the direction afterwards.
#[inline(always)]
fn keep(key: &CtKeyWords, entry: &CtEntryWords) -> bool {
    match CT.insert(key.as_key(), entry.as_entry(), u64::from(BPF_NOEXIST)) {
        Ok(()) => true,
        Err(error) => error == -EEXIST.number,
    }
}
