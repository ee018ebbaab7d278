//! Properties that hold for the bytes of any packet. The targets of cargo-fuzz call them with generated inputs, and the
//! test `fuzz_corpus` with the corpus and the regressions.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use etherparse::{
    Ipv4HeaderSlice, Ipv6HeaderSlice, NetHeaders, PacketBuilder, PacketBuilderStep, PacketHeaders, TcpHeaderSlice,
    TransportHeader, UdpHeaderSlice,
};
use lb_common::abi::{Addr, ip_protocol};
use lb_common::logic::checksum::Sum;
use lb_common::logic::ip128::Ip128;
use lb_common::logic::packet::{self, Bytes, ETHERNET, Packet, tcp_flags};
use lb_common::logic::translation::Tuple;

/// Maximum number of bytes of a packet that the programs read.
const HEADERS: usize = ETHERNET + 40 + 20;
/// The longest payload that fits the 16-bit length of an IPv6 packet.
const LONGEST: u16 = u16::MAX - 40;

/// A packet of which only the first bytes can be read directly, as in the kernel.
struct Memory<'a> {
    bytes: &'a [u8],
    readable: usize,
    merged: bool,
}

impl<'a> Memory<'a> {
    fn whole(bytes: &'a [u8]) -> Self {
        Self {
            bytes,
            readable: bytes.len(),
            merged: false,
        }
    }

    fn read<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        let end = at.checked_add(N)?;
        self.bytes[..self.readable].get(at..end)?.try_into().ok()
    }
}

impl Bytes for Memory<'_> {
    fn byte(&self, at: usize) -> Option<u8> {
        self.read(at).map(u8::from_ne_bytes)
    }

    fn half(&self, at: usize) -> Option<u16> {
        self.read(at).map(u16::from_be_bytes)
    }

    fn word(&self, at: usize) -> Option<u32> {
        self.read(at).map(u32::from_ne_bytes)
    }

    fn size(&self) -> usize {
        self.bytes.len()
    }

    fn is_gso(&self) -> bool {
        self.merged
    }
}

fn ip(words: Ip128) -> IpAddr {
    IpAddr::from(Addr::from(words)).to_canonical()
}

/// Parses a packet. The first byte of the input selects how much of the packet can be read and whether it is several
/// merged segments; the other bytes are the packet, tried with and without a link-layer header. A parsed packet must
/// agree with etherparse, and a plain packet must be parsed.
///
/// # Panics
/// If a property does not hold.
pub fn parse(input: &[u8]) {
    let Some((&control, bytes)) = input.split_first() else {
        return;
    };
    let memory = Memory {
        readable: if control & 1 == 0 {
            bytes.len()
        } else {
            bytes.len().min(HEADERS)
        },
        merged: control & 2 != 0,
        ..Memory::whole(bytes)
    };
    for link in [0, ETHERNET] {
        match packet::parse(&memory, link) {
            Ok(packet) => expect_same_fields(&packet, &memory, link),
            Err(why) => assert!(!is_plain(bytes, link), "{why:?} in {bytes:?}, link {link}"),
        }
    }
}

/// Fails unless etherparse reads the same fields from the bytes.
fn expect_same_fields(packet: &Packet, memory: &Memory<'_>, link: usize) {
    let bytes = &memory.bytes[link..];
    let Packet { ttl, tos, .. } = *packet;
    let addresses = (ip(packet.src), ip(packet.dst));
    let (header, next, len) = if packet.is_v4() {
        let header = Ipv4HeaderSlice::from_slice(bytes).expect("an IPv4 header");
        let right = (
            IpAddr::from(header.source_addr()),
            IpAddr::from(header.destination_addr()),
        );
        assert_eq!(addresses, right);
        assert_eq!(ttl, header.ttl());
        assert_eq!(tos, bytes[1]);
        assert!(!header.is_fragmenting_payload());
        (
            header.slice().len(),
            header.protocol().0,
            usize::from(header.total_len()),
        )
    } else {
        let header = Ipv6HeaderSlice::from_slice(bytes).expect("an IPv6 header");
        let right = (
            IpAddr::from(header.source_addr()),
            IpAddr::from(header.destination_addr()),
        );
        assert_eq!(addresses, right);
        assert_eq!((ttl, tos), (header.hop_limit(), header.traffic_class()));
        (
            header.slice().len(),
            header.next_header().0,
            40 + usize::from(header.payload_length()),
        )
    };
    assert_eq!(next, packet.proto);
    let rest = &bytes[header..];
    let ports = (packet.src_port, packet.dst_port);
    let (right, transport) = if packet.is_tcp() {
        let tcp = TcpHeaderSlice::from_slice(rest).expect("a TCP header");
        let flags = [
            (tcp.fin(), tcp_flags::FIN),
            (tcp.syn(), tcp_flags::SYN),
            (tcp.rst(), tcp_flags::RST),
            (tcp.ack(), tcp_flags::ACK),
        ];
        for (is_set, flag) in flags {
            assert_eq!(packet.flags & flag != 0, is_set);
        }
        assert_eq!(
            packet.is_initial_syn(),
            tcp.syn() && !tcp.ack() && !tcp.rst() && !tcp.fin()
        );
        ((tcp.source_port(), tcp.destination_port()), tcp.slice().len())
    } else {
        let udp = UdpHeaderSlice::from_slice(rest).expect("a UDP header");
        ((udp.source_port(), udp.destination_port()), 8)
    };
    assert_eq!(ports, right);
    assert_eq!(usize::from(packet.transport_len), transport);
    if !memory.merged {
        assert!(
            len >= header + transport && len <= bytes.len(),
            "{len} of {}",
            bytes.len()
        );
    }
}

/// Returns whether the bytes are valid TCP or UDP directly over IP.
fn is_plain(bytes: &[u8], link: usize) -> bool {
    let headers = if link == 0 {
        PacketHeaders::from_ip_slice(bytes).ok()
    } else {
        PacketHeaders::from_ethernet_slice(bytes).ok()
    };
    let Some(headers) = headers.filter(|headers| headers.link_exts.is_empty()) else {
        return false;
    };
    let is_mapped = |octets: [u8; 16]| Ipv6Addr::from(octets).to_ipv4_mapped().is_some();
    let net = match &headers.net {
        Some(NetHeaders::Ipv4(ip, more)) => {
            ip.options.is_empty() && !ip.is_fragmenting_payload() && more.auth.is_none()
        }
        Some(NetHeaders::Ipv6(ip, more)) => {
            more.is_empty()
                && (1..=LONGEST).contains(&ip.payload_length)
                && !is_mapped(ip.source)
                && !is_mapped(ip.destination)
        }
        _ => false,
    };
    net && match headers.transport {
        Some(TransportHeader::Tcp(_)) => true,
        Some(TransportHeader::Udp(udp)) => (8..=8 + headers.payload.slice().len()).contains(&udp.length.into()),
        _ => false,
    }
}

/// Rewrites a packet. The input selects a valid packet, with a correct or a wrong checksum, and its new addresses and
/// ports. Afterwards its checksums must be those of a packet built that way; a wrong checksum stays wrong, and an
/// absent one stays absent. The reverse translation must restore the packet.
///
/// # Panics
/// If a property does not hold.
pub fn rewrite(input: &[u8]) {
    let Some(case) = Case::read(input) else { return };
    let link = if case.ethernet { ETHERNET } else { 0 };
    let mut bytes = case.bytes();
    let Ok(before) = packet::parse(&Memory::whole(&bytes), link) else {
        panic!("{bytes:?} is not parsed");
    };
    let checksum = link + before.ip_len() + if case.udp { 6 } else { 16 };
    if case.none() {
        bytes[checksum..][..2].fill(0);
    }
    if case.wrong {
        bytes[checksum] ^= 1;
        if case.udp && bytes[checksum..][..2] == [0, 0] {
            return;
        }
    }
    let original = bytes.clone();
    let old = Tuple::of(&before);
    let new = Tuple {
        src: words(case.new[0].ip()),
        dst: words(case.new[1].ip()),
        src_port: case.new[0].port(),
        dst_port: case.new[1].port(),
    };
    change(&mut bytes, link, &before, &new, case.hop);

    let Ok(after) = packet::parse(&Memory::whole(&bytes), link) else {
        panic!("{original:?} was rewritten to {bytes:?}");
    };
    let ttl = before.ttl - u8::from(case.hop);
    let expected = Packet {
        src: new.src,
        dst: new.dst,
        src_port: new.src_port,
        dst_port: new.dst_port,
        ttl,
        ..before
    };
    assert_eq!(after, expected);
    let right = right_checksum(&bytes, link);
    let is = [bytes[checksum], bytes[checksum + 1]];
    if case.wrong {
        // 0 and 0xffff are equal in ones' complement.
        assert_ne!(
            u16::from_be_bytes(is) % 0xffff,
            right % 0xffff,
            "the checksum of {original:?} became correct"
        );
    } else if case.none() {
        assert_eq!(is, [0, 0]);
    } else {
        assert_eq!(u16::from_be_bytes(is), right, "{original:?} was rewritten to {bytes:?}");
    }
    assert_eq!(tail(&bytes, checksum), tail(&original, checksum), "what follows");
    if !case.wrong && !case.hop {
        change(&mut bytes, link, &after, &old, false);
        assert_eq!(bytes, original);
    }
}

fn tail(bytes: &[u8], checksum: usize) -> &[u8] {
    &bytes[checksum + 2..]
}

fn words(ip: IpAddr) -> Ip128 {
    Ip128::from(Addr::from(ip))
}

/// A packet and its new addresses and ports.
struct Case<'a> {
    udp: bool,
    ethernet: bool,
    hop: bool,
    wrong: bool,
    without: bool,
    flags: u8,
    ttl: u8,
    old: [SocketAddr; 2],
    new: [SocketAddr; 2],
    payload: &'a [u8],
}

impl<'a> Case<'a> {
    fn read(input: &'a [u8]) -> Option<Self> {
        let (&[control, flags, ttl], rest) = input.split_first_chunk()?;
        let (addresses, rest) = rest.split_first_chunk::<64>()?;
        let (ports, payload) = rest.split_first_chunk::<8>()?;
        let is = |bit: u8| control & bit != 0;
        let address = |n: usize| -> Option<SocketAddr> {
            let (octets, _) = addresses[n * 16..].split_first_chunk::<16>()?;
            let ip = if is(1) {
                let ip = Ipv6Addr::from(*octets);
                // A v4-mapped address is never on the wire.
                if ip.to_ipv4_mapped().is_some() {
                    return None;
                }
                ip.into()
            } else {
                let (octets, _) = octets.split_first_chunk::<4>()?;
                Ipv4Addr::from(*octets).into()
            };
            Some(SocketAddr::new(
                ip,
                u16::from_be_bytes([ports[n * 2], ports[n * 2 + 1]]),
            ))
        };
        Some(Self {
            udp: is(2),
            ethernet: is(4),
            hop: is(8),
            wrong: is(16),
            without: is(32),
            flags,
            ttl: ttl.max(2),
            old: [address(0)?, address(1)?],
            new: [address(2)?, address(3)?],
            payload: &payload[..payload.len().min(1400)],
        })
    }

    /// Returns whether the case is a datagram without a checksum (RFC 768).
    fn none(&self) -> bool {
        self.without && !self.wrong && self.udp && self.old[0].is_ipv4()
    }

    fn bytes(&self) -> Vec<u8> {
        let [from, to] = self.old;
        let ip = match (from.ip(), to.ip(), self.ethernet) {
            (IpAddr::V4(from), IpAddr::V4(to), false) => PacketBuilder::ipv4(from.octets(), to.octets(), self.ttl),
            (IpAddr::V6(from), IpAddr::V6(to), false) => PacketBuilder::ipv6(from.octets(), to.octets(), self.ttl),
            (IpAddr::V4(from), IpAddr::V4(to), true) => {
                PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4(from.octets(), to.octets(), self.ttl)
            }
            (IpAddr::V6(from), IpAddr::V6(to), true) => {
                PacketBuilder::ethernet2([2; 6], [4; 6]).ipv6(from.octets(), to.octets(), self.ttl)
            }
            _ => panic!("one family"),
        };
        self.transport(ip, from.port(), to.port())
    }

    fn transport(&self, ip: PacketBuilderStep<etherparse::IpHeaders>, from: u16, to: u16) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.udp {
            ip.udp(from, to).write(&mut bytes, self.payload)
        } else {
            let mut tcp = ip.tcp(from, to, u32::from(self.flags) << 24, 512);
            if self.flags & tcp_flags::SYN != 0 {
                tcp = tcp.syn();
            }
            if self.flags & tcp_flags::ACK != 0 {
                tcp = tcp.ack(77);
            }
            if self.flags & tcp_flags::RST != 0 {
                tcp = tcp.rst();
            }
            if self.flags & tcp_flags::FIN != 0 {
                tcp = tcp.fin();
            }
            tcp.write(&mut bytes, self.payload)
        }
        .expect("a packet");
        bytes
    }
}

/// Rewrites a packet as `rewrite` of `lb-ebpf/src/send.rs` does, with the kernel's helpers as they are defined.
fn change(bytes: &mut [u8], link: usize, packet: &Packet, new: &Tuple, hop: bool) {
    let old = Tuple::of(packet);
    let (addresses, ports) = (old.addresses_to(new), old.ports_to(new));
    let transport = link + packet.ip_len();
    let may_be_zero = packet.proto == ip_protocol::UDP;
    let checksum = transport + if may_be_zero { 6 } else { 16 };
    let ttl = packet.ttl.wrapping_sub(1);
    if let (Some(src), Some(dst)) = (new.src.to_v4(), new.dst.to_v4()) {
        store(bytes, link + 12, &[src.to_ne_bytes(), dst.to_ne_bytes()].concat());
        let mut header = addresses;
        if hop {
            store(bytes, link + 8, &[ttl]);
            let word = |ttl: u8| u32::from(u16::from_ne_bytes([ttl, packet.proto]));
            header = header.sub(word(packet.ttl)).add(word(ttl));
        }
        replace(bytes, link + 10, header, false);
    } else {
        let quarters = [new.src, new.dst].map(Ip128::to_quarters).concat();
        let octets: Vec<u8> = quarters.into_iter().flat_map(u32::to_ne_bytes).collect();
        store(bytes, link + 8, &octets);
        if hop {
            store(bytes, link + 7, &[ttl]);
        }
    }
    replace(bytes, checksum, addresses, may_be_zero);
    replace(bytes, checksum, ports, may_be_zero);
    store(bytes, transport, &new.ports().to_ne_bytes());
}

fn store(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// Does what `csum_replace_by_diff` of the kernel does; `may_be_zero` is `BPF_F_MARK_MANGLED_0`.
fn replace(bytes: &mut [u8], at: usize, change: Sum, may_be_zero: bool) {
    let old = u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
    if may_be_zero && old == 0 {
        return;
    }
    let (sum, carry) = change.to_u32().overflowing_add((!old).into());
    let sum = sum + u32::from(carry);
    let half = (sum & 0xffff) + (sum >> 16);
    let new = !((half & 0xffff) + (half >> 16)) as u16;
    let new = if may_be_zero && new == 0 { 0xffff } else { new };
    store(bytes, at, &new.to_ne_bytes());
}

/// Returns the correct transport checksum, after a check of the IP header's checksum.
fn right_checksum(bytes: &[u8], link: usize) -> u16 {
    let headers = if link == 0 {
        PacketHeaders::from_ip_slice(bytes)
    } else {
        PacketHeaders::from_ethernet_slice(bytes)
    };
    let headers = headers.expect("a packet");
    let payload = headers.payload.slice();
    match (&headers.net, &headers.transport) {
        (Some(NetHeaders::Ipv4(ip, _)), Some(transport)) => {
            assert_eq!(ip.header_checksum, ip.calc_header_checksum(), "{ip:?}");
            match transport {
                TransportHeader::Tcp(tcp) => tcp.calc_checksum_ipv4(ip, payload),
                TransportHeader::Udp(udp) => udp.calc_checksum_ipv4(ip, payload),
                other => panic!("{other:?}"),
            }
        }
        (Some(NetHeaders::Ipv6(ip, _)), Some(transport)) => match transport {
            TransportHeader::Tcp(tcp) => tcp.calc_checksum_ipv6(ip, payload),
            TransportHeader::Udp(udp) => udp.calc_checksum_ipv6(ip, payload),
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    }
    .expect("it is not too long")
}
