//! Names of everything that the test bed creates, and its removal.
//!
//! The names of network namespaces, cgroups, pin directories and scratch directories begin with
//! `lbt-<pid>-<sequence>-<start>-`: the id of the process that owns them, a number that grows with each cluster of that
//! process, and the start time of the process in clock ticks after boot (field 22 of `/proc/<pid>/stat`). The start time
//! distinguishes the owner from a later process with the same id.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::mounts::{BPFFS, cgroup2_root, has_bpffs};
use crate::scaled_timeout;

/// Directory in which iproute2 keeps named network namespaces.
pub(crate) const NETNS_DIRECTORY: &str = "/run/netns";

/// Time limit for killed processes to leave their cgroup.
const EXIT_TIMEOUT: Duration = Duration::from_secs(10);

/// Returns the name prefix of a new cluster of this process, including the dash at its end.
pub(crate) fn new_prefix() -> Result<String> {
    static SEQUENCE: AtomicU32 = AtomicU32::new(0);
    let pid = std::process::id();
    let start = start_time(pid).context("reading the start time of this process from /proc")?;
    let sequence = SEQUENCE.fetch_add(1, Ordering::Relaxed);
    Ok(format!("lbt-{pid}-{sequence}-{start}-"))
}

/// Removes every namespace, cgroup (with its processes), pin directory and scratch directory of a test bed after the end
/// of its owner, and returns their names. Test beds of running processes are left alone.
///
/// # Errors
/// If an item cannot be removed; the others are removed nevertheless.
pub fn remove_leftovers() -> Result<Vec<String>> {
    crate::require_root()?;
    remove(|name| parse_owner(name).is_some_and(|(pid, start)| start_time(pid) != Some(start)))
}

/// Removes everything whose name satisfies `selected`. The order ensures that an item is not in use when it is removed.
pub(crate) fn remove(selected: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let cgroups = matching(&cgroup2_root()?, &selected)?;
    let pins = if has_bpffs()? {
        matching(Path::new(BPFFS), &selected)?
    } else {
        Vec::new()
    };
    let namespaces = matching(Path::new(NETNS_DIRECTORY), &selected)?;
    let scratch = matching(&std::env::temp_dir(), &selected)?;

    let mut errors = Vec::new();
    let mut act = |path: &Path, action: fn(&Path) -> Result<()>| {
        errors.extend(until_gone(path, action).err());
    };
    // Kill the processes of all cgroups before removing anything.
    for path in &cgroups {
        act(path, kill_processes);
    }
    for path in pins.iter().chain(&scratch) {
        act(path, |path| {
            fs::remove_dir_all(path).with_context(|| format!("removing {}", path.display()))
        });
    }
    for path in &namespaces {
        act(path, remove_netns);
    }
    for path in &cgroups {
        act(path, remove_cgroup);
    }

    let mut names: Vec<String> = [cgroups, pins, namespaces, scratch]
        .iter()
        .flatten()
        .filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()))
        .collect();
    names.sort();
    names.dedup();
    if errors.is_empty() {
        return Ok(names);
    }
    let errors: Vec<String> = errors.iter().map(|error| format!("{error:#}")).collect();
    bail!("{}", errors.join("; "))
}

/// Runs a removal until the path does not exist. Another process may remove the same leftovers at the same time, so a path
/// that is gone is a success, and a failure on one that exists is tried again.
fn until_gone(path: &Path, action: fn(&Path) -> Result<()>) -> Result<()> {
    let mut attempts = 5;
    loop {
        attempts -= 1;
        match action(path) {
            Err(error) if attempts == 0 && path.exists() => return Err(error),
            Err(_) if path.exists() => thread::sleep(Duration::from_millis(20)),
            _ => return Ok(()),
        }
    }
}

/// Kills every process in the cgroup and below, and waits until all have ended.
pub(crate) fn kill_processes(cgroup: &Path) -> Result<()> {
    let switch = cgroup.join("cgroup.kill");
    let deadline = Instant::now() + scaled_timeout(EXIT_TIMEOUT);
    loop {
        match fs::write(&switch, "1") {
            // Kernels before Linux 5.14 do not have cgroup.kill.
            Err(error) if error.kind() == io::ErrorKind::NotFound => kill_one_by_one(cgroup)?,
            result => result.with_context(|| format!("writing {}", switch.display()))?,
        }
        let events = cgroup.join("cgroup.events");
        let text = fs::read_to_string(&events).with_context(|| format!("reading {}", events.display()))?;
        if text.lines().any(|line| line == "populated 0") {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!("killed processes in {} have not ended in time", cgroup.display());
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Removes a cgroup and its children. Their processes must have ended.
pub(crate) fn remove_cgroup(cgroup: &Path) -> Result<()> {
    for child in directories(cgroup)? {
        remove_cgroup(&child)?;
    }
    let deadline = Instant::now() + scaled_timeout(EXIT_TIMEOUT);
    loop {
        match fs::remove_dir(cgroup) {
            // An exiting process still holds the cgroup.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(1));
            }
            result => return result.with_context(|| format!("removing {}", cgroup.display())),
        }
    }
}

/// Removes a named network namespace, as `ip netns delete` does.
pub(crate) fn remove_netns(path: &Path) -> Result<()> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            // Nothing is mounted there any more.
            Err(Errno::EINVAL) => break,
            Err(errno) => {
                return Err(errno).with_context(|| format!("unmounting {}", path.display()));
            }
        }
    }
    fs::remove_file(path).with_context(|| format!("removing {}", path.display()))
}

fn kill_one_by_one(cgroup: &Path) -> Result<()> {
    for child in directories(cgroup)? {
        kill_one_by_one(&child)?;
    }
    let path = cgroup.join("cgroup.procs");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    for pid in text
        .lines()
        .filter_map(|line| line.parse::<i32>().ok())
        .filter(|&pid| pid > 0)
    {
        match kill(Pid::from_raw(pid), Signal::SIGKILL) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(errno) => return Err(errno).with_context(|| format!("killing {pid}")),
        }
    }
    Ok(())
}

/// Returns the directories in a directory.
fn directories(path: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path).with_context(|| format!("listing {}", path.display()))? {
        let entry = entry.with_context(|| format!("listing {}", path.display()))?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Returns the entries of a directory whose name satisfies `selected`; none if the directory does not exist.
fn matching(directory: &Path, selected: &impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        result => result.with_context(|| format!("listing {}", directory.display()))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("listing {}", directory.display()))?;
        if entry.file_name().to_str().is_some_and(selected) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Parses the process id and the start time of the owner in a name.
fn parse_owner(name: &str) -> Option<(u32, u64)> {
    let mut words = name.strip_prefix("lbt-")?.splitn(4, '-');
    let pid = words.next()?.parse().ok()?;
    let _sequence: u32 = words.next()?.parse().ok()?;
    let start = words.next()?.parse().ok()?;
    words.next()?;
    Some((pid, start))
}

/// Returns the start time of a running process in clock ticks after boot. A zombie does not run.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, which may itself contain blanks and parentheses.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?;
    if matches!(state, "Z" | "X") {
        return None;
    }
    // `state` is field 3, the start time field 22.
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_contain_their_owner() {
        assert_eq!(parse_owner("lbt-12-0-3456-n1"), Some((12, 3456)));
        assert_eq!(parse_owner("lbt-12-0-3456-n1-pod-a"), Some((12, 3456)));
        for foreign in ["lbt-12-0-3456", "lbt-x-0-1-n1", "lb-1-2-3-n1", "n1", "lbt-1-2-n1-x"] {
            assert_eq!(parse_owner(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn prefixes_are_unique_and_contain_this_process() {
        let prefix = new_prefix().unwrap();
        let (pid, start) = parse_owner(&format!("{prefix}n1")).unwrap();
        assert_eq!(pid, std::process::id());
        assert_eq!(start_time(pid), Some(start));
        assert_ne!(new_prefix().unwrap(), prefix);
    }
}
