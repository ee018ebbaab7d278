//! Programs attached to the node's devices: on which devices, how attachments follow changes, and other programs there.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr, UdpSocket};

use anyhow::{Context as _, Result, ensure};
use aya::programs::tc::qdisc_add_clsact;
use aya::programs::{SchedClassifier, TcAttachType, loaded_links};
use lb_common::abi::VERSION;
use lb_stress::Counter;
use lb_tests::manifests::{Manifests, Port, service, slice};
use lb_tests::{Cluster, DeviceStatus, Netns, Node, Problem, RunningAgent, eventually};
use nix::sys::signal::Signal;
use serde_json::Value;

/// How programs are attached: with tcx if the kernel has it, or with clsact filters as on kernels before 6.6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum AttachMode {
    Native,
    Clsact,
}

impl AttachMode {
    const BOTH: [Self; 2] = [Self::Native, Self::Clsact];

    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Native => &[],
            Self::Clsact => &["--no-tcx"],
        }
    }

    /// Name in the output of `status`.
    fn name(self) -> Result<&'static str> {
        Ok(match self {
            Self::Native if has_tcx()? => "tcx",
            Self::Native | Self::Clsact => "clsact",
        })
    }
}

/// Returns whether the kernel has tcx, by its version.
fn has_tcx() -> Result<bool> {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = text.split('.').map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    ensure!(version > (1, 0), "{text}");
    Ok(version >= (6, 6))
}

/// Program ids by program name.
type Programs = BTreeMap<String, u32>;

/// Returns the programs at ingress and egress of a device as the kernel reports them: tcx links and clsact filters. A
/// program that is attached twice is an error.
fn attached_programs(node: &Netns, device: &str) -> Result<[Programs; 2]> {
    let mut attached_programs = [Programs::new(), Programs::new()];
    let sides = [(TcAttachType::Ingress, "ingress"), (TcAttachType::Egress, "egress")];
    for (programs, (side, direction)) in attached_programs.iter_mut().zip(sides) {
        if has_tcx()? {
            let (_, links) = node.within(|| SchedClassifier::query_tcx(device, side))??;
            for link in links {
                let name = format!("tcx {}", link.name_as_str().unwrap_or("?"));
                ensure!(
                    programs.insert(name, link.id()).is_none(),
                    "a program is attached twice to {device}"
                );
            }
        }
        let text = node.run("tc", &["-j", "filter", "show", "dev", device, direction])?;
        let filters: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
        for filter in filters.as_array().context("not a list")? {
            let options = &filter["options"];
            // The kernel lists the chain first, then the filter in it.
            let Some(id) = options["prog"]["id"].as_u64() else {
                continue;
            };
            let name = options["bpf_name"].as_str().unwrap_or("?");
            let name = format!("clsact {}", name.split('.').next().unwrap_or("?"));
            ensure!(
                programs.insert(name, id as u32).is_none(),
                "a program is attached twice to {device}: {text}"
            );
        }
    }
    Ok(attached_programs)
}

fn names(programs: &Programs) -> Vec<&str> {
    programs.keys().map(String::as_str).collect()
}

/// Fails unless both programs of lb are attached to a device, and no others.
fn ensure_served(node: &Node, device: &str, mode: &str) -> Result<[u32; 2]> {
    let attached_programs = attached_programs(node, device)?;
    let [ingress, egress] = attached_programs.each_ref().map(names);
    let is = (ingress.as_slice(), egress.as_slice());
    let names = ["lb_ingress", "lb_egress"].map(|name| format!("{mode} {name}"));
    ensure!(is == (&[&*names[0]], &[&*names[1]]), "{device}: {is:?}");
    Ok([attached_programs[0][&names[0]], attached_programs[1][&names[1]]])
}

/// Fails if any program is attached to a device.
fn ensure_nothing_attached(node: &Netns, device: &str) -> Result<()> {
    let attached_programs = attached_programs(node, device)?;
    ensure!(
        attached_programs.iter().all(Programs::is_empty),
        "{device}: {attached_programs:?}"
    );
    Ok(())
}

/// Returns the interface index of a device.
fn index(node: &Node, device: &str) -> Result<u32> {
    let text = node.ip(&format!("-oneline link show dev {device}"))?;
    let index = text.split(':').next().unwrap_or_default();
    index.parse().with_context(|| text.clone())
}

struct Setup {
    agent: RunningAgent,
    mode: &'static str,
    cluster: Cluster,
}

impl Setup {
    fn new(mode: AttachMode, flags: &[&str]) -> Result<Self> {
        Self::with(mode, flags, |_| Ok(()))
    }

    /// Creates a node with a pod, runs `before` on the node, then starts the agent.
    fn with(mode: AttachMode, flags: &[&str], before: impl FnOnce(&Node) -> Result<()>) -> Result<Self> {
        let cluster = Cluster::builder().nodes(1).client(true).build()?;
        cluster.add_pod("n1", "pod")?;
        before(cluster.node("n1"))?;
        let manifests = Manifests::new(&cluster)?;
        let pod: IpAddr = "10.10.1.2".parse()?;
        let text = service("web", "10.96.0.20", &[Port::tcp("web", 80).on_nodes(30080)], "")
            + &slice("web", Port::tcp("web", 8080), &[(pod, "n1")]);
        manifests.write("web.yaml", &text)?;
        let flags: Vec<_> = mode.flags().iter().chain(flags).copied().collect();
        let agent = manifests.serve(&cluster, "n1", &flags)?;
        let mode = mode.name()?;
        println!("attached with {mode}");
        Ok(Self { agent, mode, cluster })
    }

    fn node(&self) -> &Node {
        self.cluster.node("n1")
    }

    /// Kills the agent and starts it with other flags.
    fn restart(&mut self, mode: AttachMode, flags: &[&str]) -> Result<()> {
        self.agent.kill()?;
        let flags: Vec<_> = mode.flags().iter().chain(flags).copied().collect();
        *self.agent.process() = self.agent.start_ready(&flags)?;
        self.mode = mode.name()?;
        Ok(())
    }

    fn ensure_served(&self, device: &str) -> Result<[u32; 2]> {
        ensure_served(self.node(), device, self.mode)
    }

    fn devices(&self) -> Result<BTreeMap<String, DeviceStatus>> {
        let devices = self.agent.status()?.devices.into_iter();
        Ok(devices.map(|device| (device.name.clone(), device)).collect())
    }

    /// Returns the problems without the one that every test bed has: not all processes are below the cgroup.
    fn problems(&self) -> Result<Vec<Problem>> {
        let mut problems = self.agent.status()?.problems;
        problems.retain(|problem| !problem.place.starts_with("cgroup "));
        Ok(problems)
    }

    /// Waits until `status` and the kernel agree that the programs are attached to a device.
    fn eventually_served(&self, device: &str) -> Result<[u32; 2]> {
        eventually(device, || {
            let ids = self.ensure_served(device)?;
            let devices = self.devices()?;
            let row = devices.get(device).with_context(|| format!("{devices:?}"))?;
            ensure!(row.attached.as_deref() == Some(self.mode), "{row:?}");
            Ok(ids)
        })
    }

    /// Waits until `status` and the kernel agree that no program is attached to a device.
    fn eventually_nothing_attached(&self, device: &str) -> Result<()> {
        eventually(device, || {
            ensure_nothing_attached(self.node(), device)?;
            let devices = self.devices()?;
            let row = devices.get(device).with_context(|| format!("{devices:?}"))?;
            ensure!(row.attached.is_none(), "{row:?}");
            Ok(())
        })
    }

    /// Waits until no program is attached to a device that `status` does not list, such as loopback.
    fn eventually_nothing_attached_in_kernel(&self, device: &str) -> Result<()> {
        eventually(device, || ensure_nothing_attached(self.node(), device))
    }

    /// Kills the agent.
    fn without_agent(mut self) -> Result<Self> {
        self.agent.kill()?;
        Ok(self)
    }

    /// Returns the interface indexes in the names of pinned links, one per link.
    fn pins(&self) -> Result<Vec<u32>> {
        let links = self.agent.pin_path().join(format!("v{VERSION}/links"));
        let mut indexes = Vec::new();
        for entry in fs::read_dir(links)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if let Some((_, index)) = name.split_once("gress-") {
                indexes.push(index.parse().with_context(|| name.clone())?);
            }
        }
        indexes.sort_unstable();
        Ok(indexes)
    }

    /// Fails unless links are pinned for exactly these devices. With clsact there are no links, so none may be pinned.
    fn ensure_pins(&self, devices: &[&str]) -> Result<()> {
        let indexes = devices.iter().map(|device| index(self.node(), device));
        let mut indexes: Vec<u32> = indexes.collect::<Result<_>>()?;
        indexes.sort_unstable();
        let expected: Vec<u32> = match self.mode {
            "tcx" => indexes.iter().flat_map(|index| [*index; 2]).collect(),
            _ => Vec::new(),
        };
        let pins = self.pins()?;
        ensure!(pins == expected, "{pins:?}, not {expected:?}");
        Ok(())
    }
}

const SERVED: [&str; 3] = ["cni0", "eth0", "flannel.1"];

/// Devices without programs: loopback, and the pod's port of the bridge.
const UNSERVED: [&str; 2] = ["lo", "veth2"];

/// Returns the kinds of the qdiscs of a device.
fn qdiscs(node: &Node, device: &str) -> Result<BTreeSet<String>> {
    let text = node.run("tc", &["-j", "qdisc", "show", "dev", device])?;
    let list: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let kinds = list.as_array().context("not a list")?.iter();
    Ok(kinds
        .filter_map(|qdisc| qdisc["kind"].as_str().map(str::to_owned))
        .collect())
}

#[test]
fn programs_are_attached_to_the_default_devices() -> Result<()> {
    for mode in AttachMode::BOTH {
        let setup = Setup::new(mode, &[])?;
        let node = setup.node();
        for device in SERVED {
            setup.ensure_served(device)?;
        }
        for device in UNSERVED {
            ensure_nothing_attached(node, device)?;
        }
        setup.ensure_pins(&SERVED)?;
        // The source address for packets that leave by a device is the device's own address, or else the node's.
        let text = |ip: Option<IpAddr>| ip.map_or_else(|| "-".to_owned(), |ip| ip.to_string());
        let rows = setup.devices()?;
        let rows = rows.values().map(|row| {
            let mode = row.attached.as_deref().unwrap_or("-");
            format!("{} {mode} {} {}", row.name, text(row.source_v4), text(row.source_v6))
        });
        let own = [
            ("cni0", setup.mode, "10.10.1.1", "fd00:10:10:1::1"),
            ("eth0", setup.mode, "192.168.77.1", "fd00:192:168:77::1"),
        ];
        let mut expected: Vec<_> = own
            .iter()
            .map(|(name, mode, v4, v6)| format!("{name} {mode} {v4} {v6}"))
            .collect();
        let egress_source = "fd00:192:168:77::1";
        expected.push(format!("flannel.1 {} 10.10.1.0 {egress_source}", setup.mode));
        expected.push(format!("veth2 - 192.168.77.1 {egress_source}"));
        assert_eq!(rows.collect::<Vec<_>>(), expected);
        assert_eq!(setup.problems()?, []);
    }
    Ok(())
}

#[test]
fn attachments_follow_device_changes() -> Result<()> {
    for mode in AttachMode::BOTH {
        let setup = Setup::new(mode, &[])?;
        let node = setup.node();
        let eth0 = setup.ensure_served("eth0")?;

        // A veth pair outside any bridge, as CNI plugins without a bridge create it for pods.
        node.ip("link add cali0 type veth peer name other0")?;
        let ids = setup.eventually_served("cali0")?;
        ensure!(ids == eth0, "{ids:?} are not the programs of eth0, {eth0:?}");
        setup.eventually_served("other0")?;
        // The device is set up, and its peer gets another name.
        node.ip("link set cali0 up")?;
        node.ip("link set other0 name other-one")?;
        eventually("the renamed device is listed", || {
            let devices = setup.devices()?;
            ensure!(!devices.contains_key("other0"), "{devices:?}");
            setup.ensure_served("other-one").map(drop)
        })?;
        // A device that becomes a port of a bridge is served by the bridge until it leaves the bridge.
        node.ip("link set cali0 master cni0")?;
        setup.eventually_nothing_attached("cali0")?;
        setup.ensure_served("cni0")?;
        node.ip("link set cali0 nomaster")?;
        setup.eventually_served("cali0")?;
        setup.ensure_pins(&["cali0", "cni0", "eth0", "flannel.1", "other-one"])?;

        // Addresses are added later.
        let source = |device: &str| -> Result<String> {
            let devices = setup.devices()?;
            let row = devices.get(device).context("no such device")?;
            Ok(format!("{:?} {:?}", row.source_v4, row.source_v6))
        };
        let before = source("cali0")?;
        node.add_address("203.0.113.7/24", "cali0")?;
        node.add_address("2001:db8:7::7/64", "cali0")?;
        eventually("the new addresses are listed", || {
            let now = source("cali0")?;
            ensure!(now == "Some(203.0.113.7) Some(2001:db8:7::7)", "{now}");
            Ok(())
        })?;
        node.remove_address("203.0.113.7/24", "cali0")?;
        node.remove_address("2001:db8:7::7/64", "cali0")?;
        eventually("the removed addresses are gone", || {
            let now = source("cali0")?;
            ensure!(now == before, "{now}, not {before}");
            Ok(())
        })?;

        // CNI plugins create the pod's end of a pair on the node and move it. A device in a pod's namespace is not the
        // agent's.
        let client = setup.cluster.client();
        node.ip(&format!("link set other-one netns {}", client.netns_name()))?;
        eventually("the moved device has no programs", || {
            ensure_nothing_attached(client, "other-one")?;
            setup.ensure_pins(&["cali0", "cni0", "eth0", "flannel.1"])
        })?;
        setup.ensure_served("cali0")?;

        // Another device gets the index of a deleted one at once.
        let number = index(node, "cali0")?;
        node.ip_batch(&[
            "link delete cali0".to_owned(),
            format!("link add again0 index {number} type veth peer name other-two"),
        ])?;
        setup.eventually_served("again0")?;
        setup.eventually_served("other-two")?;
        setup.ensure_pins(&["again0", "cni0", "eth0", "flannel.1", "other-two"])?;
        // Another device gets the name of a deleted one.
        node.ip("link delete again0")?;
        node.ip("link add again0 type veth peer name other-two")?;
        setup.eventually_served("again0")?;
        node.ip("link delete again0")?;
        eventually("the deleted device is not listed", || {
            let devices = setup.devices()?;
            ensure!(!devices.contains_key("again0"), "{devices:?}");
            setup.ensure_pins(&SERVED)
        })?;
        let now = setup.ensure_served("eth0")?;
        ensure!(now == eth0, "the programs of eth0 changed from {eth0:?} to {now:?}");
        assert_eq!(setup.problems()?, []);
    }
    Ok(())
}

#[test]
fn tun_device_gets_layer_3_programs() -> Result<()> {
    for mode in AttachMode::BOTH {
        let setup = Setup::new(mode, &[])?;
        let node = setup.node();
        node.ip("tuntap add dev tun0 mode tun")?;
        eventually("tun0", || {
            let attached_programs = attached_programs(node, "tun0")?;
            let [ingress, egress] = attached_programs.each_ref().map(names);
            let mode = setup.mode;
            ensure!(ingress == [format!("{mode} lb_ingress_l3")], "{ingress:?}");
            ensure!(egress == [format!("{mode} lb_egress_l3")], "{egress:?}");
            Ok(())
        })?;
        node.ip("tuntap del dev tun0 mode tun")?;
    }
    Ok(())
}

#[test]
fn devices_flag_patterns_select_devices() -> Result<()> {
    for mode in AttachMode::BOTH {
        let mut setup = Setup::new(mode, &["--devices", "eth?,fla*"])?;
        setup.ensure_served("eth0")?;
        setup.ensure_served("flannel.1")?;
        ensure_nothing_attached(setup.node(), "cni0")?;
        setup.ensure_pins(&["eth0", "flannel.1"])?;
        setup.node().ip("link add eth7 type veth peer name cali7")?;
        setup.eventually_served("eth7")?;
        ensure_nothing_attached(setup.node(), "cali7")?;
        // The device gets a name that no pattern matches.
        setup.node().ip("link set eth7 name cali8")?;
        setup.eventually_nothing_attached("cali8")?;
        // Only a named port of a bridge and loopback: the attachments of the previous run are removed.
        setup.restart(mode, &["--devices", "veth2,lo"])?;
        setup.ensure_served("veth2")?;
        for device in ["lo", "eth0", "flannel.1", "cni0", "cali7", "cali8"] {
            setup.eventually_nothing_attached_in_kernel(device)?;
        }
        setup.ensure_pins(&["veth2"])?;
    }
    Ok(())
}

#[test]
fn restart_keeps_links_and_replaces_programs() -> Result<()> {
    for mode in AttachMode::BOTH {
        let mut setup = Setup::new(mode, &[])?;
        let before = setup.ensure_served("eth0")?;
        let links = |setup: &Setup| -> Result<BTreeSet<u32>> {
            let mut programs = BTreeSet::new();
            for device in SERVED {
                programs.extend(setup.ensure_served(device)?);
            }
            let mut ids = BTreeSet::new();
            for link in loaded_links() {
                // A link may disappear while links are listed.
                ids.extend(
                    link.ok()
                        .filter(|link| programs.contains(&link.program_id()))
                        .map(|link| link.id()),
                );
            }
            ensure!(ids.len() == if setup.mode == "tcx" { 6 } else { 0 }, "{ids:?}");
            Ok(ids)
        };
        let before_links = links(&setup)?;
        // After a kill the programs stay attached. A device created meanwhile gets none.
        setup.agent.kill()?;
        let kept = setup.ensure_served("eth0")?;
        ensure!(kept == before, "{kept:?}");
        setup.node().ip("link add late0 type veth peer name late1")?;
        setup.node().ip("link delete flannel.1")?;
        ensure_nothing_attached(setup.node(), "late0")?;
        // A start loads its own programs, as another build would.
        setup.restart(mode, &[])?;
        let after = setup.eventually_served("eth0")?;
        ensure!(
            after.iter().all(|id| !before.contains(id)),
            "{after:?} contains programs of the previous run"
        );
        setup.ensure_served("late0")?;
        setup.ensure_pins(&["cni0", "eth0", "late0", "late1"])?;
        let now: BTreeSet<u32> = loaded_links()
            .filter_map(|link| link.ok().map(|link| link.id()))
            .collect();
        let gone = before_links.difference(&now).count();
        let expected = if setup.mode == "tcx" { 2 } else { 0 };
        ensure!(
            gone == expected,
            "{gone} links are gone, not the {expected} of flannel.1"
        );
    }
    Ok(())
}

#[test]
fn switching_between_tcx_and_clsact_reattaches() -> Result<()> {
    let mut setup = Setup::new(AttachMode::Native, &[])?;
    for mode in [AttachMode::Clsact, AttachMode::Native] {
        setup.restart(mode, &[])?;
        for device in SERVED {
            setup.eventually_served(device)?;
        }
        setup.ensure_pins(&SERVED)?;
    }
    if setup.mode == "tcx" {
        for device in SERVED {
            let qdiscs = qdiscs(setup.node(), device)?;
            ensure!(!qdiscs.contains("clsact"), "{device}: {qdiscs:?}");
        }
    }
    Ok(())
}

/// Sends datagrams to the node from outside.
fn send_datagrams(setup: &Setup) -> Result<()> {
    let to = SocketAddr::new(setup.node().address().into(), 9);
    let socket = setup.cluster.client().within(|| UdpSocket::bind("0.0.0.0:0"))??;
    for _ in 0..DATAGRAMS {
        match socket.send_to(b"probe", to) {
            // The kernel reports the ICMP error for one datagram at the next send.
            Err(error) if error.kind() != std::io::ErrorKind::ConnectionRefused => return Err(error.into()),
            _ => {}
        }
    }
    Ok(())
}

const DATAGRAMS: u64 = 20;

/// Fails unless a counter sees each packet that is sent to eth0 exactly once.
fn ensure_counting(setup: &Setup, counter: &Counter) -> Result<()> {
    let before = counter.count()?;
    send_datagrams(setup)?;
    eventually("every packet is counted once", || {
        let counted = counter.count()? - before;
        // Neighbor discovery adds a few packets.
        ensure!((DATAGRAMS..2 * DATAGRAMS).contains(&counted), "{counted} packets");
        Ok(())
    })
}

#[test]
fn foreign_tc_programs_keep_running() -> Result<()> {
    for mode in AttachMode::BOTH {
        // With filters, one program has the same priority as lb's and another has a different one.
        let priorities: &[Option<u16>] = match mode.name()? {
            "tcx" => &[None, Some(1)],
            _ => &[Some(1), Some(100)],
        };
        for priority in priorities {
            let mut existing = Counter::load()?;
            let setup = Setup::with(mode, &[], |node| {
                node.within(|| {
                    if priority.is_some() {
                        qdisc_add_clsact("eth0")?;
                    }
                    existing.attach("eth0", *priority)
                })?
            })?;
            let counter_program = if priority.is_some() {
                "clsact lb_count"
            } else {
                "tcx lb_count"
            };
            let seen = || -> Result<Vec<String>> {
                let [ingress, _] = attached_programs(setup.node(), "eth0")?;
                Ok(ingress.into_keys().collect())
            };
            let both = || {
                let mut both = [counter_program.to_owned(), format!("{} lb_ingress", setup.mode)];
                both.sort();
                both
            };
            ensure!(seen()? == both(), "{:?}", seen()?);
            ensure_counting(&setup, &existing)?;
            // Another program is attached after lb's.
            setup.node().ip("link add late0 type veth peer name late1")?;
            setup.eventually_served("late0")?;
            let mut late = Counter::load()?;
            setup.node().within(|| {
                if priority.is_some() && setup.mode == "tcx" {
                    qdisc_add_clsact("late0")?;
                }
                late.attach("late0", priority.map(|_| 50))
            })??;
            let setup = setup.without_agent()?;
            ensure_counting(&setup, &existing)?;
            setup.agent.output(&["cleanup"])?;
            let left = attached_programs(setup.node(), "eth0")?;
            assert_eq!([names(&left[0]), names(&left[1])], [vec![counter_program], vec![]]);
            let left = attached_programs(setup.node(), "late0")?;
            ensure!(left[0].len() == 1 && left[1].is_empty(), "{left:?}");
            ensure_counting(&setup, &existing)?;
        }
    }
    Ok(())
}

/// Returns the names of the programs at the ingress of a device, in the order in which they see a packet.
fn order(node: &Node, device: &str, mode: &str) -> Result<Vec<String>> {
    if mode == "tcx" {
        let (_, programs) = node.within(|| SchedClassifier::query_tcx(device, TcAttachType::Ingress))??;
        let names = programs.iter().filter_map(|program| program.name_as_str());
        return Ok(names.map(str::to_owned).collect());
    }
    let text = node.run("tc", &["-j", "filter", "show", "dev", device, "ingress"])?;
    let filters: Value = serde_json::from_str(&text).with_context(|| text.clone())?;
    let names = filters.as_array().context("not a list")?.iter();
    let names = names.filter_map(|filter| filter["options"]["prog"]["name"].as_str());
    Ok(names.map(str::to_owned).collect())
}

#[test]
fn lb_ingress_runs_before_existing_programs() -> Result<()> {
    for mode in AttachMode::BOTH {
        let priority = (mode.name()? == "clsact").then_some(1);
        let mut existing = Counter::load()?;
        let setup = Setup::with(mode, &[], |node| {
            node.within(|| {
                if priority.is_some() {
                    qdisc_add_clsact("eth0")?;
                }
                existing.attach("eth0", priority)
            })?
        })?;
        let order = order(setup.node(), "eth0", setup.mode)?;
        assert_eq!(order, ["lb_ingress", "lb_count"], "{}", setup.mode);
    }
    Ok(())
}

#[test]
fn cleanup_removes_programs_qdiscs_and_reserved_ports() -> Result<()> {
    for mode in AttachMode::BOTH {
        let qdiscs_of = |node: &Node| -> Result<Vec<_>> { SERVED.iter().map(|device| qdiscs(node, device)).collect() };
        let mut before = Vec::new();
        let setup = Setup::with(mode, &[], |node| {
            node.sysctl("net.ipv4.ip_local_reserved_ports", "8080,9148")?;
            // A qdisc that lb did not add stays, even if it is empty.
            node.within(|| qdisc_add_clsact("cni0"))??;
            before = qdiscs_of(node)?;
            Ok(())
        })?;
        let reserved = |setup: &Setup| -> Result<String> {
            let read = || fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports");
            Ok(setup.node().within(read)??.trim().to_owned())
        };
        assert_eq!(reserved(&setup)?, "8080,9148,61000-65535");
        let setup = setup.without_agent()?;
        setup.agent.output(&["cleanup"])?;
        for device in SERVED {
            ensure_nothing_attached(setup.node(), device)?;
        }
        assert_eq!(qdiscs_of(setup.node())?, before);
        assert_eq!(reserved(&setup)?, "8080,9148");
        ensure!(!setup.agent.pin_path().exists());
    }
    Ok(())
}

#[test]
fn deleted_clsact_qdisc_is_restored() -> Result<()> {
    let mut setup = Setup::new(AttachMode::Clsact, &[])?;
    // Stopped, so that the agent cannot restore the qdisc before the next command shows that it is gone.
    setup.agent.process().signal(Signal::SIGSTOP)?;
    setup.node().run("tc", &["qdisc", "delete", "dev", "eth0", "clsact"])?;
    ensure_nothing_attached(setup.node(), "eth0")?;
    setup.agent.process().signal(Signal::SIGCONT)?;
    setup.eventually_served("eth0")?;
    // A qdisc that excludes clsact is a problem of this device until it is deleted.
    setup.node().run("tc", &["qdisc", "delete", "dev", "cni0", "clsact"])?;
    setup.node().run("tc", &["qdisc", "add", "dev", "cni0", "ingress"])?;
    eventually("the problem is reported", || {
        let problems = setup.problems()?;
        ensure!(problems.iter().any(|problem| problem.place == "cni0"), "{problems:?}");
        Ok(())
    })?;
    setup.ensure_served("eth0")?;
    setup.node().run("tc", &["qdisc", "delete", "dev", "cni0", "ingress"])?;
    setup.eventually_served("cni0")?;
    eventually("the problem is cleared", || {
        let problems = setup.problems()?;
        ensure!(problems.is_empty(), "{problems:?}");
        Ok(())
    })
}

#[test]
fn snat_ports_are_reserved_by_sysctl() -> Result<()> {
    let mut setup = Setup::new(AttachMode::Native, &["--snat-ports", "50000-50999"])?;
    let node = setup.cluster.node("n1");
    let expect = |expected: &str| -> Result<()> {
        let read = || fs::read_to_string("/proc/sys/net/ipv4/ip_local_reserved_ports");
        let text = node.within(read)??;
        ensure!(text.trim() == expected, "{text}, not {expected}");
        Ok(())
    };
    expect("50000-50999")?;
    // Another range replaces the first, which lb itself had reserved.
    setup.agent.kill()?;
    *setup.agent.process() = setup.agent.start_ready(&["--snat-ports", "61000-65535"])?;
    expect("61000-65535")?;
    // An administrator overwrites the setting without lb's range.
    node.sysctl("net.ipv4.ip_local_reserved_ports", "8080")?;
    eventually("8080", || expect("8080,61000-65535"))?;
    // Ports that were reserved before lb started stay reserved after cleanup.
    setup.agent.kill()?;
    setup.agent.output(&["cleanup"])?;
    expect("8080")?;
    node.sysctl("net.ipv4.ip_local_reserved_ports", "60000-65535")?;
    *setup.agent.process() = setup.agent.start_ready(&[])?;
    expect("60000-65535")?;
    setup.agent.kill()?;
    setup.agent.output(&["cleanup"])?;
    expect("60000-65535")
}
