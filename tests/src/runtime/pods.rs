//! Runs the pods of DaemonSets and Jobs: binds them to their nodes as the scheduler does, and runs their containers as a
//! kubelet does.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use serde_json::{Value, json};

use super::bundle::array;
use super::{Container, ContainerExtras, Runtime};
use crate::control_plane::{ControlPlane, Objects};

/// Time between two reads of the API.
const PERIOD: Duration = Duration::from_millis(100);

/// Number of lines of each log in [`Pods::log_tails`].
const LOG_LINES: usize = 10;

/// Directory of the service account in a container.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// The time of all changes of state in the API.
const TIME: &str = "2026-01-01T00:00:00Z";

/// Runs the pods of a namespace. Dropping this ends all of them.
#[derive(Debug)]
pub struct Pods {
    stop: Arc<AtomicBool>,
    errors: Arc<Mutex<Vec<String>>>,
    /// The directories with the logs of the runtimes.
    folders: Vec<PathBuf>,
    thread: Option<JoinHandle<()>>,
}

impl Pods {
    /// Starts to run the pods of a namespace on the nodes of the runtimes.
    ///
    /// `arguments` returns additional arguments for a container, depending on its runtime and its specification.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub fn run(
        control_plane: &ControlPlane,
        namespace: &str,
        runtimes: Vec<Runtime>,
        arguments: impl Fn(&Runtime, &Value) -> Vec<String> + Send + 'static,
    ) -> Result<Self> {
        let folders = runtimes.iter().map(|runtime| runtime.folder.clone()).collect();
        let stop = Arc::new(AtomicBool::new(false));
        let errors = Arc::<Mutex<Vec<String>>>::default();
        let mut kubelet = Kubelet {
            objects: control_plane.objects().clone(),
            namespace: namespace.to_owned(),
            server: (control_plane.address().to_string(), control_plane.port()),
            authority: control_plane.authority(),
            runtimes,
            arguments: Box::new(arguments),
            states: BTreeMap::new(),
        };
        let (stopped, recorded) = (Arc::clone(&stop), Arc::clone(&errors));
        // This thread starts all containers, and they die with it.
        let thread = thread::Builder::new()
            .name("pods".to_owned())
            .spawn(move || {
                while !stopped.load(Ordering::Relaxed) {
                    if let Err(error) = kubelet.sync() {
                        recorded
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .push(format!("{error:#}"));
                    }
                    thread::sleep(PERIOD);
                }
            })
            .context("starting a thread")?;
        Ok(Self {
            stop,
            errors,
            folders,
            thread: Some(thread),
        })
    }

    /// Returns the last lines of each container's log.
    ///
    /// # Errors
    /// If a log cannot be read.
    pub fn log_tails(&self) -> Result<String> {
        let mut tails = String::new();
        for folder in &self.folders {
            for entry in fs::read_dir(folder).with_context(|| format!("listing {}", folder.display()))? {
                let path = entry?.path();
                if path.extension().is_none_or(|extension| extension != "log") {
                    continue;
                }
                let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
                let lines: Vec<_> = text.lines().collect();
                let last = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
                tails.push_str(&format!("{}:\n{last}\n", path.display()));
            }
        }
        Ok(tails)
    }

    /// Returns the last errors.
    #[must_use]
    pub fn errors(&self) -> String {
        let errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        errors[errors.len().saturating_sub(10)..].join("\n")
    }
}

impl Drop for Pods {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            eprintln!("test bed: the thread that runs pods has panicked: {}", self.errors());
        }
    }
}

/// Returns additional arguments for a container, by its runtime and its specification.
type ExtraArguments = Box<dyn Fn(&Runtime, &Value) -> Vec<String> + Send>;

struct Kubelet {
    objects: Arc<Objects>,
    namespace: String,
    server: (String, u16),
    authority: PathBuf,
    runtimes: Vec<Runtime>,
    arguments: ExtraArguments,
    /// The state of each pod that was started, by its uid.
    states: BTreeMap<String, PodState>,
}

/// The state of a pod that was started.
#[derive(Debug, Default)]
struct PodState {
    /// How many of the pod's init containers have succeeded.
    initialized: usize,
    container: Option<Container>,
    folder: PathBuf,
    restarts: u32,
    /// The last reported status.
    status: Value,
    finished: bool,
}

impl Kubelet {
    /// Reads all pods from the API and takes the next step for each of them.
    fn sync(&mut self) -> Result<()> {
        let pods = self.objects.list::<Pod>(&self.namespace, "")?;
        let pods: Vec<Value> = pods.iter().map(serde_json::to_value).collect::<Result<_, _>>()?;
        let uid = |pod: &Value| pod["metadata"]["uid"].as_str().map(str::to_owned);
        let known: Vec<_> = pods.iter().filter_map(uid).collect();
        let gone: Vec<_> = self.states.keys().filter(|uid| !known.contains(uid)).cloned().collect();
        for uid in gone {
            self.end(&uid)?;
        }
        let mut failed = Vec::new();
        for pod in &pods {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            if let Err(error) = self.advance(pod) {
                failed.push(format!("{name}: {error:#}"));
            }
        }
        if failed.is_empty() {
            return Ok(());
        }
        bail!("{}", failed.join("; "))
    }

    fn advance(&mut self, pod: &Value) -> Result<()> {
        let uid = pod["metadata"]["uid"].as_str().context("a pod has no uid")?;
        let name = pod["metadata"]["name"].as_str().context("a pod has no name")?;
        let Some(node) = pod["spec"]["nodeName"].as_str() else {
            return self.bind(pod, name);
        };
        if !pod["metadata"]["deletionTimestamp"].is_null() {
            self.end(uid)?;
            return self.objects.delete::<Pod>(&self.namespace, name, Some(0));
        }
        let index = self.runtimes.iter().position(|runtime| runtime.netns().name() == node);
        let index = index.with_context(|| format!("no runtime for node {node}"))?;
        if !self.states.contains_key(uid) {
            let folder = self.runtimes[index].folder.join(format!("pod-{uid}"));
            fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
            let new = PodState {
                folder,
                ..PodState::default()
            };
            self.states.insert(uid.to_owned(), new);
        }
        let mut state = self.states.remove(uid).context("the pod has no state")?;
        let done = self.step(pod, index, &mut state);
        let done = done.and_then(|status| self.report(name, &mut state, status));
        self.states.insert(uid.to_owned(), state);
        done
    }

    /// Takes the next step for a pod and returns its status.
    fn step(&self, pod: &Value, index: usize, state: &mut PodState) -> Result<Value> {
        let (runtime, spec) = (&self.runtimes[index], &pod["spec"]);
        if state.finished {
            return Ok(state.status.clone());
        }
        let first: Vec<_> = array(&spec["initContainers"]).collect();
        let main = spec["containers"].get(0).context("the pod has no container")?;
        let container = first.get(state.initialized).copied().unwrap_or(main);
        let Some(process) = &mut state.container else {
            let extras = self.extras(runtime, spec, container, &state.folder)?;
            state.container = Some(runtime.start(spec, container, &extras)?);
            return Ok(status(pod, state, false, runtime));
        };
        if process.is_running()? {
            let ready = state.initialized == first.len() && is_ready(runtime, main);
            return Ok(status(pod, state, ready, runtime));
        }
        let ended = process.succeed(Duration::ZERO);
        state.container = None;
        match ended {
            Ok(()) if state.initialized < first.len() => state.initialized += 1,
            Ok(()) if spec["restartPolicy"] != "Always" => state.finished = true,
            Ok(()) => state.restarts += 1,
            Err(error) => {
                state.restarts += 1;
                return Err(error);
            }
        }
        Ok(status(pod, state, false, runtime))
    }

    /// Binds a pod of a DaemonSet to the node in its node affinity.
    fn bind(&self, pod: &Value, name: &str) -> Result<()> {
        let terms = &pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"];
        let node = terms["nodeSelectorTerms"][0]["matchFields"][0]["values"][0]
            .as_str()
            .context("the pod has no node affinity for one node")?;
        let path = format!("/api/v1/namespaces/{}/pods/{name}/binding", self.namespace);
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding", "metadata": {"name": name},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node},
        });
        self.objects.post(&path, &binding).map(drop)
    }

    /// Stops a pod, if it runs.
    fn end(&mut self, uid: &str) -> Result<()> {
        let container = self.states.remove(uid).and_then(|state| state.container);
        container.map_or(Ok(()), Container::stop)
    }

    /// Returns the additions to a container: volumes, the service account, and the address of the API server.
    fn extras(
        &self,
        runtime: &Runtime,
        spec: &Value,
        container: &Value,
        folder: &Path,
    ) -> Result<ContainerExtras<'static>> {
        let mut extras = ContainerExtras {
            arguments: (self.arguments)(runtime, container),
            ..ContainerExtras::default()
        };
        let (host, port) = &self.server;
        extras.env = vec![
            ("KUBERNETES_SERVICE_HOST", host.clone()),
            ("KUBERNETES_SERVICE_PORT", port.to_string()),
        ];
        for volume in array(&spec["volumes"]) {
            let name = volume["name"].as_str().context("a volume has no name")?;
            let Some(map) = volume["configMap"]["name"].as_str() else {
                continue;
            };
            let map = self.objects.get::<ConfigMap>(&self.namespace, map)?;
            let at = folder.join("volumes").join(name);
            write_files(
                &at,
                map.data
                    .iter()
                    .flatten()
                    .map(|(name, content)| (name.as_str(), content.as_str())),
            )?;
            extras.volumes.insert(name.to_owned(), at);
        }
        if spec["automountServiceAccountToken"] != false
            && let Some(account) = spec["serviceAccountName"].as_str()
        {
            let path = format!("/api/v1/namespaces/{}/serviceaccounts/{account}/token", self.namespace);
            let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}});
            let answer = self.objects.post(&path, &request)?;
            let token = answer["status"]["token"].as_str().context("no token")?;
            let authority = fs::read_to_string(&self.authority).context("reading the certificate of the API server")?;
            let files = [("token", token), ("ca.crt", &authority), ("namespace", &self.namespace)];
            let at = folder.join("account");
            write_files(&at, files)?;
            extras.mounts.push((at, ACCOUNT));
        }
        Ok(extras)
    }

    /// Writes a status to the API if it has changed.
    fn report(&self, name: &str, state: &mut PodState, status: Value) -> Result<()> {
        if state.status == status {
            return Ok(());
        }
        self.objects
            .patch_status::<Pod>(&self.namespace, name, json!({"status": status}))?;
        state.status = status;
        Ok(())
    }
}

fn write_files<'a>(folder: &Path, files: impl IntoIterator<Item = (&'a str, &'a str)>) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    for (name, content) in files {
        fs::write(folder.join(name), content).with_context(|| format!("writing {name}"))?;
    }
    Ok(())
}

/// Returns whether the readiness probe of a container succeeds; true without a probe.
fn is_ready(runtime: &Runtime, container: &Value) -> bool {
    let probe = &container["readinessProbe"]["httpGet"];
    let (Some(path), Some(port)) = (probe["path"].as_str(), probe["port"].as_u64()) else {
        return true;
    };
    let url = format!("http://127.0.0.1:{port}{path}");
    let arguments = ["--silent", "--fail", "--max-time", "2", "--output", "/dev/null", &url];
    runtime.netns().run("curl", &arguments).is_ok()
}

fn status(pod: &Value, state: &PodState, ready: bool, runtime: &Runtime) -> Value {
    let container = &pod["spec"]["containers"][0];
    let phase = match (state.finished, &state.container) {
        (true, _) => "Succeeded",
        (false, Some(_)) if state.initialized == array(&pod["spec"]["initContainers"]).count() => "Running",
        (false, _) => "Pending",
    };
    let container_state = match phase {
        "Succeeded" => {
            json!({"terminated": {"exitCode": 0, "reason": "Completed", "startedAt": TIME, "finishedAt": TIME}})
        }
        "Running" => json!({"running": {"startedAt": TIME}}),
        _ => json!({"waiting": {"reason": "PodInitializing"}}),
    };
    let word = if ready { "True" } else { "False" };
    let conditions = ["Ready", "ContainersReady"]
        .map(|kind| json!({"type": kind, "status": word, "lastTransitionTime": TIME, "reason": "Test", "message": ""}));
    json!({
        "phase": phase,
        "startTime": TIME,
        "hostIP": runtime.address,
        "podIP": runtime.address,
        "podIPs": [{"ip": runtime.address}],
        "conditions": conditions,
        "containerStatuses": [{
            "name": container["name"], "image": container["image"], "imageID": "",
            "restartCount": state.restarts, "ready": ready, "started": phase == "Running", "state": container_state,
        }],
    })
}
