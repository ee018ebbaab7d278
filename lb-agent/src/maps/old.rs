//! The pinned maps of any layout, as far as this build can read them: see [`lb_common::abi::PinnedMap::is_readable_as`].

use std::collections::BTreeMap;
use std::os::fd::AsFd as _;
use std::path::Path;

use aya::maps::{MapData, MapInfo, MapType};
use lb_common::abi::{
    Config, Device, MAPS, MapKind, MapSpec, PinnedMap, ServiceIndex, ServiceStats, SizedMap, State, map_name,
};
use lb_core::maps::{Capacities, MapError};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::batch;
use super::bpf::{call, mapped_any, sockets_used};
use super::sys::{self, MappedArray};

/// Pinned maps whose values may be shorter or longer than those of this build.
pub(crate) struct OldMaps(BTreeMap<&'static str, MapData>);

/// Returns the type of a map, as aya names it.
pub(crate) const fn map_type(kind: MapKind) -> MapType {
    match kind {
        MapKind::Array => MapType::Array,
        MapKind::PerCpuArray => MapType::PerCpuArray,
        MapKind::Hash => MapType::Hash,
        MapKind::LruHash => MapType::LruHash,
        MapKind::LpmTrie => MapType::LpmTrie,
        MapKind::RingBuf => MapType::RingBuf,
    }
}

/// Returns kind and sizes of a map.
pub(crate) fn pinned_map(info: &MapInfo) -> PinnedMap {
    let pinned = info.map_type().ok();
    PinnedMap {
        kind: MapKind::ALL
            .iter()
            .copied()
            .find(|kind| Some(map_type(*kind)) == pinned),
        key_size: info.key_size(),
        value_size: info.value_size(),
        flags: info.map_flags(),
    }
}

/// Returns a value from its first bytes: the rest of a shorter value is zero, and that of a longer one is ignored.
pub(super) fn from_first<T: FromBytes + IntoBytes + Immutable>(bytes: &[u8]) -> T {
    let mut value = T::new_zeroed();
    for (to, from) in value.as_mut_bytes().iter_mut().zip(bytes) {
        *to = *from;
    }
    value
}

impl OldMaps {
    /// Opens the maps that are pinned in a directory, as far as this build can read them.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub(crate) fn open(dir: &Path) -> Result<Self, MapError> {
        let mut maps = BTreeMap::new();
        for spec in MAPS {
            // Something else than a map cannot be opened as one, and is not readable either.
            let Ok(map) = MapData::from_pin(dir.join(spec.name)) else {
                continue;
            };
            let info = map.info().map_err(call(spec.name, "BPF_OBJ_GET_INFO_BY_FD"))?;
            if pinned_map(&info).is_readable_as(spec) {
                maps.insert(spec.name, map);
            }
        }
        Ok(Self(maps))
    }

    /// Returns whether a map exists and can be read.
    pub(crate) fn has(&self, map: &MapSpec) -> bool {
        self.0.contains_key(map.name)
    }

    /// Returns the number of entries of a map, if it can be read.
    pub(crate) fn capacity(&self, name: &str) -> Option<u32> {
        self.0.get(name)?.info().ok().map(|info| info.max_entries())
    }

    /// Returns kind and sizes of a map, if it can be read.
    pub(crate) fn pinned_map(&self, name: &str) -> Option<PinnedMap> {
        self.0.get(name)?.info().ok().map(|info| pinned_map(&info))
    }

    /// Returns the numbers of entries of the maps; the default for a map that cannot be read.
    pub(crate) fn capacities(&self) -> Capacities {
        Capacities::DEFAULT.map(|map, default| self.capacity(map.name()).unwrap_or(default))
    }

    /// Reads the state that an agent last wrote; `None` if no agent ever ran.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub(crate) fn state(&self) -> Result<Option<State>, MapError> {
        if !self.0.contains_key(map_name::STATE) {
            return Ok(None);
        }
        let state = self.array::<State>(map_name::STATE)?.read(0);
        Ok(state.filter(|state| state.pid != 0))
    }

    /// Reads the settings of the programs.
    ///
    /// # Errors
    /// Returns a [`MapError`] if the map cannot be read.
    pub(crate) fn config(&self) -> Result<Config, MapError> {
        Ok(self.array::<Config>(map_name::CONFIG)?.read(0).unwrap_or_default())
    }

    /// Reads DEVICES, by interface index.
    ///
    /// # Errors
    /// Returns a [`MapError`] if the map cannot be read.
    pub(crate) fn devices(&self) -> Result<BTreeMap<u32, Device>, MapError> {
        let mut all = BTreeMap::new();
        self.for_each(map_name::DEVICES, |key, value| {
            all.insert(from_first(key), from_first(value));
            Ok(())
        })?;
        Ok(all)
    }

    /// Returns the number of entries in use of a map that programs fill; zero for the others, and for one that cannot be read.
    ///
    /// # Errors
    /// Returns [`MapError::Call`] if a system call fails.
    pub(super) fn used_by_programs(&self, map: SizedMap) -> Result<usize, MapError> {
        let Some(data) = self.0.get(map.name()) else {
            return Ok(0);
        };
        match map {
            SizedMap::Services | SizedMap::Frontends | SizedMap::Backends | SizedMap::BackendSlots => Ok(0),
            SizedMap::Sockets => Ok(sockets_used(&self.array(map.name())?)),
            SizedMap::SocketsMore
            | SizedMap::UdpFlows
            | SizedMap::Affinity
            | SizedMap::Conntrack
            | SizedMap::ConntrackNew => batch::count(map.name(), data),
        }
    }

    /// Returns the number of entries of a hash.
    ///
    /// # Errors
    /// Returns a [`MapError`] if the map cannot be read.
    pub(super) fn count(&self, name: &'static str) -> Result<usize, MapError> {
        batch::count(name, self.map(name)?)
    }

    /// Maps an array into memory.
    ///
    /// # Errors
    /// Returns a [`MapError`] if the map cannot be read.
    pub(super) fn array<T>(&self, name: &'static str) -> Result<MappedArray<T>, MapError>
    where
        T: FromBytes + IntoBytes + Immutable + KnownLayout + Copy,
    {
        mapped_any(name, self.map(name)?)
    }

    /// Calls a function with the bytes of every entry of a hash.
    ///
    /// # Errors
    /// Returns a [`MapError`] if the map cannot be read, and the errors of the function.
    pub(super) fn for_each(
        &self,
        name: &'static str,
        each: impl FnMut(&[u8], &[u8]) -> Result<(), MapError>,
    ) -> Result<(), MapError> {
        batch::for_each(name, self.map(name)?, each)
    }

    /// Returns the counters of a service index, summed over all CPUs.
    ///
    /// # Errors
    /// Returns a [`MapError`] if the map cannot be read.
    pub(super) fn stats(&self, service: ServiceIndex) -> Result<ServiceStats, MapError> {
        let mut sum = ServiceStats::default();
        self.for_each_cpu(map_name::STATS, service.get(), |value| {
            sum += from_first::<ServiceStats>(value);
        })?;
        Ok(sum)
    }

    /// Returns the counter of a drop reason, by its number, summed over all CPUs.
    ///
    /// # Errors
    /// Returns a [`MapError`] if the map cannot be read.
    pub(super) fn drops(&self, reason: u32) -> Result<u64, MapError> {
        let mut sum = 0;
        self.for_each_cpu(map_name::DROPS, reason, |value| sum += from_first::<u64>(value))?;
        Ok(sum)
    }

    /// Calls a function with the value of each CPU in a per-CPU array.
    fn for_each_cpu(&self, name: &'static str, index: u32, each: impl FnMut(&[u8])) -> Result<(), MapError> {
        let map = self.map(name)?;
        let info = map.info().map_err(call(name, "BPF_OBJ_GET_INFO_BY_FD"))?;
        let failed = |call| {
            move |source| MapError::Call {
                map: name,
                call,
                source,
            }
        };
        let cpus = aya::util::nr_cpus().map_err(|(_, source)| failed("number of CPUs")(source))?;
        let size = info.value_size().next_multiple_of(8) as usize;
        let mut values = vec![0; cpus * size];
        sys::lookup_per_cpu(map.fd().as_fd(), index, &mut values).map_err(failed("BPF_MAP_LOOKUP_ELEM"))?;
        values.chunks_exact(size).for_each(each);
        Ok(())
    }

    fn map(&self, name: &'static str) -> Result<&MapData, MapError> {
        self.0.get(name).ok_or_else(|| MapError::Unexpected {
            map: name,
            what: "it cannot be read by this build".into(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_of_other_lengths_are_read_from_the_first_byte() {
        assert_eq!(from_first::<[u8; 4]>(&[1, 2]), [1, 2, 0, 0]);
        assert_eq!(from_first::<[u8; 4]>(&[1, 2, 3, 4, 5]), [1, 2, 3, 4]);
    }
}
