//! Comparison of the maps with the desired state.
//!
//! It shares the index, the policy, the desired state and the format of NAMES with the writer, but neither the plan nor
//! the record of the maps. A fault in the shared parts affects both sides, so this comparison cannot detect it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use lb_common::abi::{
    Addr, Backend, BackendSlot, FilterBit, Frontend, FrontendKey, FrontendKind, Name, Service, ServiceIndex, SetWord,
    SourceRange, backend_flags, map_name, set_flags,
};
use lb_common::logic::generation;
use serde::Serialize;

use crate::desired::{Desired, DesiredPort};
use crate::maps::Dump;
use crate::maps::prefix::Prefix;
use crate::names::{PortId, name_of, port_id};
use crate::policy::Member;

/// A difference between the maps and the desired state.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Drift {
    /// Map, entry and field.
    pub field: String,
    /// Description of the difference.
    pub message: String,
}

impl std::fmt::Display for Drift {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.field, self.message)
    }
}

/// Compares a dump of the maps with the desired state: every field of every entry that a lookup can reach, and entries
/// that are not desired.
#[must_use]
pub fn verify(desired: &Desired, dump: &Dump) -> Vec<Drift> {
    let mut check = Check {
        dump,
        drifts: BTreeSet::new(),
        indexes: HashMap::new(),
        sealed: HashMap::new(),
        broken: Vec::new(),
        wanted: BTreeSet::new(),
    };
    check.backends();
    check.names(desired);
    for (id, want) in desired.ports() {
        check.port(id, want);
    }
    check.stray_entries();
    check.frontends(desired);
    check.filter();
    check.source_ranges(desired);
    check.cluster_cidrs(desired);
    check.drifts.into_iter().collect()
}

struct Check<'a> {
    dump: &'a Dump,
    drifts: BTreeSet<Drift>,
    /// The service index of each desired port that has one.
    indexes: HashMap<Arc<PortId>, ServiceIndex>,
    /// Backends in use with a valid seal: their ids by service index, address and port.
    sealed: HashMap<(ServiceIndex, Addr, u16), u32>,
    /// Entries of BACKENDS with an invalid seal, in use or not.
    broken: Vec<(u32, &'a Backend)>,
    /// Backends that are accounted for.
    wanted: BTreeSet<u32>,
}

impl<'a> Check<'a> {
    fn drift(&mut self, field: String, message: impl Into<String>) {
        self.drifts.insert(Drift {
            field,
            message: message.into(),
        });
    }

    /// Reports a field that is wrong.
    fn equal<T: PartialEq + Copy + std::fmt::Debug>(&mut self, field: impl FnOnce() -> String, is: T, should: T) {
        if is != should {
            self.drift(field(), format!("is {is:?}, should be {should:?}"));
        }
    }

    fn backends(&mut self) {
        for (id, backend) in (0_u32..).zip(&self.dump.backends) {
            if !generation::is_sealed(backend) {
                if *backend != Backend::default() {
                    self.broken.push((id, backend));
                }
            } else if generation::is_live(backend.generation) {
                let key = (backend.service, backend.addr, backend.port);
                if let Some(other) = self.sealed.insert(key, id) {
                    self.drift(
                        format!("{}[{id}]", map_name::BACKENDS),
                        format!("is the same as {other}"),
                    );
                }
            }
        }
    }

    fn names(&mut self, desired: &Desired) {
        for (index, name) in &self.dump.names {
            let place = format!("{}[{index}]", map_name::NAMES);
            if index.is_none() || self.dump.service(*index).is_none() {
                self.drift(place, "is not the index of a service");
                continue;
            }
            let Some(id) = port_id(name) else {
                self.drift(place, "is not the name of a service port");
                continue;
            };
            match desired.shared_id(&id) {
                None => self.drift(place, format!("{id} is not desired")),
                Some(id) => {
                    if let Some(other) = self.indexes.insert(Arc::clone(id), *index) {
                        self.drift(place, format!("{id} has index {other} too"));
                        self.drift(
                            format!("{}[{other}]", map_name::NAMES),
                            format!("{id} has index {index} too"),
                        );
                    }
                }
            }
        }
    }

    fn port(&mut self, id: &Arc<PortId>, want: &DesiredPort) {
        let dump = self.dump;
        let index = self.indexes.get(id).copied();
        let entry = index.and_then(|index| Some((index, dump.names.get(&index)?, dump.service(index)?)));
        let Some((index, name, service)) = entry else {
            return self.drift(map_name::NAMES.into(), format!("{id} is missing"));
        };
        // Without `..` here and below, so that the compiler names this place for a new field. `set`, `wanted_backends`,
        // `frontends` and `source_ranges` compare the fields that are ignored here.
        let DesiredPort {
            port: wanted_port,
            created: _,
            flags: wanted_flags,
            affinity_timeout: wanted_timeout,
            sets,
            draining: _,
            frontends: _,
            source_ranges: _,
        } = want;
        let Name {
            generation,
            port,
            namespace: _,
            name: _,
            port_name: _,
            proto: _,
            family: _,
        } = *name;
        self.equal(|| format!("{}[{index}].port", map_name::NAMES), port, *wanted_port);
        if *name != name_of(id, port, generation) {
            self.drift(format!("{}[{index}]", map_name::NAMES), "has bytes behind a text");
        }
        if !generation::is_live(generation) {
            self.drift(
                format!("{}[{index}].generation", map_name::NAMES),
                format!("{generation} is not live"),
            );
        }
        let field = |name: &str| format!("{}[{index}].{name}", map_name::SERVICES);
        let Service {
            internal,
            external,
            cluster,
            flags,
            affinity_timeout,
            generation: service_generation,
            pad,
            reserved,
        } = *service;
        self.equal(|| field("flags"), flags, *wanted_flags);
        self.equal(|| field("affinity_timeout"), affinity_timeout, *wanted_timeout);
        if !generation::is_live(service_generation) {
            self.drift(
                field("generation"),
                format!("{service_generation} is that of an index that is not in use"),
            );
        } else if service_generation != generation {
            let both = format!("{} or {}[{index}].generation", field("generation"), map_name::NAMES);
            self.drift(both, format!("they are {service_generation} and {generation}"));
        }
        self.equal(|| field("pad"), pad, 0);
        for word in reserved {
            self.equal(|| field("reserved"), word, 0);
        }
        let wanted = self.wanted_backends(index, want);
        for ((name, word), set) in [("internal", internal), ("external", external), ("cluster", cluster)]
            .into_iter()
            .zip(sets.iter())
        {
            let drops = if set.empty_drops { set_flags::EMPTY_DROPS } else { 0 };
            self.equal(|| field(&format!("{name}.flags")), word.flags, drops);
            self.set(
                index,
                &|part| field(&format!("{name}.{part}")),
                word,
                &set.members.iter().collect::<Vec<_>>(),
                &wanted,
            );
        }
    }

    /// Returns the backends that a service port should have, with their ids. Reports missing backends and fields that
    /// differ.
    fn wanted_backends(&mut self, index: ServiceIndex, want: &DesiredPort) -> HashMap<(Addr, u16), u32> {
        let mut flags: BTreeMap<(IpAddr, u16), u16> = BTreeMap::new();
        let bits = [backend_flags::INTERNAL, backend_flags::EXTERNAL, backend_flags::CLUSTER];
        let sets = want.sets.iter().map(|set| &set.members).zip(bits);
        for (members, bit) in sets.chain([(&want.draining, 0)]) {
            for member in members.iter() {
                let local = if member.local { backend_flags::LOCAL } else { 0 };
                *flags.entry((member.addr, member.port)).or_default() |= bit | local;
            }
        }
        let mut ids = HashMap::new();
        for ((addr, port), should) in flags {
            let addr = Addr::from(addr);
            let id = self.sealed.get(&(index, addr, port)).copied();
            let Some(id) = id.or_else(|| self.broken_backend(index, addr, port)) else {
                let what = format!("{addr}:{port} of service index {index} is missing");
                self.drift(map_name::BACKENDS.into(), what);
                continue;
            };
            self.wanted.insert(id);
            ids.insert((addr, port), id);
            let is = self.dump.backends[id as usize].flags;
            self.equal(|| format!("{}[{id}].flags", map_name::BACKENDS), is, should);
        }
        ids
    }

    /// Returns the entry that differs from this backend in one field only, and reports that field.
    fn broken_backend(&mut self, index: ServiceIndex, addr: Addr, port: u16) -> Option<u32> {
        let (id, field) = self.broken.iter().find_map(|(id, backend)| {
            let Backend {
                addr: has_addr,
                port: has_port,
                flags: _,
                service,
                generation,
                seal,
            } = **backend;
            let differs = (has_addr != addr, has_port != port, service != index);
            let field = match differs {
                (false, false, false) => return Some((*id, "generation or .seal")),
                (true, false, false) => "addr",
                (false, true, false) => "port",
                (false, false, true) => "service",
                (true, true, _) | (true, _, true) | (_, true, true) => return None,
            };
            (generation::seal(addr, port, index, generation) == seal).then_some((*id, field))
        })?;
        let field = format!("{}[{id}].{field}", map_name::BACKENDS);
        self.drift(
            field,
            format!(
                "is not the value of {addr}:{port} of service index {index}, to which the rest of the entry belongs"
            ),
        );
        Some(id)
    }

    fn set(
        &mut self,
        index: ServiceIndex,
        field: &dyn Fn(&str) -> String,
        word: SetWord,
        members: &[Member],
        ids: &HashMap<(Addr, u16), u32>,
    ) {
        let dump = self.dump;
        if usize::from(word.len) != members.len() {
            return self.drift(field("len"), format!("is {}, should be {}", word.len, members.len()));
        }
        if members.is_empty() {
            return self.equal(|| field("base"), word.base, 0);
        }
        let base = word.base as usize;
        let Some(slots) = dump.slots.get(base..base + members.len()) else {
            return self.drift(field("base"), format!("{} is out of range", word.base));
        };
        let id_of = |member: &Member| ids.get(&(Addr::from(member.addr), member.port)).copied();
        let other = |slot: &BackendSlot, member: &Member| id_of(member).is_some_and(|id| id != slot.backend.id);
        let elsewhere = |slot: &BackendSlot, member: &Member| {
            other(slot, member) && (slot.addr != Addr::from(member.addr) || slot.port != member.port)
        };
        let mut pairs = slots.iter().zip(members);
        // All fields are those of another backend of this service: the set word changed, not the slot.
        let moved = |slot: &BackendSlot, member: &Member| {
            other(slot, member) && ids.get(&(slot.addr, slot.port)) == Some(&slot.backend.id)
        };
        if pairs.clone().all(|(slot, member)| elsewhere(slot, member))
            || pairs.clone().any(|(slot, member)| moved(slot, member))
            || pairs.any(|(slot, member)| other(slot, member)) && self.leads_there_too(index, word)
        {
            return self.drift(
                field("base"),
                format!("{} leads to slots that are not this set's", word.base),
            );
        }
        for ((at, slot), member) in (word.base..).zip(slots).zip(members) {
            let field = |name: &str| format!("{}[{at}].{name}", map_name::BACKEND_SLOTS);
            let BackendSlot {
                addr,
                port,
                flags,
                backend,
                service,
            } = *slot;
            self.equal(|| field("addr"), addr, Addr::from(member.addr));
            self.equal(|| field("port"), port, member.port);
            self.equal(
                || field("flags"),
                flags,
                if member.local { backend_flags::LOCAL } else { 0 },
            );
            // A build of layout 3 did not write it.
            if !service.is_none() {
                self.equal(|| field("service"), service, index);
            }
            // A missing backend was reported already. The generation of one with an invalid seal may itself be the
            // wrong field.
            let Some(id) = id_of(member) else { continue };
            self.equal(|| field("backend.id"), backend.id, id);
            let current = &dump.backends[id as usize];
            if generation::is_sealed(current) {
                self.equal(|| field("backend.generation"), backend.generation, current.generation);
            }
        }
    }

    /// Returns whether a set of another service has some of these slots.
    fn leads_there_too(&self, index: ServiceIndex, word: SetWord) -> bool {
        let end = |word: SetWord| word.base.saturating_add(word.len.into());
        let overlaps = |other: SetWord| other.base < end(word) && word.base < end(other);
        let others = self
            .dump
            .indexed_services()
            .filter(|(i, s)| *i != index && generation::is_live(s.generation));
        others.into_iter().any(|(_, s)| s.set_words().into_iter().any(overlaps))
    }

    fn stray_entries(&mut self) {
        let dump = self.dump;
        let used: BTreeSet<ServiceIndex> = self.indexes.values().copied().collect();
        for (index, service) in dump.indexed_services() {
            if !used.contains(&index) && generation::is_live(service.generation) {
                self.drift(
                    format!("{}[{index}].generation", map_name::SERVICES),
                    "is live, but has no owner",
                );
            }
        }
        for (id, backend) in (0_u32..).zip(&dump.backends) {
            if !self.wanted.contains(&id) && generation::is_live(backend.generation) {
                let what = format!(
                    "{}:{} of service index {} is live, but has no owner",
                    backend.addr, backend.port, backend.service
                );
                self.drift(format!("{}[{id}]", map_name::BACKENDS), what);
            }
        }
    }

    fn frontends(&mut self, desired: &Desired) {
        let dump = self.dump;
        let describe = |key: &FrontendKey| match (key.port, key.proto) {
            (0, 0) => format!("{}[{} (address mark)]", map_name::FRONTENDS, key.addr),
            (port, proto) => format!("{}[{}:{port}, protocol {proto}]", map_name::FRONTENDS, key.addr),
        };
        let mut wanted = BTreeSet::new();
        for key in desired.frontends() {
            let indexes = &self.indexes;
            let service_of = |id: &PortId| {
                let index = *indexes.get(id)?;
                Some((index, dump.service(index).copied().unwrap_or_default()))
            };
            let Some(should) = desired.frontend(&key, service_of) else {
                continue;
            };
            wanted.insert(key);
            let Some(is) = dump.frontends.get(&key) else {
                self.drift(describe(&key), "is missing");
                continue;
            };
            let Frontend {
                service,
                kind,
                pad,
                set,
            } = *is;
            self.equal(|| format!("{}.service", describe(&key)), service, should.service);
            let label = |kind: u8| FrontendKind::from_u8(kind).map_or("(unknown)", FrontendKind::label);
            self.equal(|| format!("{}.kind", describe(&key)), label(kind), label(should.kind));
            self.equal(|| format!("{}.pad", describe(&key)), pad, should.pad);
            let part = |name: &str| format!("{}.set.{name}", describe(&key));
            self.equal(|| part("base"), set.base, should.set.base);
            self.equal(|| part("len"), set.len, should.set.len);
            self.equal(|| part("flags"), set.flags, should.set.flags);
        }
        for key in dump.frontends.keys().filter(|key| !wanted.contains(*key)) {
            let pad = if key.pad == 0 { "" } else { " (its pad is not zero)" };
            self.drift(describe(key), format!("is not desired{pad}"));
        }
    }

    /// Reports addresses that programs would not look for. More bits than needed are no fault, and are there for a grace period
    /// after a removal.
    fn filter(&mut self) {
        let dump = self.dump;
        for addr in dump.addresses() {
            let bit = FilterBit::from(addr);
            if !dump.filter.contains(&bit) {
                let field = format!("{}[{}]", map_name::FILTER, bit.word());
                self.drift(field, format!("the bit of {addr} ({:#x}) is not set", bit.mask()));
            }
        }
    }

    fn source_ranges(&mut self, desired: &Desired) {
        let wanted: BTreeMap<_, _> = desired
            .ports()
            .filter_map(|(id, port)| Some((*self.indexes.get(id)?, port)))
            .flat_map(|(index, port)| port.source_ranges.iter().map(move |net| (Prefix::of(index, *net), 0)))
            .collect();
        let dump = self.dump;
        self.trie(&wanted, &dump.source_ranges, |range: &Prefix<SourceRange>| {
            let SourceRange { service, addr } = range.data;
            let before = format!("service {service}, ");
            describe_prefix(map_name::SOURCE_RANGES, &before, range.network(), (addr, range.len))
        });
    }

    fn cluster_cidrs(&mut self, desired: &Desired) {
        let wanted = desired.nodes().cidrs().collect();
        let dump = self.dump;
        self.trie(&wanted, &dump.cluster_cidrs, |cidr: &Prefix<Addr>| {
            describe_prefix(map_name::CLUSTER_CIDRS, "", cidr.network(), (cidr.data, cidr.len))
        });
    }

    fn trie<K: Ord>(&mut self, wanted: &BTreeMap<K, u32>, there: &BTreeMap<K, u32>, describe: impl Fn(&K) -> String) {
        for (key, should) in wanted {
            match there.get(key) {
                Some(is) => self.equal(|| describe(key), *is, *should),
                None => self.drift(describe(key), "is missing"),
            }
        }
        for key in there.keys().filter(|key| !wanted.contains_key(key)) {
            self.drift(describe(key), "is not desired");
        }
    }
}

/// Formats the key of a trie: as a network if it is one.
fn describe_prefix(map: &str, before: &str, net: Option<IpNet>, (addr, len): (Addr, u32)) -> String {
    match net {
        Some(net) => format!("{map}[{before}{net}]"),
        None => format!("{map}[{before}{addr}, {len} bits]"),
    }
}

#[cfg(test)]
mod tests;
