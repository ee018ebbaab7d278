//! Containers on a node of the [`Cluster`], as a kubelet and its runtime make them of a pod: by runc, with
//! the file system of an image, and with the mounts, capabilities and namespaces that the pod asks for and no more.
//!
//! A container's processes are in the node's cgroup and, since all pods here have `hostNetwork`, in its network
//! namespace. They see a machine whose only cgroup hierarchy is cgroup2, at its usual place, whatever the real one has.

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

/// How long a container may take to end after SIGTERM.
const END: Duration = Duration::from_secs(10);

/// Takes the caller's mounts to those of a machine with cgroup2 alone, then runs the rest. In a mount namespace of its
/// own.
const ENTER: &str = "umount --lazy /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup && exec \"$@\"";

/// Where containers see the cgroup2 hierarchy.
const CGROUP2: &str = "/sys/fs/cgroup";

/// The container runtime of a node.
#[derive(Debug)]
pub struct Runtime {
    netns: Netns,
    /// The node's cgroup.
    cgroup: PathBuf,
    /// The name of that below the root of the hierarchy.
    cgroup_name: PathBuf,
    address: Ipv4Addr,
    folder: PathBuf,
    images: BTreeMap<String, Image>,
    sequence: AtomicU32,
}

/// What a container gets besides what its pod says.
#[derive(Debug, Default)]
pub struct ContainerExtras<'a> {
    /// Folders for the volumes that are none of the node's own, by name.
    pub volumes: BTreeMap<String, PathBuf>,
    /// Folders at fixed places, as that of a service account.
    pub mounts: Vec<(PathBuf, &'a str)>,
    /// Variables.
    pub env: Vec<(&'a str, String)>,
    /// Arguments behind those of the pod: all nodes of a cluster are on one machine.
    pub arguments: Vec<String>,
}

impl Runtime {
    /// That of a node.
    ///
    /// # Errors
    /// If its folder cannot be made, or there is no runc.
    pub fn new(cluster: &Cluster, node: &Node) -> Result<Self> {
        which::which("runc").context("there is no runc")?;
        let folder = cluster.scratch().join(format!("runtime-{}", node.name()));
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let cgroup_name = node
            .cgroup()
            .strip_prefix(crate::cgroup2_root()?)
            .context("the node's cgroup is in the cgroup2 hierarchy")?;
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

    /// Makes an image known by a name.
    pub fn add_image(&mut self, name: &str, image: Image) {
        self.images.insert(name.to_owned(), image);
    }

    /// The node.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The node's cgroup, as containers see it.
    #[must_use]
    pub fn cgroup_in_containers(&self) -> PathBuf {
        Path::new(CGROUP2).join(&self.cgroup_name)
    }

    /// Starts a container of a pod: `pod` is the pod's specification, `container` one of its containers.
    ///
    /// # Errors
    /// If the pod asks for what is not known here, or the container cannot be started.
    pub fn start(&self, pod: &Value, container: &Value, more: &ContainerExtras<'_>) -> Result<Container> {
        let name = container["name"].as_str().context("a container has a name")?;
        let name = format!("{name}-{}", self.sequence.fetch_add(1, Ordering::Relaxed));
        let image = container["image"].as_str().context("a container has an image")?;
        let image = self
            .images
            .get(image)
            .with_context(|| format!("{} has no image {image:?}", self.netns.name()))?;
        let bundle = self.folder.join(&name);
        fs::create_dir(&bundle).with_context(|| format!("making {}", bundle.display()))?;
        let cgroup = Path::new("containers").join(&name);
        let config = bundle::Bundle {
            node: self.netns.name(),
            image,
            // Each has its own: runc makes mount points in it.
            rootfs: image.instance(&bundle)?,
            cgroup: Path::new("/").join(&self.cgroup_name).join(&cgroup),
            folder: &bundle,
        }
        .config(pod, container, more)
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
            .arg(format!("{}-{name}", self.unique()));
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        Ok(Container {
            process: Process::spawn(&mut command)?,
            cgroup: self.cgroup.join(cgroup),
            log,
        })
    }

    /// A name that no other node of this machine has.
    fn unique(&self) -> String {
        self.cgroup_name.display().to_string().replace('/', "-")
    }
}

/// A container. Dropping it kills its processes.
#[derive(Debug)]
pub struct Container {
    process: Process,
    cgroup: PathBuf,
    log: PathBuf,
}

impl Container {
    /// Whether it runs.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn is_running(&mut self) -> Result<bool> {
        self.process.is_running()
    }

    /// Waits for its end; fails unless that was a good one.
    ///
    /// # Errors
    /// See above; the message has its output.
    pub fn succeed(&mut self, timeout: Duration) -> Result<()> {
        let status = self.process.wait(timeout)?;
        ensure!(status.success(), "the container has ended: {status}\n{}", self.log());
        Ok(())
    }

    /// Asks it to end, and kills it where it does not.
    ///
    /// # Errors
    /// If its processes do not die.
    pub fn stop(mut self) -> Result<()> {
        // runc passes the signal on, and removes what it has made when the container has ended.
        if self.process.signal(Signal::SIGTERM).is_ok() && self.process.wait(scaled_timeout(END)).is_ok() {
            return Ok(());
        }
        self.kill()
    }

    /// The process ids in it.
    ///
    /// # Errors
    /// If the kernel does not say.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let path = self.cgroup.join("cgroup.procs");
        let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
        text.lines().map(|line| line.parse().context("a process id")).collect()
    }

    /// What it has written.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    fn kill(&mut self) -> Result<()> {
        match cleanup::kill_processes(&self.cgroup) {
            // It has ended by itself, and runc has removed what it had made.
            Err(_) if !self.cgroup.exists() => {}
            result => result?,
        }
        // It has nothing more to wait for.
        self.process.wait(scaled_timeout(END)).map(drop)
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if let Err(error) = self.kill() {
            eprintln!("test bed: container {}: {error:#}", self.log.display());
        }
    }
}
