//! The agent's OOM score.

use std::fs;
use std::io;

/// kube-proxy's score: killed nearly last.
pub const DEFAULT: i32 = -999;

/// Sets the score of this process, -1000 (never killed) to 1000. A decrease needs CAP_SYS_RESOURCE.
///
/// # Errors
/// Returns the error of the system call.
pub fn set_score(score: i32) -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", score.to_string())
}
