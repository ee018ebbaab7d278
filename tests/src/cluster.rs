//! Clusters of nodes, pods and outside clients, laid out as flannel does it.
//!
//! Addresses depend on numbers only, so tests contain them. IPv6 addresses have the numbers in hexadecimal:
//!
//! | interface | IPv4 | IPv6 |
//! |---|---|---|
//! | `eth0` of the node `nN` | 192.168.77.N | fd00:192:168:77::N |
//! | its `cni0`, the gateway of its pods | 10.10.N.1/24 | fd00:10:10:N::1/64 |
//! | its `flannel.1`, with [`Underlay::Vxlan`] | 10.10.N.0 | none |
//! | `eth0` of its pods, the lowest free P from 2 to 254 | 10.10.N.P | fd00:10:10:N::P |
//! | `eth0` of the outside client `clientK` | 172.30.99.(K + 1) | fd00:172:30:99::(K + 1) |
//!
//! A bridge in a namespace of its own joins the machines. Packets between pods of different nodes take VXLAN or a route.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use crate::cleanup::{self, NETNS_DIRECTORY};
use crate::{BPFFS, Netns, Process, cgroup2_root, ensure_bpffs, require_root};

/// How packets for pods are carried between nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Underlay {
    /// flannel's `vxlan` backend: device `flannel.1`, MTU 1450.
    #[default]
    Vxlan,
    /// flannel's `host-gw` backend: a route per node, MTU 1500.
    Routes,
}

impl Underlay {
    /// Returns the MTU of `cni0` and of the pods.
    fn mtu(self) -> u16 {
        match self {
            Self::Vxlan => 1450,
            Self::Routes => 1500,
        }
    }
}

/// Builds a [`Cluster`].
#[derive(Debug, Clone)]
pub struct ClusterBuilder {
    nodes: u8,
    underlay: Underlay,
    clients: u8,
}

impl ClusterBuilder {
    /// Sets the number of nodes, 1 to 99; the default is 2. The nodes are named `n1`, `n2` and so on.
    #[must_use]
    pub fn nodes(mut self, nodes: u8) -> Self {
        self.nodes = nodes;
        self
    }

    /// Sets how nodes are joined; the default is VXLAN.
    #[must_use]
    pub fn underlay(mut self, underlay: Underlay) -> Self {
        self.underlay = underlay;
        self
    }

    /// Sets whether there is an outside client.
    #[must_use]
    pub fn client(self, client: bool) -> Self {
        self.clients(client.into())
    }

    /// Sets the number of outside clients, up to 99. They are named `client1`, `client2` and so on.
    #[must_use]
    pub fn clients(mut self, clients: u8) -> Self {
        self.clients = clients;
        self
    }

    /// Builds the cluster. After a failure, the parts that were created are removed.
    ///
    /// # Errors
    /// If this process is not root, iproute2 is missing, or the kernel refuses an operation.
    pub fn build(self) -> Result<Cluster> {
        require_root()?;
        ensure!((1..=99).contains(&self.nodes), "a cluster has 1 to 99 nodes");
        ensure!(self.clients <= 99, "a cluster has at most 99 clients");
        ensure_bpffs()?;
        let prefix = cleanup::new_prefix()?;
        let cgroups = cgroup2_root()?;
        let scratch = tempfile::Builder::new()
            .prefix(&prefix)
            .tempdir()
            .context("creating a scratch directory")?;
        let nodes = (1..=self.nodes)
            .map(|number| Node::new(number, &prefix, &cgroups))
            .collect();
        let clients = (1..=self.clients)
            .map(|number| Client::new(number, &prefix, &cgroups))
            .collect();
        // From here on, dropping the cluster removes everything.
        let cluster = Cluster {
            fabric: Netns::new("fab", &format!("{prefix}fab"), None),
            prefix,
            underlay: self.underlay,
            nodes,
            clients,
            scratch,
        };
        cluster.set_up().context("building a cluster")?;
        Ok(cluster)
    }
}

/// A cluster of network namespaces and cgroups on this machine. Dropping it kills its processes and removes everything.
#[derive(Debug)]
pub struct Cluster {
    prefix: String,
    underlay: Underlay,
    fabric: Netns,
    nodes: Vec<Node>,
    clients: Vec<Client>,
    scratch: TempDir,
}

impl Cluster {
    /// Returns a builder with the defaults: two nodes joined by VXLAN, and no outside client.
    #[must_use]
    pub fn builder() -> ClusterBuilder {
        ClusterBuilder {
            nodes: 2,
            underlay: Underlay::default(),
            clients: 0,
        }
    }

    /// The prefix of all names of this cluster, including the dash.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// All nodes, in order.
    #[must_use]
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Returns a node by its name.
    ///
    /// # Panics
    /// If there is no such node.
    #[must_use]
    pub fn node(&self, name: &str) -> &Node {
        self.nodes
            .iter()
            .find(|node| node.name() == name)
            .unwrap_or_else(|| panic!("no node {name}"))
    }

    /// The first outside client.
    ///
    /// # Panics
    /// If the cluster was built without a client.
    #[must_use]
    pub fn client(&self) -> &Client {
        self.clients.first().expect("the cluster was built without a client")
    }

    /// All outside clients.
    #[must_use]
    pub fn clients(&self) -> &[Client] {
        &self.clients
    }

    /// The pin path of a node's agent. The agent creates the directory, and the cluster removes it.
    #[must_use]
    pub fn pin_path(&self, node: &str) -> PathBuf {
        Path::new(BPFFS).join(format!("{}{node}", self.prefix))
    }

    /// A directory for files, removed with the cluster.
    #[must_use]
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// Creates a pod on a node: a namespace with `eth0` on the node's bridge and a cgroup, without a process. The pod gets
    /// the lowest free address.
    ///
    /// # Errors
    /// If the node has no address left, or has a pod of this name.
    pub fn add_pod(&self, node: &str, name: &str) -> Result<Pod> {
        self.make_pod(node, name, None)
    }

    /// Creates a pod like [`Self::add_pod`], with a given address of the node's range.
    ///
    /// # Errors
    /// If the address is in use or not in the node's range.
    pub fn add_pod_at(&self, node: &str, name: &str, address: Ipv4Addr) -> Result<Pod> {
        self.make_pod(node, name, Some(address))
    }

    /// Removes a pod: kills its processes, removes its namespace and cgroup, and frees its address.
    ///
    /// # Errors
    /// If a part of the pod cannot be removed.
    pub fn remove_pod(&self, pod: &Pod) -> Result<()> {
        let node = self.node(&pod.node);
        let cgroup = pod.process_cgroup().context("a pod has a cgroup")?;
        cleanup::kill_processes(cgroup)?;
        // Removing the namespace would remove the veth pair too, but only later, in the background.
        node.ip(&format!("link delete {}", pod.host_device()))?;
        cleanup::remove_netns(&Path::new(NETNS_DIRECTORY).join(pod.netns_name()))?;
        cleanup::remove_cgroup(cgroup)?;
        node.used_octets().remove(&pod.address.octets()[3]);
        Ok(())
    }

    fn make_pod(&self, node: &str, name: &str, address: Option<Ipv4Addr>) -> Result<Pod> {
        let node = self.node(node);
        let address = node.take_address(address)?;
        let netns = format!("{}{}-{name}", self.prefix, node.name());
        let cgroup = node.cgroup.join("pods").join(name);
        let pod = Pod {
            netns: Netns::new(name, &netns, Some(cgroup)),
            node: node.name().to_owned(),
            address,
        };
        self.connect_pod(node, &pod)
            .with_context(|| format!("starting pod {name}"))?;
        Ok(pod)
    }

    fn connect_pod(&self, node: &Node, pod: &Pod) -> Result<()> {
        create_netns(pod)?;
        let mtu = self.underlay.mtu();
        let device = pod.host_device();
        node.ip_batch(&[
            format!(
                "link add {device} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {}",
                pod.netns_name()
            ),
            format!("link set {device} master cni0 up"),
            // A pod may connect to itself through its own Service; flannel's CNI configuration sets hairpinMode.
            format!("link set {device} type bridge_slave hairpin on"),
        ])?;
        pod.ip_batch(&[
            "link set lo up".to_owned(),
            format!("address add {}/24 dev eth0", pod.address),
            format!("address add {}/64 dev eth0 nodad", pod.address6()),
            "link set eth0 up".to_owned(),
            format!("route add default via {}", node.gateway()),
            format!("route add ::/0 via {}", node.gateway6()),
        ])?;
        pod.wait_for_link("eth0")?;
        node.wait_for_link(&device)?;
        node.wait_for_link("cni0")
    }

    /// Creates everything except pods.
    fn set_up(&self) -> Result<()> {
        create_netns(&self.fabric)?;
        for node in &self.nodes {
            create_netns(node)?;
            create_cgroup(&node.cgroup.join("pods"))?;
        }
        for client in &self.clients {
            create_netns(client)?;
        }
        self.create_fabric()?;
        for node in &self.nodes {
            self.configure_node(node)
                .with_context(|| format!("configuring {}", node.name()))?;
        }
        for client in &self.clients {
            client.ip_batch(&[
                "link set lo up".to_owned(),
                format!("address add {}/24 dev eth0", client.address),
                format!("address add {}/64 dev eth0 nodad", client.address6()),
                "link set eth0 up".to_owned(),
                "route add 192.168.77.0/24 dev eth0".to_owned(),
                "route add fd00:192:168:77::/64 dev eth0".to_owned(),
            ])?;
        }
        let nodes = self.nodes.iter().map(|node| &node.netns);
        for netns in nodes.chain(self.clients.iter().map(|client| &client.netns)) {
            netns.wait_for_link("eth0")?;
            self.fabric.wait_for_link(netns.name())?;
        }
        self.fabric.wait_for_link("br0")
    }

    /// Creates the network between the machines: a bridge in its own namespace that joins all nodes and clients.
    fn create_fabric(&self) -> Result<()> {
        let mut commands = vec!["link set lo up".to_owned(), "link add br0 type bridge".to_owned()];
        let namespaces = self
            .nodes
            .iter()
            .map(|node| &node.netns)
            .chain(self.clients.iter().map(|client| &client.netns));
        for netns in namespaces {
            let name = netns.name();
            commands.push(format!(
                "link add {name} type veth peer name eth0 netns {}",
                netns.netns_name()
            ));
            commands.push(format!("link set {name} master br0 up"));
        }
        commands.push("link set br0 up".to_owned());
        self.fabric.ip_batch(&commands)
    }

    fn configure_node(&self, node: &Node) -> Result<()> {
        node.sysctl("net.ipv4.ip_forward", "1")?;
        node.sysctl("net.ipv6.conf.all.forwarding", "1")?;
        // systemd sets this value on most distributions.
        node.sysctl("net.ipv4.conf.all.rp_filter", "2")?;
        node.sysctl("net.ipv4.conf.default.rp_filter", "2")?;
        let mtu = self.underlay.mtu();
        let mut commands = vec![
            "link set lo up".to_owned(),
            format!("address add {}/24 dev eth0", node.address),
            "link set eth0 up".to_owned(),
            "route add 172.30.99.0/24 dev eth0".to_owned(),
            format!("address add {}/64 dev eth0 nodad", node.address6()),
            "route add fd00:172:30:99::/64 dev eth0".to_owned(),
            // Without a fixed hardware address the bridge takes the lowest one of its ports, and the neighbor entries of
            // the pods become stale.
            format!(
                "link add cni0 address {} mtu {mtu} type bridge",
                node.hardware_address(0xc0)
            ),
            format!("address add {}/24 dev cni0", node.gateway()),
            format!("address add {}/64 dev cni0 nodad", node.gateway6()),
            "link set cni0 up".to_owned(),
        ];
        let others = || self.nodes.iter().filter(|other| other.number != node.number);
        // IPv6 always uses plain routes, independently of the underlay of IPv4.
        for other in others() {
            commands.push(format!(
                "route add {}/64 via {} dev eth0",
                pod_address6(other.number, 0),
                other.address6()
            ));
        }
        match self.underlay {
            Underlay::Vxlan => {
                commands.extend([
                    format!(
                        "link add flannel.1 address {} mtu {mtu} type vxlan id 1 local {} dev eth0 dstport 8472 nolearning",
                        node.hardware_address(0xf1),
                        node.address
                    ),
                    format!("address add {}/32 dev flannel.1", node.pod_network()),
                    "link set flannel.1 up".to_owned(),
                ]);
                for other in others() {
                    let (network, mac) = (other.pod_network(), other.hardware_address(0xf1));
                    commands.push(format!(
                        "neighbour replace {network} lladdr {mac} dev flannel.1 nud permanent"
                    ));
                    commands.push(format!("route add {network}/24 via {network} dev flannel.1 onlink"));
                }
            }
            Underlay::Routes => {
                for other in others() {
                    commands.push(format!(
                        "route add {}/24 via {} dev eth0",
                        other.pod_network(),
                        other.address
                    ));
                }
            }
        }
        node.ip_batch(&commands)?;
        if self.underlay == Underlay::Vxlan {
            let commands: Vec<String> = others()
                .map(|other| {
                    format!(
                        "fdb append {} dev flannel.1 dst {}\n",
                        other.hardware_address(0xf1),
                        other.address
                    )
                })
                .collect();
            node.run_with_input("bridge", &["-batch", "-"], &commands.concat())?;
        }
        Ok(())
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Removal is by name, so that it works for a cluster in any state.
        if let Err(error) = cleanup::remove(|name| name.starts_with(&self.prefix)) {
            eprintln!("test bed: {error:#}");
        }
    }
}

/// A node: `eth0` on the network between nodes, `cni0` for its pods. Derefs to the [`Netns`] of the host's processes.
#[derive(Debug)]
pub struct Node {
    netns: Netns,
    number: u8,
    address: Ipv4Addr,
    cgroup: PathBuf,
    /// Last octets of the pods' addresses.
    used_octets: Mutex<BTreeSet<u8>>,
}

impl Node {
    fn new(number: u8, prefix: &str, cgroups: &Path) -> Self {
        let name = format!("n{number}");
        let full_name = format!("{prefix}{name}");
        let cgroup = cgroups.join(&full_name);
        Self {
            netns: Netns::new(&name, &full_name, Some(cgroup.join("host"))),
            number,
            address: Ipv4Addr::new(192, 168, 77, number),
            cgroup,
            used_octets: Mutex::default(),
        }
    }

    /// The node's address on the network between nodes.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Returns the socket address of a port of [`Self::address`].
    #[must_use]
    pub fn socket(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.address), port)
    }

    /// The node's IPv6 address on the network between nodes.
    #[must_use]
    pub fn address6(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfd00, 0x192, 0x168, 0x77, 0, 0, 0, self.number.into())
    }

    /// The IPv6 address of `cni0`.
    #[must_use]
    pub fn gateway6(&self) -> Ipv6Addr {
        pod_address6(self.number, 1)
    }

    /// The address of `cni0`.
    #[must_use]
    pub fn gateway(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 10, self.number, 1)
    }

    /// The first address of the pods' /24, which is also that of `flannel.1`.
    #[must_use]
    pub fn pod_network(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 10, self.number, 0)
    }

    /// The first address of the pods' /64.
    #[must_use]
    pub fn pod_network6(&self) -> Ipv6Addr {
        pod_address6(self.number, 0)
    }

    /// The cgroup2 directory of the whole node, including pods. The node's agent attaches its programs there.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Returns a locally administered hardware address that no other node has.
    fn hardware_address(&self, kind: u8) -> String {
        format!("02:1b:00:00:{kind:02x}:{:02x}", self.number)
    }

    fn used_octets(&self) -> std::sync::MutexGuard<'_, BTreeSet<u8>> {
        self.used_octets.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_address(&self, wanted: Option<Ipv4Addr>) -> Result<Ipv4Addr> {
        let mut used = self.used_octets();
        let octet = match wanted.map(|address| address.octets()) {
            Some([10, 10, third, octet]) if third == self.number && (2..=254).contains(&octet) => octet,
            Some(_) => anyhow::bail!("{wanted:?} is not a pod address of {}", self.name()),
            None => (2..=254)
                .find(|octet| !used.contains(octet))
                .with_context(|| format!("{} has no address left", self.name()))?,
        };
        ensure!(
            used.insert(octet),
            "another pod of {} has 10.10.{}.{octet}",
            self.name(),
            self.number
        );
        Ok(Ipv4Addr::new(10, 10, self.number, octet))
    }
}

impl Deref for Node {
    type Target = Netns;

    fn deref(&self) -> &Netns {
        &self.netns
    }
}

/// A handle to a pod: a namespace, and a cgroup below the one of its node. Derefs to its [`Netns`]. The pod exists until
/// [`Cluster::remove_pod`] or the end of the cluster.
#[derive(Debug, Clone)]
pub struct Pod {
    netns: Netns,
    node: String,
    address: Ipv4Addr,
}

impl Pod {
    /// The pod's address.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Returns the socket address of a port of [`Self::address`].
    #[must_use]
    pub fn socket(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.address), port)
    }

    /// The pod's IPv6 address.
    #[must_use]
    pub fn address6(&self) -> Ipv6Addr {
        let [_, _, node, octet] = self.address.octets();
        pod_address6(node, octet)
    }

    /// Returns the socket address of a port of [`Self::address6`].
    #[must_use]
    pub fn socket6(&self, port: u16) -> SocketAddr {
        SocketAddr::new(IpAddr::V6(self.address6()), port)
    }

    /// The name of its node.
    #[must_use]
    pub fn node(&self) -> &str {
        &self.node
    }

    /// The node's end of the veth pair.
    fn host_device(&self) -> String {
        format!("veth{}", self.address.octets()[3])
    }
}

impl Deref for Pod {
    type Target = Netns;

    fn deref(&self) -> &Netns {
        &self.netns
    }
}

/// A machine outside the cluster. It reaches only the nodes' addresses, and is not in a node's cgroup. Derefs to its
/// [`Netns`].
#[derive(Debug)]
pub struct Client {
    netns: Netns,
    address: Ipv4Addr,
}

impl Client {
    fn new(number: u8, prefix: &str, cgroups: &Path) -> Self {
        let name = format!("client{number}");
        let full_name = format!("{prefix}{name}");
        let cgroup = cgroups.join(&full_name);
        Self {
            netns: Netns::new(&name, &full_name, Some(cgroup)),
            address: Ipv4Addr::new(172, 30, 99, number + 1),
        }
    }

    /// The client's address.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// The client's IPv6 address.
    #[must_use]
    pub fn address6(&self) -> Ipv6Addr {
        let [.., octet] = self.address.octets();
        Ipv6Addr::new(0xfd00, 0x172, 0x30, 0x99, 0, 0, 0, octet.into())
    }
}

impl Deref for Client {
    type Target = Netns;

    fn deref(&self) -> &Netns {
        &self.netns
    }
}

/// Returns an IPv6 address in the pod network of a node.
fn pod_address6(node: u8, last: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x10, node.into(), 0, 0, 0, last.into())
}

/// Creates a network namespace and its cgroup.
fn create_netns(netns: &Netns) -> Result<()> {
    let mut command = std::process::Command::new("ip");
    command.args(["netns", "add", netns.netns_name()]);
    let status = Process::spawn(&mut command)
        .context("iproute2 is needed")?
        .wait(Duration::from_secs(10))?;
    ensure!(status.success(), "ip netns add {}: {status}", netns.netns_name());
    // New IPv6 addresses must be usable at once. A kernel without IPv6 does not have these sysctls.
    let _ = netns.sysctl("net.ipv6.conf.all.accept_dad", "0");
    let _ = netns.sysctl("net.ipv6.conf.default.accept_dad", "0");
    netns.process_cgroup().map_or(Ok(()), create_cgroup)
}

fn create_cgroup(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("creating cgroup {}", path.display()))
}
