//! A real control plane of Kubernetes for a [`Cluster`]: etcd, kube-apiserver and kube-controller-manager on one of the
//! cluster's outside machines, which all nodes reach by its own address.
//!
//! There are no kubelets. The pods are those of the [`Cluster`], and [`KubeletPod`] reports their status to the API server
//! as a kubelet does. The endpoint slice controller creates EndpointSlices from that as in any cluster.
//!
//! ```no_run
//! use lb_tests::Cluster;
//! use lb_tests::control_plane::{ControlPlane, PodTemplate};
//! use serde_json::json;
//!
//! # fn main() -> anyhow::Result<()> {
//! let cluster = Cluster::builder().nodes(2).client(true).build()?;
//! let control_plane = ControlPlane::start(&cluster, cluster.client())?;
//! let namespace = control_plane.namespace("shop")?;
//! namespace.create_service("web", json!({"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}))?;
//! let pod = namespace.start_pod(&cluster, "n2", "web-1", &PodTemplate::app("web"))?;
//! pod.set_ready(true)?;
//! # Ok(())
//! # }
//! ```

mod kubelet;
mod namespace;
mod objects;
mod watch_proxy;

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, OpenOptions};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

pub use self::kubelet::{KubeletPod, PodTemplate};
pub use self::namespace::{Namespace, slice_endpoints};
pub use self::objects::Objects;
pub use self::watch_proxy::{WatchProxy, WatchProxyStats};
use crate::{Client, Cluster, Netns, Process, scaled_timeout};

/// Time limit for a program of the control plane to be ready.
const READY_TIMEOUT: Duration = Duration::from_secs(60);
/// The API server's port.
const PORT: u16 = 6443;
/// The networks of cluster IPs. They do not contain the addresses in the manifests of other tests.
const SERVICE_NETWORKS: &str = "10.96.0.0/16,fd00:10:96::/112";
/// The highest number of endpoints in one slice: small, so that tests have Services with several slices.
pub const ENDPOINTS_PER_SLICE: usize = 3;
/// The enabled controllers; the others would only find that there is no kubelet. Pods of DaemonSets and Jobs run only if a
/// test has [`crate::runtime::Pods`].
const CONTROLLERS: &str = "endpointslice-controller,endpointslice-mirroring-controller,namespace-controller,\
                           daemonset-controller,job-controller,garbage-collector-controller";
/// Environment variable with the directory of the programs.
const PROGRAMS: &str = "LB_KUBERNETES";

/// The users of the API server: name of the kubeconfig, user and groups. The token of each is its name.
const USERS: [(&str, &str, &str); 3] = [
    ("admin", "admin", "system:masters"),
    (
        "kube-controller-manager",
        "system:kube-controller-manager",
        "system:masters",
    ),
    // Upstream binds its own role for a Service proxy, system:node-proxier, to this user.
    ("kube-proxy", "system:kube-proxy", ""),
];

/// A program of the control plane, if it was started.
type Program = Mutex<Option<Process>>;

fn lock(program: &Program) -> MutexGuard<'_, Option<Process>> {
    program.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A control plane. Dropping it kills its programs; their files are removed with the cluster.
#[derive(Debug)]
pub struct ControlPlane {
    machine: Netns,
    address: Ipv4Addr,
    programs: PathBuf,
    folder: PathBuf,
    objects: Arc<Objects>,
    /// The last octet of the newest pod's address, by node.
    last_address: Mutex<BTreeMap<String, u8>>,
    controller_manager: Program,
    api_server: Program,
    etcd: Program,
}

impl ControlPlane {
    /// Starts a control plane on `machine` and creates the Node objects of the cluster. Returns when the API server is ready
    /// and the controllers work.
    ///
    /// # Errors
    /// If a program is missing, or is not ready in time; the message contains the end of its log.
    pub fn start(cluster: &Cluster, machine: &Client) -> Result<Self> {
        let programs = env::var_os(PROGRAMS).map(PathBuf::from).with_context(|| {
            format!("{PROGRAMS} is not set: `cargo xtask test --kubernetes` builds the programs and sets it")
        })?;
        let folder = cluster.scratch().join("control-plane");
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let address = machine.address();
        write_tokens(&folder)?;
        let new = Self {
            machine: Netns::clone(machine),
            address,
            objects: Arc::new(Objects::new(machine)?),
            last_address: Mutex::default(),
            programs,
            folder,
            controller_manager: Program::default(),
            api_server: Program::default(),
            etcd: Program::default(),
        };
        new.create_key()?;
        new.start_etcd()?;
        new.start_api_server()?;
        for node in cluster.nodes() {
            new.add_node(node)?;
        }
        new.start_controller_manager()?;
        Ok(new)
    }

    /// Returns the URL of the API server: `https://ADDRESS:PORT`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}:{PORT}", self.address)
    }

    /// The API server's address on the network of the nodes.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// The API server's port.
    #[must_use]
    pub fn port(&self) -> u16 {
        PORT
    }

    /// Path of the certificate with which clients verify the API server.
    #[must_use]
    pub fn authority(&self) -> PathBuf {
        self.folder.join("certificates/apiserver.crt")
    }

    /// The machine that the control plane runs on.
    #[must_use]
    pub fn machine(&self) -> &Netns {
        &self.machine
    }

    /// Path of a user's kubeconfig. `admin` has all permissions, `kube-proxy` those of upstream's role for kube-proxy.
    #[must_use]
    pub fn kubeconfig(&self, user: &str) -> PathBuf {
        self.folder.join(format!("{user}.kubeconfig"))
    }

    /// The client with which tests read and write objects.
    #[must_use]
    pub fn objects(&self) -> &Arc<Objects> {
        &self.objects
    }

    /// The directory with logs and other files.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Path of a program of Kubernetes, for example `kubectl`.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// Runs kubectl as `admin`, with text for its standard input, and returns its output.
    ///
    /// # Errors
    /// If kubectl fails; the message contains its standard error.
    pub fn kubectl(&self, arguments: &[&str], input: &str) -> Result<String> {
        let (program, config) = (self.program("kubectl"), self.kubeconfig("admin"));
        let program = program.to_str().context("the path of kubectl is not UTF-8")?;
        let config = config.to_str().context("the path of a kubeconfig is not UTF-8")?;
        let arguments = [&["--kubeconfig", config], arguments].concat();
        self.machine.run_with_input(program, &arguments, input)
    }

    /// Kills the API server by SIGKILL, if it runs.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn kill_api_server(&self) -> Result<()> {
        lock(&self.api_server).take().map_or(Ok(()), Process::kill)
    }

    /// Stops the API server by SIGSTOP: connections stay open, and requests are not answered.
    ///
    /// # Errors
    /// If the API server does not run.
    pub fn freeze_api_server(&self) -> Result<()> {
        self.signal_api_server(Signal::SIGSTOP)
    }

    /// Continues the API server by SIGCONT.
    ///
    /// # Errors
    /// If the API server does not run.
    pub fn thaw_api_server(&self) -> Result<()> {
        self.signal_api_server(Signal::SIGCONT)
    }

    fn signal_api_server(&self, signal: Signal) -> Result<()> {
        let process = lock(&self.api_server);
        process.as_ref().context("the API server does not run")?.signal(signal)
    }

    /// Starts the API server, also after [`Self::kill_api_server`], and waits until it is ready. The process dies with the
    /// calling thread.
    ///
    /// # Errors
    /// If the API server is not ready in time.
    pub fn start_api_server(&self) -> Result<()> {
        let path = |name: &str| self.folder.join(name).display().to_string();
        let flags = [
            "--etcd-servers=http://127.0.0.1:2379".to_owned(),
            "--bind-address=0.0.0.0".to_owned(),
            format!("--secure-port={PORT}"),
            format!("--advertise-address={}", self.address),
            format!("--cert-dir={}", path("certificates")),
            format!("--token-auth-file={}", path("tokens.csv")),
            format!("--service-cluster-ip-range={SERVICE_NETWORKS}"),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            format!("--service-account-key-file={}", path("accounts.key")),
            format!("--service-account-signing-key-file={}", path("accounts.key")),
            "--authorization-mode=RBAC".to_owned(),
            // Pods need no service account: no program in them uses one.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            "--allow-privileged=true".to_owned(),
        ];
        let mut process = self.spawn("kube-apiserver", &flags)?;
        let authority = self.authority();
        wait(&mut process, "kube-apiserver", &self.log("kube-apiserver"), || {
            ensure!(authority.is_file(), "there is no certificate yet");
            for (name, ..) in USERS {
                self.write_kubeconfig(name, &authority)?;
            }
            self.objects.connect(&self.kubeconfig("admin"))?;
            let (url, authority) = (format!("{}/readyz", self.url()), authority.display().to_string());
            let bearer = ["--header", "Authorization: Bearer admin", "--cacert", &authority, &url];
            self.curl(&bearer).map(drop)
        })?;
        *lock(&self.api_server) = Some(process);
        Ok(())
    }

    /// Compacts etcd at its present revision. A watch from an older revision then fails with 410 Gone, if the API server
    /// reads it from etcd.
    ///
    /// # Errors
    /// If etcd refuses.
    pub fn compact(&self) -> Result<()> {
        let post = |path: &str, body: &Value| -> Result<Value> {
            let url = format!("http://127.0.0.1:2379/v3/{path}");
            let body = body.to_string();
            let response = self.curl(&["--data", &body, &url])?;
            serde_json::from_str(&response).with_context(|| format!("not JSON: {response}"))
        };
        // A range of one key that does not exist: the header of the response contains the revision.
        let response = post("kv/range", &json!({"key": "bm9uZQ=="}))?;
        let revision = response["header"]["revision"].clone();
        post("kv/compaction", &json!({"revision": revision, "physical": true})).map(drop)
    }

    /// Returns the last lines of each program's log.
    #[must_use]
    pub fn log_tails(&self) -> String {
        let programs = ["etcd", "kube-apiserver", "kube-controller-manager"];
        programs
            .map(|name| format!("{name}:\n{}\n", tail(&self.log(name))))
            .concat()
    }

    /// Runs curl on the machine of the control plane.
    fn curl(&self, arguments: &[&str]) -> Result<String> {
        let arguments = [&["--silent", "--show-error", "--fail"], arguments].concat();
        self.machine.run("curl", &arguments)
    }

    fn start_etcd(&self) -> Result<()> {
        let flags = [
            format!("--data-dir={}", self.folder.join("etcd").display()),
            "--listen-client-urls=http://127.0.0.1:2379".to_owned(),
            "--advertise-client-urls=http://127.0.0.1:2379".to_owned(),
            "--listen-peer-urls=http://127.0.0.1:2380".to_owned(),
            "--initial-advertise-peer-urls=http://127.0.0.1:2380".to_owned(),
            "--initial-cluster=default=http://127.0.0.1:2380".to_owned(),
            // The data does not need to survive a crash of the machine.
            "--unsafe-no-fsync".to_owned(),
        ];
        let mut process = self.spawn("etcd", &flags)?;
        wait(&mut process, "etcd", &self.log("etcd"), || {
            self.curl(&["http://127.0.0.1:2379/readyz"]).map(drop)
        })?;
        *lock(&self.etcd) = Some(process);
        Ok(())
    }

    /// Starts the controllers, and waits until they have created the EndpointSlice of a first Service.
    fn start_controller_manager(&self) -> Result<()> {
        let config = self.kubeconfig("kube-controller-manager").display().to_string();
        let flags = [
            format!("--kubeconfig={config}"),
            format!("--authentication-kubeconfig={config}"),
            format!("--authorization-kubeconfig={config}"),
            "--bind-address=127.0.0.1".to_owned(),
            "--leader-elect=false".to_owned(),
            format!("--controllers={CONTROLLERS}"),
            format!("--max-endpoints-per-slice={ENDPOINTS_PER_SLICE}"),
            // Every change updates a slice at once, as in a cluster without other changes.
            "--endpointslice-updates-batch-period=0s".to_owned(),
        ];
        let mut process = self.spawn("kube-controller-manager", &flags)?;
        let probe = self.namespace("probe")?;
        probe.create_service("probe", json!({"selector": {"app": "probe"}, "ports": [{"port": 80}]}))?;
        let log = self.log("kube-controller-manager");
        wait(&mut process, "kube-controller-manager", &log, || {
            ensure!(!probe.slices("probe")?.is_empty(), "there is no EndpointSlice yet");
            Ok(())
        })?;
        *lock(&self.controller_manager) = Some(process);
        Ok(())
    }

    /// Creates the key for the tokens of service accounts, without which the API server does not start.
    fn create_key(&self) -> Result<()> {
        let path = self.folder.join("accounts.key");
        let path = path
            .to_str()
            .context("the path of the scratch directory is not UTF-8")?;
        let arguments = ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path];
        self.machine.run("openssl", &arguments).map(drop)
    }

    fn spawn(&self, name: &str, flags: &[String]) -> Result<Process> {
        let program = self.program(name);
        ensure!(program.is_file(), "{} does not exist", program.display());
        let path = self.log(name);
        let log = OpenOptions::new().create(true).append(true).open(&path);
        let log = log.with_context(|| format!("opening {}", path.display()))?;
        let mut command: Command = self.machine.command(&program)?;
        command
            .args(flags)
            .current_dir(&self.folder)
            .stdin(Stdio::null())
            .stdout(log.try_clone().context("a log")?)
            .stderr(log);
        Process::spawn(&mut command)
    }

    fn log(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.log"))
    }

    fn write_kubeconfig(&self, user: &str, authority: &Path) -> Result<()> {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "lb", "cluster": {"server": self.url(), "certificate-authority": authority}}],
            "users": [{"name": user, "user": {"token": user}}],
            "contexts": [{"name": "lb", "context": {"cluster": "lb", "user": user}}],
            "current-context": "lb",
        });
        let path = self.kubeconfig(user);
        fs::write(&path, config.to_string()).with_context(|| format!("writing {}", path.display()))
    }
}

/// Writes the file of tokens and their users.
fn write_tokens(folder: &Path) -> Result<()> {
    let lines = USERS.map(|(token, user, groups)| format!("{token},{user},{token},\"{groups}\"\n"));
    fs::write(folder.join("tokens.csv"), lines.concat()).context("writing the tokens")
}

/// Waits until `ready` succeeds.
fn wait(process: &mut Process, name: &str, log: &Path, ready: impl Fn() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + scaled_timeout(READY_TIMEOUT);
    while let Err(last) = ready() {
        if !process.is_running()? {
            bail!("{name} has ended:\n{}", tail(log));
        }
        if Instant::now() >= deadline {
            bail!("{name} is not ready: {last:#}\n{}", tail(log));
        }
        sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Returns the last lines of a log.
fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
