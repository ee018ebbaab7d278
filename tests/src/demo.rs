//! The demo of `cargo xtask run`: two nodes, pods with nginx, lb-agent on each node, and clients that send requests to the
//! cluster IPs and node ports by curl.
//!
//! The nodes, pods and Services are those of the manifests that the agents read: the demo creates a pod for every
//! endpoint.

mod check;
mod cluster;
mod curl;
mod live;
mod manifests;
mod signals;

use std::io::{Write as _, stdout};
use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};

use cluster::DemoCluster;

/// Options of the demo.
#[derive(Debug, Clone)]
pub struct Options {
    /// Path of the `lb-agent` binary.
    pub agent: PathBuf,
    /// Path of the `lb-testbed` binary.
    pub testbed: PathBuf,
    /// Directory of manifests: `examples`.
    pub examples: PathBuf,
    /// Check the demo for a few seconds, without a terminal, instead of showing the live table.
    pub check: bool,
    /// End the live table after this many seconds instead of waiting for Ctrl-C.
    pub seconds: Option<u64>,
}

/// Runs the demo until Ctrl-C (or SIGTERM, SIGHUP), or runs its check. Returns whether every response was right.
///
/// Everything that the demo has created is removed when it returns, also after an error.
///
/// # Errors
/// If the demo cannot be set up: this process is not root, a program is missing, or an agent is not ready in time.
pub fn run(options: &Options) -> Result<bool> {
    crate::require_root()?;
    for program in ["ip", "bridge", "nginx", "curl"] {
        which::which(program)
            .with_context(|| format!("the demo needs {program}: install iproute2, nginx-light and curl"))?;
    }
    let signals = signals::Signals::install()?;
    let leftovers = crate::remove_leftovers()?.len();
    if leftovers > 0 {
        print_line(&format!("removed {leftovers} leftovers of an earlier run"))?;
    }
    let result = DemoCluster::set_up(options, &signals).and_then(|mut demo| {
        if options.check {
            check::run(&mut demo, &signals)
        } else {
            live::run(&demo, options.seconds, &signals)
        }
    });
    // A signal from the terminal also ends the processes in the cluster, so errors are expected then.
    if signals.arrived() && options.check {
        bail!("interrupted; everything was removed");
    }
    if signals.arrived() {
        return Ok(true);
    }
    result
}

/// Writes a line to standard output. Unlike `println!` it does not panic if the reader has closed the pipe, so that
/// everything is cleaned up.
fn print_line(line: &str) -> Result<()> {
    writeln!(stdout().lock(), "{line}").context("writing to standard output")
}
