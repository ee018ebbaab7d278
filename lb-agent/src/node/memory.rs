//! Memory of the machine, and what the agent's cgroups still allow.

use std::fs;
use std::io;
use std::path::Path;

use lb_core::maps::memory::Memory;

const MEMINFO: &str = "/proc/meminfo";

/// Reads the memory of the machine and of the cgroups of this process. `cgroup_root`: the mount point of the cgroup2
/// hierarchy, if there is one.
///
/// # Errors
/// Returns an error if /proc/meminfo cannot be read. Cgroups that cannot be read have no limit.
pub(crate) fn read(cgroup_root: Option<&Path>) -> io::Result<Memory> {
    let machine = total(&fs::read_to_string(MEMINFO)?)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{MEMINFO} lacks MemTotal")))?;
    let cgroup = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let left = cgroup_root
        .zip(own_cgroup(&cgroup))
        .and_then(|(root, own)| left(root, own));
    Ok(Memory { machine, left })
}

/// Returns the total memory in bytes from the text of /proc/meminfo.
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Returns the path of the cgroup in the cgroup2 hierarchy from the text of /proc/self/cgroup.
fn own_cgroup(text: &str) -> Option<&str> {
    text.lines().find_map(|line| line.strip_prefix("0::/"))
}

/// Returns the bytes that a cgroup and those above it still allow; `None` if none has a limit.
fn left(root: &Path, own: &str) -> Option<u64> {
    let dir = root.join(own);
    let dirs = dir.ancestors().take_while(|dir| dir.starts_with(root));
    dirs.filter_map(|dir| {
        let read = |file| fs::read_to_string(dir.join(file)).ok()?.trim().parse::<u64>().ok();
        // "max" is no number.
        let limit = read("memory.max")?;
        Some(limit.saturating_sub(read("memory.current")?))
    })
    .min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_of_the_machine_is_in_bytes() {
        let text = "MemTotal:       24684596 kB\nMemFree:         1000 kB\n";
        assert_eq!(total(text), Some(24_684_596 * 1024));
        assert_eq!(total("MemFree: 1 kB\n"), None);
        assert!(read(None).unwrap().machine > 1 << 20);
    }

    #[test]
    fn the_tightest_cgroup_decides() {
        let root = tempfile::tempdir().unwrap();
        let own = root.path().join("pods/agent");
        fs::create_dir_all(&own).unwrap();
        let write = |dir: &Path, max: &str, current: &str| {
            fs::write(dir.join("memory.max"), max).unwrap();
            fs::write(dir.join("memory.current"), current).unwrap();
        };
        let cgroup = "1:name=systemd:/x\n0::/pods/agent\n";
        let left = || left(root.path(), own_cgroup(cgroup).unwrap());
        assert_eq!(left(), None);
        write(&own, "max\n", "10\n");
        assert_eq!(left(), None);
        write(&own, "100\n", "30\n");
        assert_eq!(left(), Some(70));
        write(own.parent().unwrap(), "60\n", "50\n");
        assert_eq!(left(), Some(10));
        write(&own, "100\n", "130\n");
        assert_eq!(left(), Some(0));
    }
}
