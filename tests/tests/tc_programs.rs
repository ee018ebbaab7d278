//! The tc programs, packet by packet (`BPF_PROG_TEST_RUN`): verdict, bytes and checksums.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Context as _, Result, bail, ensure};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions};
use etherparse::icmpv4::DestUnreachableHeader as Unreachable;
use etherparse::icmpv6::DestUnreachableCode;
use etherparse::{
    Icmpv4Type, Icmpv6Type, NetHeaders, PacketBuilder, PacketBuilderStep, PacketHeaders, TransportHeader,
};
use lb_agent::loader::{self, Lock, OBJECT, PinPath, SocketLb};
use lb_agent::maps::bpf::BpfMaps;
use lb_common::abi::{Device, DropReason, ServiceIndex, SizedMap, program_name};
use lb_core::maps::{Capacities, Maps as _};
use lb_core::model::{
    Batch, Change, Endpoint, EndpointLocation, EndpointPort, EndpointSlice, Object, ObjectKey, Protocol, Service,
    ServicePort,
};
use lb_core::reconcile::Reconciler;
use lb_tests::manifests::vips;
use lb_tests::{Cluster, Node, Underlay, scaled_count};

#[path = "tc_programs/random.rs"]
mod random;

const CAPACITIES: Capacities = Capacities::uniform(64)
        .with(SizedMap::Frontends, 128)
        .with(SizedMap::Backends, 128)
        .with(SizedMap::BackendSlots, 256)
        .with(SizedMap::Sockets, 16)
        .with(SizedMap::SocketsMore, 16)
        .with(SizedMap::UdpFlows, 16)
        // Older kernels (6.1) move 128 entries of an LRU hash to a processor at a time, so a smaller map would evict at
        // once.
        .with(SizedMap::ConntrackNew, 1024);
/// Verdicts of tc programs.
const UNSPEC: i32 = -1;
const SHOT: i32 = 2;
const REDIRECT: i32 = 7;
const SNAT: std::ops::RangeInclusive<u16> = 61000..=61999;
/// Offset of `ifindex` in `struct __sk_buff`, and the size of that structure.
const IFINDEX: usize = 40;
const SK_BUFF: usize = 192;

/// A packet as the tests write it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct TestPacket {
    from: SocketAddr,
    to: SocketAddr,
    kind: PacketKind,
    ttl: u8,
    payload: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PacketKind {
    Syn,
    SynAck,
    Ack,
    Fin,
    Rst,
    Datagram,
}

const MACS: ([u8; 6], [u8; 6]) = ([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);

impl TestPacket {
    fn new(kind: PacketKind, from: SocketAddr, to: SocketAddr) -> Self {
        Self {
            from,
            to,
            kind,
            ttl: 64,
            // An odd length, which checksum code must handle.
            payload: if kind == PacketKind::Datagram {
                b"hello".to_vec()
            } else {
                Vec::new()
            },
        }
    }

    fn answer(&self, kind: PacketKind) -> Self {
        Self::new(kind, self.to, self.from)
    }

    fn bytes(&self) -> Vec<u8> {
        let link = PacketBuilder::ethernet2(MACS.0, MACS.1);
        let ip = match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => link.ipv4(from.octets(), to.octets(), self.ttl),
            (IpAddr::V6(from), IpAddr::V6(to)) => link.ipv6(from.octets(), to.octets(), self.ttl),
            _ => panic!("one family"),
        };
        let mut bytes = Vec::new();
        let (from, to) = (self.from.port(), self.to.port());
        let tcp = |ip: PacketBuilderStep<_>| ip.tcp(from, to, 1000, 512);
        match self.kind {
            PacketKind::Datagram => ip.udp(from, to).write(&mut bytes, &self.payload),
            PacketKind::Syn => tcp(ip).syn().write(&mut bytes, &self.payload),
            PacketKind::SynAck => tcp(ip).syn().ack(1001).write(&mut bytes, &self.payload),
            PacketKind::Ack => tcp(ip).ack(77).write(&mut bytes, &self.payload),
            PacketKind::Fin => tcp(ip).fin().ack(77).write(&mut bytes, &self.payload),
            PacketKind::Rst => tcp(ip).rst().write(&mut bytes, &self.payload),
        }
        .expect("a packet");
        bytes
    }

    /// Reads a packet; fails if one of its checksums is wrong.
    fn read(bytes: &[u8]) -> Result<Self> {
        let headers = checked(bytes)?;
        let (from, to, ttl) = addresses(&headers)?;
        let (kind, from_port, to_port) = match headers.transport.as_ref().context("no transport")? {
            TransportHeader::Udp(udp) => (PacketKind::Datagram, udp.source_port, udp.destination_port),
            TransportHeader::Tcp(tcp) => {
                let kind = match (tcp.syn, tcp.ack, tcp.rst) {
                    (true, false, false) => PacketKind::Syn,
                    (true, true, false) => PacketKind::SynAck,
                    (_, _, true) => PacketKind::Rst,
                    _ if tcp.fin => PacketKind::Fin,
                    _ => PacketKind::Ack,
                };
                (kind, tcp.source_port, tcp.destination_port)
            }
            other => bail!("{other:?}"),
        };
        Ok(Self {
            from: SocketAddr::new(from, from_port),
            to: SocketAddr::new(to, to_port),
            kind,
            ttl,
            payload: headers.payload.slice().to_vec(),
        })
    }
}

fn addresses(headers: &PacketHeaders<'_>) -> Result<(IpAddr, IpAddr, u8)> {
    Ok(match headers.net.as_ref().context("no IP")? {
        NetHeaders::Ipv4(ip, _) => (ip.source.into(), ip.destination.into(), ip.time_to_live),
        NetHeaders::Ipv6(ip, _) => (ip.source.into(), ip.destination.into(), ip.hop_limit),
        other => bail!("{other:?}"),
    })
}

/// Returns the headers of a packet; fails if one of its checksums is wrong.
fn checked(bytes: &[u8]) -> Result<PacketHeaders<'_>> {
    let headers = PacketHeaders::from_ethernet_slice(bytes).context("not a packet")?;
    let payload = headers.payload.slice();
    match (&headers.net, &headers.transport) {
        (Some(NetHeaders::Ipv4(ip, _)), Some(transport)) => {
            ensure!(
                ip.header_checksum == ip.calc_header_checksum(),
                "the header's checksum: {ip:?}"
            );
            match transport {
                TransportHeader::Tcp(tcp) => ensure!(tcp.checksum == tcp.calc_checksum_ipv4(ip, payload)?, "{tcp:?}"),
                TransportHeader::Udp(udp) if udp.checksum == 0 => {}
                TransportHeader::Udp(udp) => ensure!(udp.checksum == udp.calc_checksum_ipv4(ip, payload)?, "{udp:?}"),
                TransportHeader::Icmpv4(icmp) => {
                    ensure!(icmp.checksum == icmp.icmp_type.calc_checksum(payload), "{icmp:?}");
                }
                other => bail!("{other:?}"),
            }
        }
        (Some(NetHeaders::Ipv6(ip, _)), Some(transport)) => match transport {
            TransportHeader::Tcp(tcp) => ensure!(tcp.checksum == tcp.calc_checksum_ipv6(ip, payload)?, "{tcp:?}"),
            TransportHeader::Udp(udp) => ensure!(udp.checksum == udp.calc_checksum_ipv6(ip, payload)?, "{udp:?}"),
            TransportHeader::Icmpv6(icmp) => {
                let right = icmp.icmp_type.calc_checksum(ip.source, ip.destination, payload)?;
                ensure!(icmp.checksum == right, "{icmp:?}");
            }
            other => bail!("{other:?}"),
        },
        other => bail!("{other:?}"),
    }
    Ok(headers)
}

/// Meaning of an ICMP error, in either family.
#[derive(Debug, PartialEq, Eq)]
enum IcmpError {
    PortUnreachable,
    TimeExceeded,
    /// Fragmentation needed, with the MTU of the next hop. Only IPv4 has it here.
    FragmentationNeeded(u16),
}

/// Reads the ICMP error for a sent packet. Fails unless it comes from the destination of that packet and quotes its
/// beginning.
fn icmp_error(bytes: &[u8], sent: &TestPacket) -> Result<IcmpError> {
    let headers = checked(bytes)?;
    let (from, to, _) = addresses(&headers)?;
    ensure!((from, to) == (sent.to.ip(), sent.from.ip()), "from {from} to {to}");
    let quoted = headers.payload.slice();
    ensure!(sent.bytes()[14..].starts_with(quoted), "{quoted:?}");
    Ok(match headers.transport {
        Some(TransportHeader::Icmpv4(icmp)) => match icmp.icmp_type {
            Icmpv4Type::DestinationUnreachable(Unreachable::Port) => IcmpError::PortUnreachable,
            Icmpv4Type::DestinationUnreachable(Unreachable::FragmentationNeeded { next_hop_mtu }) => {
                IcmpError::FragmentationNeeded(next_hop_mtu)
            }
            Icmpv4Type::TimeExceeded(_) => IcmpError::TimeExceeded,
            other => bail!("{other:?}"),
        },
        Some(TransportHeader::Icmpv6(icmp)) => match icmp.icmp_type {
            Icmpv6Type::DestinationUnreachable(DestUnreachableCode::Port) => IcmpError::PortUnreachable,
            Icmpv6Type::TimeExceeded(_) => IcmpError::TimeExceeded,
            other => bail!("{other:?}"),
        },
        other => bail!("{other:?}"),
    })
}

/// A node. This process fills its maps and runs its programs.
struct Fixture {
    reconciler: Reconciler<BpfMaps>,
    _lock: Lock,
    cluster: Cluster,
}

const CLIENT: [&str; 2] = ["172.30.99.7", "fd00:172:30:99::7"];

fn client(v6: bool, port: u16) -> SocketAddr {
    SocketAddr::new(CLIENT[usize::from(v6)].parse().expect("an address"), port)
}

impl Fixture {
    fn new() -> Result<Self> {
        let cluster = Cluster::builder()
            .nodes(2)
            .client(true)
            .underlay(Underlay::Vxlan)
            .build()?;
        let lock = Lock::take(&PinPath::new(cluster.pin_path("n1")))?;
        let mut maps = loader::load(OBJECT, &lock, &CAPACITIES, SocketLb::All)?;
        let node = cluster.node("n1");
        let device = |v4: IpAddr, v6: IpAddr| Device {
            v4: v4.into(),
            v6: v6.into(),
            ..Device::default()
        };
        let devices = BTreeMap::from([
            (
                node.device_index("eth0")?,
                device(node.address().into(), node.address6().into()),
            ),
            (
                node.device_index("cni0")?,
                device(node.gateway().into(), node.gateway6().into()),
            ),
            (
                node.device_index("flannel.1")?,
                device(node.pod_network().into(), node.address6().into()),
            ),
        ]);
        maps.write_devices(&devices)?;
        maps.pinned_mut().write_snat_ports(Some(SNAT));
        let own = [IpAddr::from(node.address()), node.address6().into()];
        maps.write_node_addrs(&own.into_iter().map(Into::into).collect())?;
        Ok(Self {
            reconciler: Reconciler::adopt(maps, "n1")?,
            _lock: lock,
            cluster,
        })
    }

    fn node(&self) -> &Node {
        self.cluster.node("n1")
    }

    fn own(&self, v6: bool, port: u16) -> SocketAddr {
        let node = self.node();
        let ip = if v6 {
            node.address6().into()
        } else {
            IpAddr::from(node.address())
        };
        SocketAddr::new(ip, port)
    }

    /// Returns the address of a pod on a node. The pod does not exist, since no test needs its answer.
    fn pod(&self, node: &str, v6: bool) -> IpAddr {
        let node = self.cluster.node(node);
        if v6 {
            let mut segments = node.pod_network6().segments();
            segments[7] = 9;
            IpAddr::from(segments)
        } else {
            let [a, b, c, _] = node.pod_network().octets();
            IpAddr::from([a, b, c, 9])
        }
    }

    /// Applies a Service with a node port, TCP and UDP, and backends given by address and node.
    fn serve(&mut self, name: &str, last: u8, port: u16, backends: &[(IpAddr, &str)]) {
        let key = ObjectKey::new("default", name);
        let port_of = |name: &str, protocol| ServicePort {
            protocol,
            node_port: Some(port),
            ..ServicePort::tcp(name, 80)
        };
        let service = Service {
            service_type: lb_core::model::ServiceType::NodePort,
            cluster_ips: Box::new(vips(last)),
            ports: Arc::new([port_of("tcp", Protocol::Tcp), port_of("udp", Protocol::Udp)]),
            ..Service::new(key)
        };
        let mut changes = vec![Change::Set(Object::Service(Arc::new(service)))];
        for ipv6 in [false, true] {
            let endpoints = backends.iter().filter(|(ip, _)| ip.is_ipv6() == ipv6);
            let slice = EndpointSlice {
                key: ObjectKey::new("default", &format!("{name}-{ipv6}")),
                service: name.into(),
                ipv6,
                endpoints: endpoints
                    .map(|(ip, node)| Endpoint::ready(*ip, Arc::new(EndpointLocation::on(node))))
                    .collect(),
                ports: ["tcp", "udp"]
                    .map(|name| EndpointPort {
                        protocol: if name == "tcp" { Protocol::Tcp } else { Protocol::Udp },
                        ..EndpointPort::tcp(name, 8080)
                    })
                    .into(),
            };
            changes.push(Change::Set(Object::EndpointSlice(Arc::new(slice))));
        }
        self.reconciler.apply(Batch::of(changes));
        assert_eq!(self.reconciler.problems(), []);
    }

    /// Runs a program as if a packet were at a device.
    fn run(&self, program: &str, device: &str, packet: &[u8]) -> Result<(i32, Vec<u8>)> {
        let hook = self.hook(program, device)?;
        self.node().within(|| hook.run(packet))?
    }

    fn hook(&self, program: &str, device: &str) -> Result<Hook<'_>> {
        let programs = self.reconciler.maps().programs();
        let mut context = [0; SK_BUFF];
        context[IFINDEX..IFINDEX + 4].copy_from_slice(&self.node().device_index(device)?.to_ne_bytes());
        Ok(Hook {
            classifier: programs.program(program).context("no such program")?.try_into()?,
            context,
        })
    }

    fn ingress(&self, device: &str, packet: &TestPacket) -> Result<(i32, Vec<u8>)> {
        self.run(program_name::INGRESS, device, &packet.bytes())
    }

    fn egress(&self, device: &str, packet: &TestPacket) -> Result<(i32, Vec<u8>)> {
        self.run(program_name::EGRESS, device, &packet.bytes())
    }

    /// Returns the connections of all Services: served and refused.
    fn counted(&self) -> Result<(u64, u64)> {
        (0..CAPACITIES[SizedMap::Services]).try_fold((0, 0), |(served, refused), index| {
            let one = self.reconciler.maps().pinned().stats(ServiceIndex::new(index))?;
            Ok((served + one.connections, refused + one.refused))
        })
    }

    fn dropped(&self, reason: DropReason) -> Result<u64> {
        Ok(self.reconciler.maps().pinned().drops(reason)?)
    }
}

/// A program at a device.
struct Hook<'a> {
    classifier: &'a SchedClassifier,
    context: [u8; SK_BUFF],
}

impl Hook<'_> {
    /// Runs the program in the network namespace of the caller, and returns verdict and packet.
    fn run(&self, packet: &[u8]) -> Result<(i32, Vec<u8>)> {
        let mut out = vec![0; packet.len() + 256];
        let result = self.classifier.test_run(TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: Some(&self.context),
            ..TestRunOptions::new()
        })?;
        out.truncate(result.data_size_out as usize);
        Ok((result.return_value as i32, out))
    }
}

fn cases() -> impl Iterator<Item = (bool, PacketKind, PacketKind)> {
    [false, true].into_iter().flat_map(|v6| {
        [
            (v6, PacketKind::Syn, PacketKind::SynAck),
            (v6, PacketKind::Datagram, PacketKind::Datagram),
        ]
    })
}

#[test]
fn local_backend_sees_the_client_and_the_reply_comes_from_the_frontend() -> Result<()> {
    let mut fixture = Fixture::new()?;
    let backends = [false, true].map(|v6| (fixture.pod("n1", v6), "n1"));
    fixture.serve("here", 20, 30080, &backends);
    for (v6, ask, tell) in cases() {
        let sent = TestPacket::new(ask, client(v6, 4000), fixture.own(v6, 30080));
        let (verdict, out) = fixture.ingress("eth0", &sent)?;
        let got = TestPacket::read(&out)?;
        let to = SocketAddr::new(fixture.pod("n1", v6), 8080);
        assert_eq!((verdict, &got), (UNSPEC, &TestPacket { to, ..sent.clone() }));
        // At the bridge, lb does not translate the reply yet.
        let answer = got.answer(tell);
        let (verdict, out) = fixture.ingress("cni0", &answer)?;
        assert_eq!((verdict, TestPacket::read(&out)?), (UNSPEC, answer.clone()));
        let (verdict, out) = fixture.egress("eth0", &answer)?;
        assert_eq!((verdict, TestPacket::read(&out)?), (UNSPEC, sent.answer(tell)));
        // A second packet, now of an established flow.
        let (verdict, out) = fixture.ingress("eth0", &sent)?;
        assert_eq!((verdict, TestPacket::read(&out)?), (UNSPEC, got));
    }
    Ok(())
}

#[test]
fn remote_backend_sees_the_snat_address_and_the_reply_is_translated_back() -> Result<()> {
    let mut fixture = Fixture::new()?;
    let backends = [false, true].map(|v6| (fixture.pod("n2", v6), "n2"));
    fixture.serve("there", 20, 30080, &backends);
    for (v6, ask, tell) in cases() {
        let mut ports = Vec::new();
        // Two clients with one source port.
        for last in [7, 8] {
            let mut from = client(v6, 4000);
            from.set_ip(match from.ip() {
                IpAddr::V4(ip) => IpAddr::from([ip.octets()[0], ip.octets()[1], ip.octets()[2], last]),
                IpAddr::V6(ip) => {
                    let mut segments = ip.segments();
                    segments[7] = last.into();
                    IpAddr::from(segments)
                }
            });
            let sent = TestPacket::new(ask, from, fixture.own(v6, 30080));
            let (verdict, out) = fixture.ingress("eth0", &sent)?;
            let got = TestPacket::read(&out)?;
            let node = fixture.node();
            let source: IpAddr = if v6 {
                node.address6().into()
            } else {
                node.pod_network().into()
            };
            assert_eq!((verdict, got.from.ip(), got.ttl), (REDIRECT, source, 63), "{got:?}");
            assert_eq!(got.to, SocketAddr::new(fixture.pod("n2", v6), 8080));
            assert!(SNAT.contains(&got.from.port()), "{got:?}");
            ports.push(got.from.port());
            let device = if v6 { "eth0" } else { "flannel.1" };
            let (verdict, out) = fixture.ingress(device, &got.answer(tell))?;
            let answer = TestPacket {
                ttl: 63,
                ..sent.answer(tell)
            };
            assert_eq!((verdict, TestPacket::read(&out)?), (REDIRECT, answer));
            // A flow keeps its SNAT port.
            let again = TestPacket::read(&fixture.ingress("eth0", &sent)?.1)?;
            assert_eq!(again.from, got.from);
        }
        assert_ne!(ports[0], ports[1]);
    }
    Ok(())
}

#[test]
fn no_endpoint_gets_tcp_reset_or_icmp_port_unreachable() -> Result<()> {
    let mut fixture = Fixture::new()?;
    fixture.serve("empty", 20, 30080, &[]);
    for (v6, ask, _) in cases() {
        let sent = TestPacket::new(ask, client(v6, 4000), fixture.own(v6, 30080));
        let (verdict, out) = fixture.ingress("eth0", &sent)?;
        assert_eq!(verdict, REDIRECT, "{sent:?}");
        let link = &out[..12];
        assert_eq!(link, [MACS.0, MACS.1].concat(), "back to the MAC address of the sender");
        if ask == PacketKind::Datagram {
            assert_eq!(icmp_error(&out, &sent)?, IcmpError::PortUnreachable);
            continue;
        }
        let headers = checked(&out)?;
        let (from, to, _) = addresses(&headers)?;
        assert_eq!((from, to), (sent.to.ip(), sent.from.ip()));
        let Some(TransportHeader::Tcp(tcp)) = headers.transport else {
            bail!("{headers:?}");
        };
        assert!(tcp.rst && tcp.ack && !tcp.syn, "{tcp:?}");
        assert_eq!((tcp.acknowledgment_number, tcp.source_port), (1001, 30080));
    }
    // A reset is never answered with a reset.
    let sent = TestPacket::new(PacketKind::Rst, client(false, 4000), fixture.own(false, 30080));
    assert_eq!(fixture.ingress("eth0", &sent)?.0, UNSPEC);
    assert_eq!(fixture.dropped(DropReason::NoEndpoint)?, 4);
    assert_eq!(fixture.counted()?, (0, 4));
    Ok(())
}

#[test]
fn expired_and_oversized_packets_get_icmp_errors() -> Result<()> {
    let mut fixture = Fixture::new()?;
    let backends = [false, true].map(|v6| (fixture.pod("n2", v6), "n2"));
    fixture.serve("there", 20, 30080, &backends);
    for (v6, ask, _) in cases() {
        let old = TestPacket {
            ttl: 1,
            ..TestPacket::new(ask, client(v6, 4000), fixture.own(v6, 30080))
        };
        let (verdict, out) = fixture.ingress("eth0", &old)?;
        assert_eq!((verdict, icmp_error(&out, &old)?), (REDIRECT, IcmpError::TimeExceeded));
    }
    // 1,500 bytes over VXLAN.
    let long = TestPacket {
        payload: vec![7; 1472],
        ..TestPacket::new(PacketKind::Datagram, client(false, 4001), fixture.own(false, 30080))
    };
    let (verdict, out) = fixture.ingress("eth0", &long)?;
    assert_eq!(
        (verdict, icmp_error(&out, &long)?),
        (REDIRECT, IcmpError::FragmentationNeeded(1450))
    );
    assert_eq!(fixture.dropped(DropReason::TooBig)?, 1);
    assert_eq!(fixture.dropped(DropReason::TtlExceeded)?, 4);
    assert_eq!(fixture.counted()?.1, 0, "an ICMP error does not count as refused");
    Ok(())
}

#[test]
fn zero_udp_checksum_stays_zero() -> Result<()> {
    let mut fixture = Fixture::new()?;
    fixture.serve("here", 20, 30080, &[(fixture.pod("n1", false), "n1")]);
    let mut bytes = TestPacket::new(PacketKind::Datagram, client(false, 4000), fixture.own(false, 30080)).bytes();
    bytes[14 + 20 + 6..][..2].fill(0);
    let (_, out) = fixture.run(program_name::INGRESS, "eth0", &bytes)?;
    assert_eq!(out[14 + 20 + 6..][..2], [0, 0]);
    assert_eq!(TestPacket::read(&out)?.to.port(), 8080);
    Ok(())
}

#[test]
fn untranslatable_packets_pass_unchanged_and_are_counted() -> Result<()> {
    let mut fixture = Fixture::new()?;
    let backends = [false, true].map(|v6| (fixture.pod("n1", v6), "n1"));
    fixture.serve("here", 20, 30080, &backends);
    let good = |v6| TestPacket::new(PacketKind::Syn, client(v6, 4000), fixture.own(v6, 30080)).bytes();
    type Change = fn(&mut Vec<u8>);
    let changes: [(bool, Change, Option<DropReason>); 12] = [
        // The flag "more fragments".
        (false, |p| p[14 + 6] = 0x20, Some(DropReason::Fragment)),
        (false, |p| p[14 + 7] = 1, Some(DropReason::Fragment)),
        (true, |p| p[14 + 6] = 44, Some(DropReason::Fragment)),
        (false, |p| p[14] = 0x46, Some(DropReason::HeaderOptions)),
        (true, |p| p[14 + 6] = 60, Some(DropReason::HeaderOptions)),
        (false, |p| p[14 + 9] = 132, Some(DropReason::OtherProtocol)),
        (false, |p| p[14] = 0x44, Some(DropReason::Malformed)),
        // A total length beyond the packet, and one shorter than the headers.
        (false, |p| p[14 + 2] = 8, Some(DropReason::Malformed)),
        (false, |p| p[14 + 3] = 30, Some(DropReason::Malformed)),
        (true, |p| p[14 + 5] = 0, Some(DropReason::Malformed)),
        (false, |p| p.truncate(14 + 20 + 10), Some(DropReason::Malformed)),
        // Not IP.
        (false, |p| p[13] = 6, None),
    ];
    for (number, (v6, change, reason)) in changes.into_iter().enumerate() {
        let mut bytes = good(v6);
        change(&mut bytes);
        let before = reason.map_or(Ok(0), |reason| fixture.dropped(reason))?;
        let (verdict, out) = fixture.run(program_name::INGRESS, "eth0", &bytes)?;
        assert_eq!((verdict, &out), (UNSPEC, &bytes), "{number}");
        if let Some(reason) = reason {
            assert_eq!(fixture.dropped(reason)?, before + 1, "{number} {reason:?}");
        }
    }
    // A connection without a SYN that lb has seen.
    let sent = TestPacket::new(PacketKind::Ack, client(false, 4000), fixture.own(false, 30080));
    assert_eq!(fixture.ingress("eth0", &sent)?, (UNSPEC, sent.bytes()));
    // An address of no Service, and a port that is no node port.
    for to in [SocketAddr::new(CLIENT[0].parse()?, 30080), fixture.own(false, 30081)] {
        let sent = TestPacket::new(PacketKind::Syn, client(false, 4000), to);
        assert_eq!(fixture.ingress("eth0", &sent)?, (UNSPEC, sent.bytes()), "{to}");
    }
    Ok(())
}

#[test]
fn flow_to_a_removed_backend_is_reset_and_a_new_one_selects_again() -> Result<()> {
    let mut fixture = Fixture::new()?;
    for v6 in [false, true] {
        let (here, there) = ((fixture.pod("n1", v6), "n1"), (fixture.pod("n2", v6), "n2"));
        fixture.serve("moves", 20, 30080, &[here]);
        let sent = TestPacket::new(PacketKind::Syn, client(v6, 4000), fixture.own(v6, 30080));
        let first = TestPacket::read(&fixture.ingress("eth0", &sent)?.1)?;
        fixture.egress("eth0", &first.answer(PacketKind::SynAck))?;
        fixture.serve("moves", 20, 30080, &[there]);
        let data = TestPacket::new(PacketKind::Ack, sent.from, sent.to);
        let (verdict, out) = fixture.ingress("eth0", &data)?;
        let reset = TestPacket::read(&out)?;
        assert_eq!(
            (verdict, reset.kind, reset.from, reset.to),
            (REDIRECT, PacketKind::Rst, sent.to, sent.from)
        );
        // A new connection from the same port, at once.
        let again = TestPacket::read(&fixture.ingress("eth0", &sent)?.1)?;
        assert_eq!(again.to.ip(), there.0);
    }
    assert_eq!(fixture.dropped(DropReason::BackendGone)?, 2);
    Ok(())
}

#[test]
fn full_conntrack_refuses_new_flows_and_keeps_established_ones() -> Result<()> {
    let mut fixture = Fixture::new()?;
    fixture.serve("here", 20, 30080, &[(fixture.pod("n1", false), "n1")]);
    let mut kept = Vec::new();
    let mut refused = 0;
    for port in 4000..4100 {
        let sent = TestPacket::new(PacketKind::Syn, client(false, port), fixture.own(false, 30080));
        let there = TestPacket::read(&fixture.ingress("eth0", &sent)?.1)?;
        let answer = there.answer(PacketKind::SynAck);
        assert_eq!(fixture.egress("eth0", &answer)?.0, UNSPEC);
        // Only this ACK establishes the flow: the source address of a SYN may be spoofed.
        let ack = TestPacket::new(PacketKind::Ack, sent.from, sent.to);
        match fixture.ingress("eth0", &ack)?.0 {
            UNSPEC => kept.push(sent),
            SHOT => refused += 1,
            other => bail!("{other}"),
        }
    }
    // Two entries per flow.
    assert_eq!(
        (kept.len() as u32, refused),
        (
            CAPACITIES[SizedMap::Conntrack] / 2,
            100 - CAPACITIES[SizedMap::Conntrack] / 2
        )
    );
    assert_eq!(fixture.dropped(DropReason::ConntrackFull)?, u64::from(refused));
    // Many flows without a reply.
    for port in 10_000..14_000 {
        let sent = TestPacket::new(PacketKind::Syn, client(false, port), fixture.own(false, 30080));
        assert_eq!(fixture.ingress("eth0", &sent)?.0, UNSPEC);
    }
    for sent in kept {
        let data = TestPacket::new(PacketKind::Ack, sent.from, sent.to);
        let (verdict, out) = fixture.ingress("eth0", &data)?;
        assert_eq!((verdict, TestPacket::read(&out)?.to.port()), (UNSPEC, 8080), "{sent:?}");
    }
    Ok(())
}

#[test]
fn concurrent_first_packets_create_one_flow() -> Result<()> {
    let mut fixture = Fixture::new()?;
    // One of the two backends is behind another device and needs SNAT.
    let backends = [(fixture.pod("n1", false), "n1"), (fixture.pod("n2", false), "n2")];
    fixture.serve("races", 20, 30080, &backends);
    let rounds = scaled_count(4000);
    let hook = fixture.hook(program_name::INGRESS, "eth0")?;
    let own = fixture.own(false, 30080);
    // Both packets of a round are sent together: each thread waits for the other one.
    let arrived = AtomicU64::new(0);
    let one = || {
        let outs = (0..rounds).map(|round| {
            let port = 10_000 + u16::try_from(round)?;
            let packet = TestPacket::new(PacketKind::Datagram, client(false, port), own).bytes();
            arrived.fetch_add(1, Ordering::AcqRel);
            while arrived.load(Ordering::Acquire) < 2 * (round + 1) {
                thread::yield_now();
            }
            let (verdict, out) = hook.run(&packet)?;
            Ok((verdict, TestPacket::read(&out)?))
        });
        // All rounds run even if one fails, or the other thread would wait forever.
        outs.collect::<Vec<Result<_>>>()
    };
    let (first, second) = fixture.node().within(|| {
        thread::scope(|scope| {
            let other = scope.spawn(one);
            (one(), other.join().expect("a thread"))
        })
    })?;
    for (round, (first, second)) in first.into_iter().zip(second).enumerate() {
        assert_eq!(first?, second?, "round {round}");
    }
    assert_eq!(fixture.counted()?, (rounds, 0));
    Ok(())
}

#[test]
fn reused_client_port_keeps_its_snat_port() -> Result<()> {
    let mut fixture = Fixture::new()?;
    for v6 in [false, true] {
        fixture.serve("there", 20, 30080, &[(fixture.pod("n2", v6), "n2")]);
        // A connection that both sides close, from the same client port each time.
        let connect = |fixture: &Fixture| -> Result<TestPacket> {
            let segment = |kind| TestPacket::new(kind, client(v6, 4000), fixture.own(v6, 30080));
            let there = TestPacket::read(&fixture.ingress("eth0", &segment(PacketKind::Syn))?.1)?;
            fixture.ingress("flannel.1", &there.answer(PacketKind::SynAck))?;
            fixture.ingress("eth0", &segment(PacketKind::Ack))?;
            fixture.ingress("flannel.1", &there.answer(PacketKind::Fin))?;
            fixture.ingress("eth0", &segment(PacketKind::Fin))?;
            Ok(there)
        };
        let first = connect(&fixture)?;
        assert!(SNAT.contains(&first.from.port()), "{first:?}");
        for again in 0..5 {
            assert_eq!(connect(&fixture)?, first, "{again}");
        }
        // If the SNAT port is no longer in the configured range, another one is used.
        let others = *SNAT.end() + 1..=*SNAT.end() + 10;
        fixture
            .reconciler
            .maps_mut()
            .pinned_mut()
            .write_snat_ports(Some(others.clone()));
        assert!(others.contains(&connect(&fixture)?.from.port()));
        fixture.reconciler.maps_mut().pinned_mut().write_snat_ports(Some(SNAT));
    }
    Ok(())
}

#[test]
fn snat_port_of_a_closed_connection_is_reused_when_none_is_free() -> Result<()> {
    let mut fixture = Fixture::new()?;
    fixture.serve("there", 20, 30080, &[(fixture.pod("n2", false), "n2")]);
    let few = *SNAT.start()..=*SNAT.start() + 3;
    fixture.reconciler.maps_mut().pinned_mut().write_snat_ports(Some(few));
    let segment = |kind, port| TestPacket::new(kind, client(false, port), fixture.own(false, 30080));
    // The program tries some random ports per packet, so repeated attempts get the last free one.
    let begin = |port| -> Result<Option<TestPacket>> {
        for _ in 0..40 {
            let (verdict, out) = fixture.ingress("eth0", &segment(PacketKind::Syn, port))?;
            if verdict == REDIRECT {
                return Ok(Some(TestPacket::read(&out)?));
            }
        }
        Ok(None)
    };
    let mut flows = Vec::new();
    for port in 4000..4004 {
        let there = begin(port)?.with_context(|| format!("no port for {port}"))?;
        fixture.ingress("flannel.1", &there.answer(PacketKind::SynAck))?;
        fixture.ingress("eth0", &segment(PacketKind::Ack, port))?;
        flows.push(there);
    }
    assert_eq!(begin(4004)?, None);
    // A reset of the client does not free the port, nor does a FIN of one side alone.
    fixture.ingress("eth0", &segment(PacketKind::Rst, 4000))?;
    fixture.ingress("eth0", &segment(PacketKind::Fin, 4001))?;
    assert_eq!(begin(4004)?, None);
    fixture.ingress("flannel.1", &flows[1].answer(PacketKind::Fin))?;
    let again = begin(4004)?.context("no port, though one connection is closed")?;
    assert_eq!(again.from, flows[1].from);
    for (port, there) in [(4000, 0), (4002, 2), (4003, 3)] {
        let (verdict, out) = fixture.ingress("eth0", &segment(PacketKind::Ack, port))?;
        assert_eq!((verdict, TestPacket::read(&out)?.from), (REDIRECT, flows[there].from));
    }
    Ok(())
}
