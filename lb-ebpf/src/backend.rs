//! Which backend a connection gets.

use core::ptr;

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns};
use lb_common::abi::{
    Affinity, AffinityKeyWords, Backend, BackendRef, ClientKind, DropReason, Service, Set, SetWord, backend_flags,
    service_flags,
};
use lb_common::logic::backend::BackendState;
use lb_common::logic::connect;
use lb_common::logic::decide::Admission;
use lb_common::logic::ip128::Ip128;
use lb_common::logic::{affinity, generation, idle};

use crate::atomic::Shared;
use crate::maps::{AFFINITY, BACKEND_SLOTS, BACKENDS, SERVICES};
use crate::volatile;

/// A backend, in registers.
#[derive(Clone, Copy)]
pub(crate) struct Choice {
    pub(crate) addr: Ip128,
    /// Host byte order.
    pub(crate) port: u16,
    pub(crate) id: BackendRef,
    /// See [`backend_flags`].
    pub(crate) flags: u16,
}

impl Choice {
    /// Whether it runs on this node.
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
    /// Returns the entry with an index, if the index is in range.
    #[inline(always)]
    pub(crate) fn of(index: u32) -> Option<Self> {
        let at = SERVICES.get_ptr(index)?;
        // SAFETY: the pointer is to a value of the map; the agent may store to it at any time.
        let flags = unsafe { ptr::read_volatile(&raw const (*at).flags) };
        Some(Self { at, flags })
    }
}

/// A service and the set of it that a connection or flow selects from.
pub(crate) struct Serving {
    index: u32,
    set: Set,
    service: ServiceRef,
}

/// Whether a backend, by id and generation, is still one: in some slice, if only to end what it has begun.
#[inline(always)]
pub(crate) fn is_current(backend: BackendRef) -> bool {
    BACKENDS.get_ptr(backend.id).is_some_and(|entry| {
        // SAFETY: the pointer is to a value of the map; the agent may store to it at any time.
        let current = unsafe { (&raw const (*entry).generation).read_volatile() };
        generation::is_current(current, backend.generation)
    })
}

impl Serving {
    /// Returns a set of a service, if the index of the service is in range.
    #[inline(always)]
    pub(crate) fn of(index: u32, set: Set) -> Option<Self> {
        Some(Self {
            index,
            set,
            service: ServiceRef::of(index)?,
        })
    }

    /// Returns the service and set of a decision.
    #[inline(always)]
    pub(crate) fn new(index: u32, admission: Admission<ServiceRef>) -> Self {
        Self {
            index,
            set: admission.set,
            service: admission.service,
        }
    }

    /// A backend for a new connection: the one that the client had last, where the service wants that, or any.
    #[inline(always)]
    pub(crate) fn choose(&self, client: impl FnOnce() -> Client) -> Result<Choice, DropReason> {
        if self.service.flags & service_flags::AFFINITY == 0 {
            return self.any();
        }
        self.choose_by_affinity(client())
    }

    /// One of the set, at random.
    #[inline(always)]
    fn any(&self) -> Result<Choice, DropReason> {
        // SAFETY: the helper takes nothing.
        let random = unsafe { bpf_get_prandom_u32() };
        let slot = connect::slot(self.word(), random)?;
        let slot = BACKEND_SLOTS.get(slot).ok_or(DropReason::BadSlot)?;
        Ok(Choice {
            // SAFETY: the reference is to a value of the map, and a published slot is not changed.
            addr: unsafe { volatile::load(&raw const slot.addr) },
            port: slot.port,
            id: slot.backend,
            flags: slot.flags,
        })
    }

    /// The set, read by one load: base and length always belong together.
    #[inline(always)]
    fn word(&self) -> SetWord {
        let service = self.service.at;
        // SAFETY: the pointer is to a value of the map.
        let word = unsafe {
            match self.set {
                Set::Internal => &raw const (*service).internal,
                Set::External => &raw const (*service).external,
                Set::Cluster => &raw const (*service).cluster,
            }
        };
        // SAFETY: a set word is 8 bytes and aligned so; the agent may store to it at any time.
        SetWord::from_word(unsafe { ptr::read_volatile(word.cast::<u64>()) })
    }

    /// The backend that is remembered by id and generation, if it may serve once more.
    #[inline(always)]
    pub(crate) fn reusable_backend(&self, id: BackendRef) -> Option<Choice> {
        let entry: *const Backend = BACKENDS.get_ptr(id.id)?;
        // The generation first: it moves before anything else does, and what it stands for is refilled only after this
        // program has ended.
        // SAFETY: the pointer is to a value of the map; the agent may store to it at any time.
        let state = unsafe {
            BackendState {
                generation: (&raw const (*entry).generation).read_volatile(),
                service: (&raw const (*entry).service).read_volatile(),
                flags: (&raw const (*entry).flags).read_volatile(),
            }
        };
        if !state.serves(id, self.index, self.set) {
            return None;
        }
        Some(Choice {
            // SAFETY: as above.
            addr: unsafe { volatile::load(&raw const (*entry).addr) },
            // SAFETY: as above.
            port: unsafe { (&raw const (*entry).port).read_volatile() },
            id,
            flags: state.flags,
        })
    }

    /// The client's last backend while that is usable and was used within the timeout; else a new one, remembered.
    #[inline(always)]
    fn choose_by_affinity(&self, client: Client) -> Result<Choice, DropReason> {
        // SAFETY: the helper takes nothing.
        let now = unsafe { bpf_ktime_get_coarse_ns() };
        // SAFETY: the pointer is to a value of the map; the agent may store to it at any time.
        let timeout = unsafe { ptr::read_volatile(&raw const (*self.service.at).affinity_timeout) };
        let key = client.of(self.index);
        let Some(entry) = AFFINITY.get_ptr_mut(key.as_key()) else {
            let new = self.any()?;
            return Ok(self.remember(&key, new, now));
        };
        // SAFETY: the pointer is to a value of the map, whose first 8 bytes are one aligned word.
        let (word, used) = unsafe { (Shared::new(entry.cast::<u64>()), Shared::new(&raw mut (*entry).used)) };
        let seen = word.load();
        let last_used = used.load();
        if affinity::holds(last_used, now, timeout)
            && let Some(choice) = self.reusable_backend(Affinity::from_word(seen))
        {
            if idle::is_to_refresh(last_used, now) {
                used.store(now);
            }
            return Ok(choice);
        }
        let new = self.any()?;
        if word.compare_exchange(seen, Affinity::to_word(new.id)) {
            used.store(now);
            return Ok(new);
        }
        // Another connection of the client was faster: both are to have the same.
        Ok(self.reusable_backend(Affinity::from_word(word.load())).unwrap_or(new))
    }

    /// Remembers a client that is new; what another connection of it has just remembered stands.
    #[inline(always)]
    fn remember(&self, key: &AffinityKeyWords, new: Choice, now: u64) -> Choice {
        let value = Affinity {
            backend: new.id,
            used: now,
        };
        if AFFINITY.insert(key.as_key(), value, u64::from(BPF_NOEXIST)).is_ok() {
            return new;
        }
        let Some(entry) = AFFINITY.get_ptr(key.as_key()) else {
            return new;
        };
        // SAFETY: the pointer is to a value of the map, whose first 8 bytes are one aligned word.
        let last = Affinity::from_word(unsafe { ptr::read_volatile(entry.cast::<u64>()) });
        self.reusable_backend(last).unwrap_or(new)
    }
}

/// Whose connections go to one backend.
#[derive(Clone, Copy)]
pub(crate) struct Client {
    who: Ip128,
    kind: ClientKind,
}

impl Client {
    /// A network namespace, by its cookie.
    #[inline(always)]
    pub(crate) fn netns(cookie: u64) -> Self {
        Self {
            who: Ip128([0, cookie]),
            kind: ClientKind::Netns,
        }
    }

    /// The source of packets.
    #[inline(always)]
    pub(crate) fn addr(addr: Ip128) -> Self {
        Self {
            who: addr,
            kind: ClientKind::Address,
        }
    }

    /// As the client of a service.
    #[inline(always)]
    fn of(self, service: u32) -> AffinityKeyWords {
        AffinityKeyWords {
            client: self.who.0,
            service,
            kind: self.kind as u32,
        }
    }
}
