//! Who owns which part of the arrays: slot ranges, and indexes.

use std::collections::BTreeSet;

/// A contiguous range of slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Range {
    /// First slot; a multiple of the range's size.
    pub(crate) base: u32,
    /// Size class: the range has `1 << order` slots.
    pub(crate) order: u8,
}

impl Range {
    /// The smallest range that holds `len` slots (at least one) at `base`.
    #[must_use]
    pub(crate) fn holding(base: u32, len: u16) -> Self {
        Self {
            base,
            order: order_of(len),
        }
    }

    /// Number of slots.
    #[must_use]
    pub(crate) fn size(self) -> u32 {
        1 << self.order
    }

    /// The other half of the range that this one is a half of.
    fn buddy(self) -> Self {
        Self {
            base: self.base ^ self.size(),
            ..self
        }
    }
}

fn order_of(len: u16) -> u8 {
    u32::from(len).next_power_of_two().trailing_zeros() as u8
}

/// Allocator of slot ranges: a buddy allocator, so a range is a power of two long and aligned to its length, and free
/// halves join again. Always the lowest place that fits, so that the used part stays compact.
#[derive(Debug, Clone)]
pub(crate) struct SlotRanges {
    /// Free ranges by order.
    free: Vec<BTreeSet<u32>>,
    capacity: u32,
    used: u32,
}

const ORDERS: u8 = 32;

impl SlotRanges {
    /// All of `0..capacity` is free.
    #[must_use]
    pub(crate) fn new(capacity: u32) -> Self {
        let mut new = Self {
            free: vec![BTreeSet::new(); ORDERS as usize],
            capacity,
            used: 0,
        };
        let mut base = 0;
        while base < capacity {
            // The largest aligned range that ends in bounds.
            let aligned = if base == 0 {
                ORDERS - 1
            } else {
                base.trailing_zeros() as u8
            };
            let fits = (capacity - base).ilog2() as u8;
            let order = aligned.min(fits);
            new.free[order as usize].insert(base);
            base += 1 << order;
        }
        new
    }

    /// Number of slots.
    #[must_use]
    pub(crate) fn capacity(&self) -> u32 {
        self.capacity
    }

    /// Slots in ranges that are not free.
    #[must_use]
    pub(crate) fn used(&self) -> u32 {
        self.used
    }

    /// A range for `len` slots, if there is room.
    pub(crate) fn alloc(&mut self, len: u16) -> Option<Range> {
        let order = order_of(len);
        let (from, base) = (order..ORDERS)
            .filter_map(|o| self.free[o as usize].first().map(|base| (o, *base)))
            .min_by_key(|(_, base)| *base)?;
        self.take(Range { base, order: from }, Range { base, order });
        Some(Range { base, order })
    }

    /// Takes a range that is known to be in use. False where it is not wholly free, not aligned, or out of bounds.
    pub(crate) fn claim(&mut self, range: Range) -> bool {
        if range.order >= ORDERS || !range.base.is_multiple_of(range.size()) {
            return false;
        }
        let holder = (range.order..ORDERS).map(|order| Range {
            base: range.base & !((1_u64 << order) as u32).wrapping_sub(1),
            order,
        });
        let Some(holder) = holder
            .into_iter()
            .find(|r| self.free[r.order as usize].contains(&r.base))
        else {
            return false;
        };
        self.take(holder, range);
        true
    }

    /// Gives a range back.
    ///
    /// # Panics
    /// In debug builds, where the range is free already.
    pub(crate) fn free(&mut self, mut range: Range) {
        self.used -= range.size();
        while range.order + 1 < ORDERS {
            let buddy = range.buddy();
            if !self.free[range.order as usize].remove(&buddy.base) {
                break;
            }
            range = Range {
                base: range.base.min(buddy.base),
                order: range.order + 1,
            };
        }
        debug_assert!(range.base + range.size() <= self.capacity);
        let new = self.free[range.order as usize].insert(range.base);
        debug_assert!(new, "{range:?} was free already");
    }

    /// Takes `wanted` out of the free range `holder` that contains it; what is left of it stays free.
    fn take(&mut self, holder: Range, wanted: Range) {
        self.free[holder.order as usize].remove(&holder.base);
        let mut rest = holder;
        while rest.order > wanted.order {
            rest.order -= 1;
            let upper = rest.base + rest.size();
            let free = if wanted.base >= upper {
                std::mem::replace(&mut rest.base, upper)
            } else {
                upper
            };
            self.free[rest.order as usize].insert(free);
        }
        self.used += wanted.size();
    }
}

/// Allocator of indexes in `1..capacity`: the lowest that is free. Zero is never given out.
#[derive(Debug, Clone)]
pub(crate) struct Indexes {
    /// Free indexes below `next`.
    free: BTreeSet<u32>,
    /// Never used, and all above it.
    next: u32,
    capacity: u32,
}

impl Indexes {
    /// All of `1..capacity` is free.
    #[must_use]
    pub(crate) fn new(capacity: u32) -> Self {
        Self {
            free: BTreeSet::new(),
            next: 1,
            capacity,
        }
    }

    /// Indexes that are not free.
    #[must_use]
    pub(crate) fn used(&self) -> u32 {
        self.next - 1 - self.free.len() as u32
    }

    /// An index, if one is free.
    pub(crate) fn alloc(&mut self) -> Option<u32> {
        if let Some(index) = self.free.pop_first() {
            return Some(index);
        }
        (self.next < self.capacity).then(|| {
            self.next += 1;
            self.next - 1
        })
    }

    /// Takes an index that is known to be in use. False where it is not free or out of bounds.
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

    /// Gives an index back.
    ///
    /// # Panics
    /// In debug builds, where the index is free already.
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
    fn ranges_are_powers_of_two_and_aligned() {
        let mut ranges = SlotRanges::new(64);
        for (len, size) in [(1, 1), (2, 2), (3, 4), (5, 8), (10, 16)] {
            let range = ranges.alloc(len).unwrap();
            assert_eq!(range.size(), size);
            assert_eq!(range.base % size, 0);
        }
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
        assert_eq!(ranges.alloc(8), Some(Range { base: 0, order: 3 }));
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
        assert!(ranges.claim(Range { base: 8, order: 2 }));
        assert!(!ranges.claim(Range { base: 8, order: 2 }));
        assert!(!ranges.claim(Range { base: 8, order: 3 }));
        assert!(!ranges.claim(Range { base: 10, order: 0 }));
        assert!(!ranges.claim(Range { base: 13, order: 1 }), "not aligned");
        assert!(!ranges.claim(Range { base: 96, order: 3 }), "out of bounds");
        assert!(!ranges.claim(Range {
            base: u32::MAX,
            order: 0
        }));
        assert!(ranges.claim(Range { base: 96, order: 2 }));
        assert!(ranges.claim(Range { base: 12, order: 2 }));
    }

    proptest! {
        #[test]
        fn ranges_never_overlap_and_all_comes_back(ops in prop::collection::vec((any::<bool>(), 1_u16..40, any::<prop::sample::Index>()), 1..200), capacity in 1_u32..600) {
            let mut ranges = SlotRanges::new(capacity);
            let mut held: Vec<Range> = Vec::new();
            for (alloc, len, which) in ops {
                if alloc {
                    if let Some(range) = ranges.alloc(len) {
                        prop_assert!(range.size() >= u32::from(len) && range.base + range.size() <= capacity);
                        for other in &held {
                            prop_assert!(range.base + range.size() <= other.base || other.base + other.size() <= range.base);
                        }
                        held.push(range);
                    }
                } else if !held.is_empty() {
                    ranges.free(held.swap_remove(which.index(held.len())));
                }
                prop_assert_eq!(ranges.used(), held.iter().map(|r| r.size()).sum::<u32>());
                // What is held can be claimed in a fresh allocator: adoption ends in the same state.
                let mut adopted = SlotRanges::new(capacity);
                for range in &held {
                    prop_assert!(adopted.claim(*range));
                }
                prop_assert_eq!(&adopted.free, &ranges.free);
            }
            for range in held.drain(..) {
                ranges.free(range);
            }
            prop_assert_eq!(&ranges.free, &SlotRanges::new(capacity).free);
        }
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
