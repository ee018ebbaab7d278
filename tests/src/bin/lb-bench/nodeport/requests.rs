//! Requests of a client outside the cluster to a node port: directly, through lb, and through kube-proxy's rules, in turn.
//!
//! Each way has a node of its own with a pod on it; all ways share the pod on another node. Client and servers share one
//! processor, so the number of requests per second reflects the whole work for one request, and no waiting.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use lb_common::abi::DropReason;
use lb_core::model::Protocol;
use lb_tests::manifests::{self, Manifests, Port};
use lb_tests::{Cluster, Netns, Node, Pod, Process, Random, RunningAgent, Underlay};
use serde::Serialize;

use super::http::{self, Client, Order};
use crate::connect::kube_proxy::{self, NodePort};
use crate::numbers::{Quartiles, median, percentile};
use crate::objects::{BACKEND_PORT, Family, Services};
use crate::scenario::shuffled;
use crate::testbed::Way;

/// Requests of one turn: with a new connection each, and over kept connections.
const FRESH: u32 = 100;
const KEPT: u32 = 2000;

/// Node ports of a Service with its backend on the node, and of one with its backend on another node.
const HERE: u16 = 30080;
const THERE: u16 = 30081;
/// SNAT ports, more than the default, because the connections to one backend in a short time need them.
const SNAT_PORTS: &str = "32768-65535";

const WAYS: [Way; 5] = [
    Way::Direct,
    Way::DirectAgain,
    Way::Lb,
    Way::KubeProxyNftables,
    Way::KubeProxyIptables,
];

/// Kind of request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(crate) struct RequestKind {
    pub(crate) family: Family,
    /// True for a new connection per request.
    pub(crate) fresh: bool,
    /// True if the backend is on another node than the one that receives the request.
    pub(crate) elsewhere: bool,
}

impl RequestKind {
    fn all() -> impl Iterator<Item = Self> {
        let kinds = [(true, false), (true, true), (false, false), (false, true)];
        Family::ALL.into_iter().flat_map(move |family| {
            kinds.map(|(fresh, elsewhere)| Self {
                family,
                fresh,
                elsewhere,
            })
        })
    }

    pub(crate) fn label(self) -> String {
        let connection = if self.fresh { "new" } else { "kept" };
        let place = if self.elsewhere { "elsewhere" } else { "here" };
        format!("{connection} connections, backend {place}")
    }
}

/// Rate and latency of requests on one way.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Requests {
    pub(crate) way: Way,
    #[serde(flatten)]
    pub(crate) kind: RequestKind,
    /// Requests per second, median of the rounds.
    pub(crate) rate: f64,
    /// Microseconds of a request, median (`p50`) and 99th percentile (`p99`).
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    /// Rate of a round divided by that of [`Way::Direct`] in the same round.
    pub(crate) of_direct: Quartiles,
    /// Rate of [`Way::Lb`] divided by that of this way in the same round.
    pub(crate) lb_to_this: Quartiles,
}

#[derive(Debug, Default)]
struct Rounds {
    /// Nanoseconds.
    times: Vec<u32>,
    rates: Vec<f64>,
}

/// Nodes with servers; lb runs on one of them.
pub(crate) struct TestBed {
    client: Client,
    _servers: Vec<Process>,
    agent: RunningAgent,
    pods: Vec<(Way, Pod)>,
    far: Pod,
    /// Last field, so that the cluster is dropped after everything in it.
    cluster: Cluster,
}

/// Returns the name of a way's node; the last node has the pod of `elsewhere`.
fn node(way: Way) -> &'static str {
    match way {
        Way::Lb => "n1",
        Way::KubeProxyNftables => "n2",
        Way::KubeProxyIptables => "n3",
        Way::Direct | Way::DirectAgain | Way::C => "n4",
    }
}

const FAR: &str = "n5";

impl TestBed {
    /// Creates the bed with `services` other Services.
    pub(crate) fn new(services: u32) -> Result<Self> {
        let cluster = Cluster::builder()
            .nodes(5)
            .client(true)
            .underlay(Underlay::Routes)
            .build()?;
        let ways = WAYS.into_iter().filter(|way| *way != Way::DirectAgain);
        let pods = ways
            .map(|way| Ok((way, cluster.add_pod(node(way), "backend")?)))
            .collect::<Result<Vec<_>>>()?;
        let far = cluster.add_pod(FAR, "far")?;
        let servers = pods.iter().map(|(_, pod)| pod).chain([&far]);
        let servers = servers.map(|pod| http::serve(pod)).collect::<Result<_>>()?;
        for node in [node(Way::Direct), FAR] {
            let node = cluster.node(node);
            cluster.client().ip_batch(&[
                format!("route add {}/24 via {}", node.pod_network(), node.address()),
                format!("route add {}/64 via {}", node.pod_network6(), node.address6()),
            ])?;
        }
        for family in Family::ALL {
            let services = others(services, family);
            for (way, pod) in &pods {
                let ports = || node_ports(family, cluster.node(node(*way)), pod, &far);
                let place: &Netns = cluster.node(node(*way));
                match way {
                    Way::KubeProxyNftables => {
                        kube_proxy::load_nftables(place, services, &ports(), cluster.scratch())?;
                    }
                    Way::KubeProxyIptables => {
                        kube_proxy::load_iptables(place, services, &ports(), cluster.scratch())?;
                    }
                    Way::Direct | Way::DirectAgain | Way::Lb | Way::C => {}
                }
            }
        }
        let own = pods.iter().find(|(way, _)| *way == Way::Lb);
        let agent = start_lb(&cluster, services, &own.context("lb has a pod")?.1, &far)?;
        Ok(Self {
            client: Client::start(cluster.client())?,
            _servers: servers,
            agent,
            pods,
            far,
            cluster,
        })
    }

    /// Returns the destination of a request on one way.
    fn target(&self, way: Way, kind: RequestKind) -> Result<SocketAddr> {
        let direct = matches!(way, Way::Direct | Way::DirectAgain);
        if !direct {
            let port = if kind.elsewhere { THERE } else { HERE };
            let node = self.cluster.node(node(way));
            return Ok(SocketAddr::new(address(kind.family, node), port));
        }
        let own = self.pods.iter().find(|(way, _)| *way == Way::Direct);
        let pod = if kind.elsewhere {
            &self.far
        } else {
            &own.context("no pod")?.1
        };
        Ok(SocketAddr::new(pod_address(kind.family, pod), BACKEND_PORT))
    }

    /// Measures all kinds of requests on all ways.
    pub(crate) fn measure(&mut self, rounds: u32, mut tick: impl FnMut()) -> Result<Vec<Requests>> {
        let mut random = Random::new(1);
        let mut all = Vec::new();
        for kind in RequestKind::all() {
            let mut ways = WAYS.map(|_| Rounds::default());
            // The first round warms up and is not counted.
            for round in 0..=rounds {
                for at in shuffled(WAYS.len(), &mut random) {
                    let order = Order {
                        to: self.target(WAYS[at], kind)?,
                        requests: if kind.fresh { FRESH } else { KEPT },
                        fresh: kind.fresh,
                    };
                    let mut done = self
                        .client
                        .order(&order)
                        .with_context(|| format!("{}, {kind:?}", WAYS[at].label()))?;
                    if round > 0 {
                        ways[at].rates.push(f64::from(order.requests) / done.seconds);
                        ways[at].times.append(&mut done.times);
                    }
                }
                tick();
            }
            let rates = |way: Way| {
                let at = WAYS.iter().position(|one| *one == way);
                at.map(|at| ways[at].rates.clone()).unwrap_or_default()
            };
            let (direct, lb) = (rates(Way::Direct), rates(Way::Lb));
            for (way, mut found) in WAYS.into_iter().zip(ways) {
                found.times.sort_unstable();
                let pairs = |others: &[f64]| -> Vec<(f64, f64)> {
                    found.rates.iter().copied().zip(others.iter().copied()).collect()
                };
                all.push(Requests {
                    way,
                    kind,
                    of_direct: Quartiles::of(pairs(&direct).into_iter().map(|(own, direct)| own / direct)),
                    lb_to_this: Quartiles::of(pairs(&lb).into_iter().map(|(own, lb)| lb / own)),
                    p50: f64::from(percentile(&found.times, 50)) / 1e3,
                    p99: f64::from(percentile(&found.times, 99)) / 1e3,
                    rate: median(found.rates),
                });
            }
        }
        self.has_served()?;
        Ok(all)
    }

    /// Checks that lb dropped no packet for lack of room.
    fn has_served(&self) -> Result<()> {
        let status = self.agent.status()?;
        for reason in [
            DropReason::ConntrackFull,
            DropReason::SnatPortsExhausted,
            DropReason::NoRoute,
            DropReason::BackendGone,
            DropReason::RewriteFailed,
        ] {
            let count = status.dropped(reason.label())?;
            ensure!(count == 0, "{count} packets were dropped: {}", reason.text());
        }
        Ok(())
    }

    /// Removes the bed.
    pub(crate) fn take_down(mut self) -> Result<()> {
        self.agent.kill()?;
        self.agent.output(&["cleanup"]).map(drop)
    }
}

/// Returns the number of calls of `tick` by [`TestBed::measure`].
pub(crate) fn ticks(rounds: u32) -> u64 {
    RequestKind::all().count() as u64 * (u64::from(rounds) + 1)
}

fn others(services: u32, family: Family) -> Services {
    Services {
        number: services,
        endpoints: 10,
        family,
        protocol: Protocol::Tcp,
    }
}

fn address(family: Family, node: &Node) -> IpAddr {
    match family {
        Family::Ipv4 => node.address().into(),
        Family::Ipv6 => node.address6().into(),
    }
}

fn pod_address(family: Family, pod: &Pod) -> IpAddr {
    match family {
        Family::Ipv4 => pod.address().into(),
        Family::Ipv6 => pod.address6().into(),
    }
}

/// Returns the two Services in one family for kube-proxy's rules on a node.
fn node_ports(family: Family, node: &Node, own: &Pod, far: &Pod) -> [NodePort; 2] {
    let [here, there] =
        [("here", 250, HERE, own), ("there", 251, THERE, far)].map(|(name, last, port, pod)| NodePort {
            name: format!("default/{name}"),
            vip: match family {
                Family::Ipv4 => IpAddr::from([10, 97, 0, last]),
                Family::Ipv6 => IpAddr::from([0xfd00, 0x97, 0, 0, 0, 0, 0, last.into()]),
            },
            node: address(family, node),
            port,
            backend: pod_address(family, pod),
            is_local: pod.node() == node.name(),
        });
    [here, there]
}

/// Starts the agent on lb's node with the Services of all ways.
fn start_lb(cluster: &Cluster, services: u32, own: &Pod, far: &Pod) -> Result<RunningAgent> {
    let manifests = Manifests::new(cluster)?;
    others(services, Family::Ipv4).write_manifests(manifests.path())?;
    let mut text: String = cluster.nodes().iter().map(manifests::node).collect();
    for (name, last, port, pod) in [("here", 250, HERE, own), ("there", 251, THERE, far)] {
        let ips = format!("10.97.0.{last},fd00:97::{last:x}");
        let web = Port::tcp("http", 80).on_nodes(port);
        text += &manifests::service(name, &ips, &[web], "");
        let endpoints = Family::ALL.map(|family| (pod_address(family, pod), pod.node()));
        text += &manifests::slices(name, Port::tcp("http", BACKEND_PORT), &endpoints);
    }
    manifests.write("bench.yaml", &text)?;
    let sizes = ["--min-conntrack", "524288", "--min-conntrack-new", "131072"];
    let sizes = sizes
        .into_iter()
        .chain(["--min-backends", "32768", "--min-backend-slots", "65536"]);
    let flags: Vec<_> = sizes.chain(["--snat-ports", SNAT_PORTS]).collect();
    manifests.serve(cluster, node(Way::Lb), &flags)
}
