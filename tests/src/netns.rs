//! A place where processes run: a network namespace, and mostly a cgroup.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt as _;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Pid, getpid, getppid, write};

use crate::Ruleset;
use crate::cleanup::NETNS_DIRECTORY;

/// How long a device may take to carry packets.
const LINK: Duration = Duration::from_secs(10);

/// Runs `work` on a fresh thread in the network namespace `netns` and returns what it returns.
///
/// Sockets that `work` opens belong to that namespace and may leave the closure. Child processes should not be spawned
/// here: [`Netns::command`] ties a child's life to the thread that spawns it.
///
/// # Errors
/// When the namespace cannot be entered.
///
/// # Panics
/// When `work` does, with the same payload.
pub fn in_netns<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> Result<T> {
    thread::scope(|scope| {
        scope
            .spawn(move || {
                setns(netns, CloneFlags::CLONE_NEWNET).context("entering a network namespace")?;
                Ok(work())
            })
            .join()
            .unwrap_or_else(|payload| resume_unwind(payload))
    })
}

/// A network namespace with the cgroup that its processes live in.
#[derive(Debug, Clone)]
pub struct Netns {
    name: String,
    netns: String,
    cgroup: Option<PathBuf>,
}

impl Netns {
    pub(crate) fn new(name: &str, netns: &str, cgroup: Option<PathBuf>) -> Self {
        Self {
            name: name.to_owned(),
            netns: netns.to_owned(),
            cgroup,
        }
    }

    /// The short name: that of the node, pod or client.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The name that `ip netns` knows.
    #[must_use]
    pub fn netns_name(&self) -> &str {
        &self.netns
    }

    /// The cgroup2 directory that processes of this place join.
    #[must_use]
    pub fn process_cgroup(&self) -> Option<&Path> {
        self.cgroup.as_deref()
    }

    /// The network namespace, opened anew. Whoever keeps it keeps the namespace alive.
    ///
    /// # Errors
    /// When the namespace is gone.
    pub fn open(&self) -> Result<File> {
        let path = Path::new(NETNS_DIRECTORY).join(&self.netns);
        File::open(&path).with_context(|| format!("opening {}", path.display()))
    }

    /// Runs `work` on a fresh thread in this network namespace (in the caller's cgroup); see [`in_netns`].
    ///
    /// # Errors
    /// When the namespace cannot be entered.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        in_netns(self.open()?.as_fd(), work)
    }

    /// Index of a network device.
    ///
    /// # Errors
    /// When there is none of this name.
    pub fn device_index(&self, device: &str) -> Result<u32> {
        self.within(|| nix::net::if_::if_nametoindex(device))?
            .with_context(|| format!("the index of {device}"))
    }

    /// A command that will run here: in this network namespace and cgroup, with the machine's own mounts.
    ///
    /// The process dies with the *thread* that spawns it (`PR_SET_PDEATHSIG`), so that nothing outlives a test: spawn
    /// from the test's thread. Processes that it forks in turn do not; the cluster's end finds them by their cgroup.
    ///
    /// # Errors
    /// When the namespace or the cgroup is gone.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Result<Command> {
        let netns = self.open()?;
        let cgroup = self
            .cgroup
            .as_ref()
            .map(|directory| {
                let path = directory.join("cgroup.procs");
                OpenOptions::new()
                    .write(true)
                    .open(&path)
                    .with_context(|| format!("opening {}", path.display()))
            })
            .transpose()?;
        let parent = getpid();
        let mut command = Command::new(program);
        // SAFETY: `enter` makes system calls only; it neither allocates nor takes a lock.
        unsafe { command.pre_exec(move || enter(&netns, cgroup.as_ref(), parent)) };
        Ok(command)
    }

    /// Runs a program here to its end and returns its standard output.
    ///
    /// # Errors
    /// When it cannot be run, or does not succeed; the message has its standard error.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        self.run_with_input(program, arguments, "")
    }

    /// As [`Self::run`], with text for its standard input (small: it is written before anything is read).
    ///
    /// # Errors
    /// As [`Self::run`].
    pub fn run_with_input(&self, program: &str, arguments: &[&str], input: &str) -> Result<String> {
        let mut child = self
            .command(program)?
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("running {program} in {}", self.name))?;
        if let Some(mut stdin) = child.stdin.take() {
            match stdin.write_all(input.as_bytes()) {
                // It ended without reading: its status says why.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
                result => result.with_context(|| format!("writing to {program}"))?,
            }
        }
        let output = child
            .wait_with_output()
            .with_context(|| format!("waiting for {program}"))?;
        ensure!(
            output.status.success(),
            "{program} {} in {}: {}: {}{}",
            arguments.join(" "),
            self.name,
            output.status,
            String::from_utf8_lossy(&output.stderr).trim(),
            if input.is_empty() {
                String::new()
            } else {
                format!("\ninput was:\n{input}")
            },
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs `ip` here with blank-separated arguments, as `ip("route add 10.96.0.0/16 dev eth0")`.
    ///
    /// # Errors
    /// When it does not succeed.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        self.run("ip", &arguments.split_whitespace().collect::<Vec<_>>())
    }

    /// Runs many `ip` commands in one process, up to the first that fails.
    ///
    /// # Errors
    /// When one does not succeed.
    pub fn ip_batch(&self, commands: &[String]) -> Result<()> {
        self.run_with_input("ip", &["-batch", "-"], &(commands.join("\n") + "\n"))
            .map(drop)
    }

    /// Waits until a device carries packets. The kernel tells its queues and bridges of a new carrier in the background,
    /// at most once a second when many devices come (`linkwatch` in `net/core`); until then what is sent is lost.
    ///
    /// # Errors
    /// When the device is not ready after some seconds.
    pub(crate) fn wait_for_link(&self, device: &str) -> Result<()> {
        let deadline = Instant::now() + LINK;
        loop {
            let state = self.ip(&format!("-oneline link show {device}"))?;
            if state.contains("state UP") {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "in {}: not up: {state}", self.name);
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Adds an address, as `add_address("10.10.1.50/32", "lo")`.
    ///
    /// # Errors
    /// When `ip` does not succeed.
    pub fn add_address(&self, address: &str, device: &str) -> Result<()> {
        self.ip(&format!("address add {address} dev {device}")).map(drop)
    }

    /// Removes an address again.
    ///
    /// # Errors
    /// When `ip` does not succeed.
    pub fn remove_address(&self, address: &str, device: &str) -> Result<()> {
        self.ip(&format!("address delete {address} dev {device}")).map(drop)
    }

    /// All addresses of the namespace's interfaces, `lo` included.
    ///
    /// # Errors
    /// When `ip` does not succeed or writes something unknown.
    pub fn addresses(&self) -> Result<Vec<IpAddr>> {
        let text = self.ip("-oneline address show")?;
        text.lines()
            .map(|line| {
                let mut words = line.split_whitespace().skip_while(|word| !word.starts_with("inet"));
                let address = words.nth(1).and_then(|word| word.split('/').next()).unwrap_or_default();
                address.parse().with_context(|| format!("no address in {line:?}"))
            })
            .collect()
    }

    /// Sets a sysctl of this network namespace, as `sysctl("net.ipv4.ip_forward", "1")`. Interface names with dots are
    /// written with slashes around: `net/ipv4/conf/flannel.1/rp_filter`.
    ///
    /// # Errors
    /// When there is no such sysctl, or the value is refused.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let key = if key.contains('/') {
            key.to_owned()
        } else {
            key.replace('.', "/")
        };
        let path = Path::new("/proc/sys").join(key);
        self.within(|| fs::write(&path, value))?
            .with_context(|| format!("writing {value} to {} in {}", path.display(), self.name))
    }

    /// The packet-filter rules of this namespace.
    ///
    /// # Errors
    /// See [`Ruleset::read`].
    pub fn ruleset(&self) -> Result<Ruleset> {
        Ruleset::read(self)
    }
}

/// Takes the child, between fork and exec, to where it belongs.
fn enter(netns: &File, cgroup: Option<&File>, parent: Pid) -> io::Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != parent {
        // The parent died before the call above: no signal will come.
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    if let Some(cgroup) = cgroup {
        write(cgroup, b"0")?;
    }
    setns(netns, CloneFlags::CLONE_NEWNET)?;
    Ok(())
}
