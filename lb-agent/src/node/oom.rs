//! Whom the kernel kills when memory runs out.

use std::fs;
use std::io;

/// kube-proxy's: nearly the last.
pub const DEFAULT: i32 = -999;

/// Sets the score of this process, -1000 (never) to 1000. Less than it has needs CAP_SYS_RESOURCE.
///
/// # Errors
/// The system call's.
pub fn set_score(score: i32) -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", score.to_string())
}
