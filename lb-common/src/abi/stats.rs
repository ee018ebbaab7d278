//! STATS, CONFIG, STATE and NOTICES.

use core::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Value of STATS, per CPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ServiceStats {
    /// Connections whose destination was rewritten to a backend.
    pub connections: u64,
    /// Connections that were refused.
    pub refused: u64,
}

const _: () = assert!(size_of::<ServiceStats>() == 16);

/// The one value of CONFIG: what the agent tells the programs while they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct Config {
    /// Which events to write: see [`super::EventKind::bit`].
    pub events: u32,
    /// The first port that packets to other nodes may be given for a source.
    pub snat_first: u16,
    /// The last one; less than the first: none is to be had.
    pub snat_last: u16,
}

const _: () = assert!(size_of::<Config>() == 8);

/// The one value of STATE: what the agent tells the command line, also after its death.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct State {
    /// Process id of the agent that wrote this, in its own namespace.
    pub pid: u32,
    /// 1 after everything that the source has was applied at least once, else 0.
    pub complete: u32,
    /// When the agent started; seconds since 1970.
    pub started: u64,
    /// When something was last applied; seconds since 1970.
    pub applied: u64,
    /// How many batches were applied.
    pub applies: u64,
    /// Id of the cgroup (its inode) that the programs are attached to.
    pub cgroup: u64,
    /// `bpf_get_netns_cookie` of the node.
    pub netns: u64,
    /// Problems that did not fit into NOTICES.
    pub more_notices: u32,
    /// 1 where only sockets of the node's namespace are served (`--socket-lb node`), else 0.
    pub node_only: u32,
    /// 1 where the ports of CONFIG were reserved by the agent, which gives them back in the end; 0 where they were
    /// before.
    pub own_ports: u32,
    /// Zero.
    pub pad: u32,
    /// Node name, padded with zero bytes.
    pub node: [u8; 256],
    /// Version of the agent, padded with zero bytes.
    pub version: [u8; 32],
}

const _: () = {
    assert!(size_of::<State>() == 352);
    assert!(offset_of!(State, node) == 64);
};

/// Value of NOTICES: a problem, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Notice {
    /// Where, in UTF-8, padded with zero bytes, cut where it is longer.
    pub place: [u8; 256],
    /// What, likewise.
    pub message: [u8; 512],
}

const _: () = assert!(size_of::<Notice>() == 768);
