//! Addresses between maps and registers, word by word: volatile, or the compiler takes them apart into bytes again.

use lb_common::abi::{Addr, FrontendKey};
use lb_common::logic::words::Words;

/// Reads an address.
///
/// # Safety
/// `at` must be valid for reads and aligned.
#[inline(always)]
pub(crate) unsafe fn load(at: *const Addr) -> Words {
    let at = at.cast::<u32>();
    let word = |i: usize| {
        // SAFETY: an `Addr` is four aligned words; see above.
        unsafe { at.add(i).read_volatile() }
    };
    Words([word(0), word(1), word(2), word(3)])
}

/// Writes an address.
///
/// # Safety
/// `at` must be valid for writes and aligned.
#[inline(always)]
pub(crate) unsafe fn store(at: *mut Addr, words: Words) {
    let at = at.cast::<u32>();
    for (i, word) in words.0.into_iter().enumerate() {
        // SAFETY: an `Addr` is four aligned words; see above.
        unsafe { at.add(i).write_volatile(word) };
    }
}

/// A destination in registers.
#[derive(Clone, Copy)]
pub(crate) struct Destination {
    pub(crate) addr: Words,
    /// Host byte order.
    pub(crate) port: u16,
    pub(crate) proto: u8,
}

/// A [`FrontendKey`] in memory, for a lookup.
#[repr(C)]
pub(crate) struct Key([u32; 5]);

const _: () = assert!(size_of::<Key>() == size_of::<FrontendKey>());

impl Key {
    /// The key of a destination.
    #[inline(always)]
    pub(crate) fn of(to: Destination) -> Self {
        let Words([a, b, c, d]) = to.addr;
        let [p, q] = to.port.to_ne_bytes();
        Self([a, b, c, d, u32::from_ne_bytes([p, q, to.proto, 0])])
    }

    /// Makes this the key that marks its address as a service address: one store, the rest is where it was.
    #[inline(always)]
    pub(crate) fn become_address_mark(&mut self) {
        self.0[4] = 0;
    }

    #[inline(always)]
    pub(crate) fn as_key(&self) -> &FrontendKey {
        // SAFETY: same size and alignment, and every bit pattern is a key.
        unsafe { &*core::ptr::from_ref(self).cast::<FrontendKey>() }
    }
}
