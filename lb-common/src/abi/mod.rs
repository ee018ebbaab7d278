//! Types, names and sizes of everything that crosses the kernel boundary.
//!
//! Integers are in the byte order of the machine, ports included; addresses are bytes in network order. IPv4 addresses
//! are stored v4-mapped (`::ffff:a.b.c.d`), so that one family of maps serves both. Every type is plain old data with
//! explicit padding that is always zero, and has its size and offsets asserted at compile time. A change of any of
//! them needs a new [`VERSION`].

mod addr;
mod affinity;
mod conntrack;
mod drop_reason;
mod event;
mod flow;
mod frontend;
mod record;
mod service;
mod stats;

pub use addr::Addr;
pub use affinity::{Affinity, AffinityKey, client_kind};
pub use conntrack::{CtEntry, CtKey, Device, SourceRange, cluster_flags, ct_flags, ct_state, device_flags};
pub use drop_reason::DropReason;
pub use event::{Event, EventKind};
pub use flow::{FLOWS_PER_SOCKET, UdpFlow, UdpFlows, bpf_spin_lock};
pub use frontend::{Frontend, FrontendKey, FrontendKind, FrontendSwap};
pub use record::SocketRecord;
pub use service::{Backend, BackendSlot, Name, Service, SetWord, backend_flags, service_flags, set_flags};
pub use stats::{Config, Notice, ServiceStats, State};

/// Version of the layout of all maps together; part of the pin path.
pub const VERSION: u32 = 3;

/// Defines the maps' names once for both sides.
macro_rules! map_names {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        /// Names of the maps, as they are in the object, under the pin path and in `bpftool`.
        ///
        /// The kernel keeps 15 bytes of a name.
        pub mod map_name {
            $($(#[$doc])* pub const $name: &str = $text;)*
            /// All of them.
            pub const ALL: &[&str] = &[$($name),*];
            $(const _: () = assert!($name.len() <= 15);)*
        }
    };
}

map_names! {
    /// Hash: [`super::FrontendKey`] -> [`super::Frontend`].
    FRONTENDS = "FRONTENDS";
    /// Array, mmapped: service index -> [`super::Service`].
    SERVICES = "SERVICES";
    /// Array, mmapped: slot -> [`super::BackendSlot`].
    BACKEND_SLOTS = "BACKEND_SLOTS";
    /// Array, mmapped: backend id -> [`super::Backend`].
    BACKENDS = "BACKENDS";
    /// Hash: [`super::Addr`] -> u32: addresses of this node that serve node ports; the value is zero.
    NODE_ADDRS = "NODE_ADDRS";
    /// Array, mmapped: cookie & mask -> [`super::SocketRecord`].
    SOCKETS = "SOCKETS";
    /// Hash: socket cookie -> [`super::SocketRecord`], for those whose slot in SOCKETS is taken.
    SOCKETS_MORE = "SOCKETS_MORE";
    /// Hash: socket cookie -> [`super::UdpFlows`].
    UDP_FLOWS = "UDP_FLOWS";
    /// LRU hash: [`super::AffinityKey`] -> [`super::Affinity`].
    AFFINITY = "AFFINITY";
    /// Hash: service index -> [`super::Name`].
    NAMES = "NAMES";
    /// Per-CPU array: service index -> [`super::ServiceStats`].
    STATS = "STATS";
    /// Per-CPU array: [`super::DropReason`] -> count (u64).
    DROPS = "DROPS";
    /// Ring buffer of [`super::Event`].
    EVENTS = "EVENTS";
    /// Array of one [`super::Config`], mmapped: what the agent tells the programs.
    CONFIG = "CONFIG";
    /// Array of one [`super::State`], mmapped: what the agent tells the command line.
    STATE = "STATE";
    /// Hash: number -> [`super::Notice`]: what the agent could not use, for the command line.
    NOTICES = "NOTICES";
    /// Hash: [`super::CtKey`] -> [`super::CtEntry`]: flows of packets whose two ends know of each other.
    CT = "CT";
    /// LRU hash: [`super::CtKey`] -> [`super::CtEntry`]: flows of packets that are new.
    CT_NEW = "CT_NEW";
    /// Hash: interface index -> [`super::Device`].
    DEVICES = "DEVICES";
    /// LPM trie: [`super::SourceRange`] -> u32: whom load-balancer addresses serve; the value is zero.
    SOURCE_RANGES = "SOURCE_RANGES";
    /// LPM trie: [`super::Addr`] -> u32: which sources are inside the cluster; see [`super::cluster_flags`].
    CLUSTER_CIDRS = "CLUSTER_CIDRS";
}

/// Names of the programs, as they are in the object and under the pin path.
pub mod program_name {
    /// `cgroup/connect4`.
    pub const CONNECT4: &str = "lb_connect4";
    /// `cgroup/connect6`.
    pub const CONNECT6: &str = "lb_connect6";
    /// `cgroup/sendmsg4`.
    pub const SENDMSG4: &str = "lb_sendmsg4";
    /// `cgroup/sendmsg6`.
    pub const SENDMSG6: &str = "lb_sendmsg6";
    /// `cgroup/recvmsg4`.
    pub const RECVMSG4: &str = "lb_recvmsg4";
    /// `cgroup/recvmsg6`.
    pub const RECVMSG6: &str = "lb_recvmsg6";
    /// `cgroup/getpeername4`.
    pub const GETPEERNAME4: &str = "lb_getpeername4";
    /// `cgroup/getpeername6`.
    pub const GETPEERNAME6: &str = "lb_getpeername6";
    /// `cgroup/post_bind4`.
    pub const POST_BIND4: &str = "lb_post_bind4";
    /// `cgroup/post_bind6`.
    pub const POST_BIND6: &str = "lb_post_bind6";
    /// `cgroup/sock_release`.
    pub const SOCK_RELEASE: &str = "lb_sock_release";
    /// tc ingress.
    pub const INGRESS: &str = "lb_ingress";
    /// tc egress.
    pub const EGRESS: &str = "lb_egress";
    /// tc ingress of a device whose packets have no header of the link layer.
    pub const INGRESS_L3: &str = "lb_ingress_l3";
    /// tc egress of such a device.
    pub const EGRESS_L3: &str = "lb_egress_l3";
    /// XDP, never attached: run by the agent to store one word in place. See [`super::FrontendSwap`].
    pub const FRONTEND_SWAP: &str = "lb_frontend_swap";
    /// XDP, never attached: run by the agent to write a [`super::Event`] of its own.
    pub const EVENT: &str = "lb_event";
}

/// IANA numbers of the protocols that Services have.
pub mod ip_protocol {
    /// Internet Control Message Protocol.
    pub const ICMP: u8 = 1;
    /// Transmission Control Protocol.
    pub const TCP: u8 = 6;
    /// User Datagram Protocol.
    pub const UDP: u8 = 17;
    /// Internet Control Message Protocol for IPv6.
    pub const ICMPV6: u8 = 58;
    /// Stream Control Transmission Protocol.
    pub const SCTP: u8 = 132;
}

/// Name of the read-only global that holds the number of slots in SOCKETS, less one.
pub const SOCKETS_MASK_GLOBAL: &str = "SOCKETS_MASK";
/// Name of the read-only global that holds the `bpf_get_netns_cookie` of the node.
pub const NODE_NETNS_GLOBAL: &str = "NODE_NETNS";
/// Name of the read-only global that is not zero where only sockets of the node's namespace are served.
pub const NODE_ONLY_GLOBAL: &str = "NODE_ONLY";

/// Default number of entries of each map; all are flags of `lb-agent run`.
pub mod capacity {
    /// SERVICES, NAMES and STATS.
    pub const SERVICES: u32 = 4096;
    /// FRONTENDS.
    pub const FRONTENDS: u32 = 16384;
    /// BACKENDS.
    pub const BACKENDS: u32 = 32768;
    /// BACKEND_SLOTS.
    pub const BACKEND_SLOTS: u32 = 65536;
    /// SOCKETS; always a power of two.
    pub const SOCKETS: u32 = 16384;
    /// SOCKETS_MORE.
    pub const SOCKETS_MORE: u32 = 65536;
    /// NODE_ADDRS.
    pub const NODE_ADDRS: u32 = 1024;
    /// UDP_FLOWS.
    pub const UDP_FLOWS: u32 = 65536;
    /// AFFINITY.
    pub const AFFINITY: u32 = 16384;
    /// EVENTS, in bytes; a power of two and a multiple of the page size.
    pub const EVENTS_BYTES: u32 = 1 << 18;
    /// NOTICES.
    pub const NOTICES: u32 = 64;
    /// CT: two for each flow.
    pub const CT: u32 = 131_072;
    /// CT_NEW: two for each flow.
    pub const CT_NEW: u32 = 65_536;
    /// DEVICES.
    pub const DEVICES: u32 = 4096;
    /// SOURCE_RANGES.
    pub const SOURCE_RANGES: u32 = 16384;
    /// CLUSTER_CIDRS.
    pub const CLUSTER_CIDRS: u32 = 32768;
}
