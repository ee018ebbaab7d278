//! Cost of a packet in lb's tc programs and in those in C. The kernel runs them on prepared packets (`BPF_PROG_TEST_RUN`),
//! in many short rounds that alternate between the programs.
//!
//! The kernel creates one packet for all runs of a call, so each run finds the packet that the previous run has changed. A
//! small program therefore rewrites the headers and tail-calls the measured program. Its own cost is measured with an empty
//! program and subtracted. Each packet that begins a flow has another source port, and the entries of these flows in CT_NEW
//! are removed after each round.

use std::collections::BTreeMap;
use std::fmt::{self, Display, Formatter};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{Array, MapData, ProgramArray};
use aya::programs::{ProgramFd, SchedClassifier, TestRun as _, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use etherparse::{PacketBuilder, PacketBuilderStep};
use lb_agent::loader::{self, Lock, OBJECT, PinPath, SocketLb};
use lb_agent::maps::bpf::BpfMaps;
use lb_agent::maps::ct::CtMaps;
use lb_common::abi::{Device, ServiceIndex, SizedMap, map_name, program_name};
use lb_core::maps::{Capacities, Maps as _};
use lb_core::model::{
    Batch, Change, Endpoint, EndpointLocation, EndpointPort, EndpointSlice, Node as NodeObject, Object, ObjectKey,
    Protocol, Service, ServicePort, ServiceType,
};
use lb_core::reconcile::Reconciler;
use lb_tests::{Cluster, Node, Pod, Random, Underlay};
use serde::Serialize;

use crate::numbers::{Quartiles, median, median_interval};
use crate::objects::{BACKEND_PORT, Family, Services};
use crate::programs::{Maker, Rounds};
use crate::scenario::shuffled;
use crate::worker::stay_on_one_processor;

/// Source of the C programs that lb's are compared with.
pub(crate) const SOURCE: &str = include_str!("../../../../bench/packets.bpf.c");

/// Packets for one program in one round.
const PACKETS: u32 = 1000;
/// Packets that begin flows for one program in one round.
const FLOWS: u32 = 250;
/// Rounds after which the programs are loaded again; see [`crate::cost`].
const RELOAD: u32 = 5;
/// Payload of a packet.
const PAYLOAD: [u8; 32] = [b'q'; 32];

/// Source port of the established flows; new flows have ports above it.
const OWN_PORT: u16 = 4000;

/// Verdicts of tc programs.
const UNSPEC: i32 = -1;
const REDIRECT: i32 = 7;
/// Offset of `ifindex` in `struct __sk_buff`, and its size.
const IFINDEX: usize = 40;
const SK_BUFF: usize = 192;
/// Size of `struct headers`, and of the bytes in it.
const HEADERS: usize = 88;
const BYTES: usize = 14 + 40 + 20;

/// Node ports of a Service with its backend on the node, and of one with its backend on another node.
const HERE: u16 = 30080;
const THERE: u16 = 30081;
/// The agent's default SNAT ports.
const SNAT_PORTS: std::ops::RangeInclusive<u16> = 61000..=65535;

/// The maps of lb that the C programs work on.
const SHARED: [&str; 14] = [
    map_name::FRONTENDS,
    map_name::SERVICES,
    map_name::BACKEND_SLOTS,
    map_name::BACKENDS,
    map_name::NODE_ADDRS,
    map_name::AFFINITY,
    map_name::STATS,
    map_name::DROPS,
    map_name::CONFIG,
    map_name::CT,
    map_name::CT_NEW,
    map_name::DEVICES,
    map_name::SOURCE_RANGES,
    map_name::CLUSTER_CIDRS,
];

/// Kind of packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum PacketKind {
    /// From the client to a backend on the node, in an established flow.
    HereRequest,
    /// From a backend on the node to the client, in an established flow.
    HereAnswer,
    /// From the client to a backend on another node, in an established flow.
    ThereRequest,
    /// From a backend on another node to the client, in an established flow.
    ThereAnswer,
    /// The first packet of a flow to a backend on the node.
    HereNew,
    /// The first packet of a flow to a backend on another node.
    ThereNew,
    /// To an address that belongs to no Service: in the middle of a connection, or a datagram.
    Foreign,
    /// A SYN to an address that belongs to no Service.
    ForeignNew,
}

impl PacketKind {
    const ALL: [Self; 8] = [
        Self::HereRequest,
        Self::HereAnswer,
        Self::ThereRequest,
        Self::ThereAnswer,
        Self::HereNew,
        Self::ThereNew,
        Self::Foreign,
        Self::ForeignNew,
    ];

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::HereRequest => "established, backend here: request",
            Self::HereAnswer => "established, backend here: answer",
            Self::ThereRequest => "established, backend elsewhere: request",
            Self::ThereAnswer => "established, backend elsewhere: answer",
            Self::HereNew => "new, backend here",
            Self::ThereNew => "new, backend elsewhere",
            Self::Foreign => "no Service's",
            Self::ForeignNew => "no Service's, SYN",
        }
    }

    fn begins_flow(self) -> bool {
        matches!(self, Self::HereNew | Self::ThereNew)
    }

    fn hook(self) -> Hook {
        match self {
            Self::HereAnswer => Hook::Egress,
            Self::HereRequest
            | Self::ThereRequest
            | Self::ThereAnswer
            | Self::HereNew
            | Self::ThereNew
            | Self::Foreign
            | Self::ForeignNew => Hook::Ingress,
        }
    }
}

/// Device hook of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Hook {
    Ingress,
    Egress,
}

impl Hook {
    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        }
    }
}

/// A measured case: a kind of packet, its family and its protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct Case {
    pub(crate) packet: PacketKind,
    pub(crate) hook: Hook,
    pub(crate) family: Family,
    pub(crate) udp: bool,
}

impl Case {
    fn all() -> impl Iterator<Item = Self> {
        let kinds = Family::ALL
            .into_iter()
            .flat_map(|family| [(family, false), (family, true)]);
        let cases = PacketKind::ALL.into_iter().flat_map(move |packet| {
            kinds.clone().map(move |(family, udp)| Self {
                packet,
                hook: packet.hook(),
                family,
                udp,
            })
        });
        // For a datagram to an address of no Service, being the first one makes no difference.
        cases.filter(|case| !(case.udp && case.packet == PacketKind::ForeignNew))
    }

    pub(crate) fn protocol(self) -> &'static str {
        if self.udp { "UDP" } else { "TCP" }
    }
}

impl Display for Case {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (packet, family) = (self.packet.label(), self.family.label());
        write!(f, "{packet}, {family}, {}", self.protocol())
    }
}

/// Costs of the programs in one case.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Cost {
    #[serde(flatten)]
    pub(crate) case: Case,
    /// Nanoseconds per packet in lb's program above the empty program, median of the rounds.
    pub(crate) lb: f64,
    pub(crate) c: f64,
    /// Nanoseconds of the empty program, which were subtracted.
    pub(crate) empty: f64,
    /// Ratio lb / C in each round.
    pub(crate) ratio: Quartiles,
    /// 95 % confidence interval of the median ratio.
    pub(crate) interval: (f64, f64),
}

impl Cost {
    fn of(rounds: &Rounds, case: Case) -> Self {
        Self {
            case,
            lb: median(rounds.above_empty(Maker::Lb)),
            c: median(rounds.above_empty(Maker::C)),
            empty: median(rounds.of(Maker::Empty)),
            ratio: Quartiles::of(rounds.ratios_to(Maker::C)),
            interval: median_interval(rounds.ratios_to(Maker::C)),
        }
    }
}

/// Source and destination of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct PacketTuple {
    from: SocketAddr,
    to: SocketAddr,
}

impl PacketTuple {
    fn reversed(self) -> Self {
        Self {
            from: self.to,
            to: self.from,
        }
    }

    /// Parses the addresses and ports of a packet.
    fn of(bytes: &[u8]) -> Result<Self> {
        let packet = etherparse::SlicedPacket::from_ethernet(bytes).context("not a packet")?;
        let (from, to): (IpAddr, IpAddr) = match packet.net.context("no IP")? {
            etherparse::NetSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
            etherparse::NetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
            other => bail!("{other:?}"),
        };
        let (from_port, to_port) = match packet.transport.context("no transport")? {
            etherparse::TransportSlice::Tcp(tcp) => (tcp.source_port(), tcp.destination_port()),
            etherparse::TransportSlice::Udp(udp) => (udp.source_port(), udp.destination_port()),
            other => bail!("{other:?}"),
        };
        Ok(Self {
            from: SocketAddr::new(from, from_port),
            to: SocketAddr::new(to, to_port),
        })
    }
}

/// Form of a packet on the wire.
#[derive(Debug, Clone, Copy)]
enum Form {
    Syn,
    SynAck,
    Ack,
    Datagram,
}

fn bytes(kind: Form, PacketTuple { from, to }: PacketTuple) -> Result<Vec<u8>> {
    let link = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let ip = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => link.ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => link.ipv6(from.octets(), to.octets(), 64),
        ends => bail!("{ends:?} are of two families"),
    };
    let mut bytes = Vec::new();
    let tcp = |ip: PacketBuilderStep<_>| ip.tcp(from.port(), to.port(), 1000, 512);
    match kind {
        Form::Datagram => ip.udp(from.port(), to.port()).write(&mut bytes, &PAYLOAD),
        Form::Syn => tcp(ip).syn().write(&mut bytes, &[]),
        Form::SynAck => tcp(ip).syn().ack(1001).write(&mut bytes, &[]),
        Form::Ack => tcp(ip).ack(77).write(&mut bytes, &PAYLOAD),
    }
    .context("making a packet")?;
    Ok(bytes)
}

/// A case with its packet and the expected result.
struct Subject {
    case: Case,
    packet: Vec<u8>,
    verdict: i32,
    /// The translated packet, if it does not vary.
    becomes: Option<Vec<u8>>,
}

impl Subject {
    fn packets(&self) -> u32 {
        if self.case.packet.begins_flow() { FLOWS } else { PACKETS }
    }

    /// Returns `struct headers` of the C programs: the headers, the source port of the first packet, and the step from one
    /// packet's source port to the next.
    fn headers(&self, port: Option<u16>) -> Result<[u8; HEADERS]> {
        let (ip, transport) = match (self.case.family, self.case.udp) {
            (Family::Ipv4, false) => (20, 20),
            (Family::Ipv4, true) => (20, 8),
            (Family::Ipv6, false) => (40, 20),
            (Family::Ipv6, true) => (40, 8),
        };
        let (length, port_at) = (14 + ip + transport, 14 + ip);
        let own = self.packet.get(port_at..port_at + 2).context("too short")?;
        let first = port.unwrap_or(u16::from_be_bytes([own[0], own[1]]));
        let mut all = [0; HEADERS];
        all[..4].copy_from_slice(&u32::try_from(length)?.to_ne_bytes());
        all[4..8].copy_from_slice(&u32::try_from(port_at)?.to_ne_bytes());
        all[8..10].copy_from_slice(&first.to_ne_bytes());
        all[10..12].copy_from_slice(&u16::from(port.is_some()).to_ne_bytes());
        let headers = self.packet.get(..length.min(BYTES)).context("too short")?;
        all[12..12 + headers.len()].copy_from_slice(headers);
        Ok(all)
    }
}

/// The C programs and their maps.
struct CPrograms {
    programs: Ebpf,
    packets: Array<MapData, [u8; HEADERS]>,
    measured: ProgramArray<MapData>,
}

impl CPrograms {
    fn load(object: &[u8], pins: &PinPath) -> Result<Self> {
        let mut loader = EbpfLoader::new();
        for name in SHARED {
            loader.map_pin_path(name, pins.maps().join(name));
        }
        let mut programs = loader.load(object).context("loading the C programs")?;
        for (name, program) in programs.programs_mut() {
            let program: &mut SchedClassifier = program.try_into().with_context(|| name.to_owned())?;
            program.load().with_context(|| format!("loading {name}"))?;
        }
        let mut map = |name| programs.take_map(name).with_context(|| format!("no map {name}"));
        Ok(Self {
            packets: map("PACKETS")?.try_into()?,
            measured: map("MEASURED")?.try_into()?,
            programs,
        })
    }
}

fn classifier<'a>(programs: &'a Ebpf, name: &str) -> Result<&'a SchedClassifier> {
    let program = programs.program(name).with_context(|| format!("no program {name}"))?;
    Ok(program.try_into()?)
}

/// A node with lb's programs and those in C; this process fills their maps.
pub(crate) struct TestBed {
    reconciler: Reconciler<BpfMaps>,
    /// lb's programs, which are loaded again from time to time.
    lb: BpfMaps,
    c: CPrograms,
    object: Vec<u8>,
    flows: CtMaps,
    capacities: Capacities,
    /// Index of the device that the client is beyond.
    outside: u32,
    lock: Lock,
    pod: Pod,
    cluster: Cluster,
}

/// The part of the bed that runs in the node's network namespace.
struct Runner<'a> {
    lb: &'a Ebpf,
    c: &'a mut CPrograms,
    flows: &'a mut CtMaps,
    context: [u8; SK_BUFF],
}

impl Runner<'_> {
    fn program(&self, maker: Maker, hook: Hook) -> Result<&SchedClassifier> {
        match (maker, hook) {
            (Maker::Lb, Hook::Ingress) => classifier(self.lb, program_name::INGRESS),
            (Maker::Lb, Hook::Egress) => classifier(self.lb, program_name::EGRESS),
            (Maker::C, Hook::Ingress) => classifier(&self.c.programs, "c_ingress"),
            (Maker::C, Hook::Egress) => classifier(&self.c.programs, "c_egress"),
            (Maker::Floor, _) => bail!("the floor has no programs for packets"),
            (Maker::Empty, _) => classifier(&self.c.programs, "c_empty"),
        }
    }

    /// Runs a program `repeat` times; returns the last verdict, the resulting packet, and nanoseconds per run.
    fn run(&self, program: &SchedClassifier, packet: &[u8], repeat: u32) -> Result<(i32, Vec<u8>, f64)> {
        let mut out = vec![0; packet.len() + 256];
        let result = program.test_run(TestRunOptions {
            data_in: Some(packet),
            data_out: Some(&mut out),
            ctx_in: Some(&self.context),
            repeat,
            ..TestRunOptions::new()
        })?;
        out.truncate(result.data_size_out as usize);
        Ok((result.return_value as i32, out, result.duration.as_nanos() as f64))
    }

    /// Runs one packet that is not repeated.
    fn once(&self, maker: Maker, hook: Hook, packet: &[u8]) -> Result<(i32, Vec<u8>)> {
        let (verdict, out, _) = self.run(self.program(maker, hook)?, packet, 1)?;
        Ok((verdict, out))
    }

    /// Runs a case's packets through one maker's program; returns nanoseconds per packet.
    fn measure(&mut self, maker: Maker, subject: &Subject, random: &mut Random) -> Result<f64> {
        let Subject { case, packet, .. } = subject;
        let port = case
            .packet
            .begins_flow()
            .then(|| OWN_PORT + 1 + random.below(40_000) as u16);
        self.c.packets.set(0, subject.headers(port)?, 0)?;
        let fd: ProgramFd = self.program(maker, case.hook)?.fd()?.try_clone()?;
        self.c.measured.set(0, &fd, 0)?;
        let again = classifier(&self.c.programs, "c_again")?;
        let (verdict, out, time) = self.run(again, packet, subject.packets())?;
        let (expected, becomes) = match maker {
            Maker::Empty => (UNSPEC, None),
            Maker::Lb | Maker::C | Maker::Floor => (subject.verdict, subject.becomes.as_ref()),
        };
        ensure!(
            verdict == expected,
            "the program of {maker:?} returned {verdict} for {case:?}"
        );
        ensure!(
            becomes.is_none_or(|becomes| *becomes == out),
            "{maker:?} makes {:?} of {case:?}, not {:?}",
            PacketTuple::of(&out),
            becomes.map(|bytes| PacketTuple::of(bytes))
        );
        if case.packet.begins_flow() && maker != Maker::Empty {
            let begun = self.forget()?;
            ensure!(
                begun == 2 * subject.packets() as usize,
                "{maker:?} made {begun} entries of {} flows: {case:?}",
                subject.packets()
            );
        }
        Ok(time)
    }

    /// Removes unreplied flows; returns the number of their entries.
    fn forget(&mut self) -> Result<usize> {
        let begun = self.flows.unreplied.all()?;
        for (key, _) in &begun {
            self.flows.unreplied.remove(key)?;
        }
        Ok(begun.len())
    }
}

impl TestBed {
    /// Creates the bed. `object` contains the compiled C programs, and `services` is the number of other Services.
    pub(crate) fn new(services: u32, object: Vec<u8>) -> Result<Self> {
        let cluster = Cluster::builder()
            .nodes(2)
            .client(true)
            .underlay(Underlay::Routes)
            .build()?;
        let pod = cluster.add_pod("n1", "backend")?;
        let pins = PinPath::new(cluster.pin_path("n1"));
        let lock = Lock::take(&pins)?;
        let capacities = Capacities::DEFAULT
            .with(SizedMap::Services, 2 * services + 64)
            .with(SizedMap::Frontends, 4 * services + 64)
            .with(SizedMap::Backends, 20 * services + 64)
            .with(SizedMap::BackendSlots, 40 * services + 64)
            .with(SizedMap::Sockets, 16)
            .with(SizedMap::SocketsMore, 16)
            .with(SizedMap::UdpFlows, 16);
        let mut maps = loader::load(OBJECT, &lock, &capacities, SocketLb::All)?;
        let node = cluster.node("n1");
        let outside = node.device_index("eth0")?;
        let device = |v4: IpAddr, v6: IpAddr| Device {
            v4: v4.into(),
            v6: v6.into(),
            ..Device::default()
        };
        let own = [IpAddr::from(node.address()), node.address6().into()];
        maps.write_devices(&BTreeMap::from([
            (outside, device(own[0], own[1])),
            (
                node.device_index("cni0")?,
                device(node.gateway().into(), node.gateway6().into()),
            ),
        ]))?;
        maps.pinned_mut().write_snat_ports(Some(SNAT_PORTS));
        maps.write_node_addrs(&own.into_iter().map(Into::into).collect())?;
        let mut reconciler = Reconciler::adopt(maps, "n1")?;
        let others = Services {
            number: services,
            endpoints: 10,
            family: Family::Ipv4,
            protocol: Protocol::Tcp,
        };
        let mut changes: Vec<_> = others.objects().collect();
        changes.extend(cluster.nodes().iter().map(node_object).collect::<Result<Vec<_>>>()?);
        let far = far_pod(cluster.node("n2"));
        changes.extend(service(
            "here",
            250,
            HERE,
            "n1",
            [pod.address().into(), pod.address6().into()],
        ));
        changes.extend(service("there", 251, THERE, "n2", far));
        reconciler.apply(Batch::of(changes));
        ensure!(reconciler.problems().is_empty(), "{:?}", reconciler.problems().first());
        add_neighbors(&cluster, &pod)?;
        let c = CPrograms::load(&object, lock.pins())?;
        Ok(Self {
            lb: loader::load(OBJECT, &lock, &capacities, SocketLb::All)?,
            flows: CtMaps::open(&lock.pins().maps())?,
            reconciler,
            c,
            object,
            capacities,
            outside,
            lock,
            pod,
            cluster,
        })
    }

    /// Loads every program again; see [`crate::testbed::TestBed::reload`].
    fn reload(&mut self) -> Result<()> {
        self.lb = loader::load(OBJECT, &self.lock, &self.capacities, SocketLb::All)?;
        self.c = CPrograms::load(&self.object, self.lock.pins())?;
        Ok(())
    }

    /// Calls a function in the node's network namespace, on one processor.
    fn within<T: Send>(&mut self, work: impl FnOnce(&mut Runner<'_>) -> Result<T> + Send) -> Result<T> {
        let mut context = [0; SK_BUFF];
        context[IFINDEX..IFINDEX + 4].copy_from_slice(&self.outside.to_ne_bytes());
        let mut runner = Runner {
            lb: self.lb.programs(),
            c: &mut self.c,
            flows: &mut self.flows,
            context,
        };
        self.cluster.node("n1").within(move || {
            stay_on_one_processor()?;
            work(&mut runner)
        })?
    }

    fn client(&self, family: Family, port: u16) -> SocketAddr {
        let client = self.cluster.client();
        let ip = match family {
            Family::Ipv4 => client.address().into(),
            Family::Ipv6 => client.address6().into(),
        };
        SocketAddr::new(ip, port)
    }

    fn own(&self, family: Family, port: u16) -> SocketAddr {
        let node = self.cluster.node("n1");
        let ip = match family {
            Family::Ipv4 => node.address().into(),
            Family::Ipv6 => node.address6().into(),
        };
        SocketAddr::new(ip, port)
    }

    /// Returns all cases after establishing their flows.
    pub(crate) fn subjects(&mut self) -> Result<Subjects> {
        let mut all = Vec::new();
        for case in Case::all() {
            let Case {
                packet, family, udp, ..
            } = case;
            let (first, answer, next) = if udp {
                (Form::Datagram, Form::Datagram, Form::Datagram)
            } else {
                (Form::Syn, Form::SynAck, Form::Ack)
            };
            let pod = match family {
                Family::Ipv4 => self.pod.socket(BACKEND_PORT),
                Family::Ipv6 => self.pod.socket6(BACKEND_PORT),
            };
            let to = match packet {
                PacketKind::HereRequest | PacketKind::HereAnswer | PacketKind::HereNew => self.own(family, HERE),
                PacketKind::ThereRequest | PacketKind::ThereAnswer | PacketKind::ThereNew => self.own(family, THERE),
                PacketKind::Foreign | PacketKind::ForeignNew => pod,
            };
            let ends = PacketTuple {
                from: self.client(family, OWN_PORT),
                to,
            };
            let (sent, verdict, becomes) = self.within(|runner| {
                let begin = |maker| {
                    let (_, there) = runner.once(maker, Hook::Ingress, &bytes(first, ends)?)?;
                    let ends = PacketTuple::of(&there)?.reversed();
                    anyhow::Ok(ends)
                };
                let hook = packet.hook();
                let sent = match packet {
                    PacketKind::HereRequest
                    | PacketKind::ThereRequest
                    | PacketKind::HereAnswer
                    | PacketKind::ThereAnswer => {
                        let back = begin(Maker::Lb)?;
                        // The first reply of a flow, or a later one.
                        let is_here = matches!(packet, PacketKind::HereRequest | PacketKind::HereAnswer);
                        let answering = if is_here { Hook::Egress } else { Hook::Ingress };
                        let (_, reply) = runner.once(Maker::Lb, answering, &bytes(answer, back)?)?;
                        ensure!(
                            PacketTuple::of(&reply)? == ends.reversed(),
                            "{case:?} is answered by {:?}",
                            PacketTuple::of(&reply)
                        );
                        let is_request = matches!(packet, PacketKind::HereRequest | PacketKind::ThereRequest);
                        bytes(next, if is_request { ends } else { back })?
                    }
                    PacketKind::HereNew | PacketKind::ThereNew | PacketKind::ForeignNew => bytes(first, ends)?,
                    PacketKind::Foreign => bytes(next, ends)?,
                };
                if packet.begins_flow() {
                    let verdict = if packet == PacketKind::ThereNew {
                        REDIRECT
                    } else {
                        UNSPEC
                    };
                    return Ok((sent, verdict, None));
                }
                let (verdict, becomes) = runner.once(Maker::Lb, hook, &sent)?;
                let foreign = matches!(packet, PacketKind::Foreign | PacketKind::ForeignNew);
                ensure!(
                    (becomes == sent) == foreign,
                    "{case:?} becomes {:?}",
                    PacketTuple::of(&becomes)
                );
                Ok((sent, verdict, Some(becomes)))
            })?;
            all.push(Subject {
                case,
                packet: sent,
                verdict,
                becomes,
            });
        }
        let begun = self.flows.unreplied.all()?.len();
        ensure!(begun == 0, "{begun} entries of unreplied flows");
        Ok(Subjects(all))
    }

    /// Measures all cases in `rounds` rounds.
    pub(crate) fn compare(
        &mut self,
        Subjects(subjects): &Subjects,
        rounds: u32,
        mut tick: impl FnMut() + Send,
    ) -> Result<Vec<Cost>> {
        let mut random = Random::new(1);
        let mut found: Vec<_> = subjects.iter().map(|_| Rounds::default()).collect();
        let before = self.connections()?;
        let makers = [Maker::Lb, Maker::C, Maker::Empty];
        // The first round warms up and is not counted.
        let mut round = 0;
        while round <= rounds {
            self.reload()?;
            let last = (round + RELOAD - 1).min(rounds);
            self.within(|runner| {
                for round in round..=last {
                    for (subject, found) in subjects.iter().zip(&mut found) {
                        for at in shuffled(makers.len(), &mut random) {
                            let time = runner.measure(makers[at], subject, &mut random)?;
                            if round > 0 {
                                found.add(makers[at], time);
                            }
                        }
                    }
                    tick();
                }
                Ok(())
            })?;
            round = last + 1;
        }
        let new = subjects.iter().filter(|subject| subject.case.packet.begins_flow());
        let expected = new.map(|subject| u64::from(subject.packets())).sum::<u64>() * 2 * u64::from(rounds + 1);
        let counted = self.connections()? - before;
        ensure!(
            counted == expected,
            "the programs counted {counted} new flows instead of {expected}"
        );
        Ok(subjects
            .iter()
            .zip(found)
            .map(|(subject, rounds)| Cost::of(&rounds, subject.case))
            .collect())
    }

    /// Returns the flows that the programs have counted, over all Services.
    fn connections(&self) -> Result<u64> {
        let maps = self.reconciler.maps().pinned();
        (0..self.capacities[SizedMap::Services]).try_fold(0, |sum, service| {
            Ok(sum + maps.stats(ServiceIndex::new(service))?.connections)
        })
    }

    /// Removes the bed.
    pub(crate) fn take_down(self) -> Result<()> {
        let Self {
            reconciler,
            lb,
            c,
            flows,
            lock,
            cluster,
            ..
        } = self;
        drop((reconciler, lb, c, flows));
        let pins = lock.pins().clone();
        drop(lock);
        loader::cleanup(&pins)?;
        drop(cluster);
        Ok(())
    }
}

/// The measured cases: see [`TestBed::subjects`].
pub(crate) struct Subjects(Vec<Subject>);

/// Addresses of a pod that does not exist, so that no host replies.
fn far_pod(node: &Node) -> [IpAddr; 2] {
    let [a, b, c, _] = node.pod_network().octets();
    let mut v6 = node.pod_network6().segments();
    v6[7] = 9;
    [IpAddr::from([a, b, c, 9]), IpAddr::from(v6)]
}

/// Adds the hardware addresses of the next hops as neighbor entries, which exist on a node with traffic.
fn add_neighbors(cluster: &Cluster, pod: &Pod) -> Result<()> {
    let (client, other) = (cluster.client(), cluster.node("n2"));
    let addresses: [(IpAddr, &str); 6] = [
        (client.address().into(), "eth0"),
        (client.address6().into(), "eth0"),
        (other.address().into(), "eth0"),
        (other.address6().into(), "eth0"),
        (pod.address().into(), "cni0"),
        (pod.address6().into(), "cni0"),
    ];
    let commands = addresses.map(|(address, device)| {
        format!("neighbour replace {address} lladdr 02:00:00:00:00:05 dev {device} nud permanent")
    });
    cluster.node("n1").ip_batch(&commands)
}

fn node_object(node: &Node) -> Result<Change> {
    Ok(Change::Set(Object::Node(Arc::new(NodeObject {
        name: node.name().into(),
        addresses: vec![node.address().into(), node.address6().into()],
        pod_cidrs: vec![
            format!("{}/24", node.pod_network()).parse()?,
            format!("{}/64", node.pod_network6()).parse()?,
        ],
        zone: None,
        leaving: false,
    }))))
}

/// A Service on a node port, TCP and UDP, with one backend of each family.
fn service(name: &str, last: u8, node_port: u16, node: &str, backend: [IpAddr; 2]) -> Vec<Change> {
    let port = |name: &str, protocol| ServicePort {
        protocol,
        node_port: Some(node_port),
        ..ServicePort::tcp(name, 80)
    };
    let service = Service {
        service_type: ServiceType::NodePort,
        cluster_ips: Box::new([
            IpAddr::from([10, 97, 0, last]),
            IpAddr::from([0xfd00, 0x97, 0, 0, 0, 0, 0, last.into()]),
        ]),
        ports: Arc::new([port("tcp", Protocol::Tcp), port("udp", Protocol::Udp)]),
        ..Service::new(ObjectKey::new("default", name))
    };
    let mut changes = vec![Change::Set(Object::Service(Arc::new(service)))];
    for address in backend {
        let slice = EndpointSlice {
            key: ObjectKey::new("default", &format!("{name}-{}", u8::from(address.is_ipv6()))),
            service: name.into(),
            ipv6: address.is_ipv6(),
            endpoints: [Endpoint::ready(address, Arc::new(EndpointLocation::on(node)))].into(),
            ports: [("tcp", Protocol::Tcp), ("udp", Protocol::Udp)]
                .map(|(name, protocol)| EndpointPort {
                    protocol,
                    ..EndpointPort::tcp(name, BACKEND_PORT)
                })
                .into(),
        };
        changes.push(Change::Set(Object::EndpointSlice(Arc::new(slice))));
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c_source_has_every_program_and_map() {
        for program in ["c_ingress", "c_egress", "c_empty", "c_again"] {
            assert!(SOURCE.contains(&format!(" {program}(")), "{program}");
        }
    }

    #[test]
    fn empty_program_is_subtracted() {
        let mut rounds = Rounds::default();
        for (lb, c, empty) in [(130.0, 110.0, 10.0), (240.0, 220.0, 20.0), (70.0, 60.0, 10.0)] {
            rounds.add(Maker::Lb, lb);
            rounds.add(Maker::C, c);
            rounds.add(Maker::Empty, empty);
        }
        let case = Case::all().next().expect("a case");
        let cost = Cost::of(&rounds, case);
        assert_eq!((cost.lb, cost.c, cost.empty), (120.0, 100.0, 10.0));
        assert!((cost.ratio.median - 1.2).abs() < 1e-9);
    }

    #[test]
    fn every_case_occurs_once() {
        assert_eq!(Case::all().count(), 8 * 4 - 2);
    }

    #[test]
    fn ends_of_a_packet_are_where_they_were_put() -> Result<()> {
        for (from, to) in [("192.0.2.1:7", "192.0.2.2:9"), ("[2001:db8::1]:7", "[2001:db8::2]:9")] {
            let ends = PacketTuple {
                from: from.parse()?,
                to: to.parse()?,
            };
            for kind in [Form::Syn, Form::Datagram] {
                assert_eq!(PacketTuple::of(&bytes(kind, ends)?)?, ends);
            }
        }
        Ok(())
    }
}
