//! Node ports at connect() and bind(): on which addresses, of which nodes, for which processes.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use lb_tests::manifests::{Manifests, vips, web_and_dns};
use lb_tests::scripted_socket::plain;
use lb_tests::{
    CallResult, Cluster, Netns, Node, Pod, Process, RunningAgent, SocketCall, SocketKind, pause_between_polls,
    scaled_timeout, testbed,
};
use libc::EADDRINUSE;

/// The node ports for TCP and for UDP.
const WEB: u16 = 30080;
const DNS: u16 = 30053;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Starts TCP and UDP servers, which answer with a name, on two ports of some addresses.
fn serve(netns: &Netns, name: &str, addresses: &[IpAddr], [tcp, udp]: [u16; 2]) -> Result<[Process; 2]> {
    let listen = |port| -> Vec<String> {
        let at = addresses.iter().map(|ip| SocketAddr::new(*ip, port));
        at.map(|at| format!("{at}={name}")).collect()
    };
    fn slices(texts: &[String]) -> Vec<&str> {
        texts.iter().map(String::as_str).collect()
    }
    Ok([
        testbed().serve(netns, &slices(&listen(tcp)))?,
        testbed().serve_datagrams(netns, &slices(&listen(udp)))?,
    ])
}

/// Returns the kinds of sockets that can reach an address: TCP and UDP, for IPv4 also IPv6 sockets.
fn socket_kinds(address: IpAddr, [tcp, udp]: [u16; 2]) -> Vec<(SocketKind, SocketAddr)> {
    let at = |ip: IpAddr, port| SocketAddr::new(ip, port);
    match address {
        IpAddr::V4(v4) => {
            let mapped = v4.to_ipv6_mapped().into();
            vec![
                (SocketKind::Tcp4, at(address, tcp)),
                (SocketKind::Udp4, at(address, udp)),
                (SocketKind::Tcp6, at(mapped, tcp)),
                (SocketKind::Udp6, at(mapped, udp)),
            ]
        }
        IpAddr::V6(_) => vec![
            (SocketKind::Tcp6, at(address, tcp)),
            (SocketKind::Udp6, at(address, udp)),
        ],
    }
}

/// Connects a new socket, and returns the name of the server that answers, if one does.
fn server_name(from: &Netns, kind: SocketKind, to: SocketAddr) -> Result<Option<String>> {
    let mut socket = testbed().scripted_socket(from, kind)?;
    if let CallResult::Failed(_) = socket.call(&SocketCall::Connect(to))? {
        return Ok(None);
    }
    if matches!(kind, SocketKind::Udp4 | SocketKind::Udp6) {
        socket.send("hello")?;
    }
    let (by, text) = match socket.call(&SocketCall::Receive)? {
        CallResult::Received(by, text) => (by, text),
        CallResult::Failed(_) => return Ok(None),
        other => bail!("{other:?}"),
    };
    ensure!(
        by.is_none_or(|by| plain(by) == plain(to)),
        "sent to {to}, but {by:?} replied"
    );
    // The unspecified address means loopback, and getpeername() returns loopback.
    let peer = socket.peer()?;
    ensure!(
        to.ip().to_canonical().is_unspecified() || peer == plain(to),
        "connected to {to}, but the peer is {peer}"
    );
    Ok(text.split_whitespace().next().map(str::to_owned))
}

/// Returns the name of the server at two ports of an address; all kinds of sockets must reach the same one.
fn at(from: &Netns, address: IpAddr, ports: [u16; 2]) -> Result<Option<String>> {
    let mut names = BTreeSet::new();
    for (kind, to) in socket_kinds(address, ports) {
        names.insert(server_name(from, kind, to)?);
    }
    ensure!(names.len() == 1, "{address} from {}: {names:?}", from.name());
    Ok(names.pop_first().flatten())
}

/// Returns the name of the server at the node ports of an address.
fn name_at_node_ports(from: &Netns, address: IpAddr) -> Result<Option<String>> {
    at(from, address, [WEB, DNS])
}

fn name(name: &str) -> Option<String> {
    Some(name.to_owned())
}

/// Waits until the expected server, or none, answers at the node ports of an address.
fn eventually(from: &Netns, address: IpAddr, expected: Option<&str>) -> Result<()> {
    let deadline = Instant::now() + scaled_timeout(Duration::from_secs(10));
    loop {
        let late = Instant::now() >= deadline;
        // During a change, some kinds of sockets may be served while others are not.
        let last = match name_at_node_ports(from, address) {
            Ok(name) if name.as_deref() == expected => return Ok(()),
            last => last,
        };
        ensure!(!late, "{address} from {}: {last:?}, not {expected:?}", from.name());
        sleep(Duration::from_millis(50));
    }
}

/// Two nodes, the first with an agent. The backend of the node ports is a pod of the second.
struct Setup {
    agent: RunningAgent,
    manifests: Manifests,
    client: Pod,
    far: Pod,
    _servers: [Process; 2],
    cluster: Cluster,
}

impl Setup {
    fn node(&self) -> &Node {
        self.cluster.node("n1")
    }

    /// Writes a manifest, and waits until it is applied.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let before = self.agent.status()?.agent.applies;
        self.manifests.write(name, text)?;
        let deadline = Instant::now() + scaled_timeout(Duration::from_secs(10));
        let mut last_poll = Instant::now();
        while self.agent.status()?.agent.applies == before {
            ensure!(Instant::now() < deadline, "{name} is not applied");
            pause_between_polls(last_poll);
            last_poll = Instant::now();
        }
        self.agent.verify()
    }

    /// Starts the agent with other flags.
    fn restart(&mut self, flags: &[&str]) -> Result<()> {
        self.agent.kill()?;
        *self.agent.process() = self.agent.start_ready(flags)?;
        Ok(())
    }
}

const TARGET: [u16; 2] = [8080, 5353];

fn setup(flags: &[&str]) -> Result<Setup> {
    let cluster = Cluster::builder().nodes(2).build()?;
    let client = cluster.add_pod("n1", "client")?;
    let far = cluster.add_pod("n2", "far")?;
    let addresses = [far.address().into(), far.address6().into()];
    let servers = serve(&far, "far", &addresses, TARGET)?;
    let manifests = Manifests::new(&cluster)?;
    // No endpoint is on this node, but the policy Local does not apply to clients inside the cluster.
    let policy = "type: NodePort\n  externalTrafficPolicy: Local";
    let endpoints = addresses.map(|ip| (ip, "n2"));
    let text = web_and_dns("web", 20, Some([WEB, DNS]), policy, &endpoints, TARGET);
    manifests.write("web.yaml", &text)?;
    let agent = manifests.serve(&cluster, "n1", flags)?;
    Ok(Setup {
        agent,
        manifests,
        client,
        far,
        _servers: servers,
        cluster,
    })
}

#[test]
fn node_ports_are_served_on_local_addresses_and_host_loopback() -> Result<()> {
    let setup = setup(&[])?;
    let (n1, n2) = (setup.node(), setup.cluster.node("n2"));
    let own: [IpAddr; 5] = [
        n1.address().into(),
        n1.address6().into(),
        n1.gateway().into(),
        n1.gateway6().into(),
        n1.pod_network().into(),
    ];
    for netns in [&*setup.client, &**n1] {
        for address in own {
            assert_eq!(
                name_at_node_ports(netns, address)?,
                name("far"),
                "{address} from {}",
                netns.name()
            );
            // A port that is no node port.
            assert_eq!(
                at(netns, address, [30081, 30054])?,
                None,
                "{address} from {}",
                netns.name()
            );
        }
        // Sendmsg without connect().
        let mut socket = testbed().scripted_socket(netns, SocketKind::Udp6)?;
        for address in own {
            assert_eq!(socket.exchange(SocketAddr::new(address, DNS), "hello")?, "far");
        }
    }
    let loopback = ["127.0.0.1", "127.9.9.9", "::1", "0.0.0.0", "::"].map(ip);
    for address in loopback {
        let before = setup.agent.connections("web", None)?;
        assert_eq!(name_at_node_ports(n1, address)?, name("far"), "{address} on the node");
        assert_eq!(name_at_node_ports(&setup.client, address)?, None, "{address} in a pod");
        // Connections of the node are counted, and no others.
        let counted = socket_kinds(address, [WEB, DNS]).len() as u64;
        assert_eq!(setup.agent.connections("web", None)? - before, counted, "{address}");
    }
    // Loopback in a pod is the pod's own, and node ports of another node are that node's.
    let _pod = serve(&setup.client, "pod", &[ip("127.0.0.1"), ip("::1")], [WEB, DNS])?;
    let other: [IpAddr; 2] = [n2.address().into(), n2.address6().into()];
    let _other = serve(n2, "n2", &other, [WEB, DNS])?;
    for address in [ip("127.0.0.1"), ip("::1")] {
        assert_eq!(name_at_node_ports(&setup.client, address)?, name("pod"), "{address}");
        assert_eq!(name_at_node_ports(n1, address)?, name("far"), "{address}");
    }
    for netns in [&*setup.client, &**n1] {
        for address in other {
            assert_eq!(
                name_at_node_ports(netns, address)?,
                name("n2"),
                "{address} from {}",
                netns.name()
            );
        }
    }
    setup.agent.verify()
}

#[test]
fn nodeport_connect_keeps_the_client_address() -> Result<()> {
    let setup = setup(&[])?;
    let n1 = setup.node();
    let _server = testbed().serve_with(&setup.far, &["[::]:8081=far"], &["--report-source"])?;
    let endpoints = [(setup.far.address().into(), "n2"), (setup.far.address6().into(), "n2")];
    let text = web_and_dns("source", 21, Some([30081, 30054]), "", &endpoints, [8081, 5354]);
    setup.write("source.yaml", &text)?;
    let (v4, v6): (IpAddr, IpAddr) = (setup.client.address().into(), setup.client.address6().into());
    for (to, port, source) in [
        (ip("10.96.0.21"), 80, v4),
        (n1.address().into(), 30081, v4),
        (n1.gateway().into(), 30081, v4),
        (ip("fd00:96::21"), 80, v6),
        (n1.address6().into(), 30081, v6),
    ] {
        for (kind, to) in socket_kinds(to, [port, 0]).into_iter().filter(|(_, to)| to.port() != 0) {
            let mut socket = testbed().scripted_socket(&setup.client, kind)?;
            socket.connect(to)?;
            assert_eq!(
                socket.receive()?.1.trim_end(),
                format!("far {source}"),
                "{kind:?} to {to}"
            );
        }
    }
    Ok(())
}

#[test]
fn node_ports_follow_address_changes() -> Result<()> {
    let setup = setup(&[])?;
    let n1 = setup.node();
    n1.ip("link add extra0 type bridge")?;
    n1.ip("link set extra0 up")?;
    for (device, address) in [
        ("lo", "198.51.100.9/32"),
        ("lo", "2001:db8::9/128"),
        ("extra0", "203.0.113.9/32"),
        ("extra0", "2001:db8:1::9/128"),
        // A secondary address.
        ("eth0", "192.168.77.51/24"),
    ] {
        let ip = ip(address.split('/').next().unwrap_or_default());
        n1.add_address(address, device)?;
        eventually(n1, ip, Some("far"))?;
        eventually(&setup.client, ip, Some("far"))?;
        n1.remove_address(address, device)?;
        eventually(n1, ip, None)?;
    }
    n1.add_address("203.0.113.9/32", "extra0")?;
    eventually(n1, ip("203.0.113.9"), Some("far"))?;
    n1.ip("link delete extra0")?;
    eventually(n1, ip("203.0.113.9"), None)?;
    assert_eq!(
        name_at_node_ports(n1, n1.address().into())?,
        name("far"),
        "other addresses are still served"
    );
    Ok(())
}

#[test]
fn nodeport_addresses_and_devices_flags_select_addresses() -> Result<()> {
    let mut setup = setup(&["--nodeport-addresses", "192.168.77.0/24"])?;
    let n1 = setup.cluster.node("n1");
    let [eth4, cni4]: [IpAddr; 2] = [n1.address().into(), n1.gateway().into()];
    let [eth6, cni6]: [IpAddr; 2] = [n1.address6().into(), n1.gateway6().into()];
    let all = [eth4, eth6, cni4, cni6, ip("127.0.0.1"), ip("::1")];
    let check = |setup: &Setup, expected: &[IpAddr]| -> Result<()> {
        let n1 = setup.node();
        let loopback = [ip("127.0.0.1"), ip("::1")];
        for address in all {
            let served = expected.contains(&address) || loopback.contains(&address);
            let expected = served.then_some("far");
            assert_eq!(name_at_node_ports(n1, address)?.as_deref(), expected, "{address}");
        }
        Ok(())
    };
    check(&setup, &[eth4, eth6, cni6])?;
    // At an address without node ports, the node's own server keeps the port.
    let own = serve(n1, "own", &[cni4], [WEB, DNS])?;
    assert_eq!(name_at_node_ports(&setup.client, cni4)?, name("own"));
    drop(own);
    for (flags, expected) in [
        (
            ["--nodeport-addresses", "192.168.77.0/24,fd00:192:168:77::/64"],
            &[eth4, eth6][..],
        ),
        (["--devices", "cni0"], &[cni4, cni6]),
        // Without a Node object, and without a default route.
        (["--nodeport-addresses", "primary"], &[]),
    ] {
        setup.restart(&flags)?;
        check(&setup, expected)?;
    }
    // A default route by a device that leads nowhere.
    let n1 = setup.cluster.node("n1");
    n1.ip("link add extra0 type bridge")?;
    n1.ip("link set extra0 up")?;
    n1.add_address("203.0.113.9/32", "extra0")?;
    n1.ip("route add default dev extra0")?;
    eventually(n1, ip("203.0.113.9"), Some("far"))?;
    check(&setup, &[])?;
    n1.ip("route delete default dev extra0")?;
    eventually(n1, ip("203.0.113.9"), None)?;
    // The addresses of the Node object count as soon as it exists.
    let node = format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: n1}}\nstatus:\n  addresses:\n  \
         - {{type: Hostname, address: n1}}\n  - {{type: InternalIP, address: {cni4}}}\n  \
         - {{type: InternalIP, address: {eth4}}}\n  - {{type: InternalIP, address: \"{eth6}\"}}\n"
    );
    setup.manifests.write("node.yaml", &node)?;
    eventually(n1, cni4, Some("far"))?;
    check(&setup, &[cni4, eth6])
}

#[test]
fn bind_to_a_node_port_fails_with_eaddrinuse_on_the_node() -> Result<()> {
    let setup = setup(&[])?;
    let n1 = setup.node();
    let kinds = [
        (SocketKind::Tcp4, WEB, DNS),
        (SocketKind::Tcp6, WEB, DNS),
        (SocketKind::Mptcp4, WEB, DNS),
        (SocketKind::Udp4, DNS, WEB),
        (SocketKind::Udp6, DNS, WEB),
    ];
    let bind = |netns: &Netns, kind, ip, port| {
        let mut socket = testbed().scripted_socket(netns, kind)?;
        match socket.call(&SocketCall::Bind(SocketAddr::new(ip, port)))? {
            CallResult::Done => Ok(0),
            CallResult::Failed(errno) => Ok(errno),
            other => bail!("{other:?}"),
        }
    };
    let mut refused = 0;
    for (kind, taken, free) in kinds {
        let six = matches!(kind, SocketKind::Tcp6 | SocketKind::Udp6);
        let mut addresses = vec![ip("0.0.0.0"), ip("127.0.0.1"), n1.address().into(), n1.gateway().into()];
        if six {
            // An IPv6 socket binds the IPv4 addresses in v4-mapped notation.
            addresses.extend([Ipv6Addr::UNSPECIFIED.into(), ip("::1"), n1.address6().into()]);
        }
        for address in addresses {
            let context = format!("{kind:?} {address}");
            assert_eq!(bind(n1, kind, address, taken)?, EADDRINUSE, "{context}:{taken}");
            refused += 1;
            // The node port of the other protocol, another port, any port.
            for port in [free, 30099, 0] {
                assert_eq!(bind(n1, kind, address, port)?, 0, "{context}:{port}");
            }
        }
        for address in [ip("0.0.0.0"), ip("127.0.0.1"), setup.client.address().into()] {
            assert_eq!(
                bind(&setup.client, kind, address, taken)?,
                0,
                "{kind:?} {address} in a pod"
            );
        }
    }
    assert_eq!(setup.agent.status()?.dropped("node_port_taken")?, refused);
    setup.write("web.yaml", &web_and_dns("web", 20, None, "", &[], TARGET))?;
    for (kind, taken, _) in kinds {
        assert_eq!(
            bind(n1, kind, ip("0.0.0.0"), taken)?,
            0,
            "{kind:?}: no Service has the port any more"
        );
    }
    Ok(())
}

#[test]
fn hairpin_and_host_network_backends_are_reached() -> Result<()> {
    let setup = setup(&[])?;
    let (n1, n2) = (setup.node(), setup.cluster.node("n2"));
    let near = setup.cluster.add_pod("n1", "near")?;
    let both = |v4, v6| [IpAddr::V4(v4), IpAddr::V6(v6)];
    let near_addresses = both(near.address(), near.address6());
    let _near = serve(&near, "near", &near_addresses, TARGET)?;
    let mut text = web_and_dns(
        "near",
        30,
        Some([30082, 30055]),
        "",
        &near_addresses.map(|ip| (ip, "n1")),
        TARGET,
    );
    let mut hosts = Vec::new();
    for (node, service, last, ports) in [(n1, "host1", 31, [30083, 30056]), (n2, "host2", 32, [30084, 30057])] {
        let addresses = both(node.address(), node.address6());
        hosts.push(serve(node, service, &addresses, [9000, 9001])?);
        let endpoints = addresses.map(|ip| (ip, node.name()));
        text += &web_and_dns(service, last, Some(ports), "", &endpoints, [9000, 9001]);
    }
    setup.write("more.yaml", &text)?;
    for (service, last, ports) in [
        ("near", 30, [30082, 30055]),
        ("host1", 31, [30083, 30056]),
        ("host2", 32, [30084, 30057]),
    ] {
        for netns in [&*near, &*setup.client, &**n1] {
            for vip in vips(last) {
                let from = netns.name();
                assert_eq!(at(netns, vip, [80, 53])?, name(service), "{vip} from {from}");
            }
            for address in both(n1.address(), n1.address6()) {
                let from = netns.name();
                assert_eq!(
                    at(netns, address, ports)?,
                    name(service),
                    "{address} {ports:?} from {from}"
                );
            }
        }
        assert_eq!(at(n1, ip("127.0.0.1"), ports)?, name(service), "{ports:?} on loopback");
        assert_eq!(at(n1, ip("::1"), ports)?, name(service), "{ports:?} on loopback");
    }
    Ok(())
}
