//! Maps in memory that enforce the rules of the real ones: what the kernel would refuse is refused, and what would hurt
//! a program that runs at the same time is a panic.

use std::collections::{BTreeMap, BTreeSet};

use lb_common::abi::{Backend, BackendSlot, Frontend, FrontendKey, FrontendKind, Name, Service, SetWord, map_name};
use lb_common::logic::connect::Set;
use lb_common::logic::generation;

use super::{Capacities, Dump, Epoch, MapError, Maps, capacity_flag};
use crate::actual::{set_word_mut, set_words};

/// Maps in memory. Grace periods pass when [`Self::pass_grace`] or [`Maps::grace_wait`] says so.
#[derive(Debug, Clone)]
pub struct FakeMaps {
    /// The contents; tests may corrupt them.
    pub contents: Dump,
    capacities: Capacities,
    requested: Epoch,
    passed: Epoch,
    written: u64,
    /// Request that the newest deletion of a frontend needs, if no period has passed since.
    deleted: Option<Epoch>,
    /// Slots that a program may still read, with the request that ends it.
    slots_in_sight: BTreeMap<u32, Epoch>,
    /// Service indexes that a program may still hold, likewise.
    services_in_sight: BTreeMap<u32, Epoch>,
    /// Backends that a program may still hold, likewise.
    backends_in_sight: BTreeMap<u32, Epoch>,
    /// Check the invariants after each write: costs a look at everything.
    checked: bool,
}

impl FakeMaps {
    /// Empty maps.
    #[must_use]
    pub fn new(capacities: Capacities) -> Self {
        let zero = Service::default();
        Self {
            contents: Dump {
                services: vec![zero; capacities.services as usize],
                slots: vec![BackendSlot::default(); capacities.backend_slots as usize],
                backends: vec![Backend::default(); capacities.backends as usize],
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
            checked: true,
        }
    }

    /// Without looking at everything after each write, for large states.
    #[must_use]
    pub fn unchecked(mut self) -> Self {
        self.checked = false;
        self
    }

    /// A grace period passes for all that was asked so far.
    pub fn pass_grace(&mut self) {
        self.passed = self.requested;
        // What is in sight without a request after it stays so: nobody has asked.
        let passed = self.passed;
        for seen in [
            &mut self.slots_in_sight,
            &mut self.services_in_sight,
            &mut self.backends_in_sight,
        ] {
            seen.retain(|_, epoch| *epoch > passed);
        }
        self.deleted = self.deleted.filter(|epoch| *epoch > passed);
    }

    /// Checks that no lookup of a frontend can miss its service, and that no set leads to a missing backend.
    ///
    /// # Panics
    /// Where it can.
    pub fn assert_sound(&self) {
        for (key, value) in &self.contents.frontends {
            if value.kind == FrontendKind::Address as u8 {
                continue;
            }
            let service = &self.contents.services[value.service as usize];
            assert!(
                generation::is_live(service.generation),
                "{key:?} leads to a service that is not live"
            );
            for word in set_words(service) {
                for slot in self.slots(word) {
                    let backend = &self.contents.backends[slot.backend as usize];
                    assert!(
                        generation::is_current(backend.generation, slot.generation) && backend.addr == slot.addr,
                        "{key:?} leads to backend {} that is gone",
                        slot.backend
                    );
                    assert_eq!(backend.service, value.service, "{key:?} leads to a stranger's backend");
                }
            }
        }
    }

    fn slots(&self, word: SetWord) -> &[BackendSlot] {
        let base = word.base as usize;
        &self.contents.slots[base..base + usize::from(word.len)]
    }

    /// The request that would end all that runs now.
    fn next_epoch(&self) -> Epoch {
        self.requested + 1
    }

    fn wrote(&mut self, bytes: usize) {
        self.written += bytes as u64;
        if self.checked {
            self.assert_sound();
        }
    }

    fn led_to(&self) -> BTreeSet<u32> {
        let frontends = self.contents.frontends.values();
        frontends
            .filter(|f| f.kind != FrontendKind::Address as u8)
            .map(|f| f.service)
            .collect()
    }

    /// Slots that some service's set word names, led to or not.
    fn published(&self, range: std::ops::Range<u32>) -> bool {
        self.contents.services.iter().flat_map(set_words).any(|word| {
            let end = word.base + u32::from(word.len);
            word.len != 0 && word.base < range.end && range.start < end
        })
    }
}

fn out_of_range(map: &'static str, index: u32, len: usize) -> MapError {
    MapError::OutOfRange {
        map,
        index,
        capacity: len as u32,
    }
}

fn full(map: &'static str, capacity: u32) -> MapError {
    MapError::Full {
        map,
        flag: capacity_flag(map),
        capacity,
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
        if self.contents.frontends.len() as u32 >= self.capacities.frontends {
            return Err(full(map_name::FRONTENDS, self.capacities.frontends));
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
        self.services_in_sight.insert(old.service, epoch);
        *old = value;
        self.wrote(size_of::<Frontend>());
        Ok(())
    }

    fn delete_frontend(&mut self, key: FrontendKey) -> Result<(), MapError> {
        let epoch = self.next_epoch();
        if let Some(old) = self.contents.frontends.remove(&key) {
            self.deleted = Some(epoch);
            self.services_in_sight.insert(old.service, epoch);
            self.wrote(size_of::<FrontendKey>());
        }
        Ok(())
    }

    fn write_service(&mut self, index: u32, value: Service) -> Result<(), MapError> {
        assert!(
            !self.led_to().contains(&index),
            "a service that frontends lead to is overwritten"
        );
        assert!(
            !self.services_in_sight.contains_key(&index),
            "a service that a program may hold is overwritten"
        );
        let len = self.contents.services.len();
        let at = self.contents.services.get_mut(index as usize);
        *at.ok_or_else(|| out_of_range(map_name::SERVICES, index, len))? = value;
        self.wrote(size_of::<Service>());
        Ok(())
    }

    fn write_service_settings(&mut self, index: u32, value: Service) -> Result<(), MapError> {
        let len = self.contents.services.len();
        let at = self.contents.services.get_mut(index as usize);
        let at = at.ok_or_else(|| out_of_range(map_name::SERVICES, index, len))?;
        *at = Service {
            internal: at.internal,
            external: at.external,
            cluster: at.cluster,
            ..value
        };
        self.wrote(size_of::<Service>() - 3 * size_of::<SetWord>());
        Ok(())
    }

    fn publish_set(&mut self, index: u32, set: Set, word: SetWord) -> Result<(), MapError> {
        let epoch = self.next_epoch();
        let len = self.contents.services.len();
        let at = self.contents.services.get_mut(index as usize);
        let old = set_word_mut(at.ok_or_else(|| out_of_range(map_name::SERVICES, index, len))?, set);
        let before = std::mem::replace(old, word);
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
        assert!(!self.published(range.clone()), "published slots are overwritten");
        for slot in range.clone() {
            assert!(
                !self.slots_in_sight.contains_key(&slot),
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
        assert!(generation::is_live(value.generation) && generation::is_sealed(&value));
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
        at.generation = generation;
        at.seal = generation::seal(at.addr, at.port, at.service, generation);
        self.backends_in_sight.insert(id, epoch);
        self.wrote(8);
        Ok(())
    }

    fn write_name(&mut self, index: u32, value: &Name) -> Result<(), MapError> {
        let there = self.contents.names.contains_key(&index);
        if !there && self.contents.names.len() as u32 >= self.capacities.services {
            return Err(full(map_name::NAMES, self.capacities.services));
        }
        self.contents.names.insert(index, *value);
        self.wrote(4 + size_of::<Name>());
        Ok(())
    }

    fn delete_name(&mut self, index: u32) -> Result<(), MapError> {
        if self.contents.names.remove(&index).is_some() {
            self.wrote(4);
        }
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
        assert!(epoch <= self.requested, "nobody asked for grace period {epoch}");
        if epoch > self.passed {
            self.pass_grace();
        }
        Ok(())
    }

    fn written(&self) -> u64 {
        self.written
    }

    fn dump(&self) -> Result<Dump, MapError> {
        Ok(self.contents.clone())
    }
}
