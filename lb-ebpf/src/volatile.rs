//! Addresses and records between maps, stack and registers, word by word. Volatile: the compiler takes addresses apart into
//! bytes again, and for 64 bytes and more calls functions that go byte by byte.

use core::mem::MaybeUninit;

use lb_common::abi::{Addr, FrontendKey};
use lb_common::logic::ip128::Ip128;
use lb_common::logic::route::Destination;

/// Reads an address.
///
/// # Safety
/// `at` must be valid for reads and aligned to 8 bytes, as all addresses in map values are.
#[inline(always)]
pub(crate) unsafe fn load(at: *const Addr) -> Ip128 {
    let at = at.cast::<u64>();
    // SAFETY: an `Addr` is two words; see above.
    unsafe { Ip128([at.read_volatile(), at.add(1).read_volatile()]) }
}

/// Writes an address.
///
/// # Safety
/// `at` must be valid for writes and aligned to 8 bytes.
#[inline(always)]
pub(crate) unsafe fn store(at: *mut Addr, Ip128([first, last]): Ip128) {
    let at = at.cast::<u64>();
    // SAFETY: an `Addr` is two words; see above.
    unsafe {
        at.write_volatile(first);
        at.add(1).write_volatile(last);
    }
}

/// Copies a record. What is returned by value would stand on the stack twice, and there is no more of that.
///
/// # Safety
/// `from` must be valid for reads and `to` for writes, both aligned to 8 bytes.
#[inline(always)]
pub(crate) unsafe fn copy<T: Copy>(from: *const T, to: *mut T) {
    const { assert!(size_of::<T>().is_multiple_of(8) && align_of::<T>() == 8) };
    for at in 0..size_of::<T>() / 8 {
        // SAFETY: within both, see above.
        unsafe {
            let word = from.cast::<u64>().add(at).read_volatile();
            to.cast::<u64>().add(at).write_volatile(word);
        }
    }
}

/// A structure of the kernel's, zeroed.
///
/// # Safety
/// All zero bytes must be a value of it.
#[inline(always)]
pub(crate) unsafe fn zero<T>(room: &mut MaybeUninit<T>) -> &mut T {
    const { assert!(size_of::<T>().is_multiple_of(4) && align_of::<T>() >= 4) };
    for at in 0..size_of::<T>() / 4 {
        // SAFETY: within the room.
        unsafe { room.as_mut_ptr().cast::<u32>().add(at).write_volatile(0) };
    }
    // SAFETY: see above.
    unsafe { room.assume_init_mut() }
}

/// A [`FrontendKey`] in memory, for a lookup.
#[repr(C)]
pub(crate) struct Key {
    addr: [u64; 2],
    /// Port, protocol, and zero.
    rest: u32,
}

const _: () = assert!(size_of::<Key>() >= size_of::<FrontendKey>());
const _: () = assert!(align_of::<Key>() >= align_of::<FrontendKey>());

impl Key {
    /// The key of a destination.
    #[inline(always)]
    pub(crate) fn of(to: Destination) -> Self {
        let [p, q] = to.port.to_ne_bytes();
        Self {
            addr: to.addr.0,
            rest: u32::from_ne_bytes([p, q, to.proto, 0]),
        }
    }

    #[inline(always)]
    pub(crate) fn as_key(&self) -> &FrontendKey {
        // SAFETY: no smaller and no less aligned, the fields are where the key's are, and every bit pattern is a key.
        unsafe { &*core::ptr::from_ref(self).cast::<FrontendKey>() }
    }
}

/// An [`Addr`] in memory, for a lookup.
#[repr(C)]
pub(crate) struct AddrKey([u64; 2]);

impl AddrKey {
    #[inline(always)]
    pub(crate) fn of(addr: Ip128) -> Self {
        Self(addr.0)
    }

    #[inline(always)]
    pub(crate) fn as_key(&self) -> &Addr {
        // SAFETY: same size, no less aligned, and every bit pattern is an address.
        unsafe { &*core::ptr::from_ref(self).cast::<Addr>() }
    }
}
