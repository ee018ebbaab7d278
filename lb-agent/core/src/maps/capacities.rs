//! Numbers of entries of the maps that flags bound.

use std::ops::Index;

use lb_common::abi::SizedMap;

/// Number of entries of every map that a flag of `lb-agent run` bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capacities([u32; SizedMap::COUNT]);

impl Capacities {
    /// The smallest numbers that the agent chooses without flags.
    pub const DEFAULT: Self = {
        let mut all = Self([0; SizedMap::COUNT]);
        let mut i = 0;
        while i < SizedMap::COUNT {
            all = all.with(SizedMap::ALL[i], SizedMap::ALL[i].default_capacity());
            i += 1;
        }
        all
    };

    /// The defaults of the flags: the largest numbers that the agent chooses.
    pub const BOUND: Self = {
        let mut all = Self([0; SizedMap::COUNT]);
        let mut i = 0;
        while i < SizedMap::COUNT {
            all = all.with(SizedMap::ALL[i], SizedMap::ALL[i].default_bound());
            i += 1;
        }
        all
    };

    /// Returns capacities that are all the same.
    #[must_use]
    pub const fn uniform(entries: u32) -> Self {
        Self([entries; SizedMap::COUNT])
    }

    /// Returns these capacities with another one for a map.
    #[must_use]
    pub const fn with(mut self, map: SizedMap, entries: u32) -> Self {
        self.0[map as usize] = entries;
        self
    }

    /// Returns the numbers that a function returns for each map and its number.
    #[must_use]
    pub fn map(self, mut new: impl FnMut(SizedMap, u32) -> u32) -> Self {
        let all = SizedMap::ALL.iter();
        all.fold(self, |to, map| to.with(*map, new(*map, self[*map])))
    }

    /// Returns the number of entries of a map.
    #[must_use]
    pub const fn get(&self, map: SizedMap) -> u32 {
        self.0[map as usize]
    }
}

impl Default for Capacities {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Index<SizedMap> for Capacities {
    type Output = u32;

    fn index(&self, map: SizedMap) -> &u32 {
        &self.0[map as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_map_has_a_capacity_of_its_own() {
        let mut capacities = Capacities::default();
        for map in SizedMap::ALL {
            assert_eq!(capacities[*map], map.default_capacity(), "{map:?}");
            assert_eq!(Capacities::BOUND[*map], map.default_bound(), "{map:?}");
        }
        for (entries, map) in (1..).zip(SizedMap::ALL) {
            capacities = capacities.with(*map, entries);
        }
        let all: Vec<_> = SizedMap::ALL.iter().map(|map| capacities.get(*map)).collect();
        assert_eq!(all, (1..=SizedMap::COUNT as u32).collect::<Vec<_>>());
        assert_eq!(Capacities::uniform(7)[SizedMap::Conntrack], 7);
    }
}
