//! The packet path: clients outside the cluster, and those that no socket hook sees.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use lb_tests::manifests::{Manifests, Port, service, slice};
use lb_tests::puppet::plain;
use lb_tests::{Answer, Call, Cluster, Kind, Node, Place, Pod, Process, Running, Testbed, Underlay, patience};

const BED: &str = env!("CARGO_BIN_EXE_lb-testbed");
const ECONNREFUSED: i32 = 111;
/// The node port of streams, and that of datagrams.
const WEB: u16 = 30080;
const DNS: u16 = 30053;
const TARGET: [u16; 2] = [8080, 5353];

fn bed() -> Testbed {
    Testbed::new(BED)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Servers of streams and datagrams on all addresses of a place, which tell a name and the address that they see.
fn serve(place: &Place, name: &str, [tcp, udp]: [u16; 2]) -> Result<[Process; 2]> {
    let tell = ["--tell-source"];
    Ok([
        bed().serve_with(place, &[&format!("[::]:{tcp}={name}")], &tell)?,
        bed().serve_datagrams_with(place, &[&format!("[::]:{udp}={name}")], &tell)?,
    ])
}

/// What a client gets: who answers, and whom that saw; or an errno.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Got {
    Served { by: String, seen: IpAddr },
    Failed(i32),
}

/// Asks once, from a new socket, by TCP or UDP.
fn ask(from: &Place, udp: bool, to: SocketAddr) -> Result<Got> {
    let kind = match (udp, to.is_ipv4()) {
        (false, true) => Kind::Tcp4,
        (false, false) => Kind::Tcp6,
        (true, true) => Kind::Udp4,
        (true, false) => Kind::Udp6,
    };
    let mut socket = bed().puppet(from, kind)?;
    if let Answer::Failed(errno) = socket.call(&Call::Connect(to))? {
        return Ok(Got::Failed(errno));
    }
    if udp {
        socket.send("hello")?;
    }
    match socket.call(&Call::Receive)? {
        Answer::Received(by, text) => {
            ensure!(
                by.is_none_or(|by| plain(by) == plain(to)),
                "{to} was asked, {by:?} answered"
            );
            let mut words = text.split_whitespace();
            let (Some(by), Some(seen)) = (words.next(), words.next()) else {
                bail!("{text:?}");
            };
            Ok(Got::Served {
                by: by.to_owned(),
                seen: seen.parse::<IpAddr>().context("an address")?.to_canonical(),
            })
        }
        Answer::Failed(errno) => Ok(Got::Failed(errno)),
        other => bail!("{other:?}"),
    }
}

/// All that answer at an address and the sources that they see, asked often.
fn all(from: &Place, udp: bool, to: SocketAddr, times: usize) -> Result<BTreeSet<Got>> {
    (0..times).map(|_| ask(from, udp, to)).collect()
}

/// Two nodes with an agent each, a client outside, and a pod on each node.
struct Setup {
    agents: [Running; 2],
    manifests: Manifests,
    pods: [Pod; 2],
    _servers: Vec<Process>,
    cluster: Cluster,
}

impl Setup {
    fn new(underlay: Underlay) -> Result<Self> {
        Self::with(underlay, 1, &[])
    }

    fn with(underlay: Underlay, clients: u8, flags: &[&str]) -> Result<Self> {
        let cluster = Cluster::builder()
            .nodes(2)
            .clients(clients)
            .underlay(underlay)
            .build()?;
        let pods = [cluster.add_pod("n1", "one")?, cluster.add_pod("n2", "two")?];
        let mut servers = Vec::new();
        for pod in &pods {
            servers.extend(serve(pod, pod.name(), TARGET)?);
        }
        let manifests = Manifests::new(&cluster)?;
        let mut text = String::new();
        for node in cluster.nodes() {
            text += &format!(
                "apiVersion: v1\nkind: Node\nmetadata: {{name: {}}}\nspec: {{podCIDRs: [\"{}/24\", \"{}/64\"]}}\nstatus: \
                 {{addresses: [{{type: InternalIP, address: \"{}\"}}, {{type: InternalIP, address: \"{}\"}}]}}\n---\n",
                node.name(),
                node.pod_network(),
                node.pod_network6(),
                node.address(),
                node.address6()
            );
        }
        manifests.write("nodes.yaml", &text)?;
        let agents = [
            manifests.serve(&cluster, "n1", BED.as_ref(), flags)?,
            manifests.serve(&cluster, "n2", BED.as_ref(), flags)?,
        ];
        Ok(Self {
            agents,
            manifests,
            pods,
            _servers: servers,
            cluster,
        })
    }

    fn node(&self, name: &str) -> &Node {
        self.cluster.node(name)
    }

    fn client(&self) -> &Place {
        self.cluster.client()
    }

    /// Writes a manifest, and waits until both agents have applied it.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let applies = |agent: &Running| anyhow::Ok(agent.status()?.agent.applies);
        let before = [applies(&self.agents[0])?, applies(&self.agents[1])?];
        self.manifests.write(name, text)?;
        let deadline = Instant::now() + patience(Duration::from_secs(10));
        for (agent, before) in self.agents.iter().zip(before) {
            while applies(agent)? == before {
                ensure!(Instant::now() < deadline, "{name} is not applied");
                sleep(Duration::from_millis(20));
            }
        }
        self.agents.iter().try_for_each(|agent| agent.verify())
    }

    /// Both pods, in both families, as endpoints.
    fn endpoints(&self) -> Vec<(IpAddr, &str)> {
        self.pods.iter().flat_map(of).collect()
    }

    fn dropped(&self, reason: &str) -> Result<u64> {
        let all = self.agents.iter().map(|agent| agent.status()?.dropped(reason));
        all.sum()
    }
}

/// A pod as endpoints.
fn of(pod: &Pod) -> [(IpAddr, &str); 2] {
    [(pod.address().into(), pod.node()), (pod.address6().into(), pod.node())]
}

/// A Service with node ports in both families and both protocols.
fn web(endpoints: &[(IpAddr, &str)], more: &str) -> String {
    web_at("web", 20, [WEB, DNS], endpoints, more)
}

fn web_at(name: &str, last: u8, [tcp, udp]: [u16; 2], endpoints: &[(IpAddr, &str)], more: &str) -> String {
    let ports = [Port::tcp("web", 80).on_nodes(tcp), Port::udp("dns", 53).on_nodes(udp)];
    let mut text = service(name, &format!("10.96.0.{last},fd00:96::{last}"), &ports, more);
    for port in [Port::tcp("web", TARGET[0]), Port::udp("dns", TARGET[1])] {
        for v6 in [false, true] {
            let family: Vec<_> = endpoints.iter().filter(|(ip, _)| ip.is_ipv6() == v6).copied().collect();
            // Without endpoints, one slice.
            if !v6 || !family.is_empty() {
                text += &slice(name, port, &family);
            }
        }
    }
    text
}

fn by(got: &BTreeSet<Got>) -> BTreeSet<&str> {
    got.iter()
        .map(|got| match got {
            Got::Served { by, .. } => by.as_str(),
            Got::Failed(_) => "nobody",
        })
        .collect()
}

/// The addresses of a node that a client outside reaches.
fn outer(node: &Node) -> [IpAddr; 2] {
    [node.address().into(), node.address6().into()]
}

fn an_outside_client_reaches_all(underlay: Underlay) -> Result<()> {
    let setup = Setup::new(underlay)?;
    setup.write("web.yaml", &web(&setup.endpoints(), "type: NodePort"))?;
    for node in setup.cluster.nodes() {
        for address in outer(node) {
            for (udp, port) in [(false, WEB), (true, DNS)] {
                let to = SocketAddr::new(address, port);
                let got = all(setup.client(), udp, to, 40)?;
                assert_eq!(by(&got), BTreeSet::from(["one", "two"]), "{to} udp={udp}: {got:?}");
                for got in got {
                    let Got::Served { by, seen } = got else { continue };
                    let is_client = seen == IpAddr::from(setup.cluster.client().address())
                        || seen == IpAddr::from(setup.cluster.client().address6());
                    let here = (by == "one") == (node.name() == "n1");
                    assert_eq!(is_client, here, "{by} at {to} udp={udp} saw {seen}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn an_outside_client_reaches_pods_of_all_nodes_over_vxlan() -> Result<()> {
    an_outside_client_reaches_all(Underlay::Vxlan)
}

#[test]
fn an_outside_client_reaches_pods_of_all_nodes_by_plain_routes() -> Result<()> {
    an_outside_client_reaches_all(Underlay::Routes)
}

#[test]
fn who_is_served_by_what() -> Result<()> {
    let setup = Setup::new(Underlay::Vxlan)?;
    let [one, two] = &setup.pods;
    let (client4, client6): (IpAddr, IpAddr) = (
        setup.cluster.client().address().into(),
        setup.cluster.client().address6().into(),
    );
    // A server of the second node itself.
    let host = setup.node("n2");
    let _host = serve(host, "host", TARGET)?;
    let on_host = [(IpAddr::from(host.address()), "n2"), (host.address6().into(), "n2")];
    let external = "externalIPs: [\"203.0.113.7\", \"2001:db8:7::7\"]";
    let texts = [
        web_at(
            "local",
            21,
            [30081, 30054],
            &of(two),
            "type: NodePort\n  externalTrafficPolicy: Local",
        ),
        web_at("none", 22, [30082, 30055], &[], "type: NodePort"),
        web_at("host", 23, [30083, 30056], &on_host, "type: NodePort"),
        web_at("external", 24, [30084, 30057], &of(one), external),
        web_at(
            "narrow",
            25,
            [30085, 30058],
            &of(two),
            &format!("type: LoadBalancer\n  loadBalancerSourceRanges: [\"{client4}/32\", \"{client6}/127\"]"),
        )
        .replacen(
            "---\n",
            "status: {loadBalancer: {ingress: [{ip: 203.0.113.8}, {ip: \"2001:db8:7::8\"}]}}\n---\n",
            1,
        ),
    ];
    setup.write("web.yaml", &texts.concat())?;
    let client = setup.client();
    // External addresses are on no machine; the first node is the way to them.
    client.ip(&format!("route add 203.0.113.0/24 via {}", setup.node("n1").address()))?;
    client.ip(&format!(
        "route add 2001:db8:7::/64 via {}",
        setup.node("n1").address6()
    ))?;
    let served = |by: &str, seen: Option<IpAddr>, got: Got, what: &str| -> Result<()> {
        let Got::Served { by: is, seen: saw } = &got else {
            bail!("{what}: {got:?}, not served by {by}");
        };
        ensure!(
            is == by && seen.is_none_or(|seen| seen == *saw),
            "{what}: {got:?}, not {by} {seen:?}"
        );
        Ok(())
    };
    for (v6, client_address) in [(false, client4), (true, client6)] {
        let pick = |node: &str| outer(setup.node(node))[usize::from(v6)];
        for udp in [false, true] {
            let at = |address: IpAddr, tcp: u16, dns: u16| SocketAddr::new(address, if udp { dns } else { tcp });
            let what = format!("v6={v6} udp={udp}");
            // Local: on the node that has it, with the client's address; on the other, silence.
            let got = ask(client, udp, at(pick("n2"), 30081, 30054))?;
            served("two", Some(client_address), got, &what)?;
            // No endpoint anywhere.
            for node in ["n1", "n2"] {
                let got = ask(client, udp, at(pick(node), 30082, 30055))?;
                assert_eq!(got, Got::Failed(ECONNREFUSED), "{what}");
            }
            // A server of a node, by that node and by another.
            served(
                "host",
                Some(client_address),
                ask(client, udp, at(pick("n2"), 30083, 30056))?,
                &what,
            )?;
            served("host", None, ask(client, udp, at(pick("n1"), 30083, 30056))?, &what)?;
            // External addresses, and a port that they do not have.
            let external = ip(if v6 { "2001:db8:7::7" } else { "203.0.113.7" });
            served(
                "one",
                Some(client_address),
                ask(client, udp, at(external, 80, 53))?,
                &what,
            )?;
            assert_eq!(
                ask(client, udp, at(external, 81, 54))?,
                Got::Failed(ECONNREFUSED),
                "{what}"
            );
            // A load balancer's address for some clients.
            let balancer = ip(if v6 { "2001:db8:7::8" } else { "203.0.113.8" });
            let got = ask(client, udp, at(balancer, 80, 53))?;
            served("two", None, got, &format!("{what} load balancer"))?;
            // Not for a pod of the first node, nor for the node.
            let got = ask(one, udp, at(balancer, 80, 53))?;
            assert!(!matches!(got, Got::Served { .. }), "{what}: {got:?}");
        }
    }
    assert!(setup.dropped("source_not_allowed")? > 0);
    assert!(setup.dropped("no_such_port")? >= 4);
    for agent in &setup.agents {
        agent.verify()?;
    }
    Ok(())
}
