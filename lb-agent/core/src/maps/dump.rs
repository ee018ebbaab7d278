//! The content of the maps as values.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use lb_common::abi::{
    Addr, Backend, BackendSlot, FilterBit, Frontend, FrontendKey, FrontendKind, Name, Service, ServiceIndex, SetWord,
    SourceRange, backend_flags, cluster_flags, service_flags, set_flags,
};
use lb_common::logic::generation;

use super::prefix::Prefix;
use crate::model::Protocol;
use crate::names::port_id;

/// The content of all maps of the update protocol.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Dump {
    /// FRONTENDS.
    pub frontends: BTreeMap<FrontendKey, Frontend>,
    /// SERVICES, by index.
    pub services: Vec<Service>,
    /// BACKEND_SLOTS, by slot.
    pub slots: Vec<BackendSlot>,
    /// BACKENDS, by id.
    pub backends: Vec<Backend>,
    /// NAMES.
    pub names: BTreeMap<ServiceIndex, Name>,
    /// SOURCE_RANGES.
    pub source_ranges: BTreeMap<Prefix<SourceRange>, u32>,
    /// CLUSTER_CIDRS.
    pub cluster_cidrs: BTreeMap<Prefix<Addr>, u32>,
    /// NODE_ADDRS.
    pub node_addrs: BTreeSet<Addr>,
    /// The bits that are set in FILTER.
    pub filter: BTreeSet<FilterBit>,
}

impl Dump {
    /// Returns an entry of SERVICES, if the index is in range.
    pub fn service(&self, index: ServiceIndex) -> Option<&Service> {
        self.services.get(index.to_usize())
    }

    /// Returns the entries of SERVICES with their indexes.
    pub fn indexed_services(&self) -> impl Iterator<Item = (ServiceIndex, &Service)> {
        (0..).map(ServiceIndex::new).zip(&self.services)
    }

    /// Returns the addresses whose bits have to be set in FILTER, some of them repeatedly.
    pub fn addresses(&self) -> impl Iterator<Item = Addr> {
        let frontends = self.frontends.keys().map(|key| key.addr);
        frontends.chain(self.node_addrs.iter().copied())
    }

    /// Returns the longest network in CLUSTER_CIDRS that contains an address, with its flags.
    pub fn cluster_cidr(&self, addr: Addr) -> Option<(&Prefix<Addr>, u32)> {
        let around = self.cluster_cidrs.iter().filter(|(cidr, _)| cidr.contains(addr));
        around
            .max_by_key(|(cidr, _)| cidr.len)
            .map(|(cidr, flags)| (cidr, *flags))
    }

    /// Returns whether an address is inside the cluster.
    pub fn is_inside(&self, addr: Addr) -> bool {
        self.cluster_cidr(addr)
            .is_some_and(|(_, flags)| flags & cluster_flags::INSIDE != 0)
    }
}

/// Formats the maps as text: frontends, then each service with its sets resolved to addresses. Inconsistent entries are
/// shown as they are, and marked.
#[must_use]
pub fn render(dump: &Dump) -> String {
    Rendering(dump).to_string()
}

struct Rendering<'a>(&'a Dump);

impl fmt::Display for Rendering<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "frontends")?;
        for (key, value) in &self.0.frontends {
            let kind = FrontendKind::from_u8(value.kind).map_or("(unknown kind)", FrontendKind::label);
            if value.is_mark() {
                writeln!(f, "  {} {kind}", key.addr)?;
            } else {
                writeln!(
                    f,
                    "  {}/{} {kind} -> service {}",
                    key.addr.socket(key.port),
                    Protocol::from_number(key.proto).map_or_else(|| key.proto.to_string(), |it| it.to_string()),
                    value.service
                )?;
            }
        }
        for (index, service) in self.0.indexed_services() {
            if generation::is_live(service.generation) || self.0.names.contains_key(&index) {
                self.service(f, index, service)?;
            }
        }
        if !self.0.cluster_cidrs.is_empty() {
            writeln!(f, "inside the cluster")?;
        }
        for (cidr, flags) in &self.0.cluster_cidrs {
            let here = if flags & cluster_flags::HERE == 0 {
                ""
            } else {
                ", pods of this node"
            };
            let not = if flags & cluster_flags::INSIDE == 0 {
                ", not inside"
            } else {
                ""
            };
            match cidr.network() {
                Some(net) => writeln!(f, "  {net}{here}{not}")?,
                None => writeln!(f, "  {}, {} bits{here}{not}", cidr.data, cidr.len)?,
            }
        }
        Ok(())
    }
}

impl Rendering<'_> {
    fn service(&self, f: &mut fmt::Formatter<'_>, index: ServiceIndex, service: &Service) -> fmt::Result {
        let name = self.0.names.get(&index);
        match name.map(|name| (name.port, port_id(name))) {
            Some((port, Some(id))) => write!(f, "service {index}: {id}, port {port}")?,
            Some((_, None)) | None => write!(f, "service {index}: (no name)")?,
        }
        if service.flags & service_flags::AFFINITY != 0 {
            write!(f, ", affinity {} s", service.affinity_timeout)?;
        }
        if service.flags & service_flags::SOURCE_RANGES != 0 {
            f.write_str(", load-balancer addresses for some sources only")?;
        }
        let others = service.flags & !(service_flags::AFFINITY | service_flags::SOURCE_RANGES);
        if others != 0 {
            write!(f, ", flags {others:#x}")?;
        }
        if !generation::is_live(service.generation) {
            write!(f, " (not in use)")?;
        }
        writeln!(f)?;
        let of_service = self.0.source_ranges.keys().filter(|range| range.data.service == index);
        let ranges: Vec<_> = of_service
            .map(|range| match range.network() {
                Some(net) => net.to_string(),
                None => format!("{}, {} bits", range.data.addr, range.len),
            })
            .collect();
        if !ranges.is_empty() {
            writeln!(f, "  sources: {}", ranges.join(", "))?;
        }
        let sets = [
            ("internal", service.internal),
            ("external", service.external),
            ("cluster", service.cluster),
        ];
        let mut in_sets = BTreeSet::new();
        for (at, (_, word)) in sets.iter().enumerate() {
            // Sets that share their slots are shown once.
            if sets[..at].iter().all(|(_, before)| before != word) {
                let names: Vec<_> = sets
                    .iter()
                    .filter(|(_, other)| other == word)
                    .map(|(name, _)| *name)
                    .collect();
                self.set(f, &names.join(", "), *word, &mut in_sets)?;
            }
        }
        let live = (0_u32..)
            .zip(&self.0.backends)
            .filter(|(_, b)| generation::is_live(b.generation));
        for (id, backend) in live.filter(|(id, b)| b.service == index && !in_sets.contains(id)) {
            let destination = backend.addr.socket(backend.port);
            writeln!(f, "  draining: {destination}{} (backend {id})", local(backend.flags))?;
        }
        Ok(())
    }

    fn set(&self, f: &mut fmt::Formatter<'_>, names: &str, word: SetWord, in_sets: &mut BTreeSet<u32>) -> fmt::Result {
        if word.len == 0 {
            let drops = word.flags & set_flags::EMPTY_DROPS != 0;
            return writeln!(f, "  {names}: none, {}", if drops { "DROP" } else { "REJECT" });
        }
        let end = u64::from(word.base) + u64::from(word.len);
        writeln!(f, "  {names}: slots {}..{end}", word.base)?;
        for at in u64::from(word.base)..end {
            let Some(slot) = self.0.slots.get(at as usize) else {
                return writeln!(f, "    (out of range)");
            };
            in_sets.insert(slot.backend.id);
            let backend = self.0.backends.get(slot.backend.id as usize);
            let current = backend.is_some_and(|backend| backend.is_current(slot.backend));
            writeln!(
                f,
                "    {}{} (backend {}{})",
                slot.addr.socket(slot.port),
                local(slot.flags),
                slot.backend.id,
                if current { "" } else { ", which is gone" }
            )?;
        }
        Ok(())
    }
}

fn local(flags: u16) -> &'static str {
    if flags & backend_flags::LOCAL == 0 {
        ""
    } else {
        " on this node"
    }
}
