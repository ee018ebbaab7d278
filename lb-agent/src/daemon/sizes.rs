//! When maps grow and shrink: connects the decisions of [`lb_core::maps::sizing`] with the maps in use.

use std::io;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use lb_common::abi::SizedMap;
use lb_core::maps::Capacities;
use lb_core::maps::memory::Allowed;
use lb_core::maps::sizing::{self, Growth, Limits, Refused, Shrinking, grown};
use lb_core::model::{Problem, ProblemKind};
use lb_core::reconcile::Usage;
use tracing::warn;

use crate::node;
use crate::node::cgroup::MemoryCgroup;

/// Time after a move that failed before the next one.
const RETRY: Duration = Duration::from_secs(60);

/// The limits of the sizes of maps.
#[derive(Debug, Clone)]
pub struct MapSettings {
    /// Largest numbers of entries.
    pub bound: Capacities,
    /// Smallest numbers of entries that differ from those for the machine's memory.
    pub minimum: Vec<(SizedMap, u32)>,
    /// Largest size of all maps together in bytes; `None` for the default.
    pub memory: Option<u64>,
    /// Time for which a map is in little use before it shrinks.
    pub shrink_after: Duration,
}

/// Which maps may grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// The maps that the agent fills: a batch waits for their move, and not for the copy of a large CT.
    Agent,
    /// All maps.
    All,
}

/// The limits, the use of the maps, and the problems with their sizes.
pub(super) struct Sizes {
    limits: Limits,
    /// Value of `--map-memory`.
    flag: Option<u64>,
    /// Number of possible CPUs.
    cpus: u32,
    /// The agent's cgroup; `None` if it is not known.
    cgroup: Option<MemoryCgroup>,
    shrinking: Shrinking,
    /// Entries of the maps that programs fill; `None` before the first count.
    counted: Option<Capacities>,
    begun: Instant,
    /// Time of the next move, after one that failed.
    retry: Option<Instant>,
    /// Problems of the start and of moves, until the agent ends.
    lasting: Vec<Problem>,
    /// Problems of the last move, if that failed.
    failed: Vec<Problem>,
    /// Maps that cannot grow.
    refused: Vec<Refused>,
}

impl Sizes {
    pub(super) fn new(settings: MapSettings) -> anyhow::Result<Self> {
        let MapSettings {
            bound,
            minimum,
            memory,
            shrink_after,
        } = settings;
        let cgroup = MemoryCgroup::own().inspect_err(|error| {
            warn!(
                %error,
                "cannot find the agent's cgroup, so its memory limit does not limit the maps: set --map-memory if there is one"
            );
        });
        let cgroup = cgroup.ok();
        let machine = node::memory::read(cgroup.as_ref())
            .context("reading the machine's memory")?
            .machine;
        let minimum = minimum
            .into_iter()
            .fold(sizing::minimum(machine), |all, (map, entries)| all.with(map, entries));
        let cpus = aya::util::nr_cpus().map_err(|(path, error)| anyhow::anyhow!("{path}: {error}"))?;
        Ok(Self {
            limits: Limits::new(&minimum, bound),
            flag: memory,
            cpus: cpus as u32,
            cgroup,
            shrinking: Shrinking::new(shrink_after),
            counted: None,
            begun: Instant::now(),
            retry: None,
            lasting: Vec::new(),
            failed: Vec::new(),
            refused: Vec::new(),
        })
    }

    /// Returns the sizes that a start requires.
    pub(super) fn at_start(&self, pinned: Option<&Capacities>) -> Capacities {
        self.limits.at_start(pinned)
    }

    /// Returns the memory that maps may take.
    pub(super) fn allowed(&self, present: &Capacities) -> io::Result<Allowed> {
        let memory = node::memory::read(self.cgroup.as_ref())?;
        Ok(Allowed::new(self.flag, memory, present, self.cpus))
    }

    /// Records the entries of the maps that programs fill.
    pub(super) fn counted(&mut self, counts: Capacities) {
        self.counted = Some(counts);
    }

    /// Returns the sizes to grow to, if a map has to grow for the demand or the counted entries.
    pub(super) fn growth(
        &mut self,
        present: &Capacities,
        demand: Usage,
        scope: Scope,
    ) -> io::Result<Option<Capacities>> {
        let used = match scope {
            // Zero for the maps that programs fill, so these keep their sizes.
            Scope::Agent => demand.entries(),
            Scope::All => self.used(demand),
        };
        let decide = |allowed| grown(present, &used, &self.limits, allowed, self.cpus);
        let without_limit = decide(Allowed::ALL);
        // The limit costs system calls, and matters only if a map has to grow.
        let Growth { to, refused } = if without_limit.to == *present {
            without_limit
        } else {
            decide(self.allowed(present)?)
        };
        let is_decided = |map: SizedMap| scope == Scope::All || !map.is_filled_by_programs();
        self.refused.retain(|refused| !is_decided(refused.map));
        self.refused.extend(refused);
        Ok((to != *present && self.may_move()).then_some(to))
    }

    /// Returns the sizes to shrink to, if a map was in little use for long enough.
    pub(super) fn shrunk(&mut self, present: &Capacities, usage: Usage, needed: &Capacities) -> Option<Capacities> {
        // Before the first count nothing is known about the maps that programs fill.
        self.counted?;
        let (now, used) = (self.begun.elapsed(), self.used(usage));
        let to = self.shrinking.next(now, present, &used, needed, &self.limits);
        (to != *present && self.may_move()).then_some(to)
    }

    /// Returns the numbers of entries in use.
    fn used(&self, filled: Usage) -> Capacities {
        let counted = self.counted.unwrap_or(Capacities::uniform(0));
        // Each of the two has zero for the maps of the other.
        filled.entries().map(|map, entries| entries.max(counted[map]))
    }

    fn may_move(&self) -> bool {
        self.retry.is_none_or(|at| Instant::now() >= at)
    }

    /// Records the problems of the start.
    pub(super) fn started(&mut self, problems: Vec<Problem>) {
        self.lasting = problems;
    }

    /// Records the problems of a move. `moved`: whether the maps have other sizes now.
    pub(super) fn moved(&mut self, moved: bool, problems: Vec<Problem>) {
        self.retry = (!moved).then(|| Instant::now() + RETRY);
        self.failed.clear();
        if moved {
            self.lasting.extend(problems);
        } else {
            self.failed = problems;
        }
    }

    /// Returns the problems with the sizes of maps.
    pub(super) fn problems(&self) -> Vec<Problem> {
        let others = [&self.lasting, &self.failed].into_iter().flatten().cloned();
        let refused = self.refused.iter();
        let refused = refused.map(|it| Problem::new(it.map.name(), it.to_string()).kind(ProblemKind::Map));
        others.chain(refused).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_grows_the_maps_that_the_agent_fills_and_no_others() {
        let bound = Capacities::BOUND.with(SizedMap::UdpFlows, 1 << 15);
        let settings = MapSettings {
            bound,
            minimum: SizedMap::ALL.iter().map(|map| (*map, map.default_capacity())).collect(),
            memory: Some(u64::MAX),
            shrink_after: sizing::SHRINK_AFTER,
        };
        let mut sizes = Sizes::new(settings).unwrap();
        sizes.cgroup = None;
        let present = Capacities::DEFAULT;
        let demand = Usage {
            services: 500,
            ..Usage::default()
        };
        let counts = Capacities::uniform(0)
            .with(SizedMap::Conntrack, 60_000)
            .with(SizedMap::UdpFlows, 30_000);
        sizes.counted(counts);
        let to = |sizes: &mut Sizes, demand, scope| sizes.growth(&present, demand, scope).unwrap();
        let refused = |sizes: &Sizes| {
            sizes
                .problems()
                .into_iter()
                .map(|problem| problem.place)
                .collect::<Vec<_>>()
        };
        let services = present.with(SizedMap::Services, 1024);
        assert_eq!(to(&mut sizes, demand, Scope::Agent), Some(services));
        assert_eq!(refused(&sizes), Vec::<String>::new());
        let all = services
            .with(SizedMap::Conntrack, 1 << 17)
            .with(SizedMap::ConntrackNew, 1 << 16);
        assert_eq!(to(&mut sizes, demand, Scope::All), Some(all));
        assert_eq!(refused(&sizes), ["UDP_FLOWS"]);
        // The problem stays until all maps are decided about.
        assert_eq!(to(&mut sizes, Usage::default(), Scope::Agent), None);
        assert_eq!(refused(&sizes), ["UDP_FLOWS"]);
        sizes.counted(Capacities::uniform(0));
        assert_eq!(to(&mut sizes, Usage::default(), Scope::All), None);
        assert_eq!(refused(&sizes), Vec::<String>::new());
    }
}
