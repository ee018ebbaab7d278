//! Types, names and sizes of everything that crosses the kernel boundary.
//!
//! Integers are in the byte order of the machine, ports included; addresses are bytes in network order. IPv4 addresses
//! are stored v4-mapped (`::ffff:a.b.c.d`), so that one family of maps serves both. Every type is plain old data with
//! explicit padding that is always zero, and its size and offsets are asserted at compile time. A change of any of them
//! needs a new [`VERSION`]: the golden file `lb-common/tests/layout.golden` has all of them.

mod addr;
mod affinity;
mod config;
mod ct;
mod device;
mod drop_reason;
pub(crate) mod enums;
mod event;
mod frontend;
pub mod layout;
mod maps;
mod moves;
mod networks;
mod problem;
mod programs;
mod record;
mod reference;
mod service;
mod set;
mod state;
mod stats;
mod udp_dest;

pub use addr::Addr;
pub use affinity::{Affinity, AffinityKey, AffinityKeyWords, ClientKind};
pub use config::Config;
pub use ct::{CtEntry, CtEntryWords, CtKey, CtKeyWords, ct_flags, ct_state};
pub use device::{Device, DeviceSwap, device_flags};
pub use drop_reason::{DropReason, RejectWith};
pub use event::{Event, EventKind};
pub use frontend::{Frontend, FrontendKey, FrontendKeyWords, FrontendKind, FrontendSwap};
pub use maps::{Capacity, MAPS, MapKind, MapSpec, SizedMap, VERSION, map_flags, map_name, map_spec};
pub use moves::{MOVE_MAP, Move, MoveItem, MovePhase, MoveRequest, OLD_SUFFIX, moving};
pub use networks::{SourceRange, cluster_flags};
pub use problem::ProblemRecord;
pub use programs::{
    MOVING_GLOBAL, NODE_NETNS_GLOBAL, NODE_ONLY_GLOBAL, SOCKETS_MASK_GLOBAL, SOCKETS_OLD_MASK_GLOBAL, program_name,
};
pub use record::SocketRecord;
pub use reference::{BackendRef, ServiceIndex};
pub use service::{Backend, BackendSlot, Name, Service, SetWord, backend_flags, service_flags, set_flags};
pub use set::Set;
pub use state::State;
pub use stats::ServiceStats;
pub use udp_dest::{DESTS_PER_SOCKET, UdpDest, UdpDests, bpf_spin_lock};

/// IANA numbers of the protocols that Services have, and of ICMP.
pub mod ip_protocol {
    use network_types::ip::IpProto;

    /// Internet Control Message Protocol.
    pub const ICMP: u8 = IpProto::Icmp as u8;
    /// Transmission Control Protocol.
    pub const TCP: u8 = IpProto::Tcp as u8;
    /// User Datagram Protocol.
    pub const UDP: u8 = IpProto::Udp as u8;
    /// Internet Control Message Protocol for IPv6.
    pub const ICMPV6: u8 = IpProto::Ipv6Icmp as u8;
    /// Stream Control Transmission Protocol.
    pub const SCTP: u8 = IpProto::Sctp as u8;
}
