//! STATE: the agent, as the command line shows it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::layout;

/// The only value of STATE. The agent writes it, and the command line reads it, also after the agent has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct State {
    /// Process id of the agent that wrote this, in the agent's own PID namespace.
    pub pid: u32,
    /// 1 after the initial sync: everything that the source has was applied at least once. Else 0.
    pub complete: u32,
    /// Start of the agent, in seconds since 1970.
    pub started: u64,
    /// Time of the last applied batch, in seconds since 1970.
    pub applied: u64,
    /// Number of batches that were applied.
    pub applies: u64,
    /// Id (inode) of the cgroup that the programs are attached to.
    pub cgroup: u64,
    /// `bpf_get_netns_cookie` of the node's network namespace.
    pub netns: u64,
    /// Number of problems that did not fit into NOTICES.
    pub more_problems: u32,
    /// 1 if only sockets of the node's network namespace are served (`--socket-lb node`), else 0.
    pub node_only: u32,
    /// 1 if the agent reserved the SNAT ports of CONFIG, and releases them in `cleanup`. 0 if they were reserved before.
    pub own_ports: u32,
    /// Largest size of the maps together in MiB (`--map-memory`), as the agent last computed it; zero if a build without
    /// the flag wrote this.
    pub map_memory: u32,
    /// Name of the node, padded with zero bytes.
    pub node: [u8; 256],
    /// Version of the agent, padded with zero bytes.
    pub version: [u8; 32],
    /// Zero: room for fields of later builds.
    pub reserved: [u64; 20],
}

layout!(State: size 512, align 8 {
    pid: 0,
    complete: 4,
    started: 8,
    applied: 16,
    applies: 24,
    cgroup: 32,
    netns: 40,
    more_problems: 48,
    node_only: 52,
    own_ports: 56,
    map_memory: 60,
    node: 64,
    version: 320,
    reserved: 352,
});
