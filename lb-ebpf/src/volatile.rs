//! Volatile accesses: to single fields, and word by word to addresses, backend references and records.
//!
//! The agent and programs on other CPUs store to map values at any time, so fields are read and written like with the
//! kernel's `READ_ONCE` and `WRITE_ONCE`. Addresses and records are copied in words, because the compiler would otherwise
//! split addresses into bytes again, and for 64 bytes and more it would call functions that copy byte by byte.

use core::mem::MaybeUninit;

use lb_common::abi::{Addr, BackendRef};
use lb_common::logic::ip128::Ip128;

/// Reads a field through a raw pointer, as in `read_once!((*service).flags)`: the kernel's `READ_ONCE`.
///
/// It creates no reference, since a reference to a field that others store to is undefined behavior. The compiler does not
/// repeat, split or merge the load. The verifier requires that of loads from a context too.
///
/// An unsafe operation: the pointer must be valid for reads, and the field aligned.
macro_rules! read_once {
    ($field:expr) => {
        (&raw const $field).read_volatile()
    };
}

/// Writes a field through a raw pointer, as in `write_once!((*entry).seen, now)`: the kernel's `WRITE_ONCE`. The reasons are
/// those of [`read_once`].
///
/// An unsafe operation: the pointer must be valid for writes, and the field aligned.
macro_rules! write_once {
    ($field:expr, $value:expr) => {
        (&raw mut $field).write_volatile($value)
    };
}

pub(crate) use {read_once, write_once};

/// Reads an address.
///
/// # Safety
/// `at` must be valid for reads and aligned to 8 bytes, as all addresses in map values are.
#[inline(always)]
pub(crate) unsafe fn load_addr(at: *const Addr) -> Ip128 {
    let at = at.cast::<u64>();
    // SAFETY: an `Addr` is two words, and the caller guarantees that `at` is valid for reads and aligned.
    unsafe { Ip128([at.read_volatile(), at.add(1).read_volatile()]) }
}

/// Writes an address.
///
/// # Safety
/// `at` must be valid for writes and aligned to 8 bytes.
#[inline(always)]
pub(crate) unsafe fn store_addr(at: *mut Addr, Ip128([first, last]): Ip128) {
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
            id: read_once!((*at).id),
            generation: read_once!((*at).generation),
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
        write_once!((*at).id, id);
        write_once!((*at).generation, generation);
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

/// Copies the first bytes of a record, by their number.
///
/// # Safety
/// `from` must be valid for reads of `bytes`, and `to` for writes; both must be aligned to 8 bytes.
#[inline(always)]
pub(crate) unsafe fn copy_first<T: Copy>(from: *const T, to: *mut T, bytes: usize) {
    for at in 0..bytes.min(size_of::<T>()) / 8 {
        // SAFETY: the index is less than the number of words that the caller guarantees to be valid and aligned.
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
pub(crate) unsafe fn zeroed<T>(room: &mut MaybeUninit<T>) -> &mut T {
    const { assert!(size_of::<T>().is_multiple_of(4) && align_of::<T>() >= 4) };
    for at in 0..size_of::<T>() / 4 {
        // SAFETY: the index is less than the number of words of `T`, so the store is within `room`.
        unsafe { room.as_mut_ptr().cast::<u32>().add(at).write_volatile(0) };
    }
    // SAFETY: all bytes are zero, and the caller guarantees that zero bytes are a valid value.
    unsafe { room.assume_init_mut() }
}
