//! Records of connected sockets: in SOCKETS, direct-mapped by cookie, or in SOCKETS_MORE if the slot is taken.
//!
//! Sequences are stored in order with the fields, so a reader of the mmapped array that sees a complete sequence twice has seen the
//! fields that belong to it, on every architecture.

use aya_ebpf::bindings::BPF_NOEXIST;
use lb_common::abi::{Addr, BackendRef, DropReason, ServiceIndex, SocketRecord, moving};
use lb_common::errno::EEXIST;
use lb_common::logic::frontend::Destination;
use lb_common::logic::ip128::Ip128;
use lb_common::logic::record;

use crate::atomic::Shared;
use crate::backend::SelectedBackend;
use crate::maps::{
    SOCKETS, SOCKETS_MORE, SOCKETS_MORE_OLD, SOCKETS_OLD, inserts_into_new, is_moving, sockets_mask, sockets_old_mask,
};
use crate::volatile::{self, read_once, write_once};

/// SOCKETS and SOCKETS_MORE, or the maps that they replace.
trait Tables {
    /// Returns the slot of a socket, by its cookie; another socket may have taken it.
    fn slot(cookie: u64) -> Option<Slot>;
    /// Returns the record under a key in the hash.
    fn find_by_key(key: u64) -> Option<*mut SocketRecord>;
    /// Stores a record under a key in the hash.
    fn insert_by_key(key: u64, value: &SocketRecord, flags: u64) -> Result<(), i32>;
    /// Deletes the record under a key from the hash.
    fn remove_by_key(key: u64) -> Result<(), i32>;
}

/// Defines an implementation of [`Tables`].
macro_rules! tables {
    ($(#[$doc:meta])* $name:ident: $array:ident by $mask:ident, $hash:ident) => {
        $(#[$doc])*
        enum $name {}

        impl Tables for $name {
            #[inline(always)]
            fn slot(cookie: u64) -> Option<Slot> {
                $array.get_ptr_mut(record::slot(cookie, $mask())).map(Slot)
            }

            #[inline(always)]
            fn find_by_key(key: u64) -> Option<*mut SocketRecord> {
                $hash.get_ptr_mut(key)
            }

            #[inline(always)]
            fn insert_by_key(key: u64, value: &SocketRecord, flags: u64) -> Result<(), i32> {
                $hash.insert(key, value, flags)
            }

            #[inline(always)]
            fn remove_by_key(key: u64) -> Result<(), i32> {
                $hash.remove(key)
            }
        }
    };
}

tables! {
    /// SOCKETS and SOCKETS_MORE.
    Current: SOCKETS by sockets_mask, SOCKETS_MORE
}

tables! {
    /// The maps that SOCKETS and SOCKETS_MORE replace during a move.
    Old: SOCKETS_OLD by sockets_old_mask, SOCKETS_MORE_OLD
}

/// A slot of SOCKETS.
struct Slot(*mut SocketRecord);

impl Slot {
    #[inline(always)]
    fn cookie(&self) -> Shared<u64> {
        // SAFETY: the pointer is to a value of the map, which is valid while the program runs, and the field is
        // aligned.
        unsafe { Shared::new(&raw mut (*self.0).cookie) }
    }

    #[inline(always)]
    fn sequence(&self) -> Shared<u32> {
        // SAFETY: the pointer is to a value of the map, which is valid while the program runs, and the field is
        // aligned.
        unsafe { Shared::new(&raw mut (*self.0).sequence) }
    }

    #[inline(always)]
    fn spilled(&self) -> Shared<u32> {
        // SAFETY: the pointer is to a value of the map, which is valid while the program runs, and the field is
        // aligned.
        unsafe { Shared::new(&raw mut (*self.0).spilled) }
    }

    /// Makes the sequence odd, before a change of the record.
    #[inline(always)]
    fn open(&self) {
        let sequence = self.sequence();
        sequence.store_in_order(record::opened(sequence.load()));
    }

    /// Makes the sequence even, after a change of the record.
    #[inline(always)]
    fn close(&self) {
        let sequence = self.sequence();
        sequence.store_in_order(record::closed(sequence.load()));
    }
}

/// A socket and the backend that was selected for it.
pub(crate) struct Connected {
    /// Cookie of the socket (`bpf_get_socket_cookie`).
    pub(crate) cookie: u64,
    /// Cookie of the network namespace (`bpf_get_netns_cookie`).
    pub(crate) netns: u64,
    /// Nanoseconds of CLOCK_MONOTONIC.
    pub(crate) time: u64,
    /// Destination that the process requested.
    pub(crate) original: Destination,
    pub(crate) backend: SelectedBackend,
    /// Service index.
    pub(crate) service: ServiceIndex,
}

impl Connected {
    /// Writes all fields of a record except cookie, sequence and spilled.
    ///
    /// # Safety
    /// `at` must be valid for writes and aligned.
    #[inline(always)]
    unsafe fn fill(&self, at: *mut SocketRecord) {
        // SAFETY: the caller guarantees that `at` is valid for writes and aligned, so its fields are.
        unsafe {
            write_once!((*at).netns, self.netns);
            write_once!((*at).time, self.time);
            volatile::store_addr(&raw mut (*at).original_addr, self.original.addr);
            volatile::store_addr(&raw mut (*at).backend_addr, self.backend.addr);
            write_once!((*at).original_port, self.original.port);
            write_once!((*at).backend_port, self.backend.port);
            volatile::store_ref(&raw mut (*at).backend, self.backend.reference);
            write_once!((*at).service, self.service);
            write_once!((*at).socket, self.cookie);
            write_once!((*at).proto, self.original.proto);
        }
    }
}

/// The place of a record that is about to be stored.
pub(crate) struct Place {
    /// The slot in SOCKETS.
    slot: Slot,
}

impl Place {
    /// Returns the place of a socket, by its cookie, and loads it into the cache.
    #[inline(always)]
    pub(crate) fn prefetch(cookie: u64) -> Option<Self> {
        let slot = Current::slot(cookie)?;
        slot.cookie().load();
        Some(Self { slot })
    }

    /// Stores the record of a connected socket.
    ///
    /// # Errors
    /// Returns [`DropReason::SocketsFull`] if neither map has room.
    #[inline(always)]
    pub(crate) fn insert(&self, new: &Connected) -> Result<(), DropReason> {
        if is_moving(moving::SOCKETS) && !inserts_into_new() {
            let slot = Old::slot(new.cookie).ok_or(DropReason::SocketsFull)?;
            return insert_at::<Old>(&slot, new);
        }
        let inserted = insert_at::<Current>(&self.slot, new);
        if is_moving(moving::SOCKETS) {
            // An earlier record of the socket; the agent must not copy it.
            remove_in::<Old>(new.cookie);
        }
        inserted
    }
}

#[inline(always)]
fn insert_at<T: Tables>(slot: &Slot, new: &Connected) -> Result<(), DropReason> {
    let owner = slot.cookie().load();
    if owner == new.cookie {
        // The socket has a record in its slot and connects again.
        slot.open();
    } else if owner != 0 || slot.spilled().load() != 0 || !slot.cookie().compare_exchange(0, new.cookie) {
        return insert_spilled::<T>(slot, new);
    }
    // SAFETY: the pointer is to a value of the map. Its cookie is this socket's, so no call of another socket writes
    // these fields.
    unsafe { new.fill(slot.0) };
    slot.close();
    Ok(())
}

/// Stores the record of a socket in SOCKETS_MORE, and counts it in `spilled`: its slot is taken, or an earlier connect
/// may have stored the record there.
#[inline(always)]
fn insert_spilled<T: Tables>(slot: &Slot, new: &Connected) -> Result<(), DropReason> {
    let known = T::find_by_key(new.cookie).is_some();
    if !known {
        slot.spilled().add(1);
    }
    let result = insert_by_key_in::<T>(new.cookie, new);
    if result.is_err() && !known {
        slot.spilled().add(u32::MAX);
    }
    result
}

/// Stores the record of a socket in SOCKETS_MORE under any key. The key of an MPTCP socket is its address in the
/// kernel: the verifier rejects arithmetic on it, so it cannot select a slot of SOCKETS.
#[inline(always)]
pub(crate) fn insert_by_key(key: u64, new: &Connected) -> Result<(), DropReason> {
    if !is_moving(moving::SOCKETS) {
        return insert_by_key_in::<Current>(key, new);
    }
    if !inserts_into_new() {
        return insert_by_key_in::<Old>(key, new);
    }
    let inserted = insert_by_key_in::<Current>(key, new);
    let _ = Old::remove_by_key(key);
    inserted
}

#[inline(always)]
fn insert_by_key_in<T: Tables>(key: u64, new: &Connected) -> Result<(), DropReason> {
    let mut value = SocketRecord {
        cookie: key,
        sequence: record::closed(0),
        ..EMPTY
    };
    // SAFETY: the pointer is to a local variable.
    unsafe { new.fill(&raw mut value) };
    T::insert_by_key(key, &value, 0).map_err(|_| DropReason::SocketsFull)
}

/// A record of zero bytes: `Default::default` is no constant function.
const EMPTY: SocketRecord = SocketRecord {
    cookie: 0,
    sequence: 0,
    spilled: 0,
    netns: 0,
    time: 0,
    original_addr: Addr::UNSPECIFIED,
    backend_addr: Addr::UNSPECIFIED,
    original_port: 0,
    backend_port: 0,
    backend: BackendRef::NONE,
    service: ServiceIndex::NONE,
    socket: 0,
    proto: 0,
    pad: [0; 7],
    reserved: [0; 4],
};

/// The record of a connected socket.
pub(crate) struct Record(*const SocketRecord);

impl Record {
    /// Returns the record of a socket, by its cookie.
    #[inline(always)]
    pub(crate) fn find(cookie: u64) -> Option<Self> {
        let found = Self::find_in::<Current>(cookie);
        if found.is_none() && is_moving(moving::SOCKETS) {
            return Self::find_in::<Old>(cookie);
        }
        found
    }

    #[inline(always)]
    fn find_in<T: Tables>(cookie: u64) -> Option<Self> {
        let slot = T::slot(cookie)?;
        if slot.cookie().load() == cookie {
            Some(Self(slot.0))
        } else if slot.spilled().load() != 0 {
            T::find_by_key(cookie).map(|at| Self(at))
        } else {
            None
        }
    }

    /// Returns the record in SOCKETS_MORE under a key; see [`insert_by_key`].
    #[inline(always)]
    pub(crate) fn find_by_key(key: u64) -> Option<Self> {
        if let Some(at) = Current::find_by_key(key) {
            return Some(Self(at));
        }
        if is_moving(moving::SOCKETS) {
            return Old::find_by_key(key).map(|at| Self(at));
        }
        None
    }

    /// Returns the destination that the socket requested, if `peer` is the backend that replaced it.
    #[inline(always)]
    pub(crate) fn original(&self, peer: Destination) -> Option<(Ip128, u16)> {
        let at = self.0;
        // SAFETY: the pointer is to a value of a map, and only calls of this socket write or delete its record.
        unsafe {
            let backend = (volatile::load_addr(&raw const (*at).backend_addr), (*at).backend_port);
            record::is_same((peer.addr, peer.port), backend)
                .then(|| (volatile::load_addr(&raw const (*at).original_addr), (*at).original_port))
        }
    }

    /// Returns the backend that the socket is connected to, if `to` is the destination that it requested.
    #[inline(always)]
    pub(crate) fn backend(&self, to: Destination) -> Option<BackendRef> {
        let at = self.0;
        // SAFETY: the pointer is to a value of a map, and only calls of this socket write or delete its record.
        unsafe {
            let original = (volatile::load_addr(&raw const (*at).original_addr), (*at).original_port);
            record::is_same((to.addr, to.port), original).then(|| (*at).backend)
        }
    }
}

/// Deletes the record of a socket, by its cookie; during a move from the old maps first, so that the agent copies no deleted
/// record.
#[inline(always)]
pub(crate) fn remove(cookie: u64) {
    if is_moving(moving::SOCKETS) {
        remove_in::<Old>(cookie);
    }
    remove_in::<Current>(cookie);
}

#[inline(always)]
fn remove_in<T: Tables>(cookie: u64) {
    let Some(slot) = T::slot(cookie) else { return };
    if slot.cookie().load() == cookie {
        let sequence = slot.sequence();
        sequence.store(record::opened(sequence.load()));
        slot.cookie().store_in_order(0);
    } else if slot.spilled().load() != 0 && T::remove_by_key(cookie).is_ok() {
        slot.spilled().add(u32::MAX);
    }
}

/// Deletes the record in SOCKETS_MORE under a key; see [`insert_by_key`].
#[inline(always)]
pub(crate) fn remove_by_key(key: u64) {
    if is_moving(moving::SOCKETS) {
        let _ = Old::remove_by_key(key);
    }
    let _ = Current::remove_by_key(key);
}

/// Copies the record of a socket from the old maps to SOCKETS_MORE, unless the new maps have one. SOCKETS itself is left to
/// programs: a record there would be visible to its socket before it is complete. Returns false if there is no room.
#[inline(never)]
pub(crate) fn copy_record(cookie: u64) -> bool {
    let Some(slot) = Current::slot(cookie) else {
        return false;
    };
    let Some(Record(from)) = Record::find_in::<Old>(cookie) else {
        return true;
    };
    let mut value = EMPTY;
    // SAFETY: the pointers are to a value of a map, which has at least the bytes that are in use, and to a local variable.
    unsafe { volatile::copy_first(from, &raw mut value, SocketRecord::USED) };
    if !record::is_complete(value.sequence) || slot.cookie().load() == cookie {
        return true;
    }
    value.cookie = cookie;
    value.spilled = 0;
    slot.spilled().add(1);
    if let Err(error) = Current::insert_by_key(cookie, &value, u64::from(BPF_NOEXIST)) {
        slot.spilled().add(u32::MAX);
        return error == -EEXIST.number;
    }
    let is_obsolete = Record::find_in::<Old>(cookie).is_none() || slot.cookie().load() == cookie;
    if is_obsolete && is_copy(cookie, &value) && Current::remove_by_key(cookie).is_ok() {
        slot.spilled().add(u32::MAX);
    }
    true
}

/// Copies the record of an MPTCP socket from the old hash to the new one, by its key. Returns false if there is no room.
#[inline(never)]
pub(crate) fn copy_record_by_key(key: u64) -> bool {
    let Some(from) = Old::find_by_key(key) else {
        return true;
    };
    let mut value = EMPTY;
    // SAFETY: the pointers are to a value of a map, which has at least the bytes that are in use, and to a local variable.
    unsafe { volatile::copy_first(from.cast_const(), &raw mut value, SocketRecord::USED) };
    if let Err(error) = Current::insert_by_key(key, &value, u64::from(BPF_NOEXIST)) {
        return error == -EEXIST.number;
    }
    if Old::find_by_key(key).is_none() && is_copy(key, &value) {
        let _ = Current::remove_by_key(key);
    }
    true
}

/// Returns whether the record in SOCKETS_MORE is the one that was copied, not one of a later connect().
#[inline(always)]
fn is_copy(key: u64, copied: &SocketRecord) -> bool {
    Current::find_by_key(key).is_some_and(|at| {
        // SAFETY: the pointer is to a value of the map, and the fields are aligned.
        unsafe { read_once!((*at).time) == copied.time && read_once!((*at).backend_port) == copied.backend_port }
    })
}
