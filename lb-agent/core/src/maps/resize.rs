//! Which pinned maps a start replaces by maps of another size, and how a start continues a move that was interrupted.

use lb_common::abi::{Backend, Capacity, MapSpec, MovePhase, Service, SizedMap, moving};
use lb_common::logic::generation;

use super::Capacities;

/// The numbers of entries that the pinned maps are to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resize {
    from: Capacities,
    /// The numbers of entries after the move.
    pub to: Capacities,
    /// Maps that keep their size, since their entries would not fit.
    pub kept: Vec<Kept>,
}

/// A map that keeps its size although its flag requires a smaller one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kept {
    /// The map.
    pub map: SizedMap,
    /// Number of entries that the flag requires.
    pub wanted: u32,
    /// Number of entries that the map needs.
    pub needed: u32,
}

impl Resize {
    /// Decides which maps get another size. `needed` has the smallest number of entries that each pinned map can have:
    /// see [`room`].
    #[must_use]
    pub fn new(pinned: Capacities, wanted: &Capacities, needed: &Capacities) -> Self {
        let (mut to, mut kept) = (pinned, Vec::new());
        // A move copies all records of sockets to SOCKETS_MORE.
        let is_moved = [SizedMap::Sockets, SizedMap::SocketsMore]
            .iter()
            .any(|map| wanted[*map] != pinned[*map]);
        let records = needed[SizedMap::Sockets].saturating_add(needed[SizedMap::SocketsMore]);
        let are_records_kept = is_moved && wanted[SizedMap::SocketsMore] < records;
        if are_records_kept {
            kept.push(Kept {
                map: SizedMap::SocketsMore,
                wanted: wanted[SizedMap::SocketsMore],
                needed: records,
            });
        }
        for &map in SizedMap::ALL {
            let (wanted, needed) = (wanted[map], needed[map]);
            if matches!(map, SizedMap::Sockets | SizedMap::SocketsMore) {
                if !are_records_kept {
                    to = to.with(map, wanted);
                }
            } else if wanted < pinned[map] && wanted < needed {
                kept.push(Kept { map, wanted, needed });
            } else {
                to = to.with(map, wanted);
            }
        }
        Self { from: pinned, to, kept }
    }

    /// Returns whether any map is replaced.
    #[must_use]
    pub fn is_needed(&self) -> bool {
        self.from != self.to
    }

    /// Returns whether a map is replaced.
    #[must_use]
    pub fn replaces(&self, map: &MapSpec) -> bool {
        is_replaced(map, &self.from, &self.to)
    }
}

/// Returns whether a change of sizes replaces a map: its size changes, or that of a map that is replaced together with it.
#[must_use]
pub fn is_replaced(map: &MapSpec, from: &Capacities, to: &Capacities) -> bool {
    let Capacity::Sized(sized) = map.capacity else {
        return false;
    };
    SizedMap::ALL.iter().any(|other| {
        let is_together = moving::bit(*other) & moving::bit(sized) != 0;
        (*other == sized || is_together) && from[*other] != to[*other]
    })
}

/// Returns the smallest number of entries that a map can have, if it has `used` entries: for a map that the agent fills by index,
/// one more than the highest index in use. Programs insert into the other maps during a move, which need
/// room for that.
#[must_use]
pub fn room(map: SizedMap, used: u32) -> u32 {
    if map.is_filled_by_programs() {
        used.saturating_add(used / 4)
    } else {
        used
    }
}

/// Returns the generation of the entries that are added to SERVICES or BACKENDS: at least that of every entry that was ever
/// dropped, so that no reference to a dropped entry becomes current again. Entry 0, which no service or backend has, keeps it.
///
/// `first`: the generation of entry 0. `dropped`: those of the entries that a smaller map does not have.
#[must_use]
pub fn base_generation(first: u32, dropped: impl IntoIterator<Item = u32>) -> u32 {
    let dropped = dropped.into_iter().map(generation::withdrawn);
    dropped.fold(generation::withdrawn(first), u32::max)
}

/// Returns an entry of SERVICES that is not in use.
#[must_use]
pub fn unused_service(generation: u32) -> Service {
    Service {
        generation,
        ..Service::default()
    }
}

/// Returns an entry of BACKENDS that is not in use.
#[must_use]
pub fn unused_backend(generation: u32) -> Backend {
    let unused = Backend::default();
    if generation == 0 {
        return unused;
    }
    let seal = generation::seal(unused.addr, unused.port, unused.service, generation);
    Backend {
        generation,
        seal,
        ..unused
    }
}

/// How a start continues a move of an earlier start that was killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recovery {
    /// The new maps are removed: no program inserts into them.
    Discard,
    /// The move continues with copying.
    Copy,
    /// The pins of the new maps replace those of the old maps.
    Rename,
}

impl Recovery {
    /// Returns how to continue a move in a phase; `None` if the phase was not stored.
    #[must_use]
    pub fn of(phase: Option<MovePhase>) -> Self {
        match phase {
            None | Some(MovePhase::Prepare) => Self::Discard,
            Some(MovePhase::Copy) => Self::Copy,
            Some(MovePhase::Rename) => Self::Rename,
        }
    }
}

#[cfg(test)]
mod tests {
    use lb_common::abi::{MAPS, map_name};

    use super::*;

    const PINNED: Capacities = Capacities::uniform(64);

    fn replaced(resize: &Resize) -> Vec<&'static str> {
        let replaced = MAPS.iter().filter(|map| resize.replaces(map));
        replaced.map(|map| map.name).collect()
    }

    #[test]
    fn equal_sizes_need_no_move() {
        let resize = Resize::new(PINNED, &PINNED, &Capacities::uniform(100));
        assert!(!resize.is_needed());
        assert_eq!((replaced(&resize), resize.kept), (Vec::new(), Vec::new()));
    }

    #[test]
    fn maps_of_one_size_or_one_state_are_replaced_together() {
        for (map, expected) in [
            (
                SizedMap::Services,
                &[map_name::SERVICES, map_name::NAMES, map_name::STATS][..],
            ),
            (SizedMap::Frontends, &[map_name::FRONTENDS]),
            (SizedMap::Affinity, &[map_name::AFFINITY]),
            (SizedMap::UdpFlows, &[map_name::UDP_FLOWS]),
            (SizedMap::Sockets, &[map_name::SOCKETS, map_name::SOCKETS_MORE]),
            (SizedMap::SocketsMore, &[map_name::SOCKETS, map_name::SOCKETS_MORE]),
            (SizedMap::Backends, &[map_name::BACKENDS]),
            (SizedMap::BackendSlots, &[map_name::BACKEND_SLOTS]),
            (SizedMap::Conntrack, &[map_name::CT, map_name::CT_NEW]),
            (SizedMap::ConntrackNew, &[map_name::CT, map_name::CT_NEW]),
        ] {
            for size in [32, 256] {
                let resize = Resize::new(PINNED, &PINNED.with(map, size), &Capacities::uniform(16));
                assert!(resize.is_needed());
                assert_eq!(replaced(&resize), expected, "{map:?} {size}");
                assert_eq!(resize.to, PINNED.with(map, size));
            }
        }
    }

    #[test]
    fn a_map_is_not_made_smaller_than_its_content() {
        let needed = Capacities::uniform(16).with(SizedMap::Backends, 33);
        let resize = Resize::new(PINNED, &Capacities::uniform(32), &needed);
        let kept = Kept {
            map: SizedMap::Backends,
            wanted: 32,
            needed: 33,
        };
        assert_eq!(resize.kept, [kept]);
        assert_eq!(resize.to, Capacities::uniform(32).with(SizedMap::Backends, 64));
        assert!(!replaced(&resize).contains(&map_name::BACKENDS));
    }

    #[test]
    fn records_of_sockets_move_only_if_the_hash_has_room_for_all() {
        let needed = Capacities::uniform(0)
            .with(SizedMap::Sockets, 60)
            .with(SizedMap::SocketsMore, 10);
        for (wanted, moves) in [
            (PINNED.with(SizedMap::Sockets, 128), false),
            (
                PINNED.with(SizedMap::Sockets, 128).with(SizedMap::SocketsMore, 69),
                false,
            ),
            (
                PINNED.with(SizedMap::Sockets, 128).with(SizedMap::SocketsMore, 70),
                true,
            ),
            (PINNED, false),
        ] {
            let resize = Resize::new(PINNED, &wanted, &needed);
            assert_eq!(resize.is_needed(), moves, "{wanted:?}");
            assert_eq!(resize.kept.len(), usize::from(!moves && wanted != PINNED), "{wanted:?}");
        }
    }

    #[test]
    fn a_map_grows_whatever_it_contains() {
        let needed = Capacities::uniform(1000)
            .with(SizedMap::Sockets, 0)
            .with(SizedMap::SocketsMore, 0);
        let resize = Resize::new(PINNED, &Capacities::uniform(128), &needed);
        assert_eq!((resize.kept, resize.to), (Vec::new(), Capacities::uniform(128)));
    }

    #[test]
    fn maps_that_programs_fill_need_a_reserve() {
        assert_eq!(room(SizedMap::Backends, 100), 100);
        assert_eq!(room(SizedMap::Conntrack, 100), 125);
        assert_eq!(room(SizedMap::Conntrack, u32::MAX), u32::MAX);
    }

    #[test]
    fn added_entries_have_no_generation_that_a_dropped_one_had() {
        for (first, dropped, base) in [
            (0, &[0, 0][..], 0),
            (0, &[2, 8, 4], 8),
            (6, &[2], 6),
            // Entries that other processes wrote.
            (0, &[7], 8),
            (3, &[], 4),
        ] {
            assert_eq!(
                base_generation(first, dropped.iter().copied()),
                base,
                "{first} {dropped:?}"
            );
            let next = generation::taken(base);
            assert!(dropped.iter().all(|dropped| next > *dropped));
        }
        assert_eq!(unused_backend(0), Backend::default());
        assert!(generation::is_sealed(&unused_backend(8)) && !generation::is_live(unused_backend(8).generation));
        assert_eq!(unused_service(8).generation, 8);
    }

    #[test]
    fn a_move_is_discarded_until_programs_insert_into_the_new_maps() {
        assert_eq!(Recovery::of(None), Recovery::Discard);
        assert_eq!(Recovery::of(Some(MovePhase::Prepare)), Recovery::Discard);
        assert_eq!(Recovery::of(Some(MovePhase::Copy)), Recovery::Copy);
        assert_eq!(Recovery::of(Some(MovePhase::Rename)), Recovery::Rename);
    }
}
