//! Port reuse by real outside clients, and clients that come by a device without a link layer.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use etherparse::{NetHeaders, PacketBuilder, PacketHeaders, TransportHeader};
use lb_tests::fixture::{POD_PORTS, TwoNodeFixture, endpoints_of, node_addresses, socket_kind};
use lb_tests::manifests::{web, web_and_dns};
use lb_tests::{
    CallResult, Netns, Node, SocketCall, SocketKind, Underlay, scaled_count_above, scaled_timeout, testbed,
};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

/// The node ports for TCP and for UDP.
const WEB: [u16; 2] = [30080, 30053];
/// Limit for a connection without retransmission: a SYN is retransmitted after a second.
const WITHOUT_RETRANSMISSION: Duration = Duration::from_millis(900);
/// Timeout of a connection on a busy machine.
const TIMEOUT: Duration = Duration::from_secs(5);

/// How a connection ends.
#[derive(Debug, Clone, Copy)]
enum End {
    /// The server closes first, then the client.
    Server,
    /// The client closes first, then the server.
    Client,
    /// The client resets the connection.
    Reset,
}

/// Connects from a given port, which may have been in use a moment ago. Retries until the client's kernel has received
/// the last ACK of the old connection.
fn connect_from(netns: &Netns, port: u16, to: SocketAddr) -> Result<TcpStream> {
    let deadline = Instant::now() + scaled_timeout(WITHOUT_RETRANSMISSION);
    loop {
        match try_connect(netns, port, to) {
            Err(error)
                if error.root_cause().downcast_ref() == Some(&Errno::EADDRNOTAVAIL) && Instant::now() < deadline =>
            {
                sleep(Duration::from_millis(2));
            }
            result => return result,
        }
    }
}

fn try_connect(netns: &Netns, port: u16, to: SocketAddr) -> Result<TcpStream> {
    let connected = netns.within(|| -> Result<OwnedFd> {
        let (family, any) = if to.is_ipv4() {
            (AddressFamily::Inet, IpAddr::from([0; 4]))
        } else {
            (AddressFamily::Inet6, IpAddr::from([0; 16]))
        };
        let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&socket, sockopt::ReuseAddr, &true)?;
        let limit = TimeVal::milliseconds(scaled_timeout(TIMEOUT).as_millis() as i64);
        setsockopt(&socket, sockopt::SendTimeout, &limit)?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &limit)?;
        let from = SocketAddr::new(any, port);
        bind(socket.as_raw_fd(), &SockaddrStorage::from(from)).context("bind")?;
        connect(socket.as_raw_fd(), &SockaddrStorage::from(to)).context("connect")?;
        Ok(socket)
    });
    Ok(TcpStream::from(connected??))
}

/// Connects from a port, and returns all that the server sends.
fn transfer(netns: &Netns, port: u16, to: SocketAddr, end: End) -> Result<String> {
    let mut stream = connect_from(netns, port, to)?;
    let mut text = String::new();
    match end {
        End::Server => {
            stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")?;
            stream.read_to_string(&mut text).context("reading to the end")?;
        }
        End::Client => {
            stream.shutdown(std::net::Shutdown::Write)?;
            stream.read_to_string(&mut text).context("reading to the end")?;
        }
        End::Reset => {
            let mut buffer = [0; 64];
            let length = stream.read(&mut buffer).context("reading")?;
            text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            setsockopt(
                &stream,
                sockopt::Linger,
                &libc::linger {
                    l_onoff: 1,
                    l_linger: 0,
                },
            )?;
        }
    }
    Ok(text)
}

#[test]
fn reused_client_port_connects_at_once() -> Result<()> {
    const NODE_PORTS: [u16; 2] = [30081, 30082];
    let fixture = TwoNodeFixture::new(Underlay::Vxlan)?;
    let mut servers = Vec::new();
    for pod in &fixture.pods {
        servers.push(testbed().serve_with(pod, &[&format!("[::]:8081={}", pod.name())], &["--http"])?);
    }
    let [plain, http] = NODE_PORTS;
    let ends = fixture.endpoints();
    let text = web("plain", 20, plain, &ends, POD_PORTS[0]) + &web("http", 21, http, &ends, 8081);
    fixture.write("web.yaml", &text)?;
    let client = fixture.cluster.client();
    // TIME_WAIT would keep the port for a minute.
    client.sysctl("net.ipv4.tcp_max_tw_buckets", "0")?;
    let mut retransmitted = 0;
    for (v6, address) in node_addresses(fixture.node("n1")).into_iter().enumerate() {
        for end in [End::Server, End::Client, End::Reset] {
            let to = SocketAddr::new(address, if matches!(end, End::Server) { http } else { plain });
            let mut by = [0_u32; 2];
            for time in 0..scaled_count_above(50, 15) {
                let what = || format!("{to}, ended by {end:?}, attempt {time}");
                let begun = Instant::now();
                let text = transfer(client, 4000 + v6 as u16, to, end).with_context(what)?;
                if begun.elapsed() > scaled_timeout(WITHOUT_RETRANSMISSION) {
                    println!("{:?} for {}", begun.elapsed(), what());
                    retransmitted += 1;
                }
                match (text.contains("one"), text.contains("two")) {
                    (true, false) => by[0] += 1,
                    (false, true) => by[1] += 1,
                    _ => bail!("{to}, ended by {end:?}: {text:?}"),
                }
            }
            // One of two backends is missed in fifteen connections with a probability of 2^-14.
            ensure!(by.iter().all(|times| *times > 0), "{to}, ended by {end:?}: {by:?}");
        }
    }
    // This machine may be busy for a moment.
    ensure!(retransmitted <= 2, "{retransmitted} connections took a retransmission");
    Ok(())
}

#[test]
fn clients_with_the_same_source_port_are_separate_flows() -> Result<()> {
    // Each round uses another port: a closed connection keeps its port for a minute.
    let mut source_ports = 5000..;
    let fixture = TwoNodeFixture::with(Underlay::Vxlan, 2, &[])?;
    let [_, two] = &fixture.pods;
    let _servers = [
        testbed().serve_with(two, &["[::]:8081=two"], &["--echo"])?,
        testbed().serve_datagrams(two, &["[::]:5354=two"])?,
    ];
    // Two Services with the same backend, in both protocols.
    let text: String = [("a", 20, [30080, 30053]), ("b", 21, [30081, 30054])]
        .map(|(name, last, ports)| {
            web_and_dns(
                name,
                last,
                Some(ports),
                "type: NodePort",
                &endpoints_of(two),
                [8081, 5354],
            )
        })
        .concat();
    fixture.write("web.yaml", &text)?;
    for node in ["n1", "n2"] {
        for address in node_addresses(fixture.node(node)) {
            let any = if address.is_ipv4() { "0.0.0.0" } else { "::" };
            let from = SocketAddr::new(any.parse()?, source_ports.next().context("a port")?);
            let to = |port: u16| SocketAddr::new(address, port);
            // Two clients at one node port, and each at both Services.
            let mut streams = Vec::new();
            let mut datagrams = Vec::new();
            for client in fixture.cluster.clients() {
                let mut stream = testbed().scripted_socket(client, socket_kind(false, address))?;
                ensure!(stream.call(&SocketCall::Bind(from))? == CallResult::Done, "bind");
                stream.connect(to(30080))?;
                ensure!(stream.receive()?.1 == "two\n", "no greeting");
                streams.push(stream);
                let mut socket = testbed().scripted_socket(client, socket_kind(true, address))?;
                ensure!(socket.call(&SocketCall::Bind(from))? == CallResult::Done, "bind");
                datagrams.push(socket);
            }
            for round in 0..3 {
                for (number, stream) in streams.iter_mut().enumerate() {
                    stream.send(&format!("{node}-{number}-{round}"))?;
                }
                for (number, stream) in streams.iter_mut().enumerate() {
                    let (_, text) = stream.receive()?;
                    ensure!(text == format!("{node}-{number}-{round}"), "{address}: {text:?}");
                }
                for port in [30053, 30054] {
                    for (number, socket) in datagrams.iter_mut().enumerate() {
                        socket.send_to(to(port), &format!("{number}-{round}"))?;
                    }
                    for (number, socket) in datagrams.iter_mut().enumerate() {
                        socket.receive_reply(to(port), &format!("{number}-{round}"))?;
                    }
                }
                // Both at once: the backend sees one client address, and must not mix up the two.
                for socket in &mut datagrams {
                    socket.send_to(to(30053), "a")?;
                    socket.receive_reply(to(30053), "a")?;
                    socket.send_to(to(30054), "b")?;
                    socket.receive_reply(to(30054), "b")?;
                }
            }
        }
    }
    Ok(())
}

#[test]
fn oversized_ipv6_packet_over_vxlan_gets_packet_too_big() -> Result<()> {
    let fixture = TwoNodeFixture::new(Underlay::Vxlan)?;
    let [n1, n2] = ["n1", "n2"].map(|name| fixture.node(name));
    for (node, other, number) in [(n1, n2, 2), (n2, n1, 1)] {
        let network = other.pod_network6();
        node.ip_batch(&[
            format!("address add {}/128 dev flannel.1 nodad", node.pod_network6()),
            format!("neighbour replace {network} lladdr 02:1b:00:00:f1:{number:02x} dev flannel.1 nud permanent"),
            format!("route delete {network}/64"),
            format!("route add {network}/64 via {network} dev flannel.1 onlink"),
        ])?;
    }
    fixture.write(
        "web.yaml",
        &web_and_dns(
            "web",
            20,
            Some(WEB),
            "type: NodePort",
            &endpoints_of(&fixture.pods[1]),
            POD_PORTS,
        ),
    )?;
    let client = fixture.client();
    let to = SocketAddr::new(n1.address6().into(), WEB[1]);
    let served = fixture.request(client, true, to)?;
    served.ensure_served_by("two", Some(n1.pod_network6().into()), "over VXLAN")?;
    let mut socket = testbed().scripted_socket(client, SocketKind::Udp6)?;
    socket.connect(to)?;
    // 1,500 bytes with the headers.
    socket.send(&"x".repeat(1452))?;
    let deadline = Instant::now() + scaled_timeout(Duration::from_secs(5));
    while !client
        .ip(&format!("-6 route get {}", n1.address6()))?
        .contains("mtu 1450")
    {
        ensure!(Instant::now() < deadline, "the client's route has no lower MTU");
        sleep(Duration::from_millis(20));
    }
    ensure!(fixture.dropped("too_big")? > 0, "the drop is not counted");
    assert_eq!(
        socket.call(&SocketCall::Send("a".to_owned()))?,
        CallResult::Failed(libc::EMSGSIZE),
        "the socket reports the MTU too"
    );
    // The longest payload that fits, minus the prefix of the answer.
    let text = "x".repeat(1450 - 48 - 64);
    socket.send(&text)?;
    ensure!(socket.receive()?.1.ends_with(&text), "another answer");
    let counters = client.run("cat", &["/proc/net/snmp6"])?;
    let errors = counters.lines().find(|line| line.starts_with("Icmp6InErrors"));
    ensure!(
        errors.is_some_and(|line| line.ends_with("\t0") || line.ends_with(" 0")),
        "{errors:?}"
    );
    Ok(())
}

/// A tun device, and the packets that this test sends and receives by it.
struct Tun(File);

impl Tun {
    const NAME: &str = "tun0";

    fn new(node: &Node) -> Result<Self> {
        let file = node.within(|| -> Result<File> {
            let file = File::options()
                .read(true)
                .write(true)
                .open("/dev/net/tun")
                .context("opening tun")?;
            // SAFETY: ifreq is plain data for which all zeros is a valid value.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, byte) in request.ifr_name.iter_mut().zip(Self::NAME.bytes()) {
                *to = byte as libc::c_char;
            }
            request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
            // SAFETY: TUNSETIFF reads and writes one ifreq, and `request` lives until the call returns.
            Errno::result(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })?;
            fcntl(&file, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
            Ok(file)
        })??;
        Ok(Self(file))
    }

    /// Sends a packet, and returns the first one received for its source address and port.
    fn ask(&mut self, packet: &[u8], from: SocketAddr) -> Result<Vec<u8>> {
        self.0.write_all(packet).context("sending")?;
        let deadline = Instant::now() + scaled_timeout(Duration::from_secs(2));
        let mut buffer = [0; 2048];
        loop {
            match self.0.read(&mut buffer) {
                Ok(length) => {
                    let packet = &buffer[..length];
                    if addresses(packet).is_ok_and(|(_, to, _)| to == from) {
                        return Ok(packet.to_vec());
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                    ensure!(Instant::now() < deadline, "no reply");
                    sleep(Duration::from_millis(2));
                }
                Err(error) => return Err(error).context("receiving"),
            }
        }
    }
}

/// Returns source and destination of a packet, and its content: "syn-ack", "reset", or a datagram's text. Fails if a
/// checksum is wrong.
fn addresses(packet: &[u8]) -> Result<(SocketAddr, SocketAddr, String)> {
    let headers = PacketHeaders::from_ip_slice(packet)?;
    let payload = headers.payload.slice();
    let (from, to): (IpAddr, IpAddr) = match headers.net.as_ref().context("no IP")? {
        NetHeaders::Ipv4(ip, _) => (ip.source.into(), ip.destination.into()),
        NetHeaders::Ipv6(ip, _) => (ip.source.into(), ip.destination.into()),
        other => bail!("{other:?}"),
    };
    let ((from_port, to_port), what, is, right) = match (&headers.transport, &headers.net) {
        (Some(TransportHeader::Tcp(tcp)), Some(net)) => {
            let right = match net {
                NetHeaders::Ipv4(ip, _) => tcp.calc_checksum_ipv4(ip, payload)?,
                NetHeaders::Ipv6(ip, _) => tcp.calc_checksum_ipv6(ip, payload)?,
                other => bail!("{other:?}"),
            };
            let what = match (tcp.syn, tcp.rst, tcp.ack) {
                (true, false, true) => "syn-ack",
                (false, true, true) => "reset",
                _ => "another segment",
            };
            (
                (tcp.source_port, tcp.destination_port),
                what.to_owned(),
                tcp.checksum,
                right,
            )
        }
        (Some(TransportHeader::Udp(udp)), Some(net)) => {
            let right = match net {
                NetHeaders::Ipv4(ip, _) => udp.calc_checksum_ipv4(ip, payload)?,
                NetHeaders::Ipv6(ip, _) => udp.calc_checksum_ipv6(ip, payload)?,
                other => bail!("{other:?}"),
            };
            let what = String::from_utf8_lossy(payload).into_owned();
            ((udp.source_port, udp.destination_port), what, udp.checksum, right)
        }
        other => bail!("{other:?}"),
    };
    ensure!(is == right, "wrong checksum: {headers:?}");
    Ok((SocketAddr::new(from, from_port), SocketAddr::new(to, to_port), what))
}

/// Returns a SYN or a datagram.
fn packet(udp: bool, from: SocketAddr, to: SocketAddr) -> Vec<u8> {
    let ip = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => PacketBuilder::ipv4(from.octets(), to.octets(), 64),
        (IpAddr::V6(from), IpAddr::V6(to)) => PacketBuilder::ipv6(from.octets(), to.octets(), 64),
        _ => panic!("one family"),
    };
    let mut bytes = Vec::new();
    let written = if udp {
        ip.udp(from.port(), to.port()).write(&mut bytes, b"hello")
    } else {
        ip.tcp(from.port(), to.port(), 1000, 512).syn().write(&mut bytes, &[])
    };
    written.expect("a packet");
    bytes
}

#[test]
fn client_behind_tun_reaches_local_backend_and_is_refused_without_endpoints() -> Result<()> {
    check_behind_tun(0)
}

#[test]
fn client_behind_tun_reaches_remote_backend() -> Result<()> {
    check_behind_tun(1)
}

fn check_behind_tun(backend: usize) -> Result<()> {
    const NO_ENDPOINTS: u16 = 30081;
    let fixture = TwoNodeFixture::new(Underlay::Vxlan)?;
    let pod = &fixture.pods[backend];
    let empty = web_and_dns(
        "empty",
        21,
        Some([NO_ENDPOINTS, 30054]),
        "type: NodePort",
        &[],
        POD_PORTS,
    );
    let text = web_and_dns("web", 20, Some(WEB), "type: NodePort", &endpoints_of(pod), POD_PORTS) + &empty;
    fixture.write("web.yaml", &text)?;
    let n1 = fixture.node("n1");
    let mut tun = Tun::new(n1)?;
    n1.ip_batch(&[
        "address add 172.31.0.1/24 dev tun0".to_owned(),
        "address add fd00:172:31::1/64 dev tun0 nodad".to_owned(),
        "link set tun0 up".to_owned(),
    ])?;
    let deadline = Instant::now() + scaled_timeout(Duration::from_secs(10));
    while !fixture.agents[0]
        .status()?
        .devices
        .iter()
        .any(|device| device.name == Tun::NAME && device.attached.is_some())
    {
        ensure!(Instant::now() < deadline, "tun0 is not served");
        sleep(Duration::from_millis(20));
    }
    for (address, client) in node_addresses(n1).into_iter().zip(["172.31.0.7", "fd00:172:31::7"]) {
        for (udp, port) in [false, true].into_iter().zip(WEB) {
            let from = SocketAddr::new(client.parse()?, 4000);
            let to = SocketAddr::new(address, port);
            let answer = tun
                .ask(&packet(udp, from, to), from)
                .with_context(|| format!("{to} udp={udp}"))?;
            let (by, _, what) = addresses(&answer)?;
            ensure!(by == to, "sent to {to}, but {by} replied");
            let right = if udp {
                what.starts_with(&format!("{} ", pod.name()))
            } else {
                what == "syn-ack"
            };
            ensure!(right, "{to}: {what}");
        }
        let from = SocketAddr::new(client.parse()?, 4001);
        let to = SocketAddr::new(address, NO_ENDPOINTS);
        let (by, _, what) = addresses(&tun.ask(&packet(false, from, to), from)?)?;
        ensure!((by, what.as_str()) == (to, "reset"), "{to}: {what} from {by}");
    }
    Ok(())
}
