//! DNS and HTTP clients that are in everyday use: a real DNS server and a web server behind Services, queried by dig,
//! the resolvers of glibc and musl, curl and Python.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lb_tests::manifests::{Manifests, Port, service, slice};
use lb_tests::{
    CallResult, Cluster, Netns, Pod, Process, RunningAgent, ScriptedSocket, SocketCall, SocketKind, scaled_count,
    scaled_timeout, testbed,
};
use serde_json::{Value, json};

/// The name that clients look up, and its addresses: those of the web server's Service.
const NAME: &str = "web.example.test";
const WEB: [&str; 2] = ["10.96.0.20", "fd00:96::20"];
/// The addresses of the DNS Service.
const DNS: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
/// The addresses of a second DNS Service with a server of its own.
const OTHER: [&str; 2] = ["10.96.0.11", "fd00:96::11"];
/// The address of a Service without a server.
const NO_SERVER: &str = "10.96.0.12";

/// Starts dnsmasq in a pod, on port 5353, UDP and TCP.
fn start_dnsmasq(pod: &Pod) -> Result<Process> {
    let long = "long,".to_owned() + &["x".repeat(250).as_str(); 6].join(",");
    let mut command = pod.command("sh")?;
    command
        .stdin(Stdio::null())
        .args(["-c", "exec dnsmasq \"$@\" 2>&1", "dnsmasq"]);
    command.args([
        "--no-daemon",
        "--conf-file=/dev/null",
        "--no-resolv",
        "--no-hosts",
        "--user=root",
        "--group=",
        "--port=5353",
        "--log-facility=-",
        &format!("--host-record={NAME},{},{}", WEB[0], WEB[1]),
        // Longer than a response over UDP may be.
        &format!("--txt-record={long}"),
    ]);
    let mut process = Process::spawn_reading(&mut command)?;
    while !process
        .line(scaled_timeout(Duration::from_secs(10)))?
        .contains("started")
    {}
    Ok(process)
}

/// Returns the manifest of a Service in both families.
fn dual_stack_service(name: &str, ips: [&str; 2], ports: &[(Port<'_>, u16)], pods: &[&Pod]) -> String {
    let frontends: Vec<_> = ports.iter().map(|(port, _)| *port).collect();
    let mut text = service(name, &ips.join(","), &frontends, "");
    for (port, target) in ports {
        let port = Port { port: *target, ..*port };
        let v4: Vec<(IpAddr, &str)> = pods.iter().map(|pod| (pod.address().into(), "n1")).collect();
        let v6: Vec<(IpAddr, &str)> = pods.iter().map(|pod| (pod.address6().into(), "n1")).collect();
        text += &slice(name, port, &v4);
        text += &slice(name, port, &v6);
    }
    text
}

/// Returns the manifest of a Service like kube-dns: DNS over UDP and TCP, and metrics.
fn dns_service(name: &str, ips: [&str; 2], pods: &[&Pod]) -> String {
    let ports = [
        (Port::udp("dns", 53), 5353),
        (Port::tcp("dns-tcp", 53), 5353),
        (Port::tcp("metrics", 9153), 9153),
    ];
    dual_stack_service(name, ips, &ports, pods)
}

struct Setup {
    agent: RunningAgent,
    client: Pod,
    _processes: Vec<Process>,
    cluster: Cluster,
}

/// Creates two DNS servers with a Service each, and a web server.
fn setup() -> Result<Setup> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let [client, dns, other, web] = ["client", "dns", "other", "web"]
        .map(|name| cluster.add_pod("n1", name).with_context(|| format!("pod {name}")));
    let (client, dns, other, web) = (client?, dns?, other?, web?);
    let processes = vec![
        start_dnsmasq(&dns)?,
        start_dnsmasq(&other)?,
        testbed().serve_with(&dns, &["[::]:9153=metrics"], &["--http"])?,
        testbed().serve_with(&web, &["[::]:8080=page"], &["--http"])?,
    ];
    let manifests = Manifests::new(&cluster)?;
    let text = [
        dns_service("kube-dns", DNS, &[&dns]),
        dns_service("other-dns", OTHER, &[&other]),
        service("no-server", NO_SERVER, &[Port::udp("dns", 53)], ""),
        dual_stack_service("web", WEB, &[(Port::tcp("http", 80), 8080)], &[&web]),
    ];
    manifests.write("services.yaml", &text.concat())?;
    let agent = manifests.serve(&cluster, "n1", &[])?;
    Ok(Setup {
        agent,
        client,
        _processes: processes,
        cluster,
    })
}

impl Setup {
    /// Returns a pod and the node.
    fn clients(&self) -> [&Netns; 2] {
        [self.client.deref(), self.cluster.node("n1").deref()]
    }

    /// Writes a `resolv.conf` and returns its path.
    fn servers(&self, servers: &[&str], options: &str) -> Result<PathBuf> {
        let path = self.cluster.scratch().join("resolv.conf");
        let lines: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
        fs::write(&path, format!("{lines}options {options}\n"))?;
        Ok(path)
    }
}

/// Returns the arguments of unshare(1) for a program that sees this `resolv.conf`, as a container sees one of its own.
fn with_resolv_conf<'a>(conf: &'a Path, words: &[&'a str]) -> Result<Vec<&'a str>> {
    let conf = conf.to_str().context("a path is not UTF-8")?;
    let script = "mount --bind \"$0\" /etc/resolv.conf && exec \"$@\"";
    Ok([&["--mount", "sh", "-c", script, conf], words].concat())
}

fn run_with_resolv_conf(netns: &Netns, conf: &Path, words: &[&str]) -> Result<String> {
    netns.run("unshare", &with_resolv_conf(conf, words)?)
}

/// Returns the path of the program that calls the resolver of a C library: `glibc` or `musl`.
fn resolver(library: &str) -> Result<String> {
    let path = testbed().program().with_file_name(format!("lb-resolve-{library}"));
    ensure!(
        path.is_file(),
        "{} is missing: run cargo xtask test, which builds it",
        path.display()
    );
    Ok(path.to_str().context("a path is not UTF-8")?.to_owned())
}

#[test]
fn dig_queries_over_udp_and_tcp() -> Result<()> {
    let setup = setup()?;
    for netns in setup.clients() {
        let dig = |words: &[&str]| netns.run("dig", &[&["+time=5", "+tries=1"], words].concat());
        for server in DNS {
            let at = format!("@{server}");
            for how in ["+notcp", "+tcp"] {
                let output = dig(&[&at, NAME, "A", "+short", how])?;
                ensure!(output.trim() == WEB[0], "{} {at} {how}: {output}", netns.name());
            }
            let output = dig(&[&at, NAME, "AAAA", "+short"])?;
            ensure!(output.trim() == WEB[1], "{} {at}: {output}", netns.name());
            // dig reports the server that answered, and warns if an answer comes from another address.
            let output = dig(&[&at, NAME])?;
            ensure!(output.contains(&format!("SERVER: {server}#53")), "{output}");
            ensure!(!output.contains("unexpected source"), "{output}");
            // The response is truncated over UDP, and dig retries over TCP.
            let output = dig(&[&at, "long", "TXT", "+noedns", "+bufsize=512"])?;
            ensure!(output.contains("Truncated, retrying in TCP mode"), "{output}");
            ensure!(output.matches(&"x".repeat(250)).count() == 6, "{output}");
        }
    }
    for (port, least) in [("dns", 16), ("dns-tcp", 8)] {
        let counted = setup.agent.connections("kube-dns", Some(port))?;
        ensure!(
            counted >= least,
            "{port}: {counted} connections, expected at least {least}"
        );
    }
    ensure!(setup.agent.connections("other-dns", Some("dns"))? == 0);
    Ok(())
}

#[test]
fn glibc_resolves_names_and_curl_fetches() -> Result<()> {
    let setup = setup()?;
    for netns in setup.clients() {
        for server in DNS {
            let conf = setup.servers(&[server], "timeout:5 attempts:1")?;
            for (database, address) in [("ahostsv4", WEB[0]), ("ahostsv6", WEB[1])] {
                let output = run_with_resolv_conf(netns, &conf, &["getent", database, NAME])?;
                ensure!(output.starts_with(address), "{} {server}: {output}", netns.name());
            }
            for family in ["-4", "-6"] {
                let url = format!("http://{NAME}/");
                let page = run_with_resolv_conf(netns, &conf, &["curl", family, "-sS", "--max-time", "20", &url])?;
                ensure!(page.trim_end() == "page", "{} {server} {family}: {page}", netns.name());
            }
            // The third port of that Service.
            let host = if server.contains(':') {
                format!("[{server}]")
            } else {
                server.to_owned()
            };
            let url = format!("http://{host}:9153/metrics");
            let page = netns.run("curl", &["-sS", "--max-time", "20", &url])?;
            ensure!(page.trim_end() == "metrics", "{} {url}: {page}", netns.name());
        }
    }
    Ok(())
}

#[test]
fn musl_queries_all_servers_from_one_socket() -> Result<()> {
    let setup = setup()?;
    let program = resolver("musl")?;
    let count = 20;
    let lookups = count.to_string();
    for netns in setup.clients() {
        for (servers, others) in [
            // Two servers of one family, two of both families (an IPv6 socket sends to v4-mapped addresses), and one
            // server that refuses.
            (&[DNS[0], OTHER[0]][..], count),
            (&[DNS[0], OTHER[1]][..], count),
            (&[DNS[1], OTHER[1]][..], count),
            (&[NO_SERVER, DNS[0]][..], 0),
        ] {
            let before = (
                setup.agent.connections("kube-dns", Some("dns"))?,
                setup.agent.connections("other-dns", Some("dns"))?,
            );
            let conf = setup.servers(servers, "timeout:5 attempts:1")?;
            let output = run_with_resolv_conf(netns, &conf, &[&program, NAME, "0", &lookups])?;
            ensure!(
                output.contains(&format!("asked {count} failed 0")),
                "{servers:?}: {output}"
            );
            let asked = setup.agent.connections("kube-dns", Some("dns"))? - before.0;
            let queries_to_other = setup.agent.connections("other-dns", Some("dns"))? - before.1;
            ensure!(
                (asked, queries_to_other) == (count, others),
                "{} {servers:?}: flows {asked} and {queries_to_other}, expected {count} and {others}",
                netns.name()
            );
        }
    }
    Ok(())
}

#[test]
fn python_clients_see_service_addresses() -> Result<()> {
    let setup = setup()?;
    let client = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/client.py");
    let client = client.to_str().context("a path is not UTF-8")?;
    for netns in setup.clients() {
        for (dns, web) in DNS.into_iter().zip(WEB) {
            let output = netns.run("python3", &["-I", client, dns, web])?;
            let output: Value = serde_json::from_str(&output).with_context(|| output.clone())?;
            let server = json!([dns, 53]);
            let expected = json!({
                "unconnected": server, "connected": [server, server], "stream": server, "page": "page\n",
            });
            ensure!(output == expected, "{}: {output}", netns.name());
        }
    }
    Ok(())
}

/// A resolver that runs until its standard input is closed.
struct Lookups {
    process: Process,
    input: std::process::ChildStdin,
}

impl Lookups {
    fn start(netns: &Netns, conf: &Path, program: &str) -> Result<Self> {
        let mut command = netns.command("unshare")?;
        command
            .args(with_resolv_conf(conf, &[program, NAME, "0", "0"])?)
            .stdin(Stdio::piped());
        let mut process = Process::spawn_ready(&mut command, scaled_timeout(Duration::from_secs(10)))?;
        let input = process.take_stdin().context("no standard input")?;
        Ok(Self { process, input })
    }

    /// Returns the number of lookups; fails if one failed.
    fn finish(mut self) -> Result<u64> {
        drop(self.input);
        let mut lines = Vec::new();
        loop {
            let line = self.process.line(scaled_timeout(Duration::from_secs(20)))?;
            if let Some(counts) = line.strip_prefix("asked ") {
                println!("{line}");
                let asked: u64 = counts.split(' ').next().context("no count")?.parse()?;
                ensure!(counts.contains(" failed 0 "), "{lines:?} {line}");
                return Ok(asked);
            }
            lines.push(line);
        }
    }
}

/// A client with one connected socket. It connects a new socket only after a failure.
struct ReconnectingClient<'a> {
    netns: &'a Netns,
    server: SocketAddr,
    kind: SocketKind,
    socket: ScriptedSocket,
    /// Number of sockets that were closed under the client.
    closed: u64,
}

impl<'a> ReconnectingClient<'a> {
    fn new(netns: &'a Netns, kind: SocketKind, server: &str) -> Result<Self> {
        let server = SocketAddr::new(server.parse()?, 53);
        Ok(Self {
            netns,
            server,
            kind,
            socket: Self::connected(netns, kind, server)?,
            closed: 0,
        })
    }

    fn connected(netns: &Netns, kind: SocketKind, server: SocketAddr) -> Result<ScriptedSocket> {
        let mut socket = testbed().scripted_socket(netns, kind)?;
        socket.connect(server)?;
        Ok(socket)
    }

    fn attempt(socket: &mut ScriptedSocket) -> Result<CallResult> {
        // A query for the A record of a name that does not exist.
        let question = "\x01\x02\x01\0\0\x01\0\0\0\0\0\0\x04none\x04test\0\0\x01\0\x01";
        match socket.call(&SocketCall::Send(question.to_owned()))? {
            CallResult::Done => socket.call(&SocketCall::Receive),
            failed => Ok(failed),
        }
    }

    /// Sends a query. If the first attempt fails, a second one on a new socket must be answered.
    fn ask(&mut self) -> Result<()> {
        let first = Self::attempt(&mut self.socket)?;
        if matches!(first, CallResult::Received(..)) {
            return Ok(());
        }
        self.closed += 1;
        self.socket = Self::connected(self.netns, self.kind, self.server)?;
        let second = Self::attempt(&mut self.socket)?;
        ensure!(matches!(second, CallResult::Received(..)), "{first:?}, then {second:?}");
        Ok(())
    }
}

/// Returns the sockets of a network namespace that the kernel shows as connected to an address.
fn sockets_connected_to(netns: &Netns, address: IpAddr) -> Result<Vec<String>> {
    let address = match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    };
    let text = netns.run("ss", &["-H", "-n", "-u", "-a", "dst", &address])?;
    Ok(text.lines().map(str::to_owned).collect())
}

#[test]
fn names_resolve_while_the_dns_server_is_replaced_100_times() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let client = cluster.add_pod("n1", "client")?;
    let pods: Vec<Pod> = (0..8)
        .map(|i| cluster.add_pod("n1", &format!("dns-{i}")))
        .collect::<Result<_>>()?;
    let manifests = Manifests::new(&cluster)?;
    let publish = |pod: &Pod| manifests.write("services.yaml", &dns_service("kube-dns", DNS, &[pod]));
    let mut server = start_dnsmasq(&pods[0])?;
    publish(&pods[0])?;
    let agent = manifests.serve(&cluster, "n1", &[])?;
    let node: &Netns = cluster.node("n1");
    let namespaces: [&Netns; 2] = [&client, node];

    // Two attempts of one second each: glibc takes the timeout for one attempt, musl for all attempts together.
    let second = scaled_timeout(Duration::from_secs(1));
    let mut lookups = Vec::new();
    let mut sockets = Vec::new();
    for netns in namespaces {
        for (library, server, all) in [
            ("glibc", DNS[0], 1),
            ("glibc", DNS[1], 1),
            ("musl", DNS[0], 2),
            ("musl", DNS[1], 2),
        ] {
            let conf = cluster.scratch().join(format!("resolv-{library}-{}", lookups.len()));
            fs::write(
                &conf,
                format!(
                    "nameserver {server}\noptions timeout:{} attempts:2\n",
                    all * second.as_secs()
                ),
            )?;
            lookups.push(Lookups::start(netns, &conf, &resolver(library)?)?);
        }
        for (kind, server) in [
            (SocketKind::Udp4, DNS[0]),
            (SocketKind::Udp6, DNS[1]),
            (SocketKind::Udp6, DNS[0]),
        ] {
            sockets.push(ReconnectingClient::new(netns, kind, server)?);
        }
    }

    let is_published = |pod: &Pod| -> Result<bool> {
        let backends: Vec<Value> = agent.json(&["backend", "list"])?;
        let used = |address: IpAddr| {
            let address = address.to_string();
            backends
                .iter()
                .any(|row| row["address"] == address.as_str() && row["draining"] == false)
        };
        Ok(used(pod.address().into()) && used(pod.address6().into()))
    };
    // Time of removal of the servers that have not been checked yet, which happens a second later.
    let mut removed: Vec<Option<Instant>> = vec![None; pods.len()];
    let mut checks = 0;
    let mut check = |removed: &mut [Option<Instant>]| -> Result<()> {
        for (pod, removed) in pods.iter().zip(removed) {
            if removed.take_if(|removed| removed.elapsed() >= second).is_none() {
                continue;
            }
            checks += 1;
            for netns in namespaces {
                for address in [IpAddr::from(pod.address()), pod.address6().into()] {
                    let sockets = sockets_connected_to(netns, address)?;
                    ensure!(sockets.is_empty(), "{}: {address} is gone: {sockets:?}", netns.name());
                }
            }
        }
        Ok(())
    };
    let replacements = usize::try_from(scaled_count(100))?;
    for i in 1..=replacements {
        let (old, new) = ((i - 1) % pods.len(), i % pods.len());
        removed[new] = None;
        let next = start_dnsmasq(&pods[new])?;
        publish(&pods[new])?;
        let deadline = Instant::now() + scaled_timeout(Duration::from_secs(10));
        while !is_published(&pods[new])? {
            ensure!(Instant::now() < deadline, "{} is not published", pods[new].name());
            sleep(Duration::from_millis(5));
        }
        removed[old] = Some(Instant::now());
        // The old server answers no more, and its port is closed.
        server.kill()?;
        server = next;
        let turn = i % sockets.len();
        sockets[turn].ask().with_context(|| format!("replacement {i}"))?;
        check(&mut removed)?;
        sleep(Duration::from_millis(100));
    }
    sleep(second);
    check(&mut removed)?;
    println!("{checks} checks a second after a backend was removed: no socket is connected to it");
    let mut asked = 0;
    for lookups in lookups {
        asked += lookups.finish()?;
    }
    let closed: u64 = sockets.iter().map(|socket| socket.closed).sum();
    println!("{replacements} replacements: {asked} lookups answered; {closed} sockets closed under their clients");
    ensure!(checks > 0 && asked > replacements as u64 && closed > 0);
    agent.verify()
}
