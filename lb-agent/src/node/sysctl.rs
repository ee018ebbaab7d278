//! The location of the kernel's network settings.

use std::path::{Path, PathBuf};

/// In a container the machine's settings, mounted by the manifest, since the container's own /proc/sys is read-only.
/// The network namespace is in either case that of the thread that opens a file.
const SYSCTLS: [&str; 2] = ["/host/proc/sys/net", "/proc/sys/net"];

/// The folder `net` of settings.
pub(super) fn net() -> PathBuf {
    let [mounted, own] = SYSCTLS.map(Path::new);
    if mounted.is_dir() { mounted } else { own }.to_owned()
}
