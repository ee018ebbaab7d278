//! Records of connected sockets: in SOCKETS, direct-mapped by cookie, or in SOCKETS_MORE if the slot is taken.
//!
//! The atomic exchanges are full barriers (`BPF_XCHG`, `BPF_CMPXCHG`), so a reader of the mmapped array that sees a
//! complete sequence twice has seen the fields that belong to it, on every architecture.

use lb_common::abi::{Addr, BackendRef, DropReason, ServiceIndex, SocketRecord};
use lb_common::logic::frontend::Destination;
use lb_common::logic::ip128::Ip128;
use lb_common::logic::record;

use crate::atomic::Shared;
use crate::backend::SelectedBackend;
use crate::maps::{SOCKETS, SOCKETS_MORE, sockets_mask};
use crate::volatile::{self, write_once};

/// A slot of SOCKETS.
struct Slot(*mut SocketRecord);

impl Slot {
    /// Returns the slot of a socket, by its cookie; another socket may have taken it.
    #[inline(always)]
    fn find(cookie: u64) -> Option<Self> {
        SOCKETS.get_ptr_mut(record::slot(cookie, sockets_mask())).map(Self)
    }

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
        sequence.exchange(record::opened(sequence.load()));
    }

    /// Makes the sequence even, after a change of the record.
    #[inline(always)]
    fn close(&self) {
        let sequence = self.sequence();
        sequence.exchange(record::closed(sequence.load()));
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

/// Stores the record of a connected socket.
///
/// # Errors
/// Returns [`DropReason::SocketsFull`] if neither map has room.
#[inline(always)]
pub(crate) fn insert(new: &Connected) -> Result<(), DropReason> {
    let Some(slot) = Slot::find(new.cookie) else {
        return Err(DropReason::SocketsFull);
    };
    let owner = slot.cookie().load();
    if owner == new.cookie {
        // The socket has a record in its slot and connects again.
        slot.open();
    } else if owner != 0 || slot.spilled().load() != 0 || !slot.cookie().compare_exchange(0, new.cookie) {
        return insert_spilled(&slot, new);
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
fn insert_spilled(slot: &Slot, new: &Connected) -> Result<(), DropReason> {
    let known = SOCKETS_MORE.get_ptr(new.cookie).is_some();
    if !known {
        slot.spilled().add(1);
    }
    let result = insert_by_key(new.cookie, new);
    if result.is_err() && !known {
        slot.spilled().add(u32::MAX);
    }
    result
}

/// Stores the record of a socket in SOCKETS_MORE under any key. The key of an MPTCP socket is its address in the
/// kernel: the verifier rejects arithmetic on it, so it cannot select a slot of SOCKETS.
#[inline(always)]
pub(crate) fn insert_by_key(key: u64, new: &Connected) -> Result<(), DropReason> {
    let mut value = SocketRecord {
        cookie: key,
        sequence: record::closed(0),
        ..EMPTY
    };
    // SAFETY: the pointer is to a local variable.
    unsafe { new.fill(&raw mut value) };
    SOCKETS_MORE.insert(key, value, 0).map_err(|_| DropReason::SocketsFull)
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
};

/// The record of a connected socket.
pub(crate) struct Record(*const SocketRecord);

impl Record {
    /// Returns the record of a socket, by its cookie.
    #[inline(always)]
    pub(crate) fn find(cookie: u64) -> Option<Self> {
        let slot = Slot::find(cookie)?;
        if slot.cookie().load() == cookie {
            Some(Self(slot.0))
        } else if slot.spilled().load() != 0 {
            Self::find_by_key(cookie)
        } else {
            None
        }
    }

    /// Returns the record in SOCKETS_MORE under a key; see [`insert_by_key`].
    #[inline(always)]
    pub(crate) fn find_by_key(key: u64) -> Option<Self> {
        SOCKETS_MORE.get_ptr(key).map(Self)
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

/// Deletes the record of a socket, by its cookie.
#[inline(always)]
pub(crate) fn remove(cookie: u64) {
    let Some(slot) = Slot::find(cookie) else { return };
    if slot.cookie().load() == cookie {
        let sequence = slot.sequence();
        sequence.store(record::opened(sequence.load()));
        slot.cookie().exchange(0);
    } else if slot.spilled().load() != 0 && SOCKETS_MORE.remove(cookie).is_ok() {
        slot.spilled().add(u32::MAX);
    }
}

/// Deletes the record in SOCKETS_MORE under a key; see [`insert_by_key`].
#[inline(always)]
pub(crate) fn remove_by_key(key: u64) {
    let _ = SOCKETS_MORE.remove(key);
}
