//! Memory of the machine, and what the agent's cgroups still allow.

use std::fs;
use std::io;

use lb_core::maps::memory::Memory;

use super::cgroup::MemoryCgroup;

const MEMINFO: &str = "/proc/meminfo";

/// Reads the memory of the machine, and what the agent's cgroup still allows if it is known.
///
/// # Errors
/// Returns an error if /proc/meminfo cannot be read. A cgroup that cannot be read has no limit.
pub(crate) fn read(cgroup: Option<&MemoryCgroup>) -> io::Result<Memory> {
    let machine = total(&fs::read_to_string(MEMINFO)?)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("{MEMINFO} lacks MemTotal")))?;
    let left = cgroup.and_then(MemoryCgroup::left);
    Ok(Memory { machine, left })
}

/// Returns the total memory in bytes from the text of /proc/meminfo.
fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
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
}
