//! Atomic operations on map values.
//!
//! Operations that return the old value (`BPF_FETCH`, `BPF_XCHG`, `BPF_CMPXCHG`) are full barriers, like the kernel's own atomic
//! operations with a return value (Linux, `Documentation/atomic_t.txt`, "ORDERING").
//!
//! The kernel target's `core` has atomic loads and stores only, so the instructions are written in assembly. Other
//! targets only check this crate and never run it; there, the module uses the atomic types of `core`.

use crate::maps::stores_in_order;

#[cfg(target_arch = "bpf")]
mod imp {
    use core::arch::asm;

    // The assembly names the registers of 32-bit operands explicitly. The compiler supports the `w` registers only with
    // the target feature `alu32`; the linker, which assembles this code, has the feature (cpu v3).

    #[inline(always)]
    pub(crate) unsafe fn exchange_u64(at: *mut u64, new: u64) -> u64 {
        let mut value = new;
        // SAFETY: the caller guarantees that the pointer is to an aligned field of a map value.
        unsafe { asm!("{value} = xchg_64({at} + 0, {value})", at = in(reg) at, value = inout(reg) value) };
        value
    }

    #[inline(always)]
    pub(crate) unsafe fn exchange_u32(at: *mut u32, new: u32) -> u32 {
        let mut value = new;
        // SAFETY: the caller guarantees that the pointer is to an aligned field of a map value.
        unsafe { asm!("w2 = xchg32_32({at} + 0, w2)", at = in(reg) at, inout("r2") value) };
        value
    }

    #[inline(always)]
    pub(crate) unsafe fn compare_exchange_u64(at: *mut u64, old: u64, new: u64) -> bool {
        let mut value = old;
        // SAFETY: the caller guarantees that the pointer is to an aligned field of a map value.
        unsafe { asm!("r0 = cmpxchg_64({at} + 0, r0, {new})", at = in(reg) at, new = in(reg) new, inout("r0") value) };
        value == old
    }

    #[inline(always)]
    pub(crate) unsafe fn fetch_u32(at: *mut u32) -> u32 {
        let mut value = 0_u32;
        // SAFETY: the caller guarantees that the pointer is to an aligned field of a map value.
        unsafe { asm!("w2 = atomic_fetch_add((u32 *)({at} + 0), w2)", at = in(reg) at, inout("r2") value) };
        value
    }

    #[inline(always)]
    pub(crate) unsafe fn add_u32(at: *mut u32, more: u32) {
        // SAFETY: the caller guarantees that the pointer is to an aligned field of a map value.
        unsafe { asm!("lock *(u32 *)({at} + 0) += w2", at = in(reg) at, in("r2") more) };
    }
}

#[cfg(not(target_arch = "bpf"))]
mod imp {
    use core::sync::atomic::{AtomicU32, AtomicU64, Ordering};

    pub(crate) unsafe fn exchange_u64(at: *mut u64, new: u64) -> u64 {
        // SAFETY: the caller guarantees that the pointer is to an aligned field of a map value.
        unsafe { AtomicU64::from_ptr(at) }.swap(new, Ordering::SeqCst)
    }

    pub(crate) unsafe fn exchange_u32(at: *mut u32, new: u32) -> u32 {
        // SAFETY: the caller guarantees that the pointer is to an aligned field of a map value.
        unsafe { AtomicU32::from_ptr(at) }.swap(new, Ordering::SeqCst)
    }

    pub(crate) unsafe fn compare_exchange_u64(at: *mut u64, old: u64, new: u64) -> bool {
        // SAFETY: the caller guarantees that the pointer is to an aligned field of a map value.
        let at = unsafe { AtomicU64::from_ptr(at) };
        at.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    pub(crate) unsafe fn fetch_u32(at: *mut u32) -> u32 {
        // SAFETY: the caller guarantees that the pointer is to an aligned field of a map value.
        unsafe { AtomicU32::from_ptr(at) }.load(Ordering::SeqCst)
    }

    pub(crate) unsafe fn add_u32(at: *mut u32, more: u32) {
        // SAFETY: the caller guarantees that the pointer is to an aligned field of a map value.
        unsafe { AtomicU32::from_ptr(at) }.fetch_add(more, Ordering::SeqCst);
    }
}

/// A field of a map value that several programs write.
pub(crate) struct Shared<T>(*mut T);

impl<T: Copy> Shared<T> {
    /// Returns the field that a pointer points to.
    ///
    /// # Safety
    /// The pointer must be to a field of a map value, aligned, and valid while the program runs.
    #[inline(always)]
    pub(crate) const unsafe fn new(at: *mut T) -> Self {
        Self(at)
    }

    /// Loads the value with one instruction, without a barrier.
    #[inline(always)]
    pub(crate) fn load(&self) -> T {
        // SAFETY: the caller of `new` guarantees an aligned field of a map value, valid while the program runs.
        unsafe { self.0.read_volatile() }
    }

    /// Stores `new` with one instruction, without a barrier.
    #[inline(always)]
    pub(crate) fn store(&self, new: T) {
        // SAFETY: the caller of `new` guarantees an aligned field of a map value, valid while the program runs.
        unsafe { self.0.write_volatile(new) }
    }
}

impl Shared<u64> {
    /// Stores `new` after all earlier stores of the program, and before all later ones, as others see them. Loads are not ordered.
    #[inline(always)]
    pub(crate) fn store_in_order(&self, new: u64) {
        if stores_in_order() {
            self.store(new);
        } else {
            self.exchange(new);
        }
    }

    /// Stores `new` and returns the old value. A full barrier.
    #[inline(always)]
    pub(crate) fn exchange(&self, new: u64) -> u64 {
        // SAFETY: the caller of `new` guarantees an aligned field of a map value, valid while the program runs.
        unsafe { imp::exchange_u64(self.0, new) }
    }

    /// Stores `new` if the value is `old`, and returns whether it was. A full barrier.
    #[inline(always)]
    pub(crate) fn compare_exchange(&self, old: u64, new: u64) -> bool {
        // SAFETY: the caller of `new` guarantees an aligned field of a map value, valid while the program runs.
        unsafe { imp::compare_exchange_u64(self.0, old, new) }
    }
}

impl Shared<u32> {
    /// Stores `new` after all earlier stores of the program, and before all later ones, as others see them. Loads are not ordered.
    #[inline(always)]
    pub(crate) fn store_in_order(&self, new: u32) {
        if stores_in_order() {
            self.store(new);
        } else {
            self.exchange(new);
        }
    }

    /// Stores `new` and returns the old value. A full barrier.
    #[inline(always)]
    pub(crate) fn exchange(&self, new: u32) -> u32 {
        // SAFETY: the caller of `new` guarantees an aligned field of a map value, valid while the program runs.
        unsafe { imp::exchange_u32(self.0, new) }
    }

    /// Loads the value. A full barrier.
    #[inline(always)]
    pub(crate) fn fetch(&self) -> u32 {
        // SAFETY: the caller of `new` guarantees an aligned field of a map value, valid while the program runs.
        unsafe { imp::fetch_u32(self.0) }
    }

    /// Adds `more` to the value; wraps around on overflow. Not a barrier.
    #[inline(always)]
    pub(crate) fn add(&self, more: u32) {
        // SAFETY: the caller of `new` guarantees an aligned field of a map value, valid while the program runs.
        unsafe { imp::add_u32(self.0, more) }
    }
}
