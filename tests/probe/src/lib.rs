//! Input and results of the probe, shared by the kernel program (`main.rs`) and the tests that run it.
#![no_std]

use core::mem::offset_of;

use lb_common::abi::FrontendKey;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Name of the program that looks frontends up.
pub const PROGRAM: &str = "lb_probe";

/// Name of the per-CPU array with one [`Tally`].
pub const TALLY: &str = "TALLY";

/// Name of the program that counts packets.
pub const COUNTER: &str = "lb_count";

/// Name of the array with one u64, in which [`COUNTER`] counts.
pub const COUNT: &str = "COUNT";

/// The input packet of a run of [`PROGRAM`]: the frontend to look up and its backends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LookupRequest {
    /// The place of the Ethernet header, which the kernel reads.
    pub header: [u8; 16],
    /// The frontend, which always exists.
    pub key: FrontendKey,
    /// The last four bytes of the addresses of its backends, in network order; only the bits of `mask` are set.
    pub owner: u32,
    /// The bits of an address that identify the Service of the backend.
    pub mask: u32,
    /// One of `linger_mask + 1` lookups pauses between two reads. A power of two minus one.
    pub linger_mask: u32,
}

const _: () = {
    assert!(size_of::<LookupRequest>() == 48);
    assert!(offset_of!(LookupRequest, key) == 16);
    assert!(offset_of!(LookupRequest, owner) == 36);
};

/// The result of a lookup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Verdict {
    /// The lookup found a backend of the frontend's Service.
    Good,
    /// The bit of the address in FILTER is not set.
    Filtered,
    /// There is no such frontend.
    NoFrontend,
    /// The frontend is not a cluster IP.
    WrongKind,
    /// The service index is out of range.
    IndexOutOfRange,
    /// The set has no slots.
    EmptySet,
    /// The index of the slot is out of range.
    SlotOutOfRange,
    /// The slot has an address of another Service's backend.
    ForeignBackend,
    /// The slot does not match the current or the withdrawn entry of its backend in BACKENDS: the id belongs to another
    /// backend.
    Stale,
}

impl Verdict {
    /// Number of verdicts.
    pub const COUNT: usize = 9;

    /// All verdicts, in the order of their numbers.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Good,
        Self::Filtered,
        Self::NoFrontend,
        Self::WrongKind,
        Self::IndexOutOfRange,
        Self::EmptySet,
        Self::SlotOutOfRange,
        Self::ForeignBackend,
        Self::Stale,
    ];

    /// Returns the meaning of the verdict as text.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::Filtered => "an address that FILTER does not have",
            Self::NoFrontend => "no frontend",
            Self::WrongKind => "a frontend of another kind",
            Self::IndexOutOfRange => "a service index out of range",
            Self::EmptySet => "an empty set",
            Self::SlotOutOfRange => "a slot out of range",
            Self::ForeignBackend => "a backend of another Service",
            Self::Stale => "a backend id that belongs to another backend",
        }
    }
}

/// The results of the lookups on one CPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Tally {
    /// Number of lookups by [`Verdict`].
    pub counts: [u64; Verdict::COUNT],
    /// The [`Verdict`] of the newest lookup that was not good. The fields below describe that lookup.
    pub verdict: u32,
    /// The service index of the frontend.
    pub service: u32,
    /// The index of the slot.
    pub slot: u32,
    /// The last four bytes of the address in the slot, in network order.
    pub addr: u32,
    /// The backend id in the slot.
    pub backend: u32,
    /// The backend's generation in the slot.
    pub slot_generation: u32,
    /// The backend's generation in BACKENDS.
    pub backend_generation: u32,
    /// Padding, always zero.
    pub pad: u32,
}
