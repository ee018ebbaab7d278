//! What a packet is, as far as Services go.

use super::ip128::Ip128;
use crate::abi::{DropReason, ip_protocol};

/// Length of an Ethernet header.
pub const ETHERNET: usize = 14;
/// Length of an IPv4 header without options.
pub const IPV4: usize = 20;
/// Length of an IPv6 header.
pub const IPV6: usize = 40;
/// Length of a TCP header without options.
pub const TCP: usize = 20;

const ETHERTYPE_IPV4: u16 = 0x0800;
const ETHERTYPE_IPV6: u16 = 0x86dd;

/// "More fragments" and the offset, in the word of an IPv4 header that has them.
const FRAGMENT: u16 = 0x3fff;

/// Flags of TCP, in the 14th byte of its header.
pub mod tcp_flags {
    /// No more data comes.
    pub const FIN: u8 = 1;
    /// Begins a connection.
    pub const SYN: u8 = 2;
    /// Ends it at once.
    pub const RST: u8 = 4;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 16;
}

/// A packet's bytes, from the header of the link layer on (or from that of IP, where there is none).
pub trait Bytes {
    /// One byte; `None` beyond the end.
    fn byte(&self, at: usize) -> Option<u8>;
    /// Two bytes, in network order.
    fn half(&self, at: usize) -> Option<u16>;
    /// Four bytes, as they are in memory.
    fn word(&self, at: usize) -> Option<u32>;
    /// How many there are, also of those that cannot be read here.
    fn size(&self) -> usize;
    /// Whether it is several segments in one: lengths in its headers then mean little.
    fn is_merged(&self) -> bool;
}

/// A TCP segment or UDP datagram whose headers make sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    /// Source address; v4-mapped where the packet is IPv4.
    pub src: Ip128,
    /// Destination address.
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
    /// Length of the header of the transport protocol.
    pub transport: u8,
}

impl Packet {
    /// Whether it is IPv4.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.src.is_v4()
    }

    /// Length of its IP header.
    #[inline(always)]
    #[must_use]
    pub const fn ip_len(&self) -> usize {
        if self.is_v4() { IPV4 } else { IPV6 }
    }

    /// Whether it begins a TCP connection.
    #[inline(always)]
    #[must_use]
    pub const fn begins(&self) -> bool {
        self.flags & (tcp_flags::SYN | tcp_flags::ACK | tcp_flags::RST | tcp_flags::FIN) == tcp_flags::SYN
    }

    /// Whether it is TCP.
    #[inline(always)]
    #[must_use]
    pub const fn is_tcp(&self) -> bool {
        self.proto == ip_protocol::TCP
    }
}

/// Why a packet is none of lb's: something else than TCP and UDP over IP, or, with a reason to be counted, what lb passes
/// on untouched although it may be meant for a Service.
pub type Foreign = Option<DropReason>;

/// Reads the headers. `link` is the length of the header of the link layer: [`ETHERNET`] or zero.
///
/// # Errors
/// See [`Foreign`].
#[inline(always)]
pub fn parse(bytes: &impl Bytes, link: usize) -> Result<Packet, Foreign> {
    let version = if link == 0 {
        match bytes.half(0).ok_or(None)? >> 12 {
            4 => ETHERTYPE_IPV4,
            6 => ETHERTYPE_IPV6,
            _ => return Err(None),
        }
    } else {
        bytes.half(link - 2).ok_or(None)?
    };
    match version {
        ETHERTYPE_IPV4 => parse_v4(bytes, link),
        ETHERTYPE_IPV6 => parse_v6(bytes, link),
        _ => Err(None),
    }
}

const CUT: Foreign = Some(DropReason::Malformed);

#[inline(always)]
fn parse_v4(bytes: &impl Bytes, link: usize) -> Result<Packet, Foreign> {
    // By two: the verifier does not follow a look at the very first byte alone.
    let [first, tos] = bytes.half(link).ok_or(CUT)?.to_be_bytes();
    let proto = bytes.byte(link + 9).ok_or(CUT)?;
    match proto {
        ip_protocol::TCP | ip_protocol::UDP => {}
        proto => return Err(other(proto, || bytes.half(link + (first & 15) as usize * 4))),
    }
    if first != 0x45 {
        // Version 4 and five words, or there are options. Fewer are nonsense.
        return Err(Some(if first > 0x45 && first < 0x50 {
            DropReason::HeaderOptions
        } else {
            DropReason::Malformed
        }));
    }
    if bytes.half(link + 6).ok_or(CUT)? & FRAGMENT != 0 {
        return Err(Some(DropReason::Fragment));
    }
    let packet = Packet {
        src: Ip128::from_v4(bytes.word(link + 12).ok_or(CUT)?),
        dst: Ip128::from_v4(bytes.word(link + 16).ok_or(CUT)?),
        src_port: 0,
        dst_port: 0,
        proto,
        flags: 0,
        ttl: bytes.byte(link + 8).ok_or(CUT)?,
        tos,
        transport: 0,
    };
    let len = bytes.half(link + 2).ok_or(CUT)?;
    parse_transport::<IPV4>(bytes, link, packet, len)
}

#[inline(always)]
fn parse_v6(bytes: &impl Bytes, link: usize) -> Result<Packet, Foreign> {
    let first = bytes.half(link).ok_or(CUT)?;
    let proto = bytes.byte(link + 6).ok_or(CUT)?;
    match proto {
        ip_protocol::TCP | ip_protocol::UDP => {}
        // Hop-by-hop, routing, authentication, destination options, mobility (RFC 8200, RFC 4302, RFC 6275).
        0 | 43 | 51 | 60 | 135 => return Err(Some(DropReason::HeaderOptions)),
        44 => return Err(Some(DropReason::Fragment)),
        proto => return Err(other(proto, || bytes.half(link + IPV6))),
    }
    if first >> 12 != 6 {
        return Err(CUT);
    }
    let addr = |at: usize| {
        Some(Ip128::from_quarters([
            bytes.word(at)?,
            bytes.word(at + 4)?,
            bytes.word(at + 8)?,
            bytes.word(at + 12)?,
        ]))
    };
    let (src, dst) = (addr(link + 8).ok_or(CUT)?, addr(link + 24).ok_or(CUT)?);
    if src.is_v4() || dst.is_v4() {
        // No such address is on the wire (RFC 4291, 2.5.5.2), and in the maps it would be another.
        return Err(CUT);
    }
    let payload = bytes.half(link + 4).ok_or(CUT)?;
    let packet = Packet {
        src,
        dst,
        src_port: 0,
        dst_port: 0,
        proto,
        flags: 0,
        ttl: bytes.byte(link + 7).ok_or(CUT)?,
        tos: (first >> 4) as u8,
        transport: 0,
    };
    if payload == 0 && !bytes.is_merged() {
        return Err(CUT);
    }
    parse_transport::<IPV6>(bytes, link, packet, payload.checked_add(IPV6 as u16).unwrap_or(0))
}

/// `first`: the first two bytes after the IP header, type and code of ICMP.
#[inline(always)]
fn other(proto: u8, first: impl FnOnce() -> Option<u16>) -> Foreign {
    let is_error = match proto {
        ip_protocol::SCTP => return Some(DropReason::OtherProtocol),
        // Destination unreachable, time exceeded, parameter problem (RFC 792).
        ip_protocol::ICMP => matches!(first()? >> 8, 3 | 11 | 12),
        // The same and packet too big (RFC 4443).
        ip_protocol::ICMPV6 => matches!(first()? >> 8, 1..=4),
        _ => false,
    };
    is_error.then_some(DropReason::IcmpError)
}

/// `len`: of the whole packet from its IP header on, as that says.
#[inline(always)]
fn parse_transport<const IP: usize>(
    bytes: &impl Bytes,
    link: usize,
    mut packet: Packet,
    len: u16,
) -> Result<Packet, Foreign> {
    let at = link + IP;
    let there = bytes.size().saturating_sub(at);
    packet.src_port = bytes.half(at).ok_or(CUT)?;
    packet.dst_port = bytes.half(at + 2).ok_or(CUT)?;
    if packet.is_tcp() {
        // In words of four bytes.
        packet.transport = (bytes.byte(at + 12).ok_or(CUT)? >> 4) * 4;
        packet.flags = bytes.byte(at + 13).ok_or(CUT)?;
        if (packet.transport as usize) < TCP {
            return Err(CUT);
        }
    } else {
        packet.transport = 8;
        let datagram = bytes.half(at + 4).ok_or(CUT)?;
        let fits = datagram >= 8 && datagram as usize <= there;
        if !fits && !bytes.is_merged() {
            return Err(CUT);
        }
    }
    let says = (len as usize).saturating_sub(IP);
    let fits = says >= packet.transport as usize && says <= there;
    if !fits && !bytes.is_merged() || there < packet.transport as usize {
        return Err(CUT);
    }
    Ok(packet)
}
