//! Kernel memory of maps, computed from their numbers of entries.
//!
//! The formulas are those of `htab_map_mem_usage` (`kernel/bpf/hashtab.c`), `array_map_mem_usage`
//! (`kernel/bpf/arraymap.c`) and the like, which Linux 6.4 and later report as `memlock` in `/proc/PID/fdinfo`. A map that allocates its
//! entries when they are inserted counts as if it were full, since it can become full at any time.

use lb_common::abi::{Capacity, MAPS, MapKind, MapSpec, SizedMap, map_flags};

use super::Capacities;
use super::resize::is_replaced;

/// `struct htab_elem` without key and value: list node, LRU node or pointer, and hash.
const HASH_ELEMENT: u64 = 48;
/// `struct bucket`: head of a list, and a lock.
const BUCKET: u64 = 16;
/// `struct llist_node`, which the allocator of maps without preallocation adds to an element.
const LIST_NODE: u64 = 8;
/// `struct bpf_htab` and `struct bpf_array` are smaller.
const HEADER: u64 = 1024;
const POINTER: u64 = 8;
const PAGE: u64 = 4096;

/// Returns the largest number of bytes that a map of a size takes. `cpus`: number of possible CPUs.
#[must_use]
pub fn of_map(map: &MapSpec, entries: u32, cpus: u32) -> u64 {
    let (entries, cpus) = (u64::from(entries), u64::from(cpus));
    let aligned = |bytes: u32| u64::from(bytes).next_multiple_of(8);
    let (key, value) = (aligned(map.key_size()), aligned(map.value_size()));
    let element = HASH_ELEMENT + key + value;
    let content = match map.kind {
        MapKind::Array if map.flags & map_flags::MMAPABLE != 0 => PAGE + (entries * value).next_multiple_of(PAGE),
        MapKind::Array => entries * value,
        MapKind::PerCpuArray => entries * (POINTER + value * cpus),
        MapKind::Hash if map.flags & map_flags::NO_PREALLOC != 0 => {
            buckets(entries) + entries * allocated(element + LIST_NODE)
        }
        // One spare element for each CPU, for updates of existing keys.
        MapKind::Hash => buckets(entries) + (entries + cpus) * element + cpus * POINTER,
        MapKind::LruHash => buckets(entries) + entries * element,
        // `struct lpm_trie_node` is shorter. A trie of n entries has up to n - 1 nodes without a value.
        MapKind::LpmTrie => 2 * entries * allocated(HASH_ELEMENT + key + value),
        // Three pages of positions. The data pages are mapped twice (`ringbuf_map_mem_usage` in `kernel/bpf/ringbuf.c`).
        MapKind::RingBuf => 3 * PAGE + entries + (3 + 2 * entries / PAGE) * POINTER,
    };
    HEADER + content
}

fn buckets(entries: u64) -> u64 {
    entries.next_power_of_two() * BUCKET
}

/// Returns the size of the kernel's allocation for an object (`kmalloc_info` in `mm/slab_common.c`).
fn allocated(bytes: u64) -> u64 {
    match bytes {
        65..=96 => 96,
        129..=192 => 192,
        _ => bytes.next_power_of_two(),
    }
}

/// Returns the bytes of the maps with the number of entries of a flag: SERVICES includes NAMES and STATS.
#[must_use]
pub fn of(map: SizedMap, entries: u32, cpus: u32) -> u64 {
    let maps = MAPS.iter().filter(|spec| spec.capacity == Capacity::Sized(map));
    maps.map(|spec| of_map(spec, entries, cpus)).sum()
}

/// Returns the bytes of all maps with a number of entries that the agent chooses.
#[must_use]
pub fn total(capacities: &Capacities, cpus: u32) -> u64 {
    sum(capacities, cpus, |_| true)
}

/// Memory of the machine and of the agent's cgroups in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// Memory of the machine.
    pub machine: u64,
    /// Memory that the agent's cgroup and those above it still allow; `None` without a limit.
    pub left: Option<u64>,
}

/// Upper end of the default of `--map-memory`.
pub const DEFAULT_LIMIT: u64 = 1 << 30;

/// Memory that maps may take in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Allowed {
    /// Largest size of all maps together.
    pub total: u64,
    /// Largest size of the new maps of one move: the maps that they replace exist beside them until it ends.
    pub moved: u64,
}

impl Allowed {
    /// No limit.
    pub const ALL: Self = Self {
        total: u64::MAX,
        moved: u64::MAX,
    };

    /// Returns the memory that the maps may take: the value of `--map-memory`, or its default, and at most what the agent's
    /// cgroups allow. `present`: the sizes of the maps.
    #[must_use]
    pub fn new(flag: Option<u64>, memory: Memory, present: &Capacities, cpus: u32) -> Self {
        let total = flag.unwrap_or((memory.machine / 10).min(DEFAULT_LIMIT));
        match memory.left {
            None => Self { total, ..Self::ALL },
            Some(left) => Self {
                total: total.min(preallocated(present, cpus).saturating_add(left)),
                moved: left,
            },
        }
    }

    /// Returns the part for maps that programs fill: a fourth is left to those that hold Services, since clients can fill the others.
    #[must_use]
    pub const fn for_programs(self) -> Self {
        let Self { total, moved } = self;
        Self {
            total: total - total / 4,
            moved: moved - moved / 4,
        }
    }

    /// Returns whether maps may get other sizes.
    #[must_use]
    pub fn allows(self, from: &Capacities, to: &Capacities, cpus: u32) -> bool {
        let is_new = |map: &MapSpec| is_replaced(map, from, to);
        total(to, cpus) <= self.total && sum(to, cpus, is_new) <= self.moved
    }
}

/// Returns the bytes that the agent's cgroup was charged when the maps were created. Those of maps that allocate an entry when it is
/// inserted are not known.
fn preallocated(capacities: &Capacities, cpus: u32) -> u64 {
    sum(capacities, cpus, |map| map.flags & map_flags::NO_PREALLOC == 0)
}

/// Returns the bytes of some of the maps with a number of entries that the agent chooses.
fn sum(capacities: &Capacities, cpus: u32, has: impl Fn(&MapSpec) -> bool) -> u64 {
    let maps = MAPS.iter().filter(|map| has(map));
    maps.map(|map| match map.capacity {
        Capacity::Sized(sized) => of_map(map, capacities[sized], cpus),
        Capacity::Fixed(_) => 0,
    })
    .sum()
}

#[cfg(test)]
mod tests {
    use lb_common::abi::map_spec;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_map_takes_the_memory_of_its_kind() {
        for (map, entries, cpus, bytes) in [
            // 64 bytes each, in whole pages.
            (&map_spec::SERVICES, 512, 1, HEADER + 4096 + 32_768),
            // 32 bytes for each CPU, and a pointer.
            (&map_spec::STATS, 1000, 4, HEADER + 1000 * (8 + 4 * 32)),
            // 48 + 24 + 16 bytes, one spare for each CPU.
            (&map_spec::FRONTENDS, 1000, 2, HEADER + 1024 * 16 + 1002 * 88 + 2 * 8),
            // 48 + 40 + 128 bytes.
            (&map_spec::CT_NEW, 1024, 8, HEADER + 1024 * 16 + 1024 * 216),
            // 48 + 8 + 128 bytes and a list node, in an allocation of 192.
            (&map_spec::SOCKETS_MORE, 64, 8, HEADER + 64 * 16 + 64 * 192),
        ] {
            assert_eq!(of_map(map, entries, cpus), bytes, "{}", map.name);
        }
    }

    #[test]
    fn maps_of_one_flag_count_together() {
        let all = [&map_spec::SERVICES, &map_spec::NAMES, &map_spec::STATS];
        let sum: u64 = all.map(|map| of_map(map, 512, 2)).iter().sum();
        assert_eq!(of(SizedMap::Services, 512, 2), sum);
        let total = total(&Capacities::uniform(64), 2);
        assert_eq!(total, SizedMap::ALL.iter().map(|map| of(*map, 64, 2)).sum::<u64>());
    }

    #[test]
    fn the_maps_of_a_few_services_take_less_than_4_mib() {
        let maps = [
            SizedMap::Services,
            SizedMap::Frontends,
            SizedMap::Backends,
            SizedMap::BackendSlots,
        ];
        let bytes: u64 = maps.iter().map(|map| of(*map, map.default_capacity(), 128)).sum();
        assert!(bytes < 4 * MIB, "{bytes}");
    }

    #[test]
    fn the_limit_is_the_smallest_of_flag_machine_and_cgroup() {
        let present = Capacities::uniform(1 << 16);
        let charged = preallocated(&present, 2);
        assert!(10 * MIB < charged && charged < total(&present, 2));
        let memory = |machine, left| Memory { machine, left };
        for (flag, memory, total, moved) in [
            (None, memory(2000 * MIB, None), 200 * MIB, u64::MAX),
            (None, memory(64_000 * MIB, None), 1024 * MIB, u64::MAX),
            (Some(3000 * MIB), memory(64_000 * MIB, None), 3000 * MIB, u64::MAX),
            (
                Some(3000 * MIB),
                memory(64_000 * MIB, Some(100 * MIB)),
                charged + 100 * MIB,
                100 * MIB,
            ),
            (None, memory(2000 * MIB, Some(u64::MAX)), 200 * MIB, u64::MAX),
            (Some(0), memory(2000 * MIB, Some(MIB)), 0, MIB),
        ] {
            let allowed = Allowed::new(flag, memory, &present, 2);
            assert_eq!(allowed, Allowed { total, moved }, "{flag:?} {memory:?}");
        }
    }

    #[test]
    fn new_maps_have_to_fit_beside_those_that_they_replace() {
        let from = Capacities::uniform(1 << 16);
        let to = from.with(SizedMap::Conntrack, 1 << 17);
        // CT_NEW is replaced together with CT.
        let new = of(SizedMap::Conntrack, 1 << 17, 2) + of(SizedMap::ConntrackNew, 1 << 16, 2);
        let all = total(&to, 2);
        for (total, moved, is_allowed) in [
            (all, new, true),
            (u64::MAX, u64::MAX, true),
            (all - 1, new, false),
            (all, new - 1, false),
        ] {
            assert_eq!(Allowed { total, moved }.allows(&from, &to, 2), is_allowed);
        }
    }
}
