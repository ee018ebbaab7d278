//! The numbers of entries that maps should have, from their use: when a map grows or shrinks, and by how much.
//!
//! A map grows before more than four fifths of it are in use, to a power of two of which half is in use at most, and shrinks
//! after less than a fifth was in use for an hour. Programs fill some maps while no agent runs, so these have a minimum that
//! follows the machine's memory.
//!
//! CT_NEW has half the size of CT, but at least its minimum, whatever its use. It evicts the least recently used entry, so a flood of unreplied SYNs
//! fills it at any size, and growth would only cost memory. The size that a node needs is that of the flows which are
//! opened during one round trip, and that follows the number of established flows.

use std::fmt;
use std::time::Duration;

use lb_common::abi::SizedMap;

use super::Capacities;
use super::memory::Allowed;
use super::resize::room;

/// Time for which less than a fifth of a map is in use before it shrinks.
pub const SHRINK_AFTER: Duration = Duration::from_secs(3600);

/// The order in which maps get memory: those that hold Services first.
const ORDER: [SizedMap; SizedMap::COUNT] = [
    SizedMap::Services,
    SizedMap::Frontends,
    SizedMap::Backends,
    SizedMap::BackendSlots,
    SizedMap::Conntrack,
    SizedMap::ConntrackNew,
    SizedMap::SocketsMore,
    SizedMap::Sockets,
    SizedMap::UdpFlows,
    SizedMap::Affinity,
];

/// Returns the smallest sizes on a machine with this memory in bytes: room for 32,768 to 131,072 flows, one for each
/// 256 KiB of memory.
#[must_use]
pub fn minimum(machine: u64) -> Capacities {
    let flows = (machine >> 18).clamp(1 << 15, 1 << 17) as u32;
    // The power of two at or below it.
    let flows = 1 << flows.ilog2();
    Capacities::DEFAULT
        .with(SizedMap::Conntrack, 2 * flows)
        .with(
            SizedMap::ConntrackNew,
            flows.max(SizedMap::ConntrackNew.default_capacity()),
        )
        .with(
            SizedMap::SocketsMore,
            flows.max(SizedMap::SocketsMore.default_capacity()),
        )
        .with(SizedMap::UdpFlows, flows)
}

/// The smallest and largest size of each map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The smallest sizes.
    pub minimum: Capacities,
    /// The largest sizes.
    pub bound: Capacities,
}

impl Limits {
    /// Returns limits with these bounds. A minimum above its bound is lowered to it.
    #[must_use]
    pub fn new(minimum: &Capacities, bound: Capacities) -> Self {
        let minimum = minimum.map(|map, entries| entries.min(bound[map]));
        Self { minimum, bound }
    }

    /// Returns the sizes that a start requires: those of the pinned maps, within the limits.
    #[must_use]
    pub fn at_start(&self, pinned: Option<&Capacities>) -> Capacities {
        let present = pinned.unwrap_or(&self.minimum);
        present.map(|map, entries| entries.clamp(self.minimum[map], self.bound[map]))
    }
}

/// What keeps a map from growing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Limit {
    /// The flag of the map.
    Flag,
    /// The memory of all maps.
    Memory,
}

/// A map that does not get the size that it should have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refused {
    /// The map.
    pub map: SizedMap,
    /// Number of entries that it needs.
    pub needed: u32,
    /// Number of entries that it has or gets.
    pub entries: u32,
    /// The limit.
    pub limit: Limit,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            map,
            needed,
            entries,
            limit,
        } = self;
        let name = map.name();
        write!(
            f,
            "{name} has {entries} entries, of which {needed} are needed, and cannot grow: raise "
        )?;
        match limit {
            Limit::Flag => write!(f, "--{}", map.flag()),
            Limit::Memory => write!(f, "--map-memory, or the memory limit of the agent's cgroup"),
        }
    }
}

/// The sizes after growth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Growth {
    /// The sizes.
    pub to: Capacities,
    /// Maps that need more room than they get.
    pub refused: Vec<Refused>,
}

/// Returns whether more than four fifths of a map are in use.
fn is_tight(used: u32, entries: u32) -> bool {
    u64::from(used) * 5 > u64::from(entries) * 4
}

/// Returns whether less than a fifth of a map is in use.
fn is_loose(used: u32, entries: u32) -> bool {
    u64::from(used) * 5 < u64::from(entries)
}

/// Returns the power of two of which at most half is in use.
fn target(used: u32) -> u32 {
    used.saturating_mul(2).checked_next_power_of_two().unwrap_or(1 << 31)
}

/// Returns the number of entries that decides about the size of a map. A move copies all records of sockets to
/// SOCKETS_MORE, which therefore needs room for those of SOCKETS too.
fn load(map: SizedMap, used: &Capacities) -> u32 {
    let records = used[SizedMap::Sockets].saturating_add(used[SizedMap::SocketsMore]);
    match map {
        SizedMap::SocketsMore => records,
        SizedMap::ConntrackNew => 0,
        SizedMap::Services
        | SizedMap::Frontends
        | SizedMap::Backends
        | SizedMap::BackendSlots
        | SizedMap::Sockets
        | SizedMap::UdpFlows
        | SizedMap::Affinity
        | SizedMap::Conntrack => used[map],
    }
}

/// Returns the size of CT_NEW next to a CT of a size.
fn beside(conntrack: u32, limits: &Limits) -> u32 {
    let map = SizedMap::ConntrackNew;
    (conntrack / 2).clamp(limits.minimum[map], limits.bound[map])
}

/// Decides about growth. `used`: the numbers of entries that the maps have or need. `allowed`: the memory that the maps may take, which
/// only refuses growth. If a map grows, maps of which more than half is in use grow with it, so that the next move is far away.
#[must_use]
pub fn grown(present: &Capacities, used: &Capacities, limits: &Limits, allowed: Allowed, cpus: u32) -> Growth {
    let mut growth = Growth {
        to: *present,
        refused: Vec::new(),
    };
    let is_needed = |map: &SizedMap| {
        let map = *map;
        let is_bound = present[map] >= limits.bound[map];
        is_tight(load(map, used), present[map]) && !is_bound
    };
    let has_move = ORDER.iter().any(is_needed);
    for map in ORDER {
        let (load, entries) = (load(map, used), present[map]);
        let wanted = match map {
            SizedMap::ConntrackNew if growth.to[SizedMap::Conntrack] > present[SizedMap::Conntrack] => {
                beside(growth.to[SizedMap::Conntrack], limits)
            }
            SizedMap::ConntrackNew => entries,
            _ if is_tight(load, entries) || (has_move && load > entries / 2) => target(load),
            _ => entries,
        };
        let bounded = wanted.min(limits.bound[map]);
        let mut new = bounded;
        let allowed = if map.is_filled_by_programs() {
            allowed.for_programs()
        } else {
            allowed
        };
        let is_over = |new: u32| !allowed.allows(present, &growth.to.with(map, new), cpus);
        while new > entries && is_over(new) {
            new = (new / 2).next_power_of_two();
        }
        // The records would not fit during the move.
        if map == SizedMap::Sockets && growth.to[SizedMap::SocketsMore] < records_room(used) {
            new = entries;
        }
        let is_limited = new < bounded;
        growth.to = growth.to.with(map, new.max(entries));
        // Programs evict from AFFINITY and CT_NEW, and SOCKETS_MORE has the records that SOCKETS has no slot for.
        let is_evicting = matches!(map, SizedMap::Affinity | SizedMap::ConntrackNew | SizedMap::Sockets);
        if is_tight(load, growth.to[map]) && !is_evicting {
            growth.refused.push(Refused {
                map,
                needed: load,
                entries: growth.to[map],
                limit: if is_limited { Limit::Memory } else { Limit::Flag },
            });
        }
    }
    growth
}

/// Returns the size that SOCKETS_MORE needs for a move of SOCKETS and SOCKETS_MORE.
fn records_room(used: &Capacities) -> u32 {
    let [sockets, more] = [SizedMap::Sockets, SizedMap::SocketsMore].map(|map| room(map, used[map]));
    sockets.saturating_add(more)
}

/// Since when less than a fifth of each map is in use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shrinking {
    after: Duration,
    since: [Option<Duration>; SizedMap::COUNT],
}

impl Shrinking {
    /// Creates the state in which no map is known to be in little use. `after`: the time until a map shrinks.
    #[must_use]
    pub fn new(after: Duration) -> Self {
        Self {
            after,
            since: [None; SizedMap::COUNT],
        }
    }

    /// Returns the sizes of maps that were in little use for long enough; `present` if there are none. `needed`: the smallest
    /// number of entries that each map can have. `now`: time since any fixed point.
    pub fn next(
        &mut self,
        now: Duration,
        present: &Capacities,
        used: &Capacities,
        needed: &Capacities,
        limits: &Limits,
    ) -> Capacities {
        let mut to = *present;
        for (map, since) in SizedMap::ALL.iter().zip(&mut self.since) {
            let (map, load) = (*map, load(*map, used));
            let needed = match map {
                SizedMap::SocketsMore => records_room(used).max(needed[map]),
                _ => needed[map],
            };
            let new = match map {
                SizedMap::ConntrackNew => beside(to[SizedMap::Conntrack], limits),
                _ => target(load).max(limits.minimum[map]),
            };
            let needed = needed.checked_next_power_of_two().unwrap_or(u32::MAX);
            let new = new.max(needed).min(present[map]);
            let is_low = match map {
                // It follows CT.
                SizedMap::ConntrackNew => to[SizedMap::Conntrack] < present[SizedMap::Conntrack],
                _ => is_loose(load, present[map]),
            };
            if !is_low || new == present[map] {
                *since = None;
                continue;
            }
            let since = *since.get_or_insert(now);
            if map == SizedMap::ConntrackNew || now.saturating_sub(since) >= self.after {
                to = to.with(map, new);
            }
        }
        if to != *present {
            self.since = [None; SizedMap::COUNT];
        }
        to
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::maps::memory;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    const PRESENT: Capacities = Capacities::uniform(1024);
    const NOTHING: Capacities = Capacities::uniform(0);

    fn limits() -> Limits {
        Limits::new(&Capacities::uniform(256), Capacities::uniform(1 << 20))
    }

    /// Decides about maps of [`PRESENT`], whose size together has a limit.
    fn grow(used: Capacities, limits: &Limits, total: u64) -> Growth {
        grown(&PRESENT, &used, limits, Allowed { total, ..Allowed::ALL }, 2)
    }

    #[test]
    fn a_map_grows_when_more_than_four_fifths_are_in_use() {
        for (used, entries) in [
            (0, 1024),
            (819, 1024),
            (820, 2048),
            (1024, 2048),
            (1025, 4096),
            (100_000, 1 << 18),
            (524_288, 1 << 20),
        ] {
            for map in SizedMap::ALL {
                let growth = grow(NOTHING.with(*map, used), &limits(), u64::MAX);
                let expected = match map {
                    // It follows CT.
                    SizedMap::ConntrackNew => 1024,
                    _ => entries,
                };
                assert_eq!(growth.to[*map], expected, "{map:?} {used}");
                assert_eq!(growth.refused, [], "{map:?} {used}");
            }
        }
    }

    #[test]
    fn maps_that_are_half_full_grow_with_another_one_only() {
        let half = NOTHING.with(SizedMap::Backends, 600);
        assert_eq!(grow(half, &limits(), u64::MAX).to, PRESENT);
        let both = half.with(SizedMap::Services, 900);
        let expected = PRESENT.with(SizedMap::Services, 2048).with(SizedMap::Backends, 2048);
        assert_eq!(grow(both, &limits(), u64::MAX).to, expected);
    }

    #[test]
    fn unreplied_flows_have_half_the_room_of_established_ones() {
        let flood = NOTHING.with(SizedMap::ConntrackNew, 1024);
        assert_eq!(grow(flood, &limits(), u64::MAX).to, PRESENT);
        let flows = NOTHING.with(SizedMap::Conntrack, 10_000);
        let expected = PRESENT
            .with(SizedMap::Conntrack, 1 << 15)
            .with(SizedMap::ConntrackNew, 1 << 14);
        assert_eq!(grow(flows, &limits(), u64::MAX).to, expected);
    }

    #[test]
    fn socket_records_grow_together_with_room_for_all_of_them() {
        let used = NOTHING.with(SizedMap::Sockets, 900).with(SizedMap::SocketsMore, 100);
        let growth = grow(used, &limits(), u64::MAX);
        let expected = PRESENT.with(SizedMap::Sockets, 2048).with(SizedMap::SocketsMore, 2048);
        assert_eq!((growth.to, growth.refused), (expected, Vec::new()));
        // SOCKETS_MORE has no room for a move, so SOCKETS stays too.
        let limits = Limits::new(&NOTHING, limits().bound.with(SizedMap::SocketsMore, 1024));
        let growth = grow(used, &limits, u64::MAX);
        assert_eq!(growth.to, PRESENT);
        let refused: Vec<_> = growth.refused.iter().map(|r| (r.map, r.limit)).collect();
        assert_eq!(refused, [(SizedMap::SocketsMore, Limit::Flag)]);
    }

    #[test]
    fn the_flag_bounds_growth() {
        let limits = Limits::new(&NOTHING, limits().bound.with(SizedMap::Services, 1500));
        let growth = grow(NOTHING.with(SizedMap::Services, 1100), &limits, u64::MAX);
        assert_eq!((growth.to[SizedMap::Services], growth.refused), (1500, Vec::new()));
        let growth = grow(NOTHING.with(SizedMap::Services, 1300), &limits, u64::MAX);
        let refused = Refused {
            map: SizedMap::Services,
            needed: 1300,
            entries: 1500,
            limit: Limit::Flag,
        };
        assert_eq!(growth.refused, [refused]);
        assert!(refused.to_string().contains("--max-services"), "{refused}");
    }

    #[test]
    fn memory_bounds_growth_and_services_come_first() {
        let used = NOTHING
            .with(SizedMap::Backends, 100_000)
            .with(SizedMap::Conntrack, 100_000);
        let total = |to: &Capacities| memory::total(to, 2);
        // Room for the backends, and for a part of what the flows should have.
        let full = grow(used, &limits(), u64::MAX).to;
        let limit = total(&full);
        let growth = grow(used, &limits(), limit);
        assert_eq!(growth.to[SizedMap::Backends], 1 << 18);
        assert!(growth.to[SizedMap::ConntrackNew] < full[SizedMap::ConntrackNew]);
        // Clients cannot take the last fourth.
        assert!(total(&growth.to) <= limit - limit / 4);
        let services = NOTHING.with(SizedMap::BackendSlots, 100_000);
        let allowed = Allowed {
            total: limit,
            ..Allowed::ALL
        };
        let more = grown(&growth.to, &services, &limits(), allowed, 2);
        assert_eq!((more.to[SizedMap::BackendSlots], more.refused), (1 << 18, Vec::new()));
        // No room for anything.
        let growth = grow(used, &limits(), 0);
        assert_eq!(growth.to, PRESENT);
        let refused: Vec<_> = growth.refused.iter().map(|r| (r.map, r.limit)).collect();
        let expected = [SizedMap::Backends, SizedMap::Conntrack].map(|map| (map, Limit::Memory));
        assert_eq!(refused, expected);
        assert!(growth.refused[0].to_string().contains("--map-memory"));
    }

    #[test]
    fn a_map_grows_as_far_as_it_fits_beside_the_present_one() {
        let used = NOTHING.with(SizedMap::Backends, 100_000);
        let of = |entries| memory::of(SizedMap::Backends, entries, 2);
        for (moved, entries, is_refused) in [
            (of(1 << 18), 1 << 18, false),
            (of(1 << 18) - 1, 1 << 17, false),
            (of(1 << 17) - 1, 1 << 16, true),
            (of(2048) - 1, 1024, true),
        ] {
            let growth = grown(&PRESENT, &used, &limits(), Allowed { moved, ..Allowed::ALL }, 2);
            assert_eq!(growth.to, PRESENT.with(SizedMap::Backends, entries), "{moved}");
            let refused: Vec<_> = growth.refused.iter().map(|r| (r.map, r.limit)).collect();
            let expected = is_refused.then_some((SizedMap::Backends, Limit::Memory));
            assert_eq!(refused, expected.into_iter().collect::<Vec<_>>(), "{moved}");
        }
    }

    #[test]
    fn default_bounds_have_room_for_30000_services_with_10_endpoints() {
        let limits = Limits::new(&minimum(4 * GIB), Capacities::BOUND);
        let start = limits.at_start(None);
        // Two families, two ports, and two sets of endpoints.
        let used = NOTHING
            .with(SizedMap::Services, 120_000)
            .with(SizedMap::Frontends, 300_000)
            .with(SizedMap::Backends, 1_000_000)
            .with(SizedMap::BackendSlots, 2_000_000);
        assert_eq!(grown(&start, &used, &limits, Allowed::ALL, 8).refused, []);
        let used = NOTHING
            .with(SizedMap::Services, 30_000)
            .with(SizedMap::Frontends, 60_000)
            .with(SizedMap::Backends, 300_000)
            .with(SizedMap::BackendSlots, 300_000);
        let allowed = Allowed {
            total: 400 * MIB,
            ..Allowed::ALL
        };
        let growth = grown(&start, &used, &limits, allowed, 8);
        assert_eq!(growth.refused, []);
    }

    #[test]
    fn the_minimum_follows_the_memory_of_the_machine() {
        for (machine, flows, unreplied) in [
            (GIB, 1 << 15, 1 << 16),
            (8 * GIB, 1 << 15, 1 << 16),
            (16 * GIB, 1 << 16, 1 << 16),
            (24 * GIB, 1 << 16, 1 << 16),
            (1024 * GIB, 1 << 17, 1 << 17),
        ] {
            let minimum = minimum(machine);
            assert_eq!(minimum[SizedMap::Conntrack], 2 * flows, "{machine}");
            assert_eq!(minimum[SizedMap::ConntrackNew], unreplied, "{machine}");
            assert_eq!(minimum[SizedMap::UdpFlows], flows, "{machine}");
            let records = minimum[SizedMap::Sockets] + minimum[SizedMap::SocketsMore];
            assert!(records > 1 << 15, "{machine}");
        }
    }

    #[test]
    fn a_start_keeps_pinned_sizes_within_the_limits() {
        let limits = Limits::new(&Capacities::uniform(100), Capacities::uniform(1000));
        assert_eq!(limits.at_start(None), Capacities::uniform(100));
        for (pinned, expected) in [(50, 100), (100, 100), (500, 500), (1000, 1000), (5000, 1000)] {
            let pinned = Capacities::uniform(pinned);
            assert_eq!(limits.at_start(Some(&pinned)), Capacities::uniform(expected));
        }
        let limits = Limits::new(&Capacities::uniform(100), Capacities::uniform(10));
        assert_eq!(limits.at_start(None), Capacities::uniform(10));
    }

    fn seconds(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[test]
    fn a_map_shrinks_after_an_hour_of_little_use() {
        let mut shrinking = Shrinking::new(SHRINK_AFTER);
        let busy = Capacities::uniform(500);
        let low = busy.with(SizedMap::Affinity, 100);
        let mut next = |now, used: &Capacities| shrinking.next(seconds(now), &PRESENT, used, &NOTHING, &limits());
        assert_eq!(next(0, &low), PRESENT);
        assert_eq!(next(3599, &low), PRESENT);
        // A busy moment in between.
        assert_eq!(next(3600, &busy), PRESENT);
        assert_eq!(next(3601, &low), PRESENT);
        assert_eq!(next(7200, &low), PRESENT);
        assert_eq!(next(7201, &low), PRESENT.with(SizedMap::Affinity, 256));
        assert_eq!(next(7202, &low), PRESENT, "the time starts again");
    }

    #[test]
    fn a_map_keeps_its_minimum_and_the_room_that_it_needs() {
        let after = |used: Capacities, needed: Capacities, limits: &Limits| {
            let mut shrinking = Shrinking::new(Duration::ZERO);
            shrinking.next(seconds(0), &PRESENT, &used, &needed, limits)
        };
        let limits = limits();
        assert_eq!(after(NOTHING, NOTHING, &limits), Capacities::uniform(256));
        let needed = NOTHING.with(SizedMap::Backends, 300).with(SizedMap::BackendSlots, 1000);
        let expected = Capacities::uniform(256)
            .with(SizedMap::Backends, 512)
            .with(SizedMap::BackendSlots, 1024);
        assert_eq!(after(NOTHING, needed, &limits), expected);
        // CT_NEW follows CT, but not below what it has.
        let used = Capacities::uniform(500).with(SizedMap::Conntrack, 200);
        let needed = NOTHING.with(SizedMap::ConntrackNew, 300);
        let expected = PRESENT.with(SizedMap::Conntrack, 512).with(SizedMap::ConntrackNew, 512);
        assert_eq!(after(used, needed, &limits), expected);
        // Records of sockets.
        let used = Capacities::uniform(500)
            .with(SizedMap::Sockets, 150)
            .with(SizedMap::SocketsMore, 50);
        let expected = PRESENT.with(SizedMap::Sockets, 512).with(SizedMap::SocketsMore, 512);
        assert_eq!(after(used, NOTHING, &limits).with(SizedMap::SocketsMore, 512), expected);
    }

    #[test]
    fn what_has_shrunk_does_not_grow_again_at_once() {
        for used in 0..200 {
            let used = Capacities::uniform(used);
            let mut shrinking = Shrinking::new(Duration::ZERO);
            let to = shrinking.next(seconds(0), &PRESENT, &used, &used, &limits());
            let growth = grown(&to, &used, &limits(), Allowed::ALL, 2);
            assert_eq!((growth.to, growth.refused), (to, Vec::new()), "{used:?}");
        }
    }
}
