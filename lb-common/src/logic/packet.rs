//! Parsing of packets: TCP segments and UDP datagrams over IP, as far as the packet path needs their headers.

use core::mem::offset_of;

use network_types::icmp::{Icmpv4Type, Icmpv6Type};
use network_types::ip::{IpProto, Ipv4Hdr, Ipv6Hdr};
use network_types::tcp::TcpHdr;
use network_types::udp::UdpHdr;

use super::headers::{ETHERTYPE_IPV4, ETHERTYPE_IPV6, FRAGMENT, TCP_FLAGS, TCP_LENGTH};
use super::ip128::Ip128;
use crate::abi::{DropReason, ip_protocol};

pub use super::headers::{ETHERNET, tcp_flags};

/// The bytes of a packet, from its link-layer header on, or from its IP header if it has no link-layer header.
pub trait Bytes {
    /// Returns one byte, or `None` beyond the end.
    fn byte(&self, at: usize) -> Option<u8>;
    /// Returns two bytes as a number in network byte order.
    fn half(&self, at: usize) -> Option<u16>;
    /// Returns four bytes in the byte order of memory.
    fn word(&self, at: usize) -> Option<u32>;
    /// Returns the length of the packet, including bytes that the other methods cannot read.
    fn size(&self) -> usize;
    /// Returns whether the packet consists of several segments (GSO). The lengths in its headers are then not those of the
    /// packet.
    fn is_gso(&self) -> bool;
}

/// A TCP segment or UDP datagram with valid headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Source address; v4-mapped for IPv4.
    pub src: Ip128,
    /// Destination address; v4-mapped for IPv4.
    pub dst: Ip128,
    /// Source port, host byte order.
    pub src_port: u16,
    /// Destination port, host byte order.
    pub dst_port: u16,
    /// IANA protocol number: TCP or UDP.
    pub proto: u8,
    /// [`tcp_flags`]; zero for UDP.
    pub flags: u8,
    /// Time to live, or hop limit.
    pub ttl: u8,
    /// Type of service, or traffic class.
    pub tos: u8,
    /// Length of the transport header.
    pub transport_len: u8,
}

impl Packet {
    /// Returns whether the packet is IPv4.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.src.is_v4()
    }

    /// Returns the length of the IP header.
    #[inline(always)]
    #[must_use]
    pub const fn ip_len(&self) -> usize {
        if self.is_v4() { Ipv4Hdr::LEN } else { Ipv6Hdr::LEN }
    }

    /// Returns whether the packet starts a TCP connection: a SYN without ACK, RST or FIN.
    #[inline(always)]
    #[must_use]
    pub const fn is_initial_syn(&self) -> bool {
        self.flags & (tcp_flags::SYN | tcp_flags::ACK | tcp_flags::RST | tcp_flags::FIN) == tcp_flags::SYN
    }

    /// Returns whether the packet is TCP.
    #[inline(always)]
    #[must_use]
    pub const fn is_tcp(&self) -> bool {
        self.proto == ip_protocol::TCP
    }
}

/// A packet that is passed on without translation. `None`: the packet cannot be for a Service, since it is neither TCP nor
/// UDP over IP. `Some`: the packet could be for a Service, but lb does not translate such packets; the caller counts the
/// reason.
pub type Foreign = Option<DropReason>;

/// Parses the headers of a packet. `link_len`: length of the link-layer header, [`ETHERNET`] or zero.
///
/// # Errors
/// Returns [`Foreign`] if the packet is passed on without translation.
#[inline(always)]
pub fn parse(bytes: &impl Bytes, link_len: usize) -> Result<Packet, Foreign> {
    let version = if link_len == 0 {
        match bytes.half(0).ok_or(None)? >> 12 {
            4 => ETHERTYPE_IPV4,
            6 => ETHERTYPE_IPV6,
            _ => return Err(None),
        }
    } else {
        bytes.half(link_len - size_of::<u16>()).ok_or(None)?
    };
    match version {
        ETHERTYPE_IPV4 => parse_v4(bytes, link_len),
        ETHERTYPE_IPV6 => parse_v6(bytes, link_len),
        _ => Err(None),
    }
}

const TRUNCATED: Foreign = Some(DropReason::Malformed);

/// Version 4 and a header length of five words, in [`Ipv4Hdr::vihl`].
const V4_WITHOUT_OPTIONS: u8 = 0x45;

#[inline(always)]
fn parse_v4(bytes: &impl Bytes, link_len: usize) -> Result<Packet, Foreign> {
    // Two bytes at once: the verifier loses track of a load of the very first byte alone.
    let [first, tos] = bytes.half(link_len).ok_or(TRUNCATED)?.to_be_bytes();
    let proto = bytes.byte(link_len + offset_of!(Ipv4Hdr, proto)).ok_or(TRUNCATED)?;
    match proto {
        ip_protocol::TCP | ip_protocol::UDP => {}
        proto => return Err(other(proto, || bytes.half(link_len + (first & 15) as usize * 4))),
    }
    if first != V4_WITHOUT_OPTIONS {
        // A longer header has options. A shorter one, or another version, is invalid.
        return Err(Some(if first > V4_WITHOUT_OPTIONS && first < 0x50 {
            DropReason::HeaderOptions
        } else {
            DropReason::Malformed
        }));
    }
    if bytes.half(link_len + offset_of!(Ipv4Hdr, frags)).ok_or(TRUNCATED)? & FRAGMENT != 0 {
        return Err(Some(DropReason::Fragment));
    }
    let packet = Packet {
        src: Ip128::from_v4(bytes.word(link_len + offset_of!(Ipv4Hdr, src_addr)).ok_or(TRUNCATED)?),
        dst: Ip128::from_v4(bytes.word(link_len + offset_of!(Ipv4Hdr, dst_addr)).ok_or(TRUNCATED)?),
        src_port: 0,
        dst_port: 0,
        proto,
        flags: 0,
        ttl: bytes.byte(link_len + offset_of!(Ipv4Hdr, ttl)).ok_or(TRUNCATED)?,
        tos,
        transport_len: 0,
    };
    let len = bytes.half(link_len + offset_of!(Ipv4Hdr, tot_len)).ok_or(TRUNCATED)?;
    parse_transport::<{ Ipv4Hdr::LEN }>(bytes, link_len, packet, len)
}

const HOP_BY_HOP: u8 = IpProto::HopOpt as u8;
const ROUTING: u8 = IpProto::Ipv6Route as u8;
const FRAGMENT_HEADER: u8 = IpProto::Ipv6Frag as u8;
const AUTHENTICATION: u8 = IpProto::Ah as u8;
const DESTINATION_OPTIONS: u8 = IpProto::Ipv6Opts as u8;
const MOBILITY: u8 = IpProto::MobilityHeader as u8;

#[inline(always)]
fn parse_v6(bytes: &impl Bytes, link_len: usize) -> Result<Packet, Foreign> {
    let first = bytes.half(link_len).ok_or(TRUNCATED)?;
    let proto = bytes.byte(link_len + offset_of!(Ipv6Hdr, next_hdr)).ok_or(TRUNCATED)?;
    match proto {
        ip_protocol::TCP | ip_protocol::UDP => {}
        // Extension headers (RFC 8200, RFC 4302, RFC 6275).
        HOP_BY_HOP | ROUTING | AUTHENTICATION | DESTINATION_OPTIONS | MOBILITY => {
            return Err(Some(DropReason::HeaderOptions));
        }
        FRAGMENT_HEADER => return Err(Some(DropReason::Fragment)),
        proto => return Err(other(proto, || bytes.half(link_len + Ipv6Hdr::LEN))),
    }
    if first >> 12 != 6 {
        return Err(TRUNCATED);
    }
    let addr = |at: usize| {
        Some(Ip128::from_quarters([
            bytes.word(at)?,
            bytes.word(at + 4)?,
            bytes.word(at + 8)?,
            bytes.word(at + 12)?,
        ]))
    };
    let src = addr(link_len + offset_of!(Ipv6Hdr, src_addr)).ok_or(TRUNCATED)?;
    let dst = addr(link_len + offset_of!(Ipv6Hdr, dst_addr)).ok_or(TRUNCATED)?;
    if src.is_v4() || dst.is_v4() {
        // No packet may have a v4-mapped address (RFC 4291, 2.5.5.2). In the maps it would be that of an IPv4 packet.
        return Err(TRUNCATED);
    }
    let payload = bytes
        .half(link_len + offset_of!(Ipv6Hdr, payload_len))
        .ok_or(TRUNCATED)?;
    let packet = Packet {
        src,
        dst,
        src_port: 0,
        dst_port: 0,
        proto,
        flags: 0,
        ttl: bytes.byte(link_len + offset_of!(Ipv6Hdr, hop_limit)).ok_or(TRUNCATED)?,
        tos: (first >> 4) as u8,
        transport_len: 0,
    };
    if payload == 0 && !bytes.is_gso() {
        return Err(TRUNCATED);
    }
    parse_transport::<{ Ipv6Hdr::LEN }>(
        bytes,
        link_len,
        packet,
        payload.checked_add(Ipv6Hdr::LEN as u16).unwrap_or(0),
    )
}

/// Type "time exceeded" of ICMP (RFC 792).
const TIME_EXCEEDED: u8 = 11;
/// Types "destination unreachable" to "parameter problem" of ICMPv6 (RFC 4443), which are all of its errors.
const ICMPV6_ERRORS: core::ops::RangeInclusive<u8> = 1..=Icmpv6Type::ParameterProblem as u8;

/// Classifies a packet of another protocol. `first`: the first two bytes after the IP header, type and code of ICMP.
#[inline(always)]
fn other(proto: u8, first: impl FnOnce() -> Option<u16>) -> Foreign {
    const UNREACHABLE: u8 = Icmpv4Type::DestinationUnreachable as u8;
    const PARAMETER_PROBLEM: u8 = Icmpv4Type::ParameterProblem as u8;
    let is_error = match proto {
        ip_protocol::SCTP => return Some(DropReason::OtherProtocol),
        ip_protocol::ICMP => matches!((first()? >> 8) as u8, UNREACHABLE | TIME_EXCEEDED | PARAMETER_PROBLEM),
        ip_protocol::ICMPV6 => ICMPV6_ERRORS.contains(&((first()? >> 8) as u8)),
        _ => false,
    };
    is_error.then_some(DropReason::IcmpError)
}

/// Parses the transport header after an IP header of length `IP`. `len`: length of the packet in the IP header, including
/// that header.
#[inline(always)]
fn parse_transport<const IP: usize>(
    bytes: &impl Bytes,
    link_len: usize,
    mut packet: Packet,
    len: u16,
) -> Result<Packet, Foreign> {
    let at = link_len + IP;
    let available = bytes.size().saturating_sub(at);
    // Both protocols begin with the two ports.
    packet.src_port = bytes.half(at + offset_of!(TcpHdr, source)).ok_or(TRUNCATED)?;
    packet.dst_port = bytes.half(at + offset_of!(TcpHdr, dest)).ok_or(TRUNCATED)?;
    if packet.is_tcp() {
        packet.transport_len = (bytes.byte(at + TCP_LENGTH).ok_or(TRUNCATED)? >> 4) * 4;
        packet.flags = bytes.byte(at + TCP_FLAGS).ok_or(TRUNCATED)?;
        if (packet.transport_len as usize) < TcpHdr::LEN {
            return Err(TRUNCATED);
        }
    } else {
        packet.transport_len = UdpHdr::LEN as u8;
        let datagram = bytes.half(at + offset_of!(UdpHdr, len)).ok_or(TRUNCATED)? as usize;
        let fits = datagram >= UdpHdr::LEN && datagram <= available;
        if !fits && !bytes.is_gso() {
            return Err(TRUNCATED);
        }
    }
    let payload = (len as usize).saturating_sub(IP);
    let fits = payload >= packet.transport_len as usize && payload <= available;
    if !fits && !bytes.is_gso() || available < packet.transport_len as usize {
        return Err(TRUNCATED);
    }
    Ok(packet)
}

const _: () = {
    assert!(offset_of!(TcpHdr, source) == offset_of!(UdpHdr, src));
    assert!(offset_of!(TcpHdr, dest) == offset_of!(UdpHdr, dst));
};
