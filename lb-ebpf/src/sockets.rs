//! Records of connected sockets: SOCKETS, direct-mapped by cookie, and SOCKETS_MORE for those whose slot is taken.
//!
//! The atomic exchanges are full barriers (`BPF_XCHG`, `BPF_CMPXCHG`), so a reader of the mmapped array that sees a
//! complete sequence twice has seen the fields that belong to it, on every architecture.

use lb_common::abi::{Addr, DropReason, SocketRecord};
use lb_common::logic::record;
use lb_common::logic::words::Words;

use crate::atomic::Shared;
use crate::count;
use crate::maps::{SOCKETS, SOCKETS_MORE, sockets_mask};
use crate::words::{self, Destination};

/// A slot of SOCKETS.
struct Slot(*mut SocketRecord);

impl Slot {
    #[inline(always)]
    fn of(cookie: u64) -> Option<Self> {
        SOCKETS.get_ptr_mut(record::slot(cookie, sockets_mask())).map(Self)
    }

    #[inline(always)]
    fn cookie(&self) -> Shared<u64> {
        // SAFETY: the pointer is to a value of the map.
        unsafe { Shared::new(&raw mut (*self.0).cookie) }
    }

    #[inline(always)]
    fn sequence(&self) -> Shared<u32> {
        // SAFETY: the pointer is to a value of the map.
        unsafe { Shared::new(&raw mut (*self.0).sequence) }
    }

    #[inline(always)]
    fn spilled(&self) -> Shared<u32> {
        // SAFETY: the pointer is to a value of the map.
        unsafe { Shared::new(&raw mut (*self.0).spilled) }
    }

    #[inline(always)]
    fn open(&self) {
        let sequence = self.sequence();
        sequence.exchange(record::opened(sequence.load()));
    }

    #[inline(always)]
    fn close(&self) {
        let sequence = self.sequence();
        sequence.exchange(record::closed(sequence.load()));
    }
}

/// A socket that was given a backend.
pub(crate) struct Connected {
    pub(crate) cookie: u64,
    pub(crate) netns: u64,
    pub(crate) time: u64,
    pub(crate) original: Destination,
    pub(crate) backend_addr: Words,
    pub(crate) backend_port: u16,
    pub(crate) backend: u32,
    pub(crate) generation: u32,
    pub(crate) service: u32,
}

impl Connected {
    /// Writes all fields but cookie, sequence and spilled.
    ///
    /// # Safety
    /// `at` must be valid for writes.
    #[inline(always)]
    unsafe fn fill(&self, at: *mut SocketRecord) {
        // SAFETY: see above.
        unsafe {
            (&raw mut (*at).netns).write_volatile(self.netns);
            (&raw mut (*at).time).write_volatile(self.time);
            words::store(&raw mut (*at).original_addr, self.original.addr);
            words::store(&raw mut (*at).backend_addr, self.backend_addr);
            (&raw mut (*at).original_port).write_volatile(self.original.port);
            (&raw mut (*at).backend_port).write_volatile(self.backend_port);
            (&raw mut (*at).backend).write_volatile(self.backend);
            (&raw mut (*at).generation).write_volatile(self.generation);
            (&raw mut (*at).service).write_volatile(self.service);
        }
    }
}

/// Remembers a connected socket.
#[inline(always)]
pub(crate) fn remember(new: &Connected) {
    let Some(slot) = Slot::of(new.cookie) else {
        return;
    };
    let holder = slot.cookie().load();
    if holder == new.cookie {
        // The same socket connects once more.
        slot.open();
    } else if holder != 0 || slot.spilled().load() != 0 || !slot.cookie().compare_exchange(0, new.cookie) {
        return remember_more(&slot, new);
    }
    // SAFETY: the slot is this socket's.
    unsafe { new.fill(slot.0) };
    slot.close();
}

/// Remembers a socket whose slot is taken, or may have its record in SOCKETS_MORE from an earlier connect.
#[inline(always)]
fn remember_more(slot: &Slot, new: &Connected) {
    // SAFETY: nothing is read from the value.
    let known = unsafe { SOCKETS_MORE.get(new.cookie) }.is_some();
    if !known {
        slot.spilled().add(1);
    }
    let mut value = SocketRecord {
        cookie: new.cookie,
        sequence: record::closed(0),
        ..EMPTY
    };
    // SAFETY: a local value.
    unsafe { new.fill(&raw mut value) };
    if SOCKETS_MORE.insert(new.cookie, value, 0).is_err() {
        count::dropped(DropReason::SocketsFull);
        if !known {
            slot.spilled().add(u32::MAX);
        }
    }
}

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
    backend: 0,
    generation: 0,
    service: 0,
};

/// The destination that a socket asked for, if `peer` is the backend that it was given instead.
#[inline(always)]
pub(crate) fn original(cookie: u64, peer: Destination) -> Option<(Words, u16)> {
    let slot = Slot::of(cookie)?;
    let found: *const SocketRecord = if slot.cookie().load() == cookie {
        slot.0
    } else if slot.spilled().load() != 0 {
        SOCKETS_MORE.get_ptr(cookie)?
    } else {
        return None;
    };
    // SAFETY: the record is this socket's, and only its own calls write or delete it.
    unsafe {
        let backend = (words::load(&raw const (*found).backend_addr), (*found).backend_port);
        record::is_backend((peer.addr, peer.port), backend)
            .then(|| (words::load(&raw const (*found).original_addr), (*found).original_port))
    }
}

/// Forgets a socket.
#[inline(always)]
pub(crate) fn forget(cookie: u64) {
    let Some(slot) = Slot::of(cookie) else { return };
    if slot.cookie().load() == cookie {
        let sequence = slot.sequence();
        sequence.store(record::opened(sequence.load()));
        slot.cookie().exchange(0);
    } else if slot.spilled().load() != 0 && SOCKETS_MORE.remove(cookie).is_ok() {
        slot.spilled().add(u32::MAX);
    }
}
