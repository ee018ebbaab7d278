//! DEVICES: reading and replacing entries that other CPUs use at the same time.
//!
//! The agent inserts and deletes entries through the map API. An entry that exists is replaced in place, so no lookup
//! misses it. A writer makes `sequence` odd before it changes the entry and even afterwards; there is one writer, the
//! agent that holds the lock of the pin path.

use lb_common::abi::{Device, DropReason, device_flags};
use lb_common::logic::ip128::Ip128;

use crate::atomic::Shared;
use crate::maps::DEVICES;
use crate::volatile::{self, read_once, write_once};

/// Number of times that a reader tries to read an IPv6 address that is being changed. The writer needs some nanoseconds,
/// unless an interrupt comes in between; the packet of a reader that gives up is dropped, and the client retransmits it.
const TRIES: usize = 4;

/// Returns whether a device, by interface index, is a bridge.
#[inline(always)]
pub(crate) fn is_bridge(index: u32) -> bool {
    DEVICES.get_ptr(index).is_some_and(|device| {
        // SAFETY: the pointer is to a value of the map; `lb_device_swap` may store to it at any time.
        let flags = unsafe { read_once!((*device).flags) };
        flags & device_flags::BRIDGE != 0
    })
}

/// Returns the source address, in the family of `client`, of packets that are masqueraded behind a device.
///
/// # Errors
/// Returns [`DropReason::NoSourceAddress`] if the device has no address of the family.
#[inline(always)]
pub(crate) fn source_address(index: u32, client: Ip128) -> Result<Ip128, DropReason> {
    let device = DEVICES.get_ptr_mut(index).ok_or(DropReason::NoSourceAddress)?;
    let addr = if client.is_v4() {
        // The first word is zero in every value, so the two loads cannot mix two addresses.
        // SAFETY: the pointer is to a value of the map, and addresses in map values are aligned to 8 bytes.
        unsafe { volatile::load_addr(&raw const (*device).v4) }
    } else {
        v6(device).ok_or(DropReason::NoSourceAddress)?
    };
    if addr.is_unset() {
        return Err(DropReason::NoSourceAddress);
    }
    Ok(addr)
}

/// Reads the IPv6 address of a value of DEVICES; `None` if a writer changed it during every try.
#[inline(always)]
fn v6(device: *mut Device) -> Option<Ip128> {
    // SAFETY: the pointer is to a value of the map, and the field is aligned.
    let sequence = unsafe { Shared::new(&raw mut (*device).sequence) };
    for _ in 0..TRIES {
        let before = sequence.fetch();
        // SAFETY: the pointer is to a value of the map, and addresses in map values are aligned to 8 bytes.
        let addr = unsafe { volatile::load_addr(&raw const (*device).v6) };
        if before & 1 == 0 && sequence.fetch() == before {
            return Some(addr);
        }
    }
    None
}

/// Replaces a value of DEVICES in place.
///
/// # Safety
/// `device` must be a value of the map, `new` must be readable, and no other writer may run.
#[inline(always)]
pub(crate) unsafe fn replace(device: *mut Device, new: *const Device) {
    // SAFETY: the caller guarantees that both pointers are valid; packet data is not aligned.
    unsafe {
        let new = new.read_unaligned();
        let sequence = Shared::new(&raw mut (*device).sequence);
        let stable = sequence.load() & !1;
        sequence.exchange(stable | 1);
        volatile::store_addr(&raw mut (*device).v4, new.v4.into());
        volatile::store_addr(&raw mut (*device).v6, new.v6.into());
        write_once!((*device).flags, new.flags);
        sequence.exchange(stable.wrapping_add(2));
    }
}
