//! Network namespaces of the test bed, most of them with a cgroup for their processes.

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

/// Time limit for a device to carry packets.
const LINK: Duration = Duration::from_secs(10);

/// Runs `work` on a new thread in the network namespace `netns` and returns its result. A panic of `work` continues in the
/// caller.
fn in_netns<T: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> T + Send) -> Result<T> {
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

/// A network namespace and the cgroup of its processes.
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

    /// The short name: the name of the node, pod or client.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The full name, as `ip netns` lists it.
    #[must_use]
    pub fn netns_name(&self) -> &str {
        &self.netns
    }

    /// The cgroup2 directory that processes of this namespace join.
    #[must_use]
    pub fn process_cgroup(&self) -> Option<&Path> {
        self.cgroup.as_deref()
    }

    /// Opens the network namespace. The returned file keeps the namespace alive.
    ///
    /// # Errors
    /// If the namespace does not exist any more.
    pub fn open(&self) -> Result<File> {
        let path = Path::new(NETNS_DIRECTORY).join(&self.netns);
        File::open(&path).with_context(|| format!("opening {}", path.display()))
    }

    /// Runs `work` on a new thread in this network namespace, but in the caller's cgroup.
    ///
    /// Sockets that `work` opens belong to the namespace and may leave the closure. Do not spawn child processes in `work`:
    /// [`Self::command`] ties the lifetime of a child to the thread that spawns it.
    ///
    /// # Errors
    /// If the namespace cannot be entered.
    ///
    /// # Panics
    /// If `work` panics, with its payload.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        in_netns(self.open()?.as_fd(), work)
    }

    /// Returns the index of a network device.
    ///
    /// # Errors
    /// If there is no device of this name.
    pub fn device_index(&self, device: &str) -> Result<u32> {
        self.within(|| nix::net::if_::if_nametoindex(device))?
            .with_context(|| format!("the index of {device}"))
    }

    /// Returns a command that runs in this network namespace and cgroup, with the machine's own mounts.
    ///
    /// The process dies with the *thread* that spawns it (`PR_SET_PDEATHSIG`), so that nothing outlives a test: spawn it
    /// from the test's thread. Processes that it forks do not die with that thread; dropping the cluster finds them by
    /// their cgroup.
    ///
    /// # Errors
    /// If the namespace or the cgroup does not exist any more.
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
        // SAFETY: between fork and exec, `enter` only makes system calls; it neither allocates nor takes a lock.
        unsafe { command.pre_exec(move || enter(&netns, cgroup.as_ref(), parent)) };
        Ok(command)
    }

    /// Runs a program in this namespace until it exits and returns its standard output.
    ///
    /// # Errors
    /// If the program cannot be run or fails; the message contains its standard error.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        self.run_with_input(program, arguments, "")
    }

    /// Runs a program like [`Self::run`], with text for its standard input. The text must be small, because it is written
    /// before any output is read.
    ///
    /// # Errors
    /// If the program cannot be run or fails; the message contains its standard error.
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
                // The program exited without reading its input: its exit status has the reason.
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

    /// Runs `ip` in this namespace with blank-separated arguments, for example `ip("route add 10.96.0.0/16 dev eth0")`.
    ///
    /// # Errors
    /// If `ip` fails.
    pub fn ip(&self, arguments: &str) -> Result<String> {
        self.run("ip", &arguments.split_whitespace().collect::<Vec<_>>())
    }

    /// Runs several `ip` commands in one process, up to the first that fails.
    ///
    /// # Errors
    /// If one of the commands fails.
    pub fn ip_batch(&self, commands: &[String]) -> Result<()> {
        self.run_with_input("ip", &["-batch", "-"], &(commands.join("\n") + "\n"))
            .map(drop)
    }

    /// Waits until a device carries packets. The kernel notifies queues and bridges of a new carrier in the background, at
    /// most once a second when many devices come up (`linkwatch` in `net/core`). Packets sent before that are lost.
    ///
    /// # Errors
    /// If the device is not ready within the time limit.
    pub(crate) fn wait_for_link(&self, device: &str) -> Result<()> {
        let deadline = Instant::now() + LINK;
        loop {
            let state = self.ip(&format!("-oneline link show {device}"))?;
            if state.contains("state UP") {
                return Ok(());
            }
            ensure!(
                Instant::now() < deadline,
                "{device} in {} is not up: {state}",
                self.name
            );
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Adds an address to a device, for example `add_address("10.10.1.50/32", "lo")`.
    ///
    /// # Errors
    /// If `ip` fails.
    pub fn add_address(&self, address: &str, device: &str) -> Result<()> {
        self.ip(&format!("address add {address} dev {device}")).map(drop)
    }

    /// Removes an address from a device.
    ///
    /// # Errors
    /// If `ip` fails.
    pub fn remove_address(&self, address: &str, device: &str) -> Result<()> {
        self.ip(&format!("address delete {address} dev {device}")).map(drop)
    }

    /// Returns all addresses of the namespace's interfaces, including `lo`.
    ///
    /// # Errors
    /// If `ip` fails or its output cannot be parsed.
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

    /// Sets a sysctl of this network namespace, for example `sysctl("net.ipv4.ip_forward", "1")`. A key with an interface
    /// name that contains a dot is written with slashes: `net/ipv4/conf/flannel.1/rp_filter`.
    ///
    /// # Errors
    /// If the sysctl does not exist, or the kernel refuses the value.
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

    /// Returns the packet-filter rules of this namespace.
    ///
    /// # Errors
    /// If [`Ruleset::read`] fails.
    pub fn ruleset(&self) -> Result<Ruleset> {
        Ruleset::read(self)
    }
}

/// Moves the child process into the cgroup and the namespace, between fork and exec.
fn enter(netns: &File, cgroup: Option<&File>, parent: Pid) -> io::Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    if getppid() != parent {
        // The parent died before `set_pdeathsig`: no signal will arrive.
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    if let Some(cgroup) = cgroup {
        write(cgroup, b"0")?;
    }
    setns(netns, CloneFlags::CLONE_NEWNET)?;
    Ok(())
}
