//! Map entries for packets from outside (address marks, source ranges, networks inside the cluster), and expired flows.
//! Only the agent is tested, without traffic.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use lb_agent::loader::PinPath;
use lb_agent::maps::bpf::PinnedMaps;
use lb_agent::maps::ct::{CtMap, CtMaps};
use lb_common::abi::{Addr, CtEntry, CtKey, FrontendKey, FrontendKind, cluster_flags, ct_flags, ct_state, ip_protocol};
use lb_common::logic::ct::reverse_key;
use lb_tests::http::get;
use lb_tests::manifests::{Manifests, Port, service, slice};
use lb_tests::{Agent, Cluster, Node, RunningAgent, eventually};
use nix::time::{ClockId, clock_gettime};
use serde_json::Value;

const BALANCER: &str = "192.0.2.1";
const METRICS: u16 = 10249;

struct Setup {
    agent: RunningAgent,
    manifests: Manifests,
    cluster: Cluster,
}

fn setup(flags: &[&str]) -> Result<Setup> {
    setup_with(flags, Agent::clone)
}

fn setup_with(flags: &[&str], change: impl Fn(&Agent) -> Agent) -> Result<Setup> {
    let cluster = Cluster::builder().nodes(2).build()?;
    let manifests = Manifests::new(&cluster)?;
    manifests.write("web.yaml", &web(&["203.0.113.0/24", "10.1.0.0/16"]))?;
    manifests.write(
        "nodes.yaml",
        &(node("n1", "10.10.1.0/24", "192.168.77.1") + &node("n2", "10.10.2.0/24", "192.168.77.2")),
    )?;
    let program = Agent::find()?;
    let agent = Agent::new(&cluster, cluster.node("n1"), &program, manifests.path());
    let mut agent = RunningAgent::start(change(&agent), flags)?;
    agent.wait_ready(&|| false)?;
    Ok(Setup {
        agent,
        manifests,
        cluster,
    })
}

/// Returns a load-balancer Service with source ranges.
fn web(ranges: &[&str]) -> String {
    let spec = format!(
        "type: LoadBalancer\n  loadBalancerSourceRanges: [{}]",
        ranges.join(", ")
    );
    let text = service("web", "10.96.0.10", &[Port::tcp("web", 80)], &spec);
    let text = text.trim_end_matches("---\n");
    let ingress = format!("status: {{loadBalancer: {{ingress: [{{ip: {BALANCER}}}]}}}}\n---\n");
    text.to_owned() + &ingress + &slice("web", Port::tcp("web", 8080), &[(ip("10.10.1.9"), "n1")])
}

fn node(name: &str, pods: &str, address: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [{pods}]}}\nstatus: {{addresses: [{{type: \
         InternalIP, address: {address}}}]}}\n---\n"
    )
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

impl Setup {
    fn node(&self) -> &Node {
        self.cluster.node("n1")
    }

    fn maps(&self) -> Result<PinnedMaps> {
        Ok(PinnedMaps::open(&PinPath::new(self.agent.pin_path()).maps())?)
    }

    fn flows(&self) -> Result<CtMaps> {
        Ok(CtMaps::open(&PinPath::new(self.agent.pin_path()).maps())?)
    }

    fn mark(&self) -> Result<Option<FrontendKind>> {
        let frontends = self.maps()?.frontends()?;
        let mark = frontends.get(&FrontendKey::address_mark(ip(BALANCER).into()));
        Ok(mark.and_then(|mark| FrontendKind::from_u8(mark.kind)))
    }

    /// Waits until the address is marked, or not marked, and checks that the maps have no other difference.
    fn expect_mark(&self, marked: bool) -> Result<()> {
        eventually("the mark is updated", || {
            let mark = self.mark()?;
            let expected = marked.then_some(FrontendKind::ExternalAddress);
            ensure!(mark == expected, "{mark:?}");
            Ok(())
        })?;
        self.agent.verify()
    }

    /// Returns the source ranges of the load-balancer address.
    fn ranges(&self) -> Result<BTreeSet<String>> {
        let ranges = self.maps()?.source_ranges()?;
        let networks = ranges.keys().map(|range| range.network().context("no network"));
        networks.map(|net| Ok(net?.to_string())).collect()
    }

    /// Returns the flags of the longest prefix of CLUSTER_CIDRS that contains an address, as an LPM trie lookup does.
    fn flags(&self, address: &str) -> Result<u32> {
        let cidrs = self.maps()?.cluster_cidrs()?;
        let around = cidrs.iter().filter(|(cidr, _)| cidr.contains(ip(address).into()));
        Ok(around.max_by_key(|(cidr, _)| cidr.len).map_or(0, |(_, flags)| *flags))
    }

    fn metric(&self, line: &str) -> Result<f64> {
        let at = SocketAddr::from((Ipv4Addr::LOCALHOST, METRICS));
        let body = get(self.node(), at, "/metrics")?.body;
        let value = body.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(' '));
        Ok(value.with_context(|| format!("no {line} in {body}"))?.parse()?)
    }
}

#[test]
fn external_address_is_marked_unless_a_node_has_it() -> Result<()> {
    let setup = setup(&[])?;
    setup.expect_mark(true)?;
    let address = format!("{BALANCER}/32");
    setup.node().add_address(&address, "lo")?;
    setup.expect_mark(false)?;
    setup.node().remove_address(&address, "lo")?;
    setup.expect_mark(true)?;
    let nodes = |of_second: &str| node("n1", "10.10.1.0/24", "192.168.77.1") + &node("n2", "10.10.2.0/24", of_second);
    setup.manifests.write("nodes.yaml", &nodes(BALANCER))?;
    setup.expect_mark(false)?;
    setup.manifests.write("nodes.yaml", &nodes("192.168.77.2"))?;
    setup.expect_mark(true)
}

#[test]
fn source_ranges_follow_the_service_across_a_restart() -> Result<()> {
    let mut setup = setup(&[])?;
    let expect = |setup: &Setup, ranges: &[&str]| {
        let expected: BTreeSet<String> = ranges.iter().map(|&text| text.to_owned()).collect();
        eventually("the ranges are updated", || {
            let found = setup.ranges()?;
            ensure!(found == expected, "{found:?}");
            Ok(())
        })?;
        setup.agent.verify()
    };
    expect(&setup, &["203.0.113.0/24", "10.1.0.0/16"])?;
    setup
        .manifests
        .write("web.yaml", &web(&["203.0.113.0/24", "198.51.100.7/32"]))?;
    expect(&setup, &["203.0.113.0/24", "198.51.100.7/32"])?;
    setup.agent.kill()?;
    setup.manifests.write("web.yaml", &web(&["198.51.100.0/25"]))?;
    setup.agent.start_again()?;
    expect(&setup, &["198.51.100.0/25"])?;
    // An invalid range is reported, and the others stay in force.
    setup
        .manifests
        .write("web.yaml", &web(&["198.51.100.0/25", "nowhere"]))?;
    eventually("the invalid range is reported", || {
        let status = setup.agent.output(&["status"])?;
        ensure!(status.contains("nowhere") && status.contains("default/web"), "{status}");
        Ok(())
    })?;
    expect(&setup, &["198.51.100.0/25"])?;
    fs::remove_file(setup.manifests.path().join("web.yaml"))?;
    expect(&setup, &[])
}

#[test]
fn inside_networks_follow_nodes_and_their_addresses() -> Result<()> {
    const INSIDE: u32 = cluster_flags::INSIDE;
    const POD: u32 = cluster_flags::INSIDE | cluster_flags::HERE;
    let setup = setup(&[])?;
    let own = setup.node().address().to_string();
    let expect = |cases: &[(&str, u32)]| {
        for (address, expected) in cases {
            eventually(address, || {
                let flags = setup.flags(address)?;
                ensure!(flags == *expected, "{flags}");
                Ok(())
            })?;
        }
        setup.agent.verify()
    };
    expect(&[
        ("10.10.1.7", POD),
        ("10.10.2.7", 0),
        (&own, INSIDE),
        ("203.0.113.7", 0),
        ("198.51.100.9", 0),
    ])?;
    setup.node().add_address("198.51.100.9/32", "lo")?;
    expect(&[("198.51.100.9", INSIDE)])?;
    setup.node().remove_address("198.51.100.9/32", "lo")?;
    setup
        .manifests
        .write("nodes.yaml", &node("n1", "10.10.1.0/24", "192.168.77.1"))?;
    expect(&[("198.51.100.9", 0), ("10.10.2.7", 0), ("10.10.1.7", POD)])
}

#[test]
fn cluster_cidr_flag_sets_inside_networks() -> Result<()> {
    let setup = setup_with(&[], |agent| agent.with_cluster_cidr("10.0.0.0/8,2001:db8::/32"))?;
    for (address, flags) in [
        ("10.10.1.7", cluster_flags::INSIDE | cluster_flags::HERE),
        ("10.10.2.7", cluster_flags::INSIDE),
        ("10.99.0.1", cluster_flags::INSIDE),
        ("2001:db8::1", cluster_flags::INSIDE),
        ("203.0.113.7", 0),
    ] {
        assert_eq!(setup.flags(address)?, flags, "{address}");
    }
    setup.agent.verify()?;
    // `verify` needs the flag that the agent has, or it finds a difference.
    let program = Agent::find()?;
    let without_flag = Agent::new(&setup.cluster, setup.node(), &program, setup.manifests.path());
    let drift = without_flag.verify().unwrap_err().to_string();
    assert!(drift.contains("CLUSTER_CIDRS[10.0.0.0/8]"), "{drift}");
    Ok(())
}

fn now() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

/// Returns both entries of the flow of client `n`, last seen `idle` seconds ago: original direction and reply
/// direction.
fn flow(n: u8, proto: u8, idle: u64, state: u8) -> Result<[(CtKey, CtEntry); 2]> {
    let seen = now()?.saturating_sub(idle * 1_000_000_000);
    let addr = |text: &str| Addr::from(ip(text));
    let entry = |[src, dst]: [Addr; 2], [src_port, dst_port]: [u16; 2], flags| CtEntry {
        src,
        dst,
        src_port,
        dst_port,
        seen,
        flags,
        state,
        ..CtEntry::default()
    };
    let (client, frontend) = (Addr::from_v4([203, 0, 113, n]), addr("192.168.77.1"));
    let sent = entry(
        [addr("10.10.1.0"), addr("10.10.2.2")],
        [61_000 + u16::from(n), 8080],
        ct_flags::FORWARD,
    );
    let returned = entry([frontend, client], [30_001, 4000], ct_flags::FORWARD | ct_flags::REPLY);
    Ok([
        (reverse_key(&returned, proto), sent),
        (reverse_key(&sent, proto), returned),
    ])
}

fn put(map: &mut CtMap, flow: &[(CtKey, CtEntry)]) -> Result<()> {
    for (key, entry) in flow {
        map.insert(key, entry)?;
    }
    Ok(())
}

#[test]
fn conntrack_gc_removes_expired_flows_and_list_shows_the_others() -> Result<()> {
    const TCP: u8 = ip_protocol::TCP;
    const UDP: u8 = ip_protocol::UDP;
    let setup = setup(&[])?;
    let mut flows = setup.flows()?;
    let live = flow(1, TCP, 5, ct_state::SYN)?;
    put(&mut flows.established, &live)?;
    let reset = flow(2, TCP, 11, ct_state::RST)?;
    put(&mut flows.established, &reset)?;
    // If the kernel has been up for less than the idle time, these expire later.
    let unanswered = flow(3, UDP, 31, 0)?;
    put(&mut flows.unreplied, &unanswered)?;
    let [alone, _] = flow(4, TCP, 11, ct_state::RST)?;
    put(&mut flows.established, &[alone])?;
    let recent = flow(5, UDP, 0, 0)?;
    put(&mut flows.unreplied, &recent)?;

    eventually("expired flows are removed", || {
        let flows = setup.flows()?;
        for (key, _) in reset.iter().chain([&alone]) {
            ensure!(flows.established.get(key)?.is_none(), "{key:?}");
        }
        for (key, _) in &unanswered {
            ensure!(flows.unreplied.get(key)?.is_none(), "{key:?}");
        }
        Ok(())
    })?;
    assert_eq!(flows.established.all()?.len(), 2);
    for (key, entry) in &live {
        assert_eq!(flows.established.get(key)?.as_ref(), Some(entry));
    }
    eventually("the removals are counted", || {
        for (reason, least) in [("reset", 2.0), ("new", 2.0), ("orphan", 1.0)] {
            let count = setup.metric(&format!("lb_conntrack_gc_removed_total{{reason=\"{reason}\"}}"))?;
            ensure!(count >= least, "{reason}: {count}");
        }
        ensure!(setup.metric("lb_conntrack_gc_entries_total")? >= 7.0);
        ensure!(setup.metric("lb_conntrack_gc_seconds_count")? >= 1.0);
        ensure!(setup.metric("lb_conntrack_entries{map=\"CT\"}")? == 2.0);
        Ok(())
    })?;

    let listed: Value = setup.agent.json(&["conntrack", "list"])?;
    let listed = listed.as_array().context("not a list")?;
    let found = |client: &str| listed.iter().find(|row| row["client"] == client);
    let row = found("203.0.113.1:4000").context("the live flow is not listed")?;
    for (field, expected) in [
        ("frontend", "192.168.77.1:30001"),
        ("backend", "10.10.2.2:8080"),
        ("source", "10.10.1.0:61001"),
        ("state", "established"),
        ("proto", "TCP"),
        ("hook", "ingress"),
    ] {
        assert_eq!(row[field], expected, "{row:#}");
    }
    assert!(found("203.0.113.2:4000").is_none(), "{listed:#?}");
    let text = setup.agent.output(&["conntrack", "list"])?;
    assert!(
        text.contains("203.0.113.1:4000") && text.contains("established"),
        "{text}"
    );
    // The LRU map of unreplied flows may have evicted some, but contains no others.
    let keys: BTreeSet<CtKey> = flows.unreplied.all()?.into_iter().map(|(key, _)| key).collect();
    let own = recent.iter().map(|(key, _)| *key).collect();
    assert!(keys.is_subset(&own), "{keys:?}");
    Ok(())
}

/// The map has more entries than one batch.
#[test]
fn iterating_a_large_conntrack_map_yields_each_entry_once() -> Result<()> {
    let setup = setup(&["--max-conntrack", "200000"])?;
    let mut flows = setup.flows()?;
    let seen = now()?;
    let mut keys = BTreeSet::new();
    for n in 0..40_000_u32 {
        let [a, b, c, d] = n.to_be_bytes();
        let key = CtKey {
            src: Addr::from_v4([100 + a, b, c, d]),
            dst: Addr::from_v4([192, 168, 77, 1]),
            src_port: 4000,
            dst_port: 30_001,
            proto: ip_protocol::TCP,
            pad: [0; 3],
        };
        let entry = CtEntry {
            seen,
            ..CtEntry::default()
        };
        flows.established.insert(&key, &entry)?;
        keys.insert(key);
    }
    let all = flows.established.all()?;
    assert_eq!(all.len(), keys.len());
    assert!(all.into_iter().all(|(key, _)| keys.remove(&key)));
    assert!(keys.is_empty());
    eventually("the collector has counted them", || {
        ensure!(setup.metric("lb_conntrack_entries{map=\"CT\"}")? == 40_000.0);
        Ok(())
    })
}
