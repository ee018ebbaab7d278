//! The packet path next to the rules of a CNI: flannel's masquerading and forwarding, on nodes that filter bridged
//! packets (`br_netfilter`) and drop packets that nf_conntrack finds invalid.
//!
//! flannel masquerades packets of pods to destinations outside the pod networks, and packets from outside to pods of
//! *other* nodes. Packets that lb sends to another node skip the stack in both directions and have a source address of
//! this node, so no rule sees them. Packets that go up the stack to a local pod keep their client's address by
//! flannel's own rule, as they do with kube-proxy. Packets that a pod sends without a socket hook come by the bridge,
//! where nf_conntrack sees them before lb does: lb has the kernel receive them a second time.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lb_tests::fixture::{POD_PORTS, TwoNodeFixture, endpoints_of, node_addresses};
use lb_tests::manifests::{Port, ips, service, slices, vips, web_and_dns};
use lb_tests::{Netns, Node, Ruleset, Underlay, eventually, testbed};

/// Networks of all pods.
const PODS: [&str; 2] = ["10.10.0.0/16", "fd00:10:10::/48"];
const MULTICAST: [&str; 2] = ["224.0.0.0/4", "ff00::/8"];

/// Name of a Service, last part of its addresses, and its node ports.
type Web = (&'static str, u8, [u16; 2]);
const ONE: Web = ("one", 21, [30081, 30054]);
const TWO: Web = ("two", 22, [30082, 30055]);
const LOCAL: Web = ("local", 23, [30083, 30056]);
const HOST: Web = ("host", 24, [30084, 30057]);

/// Returns the rules that flannel 0.28 writes with `--ip-masq` and `--iptables-forward-rules`
/// (pkg/trafficmngr/iptables/iptables.go), on a node that forwards nothing else: docker sets the policy DROP, and many
/// firewalls drop invalid packets.
fn flannel_rules(all: &str, own: &str, multicast: &str) -> String {
    let comment = "-m comment --comment \"flanneld masq\"";
    format!(
        "*nat\n\
         :FLANNEL-POSTRTG - [0:0]\n\
         -A POSTROUTING {comment} -j FLANNEL-POSTRTG\n\
         -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 {comment} -j RETURN\n\
         -A FLANNEL-POSTRTG -s {own} -d {all} {comment} -j RETURN\n\
         -A FLANNEL-POSTRTG -s {all} -d {own} {comment} -j RETURN\n\
         -A FLANNEL-POSTRTG ! -s {all} -d {own} {comment} -j RETURN\n\
         -A FLANNEL-POSTRTG -s {all} ! -d {multicast} {comment} -j MASQUERADE --random-fully\n\
         -A FLANNEL-POSTRTG ! -s {all} -d {all} {comment} -j MASQUERADE --random-fully\n\
         COMMIT\n\
         *filter\n\
         :FORWARD DROP [0:0]\n\
         :FLANNEL-FWD - [0:0]\n\
         -A FORWARD -m conntrack --ctstate INVALID -j DROP\n\
         -A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n\
         -A FLANNEL-FWD -s {all} -m comment --comment \"flanneld forward\" -j ACCEPT\n\
         -A FLANNEL-FWD -d {all} -m comment --comment \"flanneld forward\" -j ACCEPT\n\
         COMMIT\n"
    )
}

fn install(node: &Node) -> Result<Ruleset> {
    let own = [
        format!("{}/24", node.pod_network()),
        format!("{}/64", node.pod_network6()),
    ];
    for (v6, program) in ["iptables-nft-restore", "ip6tables-nft-restore"]
        .into_iter()
        .enumerate()
    {
        let rules = flannel_rules(PODS[v6], &own[v6], MULTICAST[v6]);
        node.run_with_input(program, &[], &rules)?;
    }
    node.ruleset()
}

/// Sets whether rules see bridged packets, as they do on most Kubernetes nodes.
fn filter_bridge(node: &Node, filter: bool) -> Result<()> {
    ["iptables", "ip6tables"].into_iter().try_for_each(|family| {
        let key = format!("net/bridge/bridge-nf-call-{family}");
        node.sysctl(&key, if filter { "1" } else { "0" })
    })
}

fn services_work_beside_flannel_rules(underlay: Underlay) -> Result<()> {
    let testbed = testbed();
    // The socket hooks leave pods alone, so their packets pass lb and the rules.
    let fixture = TwoNodeFixture::with(underlay, 1, &["--socket-lb", "node"])?;
    let [n1, n2] = ["n1", "n2"].map(|name| fixture.node(name));
    let rules = [install(n1)?, install(n2)?];
    [n1, n2].into_iter().try_for_each(|node| filter_bridge(node, true))?;
    let [one, two] = &fixture.pods;
    let client_pod = fixture.cluster.add_pod("n1", "client")?;
    let _servers = [
        testbed.serve_both(n2, "host", POD_PORTS)?,
        testbed.serve_both(fixture.client(), "outside", POD_PORTS)?,
    ];
    let host = [(IpAddr::from(n2.address()), "n2"), (n2.address6().into(), "n2")];
    let web = |(name, last, ports): Web, endpoints: &[(IpAddr, &str)], more: &str| {
        web_and_dns(
            name,
            last,
            Some(ports),
            &format!("type: NodePort{more}"),
            endpoints,
            POD_PORTS,
        )
    };
    let text = web(ONE, &endpoints_of(one), "")
        + &web(TWO, &endpoints_of(two), "")
        + &web(LOCAL, &endpoints_of(two), "\n  externalTrafficPolicy: Local")
        + &web(HOST, &host, "");
    fixture.write("web.yaml", &text)?;

    let client = fixture.cluster.client();
    for (v6, client) in [client.address().into(), client.address6().into()]
        .into_iter()
        .enumerate()
    {
        let pick = |node: &Node| node_addresses(node)[v6];
        let pod = |pod: &lb_tests::Pod| endpoints_of(pod)[v6].0;
        let vip = |(_, last, _): Web| vips(last)[v6];
        // Source of the packets that the first node sends to the second.
        let sent_by_n1 = match (underlay, v6) {
            (Underlay::Vxlan, 0) => n1.pod_network().into(),
            (Underlay::Vxlan | Underlay::Routes, _) => pick(n1),
        };
        let gateway = [IpAddr::from(n1.gateway()), n1.gateway6().into()][v6];
        for udp in [false, true] {
            let ask = |from: &Netns, to: IpAddr, [tcp, datagrams]: [u16; 2], by: &str, seen: IpAddr| -> Result<()> {
                let to = SocketAddr::new(to, if udp { datagrams } else { tcp });
                let what = format!("{to} udp={udp} from {}", from.name());
                // Each attempt has a flow of its own; the second one meets the state that the first one left.
                (0..2).try_for_each(|_| fixture.request(from, udp, to)?.ensure_served_by(by, Some(seen), &what))
            };
            // The rules are in force.
            ask(one, client, POD_PORTS, "outside", pick(n1))?;
            // A pod on the requested node sees the client's address, with policy Cluster too.
            ask(fixture.client(), pick(n1), ONE.2, "one", client)?;
            ask(fixture.client(), pick(n2), TWO.2, "two", client)?;
            ask(fixture.client(), pick(n2), LOCAL.2, "two", client)?;
            // A backend elsewhere sees the node's address.
            ask(fixture.client(), pick(n1), TWO.2, "two", sent_by_n1)?;
            ask(fixture.client(), pick(n2), HOST.2, "host", client)?;
            ask(fixture.client(), pick(n1), HOST.2, "host", pick(n1))?;
            // lb translates the packets of pods, which come by their own bridge.
            let ports = [80, 53];
            ask(&client_pod, vip(ONE), ports, "one", gateway)?;
            ask(one, vip(ONE), ports, "one", gateway)?;
            // Up the stack: a pod sees the pod's address, and a node sees the address of the masquerading node.
            ask(&client_pod, vip(TWO), ports, "two", pod(&client_pod))?;
            ask(two, vip(ONE), ports, "one", pod(two))?;
            ask(&client_pod, vip(HOST), ports, "host", pick(n1))?;
        }
    }
    for (node, before) in [n1, n2].into_iter().zip(rules) {
        let after = node.ruleset()?;
        ensure!(before == after, "{}: {before} became {after}", node.name());
    }
    Ok(())
}

#[test]
fn services_work_beside_flannel_rules_over_vxlan() -> Result<()> {
    services_work_beside_flannel_rules(Underlay::Vxlan)
}

#[test]
fn services_work_beside_flannel_rules_over_routes() -> Result<()> {
    services_work_beside_flannel_rules(Underlay::Routes)
}

/// A bridged packet is received a second time, so a packet that is translated again and again must end at some point,
/// like a packet in a routing loop.
#[test]
fn translation_loop_between_services_ends_by_ttl() -> Result<()> {
    let fixture = TwoNodeFixture::with(Underlay::Routes, 1, &["--socket-lb", "node"])?;
    let [n1, n2] = ["n1", "n2"].map(|name| fixture.node(name));
    // Without these routes, packets would have nowhere to go.
    n1.ip_batch(&[
        format!("route add 10.96.0.0/24 via {}", n2.address()),
        format!("route add fd00:96::/64 via {}", n2.address6()),
    ])?;
    let mut text = String::new();
    for (name, last, other) in [("this", 31, 32), ("that", 32, 31)] {
        let port = Port::udp("dns", 53);
        text += &service(name, &ips(last), &[port], "");
        text += &slices(name, port, &vips(other).map(|vip| (vip, "n2")));
    }
    fixture.write("round.yaml", &text)?;
    let client_pod = fixture.cluster.add_pod("n1", "client")?;
    for (expired, vip) in (1..).zip(vips(31)) {
        client_pod.within(|| -> Result<()> {
            let socket = UdpSocket::bind((if vip.is_ipv4() { "0.0.0.0" } else { "::" }, 0))?;
            socket.send_to(b"round", (vip, 53)).map(drop).context("sending")
        })??;
        eventually(&format!("the packet to {vip} expires"), || {
            let number = fixture.dropped("ttl_exceeded")?;
            ensure!(number >= expired, "{number} packets have expired");
            Ok(())
        })?;
    }
    // Each packet ended once; none is still in the loop.
    sleep(Duration::from_millis(200));
    let expired = fixture.dropped("ttl_exceeded")?;
    ensure!(expired == 2, "{expired} packets have expired");
    Ok(())
}
