//! Word-wise copies of addresses and records between maps, stack and registers.
//!
//! The accesses are volatile. Otherwise the compiler splits addresses into bytes again, and for 64 bytes and more it
//! calls functions that copy byte by byte.

use core::mem::MaybeUninit;

use lb_common::abi::{Addr, BackendRef};
use lb_common::logic::ip128::Ip128;

/// Reads an address.
///
/// # Safety
/// `at` must be valid for reads and aligned to 8 bytes, as all addresses in map values are.
#[inline(always)]
pub(crate) unsafe fn load(at: *const Addr) -> Ip128 {
    let at = at.cast::<u64>();
    // SAFETY: an `Addr` is two words, and the caller guarantees that `at` is valid for reads and aligned.
    unsafe { Ip128([at.read_volatile(), at.add(1).read_volatile()]) }
}

/// Writes an address.
///
/// # Safety
/// `at` must be valid for writes and aligned to 8 bytes.
#[inline(always)]
pub(crate) unsafe fn store(at: *mut Addr, Ip128([first, last]): Ip128) {
    let at = at.cast::<u64>();
    // SAFETY: an `Addr` is two words, and the caller guarantees that `at` is valid for writes and aligned.
    unsafe {
        at.write_volatile(first);
        at.add(1).write_volatile(last);
    }
}

/// Reads a reference to a backend.
///
/// # Safety
/// `at` must be valid for reads and aligned.
#[inline(always)]
pub(crate) unsafe fn load_ref(at: *const BackendRef) -> BackendRef {
    // SAFETY: the caller guarantees that `at` is valid for reads and aligned, so its fields are.
    unsafe {
        BackendRef {
            id: (&raw const (*at).id).read_volatile(),
            generation: (&raw const (*at).generation).read_volatile(),
        }
    }
}

/// Writes a reference to a backend.
///
/// # Safety
/// `at` must be valid for writes and aligned.
#[inline(always)]
pub(crate) unsafe fn store_ref(at: *mut BackendRef, BackendRef { id, generation }: BackendRef) {
    // SAFETY: the caller guarantees that `at` is valid for writes and aligned, so its fields are.
    unsafe {
        (&raw mut (*at).id).write_volatile(id);
        (&raw mut (*at).generation).write_volatile(generation);
    }
}

/// Copies a record. A record returned by value would occupy the stack twice, and the stack (512 bytes) has no room for
/// that.
///
/// # Safety
/// `from` must be valid for reads and `to` for writes, both aligned to 8 bytes.
#[inline(always)]
pub(crate) unsafe fn copy<T: Copy>(from: *const T, to: *mut T) {
    const { assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() == 8) };
    for at in 0..size_of::<T>() / 8 {
        // SAFETY: the index is less than the number of words of `T`, so both accesses are within the records, which the
        // caller guarantees to be valid and aligned.
        unsafe {
            let word = from.cast::<u64>().add(at).read_volatile();
            to.cast::<u64>().add(at).write_volatile(word);
        }
    }
}

/// Sets a structure of the kernel to zero and returns it.
///
/// # Safety
/// Zero bytes must be a valid value of the structure.
#[inline(always)]
pub(crate) unsafe fn zero<T>(room: &mut MaybeUninit<T>) -> &mut T {
    const { assert!(size_of::<T>().is_multiple_of(4) && align_of::<T>() >= 4) };
    for at in 0..size_of::<T>() / 4 {
        // SAFETY: the index is less than the number of words of `T`, so the store is within `room`.
        unsafe { room.as_mut_ptr().cast::<u32>().add(at).write_volatile(0) };
    }
    // SAFETY: all bytes are zero, and the caller guarantees that zero bytes are a valid value.
    unsafe { room.assume_init_mut() }
}
