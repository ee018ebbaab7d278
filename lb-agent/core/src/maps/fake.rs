//! Maps in memory that enforce the rules of the real ones. They refuse what the kernel would refuse, and panic at a
//! write that would harm a running program.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::abi::{
    Addr, Backend, BackendSlot, FilterBit, Frontend, FrontendKey, FrontendKind, Name, Service, ServiceIndex, Set,
    SetWord, SizedMap, SourceRange, map_name, map_spec, service_flags,
};
use lb_common::logic::generation;

use super::prefix::Prefix;
use super::resize::{base_generation, unused_backend, unused_service};
use super::{Capacities, Dump, Epoch, MapError, Maps};
use crate::names::port_id;

/// Maps in memory. Grace periods pass at calls of [`Self::pass_grace`] or [`Maps::grace_wait`].
#[derive(Debug, Clone)]
pub struct FakeMaps {
    /// The content; tests may corrupt it.
    pub contents: Dump,
    capacities: Capacities,
    requested: Epoch,
    passed: Epoch,
    written: u64,
    /// The request for a grace period that the newest deletion of a frontend needs, if none has passed since.
    deleted: Option<Epoch>,
    /// Slots that a program may still read, with the request for a grace period that ends this.
    slots_in_sight: BTreeMap<u32, Epoch>,
    /// Service indexes that a program may still use, with the request for a grace period that ends this.
    services_in_sight: BTreeMap<ServiceIndex, Epoch>,
    /// Backends that a program may still use, with the request for a grace period that ends this.
    backends_in_sight: BTreeMap<u32, Epoch>,
    /// Services that a program may still treat as restricted by source, with the request for a grace period that ends
    /// this.
    restrictions_in_sight: BTreeMap<ServiceIndex, Epoch>,
    /// Bits of FILTER whose addresses were removed, with the request for a grace period that a program may still look for them.
    bits_in_sight: BTreeMap<FilterBit, Epoch>,
    /// Size of SOURCE_RANGES.
    source_ranges: u32,
    checks: Checks,
}

/// Checks at each write, in addition to those of the written entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Checks {
    /// No further checks, for large states.
    None,
    /// Rules of a write that need a scan of all entries.
    Rules,
    /// The rules of each write, and the consistency of all entries after it.
    Sound,
}

impl FakeMaps {
    /// Creates empty maps.
    #[must_use]
    pub fn new(capacities: Capacities) -> Self {
        let zero = Service::default();
        Self {
            contents: Dump {
                services: vec![zero; capacities[SizedMap::Services] as usize],
                slots: vec![BackendSlot::default(); capacities[SizedMap::BackendSlots] as usize],
                backends: vec![Backend::default(); capacities[SizedMap::Backends] as usize],
                ..Dump::default()
            },
            capacities,
            requested: 0,
            passed: 0,
            written: 0,
            deleted: None,
            slots_in_sight: BTreeMap::new(),
            services_in_sight: BTreeMap::new(),
            backends_in_sight: BTreeMap::new(),
            restrictions_in_sight: BTreeMap::new(),
            bits_in_sight: BTreeMap::new(),
            source_ranges: map_spec::SOURCE_RANGES.default_capacity(),
            checks: Checks::Sound,
        }
    }

    /// Replaces the maps by maps of another size with the same content.
    ///
    /// # Panics
    /// If an entry that is in use has no place in them.
    pub fn resize(&mut self, capacities: Capacities) {
        let Dump {
            services,
            slots,
            backends,
            frontends,
            ..
        } = &mut self.contents;
        let [to_services, to_backends, to_slots] =
            [SizedMap::Services, SizedMap::Backends, SizedMap::BackendSlots].map(|map| capacities[map] as usize);
        assert!(frontends.len() <= capacities[SizedMap::Frontends] as usize);
        let dropped: Vec<_> = services.drain(to_services.min(services.len())..).collect();
        assert!(dropped.iter().all(|service| !generation::is_live(service.generation)));
        let base = base_generation(services[0].generation, dropped.iter().map(|service| service.generation));
        services[0].generation = base;
        services.resize(to_services, unused_service(base));
        let dropped: Vec<_> = backends.drain(to_backends.min(backends.len())..).collect();
        assert!(dropped.iter().all(|backend| !generation::is_live(backend.generation)));
        let base = base_generation(backends[0].generation, dropped.iter().map(|backend| backend.generation));
        backends[0] = unused_backend(base);
        backends.resize(to_backends, unused_backend(base));
        slots.resize(to_slots, BackendSlot::default());
        self.capacities = capacities;
    }

    /// Disables the scan of all entries at each write, for large states.
    #[must_use]
    pub fn unchecked(mut self) -> Self {
        self.checks = Checks::None;
        self
    }

    /// Checks the rules of each write, but not the consistency of all entries: for content that the test has corrupted.
    #[must_use]
    pub fn corrupted(mut self) -> Self {
        self.checks = Checks::Rules;
        self
    }

    /// Sets the size of SOURCE_RANGES.
    #[must_use]
    pub fn with_source_ranges(mut self, room: u32) -> Self {
        self.source_ranges = room;
        self
    }

    /// Lets a grace period pass for all requests so far.
    pub fn pass_grace(&mut self) {
        self.pass_grace_until(self.requested);
    }

    /// Lets a grace period pass that began after request `epoch`, and before any later one. Entries that were
    /// removed after the last request remain readable.
    pub fn pass_grace_until(&mut self, epoch: Epoch) {
        self.passed = self.passed.max(epoch.min(self.requested));
        let passed = self.passed;
        for seen in [&mut self.slots_in_sight, &mut self.backends_in_sight] {
            seen.retain(|_, epoch| *epoch > passed);
        }
        for seen in [&mut self.services_in_sight, &mut self.restrictions_in_sight] {
            seen.retain(|_, epoch| *epoch > passed);
        }
        self.bits_in_sight.retain(|_, epoch| *epoch > passed);
        self.deleted = self.deleted.filter(|epoch| *epoch > passed);
    }

    /// Returns the newest request for a grace period.
    #[must_use]
    pub fn grace_requested(&self) -> Epoch {
        self.requested
    }

    /// Checks that no lookup of a frontend can miss its service, that no set leads to a missing backend or to one of
    /// another service, that what a frontend leads to has a name, that no slot belongs to two services, and that a
    /// service that a program may still hold is still there.
    ///
    /// # Panics
    /// If one of these does not hold.
    pub fn assert_sound(&self) {
        for (key, value) in &self.contents.frontends {
            assert_eq!((key.pad, value.pad), (0, [0; 3]), "{key:?} has bytes in its padding");
            match FrontendKind::from_u8(value.kind) {
                None => panic!("{key:?} is of no kind"),
                Some(FrontendKind::Address | FrontendKind::ExternalAddress) => {
                    assert_eq!(*key, FrontendKey::address_mark(key.addr), "a mark on a port");
                    assert_eq!(value.service, ServiceIndex::NONE, "a mark leads to a service");
                    assert_eq!(value.set, SetWord::NONE, "a mark has a set");
                }
                Some(_) => {
                    assert!(
                        key.port != 0 && !value.service.is_none(),
                        "{key:?} leads to {}",
                        value.service
                    );
                    self.assert_service(value.service, &format!("{key:?}"));
                    self.assert_set_in_frontend(*value, &format!("{key:?}"));
                    let generation = self.contents.services[value.service.to_usize()].generation;
                    let named = self.contents.names.get(&value.service).map(|name| name.generation);
                    assert_eq!(named, Some(generation), "{key:?} leads to a service without a name");
                }
            }
        }
        for addr in self.contents.addresses() {
            assert!(
                self.contents.filter.contains(&addr.into()),
                "the bit of {addr} in FILTER is not set"
            );
        }
        for index in self.services_in_sight.keys() {
            let service = self.contents.service(*index);
            assert!(
                service.is_some_and(|service| generation::is_live(service.generation)),
                "service {index} is gone, but a program may hold it"
            );
        }
        let mut owners = BTreeMap::new();
        for (index, service) in self.contents.services.iter().enumerate() {
            for word in service.set_words() {
                for slot in word.base..word.base + u32::from(word.len) {
                    let owner = *owners.entry(slot).or_insert(index);
                    assert_eq!(owner, index, "slot {slot} belongs to two services");
                }
            }
        }
    }

    fn assert_service(&self, index: ServiceIndex, who: &str) {
        let service = self.contents.service(index);
        let service = service.unwrap_or_else(|| panic!("{who} leads to service {index}, which is out of range"));
        assert!(
            generation::is_live(service.generation),
            "{who} leads to a service that is not live"
        );
        for word in service.set_words() {
            self.assert_set(index, word, who);
        }
    }

    fn assert_set(&self, index: ServiceIndex, word: SetWord, who: &str) {
        let base = word.base as usize;
        let slots = self.contents.slots.get(base..base + usize::from(word.len));
        for slot in slots.unwrap_or_else(|| panic!("{who} leads to slots that are out of range: {word:?}")) {
            let backend = self
                .contents
                .backends
                .get(slot.backend.id as usize)
                .copied()
                .unwrap_or_default();
            assert!(
                backend.is_current(slot.backend) && generation::is_sealed(&backend),
                "{who} leads to backend {} that is gone",
                slot.backend.id
            );
            assert_eq!(
                (backend.addr, backend.port),
                (slot.addr, slot.port),
                "{who} leads to another backend"
            );
            assert_eq!(backend.service, index, "{who} leads to a stranger's backend");
        }
    }

    /// Checks the slots that a program takes from the set in a frontend: those that have the same service.
    fn assert_set_in_frontend(&self, frontend: Frontend, who: &str) {
        let flags = self
            .contents
            .service(frontend.service)
            .map_or(0, |service| service.flags);
        assert!(
            flags == 0 || self.slots_of_frontend(frontend).next().is_none(),
            "{who} has a set, so that sockets do not read the flags of its service"
        );
        for base in self.slots_of_frontend(frontend) {
            let word = SetWord { base, len: 1, flags: 0 };
            self.assert_set(frontend.service, word, who);
        }
    }

    /// Returns the slots of the set in a frontend that have the same service.
    fn slots_of_frontend(&self, frontend: Frontend) -> impl Iterator<Item = u32> {
        let SetWord { base, len, flags: _ } = frontend.set;
        let slots = base..base.saturating_add(len.into());
        slots.filter(move |slot| {
            let slot = self.contents.slots.get(*slot as usize);
            slot.is_some_and(|slot| slot.service == frontend.service && !frontend.service.is_none())
        })
    }

    /// Returns the request for a grace period after which all programs that run now have ended.
    fn next_epoch(&self) -> Epoch {
        self.requested + 1
    }

    fn wrote(&mut self, bytes: usize) {
        self.written += bytes as u64;
        if self.checks == Checks::Sound {
            self.assert_sound();
        }
    }

    /// Records that a program may have read this frontend.
    fn seen(&mut self, frontend: Frontend, epoch: Epoch) {
        let slots: Vec<_> = self.slots_of_frontend(frontend).map(|slot| (slot, epoch)).collect();
        self.slots_in_sight.extend(slots);
        let service = self.contents.service(frontend.service);
        let live = service.is_some_and(|service| generation::is_live(service.generation));
        if live && !frontend.is_mark() && self.checks > Checks::None {
            self.services_in_sight.insert(frontend.service, epoch);
        }
    }

    fn led_to(&self, index: ServiceIndex) -> bool {
        let mut frontends = self.contents.frontends.values();
        frontends.any(|f| !f.is_mark() && f.service == index)
    }

    /// Returns the service with a set word that contains any of these slots, whether a frontend leads to it or not, or the service of a
    /// frontend with such a set.
    fn published(&self, range: &std::ops::Range<u32>) -> Option<usize> {
        let overlaps = |word: SetWord| {
            let end = word.base.saturating_add(word.len.into());
            word.len != 0 && word.base < range.end && range.start < end
        };
        let mut services = self.contents.services.iter();
        let mut frontends = self.contents.frontends.values();
        let by_frontend =
            frontends.find(|frontend| self.slots_of_frontend(**frontend).any(|slot| range.contains(&slot)));
        services
            .position(|service| service.set_words().into_iter().any(overlaps))
            .or(by_frontend.map(|frontend| frontend.service.to_usize()))
    }

    fn has_source_ranges(&self, index: ServiceIndex) -> bool {
        let mut ranges = self.contents.source_ranges.keys();
        self.checks > Checks::None && ranges.any(|range| range.data.service == index && range.network().is_some())
    }

    /// Asserts that a generation moves by one at a time, so that none is ever used again.
    fn check_generation(&self, index: ServiceIndex, new: u32) {
        if let Some(old) = self.contents.service(index) {
            let next = [generation::taken(old.generation), generation::withdrawn(old.generation)];
            let by_one = next.contains(&new) && new.wrapping_sub(old.generation) < 2;
            assert!(
                new == old.generation || by_one,
                "generation of service {index}: {} to {new}",
                old.generation
            );
        }
    }
}

fn out_of_range(map: &'static str, index: u32, len: usize) -> MapError {
    MapError::OutOfRange {
        map,
        index,
        capacity: len as u32,
    }
}

impl Maps for FakeMaps {
    fn capacities(&self) -> Capacities {
        self.capacities
    }

    fn insert_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), MapError> {
        assert!(
            self.deleted.is_none(),
            "insertion within a grace period after a deletion"
        );
        if self.contents.frontends.contains_key(&key) {
            return Err(MapError::Unexpected {
                map: map_name::FRONTENDS,
                what: format!("{key:?} is there already"),
            });
        }
        if self.contents.frontends.len() as u32 >= self.capacities[SizedMap::Frontends] {
            return Err(MapError::full(
                &map_spec::FRONTENDS,
                self.capacities[SizedMap::Frontends],
            ));
        }
        self.contents.frontends.insert(key, value);
        self.wrote(size_of::<FrontendKey>() + size_of::<Frontend>());
        Ok(())
    }

    fn store_frontend(&mut self, key: FrontendKey, value: Frontend) -> Result<(), MapError> {
        let epoch = self.next_epoch();
        let Some(old) = self.contents.frontends.get_mut(&key) else {
            return Err(MapError::Unexpected {
                map: map_name::FRONTENDS,
                what: format!("{key:?} is not there"),
            });
        };
        let before = std::mem::replace(old, value);
        self.seen(before, epoch);
        self.wrote(size_of::<Frontend>());
        Ok(())
    }

    fn delete_frontend(&mut self, key: FrontendKey) -> Result<(), MapError> {
        let epoch = self.next_epoch();
        if let Some(old) = self.contents.frontends.remove(&key) {
            self.deleted = Some(epoch);
            self.bits_in_sight.insert(key.addr.into(), epoch);
            self.seen(old, epoch);
            self.wrote(size_of::<FrontendKey>());
        }
        Ok(())
    }

    fn write_service(&mut self, index: ServiceIndex, value: Service) -> Result<(), MapError> {
        assert!(
            self.checks == Checks::None || !self.led_to(index),
            "a service that frontends lead to is overwritten"
        );
        assert!(
            !self.services_in_sight.contains_key(&index),
            "a service that a program may hold is overwritten"
        );
        self.check_generation(index, value.generation);
        if self.checks > Checks::None {
            value
                .set_words()
                .into_iter()
                .for_each(|word| self.assert_set(index, word, "a new service"));
        }
        let len = self.contents.services.len();
        let at = self.contents.services.get_mut(index.to_usize());
        *at.ok_or_else(|| out_of_range(map_name::SERVICES, index.get(), len))? = value;
        self.wrote(size_of::<Service>());
        Ok(())
    }

    fn write_service_settings(&mut self, index: ServiceIndex, value: Service) -> Result<(), MapError> {
        self.check_generation(index, value.generation);
        let len = self.contents.services.len();
        let at = self.contents.services.get_mut(index.to_usize());
        let at = at.ok_or_else(|| out_of_range(map_name::SERVICES, index.get(), len))?;
        let was_restricted = at.flags & service_flags::SOURCE_RANGES != 0;
        *at = Service {
            internal: at.internal,
            external: at.external,
            cluster: at.cluster,
            ..value
        };
        if was_restricted && value.flags & service_flags::SOURCE_RANGES == 0 {
            self.restrictions_in_sight.insert(index, self.next_epoch());
        }
        self.wrote(size_of::<Service>() - 3 * size_of::<SetWord>());
        Ok(())
    }

    fn publish_set(&mut self, index: ServiceIndex, set: Set, word: SetWord) -> Result<(), MapError> {
        if self.checks > Checks::None {
            self.assert_set(index, word, "a new set");
        }
        let epoch = self.next_epoch();
        let len = self.contents.services.len();
        let at = self.contents.services.get_mut(index.to_usize());
        let at = at.ok_or_else(|| out_of_range(map_name::SERVICES, index.get(), len))?;
        let before = std::mem::replace(at.set_word_mut(set), word);
        self.slots_in_sight
            .extend((before.base..before.base.saturating_add(before.len.into())).map(|slot| (slot, epoch)));
        self.wrote(size_of::<SetWord>());
        Ok(())
    }

    fn write_slots(&mut self, base: u32, slots: &[BackendSlot]) -> Result<(), MapError> {
        let range = base..base + slots.len() as u32;
        let len = self.contents.slots.len();
        if range.end as usize > len {
            return Err(out_of_range(map_name::BACKEND_SLOTS, base, len));
        }
        // The service of a slot may be added at any time: until then programs take it for one of another service.
        let mut pairs = self.contents.slots[range.start as usize..].iter().zip(slots);
        let adds_service = pairs.all(|(old, new)| {
            let service = ServiceIndex::NONE;
            old == new || *old == BackendSlot { service, ..*new }
        });
        if self.checks > Checks::None && !adds_service {
            assert_eq!(self.published(&range), None, "published slots are overwritten");
        }
        for slot in range.clone() {
            assert!(
                adds_service || !self.slots_in_sight.contains_key(&slot),
                "slot {slot} is overwritten while a program may read it"
            );
        }
        self.contents.slots[range.start as usize..range.end as usize].copy_from_slice(slots);
        self.wrote(size_of_val(slots));
        Ok(())
    }

    fn fill_backend(&mut self, id: u32, value: Backend) -> Result<(), MapError> {
        assert!(
            !self.backends_in_sight.contains_key(&id),
            "backend {id} is refilled while a program may hold it"
        );
        let len = self.contents.backends.len();
        let at = self.contents.backends.get_mut(id as usize);
        let at = at.ok_or_else(|| out_of_range(map_name::BACKENDS, id, len))?;
        assert!(!generation::is_live(at.generation), "backend {id} is in use");
        assert_eq!(
            value.generation,
            generation::taken(at.generation),
            "backend {id}: not the next generation"
        );
        assert!(generation::is_sealed(&value), "backend {id} is not sealed");
        *at = value;
        self.wrote(size_of::<Backend>());
        Ok(())
    }

    fn write_backend_flags(&mut self, id: u32, flags: u16) -> Result<(), MapError> {
        let len = self.contents.backends.len();
        let at = self.contents.backends.get_mut(id as usize);
        at.ok_or_else(|| out_of_range(map_name::BACKENDS, id, len))?.flags = flags;
        self.wrote(8);
        Ok(())
    }

    fn withdraw_backend(&mut self, id: u32, generation: u32) -> Result<(), MapError> {
        let epoch = self.next_epoch();
        let len = self.contents.backends.len();
        let at = self.contents.backends.get_mut(id as usize);
        let at = at.ok_or_else(|| out_of_range(map_name::BACKENDS, id, len))?;
        assert_eq!(
            generation,
            generation::withdrawn(at.generation),
            "backend {id}: not the next generation"
        );
        at.generation = generation;
        at.seal = generation::seal(at.addr, at.port, at.service, generation);
        self.backends_in_sight.insert(id, epoch);
        self.wrote(8);
        Ok(())
    }

    fn write_name(&mut self, index: ServiceIndex, value: &Name) -> Result<(), MapError> {
        let old = self.contents.names.get(&index);
        let there = old.is_some();
        assert!(
            old.is_none_or(|old| port_id(old) == port_id(value)),
            "index {index} gets the name of another before it is cleared"
        );
        assert!(
            there || !self.has_source_ranges(index),
            "index {index} gets a name while source ranges of an earlier one are there"
        );
        if !there && self.contents.names.len() as u32 >= self.capacities[SizedMap::Services] {
            return Err(MapError::full(&map_spec::NAMES, self.capacities[SizedMap::Services]));
        }
        self.contents.names.insert(index, *value);
        self.wrote(4 + size_of::<Name>());
        Ok(())
    }

    fn delete_name(&mut self, index: ServiceIndex) -> Result<(), MapError> {
        let live = self
            .contents
            .service(index)
            .is_some_and(|s| generation::is_live(s.generation));
        assert!(!live, "the name of service {index} is removed while it is live");
        assert!(
            !self.has_source_ranges(index),
            "the name of service {index} is removed, but not its source ranges"
        );
        if self.contents.names.remove(&index).is_some() {
            self.wrote(4);
        }
        Ok(())
    }

    fn write_source_range(&mut self, range: Prefix<SourceRange>) -> Result<(), MapError> {
        let ranges = &mut self.contents.source_ranges;
        if !ranges.contains_key(&range) && ranges.len() as u32 >= self.source_ranges {
            return Err(MapError::full(&map_spec::SOURCE_RANGES, self.source_ranges));
        }
        ranges.insert(range, 0);
        self.wrote(4 + size_of::<SourceRange>() + 4);
        Ok(())
    }

    fn delete_source_range(&mut self, range: Prefix<SourceRange>) -> Result<(), MapError> {
        assert!(
            !self.restrictions_in_sight.contains_key(&range.data.service),
            "{range:?} is removed while a program may look for it"
        );
        if self.contents.source_ranges.remove(&range).is_some() {
            self.wrote(4 + size_of::<SourceRange>());
        }
        Ok(())
    }

    fn write_cluster_cidr(&mut self, cidr: Prefix<Addr>, flags: u32) -> Result<(), MapError> {
        self.contents.cluster_cidrs.insert(cidr, flags);
        self.wrote(4 + size_of::<Addr>() + 4);
        Ok(())
    }

    fn delete_cluster_cidr(&mut self, cidr: Prefix<Addr>) -> Result<(), MapError> {
        if self.contents.cluster_cidrs.remove(&cidr).is_some() {
            self.wrote(4 + size_of::<Addr>());
        }
        Ok(())
    }

    fn write_node_addrs(&mut self, wanted: &BTreeSet<Addr>) -> Result<usize, MapError> {
        let epoch = self.next_epoch();
        let there = &mut self.contents.node_addrs;
        let gone = there.difference(wanted).map(|addr| (FilterBit::from(*addr), epoch));
        self.bits_in_sight.extend(gone);
        let room = map_spec::NODE_ADDRS.default_capacity() as usize;
        let fitting: BTreeSet<_> = wanted.iter().copied().take(room).collect();
        let (missing, written) = (
            wanted.len() - fitting.len(),
            fitting.symmetric_difference(there).count(),
        );
        *there = fitting;
        self.wrote(written * size_of::<Addr>());
        Ok(missing)
    }

    fn set_filter_bit(&mut self, bit: FilterBit) -> Result<(), MapError> {
        self.contents.filter.insert(bit);
        self.wrote(8);
        Ok(())
    }

    fn clear_filter_bit(&mut self, bit: FilterBit) -> Result<(), MapError> {
        assert!(
            !self.bits_in_sight.contains_key(&bit),
            "{bit:?} is cleared while a program may look for an address that has it"
        );
        self.contents.filter.remove(&bit);
        self.wrote(8);
        Ok(())
    }

    fn grace_begin(&mut self) -> Epoch {
        self.requested += 1;
        self.requested
    }

    fn grace_passed(&self) -> Epoch {
        self.passed
    }

    fn grace_wait(&mut self, epoch: Epoch) -> Result<(), MapError> {
        assert!(epoch <= self.requested, "grace period {epoch} was not requested");
        self.pass_grace_until(epoch);
        Ok(())
    }

    fn written(&self) -> u64 {
        self.written
    }

    fn dump(&self) -> Result<Dump, MapError> {
        Ok(self.contents.clone())
    }
}
