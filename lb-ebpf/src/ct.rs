//! CT and CT_NEW: the flows of the packet path.

use core::mem::MaybeUninit;

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::generated::bpf_ktime_get_coarse_ns;
use lb_common::abi::{CtEntry, CtEntryWords, CtKey, CtKeyWords, DropReason, moving};
use lb_common::errno::EEXIST;
use lb_common::logic::ct::Phase;
use lb_common::logic::idle;
use lb_common::logic::tcp_state;

use crate::maps::{CT, CT_NEW, CT_NEW_OLD, CT_OLD, inserts_into_new, is_moving};
use crate::packet_ctx::{CtxRef, PacketCtx, outcome, steps};
use crate::volatile::{self, read_once, write_once};

outcome! {
    /// The insertion of a direction of a flow.
    pub(crate) enum Claim {
        /// The direction was inserted.
        Inserted,
        /// The tuple belongs to a flow already; nothing was inserted.
        Exists,
    }
}

outcome! {
    /// The reply tuple of a flow that is to be inserted.
    pub(crate) enum ReplyTuple {
        /// The tuple is free.
        Free,
        /// The tuple belongs to a flow that has not ended.
        InUse,
    }
}

steps! {
    pub(crate) fn claim_reply_direction(ctx) -> Claim;
    pub(crate) fn evict_closed(ctx) -> ReplyTuple;
    pub(crate) fn establish(ctx) -> ();
}

/// The entry that a lookup found.
pub(crate) struct CtLookup {
    at: *mut CtEntry,
    /// The entry is in CT_NEW.
    pub(crate) is_unreplied: bool,
}

impl CtLookup {
    /// Looks a key up in CT, then in CT_NEW; during a move, then in the old maps.
    #[inline(always)]
    pub(crate) fn find(key: &CtKeyWords) -> Option<Self> {
        if let Some(at) = CT.get_ptr_mut(key.as_key()) {
            return Some(Self {
                at,
                is_unreplied: false,
            });
        }
        if let Some(at) = CT_NEW.get_ptr_mut(key.as_key()) {
            return Some(Self { at, is_unreplied: true });
        }
        if is_moving(moving::CT) {
            return Self::find_old(key);
        }
        None
    }

    /// Looks a key up in the old maps.
    #[inline(always)]
    fn find_old(key: &CtKeyWords) -> Option<Self> {
        if let Some(at) = CT_OLD.get_ptr_mut(key.as_key()) {
            return Some(Self {
                at,
                is_unreplied: false,
            });
        }
        CT_NEW_OLD
            .get_ptr_mut(key.as_key())
            .map(|at| Self { at, is_unreplied: true })
    }

    /// Copies the part of the entry that is in use.
    #[inline(always)]
    pub(crate) fn read(&self, to: &mut CtEntryWords) {
        // The kernel may reuse the element for another key meanwhile, since both maps are preallocated. A copy with fields of
        // two flows sends one packet to a wrong destination. Its checksum is correct there, as it is updated by the difference
        // of the tuples; TCP rejects a segment of an unknown connection, but a UDP socket would receive the datagram.
        // SAFETY: the pointer is to a value of the map, which has the alignment of a `CtEntryWords` and at least the bytes that are in
        // use, and every bit pattern is one.
        unsafe { volatile::copy_first(self.at.cast::<CtEntryWords>(), to, CtEntry::USED) }
    }

    /// Returns the TCP state of the direction.
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
            if idle::needs_refresh(read_once!((*self.at).seen), now) {
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

/// Returns the time for entries: nanoseconds of CLOCK_MONOTONIC, with the resolution of a tick.
#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: the helper has no arguments.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// Returns whether a tuple belongs to a flow.
#[inline(always)]
fn is_taken(key: &CtKeyWords) -> bool {
    CtLookup::find(key).is_some()
}

/// Inserts a direction of a new flow into CT_NEW, unless the map has its key.
#[inline(always)]
pub(crate) fn claim(key: &CtKeyWords, entry: &CtEntryWords) -> Claim {
    if is_moving(moving::CT) {
        return claim_in_both(key, entry);
    }
    match CT_NEW.insert(key.as_key(), entry.as_entry(), u64::from(BPF_NOEXIST)) {
        Ok(()) => Claim::Inserted,
        Err(_) => Claim::Exists,
    }
}

/// Inserts a direction during a move, unless an old or a new map has its key. The other maps are searched after the
/// insertion: of two programs that insert the same key into an old and a new map, at least one finds the other's entry.
#[inline(always)]
fn claim_in_both(key: &CtKeyWords, entry: &CtEntryWords) -> Claim {
    let is_new = inserts_into_new();
    let inserted = if is_new {
        CT_NEW.insert(key.as_key(), entry.as_entry(), u64::from(BPF_NOEXIST))
    } else {
        CT_NEW_OLD.insert(key.as_key(), entry.as_entry(), u64::from(BPF_NOEXIST))
    };
    if inserted.is_err() {
        return Claim::Exists;
    }
    let is_elsewhere = if is_new {
        CT_OLD.get_ptr(key.as_key()).is_some() || CT_NEW_OLD.get_ptr(key.as_key()).is_some()
    } else {
        CT.get_ptr(key.as_key()).is_some() || CT_NEW.get_ptr(key.as_key()).is_some()
    };
    if !is_elsewhere {
        return Claim::Inserted;
    }
    if is_new {
        let _ = CT_NEW.remove(key.as_key());
    } else {
        let _ = CT_NEW_OLD.remove(key.as_key());
    }
    Claim::Exists
}

/// Deletes a direction from CT_NEW; during a move from the old map first, so that the agent copies no deleted entry.
#[inline(always)]
fn remove_unreplied(key: &CtKeyWords) {
    if is_moving(moving::CT) {
        let _ = CT_NEW_OLD.remove(key.as_key());
    }
    let _ = CT_NEW.remove(key.as_key());
}

/// Deletes a direction from CT; during a move from the old map first, so that the agent copies no deleted entry.
#[inline(always)]
fn remove_established(key: &CtKeyWords) {
    if is_moving(moving::CT) {
        let _ = CT_OLD.remove(key.as_key());
    }
    let _ = CT.remove(key.as_key());
}

/// Step: inserts the direction of the replies, unless their tuple belongs to a flow.
#[inline(always)]
fn claim_reply_direction(mut ctx: CtxRef) -> Result<Claim, DropReason> {
    let PacketCtx {
        key,
        entry,
        other_entry,
        ..
    } = &mut *ctx;
    let reverse_key = entry.reverse_key(key);
    if is_taken(&reverse_key) {
        return Ok(Claim::Exists);
    }
    other_entry.begin_opposite(entry, key);
    Ok(claim(&reverse_key, other_entry))
}

/// Step: deletes another flow with the reply tuple of this flow, if both sides of that flow have closed it. A flow that
/// was reset stays, since the RST may be forged.
#[inline(always)]
fn evict_closed(mut ctx: CtxRef) -> Result<ReplyTuple, DropReason> {
    let other_key = ctx.entry.reverse_key(&ctx.key);
    let Some(found) = CtLookup::find(&other_key) else {
        return Ok(ReplyTuple::Free);
    };
    found.read(&mut ctx.other_entry);
    let other = &ctx.other_entry;
    if Phase::of(true, [found.state(), reverse_state(&other_key, other)]) != Phase::Closed {
        return Ok(ReplyTuple::InUse);
    }
    remove(&other_key, other);
    Ok(ReplyTuple::Free)
}

/// Deletes both directions of a flow.
#[inline(never)]
pub(crate) fn remove(key: &CtKeyWords, entry: &CtEntryWords) {
    let reverse_key = entry.reverse_key(key);
    for key in [key, &reverse_key] {
        remove_established(key);
        remove_unreplied(key);
    }
}

/// Deletes the direction of the replies of a flow that was not inserted.
#[inline(never)]
pub(crate) fn remove_reply_direction(key: &CtKeyWords, entry: &CtEntryWords) {
    remove_unreplied(&entry.reverse_key(key));
}

/// Returns the TCP state of the opposite direction, or zero if that direction has no entry.
#[inline(never)]
pub(crate) fn reverse_state(key: &CtKeyWords, entry: &CtEntryWords) -> u8 {
    CtLookup::find(&entry.reverse_key(key)).map_or(0, |found| found.state())
}

/// Step: moves both directions of a flow to CT.
///
/// # Errors
/// Returns [`DropReason::ConntrackFull`] if CT has no room. Both directions then stay in CT_NEW.
#[inline(always)]
fn establish(mut ctx: CtxRef) -> Result<(), DropReason> {
    ctx.entry.seen = now();
    ctx.entry.state = tcp_state::after(ctx.entry.state, ctx.packet.flags);
    let PacketCtx {
        key,
        entry,
        other_entry,
        ..
    } = &mut *ctx;
    let reverse_key = entry.reverse_key(key);
    other_entry.begin_opposite(entry, key);
    if let Some(at) = find_unreplied(&reverse_key) {
        // SAFETY: the pointer is to a value of the map, and a `u8` needs no alignment.
        other_entry.state = unsafe { read_once!((*at).state) };
    }
    // A program that finds one direction in CT must find the opposite one there.
    if !insert_established(&reverse_key, other_entry) || !insert_established(key, entry) {
        remove_established(&reverse_key);
        return Err(DropReason::ConntrackFull);
    }
    remove_unreplied(key);
    remove_unreplied(&reverse_key);
    Ok(())
}

/// Looks a key up in CT_NEW; during a move, then in the old map.
#[inline(always)]
fn find_unreplied(key: &CtKeyWords) -> Option<*const CtEntry> {
    if let Some(at) = CT_NEW.get_ptr(key.as_key()) {
        return Some(at);
    }
    if is_moving(moving::CT) {
        return CT_NEW_OLD.get_ptr(key.as_key());
    }
    None
}

/// Inserts a direction into CT if it has no entry. Returns whether CT contains the direction afterwards.
#[inline(always)]
fn insert_established(key: &CtKeyWords, entry: &CtEntryWords) -> bool {
    let inserted = if is_moving(moving::CT) && !inserts_into_new() {
        CT_OLD.insert(key.as_key(), entry.as_entry(), u64::from(BPF_NOEXIST))
    } else {
        CT.insert(key.as_key(), entry.as_entry(), u64::from(BPF_NOEXIST))
    };
    match inserted {
        Ok(()) => true,
        Err(error) => error == -EEXIST.number,
    }
}

/// A new map and the old one, for [`copy_old`].
macro_rules! copy_old {
    ($(#[$doc:meta])* $name:ident: $old:ident to $new:ident) => {
        $(#[$doc])*
        #[inline(never)]
        pub(crate) fn $name(key: &CtKey) -> bool {
            let Some(from) = $old.get_ptr(key) else {
                return true;
            };
            let mut room = MaybeUninit::<CtEntry>::uninit();
            // SAFETY: the pointer is to a value of the map, which may change meanwhile and has at least the bytes that are in use.
            // All other bytes are zero.
            let entry = unsafe {
                let room = volatile::zeroed(&mut room);
                volatile::copy_first(from, room, CtEntry::USED);
                &*room
            };
            match $new.insert(key, entry, u64::from(BPF_NOEXIST)) {
                Ok(()) => {}
                // A program has inserted the key since, so its entry is the newer one.
                Err(error) if error == -EEXIST.number => return true,
                Err(_) => return false,
            }
            let Some(to) = $new.get_ptr_mut(key) else {
                return true;
            };
            if $old.get_ptr(key).is_none() {
                // A program has deleted the flow meanwhile.
                let _ = $new.remove(key);
                return true;
            }
            // SAFETY: the pointers are to values of the maps. Programs that found the old entry may have recorded a segment
            // there; those on other CPUs write the same values, or slightly older ones.
            unsafe {
                let state = read_once!((*from).state);
                if state != entry.state {
                    write_once!((*to).state, state);
                }
            }
            true
        }
    };
}

copy_old! {
    /// Copies an established flow from the old map to the new one, if it exists. Returns false if the new map is full.
    copy_established: CT_OLD to CT
}

copy_old! {
    /// Copies an unreplied flow from the old map to the new one, if it exists. Returns false if the new map is full.
    copy_unreplied: CT_NEW_OLD to CT_NEW
}
