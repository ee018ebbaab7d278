//! Pinned maps: readable with bpftool, checked by `verify`, repaired by a restart, limited by flags.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use aya::maps::{Array, HashMap, Map, MapData};
use lb_agent::loader::{self, Lock, PinPath, SocketLb};
use lb_agent::maps::bpf::BpfMaps;
use lb_agent::source::manifests::ManifestSource;
use lb_common::abi::{MAPS, Service, SizedMap, VERSION, map_flags};
use lb_core::maps::{Capacities, Maps as _, memory};
use lb_core::reconcile::Reconciler;
use lb_core::verify::{Drift, verify};
use lb_tests::manifests::{Manifests, Port, service, slice};
use lb_tests::{
    Agent, CallResult, Cluster, Connect, Pod, Process, RunningAgent, ScriptedSocket, SocketCall, SocketKind, addr,
    scaled_timeout, testbed, unit_capabilities,
};
use serde_json::Value;

const HTTP: Port<'static> = Port::tcp("http", 80);
const TARGET: Port<'static> = Port::tcp("http", 8080);

struct Setup {
    agent: RunningAgent,
    manifests: Manifests,
    client: Pod,
    _server: Process,
    cluster: Cluster,
}

/// Size of a value of SERVICES.
const SERVICE: usize = size_of::<Service>();

/// Creates a node with Services `web` (a local endpoint and a remote one) and `db` (the local one).
fn setup(more: &[&str]) -> Result<Setup> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let (client, pod) = (cluster.add_pod("n1", "client")?, cluster.add_pod("n1", "a")?);
    pod.add_address("10.10.1.200/32", "lo")?;
    let server = testbed().serve(&pod, &["0.0.0.0:8080=a"])?;
    let manifests = Manifests::new(&cluster)?;
    let endpoints = [(pod.address().into(), "n1"), ("10.10.7.7".parse()?, "n7")];
    let web = service("web", "10.96.0.10", &[HTTP], "internalTrafficPolicy: Local") + &slice("web", TARGET, &endpoints);
    let db = service("db", "10.96.0.20", &[HTTP], "") + &slice("db", TARGET, &endpoints[..1]);
    manifests.write("all.yaml", &(web + &db))?;
    let agent = manifests.serve(&cluster, "n1", more)?;
    Ok(Setup {
        agent,
        manifests,
        client,
        _server: server,
        cluster,
    })
}

impl Setup {
    /// Returns the formatted entries that `bpftool -j map dump` prints for a pinned map.
    fn dump(&self, name: &str) -> Result<Vec<Value>> {
        let path = self.agent.pin_path().join(format!("v{VERSION}/maps")).join(name);
        let output = Command::new("bpftool")
            .args(["-j", "map", "dump", "pinned"])
            .arg(path)
            .output()?;
        ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let entries: Vec<Value> = serde_json::from_slice(&output.stdout)?;
        entries
            .into_iter()
            .map(|e| e.get("formatted").cloned().context("not formatted: no BTF"))
            .collect()
    }
}

fn mapped(last: [u8; 4]) -> Value {
    let mut bytes = [0_u8; 16];
    (bytes[10], bytes[11]) = (0xff, 0xff);
    bytes[12..].copy_from_slice(&last);
    serde_json::json!({ "bytes": bytes })
}

#[test]
fn bpftool_dump_prints_named_fields() -> Result<()> {
    let setup = setup(&[])?;
    let frontends = setup.dump("FRONTENDS")?;
    let web = frontends
        .iter()
        .find(|e| e["key"]["addr"] == mapped([10, 96, 0, 10]) && e["key"]["port"] == 80);
    let web = web.context("no frontend 10.96.0.10:80")?;
    assert_eq!(web["key"]["proto"], 6);
    assert_eq!(web["value"]["kind"], 2, "ClusterIP");
    let service = &web["value"]["service"];
    let index = service["index"].as_u64().context("service index")?;
    let set = web["value"]["set"].clone();

    let services = setup.dump("SERVICES")?;
    let web = services.iter().find(|e| e["key"] == index).context("no service")?;
    let (internal, cluster) = (&web["value"]["internal"], &web["value"]["cluster"]);
    assert_eq!((&internal["len"], &cluster["len"]), (&Value::from(1), &Value::from(2)));
    assert_eq!(&set, internal);
    assert_eq!(web["value"]["generation"], 1);

    let slots = setup.dump("BACKEND_SLOTS")?;
    let slot = slots.iter().find(|e| e["key"] == cluster["base"]).context("no slot")?;
    assert_eq!(slot["value"]["port"], 8080);

    let backends = setup.dump("BACKENDS")?;
    let backend = backends
        .iter()
        .find(|e| e["key"] == slot["value"]["backend"]["id"])
        .context("no backend")?;
    assert_eq!(backend["value"]["addr"], slot["value"]["addr"]);
    assert_eq!(&backend["value"]["service"], service);
    assert_eq!(backend["value"]["generation"], slot["value"]["backend"]["generation"]);
    Ok(())
}

#[test]
fn status_shows_the_use_of_every_map_that_a_flag_sizes() -> Result<()> {
    let setup = setup(&["--max-udp-flows", "128"])?;
    let status: Value = setup.agent.json(&["status"])?;
    let rows = status["maps"].as_array().context("maps")?;
    assert_eq!(rows.len(), SizedMap::ALL.len(), "{rows:#?}");
    for (row, map) in rows.iter().zip(SizedMap::ALL) {
        assert_eq!((&row["name"], &row["flag"]), (&map.name().into(), &map.flag().into()));
        let used = row["used"].as_u64().context("used")?;
        let capacity = row["capacity"].as_u64().context("capacity")?;
        assert!(used <= capacity, "{row:#}");
        if *map == SizedMap::UdpFlows {
            assert_eq!((used, capacity), (0, 128));
        }
        if *map == SizedMap::Frontends {
            assert!(used > 0, "{row:#}");
        }
    }
    Ok(())
}

/// The kernel reports the memory of a map since Linux 6.4, and before that only a part of it.
#[test]
fn computed_memory_of_maps_is_that_of_the_kernel() -> Result<()> {
    let setup = setup(&[])?;
    let cpus = aya::util::nr_cpus().map_err(|(path, error)| anyhow::anyhow!("{path}: {error}"))? as u32;
    let maps = setup.agent.pin_path().join(format!("v{VERSION}/maps"));
    for spec in MAPS {
        let map = pinned(&maps, spec.name)?;
        let fdinfo = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd()))?;
        let memlock = fdinfo.lines().find_map(|line| line.strip_prefix("memlock:"));
        let reported: u64 = memlock.context("no memlock")?.trim().parse()?;
        let computed = memory::of_map(spec, map.info()?.max_entries(), cpus);
        println!("{:<16} {reported:>9} reported, {computed:>9} computed", spec.name);
        ensure!(reported <= computed, "{}: {reported} > {computed}", spec.name);
        // The others allocate entries when they are inserted.
        if spec.flags & map_flags::NO_PREALLOC == 0 {
            ensure!(computed <= reported + 1024, "{}: {computed}, not {reported}", spec.name);
        }
    }
    let status: Value = setup.agent.json(&["status"])?;
    let rows = status["maps"].as_array().context("maps")?;
    let sum: u64 = rows.iter().filter_map(|row| row["memory"].as_u64()).sum();
    ensure!(status["map_memory"]["bytes"] == sum, "{}", status["map_memory"]);
    let limit = status["map_memory"]["limit"].as_u64().context("no limit")?;
    ensure!((1 << 20..=1 << 30).contains(&limit), "{limit}");
    Ok(())
}

/// A change of one field of one entry from outside: the name that `verify` gives the field, and the byte to change.
struct Corruption {
    map: &'static str,
    field: &'static str,
    /// Offset of the byte in the value.
    at: usize,
}

const fn corruption(map: &'static str, field: &'static str, at: usize) -> Corruption {
    Corruption { map, field, at }
}

/// Every field of the values, by offset.
const CORRUPTIONS: &[Corruption] = &[
    corruption("FRONTENDS", "service", 0),
    corruption("FRONTENDS", "kind", 4),
    corruption("FRONTENDS", "pad", 5),
    corruption("FRONTENDS", "set.base", 8),
    corruption("FRONTENDS", "set.len", 12),
    corruption("FRONTENDS", "set.flags", 14),
    corruption("SERVICES", "internal.base", 0),
    corruption("SERVICES", "internal.len", 4),
    corruption("SERVICES", "internal.flags", 6),
    corruption("SERVICES", "external.base", 8),
    corruption("SERVICES", "external.len", 12),
    corruption("SERVICES", "external.flags", 14),
    corruption("SERVICES", "cluster.base", 16),
    corruption("SERVICES", "cluster.len", 20),
    corruption("SERVICES", "cluster.flags", 22),
    corruption("SERVICES", "flags", 24),
    corruption("SERVICES", "affinity_timeout", 28),
    corruption("SERVICES", "generation", 32),
    corruption("SERVICES", "pad", 36),
    corruption("BACKEND_SLOTS", "addr", 15),
    corruption("BACKEND_SLOTS", "port", 16),
    corruption("BACKEND_SLOTS", "flags", 18),
    corruption("BACKEND_SLOTS", "backend.id", 20),
    corruption("BACKEND_SLOTS", "backend.generation", 24),
    corruption("BACKEND_SLOTS", "service", 28),
    corruption("BACKENDS", "addr", 15),
    corruption("BACKENDS", "port", 16),
    corruption("BACKENDS", "flags", 18),
    corruption("BACKENDS", "service", 20),
    corruption("BACKENDS", "generation", 24),
    corruption("BACKENDS", "generation or .seal", 28),
];

impl Corruption {
    /// Flips a bit of the field in an entry that is in use, and returns the name of the field. The bit is bit 1: a
    /// changed generation still means that the entry is in use, and a changed base leads to another set.
    fn apply(&self, maps: &Path) -> Result<String> {
        if self.map == "FRONTENDS" {
            let mut map: HashMap<_, [u8; 20], [u8; 16]> = Map::HashMap(pinned(maps, self.map)?).try_into()?;
            let (key, mut value) = first_frontend(&map)?;
            value[self.at] ^= 2;
            map.insert(key, value, 0)?;
            return Ok(format!("FRONTENDS[10.96.0.{}:80, protocol 6].{}", key[15], self.field));
        }
        if self.map == "SERVICES" {
            return self.apply_at::<SERVICE>(maps, |value| value[32] & 1 == 1);
        }
        if self.map == "BACKEND_SLOTS" {
            // A slot in no set belongs to no Service, so this takes the first slot of some Service's cluster set.
            let services: Array<_, [u8; SERVICE]> = Map::Array(pinned(maps, "SERVICES")?).try_into()?;
            let live = services
                .iter()
                .filter_map(Result::ok)
                .find(|value| value[32] & 1 == 1)
                .context("no service")?;
            let base = u32::from_ne_bytes([live[16], live[17], live[18], live[19]]);
            return self.apply_at_index::<32>(maps, base);
        }
        self.apply_at::<32>(maps, |value| value[24] & 1 == 1)
    }

    /// Flips the bit in the first entry of an array that is in use.
    fn apply_at<const N: usize>(&self, maps: &Path, in_use: impl Fn(&[u8; N]) -> bool) -> Result<String> {
        let map: Array<_, [u8; N]> = Map::Array(pinned(maps, self.map)?).try_into()?;
        let index = (0..map.len()).find(|index| map.get(index, 0).is_ok_and(|value| in_use(&value)));
        self.apply_at_index::<N>(maps, index.context("no entry is in use")?)
    }

    /// Flips the bit in one entry of an array.
    fn apply_at_index<const N: usize>(&self, maps: &Path, index: u32) -> Result<String> {
        let mut map: Array<_, [u8; N]> = Map::Array(pinned(maps, self.map)?).try_into()?;
        let mut value = map.get(&index, 0)?;
        value[self.at] ^= 2;
        map.set(index, value, 0)?;
        Ok(format!("{}[{index}].{}", self.map, self.field))
    }
}

fn pinned(maps: &Path, name: &str) -> Result<MapData> {
    Ok(MapData::from_pin(maps.join(name))?)
}

/// Returns some frontend that is no address mark.
fn first_frontend(map: &HashMap<MapData, [u8; 20], [u8; 16]>) -> Result<([u8; 20], [u8; 16])> {
    map.iter()
        .filter_map(Result::ok)
        .find(|(key, _)| key[16] == 80)
        .context("no frontend")
}

/// Does in this process what the agent does at start: loads, adopts the pinned maps, applies the manifests.
fn start(lock: &Lock, manifests: &Manifests) -> Result<Reconciler<BpfMaps>> {
    const CAPACITIES: Capacities = Capacities::uniform(64)
        .with(SizedMap::Services, 16)
        .with(SizedMap::Frontends, 16)
        .with(SizedMap::Sockets, 16)
        .with(SizedMap::SocketsMore, 16);
    let maps = loader::load(loader::OBJECT, lock, &CAPACITIES, SocketLb::All)?;
    let mut reconciler = Reconciler::adopt(maps, "n1")?;
    reconciler.apply(ManifestSource::new(vec![manifests.path().into()]).rescan());
    reconciler.settle()?;
    Ok(reconciler)
}

fn differences(reconciler: &Reconciler<BpfMaps>) -> Result<Vec<Drift>> {
    Ok(verify(reconciler.desired(), &reconciler.maps().dump()?))
}

#[test]
fn verify_names_every_corrupted_field_and_a_restart_repairs_it() -> Result<()> {
    let cluster = Cluster::builder().nodes(1).build()?;
    let manifests = Manifests::new(&cluster)?;
    let endpoints: [(IpAddr, &str); 2] = [("10.10.1.5".parse()?, "n1"), ("10.10.7.7".parse()?, "n7")];
    let web = service("web", "10.96.0.10", &[HTTP], "internalTrafficPolicy: Local") + &slice("web", TARGET, &endpoints);
    let db = service("db", "10.96.0.20", &[HTTP], "") + &slice("db", TARGET, &endpoints[..1]);
    manifests.write("all.yaml", &(web + &db))?;
    let pins = PinPath::new(cluster.pin_path("n1"));
    let lock = Lock::take(&pins)?;
    let mut agent = start(&lock, &manifests)?;
    assert_eq!(differences(&agent)?, []);
    for corruption in CORRUPTIONS {
        let field = corruption.apply(&pins.maps())?;
        let found = differences(&agent)?;
        let named = found.iter().any(|drift| drift.field.contains(&field));
        ensure!(named, "verify does not name {field}: {found:?}");
        println!("{field}: {}", found[0]);
        drop(agent);
        agent = start(&lock, &manifests)?;
        let left = differences(&agent)?;
        ensure!(left.is_empty(), "{field} is not repaired by a restart: {left:?}");
    }
    // A changed key: the entry is missing, and there is one that is not desired.
    for at in [15, 16, 18, 19] {
        let mut map: HashMap<_, [u8; 20], [u8; 16]> = Map::HashMap(pinned(&pins.maps(), "FRONTENDS")?).try_into()?;
        let (mut key, value) = first_frontend(&map)?;
        map.remove(&key)?;
        key[at] ^= 2;
        map.insert(key, value, 0)?;
        let found = differences(&agent)?;
        let missing = found.iter().filter(|d| d.message.contains("is missing")).count();
        let stray = found.iter().filter(|d| d.message.contains("is not desired")).count();
        ensure!((missing, stray) == (1, 1), "byte {at} of a key: {found:?}");
        drop(agent);
        agent = start(&lock, &manifests)?;
        let left = differences(&agent)?;
        ensure!(
            left.is_empty(),
            "byte {at} of a key is not repaired by a restart: {left:?}"
        );
    }
    Ok(())
}

#[test]
fn verify_exit_code_reports_drift_and_a_restart_repairs_it() -> Result<()> {
    let mut setup = setup(&[])?;
    setup.agent.kill()?;
    let maps = setup.agent.pin_path().join(format!("v{VERSION}/maps"));
    let field = corruption("SERVICES", "flags", 24).apply(&maps)?;
    let reported = setup
        .agent
        .verify()
        .err()
        .context("verify found no difference")?
        .to_string();
    ensure!(reported.contains(&field), "{reported}");
    setup.agent = setup.manifests.serve(&setup.cluster, "n1", &[])?;
    let load = Connect::to(&[addr("10.96.0.10:80"), addr("10.96.0.20:80")]).count(20);
    testbed().connect(&setup.client, &load)?.all_well()
}

#[test]
fn maps_without_a_pin_are_named_and_get_the_size_of_those_they_belong_to() -> Result<()> {
    let mut setup = setup(&["--min-services", "4096"])?;
    setup.agent.kill()?;
    let maps = setup.agent.pin_path().join(format!("v{VERSION}/maps"));
    for name in ["NAMES", "STATS"] {
        std::fs::remove_file(maps.join(name))?;
    }
    setup.agent = setup.manifests.serve(&setup.cluster, "n1", &[])?;
    for name in ["SERVICES", "NAMES", "STATS"] {
        let map = MapData::from_pin(maps.join(name))?;
        assert_eq!(map.info()?.max_entries(), 4096, "{name}");
    }
    let status = setup.agent.output(&["status"])?;
    ensure!(
        status.contains("these maps were not pinned any more, so their entries are lost: NAMES, STATS"),
        "{status}"
    );
    setup.agent.verify()?;
    let load = Connect::to(&[addr("10.96.0.10:80"), addr("10.96.0.20:80")]).count(20);
    testbed().connect(&setup.client, &load)?.all_well()
}

#[test]
fn verify_compares_for_the_node_of_the_last_agent() -> Result<()> {
    let mut setup = setup(&[])?;
    let manifests = setup.manifests.path().to_str().context("the path is not UTF-8")?;
    let by_default = ["verify", "--manifests", manifests];
    setup.agent.output(&by_default)?;
    setup.agent.kill()?;
    setup.agent.output(&by_default)?;
    // The internal set of `web` has another endpoint there.
    let reported = setup
        .agent
        .output(&["verify", "--node-name", "n7", "--manifests", manifests])
        .err()
        .context("verify did not compare for n7")?
        .to_string();
    ensure!(reported.contains("the node is n7 by --node-name"), "{reported}");
    Ok(())
}

#[test]
fn full_map_problem_names_map_flag_and_rejected_frontend() -> Result<()> {
    // FRONTENDS has two entries for each of web and db, so one more Service does not fit.
    let mut setup = setup(&["--max-frontends", "5"])?;
    let more = service("more", "10.96.0.30", &[HTTP], "");
    setup.manifests.write("more.yaml", &more)?;
    let has_problem = |agent: &Agent| {
        let problems = agent.status()?.problems;
        let found = problems.iter().any(|p| {
            p.message.contains("FRONTENDS is full (5 entries)")
                && p.message.contains("--max-frontends")
                && p.place.contains("10.96.0.30")
        });
        ensure!(found, "{problems:?}");
        Ok(())
    };
    setup.agent.wait("refusing the third Service", has_problem)?;
    // The other Services are served, and can change.
    let load = Connect::to(&[addr("10.96.0.10:80"), addr("10.96.0.20:80")]).count(20);
    testbed().connect(&setup.client, &load)?.all_well()?;
    let two = service("db", "10.96.0.20", &[HTTP], "sessionAffinity: ClientIP");
    setup.manifests.write("all.yaml", &two)?;
    // `web` is removed, which frees its entries without a restart.
    setup.agent.wait_ready(&|| false)?;
    let problems = setup.agent.status()?.problems;
    ensure!(!problems.iter().any(|p| p.message.contains("full")), "{problems:?}");
    Ok(())
}

#[test]
fn broken_manifest_is_reported_and_other_services_are_unaffected() -> Result<()> {
    let mut setup = setup(&[])?;
    let good = service("new", "10.96.0.40", &[HTTP], "");
    let broken =
        "apiVersion: v1\nkind: Service\nmetadata: {name: bad}\nspec: {clusterIP: 10.96.0.41, ports: [{port: 70000}]}\n";
    setup.manifests.write("broken.yaml", &(good.clone() + broken))?;
    let reported = |agent: &Agent| {
        let problems = agent.status()?.problems;
        let named = |p: &lb_tests::Problem| p.place.contains("broken.yaml") && p.message.contains("spec.ports[0].port");
        ensure!(problems.iter().any(named), "{problems:?}");
        Ok(())
    };
    setup.agent.wait("reporting the broken manifest", reported)?;
    let load = Connect::to(&[addr("10.96.0.10:80"), addr("10.96.0.20:80")]).count(20);
    testbed().connect(&setup.client, &load)?.all_well()?;
    let services: Vec<Value> = setup.agent.json(&["service", "list"])?;
    assert!(
        services.iter().any(|s| s["name"] == "new"),
        "the valid document of a file with errors is used"
    );

    // The source is read every 3 s; a file that is still broken causes no apply.
    let applies = setup.agent.status()?.agent.applies;
    std::thread::sleep(std::time::Duration::from_secs(7));
    assert_eq!(setup.agent.status()?.agent.applies, applies);

    // The last valid content of a file that breaks later stays in force, across a restart of the agent too.
    let all = std::fs::read_to_string(setup.manifests.path().join("all.yaml"))?;
    setup.manifests.write("all.yaml", &all[..all.len() / 2])?;
    let reported = |agent: &Agent| {
        let problems = agent.status()?.problems;
        ensure!(problems.iter().any(|p| p.place.contains("all.yaml")), "{problems:?}");
        Ok(())
    };
    setup.agent.wait("reporting the truncated file", reported)?;
    testbed().connect(&setup.client, &load)?.all_well()?;
    setup.agent.kill()?;
    setup.agent.start_again()?;
    setup
        .agent
        .wait("reporting the truncated file after a restart", |agent| {
            ensure!(agent.status()?.agent.running && !agent.status()?.agent.complete);
            reported(agent)
        })?;
    testbed().connect(&setup.client, &load)?.all_well()?;

    setup.manifests.write("all.yaml", &all)?;
    setup.manifests.write("broken.yaml", &good)?;
    setup.agent.wait_ready(&|| false)?;
    let problems = setup.agent.status()?.problems;
    ensure!(problems.iter().all(|p| p.place.starts_with("cgroup")), "{problems:?}");
    Ok(())
}

#[test]
fn systemd_unit_capabilities_suffice_to_serve() -> Result<()> {
    let mut setup = setup(&[])?;
    setup.agent.kill()?;
    let node = setup.cluster.node("n1");
    let program = Agent::find()?;
    let granted = unit_capabilities()?;
    let mut command = node.command("setpriv")?;
    command
        .arg(format!("--bounding-set={granted}"))
        .args(["--inh-caps=-all", "--no-new-privs"]);
    command
        .arg(&program)
        .arg("run")
        .arg("--manifests")
        .arg(setup.manifests.path())
        .args(["--node-name", "n1"]);
    command
        .arg("--cgroup")
        .arg(node.cgroup())
        .arg("--pin-path")
        .arg(setup.agent.pin_path());
    let mut process = Process::spawn(&mut command)?;
    setup
        .manifests
        .write("more.yaml", &service("more", "10.96.0.30", &[HTTP], ""))?;
    let deadline = std::time::Instant::now() + scaled_timeout(std::time::Duration::from_secs(20));
    while let Err(error) = setup.agent.verify() {
        ensure!(process.is_running()?, "the agent has ended: {error:#}");
        ensure!(std::time::Instant::now() < deadline, "{error:#}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.id()))?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .context("no CapEff")?;
    let effective = u64::from_str_radix(effective.trim(), 16)?;
    let named = granted.matches('+').count();
    assert_eq!(effective.count_ones() as usize, named, "{effective:#x}, {granted}");
    let load = Connect::to(&[addr("10.96.0.10:80"), addr("10.96.0.20:80")]).count(20);
    testbed().connect(&setup.client, &load)?.all_well()
}

#[test]
fn agent_mounts_a_missing_bpffs() -> Result<()> {
    let setup = setup(&[])?;
    let node = setup.cluster.node("n1");
    let mut command = node.command("unshare")?;
    // A mount namespace of its own without the BPF file system. Everything mounted and pinned there disappears with it.
    let script = "umount --lazy /sys/fs/bpf && exec \"$@\"";
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(Agent::find()?);
    command
        .arg("run")
        .arg("--manifests")
        .arg(setup.manifests.path())
        .arg("--cgroup")
        .arg(node.cgroup());
    command.arg("--pin-path").arg(setup.agent.pin_path());
    let mut process = Process::spawn(&mut command)?;
    let deadline = std::time::Instant::now() + scaled_timeout(std::time::Duration::from_secs(20));
    loop {
        let mounts = std::fs::read_to_string(format!("/proc/{}/mounts", process.id()))?;
        let link = format!(
            "/proc/{}/root{}/v{VERSION}/links/lb_connect4",
            process.id(),
            setup.agent.pin_path().display()
        );
        if mounts.contains(" /sys/fs/bpf bpf ") && std::fs::metadata(&link).is_ok() {
            return Ok(());
        }
        ensure!(process.is_running()?, "the agent has ended");
        ensure!(
            std::time::Instant::now() < deadline,
            "{link} does not exist; mounts: {mounts}"
        );
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
}

/// Opens a socket of each kind to a Service in both families, connected and unconnected. Returns each with the fields
/// that `socket list` must show: requested destination, protocol, kind and cookie.
fn open_sockets(client: &Pod) -> Result<Vec<(ScriptedSocket, Value)>> {
    let mut sockets = Vec::new();
    for (kind, protocol, to, connects) in [
        (SocketKind::Tcp4, "TCP", "10.96.0.50:80", true),
        (SocketKind::Tcp6, "TCP", "[fd00:96::50]:80", true),
        (SocketKind::Tcp6, "TCP", "10.96.0.50:80", true),
        (SocketKind::Udp4, "UDP", "10.96.0.50:53", true),
        (SocketKind::Udp6, "UDP", "[fd00:96::50]:53", true),
        (SocketKind::Udp4, "UDP", "10.96.0.50:53", false),
        (SocketKind::Udp6, "UDP", "[fd00:96::50]:53", false),
    ] {
        let mut socket = testbed().scripted_socket(client, kind)?;
        let at = match (kind, addr(to)) {
            // A v4-mapped address, of family AF_INET6.
            (SocketKind::Tcp6, SocketAddr::V4(v4)) => SocketAddr::new(v4.ip().to_ipv6_mapped().into(), v4.port()),
            (_, at) => at,
        };
        if connects {
            socket.connect(at)?;
        } else {
            socket.exchange(at, "hello")?;
        }
        let CallResult::Number(cookie) = socket.call(&SocketCall::Cookie)? else {
            anyhow::bail!("no cookie");
        };
        let kind = if connects { "connected" } else { "unconnected" };
        let row = serde_json::json!({"original": to, "protocol": protocol, "kind": kind, "cookie": cookie});
        sockets.push((socket, row));
    }
    Ok(sockets)
}

#[test]
fn socket_list_is_sorted_by_service_and_marks_dead_sockets() -> Result<()> {
    const TARGETS: [Port<'static>; 2] = [Port::tcp("http", 8080), Port::udp("dns", 5353)];
    let mut setup = setup(&["--sweep-age", "600000"])?;
    let pod = setup.cluster.add_pod("n1", "both")?;
    let datagrams = [pod.socket(5353), pod.socket6(5353)].map(|at| format!("{at}=both"));
    let _servers = [
        testbed().serve_with(&pod, &["[::]:8080=both"], &["--echo"])?,
        testbed().serve_datagrams(&pod, &datagrams.each_ref().map(String::as_str))?,
    ];
    let mut text = service("both", "10.96.0.50,fd00:96::50", &[HTTP, Port::udp("dns", 53)], "");
    for port in TARGETS {
        text += &slice("both", port, &[(pod.address().into(), "n1")]);
        text += &slice("both", port, &[(pod.address6().into(), "n1")]);
    }
    setup.manifests.write("both.yaml", &text)?;
    setup.agent.wait_ready(&|| false)?;

    let list = |setup: &Setup| -> Result<Vec<Value>> { setup.agent.json(&["socket", "list"]) };
    let sockets = open_sockets(&setup.client)?;
    let rows = list(&setup)?;
    assert_eq!(rows.len(), sockets.len(), "{rows:#?}");
    for (_, expected) in &sockets {
        let same = |row: &&Value| {
            ["original", "protocol", "kind", "cookie"]
                .iter()
                .all(|f| row[f] == expected[f])
        };
        let row = rows
            .iter()
            .find(same)
            .with_context(|| format!("{expected} in {rows:#?}"))?;
        let port = if row["protocol"] == "TCP" { 8080 } else { 5353 };
        let is_v4 = row["family"] == 4;
        let backend = if is_v4 { pod.socket(port) } else { pod.socket6(port) };
        assert_eq!(
            (&row["name"], &row["state"]),
            (&"both".into(), &"open".into()),
            "{row:#}"
        );
        assert_eq!(
            (&row["backend"], &row["current"]),
            (&backend.to_string().into(), &true.into())
        );
        let local: SocketAddr = row["local"].as_str().context("local")?.parse()?;
        assert!(local.port() != 0, "{row:#}");
        if row["kind"] == "connected" {
            let address: IpAddr = if is_v4 {
                setup.client.address().into()
            } else {
                setup.client.address6().into()
            };
            assert_eq!(local.ip(), address);
        }
    }
    let keys: Vec<_> = rows
        .iter()
        .map(|row| (row["port_name"].to_string(), row["backend"].to_string()))
        .collect();
    assert!(keys.is_sorted_by_key(|(port, _)| port), "by service: {keys:?}");

    // Without the program at socket release, records are left over, as they are for sockets that the kernel itself
    // opens.
    setup.agent.kill()?;
    let link = setup.agent.pin_path().join(format!("v{VERSION}/links/lb_sock_release"));
    let output = Command::new("bpftool")
        .args(["link", "detach", "pinned"])
        .arg(&link)
        .output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let (left, closed) = sockets
        .into_iter()
        .enumerate()
        .partition::<Vec<_>, _>(|(i, _)| i % 2 == 0);
    let dead: Vec<Value> = closed.into_iter().map(|(_, (_, row))| row["cookie"].clone()).collect();
    // A record counts as young for a second, since its socket may be about to connect.
    let deadline = std::time::Instant::now() + scaled_timeout(std::time::Duration::from_secs(10));
    loop {
        let rows = list(&setup)?;
        assert_eq!(rows.len(), left.len() + dead.len());
        let state = |row: &Value| row["state"].as_str().unwrap_or_default().to_owned();
        let as_expected = |row: &Value| {
            let is_dead = dead.contains(&row["cookie"]);
            state(row) == if is_dead { "dead" } else { "open" }
        };
        if rows.iter().all(as_expected) {
            break;
        }
        ensure!(std::time::Instant::now() < deadline, "dead: {dead:?}: {rows:#?}");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let table = setup.agent.output(&["socket", "list"])?;
    assert_eq!(
        table.lines().filter(|line| line.contains(" dead")).count(),
        dead.len(),
        "{table}"
    );
    Ok(())
}
