//! Containers on a node of the [`Cluster`], as a kubelet and its runtime create them for a pod: by runc, with the file
//! system of an image, and with exactly the mounts, capabilities and namespaces that the pod requests.
//!
//! A container's processes are in the node's cgroup and, since all pods here have `hostNetwork`, in its network
//! namespace. They see a machine with cgroup2 as its only cgroup hierarchy, mounted at `/sys/fs/cgroup`, also if the real
//! machine is a hybrid one.

mod bundle;
mod image;
mod pods;

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

pub use self::image::Image;
pub use self::pods::Pods;
use crate::{Cluster, Netns, Node, Process, cleanup, scaled_timeout};

/// Time limit for a container to end after SIGTERM.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// Shell script that replaces the mounts at `/sys/fs/cgroup` by cgroup2 alone and then executes its arguments. It runs in
/// a new mount namespace.
const ENTER: &str = "umount --lazy /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec \"$@\"";

/// Mount point of the cgroup2 hierarchy in containers.
const CGROUP2: &str = "/sys/fs/cgroup";

/// The container runtime of a node.
#[derive(Debug)]
pub struct Runtime {
    netns: Netns,
    /// The node's cgroup.
    cgroup: PathBuf,
    /// The path of the node's cgroup from the root of the hierarchy.
    cgroup_name: PathBuf,
    address: Ipv4Addr,
    folder: PathBuf,
    images: BTreeMap<String, Image>,
    sequence: AtomicU32,
}

/// Additions to a container that are not in the specification of its pod.
#[derive(Debug, Default)]
pub struct ContainerExtras<'a> {
    /// Directories of the volumes that are not host paths, by name of the volume.
    pub volumes: BTreeMap<String, PathBuf>,
    /// Directories mounted at fixed paths, such as the one of a service account.
    pub mounts: Vec<(PathBuf, &'a str)>,
    /// Environment variables.
    pub env: Vec<(&'a str, String)>,
    /// Arguments after those of the pod. They are needed because all nodes of a cluster are on one machine.
    pub arguments: Vec<String>,
}

impl Runtime {
    /// Creates the container runtime of a node.
    ///
    /// # Errors
    /// If its directory cannot be created, or runc is not installed.
    pub fn new(cluster: &Cluster, node: &Node) -> Result<Self> {
        which::which("runc").context("runc is not installed")?;
        let folder = cluster.scratch().join(format!("runtime-{}", node.name()));
        fs::create_dir_all(&folder).with_context(|| format!("creating {}", folder.display()))?;
        let cgroup_name = node
            .cgroup()
            .strip_prefix(crate::cgroup2_root()?)
            .context("the node's cgroup is not in the cgroup2 hierarchy")?;
        Ok(Self {
            netns: Netns::clone(node),
            cgroup: node.cgroup().to_owned(),
            cgroup_name: cgroup_name.to_owned(),
            address: node.address(),
            folder,
            images: BTreeMap::new(),
            sequence: AtomicU32::new(0),
        })
    }

    /// Adds an image with its name.
    pub fn add_image(&mut self, name: &str, image: Image) {
        self.images.insert(name.to_owned(), image);
    }

    /// The network namespace of the node.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Returns the path of the node's cgroup in containers.
    #[must_use]
    pub fn cgroup_in_containers(&self) -> PathBuf {
        Path::new(CGROUP2).join(&self.cgroup_name)
    }

    /// Starts a container: `pod` is the specification of its pod, `container` one of the pod's containers.
    ///
    /// # Errors
    /// If the pod requests a feature that this runtime does not have, or the container cannot be started.
    pub fn start(&self, pod: &Value, container: &Value, extras: &ContainerExtras<'_>) -> Result<Container> {
        let name = container["name"].as_str().context("the container has no name")?;
        let name = format!("{name}-{}", self.sequence.fetch_add(1, Ordering::Relaxed));
        let image = container["image"].as_str().context("the container has no image")?;
        let image = self
            .images
            .get(image)
            .with_context(|| format!("{} has no image {image:?}", self.netns.name()))?;
        let bundle = self.folder.join(&name);
        fs::create_dir(&bundle).with_context(|| format!("creating {}", bundle.display()))?;
        let cgroup = Path::new("containers").join(&name);
        let config = bundle::Bundle {
            node: self.netns.name(),
            image,
            // Each container has its own file system, because runc creates mount points in it.
            rootfs: image.create_rootfs(&bundle)?,
            cgroup: Path::new("/").join(&self.cgroup_name).join(&cgroup),
            folder: &bundle,
        }
        .config(pod, container, extras)
        .with_context(|| format!("container {name} on {}", self.netns.name()))?;
        fs::write(bundle.join("config.json"), config.to_string()).context("writing a bundle")?;

        let log = self.folder.join(format!("{name}.log"));
        let output = OpenOptions::new().create(true).append(true).open(&log);
        let output = output.with_context(|| format!("opening {}", log.display()))?;
        let mut command = self.netns.command("unshare")?;
        command.args(["--mount", "--propagation", "private", "sh", "-c", ENTER, "sh", "runc"]);
        command.arg("--root").arg(self.folder.join("state"));
        command
            .arg("run")
            .arg("--bundle")
            .arg(&bundle)
            .arg(format!("{}-{name}", self.unique_name()));
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        Ok(Container {
            process: Process::spawn(&mut command)?,
            cgroup: self.cgroup.join(cgroup),
            log,
        })
    }

    /// Returns a name that no other node of this machine has.
    fn unique_name(&self) -> String {
        self.cgroup_name.display().to_string().replace('/', "-")
    }
}

/// A container. Dropping this kills its processes.
#[derive(Debug)]
pub struct Container {
    process: Process,
    cgroup: PathBuf,
    log: PathBuf,
}

impl Container {
    /// Returns whether the container runs.
    ///
    /// # Errors
    /// If waiting for the process fails.
    pub fn is_running(&mut self) -> Result<bool> {
        self.process.is_running()
    }

    /// Waits until the container has ended successfully.
    ///
    /// # Errors
    /// If it fails or does not end in time; the message contains its output.
    pub fn succeed(&mut self, timeout: Duration) -> Result<()> {
        let status = self.process.wait(timeout)?;
        ensure!(status.success(), "the container has ended: {status}\n{}", self.log());
        Ok(())
    }

    /// Stops the container by SIGTERM, and kills it if it does not end in time.
    ///
    /// # Errors
    /// If its processes do not end.
    pub fn stop(mut self) -> Result<()> {
        // runc forwards the signal, and removes its files and cgroups after the end of the container.
        if self.process.signal(Signal::SIGTERM).is_ok() && self.process.wait(scaled_timeout(STOP_TIMEOUT)).is_ok() {
            return Ok(());
        }
        self.kill()
    }

    /// Returns the ids of the container's processes.
    ///
    /// # Errors
    /// If its cgroup cannot be read.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let path = self.cgroup.join("cgroup.procs");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        text.lines().map(|line| line.parse().context("a process id")).collect()
    }

    /// Returns the container's output.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn kill(&mut self) -> Result<()> {
        match cleanup::kill_processes(&self.cgroup) {
            // The container has ended by itself, and runc has removed the cgroup.
            Err(_) if !self.cgroup.exists() => {}
            result => result?,
        }
        // runc ends now, because the container has ended.
        self.process.wait(scaled_timeout(STOP_TIMEOUT)).map(drop)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("test bed: container {}: {error:#}", self.log.display());
        }
    }
}
