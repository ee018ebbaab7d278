//! The agent is killed, restarted, replaced and removed while connections are made. The real binary, on a node.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use lb_agent::loader::OBJECT;
use lb_common::abi::VERSION;
use lb_tests::load::{Load, Summary};
use lb_tests::{Agent, Cluster, Connect, Node, Process, Random, Testbed, eventually, scaled_timeout, testbed};
use object::{Object as _, ObjectSection as _};
use serde_json::{Value, json};

const NODE: &str = "n1";
const BACKEND_PORT: u16 = 8080;
/// Number of programs at cgroup hooks.
const HOOKS: usize = 11;

/// A Service with its endpoints, as written to a manifest.
#[derive(Debug, Clone)]
struct Service {
    name: String,
    address: Ipv4Addr,
    ports: Vec<(&'static str, u16)>,
    /// Numbers of the backends.
    backends: Vec<u8>,
    /// The older of two Services that claim an address has it.
    age: u8,
}

impl Service {
    /// Returns a Service with one port, 80.
    fn new(name: &str, address: u8, backends: &[u8]) -> Self {
        Self {
            name: name.to_owned(),
            address: Ipv4Addr::new(10, 96, 0, address),
            ports: vec![("http", 80)],
            backends: backends.to_vec(),
            age: 0,
        }
    }

    fn ports(self, ports: &[(&'static str, u16)]) -> Self {
        Self {
            ports: ports.to_vec(),
            ..self
        }
    }

    fn age(self, age: u8) -> Self {
        Self { age, ..self }
    }

    fn vip(&self) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.address), self.ports[0].1)
    }

    fn manifests(&self) -> [Value; 2] {
        let created = format!("2026-01-01T00:00:{:02}Z", 59 - self.age);
        let ports = |to: Option<u16>| -> Vec<_> {
            let port = |&(name, port): &(_, u16)| json!({"name": name, "protocol": "TCP", "port": to.unwrap_or(port)});
            self.ports.iter().map(port).collect()
        };
        let endpoint =
            |&number: &u8| json!({"addresses": [address(number)], "conditions": {"ready": true}, "nodeName": NODE});
        let endpoints: Vec<_> = self.backends.iter().map(endpoint).collect();
        [
            json!({
                "apiVersion": "v1",
                "kind": "Service",
                "metadata": {"name": self.name, "namespace": "default", "creationTimestamp": created},
                "spec": {"type": "ClusterIP", "clusterIP": self.address, "clusterIPs": [self.address],
                         "ports": ports(None)},
            }),
            json!({
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {"name": format!("{}-slice", self.name), "namespace": "default",
                             "labels": {"kubernetes.io/service-name": self.name}},
                "addressType": "IPv4",
                "ports": ports(Some(BACKEND_PORT)),
                "endpoints": endpoints,
            }),
        ]
    }
}

/// Returns the address of a backend; its name is `b` and its number.
fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 10, 1, 100 + number)
}

/// Identity of each service port, which a restart must not change, by `name:port-name`.
type Identities = BTreeMap<String, Identity>;

/// Identity of a service port.
#[derive(Debug, PartialEq)]
struct Identity {
    index: Value,
    generation: Value,
    /// Backend id and generation by address.
    backends: BTreeMap<String, [Value; 2]>,
}

/// A node with eight backends and manifests; clients are processes of the host network.
struct Fixture {
    agent: Agent,
    _server: Process,
    testbed: Testbed,
    folder: PathBuf,
    cluster: Cluster,
}

impl Fixture {
    fn new() -> Result<Self> {
        let cluster = Cluster::builder().nodes(1).build()?;
        let testbed = testbed();
        let pod = cluster.add_pod(NODE, "server")?;
        let mut listen = Vec::new();
        for number in 0..8 {
            let address = address(number);
            pod.add_address(&format!("{address}/24"), "eth0")?;
            listen.push(format!("{address}:{BACKEND_PORT}=b{number}"));
        }
        let listen: Vec<_> = listen.iter().map(String::as_str).collect();
        let folder = cluster.scratch().join("manifests");
        fs::create_dir(&folder).context("creating a directory for manifests")?;
        Ok(Self {
            agent: Agent::new(&cluster, cluster.node(NODE), &Agent::find()?, &folder),
            _server: testbed.serve_with(&pod, &listen, &["--echo"])?,
            testbed,
            folder,
            cluster,
        })
    }

    fn node(&self) -> &Node {
        self.cluster.node(NODE)
    }

    /// Replaces all manifests at once.
    fn write<'a>(&self, services: impl IntoIterator<Item = &'a Service>) -> Result<()> {
        let items: Vec<_> = services.into_iter().flat_map(Service::manifests).collect();
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        let new = self.folder.join(".new");
        fs::write(&new, list.to_string()).context("writing manifests")?;
        fs::rename(&new, self.folder.join("all.json")).context("renaming the manifests")
    }

    /// Starts two threads that connect to these addresses in turn until stopped.
    fn start_clients(&self, targets: &[SocketAddr]) -> Result<Load> {
        self.testbed.start(self.node(), &clients(targets).threads(2))
    }

    /// Makes `count` connections, one after the other.
    fn connect(&self, target: SocketAddr, count: u64) -> Result<Summary> {
        self.testbed.connect(self.node(), &clients(&[target]).count(count))
    }

    /// Fails unless connections to the address succeed, and the programs count them.
    fn check_serving(&self, service: &Service) -> Result<()> {
        let before = self.agent.connections(&service.name, None)?;
        let summary = self.connect(service.vip(), 20)?;
        summary.all_well()?;
        check_backends(&summary, &[(service.vip(), &service.backends)])?;
        let counted = self.agent.connections(&service.name, None)? - before;
        ensure!(counted == 20, "{counted} of 20 connections were counted");
        Ok(())
    }

    /// Fails unless connections to the address fail at once because there is no route.
    fn check_gone(&self, target: SocketAddr) -> Result<()> {
        let begin = Instant::now();
        let summary = self.connect(target, 5)?;
        let errors: Vec<_> = summary.failures.iter().map(|failure| failure.errno).collect();
        ensure!(errors == [libc::ENETUNREACH; 5], "{summary:?}");
        ensure!(begin.elapsed() < scaled_timeout(Duration::from_secs(4)), "not at once");
        Ok(())
    }

    /// Returns the identities of all service ports, from the agent's lists.
    fn identities(&self) -> Result<Identities> {
        let name = |row: &Value| {
            let word = |field: &str| row[field].as_str().unwrap_or_default().to_owned();
            format!("{}:{}", word("name"), word("port_name"))
        };
        let mut all = Identities::new();
        for row in self.list("service")? {
            let identity = Identity {
                index: row["index"].clone(),
                generation: row["generation"].clone(),
                backends: BTreeMap::new(),
            };
            all.insert(name(&row), identity);
        }
        for row in self.list("backend")? {
            let service = all.get_mut(&name(&row)).context("a backend of no service")?;
            let identity = [row["id"].clone(), row["generation"].clone()];
            service.backends.insert(row["address"].to_string(), identity);
        }
        Ok(all)
    }

    /// Returns whether the agent left an orphan: a service port without a frontend, among those that share their
    /// address with no other Service.
    fn has_orphan(&self) -> Result<bool> {
        let other = |row: &Value| row["name"].as_str().is_some_and(|name| name.starts_with("other-"));
        let services = self.list("service")?;
        Ok(services.iter().any(|row| other(row) && row["frontends"] == json!([])))
    }

    fn list(&self, what: &str) -> Result<Vec<Value>> {
        let list = self.agent.json::<Value>(&[what, "list"])?;
        list.as_array().cloned().context("not a list")
    }

    /// Returns id and tag of the attached programs, by name.
    fn programs(&self) -> Result<BTreeMap<String, (u64, String)>> {
        let status = self.agent.json::<Value>(&["status"])?;
        let rows = status["programs"].as_array().context("no programs")?;
        let mut all = BTreeMap::new();
        for row in rows {
            ensure!(row["attached"] == true, "{row} is not attached");
            let name = row["name"].as_str().context("no name")?;
            let id = row["id"].as_u64().context("no id")?;
            let tag = row["tag"].as_str().context("no tag")?;
            all.insert(name.to_owned(), (id, tag.to_owned()));
        }
        Ok(all)
    }

    /// Returns the inodes of the pinned maps, by name. A replaced map would have another inode.
    fn maps(&self) -> Result<BTreeMap<String, u64>> {
        use std::os::unix::fs::MetadataExt as _;
        let folder = self.agent.pin_path().join(format!("v{VERSION}/maps"));
        let mut all = BTreeMap::new();
        for entry in fs::read_dir(&folder).with_context(|| format!("listing {}", folder.display()))? {
            let entry = entry?;
            all.insert(
                entry.file_name().to_string_lossy().into_owned(),
                entry.metadata()?.ino(),
            );
        }
        ensure!(!all.is_empty(), "no maps are pinned");
        Ok(all)
    }

    /// Returns the names of the programs that the kernel has at the node's cgroup.
    fn attached(&self) -> Result<Vec<String>> {
        let cgroup = self.node().cgroup().to_str().context("path")?;
        let text = bpftool(&["-j", "cgroup", "show", cgroup])?;
        if text.trim().is_empty() {
            return Ok(Vec::new());
        }
        let rows: Vec<Value> = serde_json::from_str(&text).with_context(|| format!("not a list: {text}"))?;
        Ok(rows
            .iter()
            .map(|row| row["name"].as_str().unwrap_or("?").to_owned())
            .collect())
    }
}

/// Returns clients with a long timeout, since the machine may be busy.
fn clients(targets: &[SocketAddr]) -> Connect {
    Connect::to(targets)
        .timeout(scaled_timeout(Duration::from_secs(5)))
        .peer_check()
}

fn bpftool(arguments: &[&str]) -> Result<String> {
    let output = Command::new("bpftool")
        .args(arguments)
        .output()
        .context("running bpftool")?;
    ensure!(output.status.success(), "bpftool {arguments:?}: {output:?}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Fails unless connections to each address reached these backends (by number), and no others.
fn check_backends(summary: &Summary, wanted: &[(SocketAddr, &[u8])]) -> Result<()> {
    for (target, backends) in wanted {
        let reached = summary
            .per_target
            .get(&target.to_string())
            .with_context(|| format!("no connection to {target}"))?;
        let names: Vec<_> = backends.iter().map(|number| format!("b{number}")).collect();
        let unexpected: Vec<_> = reached.keys().filter(|name| !names.contains(*name)).collect();
        ensure!(
            unexpected.is_empty(),
            "connections to {target} reached {unexpected:?}, not {names:?}"
        );
    }
    Ok(())
}

/// Returns the message of an expected failure.
fn refusal<T: std::fmt::Debug>(result: Result<T>) -> Result<String> {
    match result {
        Ok(value) => bail!("this should have been refused: {value:?}"),
        Err(error) => Ok(format!("{error:#}")),
    }
}

/// Returns manifests that differ each time, but always contain `stay`, `vary`, and `left` and `right`, one of which has
/// port 80 of the address that both share.
fn random_services(random: &mut Random) -> Vec<Service> {
    let vary: Vec<u8> = (2..6).filter(|_| random.next_bool()).collect();
    let owner = random.below(2) as usize;
    let both = random.next_bool();
    let side = |side: usize, name, own, backend| {
        let mut ports = vec![("own", own)];
        if side == owner || both {
            ports.push(("shared", 80));
        }
        Service::new(name, 12, &[backend])
            .ports(&ports)
            .age(u8::from(side == owner))
    };
    let mut all = vec![
        Service::new("stay", 10, &[0, 1]),
        Service::new("vary", 11, if vary.is_empty() { &[2] } else { &vary }),
        side(0, "left", 8081, 6),
        side(1, "right", 8082, 7),
    ];
    // More Services, so that an apply takes long enough to be interrupted.
    for number in 0..60 {
        if random.next_bool() {
            let backends: Vec<u8> = (0..=random.below(8) as u8).collect();
            all.push(Service::new(&format!("other-{number}"), 100 + number, &backends));
        }
    }
    all
}

const KILLS: u32 = 20;

#[test]
fn agent_kills_at_random_moments_fail_no_connection() -> Result<()> {
    let mut random = Random::from_env();
    let fixture = Fixture::new()?;
    fixture.write(&random_services(&mut random))?;
    let begin = Instant::now();
    let mut process = fixture.agent.start_ready(&[])?;
    let start_ms = begin.elapsed().as_millis() as u64;
    fixture.agent.verify()?;

    let vips = [10, 11, 12].map(|last| SocketAddr::new(Ipv4Addr::new(10, 96, 0, last).into(), 80));
    let load = fixture.start_clients(&vips)?;
    let mut moments = Vec::new();
    let mut orphans = 0;
    for kill in 0..KILLS {
        // Alternates between a kill during the start and a kill during an apply.
        let starts = kill % 2 == 1;
        if !starts {
            fixture.agent.wait_ready(&mut process)?;
        }
        let life = Duration::from_millis(random.below(if starts { start_ms } else { 150 }));
        let end = Instant::now() + life;
        while Instant::now() < end {
            fixture.write(&random_services(&mut random))?;
            let pause = Duration::from_millis(5 + random.below(30));
            sleep(pause.min(end.saturating_duration_since(Instant::now())));
        }
        ensure!(
            process.is_running()?,
            "the agent has ended:\n{}",
            fixture.agent.log_tail()
        );
        process.kill()?;
        moments.push(format!("{}{}", if starts { "s" } else { "a" }, life.as_millis()));
        orphans += u32::from(fixture.has_orphan()?);
        process = fixture.agent.start(&[])?;
    }
    fixture.agent.wait_ready(&mut process)?;
    let summary = load.stop()?;
    println!(
        "start takes {start_ms} ms; killed after ms of start (s) or applies (a): {}, {orphans} times leaving \
         an orphan; {} connections",
        moments.join(" "),
        summary.connections
    );
    summary.all_well()?;
    check_backends(
        &summary,
        &[(vips[0], &[0, 1]), (vips[1], &[2, 3, 4, 5]), (vips[2], &[6, 7])],
    )?;
    fixture.agent.verify()?;
    fixture.write(&random_services(&mut random))?;
    eventually("the maps match the desired state", || fixture.agent.verify())?;
    ensure!(fixture.attached()?.len() == HOOKS, "{:?}", fixture.attached()?);
    ensure!(process.stop(scaled_timeout(Duration::from_secs(10)))?.success());
    Ok(())
}

#[test]
fn agent_killed_in_its_first_start_is_recovered_by_the_next() -> Result<()> {
    let mut random = Random::from_env();
    let fixture = Fixture::new()?;
    let web = Service::new("web", 10, &[0, 1]);
    fixture.write([&web])?;
    let begin = Instant::now();
    fixture.agent.start_ready(&[])?.kill()?;
    let start_ms = begin.elapsed().as_millis() as u64;
    for _ in 0..6 {
        fixture.agent.output(&["cleanup"])?;
        let process = fixture.agent.start(&[])?;
        let life = Duration::from_millis(random.below(start_ms));
        sleep(life);
        process.kill()?;
        println!(
            "killed after {} of {start_ms} ms: {:?}",
            life.as_millis(),
            fixture.attached()?
        );
        // Some maps may be pinned, and some programs attached.
        let process = fixture.agent.start_ready(&[])?;
        fixture.agent.verify()?;
        fixture.check_serving(&web)?;
        ensure!(fixture.attached()?.len() == HOOKS, "{:?}", fixture.attached()?);
        process.kill()?;
    }
    // The state after a kill between pinning a link for another cgroup and renaming it into place.
    let links = fixture.agent.pin_path().join(format!("v{VERSION}/links"));
    let pin = links.join("lb_connect4");
    let new = links.join("lb_connect4-new");
    let [from, to] = [&pin, &new].map(|path| path.to_string_lossy());
    bpftool(&["link", "pin", "pinned", &from, &to])?;
    ensure!(new.exists());
    fixture.agent.start_ready(&[])?.kill()?;
    ensure!(!new.exists(), "the temporary link still exists");
    fixture.check_serving(&web)
}

#[test]
fn changes_made_while_the_agent_is_down_leave_other_entries_alone() -> Result<()> {
    let fixture = Fixture::new()?;
    let keep = Service::new("keep", 10, &[0, 1]);
    let grow = Service::new("grow", 11, &[2, 3]);
    let rename = Service::new("rename", 12, &[4]);
    let gone = Service::new("gone", 13, &[5]);
    let new = Service::new("new", 14, &[5]);
    let (giver, taker) = (Service::new("giver", 15, &[6]), Service::new("taker", 15, &[7]));
    let (own_6, own_7, shared) = (("own", 8086), ("own", 8087), ("shared", 80));
    fixture.write([
        &keep,
        &grow,
        &rename,
        &gone,
        &giver.clone().ports(&[shared, own_6]),
        &taker.clone().ports(&[own_7]),
    ])?;
    let process = fixture.agent.start_ready(&[])?;
    fixture.agent.verify()?;
    fixture.check_serving(&gone)?;
    let before = fixture.identities()?;

    let passed = giver.vip();
    let load = fixture.start_clients(&[keep.vip(), grow.vip(), rename.vip(), passed])?;
    sleep(Duration::from_millis(200));
    process.kill()?;
    let grown = Service {
        backends: vec![1, 2, 3],
        ..grow
    };
    let renamed = rename.ports(&[("web", 80)]);
    fixture.write([
        &keep,
        &grown,
        &renamed,
        &new,
        &giver.ports(&[own_6]),
        &taker.clone().ports(&[shared, own_7]),
    ])?;
    ensure!(fixture.agent.verify().is_err(), "no agent has applied these manifests");
    sleep(Duration::from_millis(200));
    let process = fixture.agent.start_ready(&[])?;
    sleep(Duration::from_millis(200));
    let summary = load.stop()?;
    println!("{} connections", summary.connections);
    summary.all_well()?;
    check_backends(
        &summary,
        &[
            (keep.vip(), &[0, 1]),
            (grown.vip(), &[1, 2, 3]),
            (renamed.vip(), &[4]),
            (passed, &[6, 7]),
        ],
    )?;
    eventually("the maps match the desired state", || fixture.agent.verify())?;
    fixture.check_serving(&keep)?;
    fixture.check_serving(&new)?;
    fixture.check_gone(gone.vip())?;
    let summary = fixture.connect(passed, 20)?;
    summary.all_well()?;
    check_backends(&summary, &[(passed, &taker.backends)])?;

    let mut after = fixture.identities()?;
    // The Service that grew is compared without its new backend.
    let old = after.get_mut("grow:http").context("grow is gone")?;
    ensure!(old.backends.len() == 3, "{old:?}");
    old.backends
        .retain(|address, _| before["grow:http"].backends.contains_key(address));
    for name in ["keep:http", "grow:http", "giver:own", "taker:own"] {
        ensure!(
            before[name] == after[name],
            "{name}: {:?} before, {:?} after",
            before[name],
            after[name]
        );
    }
    ensure!(!after.contains_key("gone:http") && !after.contains_key("rename:http"));
    ensure!(process.stop(scaled_timeout(Duration::from_secs(10)))?.success());
    Ok(())
}

/// Which manifests cannot be read when the agent starts again.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Broken {
    Everything,
    Endpoints,
}

#[test]
fn manifests_broken_while_the_agent_is_down_keep_services_served() -> Result<()> {
    for broken in [Broken::Everything, Broken::Endpoints] {
        let fixture = Fixture::new()?;
        let web = Service::new("web", 10, &[0, 1]);
        fixture.write([&web])?;
        let process = fixture.agent.start_ready(&[])?;
        fixture.check_serving(&web)?;
        let identities = fixture.identities()?;
        let load = fixture.start_clients(&[web.vip()])?;
        process.kill()?;
        fs::write(fixture.folder.join("all.json"), "{")?;
        if broken == Broken::Endpoints {
            fs::write(fixture.folder.join("service.json"), web.manifests()[0].to_string())?;
        }
        let mut process = fixture.agent.start(&[])?;
        eventually("the problem is reported", || {
            let status = fixture.agent.json::<Value>(&["status"])?;
            ensure!(status["agent"]["pid"] == process.id(), "{status}");
            ensure!(status["agent"]["complete"] == false, "{status}");
            ensure!(status["problems"] != json!([]), "{status}");
            Ok(())
        })?;
        let summary = fixture.connect(web.vip(), 20)?;
        summary.all_well().with_context(|| format!("{broken:?}"))?;
        ensure!(
            identities == fixture.identities()?,
            "{broken:?}: indexes or ids have changed"
        );
        // The manifests become valid again. They are never missing in between, which would remove the Service.
        fixture.write([&web])?;
        if broken == Broken::Endpoints {
            fs::remove_file(fixture.folder.join("service.json"))?;
        }
        fixture.agent.wait_ready(&mut process)?;
        let summary = load.stop()?;
        println!("{} connections", summary.connections);
        summary.all_well()?;
        check_backends(&summary, &[(web.vip(), &web.backends)])?;
        ensure!(
            identities == fixture.identities()?,
            "{broken:?}: indexes or ids have changed"
        );
        fixture.agent.verify()?;
        ensure!(process.stop(scaled_timeout(Duration::from_secs(10)))?.success());
    }
    Ok(())
}

/// Returns the agent's eBPF object, changed so that the program at socket release returns 0. The kernel ignores that
/// value.
fn other_object() -> Result<Vec<u8>> {
    const MOV64_R0: u8 = 0xb7;
    const MOV32_R0: u8 = 0xb4;
    const EXIT: u8 = 0x95;
    let file = object::File::parse(OBJECT).context("parsing the object")?;
    let section = file.section_by_name("cgroup/sock_release").context("no such section")?;
    let (offset, size) = section.file_range().context("the section has no bytes")?;
    let end = (offset + size) as usize;
    let mut bytes = OBJECT.to_vec();
    // The last two instructions, of 8 bytes each: code, registers, offset, immediate value.
    let [set, exit] = [end - 16, end - 8];
    ensure!(
        matches!(bytes[set..exit], [MOV64_R0 | MOV32_R0, 0, 0, 0, 1, 0, 0, 0]) && bytes[exit] == EXIT,
        "the program does not end in `return 1`: {:x?}",
        &bytes[set..end]
    );
    bytes[set + 4] = 0;
    Ok(bytes)
}

#[test]
fn another_build_takes_over_without_breaking_connections() -> Result<()> {
    let fixture = Fixture::new()?;
    let web = Service::new("web", 10, &[0, 1, 2]);
    fixture.write([&web])?;
    let process = fixture.agent.start_ready(&[])?;
    fixture.check_serving(&web)?;
    let (programs, maps, identities) = (fixture.programs()?, fixture.maps()?, fixture.identities()?);

    let file = fixture.cluster.scratch().join("other-object");
    fs::write(&file, other_object()?).context("writing the object")?;
    let flag = format!("--ebpf-object={}", file.display());
    let held = fixture.testbed.hold(fixture.node(), &[web.vip()], 50)?;
    let load = fixture.start_clients(&[web.vip()])?;
    // To the other object and back: first with a stop, then with a kill.
    ensure!(process.stop(scaled_timeout(Duration::from_secs(10)))?.success());
    let process = fixture.agent.start_ready(&[&flag])?;
    let other = fixture.programs()?;
    sleep(Duration::from_millis(200));
    process.kill()?;
    let process = fixture.agent.start_ready(&[])?;
    let back = fixture.programs()?;
    sleep(Duration::from_millis(200));

    let summary = load.stop()?;
    println!("{} connections", summary.connections);
    summary.all_well()?;
    for (name, (id, tag)) in &programs {
        let ((other_id, other_tag), (back_id, back_tag)) = (&other[name], &back[name]);
        let changed = name == "lb_sock_release";
        ensure!((tag != other_tag) == changed, "{name}: tag {tag}, then {other_tag}");
        ensure!(tag == back_tag, "{name}: tag {tag}, and in the end {back_tag}");
        ensure!(id != other_id && other_id != back_id, "{name} was not replaced");
    }
    ensure!(
        maps == fixture.maps()?,
        "maps: {maps:?} before, {:?} after",
        fixture.maps()?
    );
    ensure!(identities == fixture.identities()?, "indexes or ids have changed");
    ensure!(
        fixture.agent.connections("web", None)? == 20 + 50 + summary.connections,
        "{} connections are counted",
        fixture.agent.connections("web", None)?
    );
    let held = held.finish()?;
    ensure!((held.held, held.live) == (50, 50), "{held:?}");
    fixture.agent.verify()?;
    ensure!(process.stop(scaled_timeout(Duration::from_secs(10)))?.success());
    Ok(())
}

#[test]
fn services_outlive_the_agent_until_cleanup() -> Result<()> {
    let fixture = Fixture::new()?;
    let web = Service::new("web", 10, &[0, 1]);
    fixture.write([&web])?;
    let process = fixture.agent.start_ready(&[])?;
    fixture.check_serving(&web)?;

    // While an agent runs, neither cleanup nor a second agent may touch its maps.
    let message = refusal(fixture.agent.output(&["cleanup"]))?;
    ensure!(message.contains("an agent is running"), "{message}");
    let mut second = fixture.agent.start(&[])?;
    ensure!(!second.wait(scaled_timeout(Duration::from_secs(10)))?.success());
    let log = fixture.agent.log_tail();
    ensure!(log.contains("another agent is running on this pin path"), "{log}");
    fixture.check_serving(&web)?;
    fixture.agent.verify()?;

    ensure!(process.stop(scaled_timeout(Duration::from_secs(10)))?.success());
    let status = fixture.agent.json::<Value>(&["status"])?;
    ensure!(status["agent"]["running"] == false, "{status}");
    fixture.check_serving(&web)?;
    let names = fixture.attached()?;
    ensure!(
        names.len() == HOOKS && names.iter().all(|name| name.starts_with("lb_")),
        "{names:?}"
    );

    // A directory with something else in it is not lb's.
    let other = fixture.agent.pin_path().join("other");
    fs::create_dir(&other)?;
    let message = refusal(fixture.agent.output(&["cleanup"]))?;
    ensure!(message.contains("is no directory of lb"), "{message}");
    ensure!(other.exists() && fixture.attached()?.len() == HOOKS);
    fs::remove_dir(&other)?;

    let programs = fixture.programs()?;
    fixture.agent.output(&["cleanup"])?;
    ensure!(
        fixture.attached()?.is_empty(),
        "still attached: {:?}",
        fixture.attached()?
    );
    fixture.check_gone(web.vip())?;
    ensure!(!fixture.agent.pin_path().exists(), "the pin path still exists");
    // The kernel frees programs in the background.
    eventually("the programs are freed", || {
        for (name, (id, _)) in &programs {
            let id = id.to_string();
            ensure!(bpftool(&["prog", "show", "id", &id]).is_err(), "{name} is still loaded");
        }
        Ok(())
    })?;
    let again = fixture.agent.output(&["cleanup"])?;
    ensure!(again.contains("nothing is pinned"), "{again}");

    // A new start after the cleanup.
    let process = fixture.agent.start_ready(&[])?;
    fixture.check_serving(&web)?;
    ensure!(process.stop(scaled_timeout(Duration::from_secs(10)))?.success());
    Ok(())
}

#[test]
fn a_map_of_another_structure_is_refused_and_the_others_keep_serving() -> Result<()> {
    let fixture = Fixture::new()?;
    let web = Service::new("web", 10, &[0, 1]);
    fixture.write([&web])?;
    let process = fixture.agent.start_ready(&[])?;
    ensure!(process.stop(scaled_timeout(Duration::from_secs(10)))?.success());
    let maps = fixture.agent.pin_path().join(format!("v{VERSION}/maps"));
    let (pin, aside) = (maps.join("FRONTENDS"), maps.join("FRONTENDS-aside"));
    fs::rename(&pin, &aside).context("putting FRONTENDS aside")?;
    let path = pin.to_str().context("path")?;
    let create = "map create PATH type hash key 16 value 8 entries 64 name FRONTENDS";
    let create: Vec<_> = create
        .split(' ')
        .map(|word| if word == "PATH" { path } else { word })
        .collect();
    bpftool(&create)?;
    let mut process = fixture.agent.start(&[])?;
    ensure!(!process.wait(scaled_timeout(Duration::from_secs(10)))?.success());
    let log = fixture.agent.log_tail();
    let why = "FRONTENDS: is a hash with keys of 16 bytes, values of 8 bytes and flags 0; this build has a hash with keys of ";
    ensure!(
        log.contains(why) && log.contains("lb-agent cleanup"),
        "no {why:?} in\n{log}"
    );
    let summary = fixture.connect(web.vip(), 20)?;
    summary.all_well()?;
    check_backends(&summary, &[(web.vip(), &web.backends)])?;
    fs::rename(&aside, &pin).context("putting FRONTENDS back")?;

    // With its own maps, the agent takes over again.
    let process = fixture.agent.start_ready(&[])?;
    fixture.agent.verify()?;
    fixture.check_serving(&web)?;
    ensure!(process.stop(scaled_timeout(Duration::from_secs(10)))?.success());
    fixture.agent.output(&["cleanup"])?;
    ensure!(
        fixture.attached()?.is_empty(),
        "still attached: {:?}",
        fixture.attached()?
    );
    Ok(())
}
