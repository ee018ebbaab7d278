//! `lb-agent explain` against what `connect()` does on a real kernel, and `affinity list`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use lb_agent::loader::PinPath;
use lb_agent::maps::bpf::PinnedMaps;
use lb_common::abi::DropReason;
use lb_tests::load::Stage;
use lb_tests::manifests::Manifests;
use lb_tests::{Agent, Cluster, Connect, Place, Pod, Process, Random, Running, Testbed, patience};
use serde_json::Value;

const BED: &str = env!("CARGO_BIN_EXE_lb-testbed");

fn bed() -> Testbed {
    Testbed::new(BED)
}

/// Connections made to each destination.
const TRIES: u64 = 2;

/// A Service of which everything is left to chance. Its addresses end in `n`.
struct Service {
    n: u8,
    /// In `10.10.1.x`, by the name of a backend: the node that it says it is on, and whether it terminates.
    endpoints: Vec<(String, &'static str, bool)>,
    local: bool,
    affinity: bool,
    source_ranges: bool,
}

impl Service {
    fn random(n: u8, pods: &[Pod], random: &mut Random) -> Self {
        let endpoints = pods
            .iter()
            .filter(|_| random.clone().below(3) > 0)
            .map(|pod| pod.address().to_string())
            .collect::<Vec<_>>();
        let mut chance = |of| random.below(of) == 0;
        let endpoints = endpoints
            .into_iter()
            .filter(|_| !chance(4))
            .collect::<Vec<_>>()
            .into_iter()
            .map(|address| (address, if chance(2) { "n2" } else { "n1" }, chance(4)))
            .collect();
        Self {
            n,
            endpoints,
            local: chance(2),
            affinity: chance(3),
            source_ranges: chance(3),
        }
    }

    fn node_port(&self) -> u16 {
        30000 + u16::from(self.n)
    }

    fn manifest(&self) -> Result<String> {
        let n = self.n;
        let mut text = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: s{n}, namespace: default}}\nspec:\n  type: LoadBalancer\n  \
             clusterIP: 10.96.1.{n}\n  externalIPs: [198.51.100.{n}]\n  ports:\n  - {{port: 80, nodePort: {}}}\n",
            self.node_port()
        );
        for (wanted, line) in [
            (self.local, "internalTrafficPolicy: Local"),
            (self.affinity, "sessionAffinity: ClientIP"),
            (self.source_ranges, "loadBalancerSourceRanges: [203.0.113.0/24]"),
        ] {
            if wanted {
                writeln!(text, "  {line}")?;
            }
        }
        writeln!(
            text,
            "status: {{loadBalancer: {{ingress: [{{ip: 192.0.2.{n}}}]}}}}\n---"
        )?;
        write!(
            text,
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: s{n}\n  namespace: default\n  labels: \
             {{kubernetes.io/service-name: s{n}}}\naddressType: IPv4\nports: [{{port: 8080}}]\nendpoints:"
        )?;
        if self.endpoints.is_empty() {
            text.push_str(" []");
        }
        for (address, node, terminating) in &self.endpoints {
            let conditions = format!("{{ready: {}, serving: true, terminating: {terminating}}}", !terminating);
            write!(
                text,
                "\n- {{addresses: [{address}], nodeName: {node}, conditions: {conditions}}}"
            )?;
        }
        text.push_str("\n---\n");
        Ok(text)
    }

    /// Everything that it may be asked at, and some places where it may not.
    fn destinations(&self, node: std::net::Ipv4Addr) -> Vec<SocketAddr> {
        let (n, port) = (self.n, self.node_port());
        let octets = [
            ([10, 96, 1, n], 80),
            ([10, 96, 1, n], 81),
            ([198, 51, 100, n], 80),
            ([198, 51, 100, n], 81),
            ([192, 0, 2, n], 80),
            ([127, 0, 0, 1], port),
            ([0, 0, 0, 0], port),
            ([192, 168, 77, 99], port),
            (node.octets(), port),
            (node.octets(), port + 100),
        ];
        octets.into_iter().map(SocketAddr::from).collect()
    }
}

/// What the programs have counted.
#[derive(Debug, PartialEq, Eq)]
struct Counters {
    connections: u64,
    /// By label.
    drops: BTreeMap<&'static str, u64>,
}

impl Counters {
    fn read(maps: &PinnedMaps) -> Result<Self> {
        let mut connections = 0;
        for index in maps.names()?.into_keys() {
            connections += maps.stats(index)?.connections;
        }
        let drops = DropReason::ALL
            .iter()
            .map(|reason| Ok((reason.label(), maps.drops(*reason)?)));
        Ok(Self {
            connections,
            drops: drops.collect::<Result<_>>()?,
        })
    }

    fn since(&self, before: &Self) -> Self {
        let mut drops = self.drops.clone();
        for (reason, count) in &mut drops {
            *count -= before.drops[reason];
        }
        drops.retain(|_, count| *count > 0);
        Self {
            connections: self.connections - before.connections,
            drops,
        }
    }
}

/// A place, and a process there that lives as long as this: who `explain` is asked about.
struct Client<'a> {
    place: &'a Place,
    process: Process,
}

impl<'a> Client<'a> {
    fn new(place: &'a Place) -> Result<Self> {
        let process = Process::spawn(place.command("sleep")?.arg("1000"))?;
        Ok(Self { place, process })
    }

    fn explain(&self, agent: &Agent, to: &str) -> Result<Value> {
        agent.json(&["explain", "--from", &self.process.id().to_string(), "--to", to])
    }
}

/// Addresses to which the connection may go, by what was explained.
fn backends(answer: &Value) -> BTreeSet<String> {
    let backends = answer["outcome"]["backends"].as_array().into_iter().flatten();
    backends.filter_map(Value::as_str).map(str::to_owned).collect()
}

/// Asks, connects, and compares. `names`: the addresses of backends, by the name that they answer with.
fn compare(
    agent: &Agent,
    maps: &PinnedMaps,
    client: &Client<'_>,
    to: SocketAddr,
    names: &BTreeMap<&str, String>,
) -> Result<Value> {
    let answer = client.explain(agent, &to.to_string())?;
    let before = Counters::read(maps)?;
    let timeout = Duration::from_millis(200);
    let summary = bed().connect(client.place, &Connect::to(&[to]).count(TRIES).timeout(timeout))?;
    let counted = Counters::read(maps)?.since(&before);
    let fail = || format!("{} to {to}: {answer:#}\n{summary:?}\n{counted:?}", client.place.name());
    let outcome = &answer["outcome"];
    match outcome["result"].as_str() {
        Some("connects") => {
            ensure!(summary.failure_count == 0 && counted.drops.is_empty(), "{}", fail());
            ensure!(counted.connections == TRIES, "{}", fail());
            let may = backends(&answer);
            let reached = summary.per_backend.keys().map(|name| &names[name.as_str()]);
            for backend in reached {
                ensure!(may.contains(backend), "{backend}: {}", fail());
            }
            let eligible = answer["candidates"].as_array().into_iter().flatten();
            let eligible = eligible.filter(|candidate| candidate["eligible"] == true);
            let eligible: BTreeSet<_> = eligible.filter_map(|candidate| candidate["address"].as_str()).collect();
            ensure!(may.iter().map(String::as_str).eq(eligible), "{}", fail());
        }
        Some("refused") => {
            let reason = outcome["reason"].as_str().context("no reason")?;
            ensure!(counted.connections == 0 && summary.failure_count == TRIES, "{}", fail());
            ensure!(counted.drops == BTreeMap::from([(label(reason)?, TRIES)]), "{}", fail());
            for failure in &summary.failures {
                ensure!(
                    failure.stage == Stage::Connect && outcome["number"] == failure.errno,
                    "{}",
                    fail()
                );
            }
        }
        Some("untouched") => {
            ensure!(counted.connections == 0 && counted.drops.is_empty(), "{}", fail());
            ensure!(summary.per_backend.is_empty(), "{}", fail());
        }
        _ => bail!("{}", fail()),
    }
    Ok(answer)
}

fn label(text: &str) -> Result<&'static str> {
    let mut labels = DropReason::ALL.iter().map(|reason| reason.label());
    labels
        .find(|label| *label == text)
        .with_context(|| format!("no reason {text}"))
}

struct Setup {
    agent: Running,
    manifests: Manifests,
    client: Pod,
    pods: Vec<Pod>,
    _servers: Vec<Process>,
    cluster: Cluster,
}

fn setup(text: &str, flags: &[&str]) -> Result<Setup> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let client = cluster.add_pod("n1", "client")?;
    let pods = ["a", "b", "c"].map(|name| cluster.add_pod("n1", name));
    let pods = pods.into_iter().collect::<Result<Vec<_>>>()?;
    let servers = pods
        .iter()
        .map(|pod| bed().serve(pod, &[&format!("0.0.0.0:8080={}", pod.name())]));
    let servers = servers.collect::<Result<Vec<_>>>()?;
    let manifests = Manifests::new(&cluster)?;
    manifests.write("all.yaml", text)?;
    let agent = manifests.serve(&cluster, "n1", BED.as_ref(), flags)?;
    let setup = Setup {
        agent,
        manifests,
        client,
        pods,
        _servers: servers,
        cluster,
    };
    // The bed's node has one address for node ports, whether or not the agent follows the node's devices.
    let mut maps = setup.maps()?;
    let mut addresses = maps.node_addrs()?;
    addresses.insert(setup.cluster.node("n1").address().into());
    ensure!(maps.write_node_addrs(&addresses)? == 0, "no room for an address");
    Ok(setup)
}

impl Setup {
    fn maps(&self) -> Result<PinnedMaps> {
        Ok(PinnedMaps::open(&PinPath::new(self.agent.pin_path()).maps())?)
    }

    fn names(&self) -> BTreeMap<&str, String> {
        self.pods
            .iter()
            .map(|pod| (pod.name(), pod.socket(8080).to_string()))
            .collect()
    }
}

#[test]
fn explain_says_what_connect_does() -> Result<()> {
    const ROUNDS: usize = 3;
    const SERVICES: u8 = 4;
    let mut random = Random::from_env();
    let mut setup = setup("", &[])?;
    let maps = setup.maps()?;
    let node = setup.cluster.node("n1").address();
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    for round in 0..ROUNDS {
        let services: Vec<_> = (1..=SERVICES)
            .map(|n| Service::random(n, &setup.pods, &mut random))
            .collect();
        let text = services.iter().map(Service::manifest).collect::<Result<String>>()?;
        println!("round {round}\n{text}");
        setup.manifests.write("all.yaml", &text)?;
        setup.agent.wait_ready(&|| false)?;
        let names = setup.names();
        for place in [&setup.client as &Place, setup.cluster.node("n1")] {
            let client = Client::new(place)?;
            for (service, to) in services
                .iter()
                .flat_map(|service| service.destinations(node).into_iter().map(move |to| (service, to)))
            {
                let answer = compare(&setup.agent, &maps, &client, to, &names)?;
                let kind = answer["frontend"]["kind"].as_str().unwrap_or("none");
                let result = answer["outcome"]["result"].as_str().unwrap_or_default();
                *seen.entry(format!("{kind} {result}")).or_default() += 1;
                if result != "connects" {
                    continue;
                }
                // With affinity, what the first connections got is what the next get.
                let again = compare(&setup.agent, &maps, &client, to, &names)?;
                ensure!(again["affinity"].is_object() == service.affinity, "{again:#}");
                if service.affinity {
                    ensure!(
                        backends(&again).len() == 1 && again["affinity"]["holds"] == true,
                        "{again:#}"
                    );
                } else {
                    ensure!(backends(&again) == backends(&answer), "{again:#}");
                }
            }
        }
    }
    println!("{seen:#?}");
    for kind in ["ClusterIP", "NodePort", "ExternalIP", "LoadBalancer"] {
        assert!(seen.contains_key(&format!("{kind} connects")), "{kind}: {seen:?}");
    }
    assert!(
        seen.contains_key("none refused") && seen.contains_key("none untouched"),
        "{seen:?}"
    );
    Ok(())
}

/// One Service `s1` with every pod as endpoint on this node.
fn one(affinity: bool, pods: usize) -> Result<String> {
    let endpoints = (3..).take(pods).map(|octet| (format!("10.10.1.{octet}"), "n1", false));
    let service = Service {
        n: 1,
        endpoints: endpoints.collect(),
        local: false,
        affinity,
        source_ranges: false,
    };
    service.manifest()
}

#[test]
fn who_asks_decides() -> Result<()> {
    let setup = setup(&one(false, 3)?, &["--socket-lb", "node"])?;
    let (maps, names) = (setup.maps()?, setup.names());
    let to: SocketAddr = "10.96.1.1:80".parse()?;
    let (pod, node) = (Client::new(&setup.client)?, Client::new(setup.cluster.node("n1"))?);
    let why = |answer: &Value| answer["outcome"]["why"].as_str().unwrap_or_default().to_owned();
    let answer = compare(&setup.agent, &maps, &pod, to, &names)?;
    assert!(why(&answer).contains("--socket-lb node"), "{answer:#}");
    assert_eq!(answer["client"]["on_node"], false);
    let answer = compare(&setup.agent, &maps, &node, to, &names)?;
    assert_eq!(
        (backends(&answer).len(), &answer["client"]["on_node"]),
        (3, &Value::from(true))
    );

    // This process is in no node's cgroup.
    let from = |from: &str| -> Result<Value> { setup.agent.json(&["explain", "--from", from, "--to", "10.96.1.1:80"]) };
    let answer = from(&std::process::id().to_string())?;
    assert_eq!(answer["client"]["below_cgroup"], false);
    assert!(why(&answer).contains("not below the cgroup"), "{answer:#}");
    let answer = from("172.30.99.2")?;
    assert!(why(&answer).contains("packet path"), "{answer:#}");
    let answer = from(&setup.cluster.node("n1").address().to_string())?;
    assert_eq!(backends(&answer).len(), 3);
    assert!(from("4194305").is_err_and(|error| error.to_string().contains("no process")));

    // For people, and for UDP, which this Service has not.
    let text = setup.agent.ask(&[
        "explain",
        "--from",
        &node.process.id().to_string(),
        "--to",
        "10.96.1.1:80/udp",
    ])?;
    assert!(text.contains("connect()  fails with ECONNREFUSED"), "{text}");
    assert!(text.contains("10.96.1.1 has 80/TCP (default/s1:80)"), "{text}");
    Ok(())
}

#[test]
fn clients_with_affinity_are_listed_until_their_backend_is_gone() -> Result<()> {
    let mut setup = setup(&one(true, 3)?, &[])?;
    let list = |setup: &Setup| -> Result<Vec<Value>> { setup.agent.json(&["affinity", "list"]) };
    assert!(list(&setup)?.is_empty());
    let to: SocketAddr = "10.96.1.1:80".parse()?;
    let summary = bed().connect(&setup.client, &Connect::to(&[to]).count(10))?;
    summary.all_well()?;
    let (name, count) = summary.per_backend.first_key_value().context("nobody answered")?;
    assert_eq!(*count, 10);
    let rows = list(&setup)?;
    assert_eq!(rows.len(), 1);
    let row = &rows[0];
    assert_eq!(row["backend"], setup.names()[name.as_str()]);
    assert_eq!(
        (&row["state"], &row["holds"], &row["name"]),
        (&"holds".into(), &true.into(), &"s1".into())
    );
    let client = Client::new(&setup.client)?;
    let answer = client.explain(&setup.agent, "10.96.1.1:80")?;
    assert_eq!(answer["client"]["netns"], row["netns"]);
    // As by default in Kubernetes, 10,800 s.
    let remaining = row["remaining"].as_u64().context("remaining")?;
    assert!((10_000..=10_800).contains(&remaining), "{row:#}");

    // Its backend leaves.
    let pods: Vec<_> = setup.pods.iter().filter(|pod| pod.name() != name).collect();
    let endpoints = pods
        .iter()
        .map(|pod| (pod.address().to_string(), "n1", false))
        .collect();
    let others = Service {
        n: 1,
        endpoints,
        local: false,
        affinity: true,
        source_ranges: false,
    };
    setup.manifests.write("all.yaml", &others.manifest()?)?;
    setup.agent.wait_ready(&|| false)?;
    let deadline = std::time::Instant::now() + patience(Duration::from_secs(10));
    while list(&setup)?.first().is_none_or(|row| row["state"] != "backend gone") {
        ensure!(std::time::Instant::now() < deadline, "{:?}", list(&setup)?);
        std::thread::sleep(Duration::from_millis(20));
    }
    let answer = client.explain(&setup.agent, "10.96.1.1:80")?;
    assert_eq!(
        (backends(&answer).len(), &answer["affinity"]["holds"]),
        (2, &false.into())
    );
    Ok(())
}
