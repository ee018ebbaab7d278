//! DEVICES: network devices that packets leave by.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Addr;
use super::layout::layout;

/// Value of DEVICES, by interface index: the source addresses of packets that are masqueraded behind the device.
///
/// An entry that exists is changed in place by the agent call `lb_device_swap`, since a lookup during an update through
/// the map API can miss (`htab_map_update_elem` in `kernel/bpf/hashtab.c`). The first word of `v4` is zero in every
/// value, so an IPv4 address changes by one 8-byte store. The two words of `v6` are read under `sequence`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Device {
    /// IPv4 source address, v4-mapped; all zero if the device has none.
    pub v4: Addr,
    /// IPv6 source address; all zero if the device has none.
    pub v6: Addr,
    /// See [`device_flags`].
    pub flags: u32,
    /// Even while `v6` is stable, odd while it is being changed. A reader of `v6` that finds an odd or another number
    /// afterwards tries again.
    pub sequence: u32,
    /// Zero: room for fields of later builds.
    pub reserved: [u64; 3],
    /// Zero.
    #[cfg(feature = "made-up-layout")]
    pub made_up: [u64; 3],
}

#[cfg(not(feature = "made-up-layout"))]
layout!(Device: size 64, align 8 { v4: 0, v6: 16, flags: 32, sequence: 36, reserved: 40 });
#[cfg(feature = "made-up-layout")]
layout!(Device: size 88, align 8 { v4: 0, v6: 16, flags: 32, sequence: 36, reserved: 40, made_up: 64 });

/// Bits of [`Device::flags`].
pub mod device_flags {
    /// The agent created the clsact qdisc of the device and removes it in `cleanup`. Programs do not read this bit.
    /// Bit 1 is not used again: in entries of earlier builds it may be set, with another meaning.
    pub const OWN_QDISC: u32 = 2;
    /// The device is a bridge.
    pub const BRIDGE: u32 = 4;
}

/// The "packet" of the agent call `lb_device_swap`: replaces the value of an existing entry of DEVICES in place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct DeviceSwap {
    /// Interface index.
    pub index: u32,
    /// Zero.
    pub pad: u32,
    /// The new value. Its `sequence` is ignored.
    pub value: Device,
}

#[cfg(not(feature = "made-up-layout"))]
layout!(DeviceSwap: size 72, align 8 { index: 0, pad: 4, value: 8 });
#[cfg(feature = "made-up-layout")]
layout!(DeviceSwap: size 96, align 8 { index: 0, pad: 4, value: 8 });
