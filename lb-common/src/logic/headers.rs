//! Lengths and offsets of packet headers, from the types of `network-types`, and the bits that it does not name.

use core::mem::offset_of;

use network_types::eth::{EthHdr, EtherType};
use network_types::tcp::TcpHdr;

/// Length of an Ethernet header.
pub const ETHERNET: usize = EthHdr::LEN;

/// EtherType of IPv4, host byte order. `network-types` has it in network byte order.
pub const ETHERTYPE_IPV4: u16 = (EtherType::Ipv4 as u16).to_be();
/// EtherType of IPv6, host byte order.
pub const ETHERTYPE_IPV6: u16 = (EtherType::Ipv6 as u16).to_be();

/// "More fragments" and the fragment offset, in [`network_types::ip::Ipv4Hdr::frags`] (RFC 791).
pub const FRAGMENT: u16 = 0x3fff;
/// "Don't fragment", in [`network_types::ip::Ipv4Hdr::frags`] (RFC 791).
pub const DONT_FRAGMENT: u16 = 0x4000;

/// Offset in a TCP header of the byte with the header length, in its upper four bits, in words of four bytes (RFC 9293).
pub const TCP_LENGTH: usize = offset_of!(TcpHdr, _bitfield_1);
/// Offset in a TCP header of the byte with the [`tcp_flags`].
pub const TCP_FLAGS: usize = TCP_LENGTH + 1;

/// Flags of TCP (RFC 9293).
pub mod tcp_flags {
    /// The sender has no more data.
    pub const FIN: u8 = 1;
    /// Starts a connection.
    pub const SYN: u8 = 2;
    /// Aborts a connection.
    pub const RST: u8 = 4;
    /// The acknowledgment number is valid.
    pub const ACK: u8 = 16;
}

const _: () = {
    assert!(ETHERTYPE_IPV4 == 0x0800 && ETHERTYPE_IPV6 == 0x86dd);
    assert!(TCP_FLAGS == 13 && TcpHdr::LEN == 20);
};
