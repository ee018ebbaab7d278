//! From kube-proxy to lb and back, as described in docs/migrate-from-kube-proxy.md: its commands are read from the page
//! and run against a real control plane, while connections are made and held.

use std::env;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Service;
use lb_tests::control_plane::{ControlPlane, KubeletPod, Namespace, PodTemplate};
use lb_tests::load::{HeldConnections, HeldSummary, Load};
use lb_tests::runtime::{Image, Pods, Runtime};
use lb_tests::{Agent, Cluster, Connect, Netns, Process, Testbed, scaled_timeout, testbed};
use serde_json::{Value, json};

const PAGE: &str = "docs/migrate-from-kube-proxy.md";
const BACKEND_PORT: u16 = 8080;
const PORT: u16 = 80;
const NODE_PORT: u16 = 30080;
/// Number of connections that each client keeps open.
const HELD: u32 = 20;
/// Minimum number of new connections during the migration, and rate per second of each client.
const NEW: u64 = 10_000;
const RATE: f64 = 250.0;
/// Image names in the manifests.
const KUBE_PROXY: &str = "kube-proxy:test";
const LB: &str = "localhost/lb-agent:0.1.0";

/// A block of commands of the page, and where to run it.
#[derive(Debug, PartialEq, Eq)]
struct Block {
    heading: String,
    on_each_node: bool,
    script: String,
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Returns all blocks of commands below one of the page's main headings.
fn blocks(page: &str, part: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    let (mut inside, mut heading) = (false, String::new());
    let mut open: Option<Block> = None;
    for line in page.lines() {
        if let Some(block) = &mut open {
            if line == "```" {
                blocks.extend(open.take());
            } else {
                block.script.push_str(line);
                block.script.push('\n');
            }
            continue;
        }
        if let Some(title) = line.strip_prefix("## ") {
            inside = title == part;
        } else if let Some(title) = line.strip_prefix("### ") {
            heading = title.to_owned();
        } else if inside && let Some(where_) = line.strip_prefix("```sh") {
            open = Some(Block {
                heading: heading.clone(),
                on_each_node: where_ == " on each node",
                script: String::new(),
            });
        }
    }
    blocks
}

#[test]
fn migration_page_has_commands_for_both_directions() -> Result<()> {
    let page = fs::read_to_string(root().join(PAGE)).context("reading the page")?;
    let headings = |part| {
        blocks(&page, part)
            .into_iter()
            .map(|block| (block.heading, block.on_each_node))
    };
    let there: Vec<_> = headings("To lb").collect();
    let back: Vec<_> = headings("Back to kube-proxy").collect();
    assert_eq!(
        there,
        [
            ("1. lb beside kube-proxy".to_owned(), false),
            ("2. kube-proxy stops".to_owned(), false),
            ("3. lb takes its ports".to_owned(), false),
            ("4. The rules go".to_owned(), false),
            ("4. The rules go".to_owned(), true),
        ]
    );
    assert_eq!(
        back,
        [
            ("1. kube-proxy beside lb".to_owned(), false),
            ("1. kube-proxy beside lb".to_owned(), true),
            ("2. lb goes".to_owned(), false),
        ]
    );
    // Every command of the page is in such a block.
    let fences = page
        .lines()
        .filter(|line| line.starts_with("```") && line.len() > 3)
        .count();
    assert_eq!(fences, there.len() + back.len());
    Ok(())
}

#[test]
fn migrates_from_nftables_kube_proxy_and_back() -> Result<()> {
    migrate_and_back("nftables")
}

#[test]
fn migrates_from_iptables_kube_proxy_and_back() -> Result<()> {
    migrate_and_back("iptables")
}

fn migrate_and_back(mode: &str) -> Result<()> {
    let cluster = Cluster::builder().nodes(2).client(true).build()?;
    let control_plane = ControlPlane::start(&cluster, cluster.client())?;
    let pods = run_pods(&cluster, &control_plane)?;
    let migration = Migration {
        cluster: &cluster,
        control_plane: &control_plane,
        namespace: control_plane.namespace("shop")?,
        testbed: testbed(),
    };
    let done = migration.run(mode);
    done.with_context(|| {
        let logs = pods.log_tails().unwrap_or_else(|error| format!("{error:#}"));
        format!("pods: {}\n{logs}", pods.errors())
    })
}

/// Runs the pods that the manifests create in `kube-system`.
fn run_pods(cluster: &Cluster, control_plane: &ControlPlane) -> Result<Pods> {
    let archive = env::var_os("LB_IMAGE").context("LB_IMAGE is not set: `cargo xtask test --kubernetes` sets it")?;
    let image = Image::from_archive(Path::new(&archive), &cluster.scratch().join("image"))?;
    let kube_proxy = Image::from_host(&control_plane.program("kube-proxy"))?;
    let mut runtimes = Vec::new();
    for node in cluster.nodes() {
        // netfilter's output hook sees a node's own packets only after they have a route; nothing leaves by this one.
        node.ip("route add 10.96.0.0/16 dev eth0")?;
        // So that a pod reaches another pod of its node through kube-proxy's rules.
        node.sysctl("net/bridge/bridge-nf-call-iptables", "1")?;
        let mut runtime = Runtime::new(cluster, node)?;
        runtime.add_image(LB, image.clone());
        runtime.add_image(KUBE_PROXY, kube_proxy.clone());
        runtimes.push(runtime);
    }
    let pins: Vec<_> = cluster
        .nodes()
        .iter()
        .map(|node| (node.name().to_owned(), cluster.pin_path(node.name())))
        .collect();
    // Each node of this machine has pins and a cgroup of its own.
    Pods::run(control_plane, "kube-system", runtimes, move |runtime, container| {
        if container["image"] != LB {
            return Vec::new();
        }
        let pins = pins.iter().filter(|(node, _)| node == runtime.netns().name());
        let mut arguments: Vec<_> = pins.map(|(_, path)| format!("--pin-path={}", path.display())).collect();
        if container["args"][0] == "run" {
            arguments.push(format!("--cgroup={}", runtime.cgroup_in_containers().display()));
        }
        arguments
    })
}

struct Migration<'a> {
    cluster: &'a Cluster,
    control_plane: &'a ControlPlane,
    namespace: Namespace<'a>,
    testbed: Testbed,
}

impl Migration<'_> {
    fn run(&self, mode: &str) -> Result<()> {
        let page = fs::read_to_string(root().join(PAGE)).context("reading the page")?;
        let tools = self.tools()?;
        for manifest in ["lb.yaml", "lb-privileged.yaml"] {
            let path = root().join("deploy").join(manifest);
            let path = path.to_str().context("a path is not UTF-8")?;
            self.control_plane
                .kubectl(&["apply", "--server-side", "--dry-run=server", "-f", path], "")?;
        }
        self.install_kube_proxy(mode)?;
        let (_servers, service, _kubelets) = self.create_service()?;
        let vip = SocketAddr::new(address(&service)?, PORT);
        let clients = [
            self.cluster.add_pod("n1", "client-a")?,
            self.cluster.add_pod("n2", "client-b")?,
        ];
        let node = self.cluster.node("n1");
        let namespaces: [&Netns; 3] = [&clients[0], &clients[1], node];
        for netns in namespaces {
            self.until_served(netns, vip)?;
        }
        ensure!(
            self.kube_proxy_rules()?,
            "kube-proxy has written no rules, so this test would prove nothing"
        );

        let before = self.hold(&namespaces, vip)?;
        let (loads, begun) = (self.load(&namespaces, vip)?, Instant::now());
        for block in blocks(&page, "To lb") {
            if block.on_each_node {
                // The page says to wait with this block until the old connections have ended.
                break;
            }
            self.run_block(&block, &tools)?;
        }
        ensure!(!self.kube_proxy_rules()?, "rules of kube-proxy are left");
        self.expect_served_by_lb()?;
        let during = self.hold(&namespaces, vip)?;
        sleep(Duration::from_secs(1));
        for held in before {
            expect_all_live(&held.finish()?).context("connections from before lb")?;
        }
        for block in blocks(&page, "To lb").iter().filter(|block| block.on_each_node) {
            self.run_block(block, &tools)?;
        }
        for node in self.cluster.nodes() {
            let rules = node.ruleset()?;
            ensure!(!rules.mentions("kube-proxy") && !rules.mentions("KUBE-SVC"), "{rules}");
        }

        for block in blocks(&page, "Back to kube-proxy") {
            self.run_block(&block, &tools)?;
        }
        ensure!(self.kube_proxy_rules()?, "kube-proxy is not back");
        for node in self.cluster.nodes() {
            ensure!(
                !self.cluster.pin_path(node.name()).join("v2").exists(),
                "lb has left pins"
            );
        }
        for netns in namespaces {
            self.testbed
                .connect(netns, &Connect::to(&[vip]).count(50))?
                .all_well()?;
        }
        // As many as required and some more, since this machine may be slow.
        let long_enough = Duration::from_secs_f64(1.5 * NEW as f64 / RATE / namespaces.len() as f64);
        sleep(long_enough.saturating_sub(begun.elapsed()));
        let mut connections = 0;
        for load in loads {
            let summary = load.stop()?;
            summary.all_well()?;
            connections += summary.connections;
        }
        ensure!(connections >= NEW, "only {connections} connections were tried");
        for held in during {
            expect_all_live(&held.finish()?).context("connections made through lb")?;
        }
        Ok(())
    }

    /// Creates a directory with the programs that the page calls.
    fn tools(&self) -> Result<PathBuf> {
        let folder = self.cluster.scratch().join("bin");
        fs::create_dir(&folder).context("creating a directory")?;
        symlink(self.control_plane.program("kubectl"), folder.join("kubectl")).context("creating a symbolic link")?;
        Ok(folder)
    }

    /// Runs a block of commands on the control plane's machine, or on each node.
    fn run_block(&self, block: &Block, tools: &Path) -> Result<()> {
        let run = |netns: &Netns| -> Result<()> {
            let mut command = netns.command("sh")?;
            let path = env::var("PATH").unwrap_or_default();
            command
                .args(["-e", "-c", &block.script])
                .current_dir(root())
                .env("PATH", format!("{}:{path}", tools.display()))
                .env("KUBECONFIG", self.control_plane.kubeconfig("admin"));
            let output = command.output().context("running a shell")?;
            ensure!(
                output.status.success(),
                "{}: {}\n{}{}",
                block.script,
                output.status,
                String::from_utf8_lossy(&output.stdout),
                String::from_utf8_lossy(&output.stderr)
            );
            Ok(())
        };
        let namespaces: Vec<&Netns> = if block.on_each_node {
            self.cluster.nodes().iter().map(|node| &**node).collect()
        } else {
            vec![self.control_plane.machine()]
        };
        let mut done = namespaces.into_iter().map(run);
        done.try_for_each(|result| result.with_context(|| format!("{:?}", block.heading)))
    }

    /// Creates the objects that kubeadm creates for kube-proxy, in one of its modes.
    fn install_kube_proxy(&self, mode: &str) -> Result<()> {
        let config = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": mode,
            "clientConnection": {"kubeconfig": "/var/lib/kube-proxy/kubeconfig.conf"},
            "clusterCIDR": "10.10.0.0/16,fd00:10:10::/48",
            // These settings are global to the machine, and its network namespaces may not write them.
            "conntrack": {"maxPerCore": 0, "min": 0},
        });
        let account = "/var/run/secrets/kubernetes.io/serviceaccount";
        let kubeconfig = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "default", "cluster": {
                "server": self.control_plane.url(), "certificate-authority": format!("{account}/ca.crt"),
            }}],
            "users": [{"name": "default", "user": {"tokenFile": format!("{account}/token")}}],
            "contexts": [{"name": "default", "context": {"cluster": "default", "user": "default"}}],
            "current-context": "default",
        });
        let labels = json!({"k8s-app": "kube-proxy"});
        let meta = json!({"name": "kube-proxy", "namespace": "kube-system", "labels": labels});
        let variable = json!({"name": "NODE_NAME", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}});
        let container = json!({
            "name": "kube-proxy",
            "image": KUBE_PROXY,
            "command": [
                "/usr/local/bin/kube-proxy",
                "--config=/var/lib/kube-proxy/config.conf",
                "--hostname-override=$(NODE_NAME)",
            ],
            "env": [variable],
            "securityContext": {"privileged": true},
            "volumeMounts": [
                {"name": "kube-proxy", "mountPath": "/var/lib/kube-proxy"},
                {"name": "xtables-lock", "mountPath": "/run/xtables.lock"},
                {"name": "lib-modules", "mountPath": "/lib/modules", "readOnly": true},
            ],
        });
        let pod = json!({
            "priorityClassName": "system-node-critical",
            "serviceAccountName": "kube-proxy",
            "hostNetwork": true,
            "nodeSelector": {"kubernetes.io/os": "linux"},
            "tolerations": [{"operator": "Exists"}],
            "containers": [container],
            "volumes": [
                {"name": "kube-proxy", "configMap": {"name": "kube-proxy"}},
                {"name": "xtables-lock", "hostPath": {"path": "/run/xtables.lock", "type": "FileOrCreate"}},
                {"name": "lib-modules", "hostPath": {"path": "/lib/modules"}},
            ],
        });
        let role =
            json!({"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:node-proxier"});
        let subject = json!({"kind": "ServiceAccount", "name": "kube-proxy", "namespace": "kube-system"});
        let objects = json!({"apiVersion": "v1", "kind": "List", "items": [
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta},
            {
                "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
                "metadata": {"name": "kubeadm:node-proxier"}, "roleRef": role, "subjects": [subject],
            },
            {
                "apiVersion": "v1", "kind": "ConfigMap", "metadata": meta,
                "data": {"config.conf": config.to_string(), "kubeconfig.conf": kubeconfig.to_string()},
            },
            {
                "apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": meta,
                "spec": {
                    "selector": {"matchLabels": labels},
                    "template": {"metadata": {"labels": labels}, "spec": pod},
                },
            },
        ]});
        self.control_plane
            .kubectl(&["apply", "-f", "-"], &objects.to_string())
            .map(drop)
    }

    /// Creates a Service with a backend on each node.
    fn create_service(&self) -> Result<(Vec<Process>, Service, Vec<KubeletPod<'_>>)> {
        let spec = json!({
            "type": "NodePort",
            "selector": {"app": "web"},
            "ports": [{"name": "http", "port": PORT, "targetPort": BACKEND_PORT, "nodePort": NODE_PORT}],
        });
        let service = self.namespace.create_service("web", spec)?;
        let (mut servers, mut kubelets) = (Vec::new(), Vec::new());
        for (node, name) in [("n1", "web-1"), ("n2", "web-2")] {
            let pod = self
                .namespace
                .start_pod(self.cluster, node, name, &PodTemplate::app("web"))?;
            let listen = format!("0.0.0.0:{BACKEND_PORT}={name}");
            servers.push(self.testbed.serve_with(pod.netns(), &[&listen], &["--echo"])?);
            pod.set_ready(true)?;
            kubelets.push(pod);
        }
        Ok((servers, service, kubelets))
    }

    fn until_served(&self, netns: &Netns, vip: SocketAddr) -> Result<()> {
        let deadline = Instant::now() + scaled_timeout(Duration::from_secs(60));
        loop {
            let summary = self.testbed.connect(netns, &Connect::to(&[vip]).count(20))?;
            if summary.all_well().is_ok() && summary.per_backend.len() == 2 {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "kube-proxy does not serve {}: {summary:?}",
                netns.name()
            );
            sleep(Duration::from_millis(200));
        }
    }

    fn hold(&self, namespaces: &[&Netns], vip: SocketAddr) -> Result<Vec<HeldConnections>> {
        namespaces
            .iter()
            .map(|netns| self.testbed.hold(netns, &[vip], HELD))
            .collect()
    }

    fn load(&self, namespaces: &[&Netns], vip: SocketAddr) -> Result<Vec<Load>> {
        let connect = Connect::to(&[vip])
            .rate(RATE)
            .count(u64::MAX)
            .timeout(scaled_timeout(Duration::from_secs(5)));
        namespaces
            .iter()
            .map(|netns| self.testbed.start(netns, &connect))
            .collect()
    }

    /// Returns whether the nodes have rules of kube-proxy; fails if only some have.
    fn kube_proxy_rules(&self) -> Result<bool> {
        let nodes = self.cluster.nodes();
        let mut have = 0;
        for node in nodes {
            let rules = node.ruleset()?;
            have += usize::from(
                rules.mentions("shop/web") || rules.mentions("KUBE-SVC") || rules.mentions("table ip kube-proxy "),
            );
        }
        ensure!(
            have == 0 || have == nodes.len(),
            "{have} of {} nodes have rules",
            nodes.len()
        );
        Ok(have > 0)
    }

    /// Fails unless the agents of all nodes are complete.
    fn expect_served_by_lb(&self) -> Result<()> {
        for node in self.cluster.nodes() {
            let agent = Agent::new(self.cluster, node, &Agent::find()?, Path::new("/nowhere"));
            let status = agent.status()?;
            ensure!(status.agent.running && status.agent.complete, "{:?}", status.agent);
            let services: Value = agent.json(&["service", "list"])?;
            let text = services.to_string();
            ensure!(text.contains("web"), "{text}");
        }
        Ok(())
    }
}

fn address(service: &Service) -> Result<std::net::IpAddr> {
    let spec = service.spec.as_ref().context("no spec")?;
    spec.cluster_ip
        .as_ref()
        .context("no address")?
        .parse()
        .context("not an address")
}

fn expect_all_live(held: &HeldSummary) -> Result<()> {
    ensure!(held.held == u64::from(HELD) && held.live == held.held, "{held:?}");
    Ok(())
}
