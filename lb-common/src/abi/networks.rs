//! SOURCE_RANGES and CLUSTER_CIDRS: networks that the packet path looks sources up in.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::layout::layout;
use super::{Addr, ServiceIndex};

/// The part of a key of SOURCE_RANGES after its prefix length: a network that may use a load-balancer address. The
/// prefix covers the whole service index and as many bits of the address as the range has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SourceRange {
    /// The service port.
    pub service: ServiceIndex,
    /// Address of a client.
    pub addr: Addr,
}

layout!(SourceRange: size 20, align 4 { service: 0, addr: 4 });

/// Bits of the values of CLUSTER_CIDRS.
pub mod cluster_flags {
    /// Inside the cluster: external addresses have the semantics of policy Cluster.
    pub const INSIDE: u32 = 1;
    /// Pods of this node: replies to them pass through this node.
    pub const HERE: u32 = 2;
}
