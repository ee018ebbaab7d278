//! Memory and BPF programs of processes, read from /proc.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use anyhow::{Context as _, Result};

/// Returns a field of this process's /proc/PID/status that is in kibibytes, in bytes.
pub(crate) fn status_bytes(field: &str) -> Result<u64> {
    status_bytes_of(std::process::id(), field)
}

/// Returns a field of the /proc/PID/status of a process that is in kibibytes, in bytes.
pub(crate) fn status_bytes_of(process: u32, field: &str) -> Result<u64> {
    let path = format!("/proc/{process}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let kib = value(&text, field).with_context(|| format!("no {field} in {path}"))?;
    Ok(kib * 1024)
}

/// Returns the bytes of kernel memory of all BPF maps that this process has open, each map once.
pub(crate) fn map_bytes() -> Result<u64> {
    let mut maps = BTreeMap::new();
    for entry in fs::read_dir("/proc/self/fdinfo").context("reading /proc/self/fdinfo")? {
        // One of the entries is the descriptor of this folder itself, which may be closed by now.
        let Ok(text) = fs::read_to_string(entry?.path()) else {
            continue;
        };
        if let (Some(id), Some(bytes)) = (value(&text, "map_id"), value(&text, "memlock")) {
            maps.insert(id, bytes);
        }
    }
    Ok(maps.values().sum())
}

/// Returns the kernel's ids of all BPF programs that a process has open. Descriptors that it closes meanwhile are left out.
pub(crate) fn program_ids_of(process: u32) -> BTreeSet<u32> {
    let entries = fs::read_dir(format!("/proc/{process}/fdinfo"))
        .into_iter()
        .flatten()
        .flatten();
    let texts = entries.filter_map(|entry| fs::read_to_string(entry.path()).ok());
    texts
        .filter_map(|text| value(&text, "prog_id")?.try_into().ok())
        .collect()
}

/// Returns the bytes of BPF maps that this process has mapped into its memory. They count as resident memory of the process
/// and as kernel memory of the maps.
pub(crate) fn mapped_map_bytes() -> Result<u64> {
    mapped_map_bytes_of(std::process::id())
}

/// Returns the bytes of BPF maps that a process has mapped into its memory.
pub(crate) fn mapped_map_bytes_of(process: u32) -> Result<u64> {
    let path = format!("/proc/{process}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    Ok(resident_of(&text, "bpf-map") * 1024)
}

/// Sums up `Rss` over the mappings with a first line that ends with `name`; see proc_pid_smaps(5).
fn resident_of(smaps: &str, name: &str) -> u64 {
    let (mut sum, mut is_named) = (0, false);
    for line in smaps.lines() {
        let first = line.split_whitespace().next().unwrap_or_default();
        if !first.ends_with(':') {
            is_named = line.ends_with(name);
        } else if is_named && first == "Rss:" {
            sum += value(line, "Rss").unwrap_or(0);
        }
    }
    sum
}

/// Returns the number in the line `field: number`.
fn value(text: &str, field: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let rest = line.strip_prefix(field)?.strip_prefix(':')?;
        rest.split_whitespace().next()?.parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_proc_are_parsed() {
        let text = "VmRSSx:\t1\nVmRSS:\t  123 kB\nmap_id:\t7\n";
        assert_eq!(value(text, "VmRSS"), Some(123));
        assert_eq!(value(text, "map_id"), Some(7));
        assert_eq!(value(text, "memlock"), None);
    }

    #[test]
    fn mapped_maps_are_found_by_their_name() {
        let text = "7f00-7f01 rw-s 00000000 00:0e 9 anon_inode:bpf-map\nSize:  8 kB\nRss:   4 kB\n\
                    7f02-7f03 rw-p 00000000 00:00 0 [heap]\nSize: 16 kB\nRss:  16 kB\n\
                    7f04-7f05 rw-s 00000000 00:0e 9 anon_inode:bpf-map\nRss:  12 kB\n";
        assert_eq!(resident_of(text, "bpf-map"), 16);
        assert_eq!(resident_of(text, "[heap]"), 16);
    }
}
