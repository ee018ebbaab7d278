//! Names of everything that the bed makes, and their removal.
//!
//! Network namespaces, cgroups, pin directories and scratch directories begin with
//! `lbt-<pid>-<sequence>-<start>-`: the process that owns them, a number that grows with each cluster of that process,
//! and the start time of the process in clock ticks after boot (field 22 of `/proc/<pid>/stat`), so that a process id
//! that was handed out again is not taken for the owner.

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

/// Where iproute2 keeps named network namespaces.
pub(crate) const NETNS_DIRECTORY: &str = "/run/netns";

/// How long killed processes may take to leave their cgroup.
const PATIENCE: Duration = Duration::from_secs(10);

/// The name prefix of a new cluster of this process, with the dash at its end.
pub(crate) fn new_prefix() -> Result<String> {
    static SEQUENCE: AtomicU32 = AtomicU32::new(0);
    let pid = std::process::id();
    let start = start_time(pid).context("this process is not in /proc")?;
    let sequence = SEQUENCE.fetch_add(1, Ordering::Relaxed);
    Ok(format!("lbt-{pid}-{sequence}-{start}-"))
}

/// Removes every namespace, cgroup (with its processes), pin directory and scratch directory of test beds whose owner
/// is dead, and returns their names. What belongs to a living process is left alone.
///
/// # Errors
/// When something cannot be removed; the rest is removed nevertheless.
pub fn remove_leftovers() -> Result<Vec<String>> {
    crate::require_root()?;
    remove(|name| owner(name).is_some_and(|(pid, start)| start_time(pid) != Some(start)))
}

/// Removes everything whose name satisfies `doomed`, in the order in which nothing is in use.
pub(crate) fn remove(doomed: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let cgroups = matching(&cgroup2_root()?, &doomed)?;
    let pins = if has_bpffs()? {
        matching(Path::new(BPFFS), &doomed)?
    } else {
        Vec::new()
    };
    let namespaces = matching(Path::new(NETNS_DIRECTORY), &doomed)?;
    let scratch = matching(&std::env::temp_dir(), &doomed)?;

    let mut errors = Vec::new();
    let mut act = |path: &Path, action: fn(&Path) -> Result<()>| {
        errors.extend(until_gone(path, action).err());
    };
    // Kill in all of them before waiting for any.
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

/// Acts on a path. Another process may be removing the same leftovers: what is gone is as it should be, and what is
/// half gone is tried again.
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

/// Kills every process in the cgroup and below, and waits until none is left.
pub(crate) fn kill_processes(cgroup: &Path) -> Result<()> {
    let switch = cgroup.join("cgroup.kill");
    let deadline = Instant::now() + scaled_timeout(PATIENCE);
    loop {
        match fs::write(&switch, "1") {
            // Before Linux 5.14.
            Err(error) if error.kind() == io::ErrorKind::NotFound => kill_one_by_one(cgroup)?,
            result => result.with_context(|| format!("writing {}", switch.display()))?,
        }
        let events = cgroup.join("cgroup.events");
        let text = fs::read_to_string(&events).with_context(|| format!("reading {}", events.display()))?;
        if text.lines().any(|line| line == "populated 0") {
            return Ok(());
        }
        if Instant::now() >= deadline {
            bail!("processes in {} do not die", cgroup.display());
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Removes a cgroup and those below it. Nothing may run in them any more.
pub(crate) fn remove_cgroup(cgroup: &Path) -> Result<()> {
    for child in directories(cgroup)? {
        remove_cgroup(&child)?;
    }
    let deadline = Instant::now() + scaled_timeout(PATIENCE);
    loop {
        match fs::remove_dir(cgroup) {
            // A process that is on its last steps still holds it.
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(1));
            }
            result => return result.with_context(|| format!("removing {}", cgroup.display())),
        }
    }
}

/// What `ip netns delete` does.
pub(crate) fn remove_netns(path: &Path) -> Result<()> {
    loop {
        match umount2(path, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            // Nothing is mounted there (any more).
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

/// The directories in a directory.
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

/// The entries of a directory whose name satisfies `doomed`; none where there is no such directory.
fn matching(directory: &Path, doomed: &impl Fn(&str) -> bool) -> Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        result => result.with_context(|| format!("listing {}", directory.display()))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("listing {}", directory.display()))?;
        if entry.file_name().to_str().is_some_and(doomed) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Process id and start time of the owner that a name tells of.
fn owner(name: &str) -> Option<(u32, u64)> {
    let mut words = name.strip_prefix("lbt-")?.splitn(4, '-');
    let pid = words.next()?.parse().ok()?;
    let _sequence: u32 = words.next()?.parse().ok()?;
    let start = words.next()?.parse().ok()?;
    words.next()?;
    Some((pid, start))
}

/// When a living process was started, in clock ticks after boot. A zombie does not live.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is the program's name in parentheses, and may itself have blanks and parentheses.
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
    fn a_name_tells_its_owner() {
        assert_eq!(owner("lbt-12-0-3456-n1"), Some((12, 3456)));
        assert_eq!(owner("lbt-12-0-3456-n1-pod-a"), Some((12, 3456)));
        for foreign in ["lbt-12-0-3456", "lbt-x-0-1-n1", "lb-1-2-3-n1", "n1", "lbt-1-2-n1-x"] {
            assert_eq!(owner(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn this_process_has_a_start_time_and_its_prefix_is_its_own() {
        let prefix = new_prefix().unwrap();
        let (pid, start) = owner(&format!("{prefix}n1")).unwrap();
        assert_eq!(pid, std::process::id());
        assert_eq!(start_time(pid), Some(start));
        assert_ne!(new_prefix().unwrap(), prefix);
    }
}
