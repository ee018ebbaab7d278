//! A flood of SYNs that nobody answers, and connections that live through it: some with all tests, a million by
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
use lb_tests::{Netns, Node, Pod, Process, Testbed, Underlay, scaled_count};
use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, socket};

const TESTBED: &str = env!("CARGO_BIN_EXE_lb-testbed");
/// How many SYNs, in place of a few.
const SYNS: &str = "LB_FLOOD";
/// Node ports of what answers, and of what does not.
const ECHO: u16 = 30080;
const MUTE: u16 = 30081;
/// The port at which pods send back what they get.
const SERVED: u16 = 8081;
/// How many SYNs between two looks at how many have come.
const CHUNK: u64 = 20_000;

/// How much of everything.
struct Size {
    syns: u64,
    /// Entries of either map of flows.
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

/// A socket of a place that sends frames as they are, by `eth0`.
fn raw(netns: &Netns) -> Result<OwnedFd> {
    netns.within(|| -> Result<OwnedFd> {
        // Without a protocol nothing is received.
        let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, None)?;
        // SAFETY: plain data, and all zero is a value of it.
        let mut by: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        by.sll_family = libc::AF_PACKET as u16;
        by.sll_ifindex = nix::net::if_::if_nametoindex("eth0")? as i32;
        let length = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
        // SAFETY: address and length are those of a value that lives as long as the call.
        Errno::result(unsafe { libc::bind(socket.as_raw_fd(), (&raw const by).cast(), length) })?;
        Ok(socket)
    })?
}

/// The hardware address of `eth0`.
fn hardware_address(netns: &Netns) -> Result<[u8; 6]> {
    let text = netns.ip("-oneline link show eth0")?;
    let mut words = text.split_whitespace().skip_while(|word| *word != "link/ether");
    let octets = words.nth(1).context("no hardware address")?.split(':');
    let octets: Vec<u8> = octets
        .map(|octet| u8::from_str_radix(octet, 16))
        .collect::<Result<_, _>>()?;
    octets.try_into().ok().context("six octets")
}

/// The SYN with a number, from a client that there is not, in one family or the other.
fn syn(number: u64, macs: [[u8; 6]; 2], to: [IpAddr; 2], node_port: u16) -> Vec<u8> {
    // 2^17 addresses of 198.18.0.0/15 (RFC 2544), and as many of IPv6 as one likes.
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

/// Addresses of pods that there are not, on a node that tells nobody so. Many: each has a client's port of the first node
/// for as long as a flow is remembered.
fn mute(node: &Node) -> Result<Vec<(IpAddr, &str)>> {
    node.ip("route add blackhole 10.10.2.192/26")?;
    node.ip("route add blackhole fd00:10:10:2::c0/122")?;
    let numbers = 192..224_u8;
    let v4 = numbers.clone().map(|last| IpAddr::from([10, 10, 2, last]));
    let v6 = numbers.map(|last| IpAddr::from([0xfd00, 0x10, 0x10, 2, 0, 0, 0, last.into()]));
    Ok(v4.chain(v6).map(|ip| (ip, node.name())).collect())
}

/// Servers in the pods that send back what they get.
fn echo(testbed: &Testbed, fixture: &TwoNodeFixture) -> Result<Vec<Process>> {
    let serve = |pod: &Pod| testbed.serve_with(pod, &[&format!("[::]:{SERVED}={}", pod.name())], &["--echo"]);
    fixture.pods.iter().map(serve).collect()
}

#[test]
fn connections_survive_a_flood_of_unanswered_syns() -> Result<()> {
    let size = Size::wanted()?;
    let map = size.map.to_string();
    let flags = ["--max-conntrack", &map, "--max-conntrack-new", &map];
    let fixture = TwoNodeFixture::with(TESTBED, Underlay::Vxlan, 2, &flags)?;
    let testbed = Testbed::new(TESTBED);
    let _servers = echo(&testbed, &fixture)?;
    let nobody = mute(fixture.node("n2"))?;
    let text = web("echo", 20, ECHO, &fixture.endpoints(), SERVED) + &web("mute", 21, MUTE, &nobody, SERVED);
    fixture.write("web.yaml", &text)?;

    let n1 = fixture.node("n1");
    let [client, flooder] = fixture.cluster.clients() else {
        unreachable!("two clients were asked for");
    };
    let to = node_addresses(n1);
    let held = testbed.hold(client, &to.map(|ip| SocketAddr::new(ip, ECHO)), size.connections)?;
    let begun = Instant::now();
    let socket = raw(flooder)?;
    let macs = [hardware_address(flooder)?, hardware_address(n1)?];
    let mut sent = 0;
    let mut come = 0;
    while come < size.syns {
        // Some may be lost on the way, where this machine is busy.
        ensure!(sent < 4 * size.syns, "of {sent} only {come} have come");
        for _ in 0..CHUNK.min(size.syns) {
            send(&socket, &syn(sent, macs, to, MUTE))?;
            sent += 1;
        }
        come = fixture.agents[0].connections("mute", None)?;
    }
    let flooded = begun.elapsed();
    sleep(size.idle.saturating_sub(flooded));
    // Others are served as well.
    let new = testbed.hold(client, &to.map(|ip| SocketAddr::new(ip, ECHO)), size.connections / 10)?;
    let new = new.finish()?;
    ensure!(new.live == u64::from(size.connections / 10), "new ones: {new:?}");
    let held = held.finish()?;
    println!(
        "{come} flows of {sent} SYNs within {:.1} s through maps of {map}; after {:.1} s {} of {} connections live",
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

/// The clients are not there, but the servers are: each SYN is answered, and that is all.
#[test]
fn new_clients_are_served_after_a_flood_of_answered_syns() -> Result<()> {
    let map = "2000";
    let fixture = TwoNodeFixture::with(
        TESTBED,
        Underlay::Vxlan,
        2,
        &["--max-conntrack", map, "--max-conntrack-new", map],
    )?;
    let testbed = Testbed::new(TESTBED);
    let _servers = echo(&testbed, &fixture)?;
    fixture.write("web.yaml", &web("echo", 20, ECHO, &fixture.endpoints(), SERVED))?;
    let n1 = fixture.node("n1");
    let to = node_addresses(n1);
    let [client, flooder] = fixture.cluster.clients() else {
        unreachable!("two clients were asked for");
    };
    // Answers to who is not there have a way out of the node, as through a router.
    n1.ip_batch(&[
        "neighbour add 172.30.99.254 lladdr 02:00:00:00:00:99 dev eth0 nud permanent".to_owned(),
        "neighbour add fd00:172:30:99::254 lladdr 02:00:00:00:00:99 dev eth0 nud permanent".to_owned(),
        "route add 198.18.0.0/15 via 172.30.99.254 dev eth0".to_owned(),
        "route add 2001:db8:99::/48 via fd00:172:30:99::254 dev eth0".to_owned(),
    ])?;
    let socket = raw(flooder)?;
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
