//! `lb-agent explain` compared with what `connect()` does on a real kernel, and `affinity list`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use lb_agent::loader::PinPath;
use lb_agent::maps::bpf::PinnedMaps;
use lb_common::abi::{DropReason, RejectWith};
use lb_tests::load::ConnectStep;
use lb_tests::manifests::{Manifests, Port, service, slice};
use lb_tests::scripted_socket::plain;
use lb_tests::{
    Agent, CallResult, Cluster, Connect, Netns, Node, Pod, Process, Random, RunningAgent, SocketCall, SocketKind,
    scaled_timeout, testbed,
};
use serde_json::Value;

/// Number of connections made to each destination.
const ATTEMPTS: u64 = 2;

/// A Service with random settings. Its addresses end in `n`.
struct Service {
    n: u8,
    /// Address in `10.10.1.x`, node name in the manifest, and whether the endpoint is terminating.
    endpoints: Vec<(String, &'static str, bool)>,
    local: bool,
    affinity: bool,
    source_ranges: bool,
}

impl Service {
    fn random(n: u8, pods: &[Pod], random: &mut Random) -> Self {
        let mut chance = |of| random.below(of) == 0;
        let mut endpoints = Vec::new();
        for pod in pods {
            if !chance(2) {
                let node = if chance(2) { "n2" } else { "n1" };
                endpoints.push((pod.address().to_string(), node, chance(4)));
            }
        }
        Self {
            n,
            endpoints,
            local: chance(2),
            affinity: chance(3),
            source_ranges: chance(3),
        }
    }

    fn node_port(&self) -> u16 {
        30000 + u16::from(self.n)
    }

    fn manifest(&self) -> Result<String> {
        let n = self.n;
        let mut text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s{n}, namespace: default}}\nspec:\n  type: LoadBalancer\n  \
             clusterIP: 10.96.1.{n}\n  externalIPs: [198.51.100.{n}]\n  ports:\n  - {{port: 80, nodePort: {}}}\n",
            self.node_port()
        );
        for (wanted, line) in [
            (self.local, "internalTrafficPolicy: Local"),
            (self.affinity, "sessionAffinity: ClientIP"),
            (self.source_ranges, "loadBalancerSourceRanges: [203.0.113.0/24]"),
        ] {
            if wanted {
                writeln!(text, "  {line}")?;
            }
        }
        writeln!(
            text,
            "status: {{loadBalancer: {{ingress: [{{ip: 192.0.2.{n}}}]}}}}\n---"
        )?;
        write!(
            text,
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: s{n}\n  namespace: default\n  labels: \
             {{kubernetes.io/service-name: s{n}}}\naddressType: IPv4\nports: [{{port: 8080}}]\nendpoints:"
        )?;
        if self.endpoints.is_empty() {
            text.push_str(" []");
        }
        for (address, node, terminating) in &self.endpoints {
            let conditions = format!("{{ready: {}, serving: true, terminating: {terminating}}}", !terminating);
            write!(
                text,
                "\n- {{addresses: [{address}], nodeName: {node}, conditions: {conditions}}}"
            )?;
        }
        text.push_str("\n---\n");
        Ok(text)
    }

    /// Returns all addresses and ports of the Service, and some that it does not have.
    fn destinations(&self, node: std::net::Ipv4Addr) -> Vec<SocketAddr> {
        let (n, port) = (self.n, self.node_port());
        let octets = [
            ([10, 96, 1, n], 80),
            ([10, 96, 1, n], 81),
            ([198, 51, 100, n], 80),
            ([198, 51, 100, n], 81),
            ([192, 0, 2, n], 80),
            ([127, 0, 0, 1], port),
            ([0, 0, 0, 0], port),
            ([192, 168, 77, 99], port),
            (node.octets(), port),
            (node.octets(), port + 100),
        ];
        octets.into_iter().map(SocketAddr::from).collect()
    }
}

/// Counters of the programs.
#[derive(Debug, PartialEq, Eq)]
struct Counters {
    connections: u64,
    /// Counts by label of the drop reason.
    drops: BTreeMap<&'static str, u64>,
}

impl Counters {
    fn read(maps: &PinnedMaps) -> Result<Self> {
        let mut connections = 0;
        for index in maps.names()?.into_keys() {
            connections += maps.stats(index)?.connections;
        }
        // Packets that were passed to the stack untranslated do not belong to a connection of the test.
        let passed = |reason: &DropReason| reason.reject_with() == RejectWith::Pass;
        let drops = DropReason::ALL
            .iter()
            .filter(|reason| !passed(reason))
            .map(|reason| Ok((reason.label(), maps.drops(*reason)?)));
        Ok(Self {
            connections,
            drops: drops.collect::<Result<_>>()?,
        })
    }

    fn since(&self, before: &Self) -> Self {
        let mut drops = self.drops.clone();
        for (reason, count) in &mut drops {
            *count -= before.drops[reason];
        }
        drops.retain(|_, count| *count > 0);
        Self {
            connections: self.connections - before.connections,
            drops,
        }
    }
}

/// A network namespace, and a process in it that `explain --from` refers to. The process lives as long as this value.
struct Client<'a> {
    netns: &'a Netns,
    process: Process,
}

impl<'a> Client<'a> {
    fn new(netns: &'a Netns) -> Result<Self> {
        let process = Process::spawn(netns.command("sleep")?.arg("1000"))?;
        Ok(Self { netns, process })
    }

    fn explain(&self, agent: &Agent, to: &str) -> Result<Value> {
        agent.json(&["explain", "--from", &self.process.id().to_string(), "--to", to])
    }
}

/// Returns the addresses that the connection may reach according to `explain`.
fn backends(answer: &Value) -> BTreeSet<&str> {
    let backends = answer["outcome"]["backends"].as_array().into_iter().flatten();
    backends.filter_map(Value::as_str).collect()
}

/// Returns the addresses of the candidates that `explain` shows as eligible.
fn eligible(answer: &Value) -> BTreeSet<&str> {
    let candidates = answer["candidates"].as_array().into_iter().flatten();
    let eligible = candidates.filter(|candidate| candidate["eligible"] == true);
    eligible.filter_map(|candidate| candidate["address"].as_str()).collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// Result of [`ATTEMPTS`] connections.
#[derive(Debug, Default)]
struct ConnectResult {
    /// Names of the servers that answered.
    reached: BTreeSet<String>,
    /// Error numbers of failed connect() calls.
    errnos: Vec<i32>,
    /// Number of connections without an answer.
    failed: u64,
}

fn connect_tcp(from: &Netns, to: SocketAddr) -> Result<ConnectResult> {
    let timeout = scaled_timeout(Duration::from_millis(300));
    let summary = testbed().connect(from, &Connect::to(&[to]).count(ATTEMPTS).timeout(timeout))?;
    let at_connect = summary
        .failures
        .iter()
        .filter(|failure| failure.step == ConnectStep::Connect);
    Ok(ConnectResult {
        reached: summary.per_backend.keys().cloned().collect(),
        errnos: at_connect.map(|failure| failure.errno).collect(),
        failed: summary.failure_count,
    })
}

/// Connects UDP sockets. If `served`, waits for an answer to a datagram on each.
fn connect_udp(from: &Netns, to: SocketAddr, served: bool) -> Result<ConnectResult> {
    let kind = if to.is_ipv4() {
        SocketKind::Udp4
    } else {
        SocketKind::Udp6
    };
    let mut connected = ConnectResult::default();
    for _ in 0..ATTEMPTS {
        let mut socket = testbed().scripted_socket(from, kind)?;
        if let CallResult::Failed(errno) = socket.call(&SocketCall::Connect(to))? {
            connected.errnos.push(errno);
            connected.failed += 1;
        } else if served {
            socket.send("hello")?;
            connected.reached.insert(socket.receive_reply(plain(to), "hello")?);
        }
    }
    Ok(connected)
}

/// Runs `explain`, connects, and compares the results.
fn compare(setup: &Setup, maps: &PinnedMaps, client: &Client<'_>, proto: Protocol, to: SocketAddr) -> Result<Value> {
    let answer = client.explain(&setup.agent, &format!("{to}/{}", proto.name()))?;
    let outcome = &answer["outcome"];
    let result = outcome["result"].as_str().context("no result")?;
    let before = Counters::read(maps)?;
    let connected = match proto {
        Protocol::Tcp => connect_tcp(client.netns, to)?,
        Protocol::Udp => connect_udp(client.netns, to, result == "connects")?,
    };
    let counted = Counters::read(maps)?.since(&before);
    let agrees = match result {
        "connects" => {
            let allowed = backends(&answer);
            let is_one = |name: &String| setup.addresses(name).iter().any(|at| allowed.contains(at.as_str()));
            connected.failed == 0
                && !connected.reached.is_empty()
                && connected.reached.iter().all(is_one)
                && allowed == eligible(&answer)
                && (counted.connections, counted.drops.len()) == (ATTEMPTS, 0)
        }
        "refused" => {
            let reason = label(outcome["reason"].as_str().context("no reason")?)?;
            connected.errnos.len() as u64 == ATTEMPTS
                && connected.errnos.iter().all(|errno| outcome["number"] == *errno)
                && counted.connections == 0
                && counted.drops == BTreeMap::from([(reason, ATTEMPTS)])
        }
        // connect() on a UDP socket sends no packet.
        "untouched" if proto == Protocol::Tcp => packets_agree(setup, &answer, &connected, &counted)?,
        "untouched" => connected.reached.is_empty() && counted.connections == 0 && counted.drops.is_empty(),
        _ => bail!("{answer:#}"),
    };
    let netns = client.netns.name();
    ensure!(
        agrees,
        "{netns} to {to}/{}: {answer:#}\n{connected:?}\n{counted:?}",
        proto.name()
    );
    Ok(answer)
}

/// Returns whether the connections of a socket that the hooks left alone went as `explain` predicts for their packets.
fn packets_agree(setup: &Setup, answer: &Value, connected: &ConnectResult, counted: &Counters) -> Result<bool> {
    // ENETUNREACH: the client has no route, so no packet was sent.
    if !connected.errnos.is_empty() && connected.errnos.iter().all(|errno| *errno == 101) {
        return Ok(connected.reached.is_empty() && counted.connections == 0 && counted.drops.is_empty());
    }
    let outcome = &answer["packets"]["outcome"];
    let reason = || label(outcome["reason"].as_str().context("no reason")?);
    Ok(match outcome["result"].as_str() {
        Some("connects") => {
            let allowed: Vec<&str> = outcome["backends"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
                .collect();
            let is_one = |name: &String| setup.addresses(name).iter().any(|at| allowed.contains(&at.as_str()));
            let all_well =
                connected.failed == 0 && !connected.reached.is_empty() && connected.reached.iter().all(is_one);
            all_well && (counted.connections, counted.drops.len()) == (ATTEMPTS, 0)
        }
        Some("rejected") => {
            let refused =
                connected.errnos.len() as u64 == ATTEMPTS && connected.errnos.iter().all(|errno| *errno == 111);
            refused && counted.connections == 0 && counted.drops == BTreeMap::from([(reason()?, ATTEMPTS)])
        }
        // The kernel retransmits the SYN, so the count is not compared.
        Some("dropped") => {
            let reasons: Vec<_> = counted.drops.keys().copied().collect();
            connected.reached.is_empty() && counted.connections == 0 && reasons == [reason()?]
        }
        _ => connected.reached.is_empty() && counted.connections == 0 && counted.drops.is_empty(),
    })
}

fn label(text: &str) -> Result<&'static str> {
    let mut labels = DropReason::ALL.iter().map(|reason| reason.label());
    labels
        .find(|label| *label == text)
        .with_context(|| format!("no drop reason has the label {text}"))
}

struct Setup {
    agent: RunningAgent,
    manifests: Manifests,
    client: Pod,
    pods: Vec<Pod>,
    _servers: Vec<Process>,
    cluster: Cluster,
}

/// Creates a node with a client and three pods that serve TCP and UDP on port 8080, and an outside client. `text`
/// returns the manifests for the agent.
fn setup(text: impl FnOnce(&[Pod]) -> Result<String>, flags: &[&str]) -> Result<Setup> {
    let cluster = Cluster::builder().nodes(1).client(true).build()?;
    let client = cluster.add_pod("n1", "client")?;
    let pods = ["a", "b", "c"].map(|name| cluster.add_pod("n1", name));
    let pods = pods.into_iter().collect::<Result<Vec<_>>>()?;
    let mut servers = Vec::new();
    for pod in &pods {
        let name = pod.name();
        servers.push(testbed().serve(pod, &[&format!("[::]:8080={name}")])?);
        let both = [pod.socket(8080), pod.socket6(8080)].map(|at| format!("{at}={name}"));
        servers.push(testbed().serve_datagrams(pod, &both.each_ref().map(String::as_str))?);
    }
    let manifests = Manifests::new(&cluster)?;
    manifests.write("all.yaml", &text(&pods)?)?;
    let agent = manifests.serve(&cluster, "n1", flags)?;
    Ok(Setup {
        agent,
        manifests,
        client,
        pods,
        _servers: servers,
        cluster,
    })
}

impl Setup {
    fn maps(&self) -> Result<PinnedMaps> {
        Ok(PinnedMaps::open(&PinPath::new(self.agent.pin_path()).maps())?)
    }

    fn node(&self) -> &Node {
        self.cluster.node("n1")
    }

    /// Returns the addresses at which the pod with this name serves.
    fn addresses(&self, name: &str) -> Vec<String> {
        let pods = self.pods.iter().filter(|pod| pod.name() == name);
        pods.flat_map(|pod| [pod.socket(8080), pod.socket6(8080)].map(|at| at.to_string()))
            .collect()
    }
}

/// Destination of a row of [`ROWS`].
#[derive(Debug, Clone, Copy)]
enum To {
    ClusterIp,
    ExternalIp,
    Balancer,
    Node,
    OtherNode,
    Loopback,
    Zero,
}

impl To {
    fn address(self, n: u8, v6: bool, node: &Node) -> IpAddr {
        let v4 = |octets: [u8; 4]| IpAddr::from(octets);
        let six = |groups: [u16; 3]| {
            let [a, b, c] = groups;
            IpAddr::from([a, b, c, 0, 0, 0, 0, u16::from(n)])
        };
        match (self, v6) {
            (Self::ClusterIp, false) => v4([10, 96, 1, n]),
            (Self::ClusterIp, true) => six([0xfd00, 0x96, 1]),
            (Self::ExternalIp, false) => v4([198, 51, 100, n]),
            (Self::ExternalIp, true) => six([0x2001, 0xdb8, 1]),
            (Self::Balancer, false) => v4([192, 0, 2, n]),
            (Self::Balancer, true) => six([0x2001, 0xdb8, 2]),
            (Self::Node, false) => node.address().into(),
            (Self::Node, true) => node.address6().into(),
            // An address in no network of the cluster.
            (Self::OtherNode, false) => v4([203, 0, 113, n]),
            (Self::OtherNode, true) => six([0x2001, 0xdb8, 3]),
            (Self::Loopback, false) => v4([127, 0, 0, 1]),
            (Self::Loopback, true) => std::net::Ipv6Addr::LOCALHOST.into(),
            (Self::Zero, false) => v4([0; 4]),
            (Self::Zero, true) => std::net::Ipv6Addr::UNSPECIFIED.into(),
        }
    }
}

/// The Services of [`ROWS`]: additions to the spec, and endpoints as pairs of pod name and node name.
const SERVICES: [(&str, &[(&str, &str)]); 6] = [
    ("", &[("a", "n1"), ("b", "n2")]),
    ("\n  internalTrafficPolicy: Local", &[("a", "n1"), ("b", "n2")]),
    (
        "\n  internalTrafficPolicy: Local\n  externalTrafficPolicy: Local",
        &[("b", "n2")],
    ),
    ("", &[]),
    (
        "\n  loadBalancerSourceRanges: [203.0.113.0/24, \"2001:db8:ffff::/48\"]",
        &[("a", "n1")],
    ),
    (
        "\n  sessionAffinity: ClientIP",
        &[("a", "n1"), ("b", "n2"), ("c", "n1")],
    ),
];

/// Rows of destination, number of the Service (from 1), port, expected result in a pod, expected result on the node.
const ROWS: &[(To, u8, u16, &str, &str)] = &[
    (To::ClusterIp, 1, 80, "ClusterIP connects", "ClusterIP connects"),
    (To::ClusterIp, 1, 81, NO_PORT, NO_PORT),
    (To::ClusterIp, 2, 80, "ClusterIP connects", "ClusterIP connects"),
    (To::ClusterIp, 3, 80, "ClusterIP EHOSTUNREACH", "ClusterIP EHOSTUNREACH"),
    (To::ClusterIp, 4, 80, "ClusterIP ECONNREFUSED", "ClusterIP ECONNREFUSED"),
    (To::ClusterIp, 5, 80, "ClusterIP connects", "ClusterIP connects"),
    (To::ClusterIp, 6, 80, "ClusterIP connects", "ClusterIP connects"),
    (To::ExternalIp, 1, 80, "ExternalIP connects", "ExternalIP connects"),
    (To::ExternalIp, 1, 81, NONE, NONE),
    (To::ExternalIp, 3, 80, "ExternalIP connects", "ExternalIP connects"),
    (
        To::ExternalIp,
        4,
        80,
        "ExternalIP ECONNREFUSED",
        "ExternalIP ECONNREFUSED",
    ),
    (To::Balancer, 1, 80, "LoadBalancer connects", "LoadBalancer connects"),
    // The socket hook does not know the source address, so source ranges are enforced by the packet path.
    (To::Balancer, 5, 80, "LoadBalancer untouched", "LoadBalancer untouched"),
    (To::Node, 1, 30001, "NodePort connects", "NodePort connects"),
    (To::Node, 3, 30003, "NodePort connects", "NodePort connects"),
    (To::Node, 4, 30004, "NodePort ECONNREFUSED", "NodePort ECONNREFUSED"),
    (To::Node, 1, 80, NONE, NONE),
    (To::OtherNode, 1, 30001, NONE, NONE),
    // Loopback in a pod is the pod's own.
    (To::Loopback, 1, 30001, NONE, "NodePort connects"),
    (To::Loopback, 4, 30004, NONE, "NodePort ECONNREFUSED"),
    (To::Loopback, 1, 80, NONE, NONE),
    (To::Zero, 1, 30001, NONE, "NodePort connects"),
];

const NONE: &str = "no frontend, untouched";
const NO_PORT: &str = "no frontend, ECONNREFUSED";

/// Returns [`SERVICES`] as manifests: dual-stack, one port in TCP and UDP.
fn services(pods: &[Pod]) -> String {
    let mut text = String::new();
    for ((more, endpoints), n) in SERVICES.iter().zip(1_u8..) {
        let (name, node_port) = (format!("s{n}"), 30000 + u16::from(n));
        let ports = [
            Port::tcp("tcp", 80).on_nodes(node_port),
            Port::udp("udp", 80).on_nodes(node_port),
        ];
        let spec = format!("type: LoadBalancer\n  externalIPs: [198.51.100.{n}, \"2001:db8:1::{n}\"]{more}");
        let manifest = service(&name, &format!("10.96.1.{n},fd00:96:1::{n}"), &ports, &spec);
        text += manifest.trim_end_matches("---\n");
        text += &format!(
            "status: {{loadBalancer: {{ingress: [{{ip: 192.0.2.{n}}}, {{ip: \"2001:db8:2::{n}\"}}]}}}}\n---\n"
        );
        let find = |name| pods.iter().find(|pod| pod.name() == name);
        let found: Vec<_> = endpoints
            .iter()
            .filter_map(|(name, node)| Some((find(*name)?, *node)))
            .collect();
        for port in [Port::tcp("tcp", 8080), Port::udp("udp", 8080)] {
            let four: Vec<(IpAddr, &str)> = found.iter().map(|(pod, node)| (pod.address().into(), *node)).collect();
            let six: Vec<(IpAddr, &str)> = found.iter().map(|(pod, node)| (pod.address6().into(), *node)).collect();
            text += &slice(&name, port, &four);
            if !six.is_empty() {
                text += &slice(&name, port, &six);
            }
        }
    }
    text
}

/// Returns a result of `explain` in the notation of [`ROWS`].
fn short_form(answer: &Value) -> String {
    let outcome = &answer["outcome"];
    let end = outcome["errno"].as_str().or(outcome["result"].as_str()).unwrap_or("?");
    match answer["frontend"]["kind"].as_str() {
        Some(kind) => format!("{kind} {end}"),
        None => format!("no frontend, {end}"),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
    /// IPv4 address in v4-mapped notation on an IPv6 socket.
    Mapped,
}

impl Family {
    fn write(self, address: IpAddr) -> IpAddr {
        match (self, address) {
            (Self::Mapped, IpAddr::V4(v4)) => v4.to_ipv6_mapped().into(),
            (Self::V4 | Self::V6 | Self::Mapped, _) => address,
        }
    }
}

/// Checks all rows, from the client pod and from the node.
fn check_every_row(proto: Protocol, family: Family) -> Result<()> {
    let setup = setup(|pods| Ok(services(pods)), &[])?;
    let maps = setup.maps()?;
    let (pod, node) = (Client::new(&setup.client)?, Client::new(setup.node())?);
    for (to, n, port, expected_in_pod, expected_on_node) in ROWS {
        let at = SocketAddr::new(family.write(to.address(*n, family == Family::V6, setup.node())), *port);
        for (client, expected) in [(&pod, expected_in_pod), (&node, expected_on_node)] {
            let answer = compare(&setup, &maps, client, proto, at)?;
            assert_eq!(
                short_form(&answer),
                **expected,
                "{to:?} {at} from {}: {answer:#}",
                client.netns.name()
            );
            if !answer["set"].is_null() {
                // Every backend is listed, each with a reason.
                let candidates = answer["candidates"].as_array().context("no candidates")?;
                let reasons = candidates.iter().filter_map(|it| it["why"].as_str());
                let endpoints = SERVICES[usize::from(n - 1)].1.len();
                assert_eq!(reasons.filter(|why| !why.is_empty()).count(), endpoints, "{answer:#}");
            }
        }
    }
    Ok(())
}

#[test]
fn explain_matches_tcp_connect_over_ipv4() -> Result<()> {
    check_every_row(Protocol::Tcp, Family::V4)
}

#[test]
fn explain_matches_udp_connect_over_ipv4() -> Result<()> {
    check_every_row(Protocol::Udp, Family::V4)
}

#[test]
fn explain_matches_tcp_connect_over_ipv6() -> Result<()> {
    check_every_row(Protocol::Tcp, Family::V6)
}

#[test]
fn explain_matches_udp_connect_over_ipv6() -> Result<()> {
    check_every_row(Protocol::Udp, Family::V6)
}

#[test]
fn explain_matches_tcp_connect_over_v4_mapped() -> Result<()> {
    check_every_row(Protocol::Tcp, Family::Mapped)
}

#[test]
fn explain_matches_udp_connect_over_v4_mapped() -> Result<()> {
    check_every_row(Protocol::Udp, Family::Mapped)
}

#[test]
fn explain_matches_connect_for_random_services() -> Result<()> {
    const ROUNDS: usize = 2;
    const SERVICES: u8 = 3;
    let mut random = Random::from_env();
    let mut setup = setup(|_| one(false, 3), &[])?;
    let maps = setup.maps()?;
    let node = setup.node().address();
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for round in 0..ROUNDS {
        let services: Vec<_> = (1..=SERVICES)
            .map(|n| Service::random(n, &setup.pods, &mut random))
            .collect();
        let text = services.iter().map(Service::manifest).collect::<Result<String>>()?;
        println!("round {round}\n{text}");
        setup.manifests.write("all.yaml", &text)?;
        setup.agent.wait_ready(&|| false)?;
        for netns in [&setup.client as &Netns, setup.node()] {
            let client = Client::new(netns)?;
            for (service, to) in services
                .iter()
                .flat_map(|service| service.destinations(node).into_iter().map(move |to| (service, to)))
            {
                let answer = compare(&setup, &maps, &client, Protocol::Tcp, to)?;
                *seen.entry(short_form(&answer)).or_default() += 1;
                if answer["outcome"]["result"] != "connects" {
                    continue;
                }
                // With affinity, later connections reach the backend of the first ones.
                let again = compare(&setup, &maps, &client, Protocol::Tcp, to)?;
                ensure!(again["affinity"].is_object() == service.affinity, "{again:#}");
                if service.affinity {
                    let remaining = again["affinity"]["remaining"].as_u64();
                    ensure!(
                        remaining.is_some_and(|left| (10_000..=10_800).contains(&left)),
                        "{again:#}"
                    );
                    ensure!(backends(&again).len() == 1, "{again:#}");
                } else {
                    ensure!(backends(&again) == backends(&answer), "{again:#}");
                }
            }
        }
    }
    println!("{seen:#?}");
    assert!(seen.contains_key(NO_PORT) && seen.contains_key(NONE), "{seen:?}");
    Ok(())
}

/// Returns a Service `s1` with every pod as endpoint on this node.
fn one(affinity: bool, pods: usize) -> Result<String> {
    let endpoints = (3..).take(pods).map(|octet| (format!("10.10.1.{octet}"), "n1", false));
    let service = Service {
        n: 1,
        endpoints: endpoints.collect(),
        local: false,
        affinity,
        source_ranges: false,
    };
    service.manifest()
}

#[test]
fn explain_distinguishes_pod_node_and_outside_clients() -> Result<()> {
    let setup = setup(|_| one(false, 3), &["--socket-lb", "node"])?;
    let maps = setup.maps()?;
    let to: SocketAddr = "10.96.1.1:80".parse()?;
    let (pod, node) = (Client::new(&setup.client)?, Client::new(setup.node())?);
    // A lower address than that of the pod's device; the kernel does not select it as source of outgoing packets.
    setup.client.add_address("10.0.0.1/32", "lo")?;
    let source = setup.client.address().to_string();
    let why = |answer: &Value| answer["outcome"]["why"].as_str().unwrap_or_default().to_owned();
    for proto in [Protocol::Tcp, Protocol::Udp] {
        let answer = compare(&setup, &maps, &pod, proto, to)?;
        assert!(why(&answer).contains("--socket-lb node"), "{answer:#}");
        assert_eq!(answer["client"]["on_node"], false);
        assert_eq!(answer["packets"]["from"], *source, "{answer:#}");
    }
    // Connections within the namespace have no packets that lb could see.
    for own in [&source, "127.0.0.1", "[::1]"] {
        let answer = pod.explain(&setup.agent, &format!("{own}:80"))?;
        assert!(answer["packets"].is_null(), "{answer:#}");
    }
    let answer = compare(&setup, &maps, &node, Protocol::Tcp, to)?;
    assert_eq!(
        (backends(&answer).len(), &answer["client"]["on_node"]),
        (3, &Value::from(true))
    );

    // A process in no node's cgroup.
    let outside = Client::new(setup.cluster.client())?;
    let answer = compare(&setup, &maps, &outside, Protocol::Tcp, to)?;
    assert_eq!(answer["client"]["below_cgroup"], false);
    assert!(why(&answer).contains("not below the served cgroup"), "{answer:#}");

    let from = |from: &str| -> Result<Value> { setup.agent.json(&["explain", "--from", from, "--to", "10.96.1.1:80"]) };
    // An outside client sends packets. At a cluster IP it may reach any endpoint.
    let answer = from("172.30.99.2")?;
    assert_eq!(backends(&answer).len(), 3, "{answer:#}");
    assert_eq!(answer["source"]["inside"], false, "{answer:#}");
    for address in [setup.node().address().to_string(), setup.node().address6().to_string()] {
        assert_eq!(backends(&from(&address)?).len(), 3, "{address}");
    }
    assert!(from("4194305").is_err_and(|error| error.to_string().contains("no process")));

    // The table output, for UDP, a protocol that this Service does not have.
    let id = node.process.id().to_string();
    let text = setup
        .agent
        .output(&["explain", "--from", &id, "--to", "10.96.1.1:80/udp"])?;
    assert!(text.contains("connect()  fails with ECONNREFUSED"), "{text}");
    assert!(text.contains("10.96.1.1 has 80/TCP (default/s1:80)"), "{text}");
    Ok(())
}

#[test]
fn affinity_list_shows_clients_and_marks_removed_backends() -> Result<()> {
    let mut setup = setup(|_| one(true, 3), &[])?;
    let list = |setup: &Setup| -> Result<Vec<Value>> { setup.agent.json(&["affinity", "list"]) };
    assert!(list(&setup)?.is_empty());
    let to: SocketAddr = "10.96.1.1:80".parse()?;
    let summary = testbed().connect(&setup.client, &Connect::to(&[to]).count(10))?;
    summary.all_well()?;
    let (name, count) = summary.per_backend.first_key_value().context("no server answered")?;
    assert_eq!(*count, 10);
    let rows = list(&setup)?;
    assert_eq!(rows.len(), 1);
    let row = &rows[0];
    assert!(setup.addresses(name).iter().any(|at| row["backend"] == **at), "{row:#}");
    assert_eq!(
        (&row["state"], &row["holds"], &row["name"]),
        (&"holds".into(), &true.into(), &"s1".into())
    );
    let client = Client::new(&setup.client)?;
    let answer = client.explain(&setup.agent, "10.96.1.1:80")?;
    assert_eq!(answer["client"]["netns"], row["netns"]);
    // 10,800 s, the default of Kubernetes.
    let remaining = row["remaining"].as_u64().context("remaining")?;
    assert!((10_000..=10_800).contains(&remaining), "{row:#}");

    // The client's backend is removed.
    let pods: Vec<_> = setup.pods.iter().filter(|pod| pod.name() != name).collect();
    let endpoints = pods
        .iter()
        .map(|pod| (pod.address().to_string(), "n1", false))
        .collect();
    let others = Service {
        n: 1,
        endpoints,
        local: false,
        affinity: true,
        source_ranges: false,
    };
    setup.manifests.write("all.yaml", &others.manifest()?)?;
    setup.agent.wait_ready(&|| false)?;
    let deadline = std::time::Instant::now() + scaled_timeout(Duration::from_secs(10));
    while list(&setup)?.first().is_none_or(|row| row["state"] != "backend gone") {
        ensure!(std::time::Instant::now() < deadline, "{:?}", list(&setup)?);
        std::thread::sleep(Duration::from_millis(20));
    }
    let answer = client.explain(&setup.agent, "10.96.1.1:80")?;
    assert_eq!(
        (backends(&answer).len(), &answer["affinity"]["holds"]),
        (2, &false.into())
    );
    Ok(())
}
