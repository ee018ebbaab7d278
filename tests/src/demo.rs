//! The demo behind `cargo xtask run`: two nodes, pods with nginx, lb-agent on each node, and clients that curl the
//! virtual addresses.
//!
//! Which nodes, pods and Services there are is read from the manifests that the agents get: the demo makes a pod for
//! every endpoint. NodePorts are not shown yet.

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

/// What the demo needs to know.
#[derive(Debug, Clone)]
pub struct Options {
    /// The `lb-agent` binary.
    pub agent: PathBuf,
    /// The `lb-testbed` binary.
    pub testbed: PathBuf,
    /// The folder of manifests: `examples`.
    pub examples: PathBuf,
    /// Verify for a few seconds, without a terminal, in place of the live table.
    pub check: bool,
    /// End the live table after so many seconds in place of waiting for Ctrl-C.
    pub seconds: Option<u64>,
}

/// Runs the demo until Ctrl-C (or SIGTERM, SIGHUP), or runs its check. Returns whether all was well.
///
/// Whatever happens, everything that it has made is removed when it returns.
///
/// # Errors
/// When the demo cannot be set up: not root, a program is missing, the agents do not get ready.
pub fn run(options: &Options) -> Result<bool> {
    crate::require_root()?;
    for program in ["ip", "bridge", "nginx", "curl"] {
        which::which(program)
            .with_context(|| format!("the demo needs {program}: install iproute2, nginx-light and curl"))?;
    }
    let signals = signals::Signals::install()?;
    let leftovers = crate::remove_leftovers()?.len();
    if leftovers > 0 {
        print_line(&format!("removed {leftovers} things that an earlier run had left over"))?;
    }
    let result = DemoCluster::set_up(options, &signals).and_then(|mut demo| {
        if options.check {
            check::run(&mut demo, &signals)
        } else {
            live::run(&demo, options.seconds, &signals)
        }
    });
    // A signal from the terminal also ends what runs in the cluster: errors from that are no news.
    if signals.arrived() && options.check {
        bail!("interrupted; everything is removed");
    }
    if signals.arrived() {
        return Ok(true);
    }
    result
}

/// Writes a line to standard output. Unlike `println!` it does not panic when nobody reads, so that all is cleaned up.
fn print_line(line: &str) -> Result<()> {
    writeln!(stdout().lock(), "{line}").context("writing to standard output")
}
