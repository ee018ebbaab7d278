//! Kernel memory of maps, computed from their numbers of entries.
//!
//! The formulas are those of `htab_map_mem_usage` (`kernel/bpf/hashtab.c`), `array_map_mem_usage`
//! (`kernel/bpf/arraymap.c`) and the like, which Linux 6.4 and later report as `memlock` in `/proc/PID/fdinfo`. A map that allocates its
//! entries when they are inserted counts as if it were full, since it can become full at any time.

use lb_common::abi::{Capacity, MAPS, MapKind, MapSpec, SizedMap, map_flags};

use super::Capacities;

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
    SizedMap::ALL.iter().map(|map| of(*map, capacities[*map], cpus)).sum()
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

/// Returns the largest size of all maps together in bytes: that of `--map-memory`, or its default, and at most the present
/// size and what the agent's cgroups still allow.
#[must_use]
pub fn limit(flag: Option<u64>, memory: Memory, present: u64) -> u64 {
    let limit = flag.unwrap_or((memory.machine / 10).min(DEFAULT_LIMIT));
    memory
        .left
        .map_or(limit, |left| limit.min(present.saturating_add(left)))
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
        let memory = |machine, left| Memory { machine, left };
        for (flag, memory, present, expected) in [
            (None, memory(2000 * MIB, None), 0, 200 * MIB),
            (None, memory(64_000 * MIB, None), 0, 1024 * MIB),
            (Some(3000 * MIB), memory(64_000 * MIB, None), 0, 3000 * MIB),
            (
                Some(3000 * MIB),
                memory(64_000 * MIB, Some(100 * MIB)),
                50 * MIB,
                150 * MIB,
            ),
            (None, memory(2000 * MIB, Some(u64::MAX)), 50 * MIB, 200 * MIB),
            (Some(0), memory(2000 * MIB, None), 50 * MIB, 0),
        ] {
            assert_eq!(limit(flag, memory, present), expected, "{flag:?} {memory:?}");
        }
    }
}
