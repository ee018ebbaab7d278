//! The packet path: clients outside the cluster, and clients that no socket hook sees.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lb_tests::fixture::{Outcome, POD_PORTS, TwoNodeFixture, endpoints_of, node_addresses};
use lb_tests::manifests::{self, Port, service, slice_with_conditions, web_and_dns};
use lb_tests::{CallResult, Netns, SocketCall, SocketKind, Underlay, scaled_count_above, scaled_timeout, testbed};
use libc::ECONNREFUSED;

/// The node ports for TCP and for UDP.
const WEB: u16 = 30080;
const DNS: u16 = 30053;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Sends one request from a new socket, by TCP or UDP.
fn ask(from: &Netns, udp: bool, to: SocketAddr) -> Result<Outcome> {
    testbed().request(from, udp, to)
}

/// Sends many requests, and returns all servers that answer and the source addresses that they see.
fn all(from: &Netns, udp: bool, to: SocketAddr, times: u64) -> Result<BTreeSet<Outcome>> {
    testbed().request_many(from, udp, to, times)
}

fn setup(underlay: Underlay) -> Result<TwoNodeFixture> {
    TwoNodeFixture::new(underlay)
}

/// Returns a Service with node ports in both families and both protocols.
fn web(endpoints: &[(IpAddr, &str)], more: &str) -> String {
    web_and_dns("web", 20, Some([WEB, DNS]), more, endpoints, POD_PORTS)
}

fn servers(got: &BTreeSet<Outcome>) -> BTreeSet<&str> {
    got.iter()
        .map(|got| match got {
            Outcome::Served { by, .. } => by.as_str(),
            Outcome::Failed(_) => "failed",
        })
        .collect()
}

fn an_outside_client_reaches_all(underlay: Underlay) -> Result<()> {
    let setup = setup(underlay)?;
    setup.write("web.yaml", &web(&setup.endpoints(), "type: NodePort"))?;
    for node in setup.cluster.nodes() {
        for address in node_addresses(node) {
            for (udp, port) in [(false, WEB), (true, DNS)] {
                let to = SocketAddr::new(address, port);
                // Sixteen requests miss one of two backends with a probability of 2^-15.
                let got = all(setup.client(), udp, to, scaled_count_above(40, 16))?;
                assert_eq!(servers(&got), BTreeSet::from(["one", "two"]), "{to} udp={udp}: {got:?}");
                for got in got {
                    let Outcome::Served { by, seen } = got else { continue };
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
fn outside_client_reaches_pods_of_all_nodes_over_vxlan() -> Result<()> {
    an_outside_client_reaches_all(Underlay::Vxlan)
}

#[test]
fn outside_client_reaches_pods_of_all_nodes_over_routes() -> Result<()> {
    an_outside_client_reaches_all(Underlay::Routes)
}

#[test]
fn outside_clients_reach_the_backends_of_each_policy() -> Result<()> {
    let setup = setup(Underlay::Vxlan)?;
    let [one, two] = &setup.pods;
    let (client4, client6): (IpAddr, IpAddr) = (
        setup.cluster.client().address().into(),
        setup.cluster.client().address6().into(),
    );
    // A server in the host network of the second node.
    let host = setup.node("n2");
    let _host = testbed().serve_both(host, "host", POD_PORTS)?;
    let on_host = [(IpAddr::from(host.address()), "n2"), (host.address6().into(), "n2")];
    let external = "externalIPs: [\"203.0.113.7\", \"2001:db8:7::7\"]";
    let texts = [
        web_and_dns(
            "local",
            21,
            Some([30081, 30054]),
            "type: NodePort\n  externalTrafficPolicy: Local",
            &endpoints_of(two),
            POD_PORTS,
        ),
        web_and_dns("none", 22, Some([30082, 30055]), "type: NodePort", &[], POD_PORTS),
        web_and_dns("host", 23, Some([30083, 30056]), "type: NodePort", &on_host, POD_PORTS),
        web_and_dns(
            "external",
            24,
            Some([30084, 30057]),
            external,
            &endpoints_of(one),
            POD_PORTS,
        ),
        web_and_dns(
            "narrow",
            25,
            Some([30085, 30058]),
            &format!("type: LoadBalancer\n  loadBalancerSourceRanges: [\"{client4}/32\", \"{client6}/127\"]"),
            &endpoints_of(two),
            POD_PORTS,
        )
        .replacen(
            "---\n",
            "status: {loadBalancer: {ingress: [{ip: 203.0.113.8}, {ip: \"2001:db8:7::8\"}]}}\n---\n",
            1,
        ),
        // A load-balancer address that `externalIPs` names too.
        web_and_dns(
            "both",
            26,
            Some([30086, 30059]),
            "type: LoadBalancer\n  externalIPs: [\"203.0.113.9\", \"2001:db8:7::9\"]\n  \
             loadBalancerSourceRanges: [\"198.51.100.0/24\", \"2001:db8:8::/64\"]",
            &endpoints_of(two),
            POD_PORTS,
        )
        .replacen(
            "---\n",
            "status: {loadBalancer: {ingress: [{ip: 203.0.113.9}, {ip: \"2001:db8:7::9\"}]}}\n---\n",
            1,
        ),
    ];
    setup.write("web.yaml", &texts.concat())?;
    let client = setup.client();
    // No machine has the external addresses; the client routes them to the first node.
    client.ip(&format!("route add 203.0.113.0/24 via {}", setup.node("n1").address()))?;
    client.ip(&format!(
        "route add 2001:db8:7::/64 via {}",
        setup.node("n1").address6()
    ))?;
    let served = |by: &str, seen: Option<IpAddr>, got: Outcome, what: &str| got.ensure_served_by(by, seen, what);
    for (v6, client_address) in [(false, client4), (true, client6)] {
        let pick = |node: &str| node_addresses(setup.node(node))[usize::from(v6)];
        for udp in [false, true] {
            let at = |address: IpAddr, tcp: u16, dns: u16| SocketAddr::new(address, if udp { dns } else { tcp });
            let what = format!("v6={v6} udp={udp}");
            // Local: served on the node that has the endpoint, with the client's address; the other node drops the
            // packets.
            let got = ask(client, udp, at(pick("n2"), 30081, 30054))?;
            served("two", Some(client_address), got, &what)?;
            // No endpoint anywhere.
            for node in ["n1", "n2"] {
                let got = ask(client, udp, at(pick(node), 30082, 30055))?;
                assert_eq!(got, Outcome::Failed(ECONNREFUSED), "{what}");
            }
            // A host-network backend, requested at its own node and at another one.
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
                Outcome::Failed(ECONNREFUSED),
                "{what}"
            );
            // A load-balancer address with source ranges that contain the client.
            let balancer = ip(if v6 { "2001:db8:7::8" } else { "203.0.113.8" });
            let got = ask(client, udp, at(balancer, 80, 53))?;
            served("two", None, got, &format!("{what} load balancer"))?;
            // The source ranges also hold at a load-balancer address that is an external address too.
            let both = ip(if v6 { "2001:db8:7::9" } else { "203.0.113.9" });
            let got = ask(client, udp, at(both, 80, 53))?;
            assert!(!matches!(got, Outcome::Served { .. }), "{what}: {got:?}");
            // A pod of the first node is in none of the source ranges.
            let got = ask(one, udp, at(balancer, 80, 53))?;
            assert!(!matches!(got, Outcome::Served { .. }), "{what}: {got:?}");
        }
    }
    assert!(setup.dropped("source_not_allowed")? > 0);
    assert!(setup.dropped("no_such_port")? >= 4);
    for agent in &setup.agents {
        agent.verify()?;
    }
    Ok(())
}

/// Writes a Service with node ports and these endpoints, in both families.
fn serve_by(setup: &TwoNodeFixture, endpoints: &[(IpAddr, &str)]) -> Result<()> {
    setup.write("web.yaml", &web(endpoints, "type: NodePort"))
}

#[test]
fn flows_to_a_removed_backend_move_or_are_reset() -> Result<()> {
    let setup = setup(Underlay::Vxlan)?;
    let [one, two] = &setup.pods;
    let echo = [8081, 8082].map(|port| {
        let listen = [format!("[::]:{port}=echo")];
        testbed().serve_with(two, &listen.each_ref().map(String::as_str), &["--echo"])
    });
    let _echo = echo.into_iter().collect::<Result<Vec<_>>>()?;
    for node in ["n1", "n2"] {
        for address in node_addresses(setup.node(node)) {
            serve_by(&setup, &endpoints_of(two))?;
            let echo = |conditions: &str| -> String {
                let ports = [Port::tcp("web", 80).on_nodes(30081)];
                let text = service("echo", "10.96.0.30,fd00:96::30", &ports, "type: NodePort");
                let slices = endpoints_of(two).map(|(ip, node)| {
                    let port = Port::tcp("web", 8081);
                    slice_with_conditions("echo", port, &[(ip, node, conditions)])
                });
                text + &slices.concat()
            };
            setup.write("echo.yaml", &echo(""))?;
            let mut datagrams = testbed().scripted_socket(
                setup.client(),
                if address.is_ipv4() {
                    SocketKind::Udp4
                } else {
                    SocketKind::Udp6
                },
            )?;
            datagrams.connect(SocketAddr::new(address, DNS))?;
            datagrams.send("a")?;
            ensure!(datagrams.receive()?.1.starts_with("two "), "before");
            let mut stream = testbed().scripted_socket(
                setup.client(),
                if address.is_ipv4() {
                    SocketKind::Tcp4
                } else {
                    SocketKind::Tcp6
                },
            )?;
            stream.connect(SocketAddr::new(address, 30081))?;
            let contains = |answer: &CallResult, text: &str| matches!(answer, CallResult::Received(_, received) if received.contains(text));
            let mut exchange = |text: &str| -> Result<CallResult> {
                if let CallResult::Failed(errno) = stream.call(&SocketCall::Send(text.to_owned()))? {
                    return Ok(CallResult::Failed(errno));
                }
                loop {
                    let answer = stream.call(&SocketCall::Receive)?;
                    // The server's name comes first, alone or together with the answer.
                    if !matches!(&answer, CallResult::Received(_, received) if received == "echo\n") {
                        return Ok(answer);
                    }
                }
            };
            let answer = exchange("begin")?;
            ensure!(contains(&answer, "begin"), "{answer:?}");
            // A terminating backend keeps its connections.
            setup.write("echo.yaml", &echo("ready: false, serving: true, terminating: true"))?;
            let answer = exchange("lives")?;
            ensure!(contains(&answer, "lives"), "{address} at {node}: {answer:?}");
            // The backend is removed.
            serve_by(&setup, &endpoints_of(one))?;
            setup.write(
                "echo.yaml",
                &service(
                    "echo",
                    "10.96.0.30,fd00:96::30",
                    &[Port::tcp("web", 80).on_nodes(30081)],
                    "type: NodePort",
                ),
            )?;
            datagrams.send("b")?;
            let text = datagrams.receive()?.1;
            ensure!(text.starts_with("one "), "{address} at {node}: {text}");
            let answer = exchange("over")?;
            assert_eq!(answer, CallResult::Failed(libc::ECONNRESET), "{address} at {node}");
        }
    }
    Ok(())
}

#[test]
fn session_affinity_applies_to_outside_clients() -> Result<()> {
    let setup = TwoNodeFixture::with(Underlay::Vxlan, 2, &[])?;
    let more = "type: NodePort\n  sessionAffinity: ClientIP";
    setup.write("web.yaml", &web(&setup.endpoints(), more))?;
    let mut chosen = BTreeSet::new();
    for client in setup.cluster.clients() {
        for node in setup.cluster.nodes() {
            for address in node_addresses(node) {
                let to = SocketAddr::new(address, WEB);
                let got = all(client, false, to, 12)?;
                assert_eq!(servers(&got).len(), 1, "{to}: {got:?}");
                chosen.extend(servers(&got).into_iter().map(str::to_owned));
            }
        }
    }
    // All eight choices are the same with a probability of 2^-7.
    println!("{chosen:?}");
    ensure!(!chosen.contains("failed"), "{chosen:?}");
    Ok(())
}

#[test]
fn oversized_or_expired_packets_get_icmp_errors() -> Result<()> {
    let setup = setup(Underlay::Vxlan)?;
    serve_by(&setup, &endpoints_of(&setup.pods[1]))?;
    let (n1, client) = (setup.node("n1"), setup.client());
    let to = SocketAddr::new(n1.address().into(), DNS);
    let mut socket = testbed().scripted_socket(client, SocketKind::Udp4)?;
    socket.connect(to)?;
    // 1,500 bytes with the headers.
    socket.send(&"x".repeat(1472))?;
    let known = |mtu: &str| -> Result<bool> { Ok(client.ip(&format!("route get {}", n1.address()))?.contains(mtu)) };
    let deadline = Instant::now() + scaled_timeout(Duration::from_secs(5));
    while !known("mtu 1450")? {
        ensure!(
            Instant::now() < deadline,
            "the client's route has no lower MTU: {}",
            client.ip("route show cache")?
        );
        sleep(Duration::from_millis(20));
    }
    assert!(setup.dropped("too_big")? > 0);
    client.sysctl("net.ipv4.ip_default_ttl", "1")?;
    client.sysctl("net.ipv6.conf.eth0.hop_limit", "1")?;
    for address in node_addresses(n1) {
        // The kernel does not report these errors to a socket without IP_RECVERR.
        let got = ask(client, true, SocketAddr::new(address, DNS))?;
        assert!(matches!(got, Outcome::Failed(_)), "{address}: {got:?}");
    }
    assert!(setup.dropped("ttl_exceeded")? >= 2);
    // The client's kernel found no error in the ICMP packets that it received.
    let names = client.run(
        "awk",
        &[
            "/^Icmp: In/{getline v; n=split($0,k); split(v,a); for(i=2;i<=n;i++) print k[i], a[i]}",
            "/proc/net/snmp",
        ],
    )?;
    let count = |text: &str, name: &str| -> u64 {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        line.unwrap_or_else(|| panic!("no {name} in {text}"))
    };
    assert_eq!(count(&names, "InErrors "), 0, "{names}");
    assert_eq!(count(&names, "InCsumErrors "), 0, "{names}");
    assert!(count(&names, "InTimeExcds ") > 0, "{names}");
    let names = client.run("cat", &["/proc/net/snmp6"])?;
    assert_eq!(count(&names, "Icmp6InErrors"), 0, "{names}");
    assert!(count(&names, "Icmp6InTimeExcds") > 0, "{names}");
    // Two nodes forward the packet on its way to the pod.
    client.sysctl("net.ipv4.ip_default_ttl", "3")?;
    client.sysctl("net.ipv6.conf.eth0.hop_limit", "3")?;
    for address in node_addresses(n1) {
        let got = ask(client, true, SocketAddr::new(address, DNS))?;
        assert!(matches!(got, Outcome::Served { .. }), "{address}: {got:?}");
    }
    Ok(())
}

#[test]
fn flows_survive_an_agent_restart() -> Result<()> {
    let mut setup = setup(Underlay::Vxlan)?;
    let endpoints = endpoints_of(&setup.pods[1]);
    let _echo = testbed().serve_with(&setup.pods[1], &["[::]:8081=echo"], &["--echo"])?;
    setup.write("echo.yaml", &manifests::web("echo", 30, 30081, &endpoints, 8081))?;
    let mut streams = Vec::new();
    for address in node_addresses(setup.node("n1")) {
        let mut stream = testbed().scripted_socket(
            setup.client(),
            if address.is_ipv4() {
                SocketKind::Tcp4
            } else {
                SocketKind::Tcp6
            },
        )?;
        stream.connect(SocketAddr::new(address, 30081))?;
        stream.receive()?;
        streams.push(stream);
    }
    let mut talk = |when: &str| -> Result<()> {
        for stream in &mut streams {
            stream.send(when)?;
            let (_, text) = stream.receive()?;
            ensure!(text.contains(when), "{when}: {text}");
        }
        Ok(())
    };
    talk("before")?;
    setup.agents[0].kill()?;
    talk("while-dead")?;
    setup.agents[0].start_again()?;
    setup.agents[0].wait_ready(&|| false)?;
    talk("after")?;
    setup.agents[0].verify()
}
