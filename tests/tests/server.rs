//! HTTP servers and configuration that clusters expect of a Service proxy: health, health check node ports, metrics,
//! and the configuration file of kube-proxy.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lb_tests::http::{Response, get};
use lb_tests::manifests::{Manifests, Port, service, slice, slice_with_conditions};
use lb_tests::{Cluster, Connect, Netns, Node, RunningAgent, eventually, scaled_timeout, testbed};
use prometheus_parse::{Scrape, Value};
use serde_json::json;

const HEALTHZ: u16 = 10256;
const METRICS: u16 = 10249;
/// The health check node port of the tests' Service.
const CHECK: u16 = 32123;

fn at(ip: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(ip.into(), port)
}

/// Returns the addresses of a node that other machines reach.
fn addresses(node: &Node) -> [IpAddr; 2] {
    [node.address().into(), node.address6().into()]
}

fn node_object(more_metadata: &str, spec: &str) -> String {
    format!("apiVersion: v1\nkind: Node\nmetadata: {{name: n1{more_metadata}}}\nspec: {{{spec}}}\n---\n")
}

/// A cluster, and an agent on its first node.
struct Setup {
    agent: RunningAgent,
    manifests: Manifests,
    cluster: Cluster,
}

impl Setup {
    fn new(files: &[(&str, &str)], flags: &[&str]) -> Result<Self> {
        let cluster = Cluster::builder().nodes(2).client(true).build()?;
        let manifests = Manifests::new(&cluster)?;
        for (name, text) in files {
            manifests.write(name, text)?;
        }
        let agent = manifests.serve(&cluster, "n1", flags)?;
        Ok(Self {
            agent,
            manifests,
            cluster,
        })
    }

    fn node(&self) -> &Node {
        self.cluster.node("n1")
    }

    /// Returns pairs of client and address: the node at its own addresses and its loopback, another node, and an
    /// outside client.
    fn client_addresses(&self, port: u16) -> Vec<(&Netns, SocketAddr)> {
        let node = self.node();
        let own = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let own = own
            .into_iter()
            .chain(addresses(node))
            .map(|ip: IpAddr| (&**node, at(ip, port)));
        let others: [&Netns; 2] = [self.cluster.node("n2"), self.cluster.client()];
        let others = others
            .into_iter()
            .flat_map(|netns| addresses(node).map(|ip| (netns, at(ip, port))));
        own.chain(others).collect()
    }

    /// Fails unless every client gets an expected response.
    fn expect_everywhere(&self, port: u16, path: &str, expected: impl Fn(&Response) -> bool) -> Result<()> {
        for (netns, at) in self.client_addresses(port) {
            let response = get(netns, at, path)?;
            ensure!(expected(&response), "{at}{path} from {}: {response:?}", netns.name());
        }
        Ok(())
    }

    /// Waits until every client is refused.
    fn expect_refused_everywhere(&self, port: u16) -> Result<()> {
        eventually("no process listens", || {
            for (netns, at) in self.client_addresses(port) {
                let response = get(netns, at, "/");
                ensure!(response.is_err(), "{at} from {}: {response:?}", netns.name());
            }
            Ok(())
        })
    }

    fn scrape(&self) -> Result<Metrics> {
        Metrics::of(self.node(), at(Ipv4Addr::LOCALHOST, METRICS))
    }
}

/// Scraped metrics.
struct Metrics(Scrape);

impl Metrics {
    fn of(from: &Netns, at: SocketAddr) -> Result<Self> {
        let response = get(from, at, "/metrics")?;
        ensure!(response.status == 200, "{response:?}");
        ensure!(response.header("content-type") == Some("text/plain; version=0.0.4"));
        let lines = response.body.lines().map(|line| Ok(line.to_owned()));
        Ok(Self(Scrape::parse(lines)?))
    }

    /// Returns the value of a counter or gauge, or the number of observations of a histogram.
    fn value(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        let mut found = self.0.samples.iter().filter(|sample| {
            let is = |(label, value): &(&str, &str)| sample.labels.get(label) == Some(*value);
            sample.metric == name && labels.iter().all(is)
        });
        let sample = found.next().with_context(|| format!("no {name}{labels:?}"))?;
        ensure!(found.next().is_none(), "several {name}{labels:?}");
        match &sample.value {
            Value::Counter(value) | Value::Gauge(value) | Value::Untyped(value) => Ok(*value),
            Value::Histogram(buckets) => Ok(buckets.last().context("no buckets")?.count),
            Value::Summary(_) => anyhow::bail!("{name} is a summary"),
        }
    }

    /// Returns the names of all metrics. A histogram has one name, as in the `# TYPE` lines.
    fn names(&self) -> BTreeSet<&str> {
        let all: BTreeSet<_> = self.0.samples.iter().map(|sample| sample.metric.as_str()).collect();
        let is_part = |name: &&str| {
            let whole = name.strip_suffix("_sum").or_else(|| name.strip_suffix("_count"));
            whole.is_some_and(|whole| all.contains(whole))
        };
        all.iter().copied().filter(|name| !is_part(name)).collect()
    }
}

#[test]
fn healthz_and_livez_follow_the_node_object() -> Result<()> {
    let setup = Setup::new(&[("node.yaml", &node_object("", ""))], &[])?;
    let is_up_to_date = |response: &Response, eligible: Option<bool>, status: u16| {
        let Ok(body) = response.json::<serde_json::Value>() else {
            return false;
        };
        response.status == status
            && response.header("content-type") == Some("application/json")
            && response.header("x-content-type-options") == Some("nosniff")
            && body["lastUpdated"].is_string()
            && body["currentTime"].is_string()
            && body.get("nodeEligible").and_then(serde_json::Value::as_bool) == eligible
            && body["healthy"] == json!(true)
            && body["status"]["IPv4"]["healthy"] == json!(true)
            && body["status"]["IPv6"]["healthy"] == json!(true)
    };
    setup.expect_everywhere(HEALTHZ, "/healthz", |r| is_up_to_date(r, Some(true), 200))?;
    setup.expect_everywhere(HEALTHZ, "/livez", |r| is_up_to_date(r, None, 200))?;
    setup.expect_everywhere(HEALTHZ, "/nothing", |r| r.status == 404)?;

    let node = setup.node();
    let healthz = |path| get(node, at(Ipv4Addr::LOCALHOST, HEALTHZ), path);
    let taint = "taints: [{key: ToBeDeletedByClusterAutoscaler, value: '1', effect: NoSchedule}]";
    let deleted = ", deletionTimestamp: \"2026-01-01T00:00:00Z\"";
    for leaving in [node_object("", taint), node_object(deleted, "")] {
        setup.manifests.write("node.yaml", &leaving)?;
        eventually("a node marked for deletion is not eligible", || {
            let response = healthz("/healthz")?;
            ensure!(is_up_to_date(&response, Some(false), 503), "{response:?}");
            Ok(())
        })?;
        // The agent itself is still live.
        let response = healthz("/livez")?;
        ensure!(is_up_to_date(&response, None, 200), "{response:?}");
        let other = "taints: [{key: other, effect: NoSchedule}]";
        setup.manifests.write("node.yaml", &node_object("", other))?;
        eventually("the node is eligible again", || {
            let response = healthz("/healthz")?;
            ensure!(is_up_to_date(&response, Some(true), 200), "{response:?}");
            Ok(())
        })?;
    }
    let metrics = setup.scrape()?;
    ensure!(metrics.value("kubeproxy_proxy_healthz_total", &[("code", "503")])? >= 2.0);
    ensure!(metrics.value("kubeproxy_proxy_healthz_total", &[("code", "200")])? >= 2.0);
    ensure!(metrics.value("kubeproxy_proxy_livez_total", &[("code", "200")])? >= 2.0);
    ensure!(metrics.value("kubeproxy_proxy_livez_total", &[("code", "503")])? == 0.0);
    Ok(())
}

/// Returns a load-balancer Service; it has a health check node port only with policy Local.
fn balanced(check: u16, policy: &str) -> String {
    let check = match policy {
        "Local" => format!("\n  healthCheckNodePort: {check}"),
        _ => String::new(),
    };
    let ports = [Port::tcp("web", 80).on_nodes(30080)];
    let more = format!("type: LoadBalancer\n  externalTrafficPolicy: {policy}{check}");
    service("web", "10.96.0.20,fd00:96::20", &ports, &more)
}

fn pod(node: u8, number: u8) -> IpAddr {
    Ipv4Addr::new(10, 10, node, number).into()
}

#[test]
fn health_check_node_port_counts_local_endpoints() -> Result<()> {
    let there = slice("web", Port::tcp("web", 8080), &[(pod(2, 7), "n2")]);
    let setup = Setup::new(&[("web.yaml", &balanced(CHECK, "Local")), ("slice.yaml", &there)], &[])?;
    let has_count = |endpoints: usize| {
        move |response: &Response| {
            let expected = json!({
                "service": {"namespace": "default", "name": "web"},
                "localEndpoints": endpoints,
                "serviceProxyHealthy": true,
            });
            let body: Result<serde_json::Value> = response.json();
            response.status == if endpoints > 0 { 200 } else { 503 }
                && body.is_ok_and(|body| body == expected)
                && response.header("x-load-balancing-endpoint-weight") == Some(&endpoints.to_string())
                && response.header("x-content-type-options") == Some("nosniff")
                && response.header("content-type") == Some("application/json")
        }
    };
    let eventually_counts = |port, endpoints| {
        eventually("every client gets this count", || {
            setup.expect_everywhere(port, "/", has_count(endpoints))
        })
    };
    eventually_counts(CHECK, 0)?;
    // Every path is answered.
    setup.expect_everywhere(CHECK, "/healthz", has_count(0))?;

    let here = [(pod(1, 7), "n1", ""), (pod(1, 8), "n1", ""), (pod(2, 7), "n2", "")];
    let terminating = here.map(|(ip, node, _)| (ip, node, "ready: false, serving: true, terminating: true"));
    for (endpoints, expected) in [(&here, 2), (&terminating, 0), (&here, 2)] {
        let text = slice_with_conditions("web", Port::tcp("web", 8080), endpoints);
        setup.manifests.write("slice.yaml", &text)?;
        eventually_counts(CHECK, expected)?;
    }
    // Another port, another policy, and back.
    setup.manifests.write("web.yaml", &balanced(CHECK + 1, "Local"))?;
    eventually_counts(CHECK + 1, 2)?;
    setup.expect_refused_everywhere(CHECK)?;
    setup.manifests.write("web.yaml", &balanced(CHECK, "Cluster"))?;
    setup.expect_refused_everywhere(CHECK + 1)?;
    setup.manifests.write("web.yaml", &balanced(CHECK, "Local"))?;
    eventually_counts(CHECK, 2)?;
    setup.manifests.write("web.yaml", &there)?;
    setup.expect_refused_everywhere(CHECK)
}

#[test]
fn health_check_node_port_respects_nodeport_addresses() -> Result<()> {
    let files = [("web.yaml", &*balanced(CHECK, "Local"))];
    let mut setup = Setup::new(&files, &["--nodeport-addresses", "primary"])?;
    let node = setup.node();
    let listens = |ip: IpAddr| get(node, at(ip, CHECK), "/").is_ok();
    // Without a Node object these are the addresses of the devices with a default route, and the test node has no such
    // route.
    ensure!(!listens(node.address().into()));
    let address = node.address();
    let text = format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: n1}}\nstatus: {{addresses: [{{type: InternalIP, address: {address}}}]}}\n"
    );
    setup.manifests.write("node.yaml", &text)?;
    eventually("the Node's address is served", || {
        ensure!(listens(address.into()));
        Ok(())
    })?;
    for ip in [
        node.address6().into(),
        node.gateway().into(),
        Ipv4Addr::LOCALHOST.into(),
    ] {
        ensure!(!listens(ip), "{ip}");
    }

    setup.agent.kill()?;
    *setup.agent.process() = setup.agent.start_ready(&["--nodeport-addresses", "127.0.0.0/8"])?;
    ensure!(get(setup.node(), at(setup.node().address(), CHECK), "/").is_err());
    Ok(())
}

#[test]
fn occupied_ports_are_reported_and_retried() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node("n1");
    let taken = [HEALTHZ, METRICS, CHECK];
    let listen = taken.map(|port| format!("0.0.0.0:{port}=other"));
    let other = testbed().serve(node, &listen.each_ref().map(String::as_str))?;
    let manifests = Manifests::new(&cluster)?;
    manifests.write("web.yaml", &balanced(CHECK, "Local"))?;
    let mut agent = manifests.serve(&cluster, "n1", &["--metrics-bind-address=0.0.0.0:10249"])?;
    let expected: BTreeSet<String> = [
        "--healthz-bind-address 0.0.0.0:10256".to_owned(),
        "--metrics-bind-address 0.0.0.0:10249".to_owned(),
        "Service default/web".to_owned(),
    ]
    .into();
    agent.wait("reporting the occupied addresses", |agent| {
        let problems = agent.status()?.problems.into_iter();
        let namespaces: BTreeSet<_> = problems.map(|problem| problem.place).collect();
        ensure!(expected.is_subset(&namespaces), "{namespaces:?}");
        Ok(())
    })?;
    drop(other);
    agent.wait("listening after a retry", |agent| {
        for port in [HEALTHZ, METRICS, CHECK] {
            get(node, at(Ipv4Addr::LOCALHOST, port), "/healthz")?;
        }
        let problems = agent.status()?.problems;
        ensure!(
            !problems.iter().any(|problem| expected.contains(&problem.place)),
            "{problems:?}"
        );
        Ok(())
    })
}

#[test]
fn bind_address_flags_disable_and_move_servers() -> Result<()> {
    let flags = ["--healthz-bind-address", "", "--metrics-bind-address", "[::1]:9000"];
    let setup = Setup::new(&[("node.yaml", &node_object("", ""))], &flags)?;
    let node = setup.node();
    ensure!(get(node, at(Ipv6Addr::LOCALHOST, 9000), "/proxyMode")?.body == "ebpf");
    for port in [HEALTHZ, METRICS, 9000] {
        ensure!(get(node, at(Ipv4Addr::LOCALHOST, port), "/healthz").is_err(), "{port}");
    }
    Ok(())
}

/// Returns the metric names in docs/metrics.md.
fn documented() -> BTreeSet<&'static str> {
    let text = include_str!("../../docs/metrics.md");
    let rows = text
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
    rows.map(|(name, _)| name).collect()
}

#[test]
fn metrics_match_the_documentation_and_count_connections() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let (node, testbed) = (cluster.node("n1"), testbed());
    let backend = cluster.add_pod("n1", "backend")?;
    let client = cluster.add_pod("n1", "client")?;
    let _server = testbed.serve(&backend, &["0.0.0.0:8080=backend"])?;
    let manifests = Manifests::new(&cluster)?;
    let web = Port::tcp("web", 80);
    let text = service("web", "10.96.0.20", &[web], "")
        + &slice("web", Port::tcp("web", 8080), &[(backend.address().into(), "n1")])
        + &service("gone", "10.96.0.21", &[web], "")
        + &service("local", "10.96.0.22", &[web], "internalTrafficPolicy: Local")
        + &slice("local", Port::tcp("web", 8080), &[(pod(2, 7), "n2")])
        // A second claim of the address of `web`.
        + &service("web-too", "10.96.0.20", &[web], "");
    manifests.write("web.yaml", &text)?;
    let flags = ["--service-metrics", "--max-services", "5"];
    let _agent = manifests.serve(&cluster, "n1", &flags)?;
    let scrape = || Metrics::of(node, at(Ipv4Addr::LOCALHOST, METRICS));

    let before = scrape()?;
    let (names, documented) = (before.names(), documented());
    ensure!(
        names == documented,
        "not in docs/metrics.md: {:?}; not exported: {:?}",
        &names - &documented,
        &documented - &names
    );
    let v4 = ("ip_family", "IPv4");
    let sync = "kubeproxy_sync_proxy_rules";
    ensure!(before.value(&format!("{sync}_service_changes_total"), &[])? == 4.0);
    ensure!(before.value(&format!("{sync}_endpoint_changes_total"), &[])? == 2.0);
    ensure!(before.value(&format!("{sync}_service_changes_pending"), &[])? == 0.0);
    ensure!(before.value(&format!("{sync}_duration_seconds"), &[v4])? == 1.0);
    let no_local = format!("{sync}_no_local_endpoints_total");
    ensure!(before.value(&no_local, &[v4, ("traffic_policy", "internal")])? == 1.0);
    ensure!(before.value(&no_local, &[v4, ("traffic_policy", "external")])? == 0.0);
    ensure!(before.value("lb_map_capacity", &[("map", "SERVICES")])? == 5.0);
    ensure!(before.value("lb_map_entries", &[("map", "SERVICES")])? == 4.0);
    ensure!(before.value("lb_problems", &[("kind", "conflict")])? == 1.0);
    ensure!(before.value("lb_problems", &[("kind", "map")])? == 0.0);
    ensure!(before.value("lb_source_complete", &[])? == 1.0);

    let to = |last| SocketAddr::from(([10, 96, 0, last], 80));
    ensure!(testbed.connect(&client, &Connect::to(&[to(20)]).count(7))?.per_backend["backend"] == 7);
    for (address, reason) in [(to(21), "no_endpoint"), (to(22), "no_local_endpoint")] {
        let summary = testbed.connect(&client, &Connect::to(&[address]).count(3))?;
        ensure!(summary.per_backend.is_empty(), "{reason}: {summary:?}");
    }
    let after = scrape()?;
    let increase = |name: &str, labels: &[(&str, &str)]| -> Result<f64> {
        Ok(after.value(name, labels)? - before.value(name, labels)?)
    };
    ensure!(increase("lb_connections_total", &[])? == 7.0);
    ensure!(increase("lb_refused_total", &[])? == 6.0);
    ensure!(increase("lb_drops_total", &[("reason", "no_endpoint")])? == 3.0);
    ensure!(increase("lb_drops_total", &[("reason", "no_local_endpoint")])? == 3.0);
    let web = [
        ("namespace", "default"),
        ("service", "web"),
        ("port", "80"),
        ("protocol", "TCP"),
        v4,
    ];
    ensure!(increase("lb_service_connections_total", &web)? == 7.0);
    ensure!(increase("lb_service_refused_total", &web)? == 0.0);

    // One Service more than the map has room for.
    manifests.write("more.yaml", &service("more", "10.96.0.23", &[Port::tcp("web", 80)], ""))?;
    eventually("the map is full", || {
        let now = scrape()?;
        ensure!(now.value("lb_problems", &[("kind", "map")])? >= 1.0);
        ensure!(now.value("lb_map_entries", &[("map", "SERVICES")])? == 4.0);
        // The health of the agent does not change.
        ensure!(get(node, at(Ipv4Addr::LOCALHOST, HEALTHZ), "/healthz")?.status == 200);
        Ok(())
    })
}

#[test]
fn kube_proxy_configuration_is_applied_and_flags_override_it() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let node = cluster.node("n1");
    let manifests = Manifests::new(&cluster)?;
    manifests.write("web.yaml", &balanced(CHECK, "Local"))?;
    let file = cluster.scratch().join("config.yaml");
    let config = |more: &str| {
        let text = format!("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{more}");
        fs::write(&file, text).context("writing the configuration")
    };
    let path = file.to_str().context("not UTF-8")?;
    config(&format!(
        "mode: nftables\nhealthzBindAddress: 127.0.0.1:9001\nmetricsBindAddress: 127.0.0.1:9002\nnodePortAddresses: \
         [{}/32, '::/128']\nconntrack: {{tcpCloseWaitTimeout: 7m, tcpBeLiberal: true, udpTimeout: 11s}}\n",
        node.address()
    ))?;
    let setting = |name: &str| -> Result<String> {
        let path = format!("/proc/sys/net/netfilter/{name}");
        let text = node.within(|| fs::read_to_string(&path))?;
        Ok(text.with_context(|| path.clone())?.trim().to_owned())
    };
    let stream = setting("nf_conntrack_udp_timeout_stream")?;
    let flags = ["--config", path, "--metrics-bind-address", "127.0.0.1:9003"];
    let mut agent = manifests.serve(&cluster, "n1", &flags)?;
    let listens = |ip: IpAddr, port| get(node, at(ip, port), "/healthz").is_ok();
    eventually("it listens at the addresses in the file", || {
        ensure!(listens(Ipv4Addr::LOCALHOST.into(), 9001) && listens(node.address().into(), CHECK));
        Ok(())
    })?;
    ensure!(listens(Ipv4Addr::LOCALHOST.into(), 9003), "the flag wins");
    for (ip, port) in [
        (Ipv4Addr::LOCALHOST.into(), 9002),
        (Ipv4Addr::LOCALHOST.into(), HEALTHZ),
        (node.address().into(), 9001),
        (node.gateway().into(), CHECK),
        (node.address6().into(), CHECK),
    ] {
        ensure!(!listens(ip, port), "{ip} {port}");
    }
    for (name, expected) in [
        ("nf_conntrack_tcp_timeout_close_wait", "420"),
        ("nf_conntrack_tcp_timeout_established", "86400"),
        ("nf_conntrack_tcp_be_liberal", "1"),
        ("nf_conntrack_udp_timeout", "11"),
        ("nf_conntrack_udp_timeout_stream", &stream),
    ] {
        ensure!(setting(name)? == expected, "{name}: {}", setting(name)?);
    }
    let log = agent.log_tail();
    ensure!(log.contains("mode") && log.contains("no effect"), "{log}");
    agent.kill()?;

    config("conntrack:\n  maxPerKern: 5\n")?;
    let mut process = agent.start(&["--config", path])?;
    ensure!(!process.wait(scaled_timeout(Duration::from_secs(20)))?.success());
    let log = agent.log_tail();
    ensure!(log.contains("line 4") && log.contains("maxPerKern"), "{log}");
    Ok(())
}
