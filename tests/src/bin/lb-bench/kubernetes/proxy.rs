//! A Service proxy, lb or kube-proxy, as a process on the node.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use lb_tests::control_plane::ControlPlane;
use lb_tests::{Agent, Cluster, Netns, Process};
use serde::Serialize;
use serde_json::json;

use super::NODE;
use crate::process;

/// Time limit for a process to end.
const END: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    Lb,
    /// kube-proxy in nftables mode, with its defaults.
    KubeProxy,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Lb => "lb",
            Self::KubeProxy => "kube-proxy",
        }
    }

    pub(crate) fn label(self) -> &'static str {
        match self {
            Self::Lb => "lb",
            Self::KubeProxy => "kube-proxy, nftables",
        }
    }
}

/// A running proxy. Dropping it kills the process.
pub(crate) struct Proxy {
    kind: Kind,
    process: Process,
    netns: Netns,
    program: PathBuf,
    pin_path: PathBuf,
    log: PathBuf,
}

impl Proxy {
    pub(crate) fn start(kind: Kind, cluster: &Cluster, control_plane: &ControlPlane, services: u32) -> Result<Self> {
        let node = cluster.node(NODE);
        let kubeconfig = control_plane.kubeconfig("kube-proxy");
        let pin_path = cluster.pin_path(NODE);
        let program = match kind {
            Kind::Lb => Agent::find()?,
            Kind::KubeProxy => control_plane.program("kube-proxy"),
        };
        let mut command = node.command(&program)?;
        match kind {
            Kind::Lb => {
                // Capacities for the Service ports with some room, and for the maps that depend on their number.
                let ports = 2 * services;
                command
                    .arg("run")
                    .arg("--kubeconfig")
                    .arg(&kubeconfig)
                    .args(["--node-name", NODE]);
                command
                    .arg("--cgroup")
                    .arg(node.cgroup())
                    .arg("--pin-path")
                    .arg(&pin_path);
                for (flag, number) in [
                    ("--max-services", ports.max(16)),
                    ("--max-frontends", 4 * ports),
                    ("--max-backends", 16 * ports),
                    ("--max-backend-slots", 32 * ports),
                ] {
                    command.arg(flag).arg(number.to_string());
                }
            }
            Kind::KubeProxy => {
                let config = json!({
                    "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                    "kind": "KubeProxyConfiguration",
                    "mode": "nftables",
                    "hostnameOverride": NODE,
                    "clientConnection": {"kubeconfig": kubeconfig},
                    "clusterCIDR": "10.10.0.0/16",
                    "conntrack": {"maxPerCore": 0, "min": 0},
                });
                let path = cluster.scratch().join("kube-proxy.json");
                fs::write(&path, config.to_string()).context("writing a configuration")?;
                command.arg("--config").arg(path);
            }
        }
        let log = cluster.scratch().join(format!("{}.log", kind.name()));
        let output = OpenOptions::new().create(true).append(true).open(&log);
        let output = output.with_context(|| format!("opening {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        Ok(Self {
            kind,
            process: Process::spawn(&mut command)?,
            netns: Netns::clone(node),
            program,
            pin_path,
            log,
        })
    }

    /// Waits until /healthz returns 200.
    pub(crate) fn wait_healthy(&mut self, scaled_timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + scaled_timeout;
        let arguments = [
            "--silent",
            "--fail",
            "--output",
            "/dev/null",
            "http://127.0.0.1:10256/healthz",
        ];
        while self.netns.run("curl", &arguments).is_err() {
            let running = self.process.is_running()?;
            ensure!(
                running && Instant::now() < deadline,
                "{} is not healthy:\n{}",
                self.kind.name(),
                self.log_tail()
            );
            sleep(Duration::from_millis(10));
        }
        Ok(())
    }

    /// Returns the resident memory without mapped maps, and the peak resident memory.
    pub(crate) fn memory(&self) -> Result<(u64, u64)> {
        let pid = self.process.id();
        let resident = process::status_bytes_of(pid, "VmRSS")?;
        let mapped = process::mapped_map_bytes_of(pid)?;
        Ok((resident.saturating_sub(mapped), process::status_bytes_of(pid, "VmHWM")?))
    }

    /// Ends the proxy, and removes its programs, maps or rules.
    pub(crate) fn end(self) -> Result<()> {
        self.process.stop(END)?;
        let program = self.program.to_str().context("a path is not UTF-8")?;
        match self.kind {
            Kind::Lb => {
                let pins = self.pin_path.to_str().context("a path is not UTF-8")?;
                self.netns.run(program, &["cleanup", "--pin-path", pins])
            }
            Kind::KubeProxy => self.netns.run(program, &["--cleanup"]),
        }
        .map(drop)
    }

    pub(crate) fn log_tail(&self) -> String {
        tail(&self.log)
    }
}

fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}
