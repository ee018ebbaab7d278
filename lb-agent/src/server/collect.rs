//! Metrics of the programs, read from the pinned maps on each scrape.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, PoisonError};

use lb_common::abi::{DropReason, Name, Service, ServiceIndex, ServiceStats, SizedMap, set_flags};
use lb_common::logic::generation;
use prometheus::proto::MetricFamily;
use prometheus::{IntCounter, IntCounterVec, IntGaugeVec, Opts, Registry};

use super::metrics::FAMILIES;
use crate::maps::bpf::PinnedMaps;
use crate::maps::gate::SharedMaps;
use lb_core::maps::MapError;
use lb_core::names::ServicePortName;
use lb_core::reconcile::Usage;

/// Reads metrics through map handles of its own, so that a scrape does not wait for the agent's loop.
pub(super) struct Collector {
    maps: Mutex<SharedMaps<PinnedMaps>>,
    per_service: bool,
    totals: Mutex<Totals>,
}

/// An error of a scrape.
#[derive(Debug, thiserror::Error)]
pub(super) enum CollectError {
    #[error(transparent)]
    Map(#[from] MapError),
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
}

/// Connections of all Services. The counters of a Service are removed with it; these only ever grow.
#[derive(Debug, Default)]
struct Totals {
    /// The counters at the last scrape, by service index and generation.
    seen: HashMap<(ServiceIndex, u32), ServiceStats>,
    /// Whether there was a scrape: connections from before the first do not count.
    begun: bool,
    sum: ServiceStats,
}

impl Totals {
    /// Adds the increase of all current counters.
    fn update(&mut self, now: HashMap<(ServiceIndex, u32), ServiceStats>) {
        for (key, stats) in &now {
            let before = match self.seen.entry(*key) {
                Entry::Occupied(entry) => *entry.get(),
                Entry::Vacant(_) if self.begun => ServiceStats::default(),
                Entry::Vacant(_) => *stats,
            };
            self.sum.connections += stats.connections.saturating_sub(before.connections);
            self.sum.refused += stats.refused.saturating_sub(before.refused);
        }
        self.seen = now;
        self.begun = true;
    }
}

/// Returns for each traffic policy whether it is Local and the Service has endpoints, but none on this node.
fn lacks_local(service: &Service) -> [(&'static str, bool); 2] {
    [("internal", service.internal), ("external", service.external)]
        .map(|(policy, set)| (policy, set.len == 0 && set.flags & set_flags::EMPTY_DROPS != 0))
}

fn ours(name: &str, help: &str) -> Opts {
    Opts::new(name, help).namespace("lb")
}

/// Adds the sizes of the maps and their use.
fn sizes(maps: &PinnedMaps, usage: Usage, registry: &Registry) -> Result<(), CollectError> {
    let capacity = IntGaugeVec::new(ours("map_capacity", "Capacity of a map in entries"), &["map"])?;
    let entries = IntGaugeVec::new(ours("map_entries", "Entries of a map in use"), &["map"])?;
    let capacities = maps.capacities();
    for map in SizedMap::ALL {
        capacity.with_label_values(&[map.name()]).set(capacities[*map].into());
        let used = maps.used(*map, &usage)?;
        entries.with_label_values(&[map.name()]).set(used as i64);
    }
    registry.register(Box::new(capacity))?;
    registry.register(Box::new(entries))?;
    Ok(())
}

/// Adds the counters of drops.
fn drops(maps: &PinnedMaps, registry: &Registry) -> Result<(), CollectError> {
    let help = "Refused calls, dropped packets, and connections served with a restriction, by reason";
    let drops = IntCounterVec::new(ours("drops_total", help), &["reason"])?;
    for reason in DropReason::ALL {
        drops.with_label_values(&[reason.label()]).inc_by(maps.drops(*reason)?);
    }
    registry.register(Box::new(drops))?;
    Ok(())
}

impl Collector {
    /// Creates a collector; `per_service` adds the connections of each Service port.
    pub(super) fn new(maps: SharedMaps<PinnedMaps>, per_service: bool) -> Self {
        Self {
            maps: Mutex::new(maps),
            per_service,
            totals: Mutex::default(),
        }
    }

    /// Collects all metrics for output. `usage` is that of the maps that the agent fills.
    pub(super) fn gather(&self, usage: Usage) -> Result<Vec<MetricFamily>, CollectError> {
        let registry = Registry::new();
        let mut maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        let (maps, _) = maps.enter()?;
        sizes(&maps, usage, &registry)?;
        drops(&maps, &registry)?;
        self.services(&maps, &registry)?;
        Ok(registry.gather())
    }

    fn services(&self, maps: &PinnedMaps, registry: &Registry) -> Result<(), CollectError> {
        let no_local = Opts::new(
            "sync_proxy_rules_no_local_endpoints_total",
            "Service ports with traffic policy Local that have endpoints, but none on this node",
        );
        let no_local = IntGaugeVec::new(no_local.subsystem("kubeproxy"), &["traffic_policy", "ip_family"])?;
        for policy in ["internal", "external"] {
            for family in FAMILIES {
                no_local.with_label_values(&[policy, family]);
            }
        }
        let labels = ["namespace", "service", "port", "protocol", "ip_family"];
        let connections = ours(
            "service_connections_total",
            "Connections translated to a backend, by Service port",
        );
        let connections = IntCounterVec::new(connections, &labels)?;
        let refused = ours("service_refused_total", "Refused connections, by Service port");
        let refused = IntCounterVec::new(refused, &labels)?;

        let mut all = HashMap::new();
        for index in (1..maps.capacities()[SizedMap::Services]).map(ServiceIndex::new) {
            let Some((service, stats)) = read(maps, index)? else {
                continue;
            };
            all.insert((index, service.generation), stats);
            let lacks = lacks_local(&service).into_iter().filter(|(_, lacks)| *lacks);
            let mut lacks = lacks.map(|(policy, _)| policy).peekable();
            if !self.per_service && lacks.peek().is_none() {
                continue;
            }
            let Some(name) = maps.name(index)? else { continue };
            for policy in lacks {
                no_local.with_label_values(&[policy, family(&name)]).inc();
            }
            if self.per_service {
                let owner = ServicePortName::of(Some(&name));
                let labels = [
                    &*owner.namespace,
                    &owner.name,
                    &owner.port.to_string(),
                    &owner.protocol,
                    family(&name),
                ];
                connections.with_label_values(&labels).inc_by(stats.connections);
                refused.with_label_values(&labels).inc_by(stats.refused);
            }
        }
        registry.register(Box::new(no_local))?;
        if self.per_service {
            registry.register(Box::new(connections))?;
            registry.register(Box::new(refused))?;
        }

        let mut totals = self.totals.lock().unwrap_or_else(PoisonError::into_inner);
        totals.update(all);
        for (name, help, value) in [
            (
                "connections_total",
                "Connections translated to a backend, since the agent started",
                totals.sum.connections,
            ),
            (
                "refused_total",
                "Connections refused by a Service, since the agent started",
                totals.sum.refused,
            ),
        ] {
            let counter = IntCounter::with_opts(ours(name, help))?;
            counter.inc_by(value);
            registry.register(Box::new(counter))?;
        }
        Ok(())
    }
}

/// Reads a service index and its counters; `None` if it is not in use.
fn read(maps: &PinnedMaps, index: ServiceIndex) -> Result<Option<(Service, ServiceStats)>, MapError> {
    let Some(service) = maps.service(index).filter(|s| generation::is_live(s.generation)) else {
        return Ok(None);
    };
    let stats = maps.stats(index)?;
    // Meanwhile the index may have been reused for another service port.
    let is_unchanged = maps
        .service(index)
        .is_some_and(|now| now.generation == service.generation);
    Ok(is_unchanged.then_some((service, stats)))
}

fn family(name: &Name) -> &'static str {
    FAMILIES[usize::from(name.family == 6)]
}

#[cfg(test)]
mod tests {
    use lb_common::abi::SetWord;

    use super::*;

    #[test]
    fn totals_never_decrease_when_services_are_removed() {
        let stats = |connections, refused| ServiceStats {
            connections,
            refused,
            ..ServiceStats::default()
        };
        let (one, two) = (ServiceIndex::new(1), ServiceIndex::new(2));
        let mut totals = Totals::default();
        // Counters of an earlier agent.
        totals.update([((one, 1), stats(100, 10))].into());
        assert_eq!(totals.sum, stats(0, 0));
        totals.update([((one, 1), stats(103, 10)), ((two, 1), stats(5, 1))].into());
        assert_eq!(totals.sum, stats(8, 1));
        // Another Service has the index now.
        totals.update([((one, 3), stats(2, 0)), ((two, 1), stats(5, 1))].into());
        assert_eq!(totals.sum, stats(10, 1));
        totals.update(HashMap::new());
        assert_eq!(totals.sum, stats(10, 1));
    }

    #[test]
    fn only_empty_sets_of_policy_local_lack_endpoints() {
        let set = |len, flags| SetWord { base: 0, len, flags };
        let service = |internal, external| Service {
            internal,
            external,
            ..Service::default()
        };
        let drops = set_flags::EMPTY_DROPS;
        for (internal, external, expected) in [
            (set(0, drops), set(0, 0), [true, false]),
            (set(1, 0), set(0, drops), [false, true]),
            (set(0, 0), set(2, drops), [false, false]),
        ] {
            let lacks = lacks_local(&service(internal, external));
            assert_eq!(lacks.map(|(_, lacks)| lacks), expected, "{internal:?} {external:?}");
        }
    }
}
