//! External and load-balancer addresses at connect time, and `--socket-lb`.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use lb_tests::manifests::{Manifests, Port, node, service, slice};
use lb_tests::{Cluster, Connect, Netns, Pod, Process, RunningAgent, SocketCall, SocketKind, addr, testbed};

const TARGET: Port<'static> = Port::tcp("web", 8080);
const NODE_PORT: u16 = 30080;

/// Destinations, and whether the socket hooks translate them inside the cluster.
const SERVED: [(&str, bool); 8] = [
    ("198.51.100.7:80", true),
    ("[2001:db8::7]:80", true),
    ("192.0.2.1:80", true),
    // `ipMode: Proxy`: connections go to the load balancer itself.
    ("192.0.2.2:80", false),
    // Source ranges are enforced by the packet path; a socket hook does not know the source address.
    ("192.0.2.3:80", false),
    ("10.96.0.22:80", true),
    ("10.96.0.23:80", true),
    // The socket hooks ignore ports that an external address does not have; the packet path refuses packets to them.
    ("198.51.100.7:81", false),
];

struct Setup {
    agent: RunningAgent,
    client: Pod,
    _server: Process,
    cluster: Cluster,
}

fn setup(flags: &[&str]) -> Result<Setup> {
    let cluster = Cluster::builder().nodes(2).build()?;
    let client = cluster.add_pod("n1", "client")?;
    let remote = cluster.add_pod("n2", "remote")?;
    let server = testbed().serve(&remote, &["[::]:8080=remote"])?;
    let manifests = Manifests::new(&cluster)?;
    let port = [Port::tcp("web", 80)];
    let balanced = |name: &str, ip: &str, vip: &str, more: &str| {
        service(name, ip, &port, &format!("type: LoadBalancer\n  {more}"))
            .trim_end_matches("---\n")
            .to_owned()
            + &format!("status: {{loadBalancer: {{ingress: [{vip}]}}}}\n---\n")
            + &slice(name, TARGET, &[(remote.address().into(), "n2")])
    };
    let text = service(
        "external",
        "10.96.0.20,fd00:96::20",
        &[Port::tcp("web", 80).on_nodes(NODE_PORT)],
        // No endpoint is on n1, but the policy Local does not apply to clients inside the cluster.
        "type: NodePort\n  externalTrafficPolicy: Local\n  externalIPs: [198.51.100.7, \"2001:db8::7\"]",
    ) + &slice("external", TARGET, &[(remote.address().into(), "n2")])
        + &slice("external", TARGET, &[(remote.address6().into(), "n2")])
        + &balanced(
            "balanced",
            "10.96.0.21",
            "{ip: 192.0.2.1, ipMode: VIP}",
            "externalTrafficPolicy: Local",
        )
        + &balanced("proxied", "10.96.0.22", "{ip: 192.0.2.2, ipMode: Proxy}", "")
        + &balanced(
            "restricted",
            "10.96.0.23",
            "{ip: 192.0.2.3}",
            "loadBalancerSourceRanges: [203.0.113.0/24]",
        );
    manifests.write("node.yaml", &node(cluster.node("n1")))?;
    manifests.write("web.yaml", &text)?;
    let agent = manifests.serve(&cluster, "n1", flags)?;
    Ok(Setup {
        agent,
        client,
        _server: server,
        cluster,
    })
}

fn is_served(from: &Netns, to: &str) -> Result<bool> {
    let load = Connect::to(&[addr(to)])
        .count(4)
        .peer_check()
        .timeout(Duration::from_millis(500));
    let summary = testbed().connect(from, &load)?;
    anyhow::ensure!(
        summary.failure_count == 0 || summary.failure_count == 4,
        "{to}: {summary:?}"
    );
    Ok(summary.failure_count == 0)
}

#[test]
fn external_addresses_use_cluster_policy_from_inside() -> Result<()> {
    let setup = setup(&[])?;
    for netns in [&*setup.client, &**setup.cluster.node("n1")] {
        for (to, served) in SERVED {
            assert_eq!(is_served(netns, to)?, served, "{to} from {}", netns.name());
        }
    }
    Ok(())
}

#[test]
fn socket_lb_node_leaves_pod_sockets_to_the_packet_path() -> Result<()> {
    let setup = setup(&["--socket-lb", "node"])?;
    assert!(is_served(setup.cluster.node("n1"), "10.96.0.20:80")?);
    assert!(is_served(setup.cluster.node("n1"), "[fd00:96::20]:80")?);
    // The packet path translates the packets of a pod, at addresses of every kind.
    let node = setup.cluster.node("n1");
    let own = [IpAddr::from(node.address()), node.address6().into()];
    let own = own.map(|ip| SocketAddr::new(ip, NODE_PORT).to_string());
    let others = own
        .iter()
        .map(String::as_str)
        .chain(["10.96.0.20:80", "[fd00:96::20]:80"]);
    for (to, served) in SERVED.into_iter().chain(others.map(|to| (to, true))) {
        assert_eq!(is_served(&setup.client, to)?, served, "{to}");
        let flows = setup.agent.output(&["conntrack", "list"])?;
        assert_eq!(flows.contains(to), served, "{to}: {flows}");
    }
    // The Service has no such port. In the pod the send succeeds and the packet is refused; on the node the send fails.
    let text = "x".to_owned();
    let to = addr("10.96.0.20:53");
    let mut pod = testbed().scripted_socket(&setup.client, SocketKind::Udp4)?;
    assert_eq!(
        pod.call(&SocketCall::SendTo(to, text.clone()))?,
        lb_tests::CallResult::Done
    );
    let mut node = testbed().scripted_socket(setup.cluster.node("n1"), SocketKind::Udp4)?;
    assert_eq!(node.errno(&SocketCall::SendTo(to, text))?, 111);
    Ok(())
}
