//! A flood of SYNs without a reply, and connections that survive it: a small one in every test run, a million SYNs with
//! `cargo xtask stress --flood`.

use std::env;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use etherparse::PacketBuilder;
use lb_tests::fixture::{TwoNodeFixture, node_addresses};
use lb_tests::manifests::web;
use lb_tests::{Netns, Node, Pod, Process, Testbed, Underlay, scaled_count, testbed};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socket};

/// Variable with the number of SYNs.
const SYNS: &str = "LB_FLOOD";
/// Node ports of a Service that answers, and of one that does not.
const ECHO: u16 = 30080;
const UNANSWERED: u16 = 30081;
/// Port of the echo servers in pods.
const SERVED: u16 = 8081;
/// Number of SYNs between two reads of the counter.
const CHUNK: u64 = 20_000;

/// Size of a run.
struct Size {
    syns: u64,
    /// Capacity of CT and of CT_NEW.
    map: u64,
    connections: u32,
    idle: Duration,
}

impl Size {
    fn wanted() -> Result<Self> {
        let syns: Option<u64> = env::var(SYNS).ok().map(|text| text.parse()).transpose()?;
        Ok(match syns {
            Some(syns) => Self {
                syns,
                map: 100_000,
                connections: 1000,
                idle: Duration::from_secs(60),
            },
            None => Self {
                syns: scaled_count(20_000),
                map: scaled_count(2_000).max(400),
                connections: 50,
                idle: Duration::from_secs(1),
            },
        })
    }
}

/// Opens a packet socket that sends raw frames by `eth0`.
fn packet_socket(netns: &Netns) -> Result<OwnedFd> {
    netns.within(|| -> Result<OwnedFd> {
        // A socket without a protocol receives nothing.
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
        // SAFETY: sockaddr_ll is plain data for which all zeros is a valid value.
        let mut by: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        by.sll_family = libc::AF_PACKET as u16;
        by.sll_ifindex = nix::net::if_::if_nametoindex("eth0")? as i32;
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: `by` and `length` describe one sockaddr_ll that lives until the call returns.
        Errno::result(unsafe { libc::bind(socket.as_raw_fd(), (&raw const by).cast(), length) })?;
        Ok(socket)
    })?
}

/// Returns the MAC address of `eth0`.
fn hardware_address(netns: &Netns) -> Result<[u8; 6]> {
    let text = netns.ip("-oneline link show eth0")?;
    let mut words = text.split_whitespace().skip_while(|word| *word != "link/ether");
    let octets = words.nth(1).context("no hardware address")?.split(':');
    let octets: Vec<u8> = octets
        .map(|octet| u8::from_str_radix(octet, 16))
        .collect::<Result<_, _>>()?;
    octets.try_into().ok().context("six octets")
}

/// Returns the SYN with this number, from a client that does not exist; even numbers are IPv4, odd ones IPv6.
fn syn(number: u64, macs: [[u8; 6]; 2], to: [IpAddr; 2], node_port: u16) -> Vec<u8> {
    // 2^17 IPv4 addresses of 198.18.0.0/15 (RFC 2544), and any number of IPv6 addresses.
    let link = PacketBuilder::ethernet2(macs[0], macs[1]);
    let port = 1024 + (number >> 18) as u16;
    let host = (number >> 1) as u32 & 0x1_ffff;
    let ip = match to[(number & 1) as usize] {
        IpAddr::V4(to) => {
            let from = Ipv4Addr::from(0xc612_0000 + host);
            link.ipv4(from.octets(), to.octets(), 64)
        }
        IpAddr::V6(to) => {
            let [high, low] = [(host >> 16) as u16, host as u16];
            let from = Ipv6Addr::new(0x2001, 0xdb8, 0x99, 0, 0, 0, high, low);
            link.ipv6(from.octets(), to.octets(), 64)
        }
    };
    let mut bytes = Vec::with_capacity(80);
    let written = ip.tcp(port, node_port, 1000, 512).syn().write(&mut bytes, &[]);
    written.expect("a packet");
    bytes
}

fn send(socket: &OwnedFd, packet: &[u8]) -> Result<()> {
    loop {
        match nix::sys::socket::send(socket.as_raw_fd(), packet, MsgFlags::empty()) {
            Ok(_) => return Ok(()),
            Err(Errno::ENOBUFS | Errno::EINTR) => sleep(Duration::from_micros(100)),
            Err(errno) => return Err(errno).context("sending a frame"),
        }
    }
}

/// Returns addresses of pods that do not exist, on a node that drops packets to them without an ICMP error. There are
/// many of them: for each destination, a flow holds one SNAT port of the first node as long as it lives.
fn missing_pods(node: &Node) -> Result<Vec<(IpAddr, &str)>> {
    node.ip("route add blackhole 10.10.2.192/26")?;
    node.ip("route add blackhole fd00:10:10:2::c0/122")?;
    let numbers = 192..224_u8;
    let v4 = numbers.clone().map(|last| IpAddr::from([10, 10, 2, last]));
    let v6 = numbers.map(|last| IpAddr::from([0xfd00, 0x10, 0x10, 2, 0, 0, 0, last.into()]));
    Ok(v4.chain(v6).map(|ip| (ip, node.name())).collect())
}

/// Starts echo servers in the pods.
fn echo(testbed: &Testbed, fixture: &TwoNodeFixture) -> Result<Vec<Process>> {
    let serve = |pod: &Pod| testbed.serve_with(pod, &[&format!("[::]:{SERVED}={}", pod.name())], &["--echo"]);
    fixture.pods.iter().map(serve).collect()
}

#[test]
fn connections_survive_a_flood_of_unanswered_syns() -> Result<()> {
    let size = Size::wanted()?;
    let map = size.map.to_string();
    let flags = ["--max-conntrack", &map, "--max-conntrack-new", &map];
    let fixture = TwoNodeFixture::with(Underlay::Vxlan, 2, &flags)?;
    let testbed = testbed();
    let _servers = echo(&testbed, &fixture)?;
    let missing = missing_pods(fixture.node("n2"))?;
    let text =
        web("echo", 20, ECHO, &fixture.endpoints(), SERVED) + &web("unanswered", 21, UNANSWERED, &missing, SERVED);
    fixture.write("web.yaml", &text)?;

    let n1 = fixture.node("n1");
    let [client, flooder] = fixture.cluster.clients() else {
        unreachable!("two clients were asked for");
    };
    let to = node_addresses(n1);
    let held = testbed.hold(client, &to.map(|ip| SocketAddr::new(ip, ECHO)), size.connections)?;
    let begun = Instant::now();
    let socket = packet_socket(flooder)?;
    let macs = [hardware_address(flooder)?, hardware_address(n1)?];
    let mut sent = 0;
    let mut arrived = 0;
    while arrived < size.syns {
        // Some SYNs may be lost on a busy machine.
        ensure!(sent < 4 * size.syns, "only {arrived} of {sent} SYNs arrived");
        for _ in 0..CHUNK.min(size.syns) {
            send(&socket, &syn(sent, macs, to, UNANSWERED))?;
            sent += 1;
        }
        arrived = fixture.agents[0].connections("unanswered", None)?;
    }
    let flooded = begun.elapsed();
    sleep(size.idle.saturating_sub(flooded));
    // New connections are served as well.
    let new = testbed.hold(client, &to.map(|ip| SocketAddr::new(ip, ECHO)), size.connections / 10)?;
    let new = new.finish()?;
    ensure!(new.live == u64::from(size.connections / 10), "new connections: {new:?}");
    let held = held.finish()?;
    println!(
        "{arrived} flows of {sent} SYNs within {:.1} s through maps of {map}; after {:.1} s {} of {} connections live",
        flooded.as_secs_f64(),
        begun.elapsed().as_secs_f64(),
        held.live,
        size.connections
    );
    ensure!(held.live == u64::from(size.connections), "{held:?}");
    for reason in ["conntrack_full", "snat_ports_exhausted"] {
        println!("{reason}: {}", fixture.dropped(reason)?);
    }
    fixture.agents.iter().try_for_each(|agent| agent.verify())
}

/// The clients do not exist, but the servers do: each SYN gets a SYN-ACK and no more.
#[test]
fn new_clients_are_served_after_a_flood_of_answered_syns() -> Result<()> {
    let map = "2000";
    let fixture = TwoNodeFixture::with(
        Underlay::Vxlan,
        2,
        &["--max-conntrack", map, "--max-conntrack-new", map],
    )?;
    let testbed = testbed();
    let _servers = echo(&testbed, &fixture)?;
    fixture.write("web.yaml", &web("echo", 20, ECHO, &fixture.endpoints(), SERVED))?;
    let n1 = fixture.node("n1");
    let to = node_addresses(n1);
    let [client, flooder] = fixture.cluster.clients() else {
        unreachable!("two clients were asked for");
    };
    // Replies to clients that do not exist have a route out of the node, as through a router.
    n1.ip_batch(&[
        "neighbour add 172.30.99.254 lladdr 02:00:00:00:00:99 dev eth0 nud permanent".to_owned(),
        "neighbour add fd00:172:30:99::254 lladdr 02:00:00:00:00:99 dev eth0 nud permanent".to_owned(),
        "route add 198.18.0.0/15 via 172.30.99.254 dev eth0".to_owned(),
        "route add 2001:db8:99::/48 via fd00:172:30:99::254 dev eth0".to_owned(),
    ])?;
    let socket = packet_socket(flooder)?;
    let macs = [hardware_address(flooder)?, hardware_address(n1)?];
    for number in 0..5000 {
        send(&socket, &syn(number, macs, to, ECHO))?;
    }
    sleep(Duration::from_secs(2));
    println!("conntrack_full: {}", fixture.dropped("conntrack_full")?);
    let new = testbed
        .hold(client, &to.map(|ip| SocketAddr::new(ip, ECHO)), 10)?
        .finish()?;
    ensure!(new.live == 10, "{new:?}");
    Ok(())
}
