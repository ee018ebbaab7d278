//! Selection of the backend of a connection: random, by session affinity, or that of a stored reference.

use core::ptr;

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns};
use lb_common::abi::{
    Affinity, AffinityKey, AffinityKeyWords, Backend, BackendRef, BackendSlot, ClientKind, DropReason, Frontend,
    Service, ServiceIndex, Set, SetWord, backend_flags, moving, service_flags,
};
use lb_common::logic::backend::BackendState;
use lb_common::logic::decide::Admission;
use lb_common::logic::ip128::Ip128;
use lb_common::logic::selection;
use lb_common::logic::{affinity, generation, idle};

use crate::atomic::Shared;
use crate::maps::{AFFINITY, AFFINITY_OLD, BACKEND_SLOTS, BACKENDS, SERVICES, inserts_into_new, is_moving};
use crate::volatile::{self, read_once};

/// The backend that was selected for a connection, as values in registers.
#[derive(Clone, Copy)]
pub(crate) struct SelectedBackend {
    pub(crate) addr: Ip128,
    /// Host byte order.
    pub(crate) port: u16,
    pub(crate) reference: BackendRef,
    /// See [`backend_flags`].
    pub(crate) flags: u16,
}

impl SelectedBackend {
    /// Returns the backend in a slot.
    ///
    /// # Safety
    /// The slot must be one of a published set, of which only the service of slots is ever changed.
    #[inline(always)]
    unsafe fn in_slot(slot: &BackendSlot) -> Self {
        Self {
            // SAFETY: the reference is to a value of the map, and the caller guarantees that it is not changed.
            addr: unsafe { volatile::load_addr(&raw const slot.addr) },
            port: slot.port,
            reference: slot.backend,
            flags: slot.flags,
        }
    }

    /// Returns the backend that a random number selects of the set in a frontend. `None` if it has none, or if the set is that of
    /// a service that the frontend led to before or leads to from now on.
    #[inline(always)]
    pub(crate) fn of_frontend(frontend: Frontend, random: u32) -> Option<Self> {
        let index = selection::slot(frontend.set, random).ok()?;
        let slot = BACKEND_SLOTS.get(index)?;
        if slot.service != frontend.service {
            return None;
        }
        // SAFETY: the set was published when the frontend was read.
        Some(unsafe { Self::in_slot(slot) })
    }

    /// Returns whether the backend runs on this node.
    #[inline(always)]
    pub(crate) fn is_local(&self) -> bool {
        self.flags & backend_flags::LOCAL != 0
    }
}

/// An entry of SERVICES.
#[derive(Clone, Copy)]
pub(crate) struct ServiceRef {
    at: *const Service,
    /// See [`service_flags`].
    pub(crate) flags: u32,
}

impl ServiceRef {
    /// Looks up the entry with an index; `None` if the index is out of range.
    #[inline(always)]
    pub(crate) fn find(index: ServiceIndex) -> Option<Self> {
        let at = SERVICES.get_ptr(index.get())?;
        // SAFETY: the pointer is to a value of the map; the agent may store to it at any time.
        let flags = unsafe { read_once!((*at).flags) };
        Some(Self { at, flags })
    }
}

/// Returns whether a backend reference is current: the backend is in some EndpointSlice, perhaps only to finish the
/// connections that it has.
#[inline(always)]
pub(crate) fn is_current(backend: BackendRef) -> bool {
    BACKENDS.get_ptr(backend.id).is_some_and(|entry| {
        // SAFETY: the pointer is to a value of the map; the agent may store to it at any time.
        let current = unsafe { read_once!((*entry).generation) };
        generation::is_current(current, backend.generation)
    })
}

/// A service and the set of it that a connection or flow selects from.
pub(crate) struct ServiceSet {
    index: ServiceIndex,
    set: Set,
    service: ServiceRef,
}

impl ServiceSet {
    /// Looks up a service by its index; `None` if the index is out of range.
    #[inline(always)]
    pub(crate) fn find(index: ServiceIndex, set: Set) -> Option<Self> {
        Some(Self {
            index,
            set,
            service: ServiceRef::find(index)?,
        })
    }

    /// Returns the service and set of an admission of [`lb_common::logic::decide`].
    #[inline(always)]
    pub(crate) fn new(index: ServiceIndex, admission: Admission<ServiceRef>) -> Self {
        Self {
            index,
            set: admission.set,
            service: admission.service,
        }
    }

    /// Returns the backend of a new connection: the client's last one if the service has session affinity, else the one of the set that
    /// a random number selects. `client` is called only in the first case.
    ///
    /// # Errors
    /// Returns the reason if no backend can be selected.
    #[inline(always)]
    pub(crate) fn select(&self, random: u32, client: impl FnOnce() -> Client) -> Result<SelectedBackend, DropReason> {
        if self.service.flags & service_flags::AFFINITY == 0 {
            return self.select_random(random);
        }
        self.select_by_affinity(random, client())
    }

    /// Returns the backend of the set that a random number selects.
    #[inline(always)]
    fn select_random(&self, random: u32) -> Result<SelectedBackend, DropReason> {
        let index = selection::slot(self.set_word(), random)?;
        let slot = BACKEND_SLOTS.get(index).ok_or(DropReason::BadSlot)?;
        // SAFETY: the set was published when its word was read.
        Ok(unsafe { SelectedBackend::in_slot(slot) })
    }

    /// Returns the set word. It is read with one load, so base and length always belong together.
    #[inline(always)]
    fn set_word(&self) -> SetWord {
        let service = self.service.at;
        // SAFETY: the pointer is to a value of the map; only the addresses of fields are computed.
        let word = unsafe {
            match self.set {
                Set::Internal => &raw const (*service).internal,
                Set::External => &raw const (*service).external,
                Set::Cluster => &raw const (*service).cluster,
            }
        };
        // SAFETY: a set word has 8 bytes and is aligned to 8 bytes; the agent may store to it at any time.
        SetWord::from_word(unsafe { ptr::read_volatile(word.cast::<u64>()) })
    }

    /// Returns the backend of a stored reference if it may serve another connection of this service and set.
    #[inline(always)]
    pub(crate) fn reusable_backend(&self, reference: BackendRef) -> Option<SelectedBackend> {
        let entry: *const Backend = BACKENDS.get_ptr(reference.id)?;
        // The generation is read first. The agent changes it before the other fields, and stores another backend in the
        // entry only after this program has ended.
        // SAFETY: the pointer is to a value of the map; the agent may store to it at any time.
        let state = unsafe {
            BackendState {
                generation: read_once!((*entry).generation),
                service: read_once!((*entry).service),
                flags: read_once!((*entry).flags),
            }
        };
        if !state.serves(reference, self.index, self.set) {
            return None;
        }
        Some(SelectedBackend {
            // SAFETY: the pointer is to a value of the map, and addresses in map values are aligned to 8 bytes.
            addr: unsafe { volatile::load_addr(&raw const (*entry).addr) },
            // SAFETY: the pointer is to a value of the map, and the field is aligned.
            port: unsafe { read_once!((*entry).port) },
            reference,
            flags: state.flags,
        })
    }

    /// Returns the client's last backend if it is usable and was used within the timeout. Otherwise selects another one
    /// and stores it as the client's affinity.
    #[inline(always)]
    fn select_by_affinity(&self, random: u32, client: Client) -> Result<SelectedBackend, DropReason> {
        // SAFETY: the helper has no arguments.
        let now = unsafe { bpf_ktime_get_coarse_ns() };
        // SAFETY: the pointer is to a value of the map; the agent may store to it at any time.
        let timeout = unsafe { read_once!((*self.service.at).affinity_timeout) };
        let key = client.affinity_key(self.index);
        let Some(entry) = find_affinity(&key) else {
            let new = self.select_random(random)?;
            return Ok(self.store_affinity(&key, new, now));
        };
        // SAFETY: the pointer is to a value of the map. Its first 8 bytes are one aligned word, and `used` is aligned.
        let (word, used) = unsafe { (Shared::new(entry.cast::<u64>()), Shared::new(&raw mut (*entry).used)) };
        let old = word.load();
        let last_used = used.load();
        if affinity::holds(last_used, now, timeout)
            && let Some(selected) = self.reusable_backend(Affinity::from_word(old))
        {
            if idle::needs_refresh(last_used, now) {
                used.store(now);
            }
            return Ok(selected);
        }
        let new = self.select_random(random)?;
        if word.compare_exchange(old, Affinity::to_word(new.reference)) {
            used.store(now);
            return Ok(new);
        }
        // Another connection of the client has stored a backend concurrently: both connections must get that one.
        Ok(self.reusable_backend(Affinity::from_word(word.load())).unwrap_or(new))
    }

    /// Stores the affinity of a new client, and returns its backend. If another connection of the client has stored a
    /// backend concurrently, returns that one, provided that it is usable.
    #[inline(always)]
    fn store_affinity(&self, key: &AffinityKeyWords, new: SelectedBackend, now: u64) -> SelectedBackend {
        let value = Affinity {
            backend: new.reference,
            used: now,
        };
        let inserted = if is_moving(moving::AFFINITY) && !inserts_into_new() {
            AFFINITY_OLD.insert(key.as_key(), value, u64::from(BPF_NOEXIST))
        } else {
            AFFINITY.insert(key.as_key(), value, u64::from(BPF_NOEXIST))
        };
        if inserted.is_ok() {
            return new;
        }
        let Some(entry) = find_affinity(key) else {
            return new;
        };
        // SAFETY: the pointer is to a value of the map. Its first 8 bytes are one aligned word.
        let last = Affinity::from_word(unsafe { ptr::read_volatile(entry.cast::<u64>()) });
        self.reusable_backend(last).unwrap_or(new)
    }
}

/// Looks up the affinity of a client; during a move in the new map, then in the old one.
#[inline(always)]
fn find_affinity(key: &AffinityKeyWords) -> Option<*mut Affinity> {
    if let Some(entry) = AFFINITY.get_ptr_mut(key.as_key()) {
        return Some(entry);
    }
    if is_moving(moving::AFFINITY) {
        return AFFINITY_OLD.get_ptr_mut(key.as_key());
    }
    None
}

/// Copies an affinity from the old map to the new one, if it exists and the new map does not have the client.
#[inline(never)]
pub(crate) fn copy_affinity(key: &AffinityKey) -> bool {
    let Some(from) = AFFINITY_OLD.get_ptr_mut(key) else {
        return true;
    };
    // SAFETY: the pointer is to a value of the map. Its first 8 bytes are one aligned word, and `used` is aligned.
    let (word, used) = unsafe { (Shared::new(from.cast::<u64>()), Shared::new(&raw mut (*from).used)) };
    let old = word.load();
    let value = Affinity {
        backend: Affinity::from_word(old),
        used: used.load(),
    };
    if AFFINITY.insert(key, value, u64::from(BPF_NOEXIST)).is_err() {
        // A program has stored the client since. The map evicts entries, so it is never full.
        return true;
    }
    // A program that found the old entry may have stored another backend there.
    let now = word.load();
    if now != old
        && let Some(to) = AFFINITY.get_ptr_mut(key)
    {
        // SAFETY: the pointer is to a value of the map. Its first 8 bytes are one aligned word.
        unsafe { Shared::new(to.cast::<u64>()) }.compare_exchange(old, now);
    }
    true
}

/// Returns a random number from the kernel's generator.
#[inline(always)]
pub(crate) fn random() -> u32 {
    // SAFETY: the helper has no arguments.
    unsafe { bpf_get_prandom_u32() }
}

/// A client in the sense of session affinity: its connections to a service go to one backend.
#[derive(Clone, Copy)]
pub(crate) struct Client {
    /// A source address, or zero and the cookie of a network namespace.
    identity: Ip128,
    kind: ClientKind,
}

impl Client {
    /// Returns the client for the sockets of a network namespace, by its cookie.
    #[inline(always)]
    pub(crate) fn netns(cookie: u64) -> Self {
        Self {
            identity: Ip128([0, cookie]),
            kind: ClientKind::Netns,
        }
    }

    /// Returns the client for packets, by their source address.
    #[inline(always)]
    pub(crate) fn addr(addr: Ip128) -> Self {
        Self {
            identity: addr,
            kind: ClientKind::Address,
        }
    }

    /// Returns the key of the client's affinity to a service, by service index.
    #[inline(always)]
    fn affinity_key(self, service: ServiceIndex) -> AffinityKeyWords {
        AffinityKeyWords {
            client: self.identity.0,
            service,
            kind: self.kind as u32,
        }
    }
}
