//! A real control plane of Kubernetes beside a [`Cluster`]: etcd, kube-apiserver and kube-controller-manager on one of the
//! cluster's outside machines, which all nodes reach by its plain address.
//!
//! There are no kubelets. Pods are those of the [`Cluster`], and [`KubeletPod`] tells the API server of them what a kubelet
//! would; the endpoint slice controller makes of that what it makes everywhere.
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

/// How long a program of the control plane may take to be ready, and what it does to be done.
const PATIENCE: Duration = Duration::from_secs(60);
/// The API server's port.
const PORT: u16 = 6443;
/// Where Services get their addresses from: not where the addresses of manifests in other tests are.
pub const SERVICE_NETWORKS: &str = "10.96.0.0/16,fd00:10:96::/112";
/// The most endpoints in one slice: few, so that tests have Services of several.
pub const ENDPOINTS_PER_SLICE: usize = 3;
/// What the controller manager does; all else would only find that there is no kubelet. Pods of DaemonSets and Jobs run
/// where a test has [`crate::runtime::Pods`].
const CONTROLLERS: &str = "endpointslice-controller,endpointslice-mirroring-controller,namespace-controller,\
                           daemonset-controller,job-controller,garbage-collector-controller";
/// The variable that has the folder with the programs.
const PROGRAMS: &str = "LB_KUBERNETES";

/// Who talks to the API server: the name of the kubeconfig, user and groups. Each has its name as its token.
const USERS: [(&str, &str, &str); 3] = [
    ("admin", "admin", "system:masters"),
    (
        "kube-controller-manager",
        "system:kube-controller-manager",
        "system:masters",
    ),
    // What upstream's own role for a Service proxy, system:node-proxier, is bound to.
    ("kube-proxy", "system:kube-proxy", ""),
];

/// A program that may run.
type Running = Mutex<Option<Process>>;

fn lock(running: &Running) -> MutexGuard<'_, Option<Process>> {
    running.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A control plane. Dropping it kills its programs; their files go with the cluster.
#[derive(Debug)]
pub struct ControlPlane {
    machine: Netns,
    address: Ipv4Addr,
    programs: PathBuf,
    folder: PathBuf,
    objects: Arc<Objects>,
    /// The last number of the address that was given to a pod last, by node.
    last_address: Mutex<BTreeMap<String, u8>>,
    controller_manager: Running,
    api_server: Running,
    etcd: Running,
}

impl ControlPlane {
    /// Starts one on `machine`, and tells it of the cluster's nodes; returns when the API is served and the controllers
    /// work.
    ///
    /// # Errors
    /// If a program is missing, or is not ready in time; the message has the end of its log.
    pub fn start(cluster: &Cluster, machine: &Client) -> Result<Self> {
        let programs = env::var_os(PROGRAMS).map(PathBuf::from).with_context(|| {
            format!(
                "{PROGRAMS} is not set: `cargo xtask test --kubernetes` builds the programs and says where they are"
            )
        })?;
        let folder = cluster.scratch().join("control-plane");
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let address = machine.address();
        write_tokens(&folder)?;
        let new = Self {
            machine: Netns::clone(machine),
            address,
            objects: Arc::new(Objects::new(machine)?),
            last_address: Mutex::default(),
            programs,
            folder,
            controller_manager: Running::default(),
            api_server: Running::default(),
            etcd: Running::default(),
        };
        new.make_key()?;
        new.start_etcd()?;
        new.start_api_server()?;
        for node in cluster.nodes() {
            new.add_node(node)?;
        }
        new.start_controller_manager()?;
        Ok(new)
    }

    /// `https://ADDRESS:PORT` of the API server.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}:{PORT}", self.address)
    }

    /// The API server's address on the network of the nodes.
    #[must_use]
    pub fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Its port.
    #[must_use]
    pub fn port(&self) -> u16 {
        PORT
    }

    /// The certificate that clients check the API server's by.
    #[must_use]
    pub fn authority(&self) -> PathBuf {
        self.folder.join("certificates/apiserver.crt")
    }

    /// The machine that it runs on.
    #[must_use]
    pub fn machine(&self) -> &Netns {
        &self.machine
    }

    /// A kubeconfig: `admin` may everything, `kube-proxy` what upstream's role for kube-proxy lets it do.
    #[must_use]
    pub fn kubeconfig(&self, user: &str) -> PathBuf {
        self.folder.join(format!("{user}.kubeconfig"))
    }

    /// What tests read and write.
    #[must_use]
    pub fn objects(&self) -> &Arc<Objects> {
        &self.objects
    }

    /// The folder with logs and other files.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// A program of Kubernetes, as `kubectl`.
    #[must_use]
    pub fn program(&self, name: &str) -> PathBuf {
        self.programs.join(name)
    }

    /// Runs kubectl as `admin`, with text for its standard input, and returns its output.
    ///
    /// # Errors
    /// If it does not succeed; the message has its standard error.
    pub fn kubectl(&self, arguments: &[&str], input: &str) -> Result<String> {
        let (program, config) = (self.program("kubectl"), self.kubeconfig("admin"));
        let program = program.to_str().context("the path of kubectl is not UTF-8")?;
        let config = config.to_str().context("the path of a kubeconfig is not UTF-8")?;
        let arguments = [&["--kubeconfig", config], arguments].concat();
        self.machine.run_with_input(program, &arguments, input)
    }

    /// Kills the API server as `kill -9` does, if it runs.
    ///
    /// # Errors
    /// If the kernel refuses.
    pub fn kill_api_server(&self) -> Result<()> {
        lock(&self.api_server).take().map_or(Ok(()), Process::kill)
    }

    /// Stops the API server as `kill -STOP` does: connections stay open, and nothing is answered.
    ///
    /// # Errors
    /// If it does not run.
    pub fn freeze_api_server(&self) -> Result<()> {
        self.signal_api_server(Signal::SIGSTOP)
    }

    /// Lets it go on.
    ///
    /// # Errors
    /// If it does not run.
    pub fn thaw_api_server(&self) -> Result<()> {
        self.signal_api_server(Signal::SIGCONT)
    }

    fn signal_api_server(&self, signal: Signal) -> Result<()> {
        let process = lock(&self.api_server);
        process.as_ref().context("the API server does not run")?.signal(signal)
    }

    /// Starts the API server (again) and waits until it is ready. The process dies with the thread that calls this.
    ///
    /// # Errors
    /// If it is not ready in time.
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
            // Pods need no account: nothing runs in them that would use it.
            "--disable-admission-plugins=ServiceAccount".to_owned(),
            "--allow-privileged=true".to_owned(),
        ];
        let mut process = self.spawn("kube-apiserver", &flags)?;
        let authority = self.authority();
        wait(&mut process, "kube-apiserver", &self.log("kube-apiserver"), || {
            ensure!(authority.is_file(), "it has no certificate yet");
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

    /// Has etcd forget all that is older than now: a watch that goes on from there is told 410 Gone, if the API server
    /// asks etcd.
    ///
    /// # Errors
    /// If it does not do that.
    pub fn compact(&self) -> Result<()> {
        let ask = |path: &str, body: &Value| -> Result<Value> {
            let url = format!("http://127.0.0.1:2379/v3/{path}");
            let body = body.to_string();
            let answer = self.curl(&["--data", &body, &url])?;
            serde_json::from_str(&answer).with_context(|| format!("not JSON: {answer}"))
        };
        // A range of one key that is not there: the answer's header has the revision.
        let answer = ask("kv/range", &json!({"key": "bm9uZQ=="}))?;
        let revision = answer["header"]["revision"].clone();
        ask("kv/compaction", &json!({"revision": revision, "physical": true})).map(drop)
    }

    /// The last lines of each program's log.
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
            // Nothing here outlives the machine.
            "--unsafe-no-fsync".to_owned(),
        ];
        let mut process = self.spawn("etcd", &flags)?;
        wait(&mut process, "etcd", &self.log("etcd"), || {
            self.curl(&["http://127.0.0.1:2379/readyz"]).map(drop)
        })?;
        *lock(&self.etcd) = Some(process);
        Ok(())
    }

    /// Starts the controllers, and waits until they have made the slice of a first Service.
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
            // A slice per change, as in a cluster where nothing else happens.
            "--endpointslice-updates-batch-period=0s".to_owned(),
        ];
        let mut process = self.spawn("kube-controller-manager", &flags)?;
        let probe = self.namespace("probe")?;
        probe.create_service("probe", json!({"selector": {"app": "probe"}, "ports": [{"port": 80}]}))?;
        let log = self.log("kube-controller-manager");
        wait(&mut process, "kube-controller-manager", &log, || {
            ensure!(!probe.slices("probe")?.is_empty(), "there is no slice");
            Ok(())
        })?;
        *lock(&self.controller_manager) = Some(process);
        Ok(())
    }

    /// A key for the tokens of service accounts, which the API server does not start without.
    fn make_key(&self) -> Result<()> {
        let path = self.folder.join("accounts.key");
        let path = path.to_str().context("the scratch folder is not UTF-8")?;
        let arguments = ["ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", path];
        self.machine.run("openssl", &arguments).map(drop)
    }

    fn spawn(&self, name: &str, flags: &[String]) -> Result<Process> {
        let program = self.program(name);
        ensure!(program.is_file(), "there is no {}", program.display());
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

/// Who may log in with which token.
fn write_tokens(folder: &Path) -> Result<()> {
    let lines = USERS.map(|(token, user, groups)| format!("{token},{user},{token},\"{groups}\"\n"));
    fs::write(folder.join("tokens.csv"), lines.concat()).context("writing the tokens")
}

/// Waits until `ready` succeeds.
fn wait(process: &mut Process, name: &str, log: &Path, ready: impl Fn() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + scaled_timeout(PATIENCE);
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

/// The last lines of a log.
fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
