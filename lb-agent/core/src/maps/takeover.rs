//! What becomes of the maps of another layout, at a start that takes them over.

use lb_common::abi::{Capacity, MAPS, MapKind, MapRole, MapSpec, PinnedMap, moving};

/// A pinned map that this build can read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Readable {
    /// Kind and sizes.
    pub map: PinnedMap,
    /// Number of entries.
    pub entries: u32,
}

/// What becomes of a map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It is used as it is.
    Kept,
    /// A map of this layout gets its content.
    Moved,
    /// A map of this layout takes its place, and is empty.
    Emptied,
}

/// The fates of all maps.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Takeover(Vec<(&'static MapSpec, Fate)>);

/// Returns the bits of [`moving`] of the maps that are replaced together with a map.
fn together(map: &MapSpec) -> u32 {
    match map.capacity {
        Capacity::Sized(sized) => moving::bit(sized),
        Capacity::Fixed(_) => 0,
    }
}

/// Divides the maps that an interrupted move replaces into those whose former entries this build can move, and the others. Maps in
/// which programs remember something are divided together. `is_readable` returns whether this build can read the former map.
#[must_use]
pub fn interrupted(
    replaced: &[&'static MapSpec],
    is_readable: impl Fn(&MapSpec) -> bool,
) -> (Vec<&'static MapSpec>, Vec<&'static MapSpec>) {
    let unreadable: Vec<_> = replaced.iter().filter(|map| !is_readable(map)).collect();
    replaced.iter().copied().partition(|map| match map.role {
        MapRole::Remembered => !unreadable.iter().any(|other| together(other) == together(map)),
        MapRole::Served | MapRole::Reported | MapRole::Renewed => is_readable(map),
    })
}

/// Returns the names of the maps whose content is lost if they begin empty: connections, flows or clients that programs remember,
/// counters, and the state of the agent.
#[must_use]
pub fn lost(emptied: impl IntoIterator<Item = &'static MapSpec>) -> Vec<&'static str> {
    let is_loss = |map: &&MapSpec| matches!(map.role, MapRole::Remembered | MapRole::Reported);
    emptied.into_iter().filter(is_loss).map(|map| map.name).collect()
}

impl Takeover {
    /// Decides about all maps. `find` returns the pinned map of the other layout, if this build can read it.
    ///
    /// # Errors
    /// Returns the names of the maps that cannot be read, if nothing can be served without them: all maps have to be made from the
    /// source.
    pub fn new(find: impl Fn(&MapSpec) -> Option<Readable>) -> Result<Self, Vec<&'static str>> {
        let found: Vec<_> = MAPS.iter().map(|map| (map, find(map))).collect();
        let is_equal = |map: &MapSpec, pinned: &Readable| {
            let has_entries = match map.capacity {
                Capacity::Fixed(entries) => pinned.entries == entries,
                Capacity::Sized(_) => true,
            };
            pinned.map == PinnedMap::of(map) && has_entries
        };
        // The entries of tries cannot be copied to another map.
        let is_usable = |map: &MapSpec, pinned: &Readable| map.kind != MapKind::LpmTrie || is_equal(map, pinned);
        let unusable: Vec<_> = found
            .iter()
            .filter(|(map, pinned)| !pinned.as_ref().is_some_and(|pinned| is_usable(map, pinned)))
            .map(|(map, _)| *map)
            .collect();
        let missing: Vec<_> = unusable.iter().filter(|map| map.role == MapRole::Served).collect();
        if !missing.is_empty() {
            return Err(missing.into_iter().map(|map| map.name).collect());
        }
        let changed = |map: &MapSpec, pinned: &Option<Readable>| !pinned.as_ref().is_some_and(|it| is_equal(map, it));
        let is_emptied = |map: &MapSpec, pinned: &Option<Readable>| match map.role {
            MapRole::Served => false,
            MapRole::Remembered => unusable.iter().any(|other| together(other) == together(map)),
            MapRole::Reported => pinned.is_none(),
            MapRole::Renewed => changed(map, pinned),
        };
        let moved_bits = found
            .iter()
            .filter(|(map, pinned)| changed(map, pinned) && !is_emptied(map, pinned))
            .fold(0, |bits, (map, _)| bits | together(map));
        let fate = |map: &MapSpec, pinned: &Option<Readable>| {
            if is_emptied(map, pinned) {
                Fate::Emptied
            } else if changed(map, pinned) || together(map) & moved_bits != 0 {
                Fate::Moved
            } else {
                Fate::Kept
            }
        };
        Ok(Self(
            found.iter().map(|(map, pinned)| (*map, fate(map, pinned))).collect(),
        ))
    }

    /// Returns the maps with a fate.
    pub fn with(&self, fate: Fate) -> impl Iterator<Item = &'static MapSpec> {
        self.0.iter().filter(move |(_, is)| *is == fate).map(|(map, _)| *map)
    }

    /// Returns the names of the maps whose content is lost: see [`lost`].
    #[must_use]
    pub fn lost(&self) -> Vec<&'static str> {
        lost(self.with(Fate::Emptied))
    }
}

#[cfg(test)]
mod tests {
    use lb_common::abi::{map_name, map_spec};

    use super::*;

    fn own(map: &MapSpec) -> Option<Readable> {
        Some(Readable {
            map: PinnedMap::of(map),
            entries: map.default_capacity(),
        })
    }

    fn names(takeover: &Takeover, fate: Fate) -> Vec<&'static str> {
        let mut names: Vec<_> = takeover.with(fate).map(|map| map.name).collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn equal_maps_are_kept_whatever_their_sizes() {
        let takeover = Takeover::new(|map| {
            own(map).map(|mut found| {
                if matches!(map.capacity, Capacity::Sized(_)) {
                    found.entries *= 2;
                }
                found
            })
        });
        assert_eq!(names(&takeover.unwrap(), Fate::Kept).len(), MAPS.len());
    }

    #[test]
    fn the_maps_of_layout_3_are_moved_where_values_have_grown() {
        let takeover = Takeover::new(|map| {
            own(map).map(|mut found| {
                found.map.value_size = map.smallest_value();
                if map.name == map_name::DROPS {
                    found.entries = 29;
                }
                found
            })
        })
        .unwrap();
        let moved = [
            "CONFIG",
            "CT",
            "CT_NEW",
            "DEVICES",
            "DROPS",
            "FRONTENDS",
            "NAMES",
            "SERVICES",
            "SOCKETS",
            "SOCKETS_MORE",
            "STATE",
            "STATS",
        ];
        assert_eq!(names(&takeover, Fate::Moved), moved);
        assert_eq!(names(&takeover, Fate::Emptied), Vec::<&str>::new());
        assert_eq!(takeover.lost(), Vec::<&str>::new());
    }

    #[test]
    fn maps_that_belong_together_are_lost_together() {
        let takeover = Takeover::new(|map| own(map).filter(|_| map.name != map_name::CT_NEW)).unwrap();
        assert_eq!(names(&takeover, Fate::Emptied), ["CT", "CT_NEW"]);
        assert_eq!(takeover.lost(), ["CT", "CT_NEW"]);
        assert_eq!(names(&takeover, Fate::Moved), Vec::<&str>::new());
    }

    #[test]
    fn without_counters_or_the_state_of_the_agent_nothing_else_is_lost() {
        for lost in [map_name::STATS, map_name::DROPS, map_name::STATE] {
            let takeover = Takeover::new(|map| own(map).filter(|_| map.name != lost)).unwrap();
            assert_eq!(names(&takeover, Fate::Emptied), [lost]);
            assert_eq!(takeover.lost(), [lost]);
            assert_eq!(names(&takeover, Fate::Moved), Vec::<&str>::new(), "{lost}");
        }
        let shorter = Takeover::new(|map| {
            own(map).filter(|_| map.name != map_name::STATS).map(|mut found| {
                if map.name == map_name::SERVICES {
                    found.map.value_size = map.smallest_value();
                }
                found
            })
        })
        .unwrap();
        assert_eq!(names(&shorter, Fate::Emptied), [map_name::STATS]);
        assert_eq!(names(&shorter, Fate::Moved), [map_name::NAMES, map_name::SERVICES]);
    }

    #[test]
    fn maps_whose_content_is_made_again_are_no_loss() {
        let takeover = Takeover::new(|map| own(map).filter(|_| map.name != map_name::NOTICES)).unwrap();
        assert_eq!(names(&takeover, Fate::Emptied), ["NOTICES"]);
        assert_eq!(takeover.lost(), Vec::<&str>::new());
    }

    #[test]
    fn an_interrupted_move_goes_on_with_the_maps_that_can_be_read() {
        let replaced = [
            &map_spec::SERVICES,
            &map_spec::NAMES,
            &map_spec::STATS,
            &map_spec::CT,
            &map_spec::CT_NEW,
            &map_spec::UDP_FLOWS,
        ];
        for (unreadable, others) in [
            (&[][..], &[][..]),
            (&["CT_NEW"], &["CT", "CT_NEW"]),
            (&["STATS"], &["STATS"]),
            // The copies of these maps were complete before.
            (&["SERVICES"], &["SERVICES"]),
        ] {
            let (moved, emptied) = interrupted(&replaced, |map| !unreadable.contains(&map.name));
            assert_eq!(moved.len() + emptied.len(), replaced.len());
            let names: Vec<_> = emptied.iter().map(|map| map.name).collect();
            assert_eq!(names, others);
            assert_eq!(lost(emptied).is_empty(), matches!(others, [] | ["SERVICES"]));
        }
    }

    #[test]
    fn nothing_is_taken_over_without_the_maps_that_everything_refers_to() {
        let missing = Takeover::new(|map| own(map).filter(|_| map.name != map_name::SERVICES));
        assert_eq!(missing, Err(vec!["SERVICES"]));
        let longer = Takeover::new(|map| {
            own(map).map(|mut found| {
                if map.name == map_spec::SOURCE_RANGES.name {
                    found.map.value_size = 8;
                }
                found
            })
        });
        assert_eq!(longer, Err(vec!["SOURCE_RANGES"]), "a trie cannot be copied");
    }
}
