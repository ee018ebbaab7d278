//! What the probe is asked, and what it finds: shared by the kernel program (`main.rs`) and the tests that run it.
#![no_std]

use core::mem::offset_of;

use lb_common::abi::FrontendKey;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Name of the program.
pub const PROGRAM: &str = "lb_probe";

/// Name of the map of one [`Tally`] for each CPU.
pub const TALLY: &str = "TALLY";

/// Name of the program that counts packets.
pub const COUNTER: &str = "lb_count";

/// Name of the array of one u64 that it counts in.
pub const COUNT: &str = "COUNT";

/// The "packet" that a run of the program takes: look `key` up, and judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct LookupRequest {
    /// Where a packet has its Ethernet header, which the kernel reads.
    pub header: [u8; 16],
    /// The frontend, which is always there.
    pub key: FrontendKey,
    /// Last four bytes of an address, in network order, with the bits of `mask` alone: those of its backends.
    pub owner: u32,
    /// Which bits of an address tell whose it is.
    pub mask: u32,
    /// One of so many lookups lingers in between, less one; a power of two less one.
    pub linger_mask: u32,
}

const _: () = {
    assert!(size_of::<LookupRequest>() == 48);
    assert!(offset_of!(LookupRequest, key) == 16);
    assert!(offset_of!(LookupRequest, owner) == 36);
};

/// How a lookup ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Verdict {
    /// At a backend of the owner.
    Good,
    /// No such frontend.
    NoFrontend,
    /// The frontend is no cluster IP.
    WrongKind,
    /// The service index is out of range.
    IndexOutOfRange,
    /// The set has no member.
    EmptySet,
    /// The slot is out of range.
    SlotOutOfRange,
    /// The address is not the owner's.
    ForeignBackend,
    /// What the slot says of its backend is not what BACKENDS says of it, or said last: its id is somebody else's.
    Stale,
}

impl Verdict {
    /// How many there are.
    pub const COUNT: usize = 8;

    /// All, in the order of their numbers.
    pub const ALL: [Self; Self::COUNT] = [
        Self::Good,
        Self::NoFrontend,
        Self::WrongKind,
        Self::IndexOutOfRange,
        Self::EmptySet,
        Self::SlotOutOfRange,
        Self::ForeignBackend,
        Self::Stale,
    ];

    /// What it means, for people.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Self::Good => "good",
            Self::NoFrontend => "no frontend",
            Self::WrongKind => "a frontend of another kind",
            Self::IndexOutOfRange => "a service index out of range",
            Self::EmptySet => "an empty set",
            Self::SlotOutOfRange => "a slot out of range",
            Self::ForeignBackend => "a stranger's backend",
            Self::Stale => "a backend id that is another's",
        }
    }
}

/// What the program has seen on one CPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Tally {
    /// Lookups by [`Verdict`].
    pub counts: [u64; Verdict::COUNT],
    /// Of the newest that was not good: the [`Verdict`].
    pub verdict: u32,
    /// The service index.
    pub service: u32,
    /// The slot.
    pub slot: u32,
    /// Last four bytes of the address, in network order.
    pub addr: u32,
    /// The id of the backend.
    pub backend: u32,
    /// Its generation, as the slot has it.
    pub slot_generation: u32,
    /// Its generation, as BACKENDS has it.
    pub backend_generation: u32,
    /// Zero.
    pub pad: u32,
}
