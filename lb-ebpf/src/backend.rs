//! Which backend a connection gets.

use core::ptr;

use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_coarse_ns};
use lb_common::abi::{
    Addr, Affinity, AffinityKey, Backend, DropReason, Frontend, Service, SetWord, client_kind, service_flags,
};
use lb_common::logic::connect::{self, Set};
use lb_common::logic::words::Words;
use lb_common::logic::{affinity, route};

use crate::atomic::Shared;
use crate::maps::{AFFINITY, BACKEND_SLOTS, BACKENDS, SERVICES};
use crate::words;

/// A backend, in registers.
#[derive(Clone, Copy)]
pub(crate) struct Choice {
    pub(crate) addr: Words,
    /// Host byte order.
    pub(crate) port: u16,
    pub(crate) backend: u32,
    pub(crate) generation: u32,
}

/// A service and the set of it that serves a socket.
pub(crate) struct Serving {
    index: u32,
    set: Set,
    service: *const Service,
    flags: u32,
}

/// The service of a frontend; `None` where the packet path is to decide.
#[inline(always)]
pub(crate) fn serving(frontend: Frontend) -> Result<Option<Serving>, DropReason> {
    let set = connect::set_for_socket(frontend)?;
    let service = SERVICES.get_ptr(frontend.service).ok_or(DropReason::BadServiceIndex)?;
    // SAFETY: the pointer is to a value of the map; the agent may store to it at any time.
    let flags = unsafe { ptr::read_volatile(&raw const (*service).flags) };
    Ok(route::is_for_sockets(frontend, flags).then_some(Serving {
        index: frontend.service,
        set,
        service,
        flags,
    }))
}

impl Serving {
    /// A backend for a new connection: the one that the client had last, where the service wants that, or any.
    #[inline(always)]
    pub(crate) fn choose(&self, netns: impl FnOnce() -> u64) -> Result<Choice, DropReason> {
        if self.flags & service_flags::AFFINITY == 0 {
            return self.any();
        }
        self.choose_by_affinity(netns())
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
            addr: unsafe { words::load(&raw const slot.addr) },
            port: slot.port,
            backend: slot.backend,
            generation: slot.generation,
        })
    }

    /// The set, read by one load: base and length always belong together.
    #[inline(always)]
    fn word(&self) -> SetWord {
        let service = self.service;
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
    pub(crate) fn again(&self, backend: u32, generation: u32) -> Option<Choice> {
        let entry: *const Backend = BACKENDS.get_ptr(backend)?;
        // The generation first: it moves before anything else does, and what it stands for is refilled only after this
        // program has ended.
        // SAFETY: the pointer is to a value of the map; the agent may store to it at any time.
        let (current, service, flags) = unsafe {
            (
                (&raw const (*entry).generation).read_volatile(),
                (&raw const (*entry).service).read_volatile(),
                (&raw const (*entry).flags).read_volatile(),
            )
        };
        if !connect::is_usable(current, service, flags, (self.index, generation), self.set) {
            return None;
        }
        Some(Choice {
            // SAFETY: as above.
            addr: unsafe { words::load(&raw const (*entry).addr) },
            // SAFETY: as above.
            port: unsafe { (&raw const (*entry).port).read_volatile() },
            backend,
            generation,
        })
    }

    /// The client's last backend while that is usable and was used within the timeout; else a new one, remembered.
    #[inline(always)]
    fn choose_by_affinity(&self, netns: u64) -> Result<Choice, DropReason> {
        // SAFETY: the helper takes nothing.
        let now = unsafe { bpf_ktime_get_coarse_ns() };
        // SAFETY: the pointer is to a value of the map; the agent may store to it at any time.
        let timeout = unsafe { ptr::read_volatile(&raw const (*self.service).affinity_timeout) };
        let key = Client::new(netns, self.index);
        let Some(entry) = AFFINITY.get_ptr_mut(key.as_key()) else {
            let new = self.any()?;
            return Ok(self.remember(&key, new, now));
        };
        // SAFETY: the pointer is to a value of the map, whose first 8 bytes are one aligned word.
        let (word, used) = unsafe { (Shared::new(entry.cast::<u64>()), Shared::new(&raw mut (*entry).used)) };
        let seen = word.load();
        let last_used = used.load();
        let (backend, generation) = Affinity::from_word(seen);
        if affinity::holds(last_used, now, timeout)
            && let Some(choice) = self.again(backend, generation)
        {
            if affinity::is_to_refresh(last_used, now) {
                used.store(now);
            }
            return Ok(choice);
        }
        let new = self.any()?;
        if word.compare_exchange(seen, Affinity::to_word(new.backend, new.generation)) {
            used.store(now);
            return Ok(new);
        }
        // Another connection of the client was faster: both are to have the same.
        let (backend, generation) = Affinity::from_word(word.load());
        Ok(self.again(backend, generation).unwrap_or(new))
    }

    /// Remembers a client that is new; what another connection of it has just remembered stands.
    #[inline(always)]
    fn remember(&self, key: &Client, new: Choice, now: u64) -> Choice {
        let value = Affinity {
            backend: new.backend,
            generation: new.generation,
            used: now,
        };
        if AFFINITY.insert(key.as_key(), value, u64::from(BPF_NOEXIST)).is_ok() {
            return new;
        }
        let Some(entry) = AFFINITY.get_ptr(key.as_key()) else {
            return new;
        };
        // SAFETY: the pointer is to a value of the map, whose first 8 bytes are one aligned word.
        let (backend, generation) = Affinity::from_word(unsafe { ptr::read_volatile(entry.cast::<u64>()) });
        self.again(backend, generation).unwrap_or(new)
    }
}

/// An [`AffinityKey`] in memory.
#[repr(C, align(8))]
struct Client([u32; 6]);

const _: () = assert!(size_of::<Client>() == size_of::<AffinityKey>());
const _: () = assert!(size_of::<Addr>() == 16);

impl Client {
    #[inline(always)]
    fn new(netns: u64, service: u32) -> Self {
        let b = netns.to_ne_bytes();
        let (a, z) = ([b[0], b[1], b[2], b[3]], [b[4], b[5], b[6], b[7]]);
        let (a, z) = (u32::from_ne_bytes(a), u32::from_ne_bytes(z));
        Self([0, 0, a, z, service, client_kind::NETNS])
    }

    #[inline(always)]
    fn as_key(&self) -> &AffinityKey {
        // SAFETY: same size, no less aligned, and every bit pattern is a key.
        unsafe { &*ptr::from_ref(self).cast::<AffinityKey>() }
    }
}
