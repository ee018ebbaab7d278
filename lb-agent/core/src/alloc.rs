//! Allocators of the parts of the arrays: slot ranges and indexes.

use std::collections::{BTreeMap, BTreeSet};

/// A contiguous range of slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Range {
    /// First slot.
    pub(crate) base: u32,
    /// Number of slots, at least one.
    pub(crate) len: u16,
}

impl Range {
    fn size(self) -> u32 {
        self.len.into()
    }
}

/// Allocator of slot ranges. It takes the lower end of the shortest free range that fits, of several the lowest, and
/// joins free neighbors.
///
/// Sets of one length, of which a cluster has many, fill each other's holes; a buddy allocator would leave a fourth of the
/// slots unused.
#[derive(Debug, Clone)]
pub(crate) struct SlotRanges {
    /// Length of each free range by its base; no two touch.
    by_base: BTreeMap<u32, u32>,
    /// The free ranges as pairs of length and base.
    by_len: BTreeSet<(u32, u32)>,
    capacity: u32,
    used: u32,
}

impl SlotRanges {
    /// Creates an allocator in which all of `0..capacity` is free.
    #[must_use]
    pub(crate) fn new(capacity: u32) -> Self {
        let mut new = Self {
            by_base: BTreeMap::new(),
            by_len: BTreeSet::new(),
            capacity,
            used: 0,
        };
        new.insert(0, capacity);
        new
    }

    /// Returns the number of slots.
    #[must_use]
    pub(crate) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Returns the number of slots in ranges that are not free.
    #[must_use]
    pub(crate) fn used(&self) -> u32 {
        self.used
    }

    /// Returns the number of slots up to the end of the last range that is not free.
    #[must_use]
    pub(crate) fn end(&self) -> u32 {
        let last = self.by_base.last_key_value();
        last.filter(|(base, len)| *base + *len == self.capacity)
            .map_or(self.capacity, |(base, _)| *base)
    }

    /// Changes the number of slots. The slots that are no longer there must be free.
    ///
    /// # Panics
    /// In debug builds, if they are not.
    pub(crate) fn resize(&mut self, capacity: u32) {
        let end = self.end();
        debug_assert!(end <= capacity, "slots up to {end} are in use, and {capacity} stay");
        if let Some(free) = self.by_base.remove(&end) {
            self.by_len.remove(&(free, end));
        }
        self.capacity = capacity;
        self.insert(end, capacity.saturating_sub(end));
    }

    /// Allocates a range of `len` slots (at least one), if there is room.
    pub(crate) fn alloc(&mut self, len: u16) -> Option<Range> {
        let (_, base) = *self.by_len.range((u32::from(len), 0)..).next()?;
        let range = Range { base, len };
        self.claim(range).then_some(range)
    }

    /// Takes a range that is known to be in use. Returns false if it is out of bounds or not wholly free.
    pub(crate) fn claim(&mut self, range: Range) -> bool {
        let Some((&base, &len)) = self.by_base.range(..=range.base).next_back() else {
            return false;
        };
        let before = range.base - base;
        let Some(after) = len.checked_sub(before).and_then(|rest| rest.checked_sub(range.size())) else {
            return false;
        };
        self.remove(base, len);
        self.insert(base, before);
        self.insert(range.base + range.size(), after);
        self.used += range.size();
        true
    }

    /// Frees a range.
    ///
    /// # Panics
    /// In debug builds, if a part of it is free already.
    pub(crate) fn free(&mut self, range: Range) {
        self.used -= range.size();
        let (mut base, mut len) = (range.base, range.size());
        if let Some((&before, &size)) = self.by_base.range(..base).next_back() {
            debug_assert!(before + size <= base, "{range:?} was free already");
            if before + size == base {
                self.remove(before, size);
                (base, len) = (before, size + len);
            }
        }
        if let Some((&after, &size)) = self.by_base.range(base..).next() {
            debug_assert!(base + len <= after, "{range:?} was free already");
            if base + len == after {
                self.remove(after, size);
                len += size;
            }
        }
        debug_assert!(base + len <= self.capacity);
        self.insert(base, len);
    }

    /// Adds a free range that touches no other; ignores an empty one.
    fn insert(&mut self, base: u32, len: u32) {
        if len > 0 {
            self.by_base.insert(base, len);
            self.by_len.insert((len, base));
        }
    }

    fn remove(&mut self, base: u32, len: u32) {
        self.by_base.remove(&base);
        self.by_len.remove(&(len, base));
    }
}

/// Allocator of indexes in `1..capacity`. It returns the lowest free index, and never zero.
#[derive(Debug, Clone)]
pub(crate) struct Indexes {
    /// Free indexes below `next`.
    free: BTreeSet<u32>,
    /// The lowest index that was never used; nor were those above it.
    next: u32,
    capacity: u32,
}

impl Indexes {
    /// Creates an allocator in which all of `1..capacity` is free.
    #[must_use]
    pub(crate) fn new(capacity: u32) -> Self {
        Self {
            free: BTreeSet::new(),
            next: 1,
            capacity,
        }
    }

    /// Returns the number of indexes that are not free.
    #[must_use]
    pub(crate) fn used(&self) -> u32 {
        self.next - 1 - self.free.len() as u32
    }

    /// Returns the lowest number of indexes that contains every index that is not free.
    #[must_use]
    pub(crate) fn end(&self) -> u32 {
        let mut end = self.next;
        for index in self.free.iter().rev() {
            if index + 1 != end {
                break;
            }
            end = *index;
        }
        end
    }

    /// Changes the number of indexes. Those that are no longer there must be free.
    ///
    /// # Panics
    /// In debug builds, if one is not.
    pub(crate) fn resize(&mut self, capacity: u32) {
        debug_assert!(self.end() <= capacity, "{} are in use, and {capacity} stay", self.end());
        self.free.split_off(&capacity);
        self.next = self.next.min(capacity);
        self.capacity = capacity;
    }

    /// Allocates an index, if one is free.
    pub(crate) fn alloc(&mut self) -> Option<u32> {
        if let Some(index) = self.free.pop_first() {
            return Some(index);
        }
        (self.next < self.capacity).then(|| {
            self.next += 1;
            self.next - 1
        })
    }

    /// Takes an index that is known to be in use. Returns false if it is not free or out of bounds.
    pub(crate) fn claim(&mut self, index: u32) -> bool {
        if index == 0 || index >= self.capacity {
            return false;
        }
        if index < self.next {
            return self.free.remove(&index);
        }
        self.free.extend(self.next..index);
        self.next = index + 1;
        true
    }

    /// Frees an index.
    ///
    /// # Panics
    /// In debug builds, if the index is free already.
    pub(crate) fn free(&mut self, index: u32) {
        debug_assert!(index != 0 && index < self.next);
        let new = self.free.insert(index);
        debug_assert!(new, "{index} was free already");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_hole_that_fits_best_is_taken() {
        let mut ranges = SlotRanges::new(64);
        let [_, b, _, d, _] = [8, 6, 1, 3, 2].map(|len| ranges.alloc(len).unwrap());
        ranges.free(b);
        ranges.free(d);
        assert_eq!(ranges.alloc(3), Some(d));
        assert_eq!(ranges.alloc(4), Some(Range { len: 4, ..b }));
        assert_eq!(ranges.alloc(3), Some(Range { base: 20, len: 3 }), "behind all");
    }

    #[test]
    fn a_full_array_refuses_and_a_freed_range_serves_again() {
        let mut ranges = SlotRanges::new(8);
        let a = ranges.alloc(4).unwrap();
        let b = ranges.alloc(4).unwrap();
        assert_eq!(ranges.alloc(1), None);
        ranges.free(a);
        assert_eq!(ranges.alloc(8), None);
        ranges.free(b);
        assert_eq!(ranges.alloc(8), Some(Range { base: 0, len: 8 }));
    }

    #[test]
    fn any_capacity_is_used_to_the_last_slot() {
        for capacity in [1, 2, 3, 7, 100, 65535, 65536, 100_001] {
            let mut ranges = SlotRanges::new(capacity);
            let mut count = 0;
            while let Some(range) = ranges.alloc(1) {
                assert!(range.base < capacity);
                count += 1;
            }
            assert_eq!(count, capacity);
            assert_eq!(ranges.used(), capacity);
        }
    }

    #[test]
    fn claims_are_exclusive_and_in_bounds() {
        let mut ranges = SlotRanges::new(100);
        assert!(ranges.claim(Range { base: 8, len: 4 }));
        assert!(!ranges.claim(Range { base: 8, len: 4 }));
        assert!(!ranges.claim(Range { base: 8, len: 8 }));
        assert!(!ranges.claim(Range { base: 10, len: 1 }));
        assert!(!ranges.claim(Range { base: 4, len: 5 }));
        assert!(!ranges.claim(Range { base: 96, len: 8 }), "out of bounds");
        let base = u32::MAX;
        assert!(!ranges.claim(Range { base, len: 1 }));
        assert!(ranges.claim(Range { base: 96, len: 4 }));
        assert!(ranges.claim(Range { base: 12, len: 2 }));
        assert!(ranges.claim(Range { base: 7, len: 1 }));
    }

    proptest! {
        #[test]
        fn ranges_never_overlap_and_all_comes_back(ops in prop::collection::vec((any::<bool>(), 1_u16..40, any::<prop::sample::Index>()), 1..200), capacity in 1_u32..600) {
            let mut ranges = SlotRanges::new(capacity);
            let mut held: Vec<Range> = Vec::new();
            for (alloc, len, which) in ops {
                if alloc {
                    if let Some(range) = ranges.alloc(len) {
                        prop_assert!(range.len == len && range.base + range.size() <= capacity);
                        for other in &held {
                            prop_assert!(range.base + range.size() <= other.base || other.base + other.size() <= range.base);
                        }
                        held.push(range);
                    }
                } else if !held.is_empty() {
                    ranges.free(held.swap_remove(which.index(held.len())));
                }
                prop_assert_eq!(ranges.used(), held.iter().map(|r| r.size()).sum::<u32>());
                // More slots change nothing for the held ranges, and fewer are possible down to the last one.
                let mut grown = ranges.clone();
                grown.resize(capacity + 10);
                grown.resize(ranges.end());
                grown.resize(capacity);
                prop_assert_eq!((&grown.by_base, &grown.by_len), (&ranges.by_base, &ranges.by_len));
                // The held ranges can be claimed in a fresh allocator: adoption ends in the same state.
                let mut adopted = SlotRanges::new(capacity);
                for range in &held {
                    prop_assert!(adopted.claim(*range));
                }
                prop_assert_eq!((&adopted.by_base, &adopted.by_len), (&ranges.by_base, &ranges.by_len));
            }
            for range in held.drain(..) {
                ranges.free(range);
            }
            prop_assert_eq!(&ranges.by_base, &SlotRanges::new(capacity).by_base);
        }
    }

    #[test]
    fn more_slots_join_the_free_ones_at_the_end() {
        let mut ranges = SlotRanges::new(8);
        let a = ranges.alloc(8).unwrap();
        assert_eq!((ranges.end(), ranges.alloc(1)), (8, None));
        ranges.resize(12);
        assert_eq!(ranges.end(), 8);
        assert_eq!(ranges.alloc(4), Some(Range { base: 8, len: 4 }));
        ranges.free(a);
        ranges.resize(16);
        assert_eq!(ranges.alloc(10), None);
        ranges.free(Range { base: 8, len: 4 });
        assert_eq!(ranges.end(), 0);
        ranges.resize(4);
        assert_eq!(ranges.alloc(4), Some(Range { base: 0, len: 4 }));
        assert_eq!((ranges.end(), ranges.capacity()), (4, 4));
        ranges.resize(4);
        assert_eq!(ranges.alloc(1), None);
    }

    #[test]
    fn more_indexes_follow_those_of_before() {
        let mut ids = Indexes::new(3);
        assert_eq!((ids.alloc(), ids.alloc(), ids.alloc()), (Some(1), Some(2), None));
        ids.resize(4);
        assert_eq!((ids.end(), ids.alloc(), ids.alloc()), (3, Some(3), None));
        ids.free(2);
        assert_eq!((ids.end(), ids.used()), (4, 2));
        ids.free(3);
        assert_eq!((ids.end(), ids.used()), (2, 1));
        ids.resize(3);
        assert_eq!((ids.alloc(), ids.alloc(), ids.used()), (Some(2), None, 2));
        ids.resize(5);
        assert_eq!((ids.alloc(), ids.alloc(), ids.alloc()), (Some(3), Some(4), None));
    }

    #[test]
    fn indexes_start_at_one_and_the_lowest_free_one_is_next() {
        let mut ids = Indexes::new(4);
        assert_eq!(
            (ids.alloc(), ids.alloc(), ids.alloc(), ids.alloc()),
            (Some(1), Some(2), Some(3), None)
        );
        ids.free(2);
        assert_eq!(ids.used(), 2);
        assert_eq!(ids.alloc(), Some(2));
        let mut ids = Indexes::new(10);
        assert!(ids.claim(5) && !ids.claim(5) && !ids.claim(0) && !ids.claim(10));
        assert_eq!(ids.alloc(), Some(1));
        assert!(ids.claim(3));
        assert_eq!((ids.alloc(), ids.alloc(), ids.alloc()), (Some(2), Some(4), Some(6)));
    }
}
