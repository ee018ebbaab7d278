//! Layouts of other builds: which of their maps this build can read.
//!
//! A start that finds the maps of another layout moves their content to maps of its own, so no later layout may break these
//! rules:
//!
//! - A directory `vN` below the pin path has the pins of layout N: `maps` has the maps by name, `next` has those that replace
//!   them while a start is changing them, with MOVE, and `links` has those of cgroup hooks by the names of the
//!   programs, which begin with `lb_`. If there are maps of two layouts, those of the layout with the directory `filling` are not
//!   in force.
//! - The name of a pinned map stands for the meaning of its keys and values. A layout that gives them another meaning pins the map
//!   by another name.
//! - A value grows at its end only, and zero means that a field is not set.
//! - MOVE has the fields `phase` and `counted` of [`super::Move`] at their offsets, the numbers of [`super::MovePhase`] keep their
//!   meaning, and in `counted` the drop reasons follow the service indexes from [`super::FIRST_DROP`] on. A start of another layout
//!   continues a move by these.

use super::{MapKind, MapSpec};

/// Kind and sizes of a pinned map of any layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PinnedMap {
    /// Kind of the map; `None` if this build has no map of that kind.
    pub kind: Option<MapKind>,
    /// Size of a key in bytes.
    pub key_size: u32,
    /// Size of a value in bytes.
    pub value_size: u32,
    /// Flags of `BPF_MAP_CREATE`.
    pub flags: u32,
}

impl PinnedMap {
    /// Returns what the registry requires.
    #[must_use]
    pub const fn of(map: &MapSpec) -> Self {
        Self {
            kind: Some(map.kind),
            key_size: map.key_size(),
            value_size: map.value_size(),
            flags: map.flags,
        }
    }

    /// Returns whether this build can read the map, whose values may be shorter or longer than its own.
    #[must_use]
    pub fn is_readable_as(&self, map: &MapSpec) -> bool {
        let own = Self::of(map);
        let same_but_value = Self {
            value_size: own.value_size,
            ..*self
        };
        let is_too_long = map.is_inserted_by_programs() && self.value_size > own.value_size;
        same_but_value == own && self.value_size >= map.smallest_value() && !is_too_long
    }
}

/// Returns the layout whose pins a directory below the pin path has, by its name.
#[must_use]
pub fn layout_of(directory: &str) -> Option<u32> {
    let number = directory.strip_prefix('v')?;
    let is_canonical = !number.starts_with('0') && number.bytes().all(|digit| digit.is_ascii_digit());
    number.parse().ok().filter(|_| is_canonical)
}

#[cfg(test)]
mod tests {
    use super::super::{MAPS, map_spec};
    use super::*;

    #[test]
    fn a_build_reads_its_own_maps() {
        for map in MAPS {
            assert!(PinnedMap::of(map).is_readable_as(map), "{}", map.name);
        }
    }

    #[test]
    fn values_are_readable_if_they_have_the_fields_of_layout_3() {
        let device = PinnedMap::of(&map_spec::DEVICES);
        for (value_size, readable) in [(32, false), (40, true), (64, true), (88, true)] {
            let pinned = PinnedMap { value_size, ..device };
            assert_eq!(pinned.is_readable_as(&map_spec::DEVICES), readable, "{value_size}");
        }
        let own = PinnedMap::of(&map_spec::CT);
        for (pinned, readable) in [
            (PinnedMap { value_size: 64, ..own }, true),
            (PinnedMap { value_size: 56, ..own }, false),
            (PinnedMap { value_size: 136, ..own }, false),
            (PinnedMap { key_size: 44, ..own }, false),
            (PinnedMap { flags: 1, ..own }, false),
            (PinnedMap { kind: None, ..own }, false),
        ] {
            assert_eq!(pinned.is_readable_as(&map_spec::CT), readable, "{pinned:?}");
        }
    }

    #[test]
    fn directories_of_layouts_are_named_by_their_number() {
        for (name, layout) in [
            ("v4", Some(4)),
            ("v12", Some(12)),
            ("4", None),
            ("v", None),
            ("v04", None),
            ("v+4", None),
            ("v4-new", None),
        ] {
            assert_eq!(layout_of(name), layout, "{name}");
        }
    }
}
