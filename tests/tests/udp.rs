//! UDP, IPv6, v4-mapped addresses and MPTCP through Services, by scripted sockets that make one call after another.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use anyhow::{Result, ensure};
use lb_tests::manifests::{Manifests, Port, service, slice};
use lb_tests::{Cluster, Pod, Process, RunningAgent, SocketCall, SocketKind, addr, testbed};
use libc::{ECONNREFUSED, EHOSTUNREACH};
use serde_json::Value;

/// A node, a client pod, three servers for UDP and TCP, and Services in both families.
struct Setup {
    agent: RunningAgent,
    manifests: Manifests,
    client: Pod,
    servers: [Pod; 3],
    _processes: Vec<Process>,
    cluster: Cluster,
}

const DNS: Port<'static> = Port::udp("dns", 53);
const WEB: Port<'static> = Port::tcp("web", 80);

/// Returns the manifests. `both`: all servers, UDP and TCP, in both families. `one` and `uno`: the first server only.
/// `two`: the second only.
fn manifests(servers: &[Pod]) -> String {
    let all: Vec<_> = servers.iter().collect();
    [
        ("both", "10.96.0.10,fd00:96::10", all.as_slice()),
        ("one", "10.96.0.11,fd00:96::11", &all[..1]),
        ("uno", "10.96.0.12,fd00:96::12", &all[..1]),
        ("two", "10.96.0.13,fd00:96::13", &all[1..2]),
        ("empty", "10.96.0.14,fd00:96::14", &[]),
    ]
    .map(|(name, ips, pods)| served(name, ips, pods, ""))
    .concat()
}

fn served(name: &str, ips: &str, pods: &[&Pod], more: &str) -> String {
    let mut text = service(name, ips, &[DNS, WEB], more);
    for port in [Port::udp("dns", 5353), Port::tcp("web", 8080)] {
        let v4: Vec<(IpAddr, &str)> = pods.iter().map(|pod| (pod.address().into(), "n1")).collect();
        let v6: Vec<(IpAddr, &str)> = pods.iter().map(|pod| (pod.address6().into(), "n1")).collect();
        if !pods.is_empty() {
            text += &slice(name, port, &v4);
            text += &slice(name, port, &v6);
        }
    }
    text
}

fn setup(flags: &[&str]) -> Result<Setup> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let client = cluster.add_pod("n1", "client")?;
    let servers = [
        cluster.add_pod("n1", "a")?,
        cluster.add_pod("n1", "b")?,
        cluster.add_pod("n1", "c")?,
    ];
    let mut processes = Vec::new();
    for pod in &servers {
        let name = pod.name();
        processes.push(testbed().serve_datagrams(
            pod,
            &[
                &format!("{}={name}", pod.socket(5353)),
                &format!("{}={name}", pod.socket6(5353)),
            ],
        )?);
        processes.push(testbed().serve_with(pod, &[&format!("[::]:8080={name}")], &["--echo"])?);
    }
    let folder = Manifests::new(&cluster)?;
    folder.write("services.yaml", &manifests(&servers))?;
    let agent = folder.serve(&cluster, "n1", flags)?;
    Ok(Setup {
        agent,
        manifests: folder,
        client,
        servers,
        _processes: processes,
        cluster,
    })
}

/// Returns the address of a Service, by its last number, and a port.
type Vip = fn(u16, u16) -> SocketAddr;

/// Returns the two families, and IPv4 on IPv6 sockets.
fn families() -> [(SocketKind, Vip); 3] {
    fn v4(last: u16, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::from([10, 96, 0, last as u8]), port)
    }
    fn v6(last: u16, port: u16) -> SocketAddr {
        // The digits of the last number are read as hexadecimal.
        let last = u16::from_str_radix(&last.to_string(), 16).unwrap();
        SocketAddr::new(Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, last).into(), port)
    }
    // The third uses v4-mapped addresses.
    [(SocketKind::Udp4, v4), (SocketKind::Udp6, v6), (SocketKind::Udp6, v4)]
}

#[test]
fn connected_udp_sockets_report_the_vip_as_peer() -> Result<()> {
    let setup = setup(&[])?;
    for (kind, vip) in families() {
        let to = vip(10, 53);
        let mut names = std::collections::BTreeSet::new();
        for _ in 0..12 {
            let mut socket = testbed().scripted_socket(&setup.client, kind)?;
            socket.connect(to)?;
            ensure!(socket.peer()? == to, "{kind:?} {to}: getpeername {}", socket.peer()?);
            socket.send("hello")?;
            let name = socket.receive_reply(to, "hello")?;
            // The socket keeps its backend, also if a send names the destination that it is connected to.
            socket.send("again")?;
            assert_eq!(socket.receive_reply(to, "again")?, name);
            assert_eq!(socket.exchange(to, "named")?, name, "{kind:?} {to}");
            names.insert(name);
        }
        assert!(names.len() > 1, "{kind:?} {to}: all of 12 sockets went to {names:?}");
    }
    Ok(())
}

#[test]
fn unconnected_udp_sockets_keep_their_backend_and_receive_from_the_vip() -> Result<()> {
    let setup = setup(&[])?;
    for (kind, vip) in families() {
        let mut socket = testbed().scripted_socket(&setup.client, kind)?;
        let to = vip(10, 53);
        let first = socket.exchange(to, "0")?;
        for i in 1..10 {
            assert_eq!(socket.exchange(to, &i.to_string())?, first, "{kind:?} {to}");
        }
        // Another Service on the same socket, another backend, and two queries at once, as musl's resolver sends them.
        let other = vip(if first == "b" { 11 } else { 13 }, 53);
        socket.send_to(to, "x")?;
        socket.send_to(other, "y")?;
        let mut answers = [socket.receive()?, socket.receive()?];
        answers.sort_by_key(|(_, text)| text.split(' ').nth(1).map(str::to_owned));
        assert_eq!(
            answers.each_ref().map(|(from, _)| *from),
            [Some(to), Some(other)],
            "{kind:?}: {answers:?}"
        );
        assert_eq!(socket.exchange(to, "still")?, first);
    }
    let flows = setup.agent.connections("both", Some("dns"))?;
    assert_eq!(flows, 3, "one connection per socket and Service");
    Ok(())
}

#[test]
fn udp_socket_uses_two_services_with_the_same_backend() -> Result<()> {
    let setup = setup(&[])?;
    for (kind, vip) in families() {
        let (one, uno) = (vip(11, 53), vip(12, 53));
        let mut socket = testbed().scripted_socket(&setup.client, kind)?;
        for i in 0..5 {
            socket.exchange(one, &format!("one {i}"))?;
            socket.exchange(uno, &format!("uno {i}"))?;
        }
        for (first, second) in [(one, uno), (uno, one), (one, one)] {
            socket.send_to(first, "first")?;
            socket.send_to(second, "second")?;
            socket.receive_reply(first, "first")?;
            socket.receive_reply(second, "second")?;
        }
    }
    Ok(())
}

#[test]
fn fifth_udp_destination_evicts_the_least_recently_used() -> Result<()> {
    let setup = setup(&[])?;
    let more: String = (20..26)
        .map(|i| served(&format!("s{i}"), &format!("10.96.0.{i}"), &[&setup.servers[0]], ""))
        .collect();
    setup.manifests.write("more.yaml", &more)?;
    let mut agent = setup.agent;
    agent.wait_ready(&|| false)?;
    let mut socket = testbed().scripted_socket(&setup.client, SocketKind::Udp4)?;
    let vip = |i: u16| addr(&format!("10.96.0.{i}:53"));
    for i in 20..24 {
        socket.exchange(vip(i), "x")?;
    }
    assert_eq!(agent.status()?.dropped("udp_flow_replaced").unwrap_or(0), 0);
    socket.exchange(vip(20), "used again")?;
    socket.exchange(vip(24), "the fifth evicts 21")?;
    assert_eq!(agent.status()?.dropped("udp_flow_replaced")?, 1);
    for i in [20, 22, 23, 24] {
        socket.exchange(vip(i), "x")?;
    }
    assert_eq!(agent.status()?.dropped("udp_flow_replaced")?, 1);
    Ok(())
}

#[test]
fn udp_socket_reconnects_disconnects_and_sends_elsewhere() -> Result<()> {
    let setup = setup(&[])?;
    let direct = setup.servers[0].socket(5353);
    let one = addr("10.96.0.11:53");
    let two = addr("10.96.0.13:53");
    let mut socket = testbed().scripted_socket(&setup.client, SocketKind::Udp4)?;
    socket.connect(one)?;
    socket.send("x")?;
    assert_eq!(socket.receive_reply(one, "x")?, "a");
    // Directly to the same backend: nothing is translated any more.
    socket.connect(direct)?;
    assert_eq!(socket.peer()?, direct);
    socket.send("y")?;
    socket.receive_reply(direct, "y")?;
    socket.connect(two)?;
    assert_eq!(socket.peer()?, two);
    socket.send("z")?;
    assert_eq!(socket.receive_reply(two, "z")?, "b");
    // A connected socket may send to another address. The kernel delivers the datagram, but the answer does not match
    // the socket's peer.
    socket.send_to(one, "elsewhere")?;
    socket.send("w")?;
    assert_eq!(socket.receive_reply(two, "w")?, "b");
    // Unconnected again.
    assert_eq!(socket.call(&SocketCall::Disconnect)?, lb_tests::CallResult::Done);
    assert_eq!(socket.exchange(one, "v")?, "a");
    assert_eq!(socket.exchange(two, "u")?, "b");
    // An IPv6 socket that connects to an address of AF_INET runs the IPv4 hook.
    let mut socket = testbed().scripted_socket(&setup.client, SocketKind::Udp6)?;
    socket.connect(one)?;
    assert_eq!(socket.peer()?, one);
    socket.send("t")?;
    assert_eq!(socket.receive_reply(one, "t")?, "a");
    Ok(())
}

#[test]
fn udp_without_endpoint_fails_at_sendto_and_connect() -> Result<()> {
    let setup = setup(&[])?;
    let local = service(
        "local",
        "10.96.0.15,fd00:96::15",
        &[DNS, WEB],
        "internalTrafficPolicy: Local",
    ) + &slice("local", Port::udp("dns", 5353), &[("10.10.9.9".parse()?, "n9")])
        + &slice("local", Port::udp("dns", 5353), &[("fd00:10:10:9::9".parse()?, "n9")]);
    setup.manifests.write("local.yaml", &local)?;
    let mut agent = setup.agent;
    agent.wait_ready(&|| false)?;
    for (kind, vip) in families() {
        let cases = [
            (vip(14, 53), ECONNREFUSED),
            (vip(10, 54), ECONNREFUSED),
            (vip(15, 53), EHOSTUNREACH),
        ];
        for (to, errno) in cases {
            let mut socket = testbed().scripted_socket(&setup.client, kind)?;
            let text = "x".to_owned();
            assert_eq!(
                socket.errno(&SocketCall::SendTo(to, text.clone()))?,
                errno,
                "{kind:?} sends to {to}"
            );
            assert_eq!(
                socket.errno(&SocketCall::Connect(to))?,
                errno,
                "{kind:?} connects to {to}"
            );
            // The socket works after the failed calls.
            socket.exchange(vip(10, 53), "well")?;
        }
    }
    Ok(())
}

#[test]
fn tcp_and_mptcp_connect_in_both_families() -> Result<()> {
    let setup = setup(&[])?;
    let four = addr("10.96.0.10:80");
    let six = addr("[fd00:96::10]:80");
    let mapped = addr("[::ffff:10.96.0.10]:80");
    let cases = [
        (SocketKind::Tcp4, four, four),
        (SocketKind::Tcp6, six, six),
        (SocketKind::Tcp6, mapped, four),
        (SocketKind::Mptcp4, four, four),
        (SocketKind::Mptcp6, six, six),
        (SocketKind::Mptcp6, mapped, four),
    ];
    for (kind, to, seen) in cases {
        let mut socket = testbed().scripted_socket(&setup.client, kind)?;
        socket.connect(to)?;
        assert_eq!(socket.peer()?, seen, "{kind:?} to {to}");
        let (_, name) = socket.receive()?;
        assert!(["a\n", "b\n", "c\n"].contains(&&*name), "{kind:?} to {to}: {name:?}");
        let rows: Vec<Value> = setup.agent.json(&["socket", "list"])?;
        assert_eq!(rows.len(), 1, "{kind:?} to {to}: {rows:?}");
        drop(socket);
        let deadline = std::time::Instant::now() + lb_tests::scaled_timeout(std::time::Duration::from_secs(5));
        loop {
            let rows: Vec<Value> = setup.agent.json(&["socket", "list"])?;
            if rows.is_empty() {
                break;
            }
            ensure!(
                std::time::Instant::now() < deadline,
                "{kind:?} to {to} is closed, but: {rows:?}"
            );
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let refused = SocketAddr::new(to.ip(), 81);
        let mut socket = testbed().scripted_socket(&setup.client, kind)?;
        assert_eq!(
            socket.errno(&SocketCall::Connect(refused))?,
            ECONNREFUSED,
            "{kind:?} to {refused}"
        );
    }
    ensure!(setup.cluster.nodes().len() == 1, "one node");
    Ok(())
}

#[test]
fn single_and_dual_stack_services_are_reached() -> Result<()> {
    let setup = setup(&[])?;
    let all: Vec<_> = setup.servers.iter().collect();
    let more = [
        ("six-four", "fd00:96::30,10.96.0.30"),
        ("four", "10.96.0.31"),
        ("six", "fd00:96::31"),
    ]
    .map(|(name, ips)| served(name, ips, &all, ""))
    .concat();
    setup.manifests.write("more.yaml", &more)?;
    let mut agent = setup.agent;
    agent.wait_ready(&|| false)?;
    for ip in ["10.96.0.30", "[fd00:96::30]", "10.96.0.31", "[fd00:96::31]"] {
        let (datagrams, streams) = match ip.starts_with('[') {
            true => (SocketKind::Udp6, SocketKind::Tcp6),
            false => (SocketKind::Udp4, SocketKind::Tcp4),
        };
        testbed()
            .scripted_socket(&setup.client, datagrams)?
            .exchange(addr(&format!("{ip}:53")), "x")?;
        let mut socket = testbed().scripted_socket(&setup.client, streams)?;
        socket.connect(addr(&format!("{ip}:80")))?;
        socket.receive()?;
    }
    Ok(())
}

#[test]
fn ipv6_only_node_is_served() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let (client, server) = (cluster.add_pod("n1", "client")?, cluster.add_pod("n1", "a")?);
    let node = cluster.node("n1");
    let namespaces: [&lb_tests::Netns; 3] = [&client, &server, node];
    for netns in namespaces {
        netns.ip("-4 address flush scope global")?;
        netns.ip("-4 route flush table main")?;
    }
    let _datagrams = testbed().serve_datagrams(&server, &[&format!("{}=a", server.socket6(5353))])?;
    let _streams = testbed().serve_with(&server, &["[::]:8080=a"], &["--echo"])?;
    let manifests = Manifests::new(&cluster)?;
    let ports = [DNS, WEB.on_nodes(30080)];
    let mut text = service("six", "fd00:96::10", &ports, "");
    for port in [Port::udp("dns", 5353), Port::tcp("web", 8080)] {
        text += &slice("six", port, &[(server.address6().into(), "n1")]);
    }
    manifests.write("services.yaml", &text)?;
    let agent = manifests.serve(&cluster, "n1", &[])?;
    for netns in [&*client, &**node] {
        let to = addr("[fd00:96::10]:53");
        let mut socket = testbed().scripted_socket(netns, SocketKind::Udp6)?;
        assert_eq!(socket.exchange(to, "x")?, "a");
        socket.connect(to)?;
        assert_eq!(socket.peer()?, to);
        for to in [
            SocketAddr::new(to.ip(), 80),
            SocketAddr::new(node.address6().into(), 30080),
        ] {
            let mut socket = testbed().scripted_socket(netns, SocketKind::Tcp6)?;
            socket.connect(to)?;
            assert_eq!(socket.peer()?, to, "from {}", netns.name());
            assert_eq!(socket.receive()?.1, "a\n");
        }
    }
    agent.verify()
}
