//! Types, names and sizes of everything that crosses the kernel boundary.
//!
//! Integers are in the byte order of the machine, ports included; addresses are bytes in network order. IPv4 addresses
//! are stored v4-mapped (`::ffff:a.b.c.d`), so that one family of maps serves both. Every type is plain old data with
//! explicit padding that is always zero, and its size and offsets are asserted at compile time. The golden file
//! `lb-common/tests/layout.golden` has all of them. A field that takes the place of padding or of a `reserved` field is no
//! change; everything else needs a new [`VERSION`], and `from` with the former size in the map's row if a value grows.

mod addr;
mod affinity;
mod config;
mod ct;
mod device;
mod drop_reason;
pub(crate) mod enums;
mod event;
mod filter;
mod frontend;
pub mod layout;
mod layouts;
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

pub use addr::*;
pub use affinity::*;
pub use config::*;
pub use ct::*;
pub use device::*;
pub use drop_reason::*;
pub use event::*;
pub use filter::*;
pub use frontend::*;
pub use layouts::*;
pub use maps::*;
pub use moves::*;
pub use networks::*;
pub use problem::*;
pub use programs::*;
pub use record::*;
pub use reference::*;
pub use service::*;
pub use set::*;
pub use state::*;
pub use stats::*;
pub use udp_dest::*;

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
