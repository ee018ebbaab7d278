//! The image and the manifests: runc starts them as a kubelet would, with exactly the privileges that the pod asks for.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lb_tests::runtime::{Container, ContainerExtras, Image, Runtime};
use lb_tests::{Agent, Cluster, Connect, Status, scaled_timeout, testbed};
use serde_json::{Value, json};

const NODE: &str = "n1";
const VIP: &str = "10.96.0.80:80";
const BACKEND_PORT: u16 = 8080;
/// Rendered manifests, with the further arguments of helm after the chart and the namespace.
const RENDERED: [(&str, &[&str]); 2] = [
    ("lb.yaml", &["--set", "kubeProxyConfigMap=kube-proxy"]),
    (
        "lb-privileged.yaml",
        &["--set", "kubeProxyConfigMap=kube-proxy", "--set", "privileged=true"],
    ),
];

fn deploy(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name)
}

/// Returns a path that `cargo xtask test --kubernetes` passes in a variable.
fn path_from_variable(name: &str) -> Result<PathBuf> {
    let value =
        env::var_os(name).with_context(|| format!("{name} is not set: `cargo xtask test --kubernetes` sets it"))?;
    Ok(value.into())
}

/// Runs `helm template lb deploy/chart` with more arguments. Returns its output, or the error message that it prints.
fn render(arguments: &[&str]) -> Result<Result<String, String>> {
    let output = Command::new(path_from_variable("LB_KUBERNETES")?.join("helm"))
        .args([
            "template",
            "lb",
            "deploy/chart",
            "--kube-version",
            "1.36",
            "--namespace",
            "kube-system",
        ])
        .args(arguments)
        .current_dir(deploy(".."))
        .output()
        .context("running helm")?;
    let text = |bytes| String::from_utf8(bytes).context("not UTF-8");
    if output.status.success() {
        return Ok(Ok(text(output.stdout)?));
    }
    Ok(Err(text(output.stderr)?))
}

#[test]
fn deploy_manifests_equal_the_rendered_chart() -> Result<()> {
    for (name, arguments) in RENDERED {
        let path = deploy(name);
        let rendered = render(arguments)?.map_err(anyhow::Error::msg)?;
        if env::var_os("LB_BLESS").is_some() {
            fs::write(&path, &rendered).with_context(|| format!("writing {}", path.display()))?;
        }
        let kept = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        ensure!(
            kept == rendered,
            "deploy/{name} differs from the output of `helm template lb deploy/chart --kube-version 1.36 --namespace kube-system {}`",
            arguments.join(" ")
        );
    }
    Ok(())
}

#[test]
fn chart_requires_an_api_server_address() -> Result<()> {
    let message = render(&[])?.expect_err("neither kubeApiserver nor kubeProxyConfigMap is set");
    ensure!(
        message.contains("kubeApiserver") && message.contains("kubeProxyConfigMap"),
        "{message}"
    );
    let servers = r#"kubeApiserver=["https://192.168.77.10:6443","https://192.168.77.11:6443"]"#;
    let text = render(&["--set-json", servers])?.map_err(anyhow::Error::msg)?;
    let pod = pod(&text)?;
    let arguments = &pod["containers"][0]["args"];
    ensure!(
        arguments[1] == "--kube-apiserver=https://192.168.77.10:6443,https://192.168.77.11:6443",
        "{arguments}"
    );
    ensure!(!text.contains("/var/lib/kube-proxy"), "{text}");
    Ok(())
}

/// Returns the specification of the DaemonSet's pods.
fn pod(manifest: &str) -> Result<Value> {
    let documents: Vec<Value> = serde_saphyr::from_multiple(manifest).context("not YAML")?;
    let set = documents.into_iter().find(|document| document["kind"] == "DaemonSet");
    Ok(set.context("there is no DaemonSet")?["spec"]["template"]["spec"].take())
}

/// Returns the pod with manifests as its source instead of Kubernetes; the volume is called `manifests`.
fn with_manifests(mut pod: Value) -> Result<Value> {
    let container = &mut pod["containers"][0];
    let arguments = container["args"].as_array_mut().context("no arguments")?;
    let config = arguments
        .iter_mut()
        .find(|word| word.as_str().is_some_and(|word| word.starts_with("--config=")));
    *config.context("no --config")? = json!("--manifests=/manifests");
    let mounts = container["volumeMounts"].as_array_mut().context("no mounts")?;
    let config = mounts.iter_mut().find(|mount| mount["name"] == "kube-proxy");
    *config.context("no mount of the ConfigMap")? =
        json!({"name": "manifests", "mountPath": "/manifests", "readOnly": true});
    Ok(pod)
}

/// Returns `CapEff` and `CapBnd` of a process, and whether it has `NoNewPrivs`.
fn privileges(process: u32) -> Result<(u64, u64, bool)> {
    let status = fs::read_to_string(format!("/proc/{process}/status")).context("reading a process's status")?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.map(str::trim).with_context(|| format!("no {name}"))
    };
    let bits = |name: &str| Ok::<_, anyhow::Error>(u64::from_str_radix(field(name)?, 16)?);
    Ok((bits("CapEff:")?, bits("CapBnd:")?, field("NoNewPrivs:")? == "1"))
}

/// CAP_NET_ADMIN, CAP_SYS_PTRACE, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF by their numbers (linux/capability.h).
const NEEDED: u64 = 1 << 12 | 1 << 19 | 1 << 21 | 1 << 38 | 1 << 39;

#[test]
fn image_serves_with_the_capabilities_of_the_manifest() -> Result<()> {
    let status = check_serving("lb.yaml", |container| {
        let processes = container.processes()?;
        let [process] = processes.as_slice() else {
            anyhow::bail!("not one process: {processes:?}");
        };
        let (effective, bounding, no_new) = privileges(*process)?;
        ensure!(
            (effective, bounding, no_new) == (NEEDED, NEEDED, true),
            "{effective:x} {bounding:x} {no_new}"
        );
        Ok(())
    })?;
    expect_only_the_cgroup_problem(&status)
}

#[test]
fn image_serves_when_privileged() -> Result<()> {
    let status = check_serving("lb-privileged.yaml", |_| Ok(()))?;
    expect_only_the_cgroup_problem(&status)
}

/// Fails if there are problems. The one about the cgroup is expected: the agent of a test bed serves only a part of
/// this machine.
fn expect_only_the_cgroup_problem(status: &Status) -> Result<()> {
    let others: Vec<_> = status
        .problems
        .iter()
        .filter(|p| !p.place.starts_with("cgroup"))
        .collect();
    ensure!(others.is_empty(), "{others:?}");
    Ok(())
}

/// A configuration of kube-proxy with a timeout that differs from every default.
const CONFIG: &str = "\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
conntrack: {maxPerCore: 0, tcpCloseWaitTimeout: 77m}
";

/// Starts the pod of a manifest from the image, and checks that it serves. Returns its status.
fn check_serving(manifest: &str, check: impl Fn(&Container) -> Result<()>) -> Result<Status> {
    let cluster = Cluster::builder().nodes(2).build()?;
    let testbed = testbed();
    let (client, near) = (cluster.add_pod(NODE, "client")?, cluster.add_pod(NODE, "near")?);
    let far = cluster.add_pod("n2", "far")?;
    let _servers = [
        testbed.serve(&near, &[&format!("0.0.0.0:{BACKEND_PORT}=near")])?,
        testbed.serve(&far, &[&format!("0.0.0.0:{BACKEND_PORT}=far")])?,
    ];
    let manifests = cluster.scratch().join("manifests");
    fs::create_dir(&manifests).context("creating a directory")?;
    let write = |addresses: &[String]| {
        let file = manifests.join("web.json");
        // Renamed into place, so that the change is atomic.
        fs::write(cluster.scratch().join("web.json"), objects(addresses).to_string())?;
        fs::rename(cluster.scratch().join("web.json"), file)
    };
    write(&[near.address().to_string(), far.address().to_string()]).context("writing a manifest")?;

    let node = cluster.node(NODE);
    let mut runtime = Runtime::new(&cluster, node)?;
    let image = Image::from_archive(&path_from_variable("LB_IMAGE")?, &cluster.scratch().join("image"))?;
    let text = fs::read_to_string(deploy(manifest)).context("reading a manifest")?;
    let pod = with_manifests(pod(&text)?)?;
    let container = &pod["containers"][0];
    runtime.add_image(container["image"].as_str().context("no image")?, image);

    let agent = Agent::new(&cluster, node, &Agent::find()?, &manifests);
    let mut more = ContainerExtras::default();
    more.volumes.insert("manifests".to_owned(), manifests.clone());
    // Mounted as the ConfigMap of kube-proxy is. The container cannot write to its own /proc/sys.
    fs::write(manifests.join("kube-proxy.conf"), CONFIG).context("writing a configuration")?;
    more.arguments = vec![
        "--config=/manifests/kube-proxy.conf".to_owned(),
        format!("--cgroup={}", runtime.cgroup_in_containers().display()),
        format!("--pin-path={}", agent.pin_path().display()),
    ];
    let mut started = runtime.start(&pod, container, &more)?;
    let ready = wait_ready(&runtime, container, &mut started)?;
    ensure!(ready.contains("lastUpdated"), "{ready}");
    check(&started)?;
    let close_wait = "/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait";
    let seconds = node.run("cat", &[close_wait])?;
    ensure!(seconds.trim() == "4620", "{close_wait} is {seconds}: {}", started.log());

    let vip = VIP.parse().context("an address")?;
    for netns in [&*client, &**node] {
        let summary = testbed.connect(netns, &Connect::to(&[vip]).count(200).peer_check())?;
        summary.all_well()?;
        ensure!(summary.reached("near") > 0 && summary.reached("far") > 0, "{summary:?}");
    }
    write(&[far.address().to_string()]).context("writing a manifest")?;
    let deadline = Instant::now() + scaled_timeout(Duration::from_secs(10));
    loop {
        let summary = testbed.connect(&client, &Connect::to(&[vip]).count(50))?;
        summary.all_well()?;
        if summary.reached("far") == 50 {
            break;
        }
        ensure!(
            Instant::now() < deadline,
            "the change of a manifest is not applied: {}",
            started.log()
        );
        sleep(Duration::from_millis(20));
    }
    let status = agent.status()?;
    ensure!(status.agent.running && status.agent.complete, "{:?}", status.agent);
    started.stop()?;
    let summary = testbed.connect(&client, &Connect::to(&[vip]).count(50))?;
    summary.all_well().context("after the container has ended")?;
    Ok(status)
}

/// Waits until the readiness probe succeeds, and returns the response.
fn wait_ready(runtime: &Runtime, container: &Value, started: &mut Container) -> Result<String> {
    let probe = &container["readinessProbe"]["httpGet"];
    let (port, path) = (&probe["port"], probe["path"].as_str().context("no path")?);
    let url = format!("http://127.0.0.1:{port}{path}");
    let deadline = Instant::now() + scaled_timeout(Duration::from_secs(20));
    loop {
        match runtime
            .netns()
            .run("curl", &["--silent", "--show-error", "--fail", &url])
        {
            Ok(answer) => return Ok(answer),
            Err(error) => {
                let running = started.is_running()?;
                ensure!(running && Instant::now() < deadline, "{error:#}\n{}", started.log());
            }
        }
        sleep(Duration::from_millis(20));
    }
}

/// Returns a Service and its endpoints.
fn objects(addresses: &[String]) -> Value {
    let (address, port) = VIP.split_once(':').expect("an address and a port");
    let port: u16 = port.parse().expect("a port");
    let ready = json!({"ready": true, "serving": true, "terminating": false});
    let endpoints: Vec<_> = addresses
        .iter()
        .map(|address| json!({"addresses": [address], "conditions": ready}))
        .collect();
    json!({"apiVersion": "v1", "kind": "List", "items": [
        {
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "default"},
            "spec": {
                "type": "ClusterIP", "clusterIP": address, "clusterIPs": [address], "ipFamilies": ["IPv4"],
                "ports": [{"name": "http", "port": port, "targetPort": BACKEND_PORT, "protocol": "TCP"}],
            },
        },
        {
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {
                "name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"},
            },
            "ports": [{"name": "http", "port": BACKEND_PORT, "protocol": "TCP"}],
            "endpoints": endpoints,
        },
    ]})
}
