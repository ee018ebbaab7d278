//! The test bed of lb: clusters made of network namespaces and cgroups on one Linux machine.
//!
//! A [`Cluster`] has nodes, pods and outside clients. The nodes are joined by VXLAN or plain routes, laid out as flannel
//! does it, and each has a bridge for its pods. Each node has its own cgroup2 directory, because cgroup hooks act per
//! cgroup and not per network namespace. Nothing in a cluster has a route out of the machine. Dropping a cluster removes
//! everything, also after a panic; [`remove_leftovers`] removes the leftovers of a killed process.
//!
//! ```no_run
//! use lb_tests::{Cluster, Connect, Underlay, testbed};
//!
//! # fn main() -> anyhow::Result<()> {
//! let cluster = Cluster::builder().nodes(2).underlay(Underlay::Vxlan).build()?;
//! let (a, b) = (cluster.add_pod("n1", "a")?, cluster.add_pod("n2", "b")?);
//! let _server = testbed().serve(&b, &["0.0.0.0:8080=b"])?;
//! let summary = testbed().connect(&a, &Connect::to(&[b.socket(8080)]).count(10))?;
//! assert_eq!(summary.per_backend["b"], 10);
//! # Ok(())
//! # }
//! ```
//!
//! Everything here needs root and iproute2. This library uses lb-agent only as a program ([`Agent`]).

mod agent;
mod cleanup;
mod cluster;
mod downtime_log;
mod mounts;
mod netns;
mod process;
mod random;
mod ruleset;
mod statistics;
mod timing;

#[cfg(feature = "kubernetes")]
pub mod control_plane;
pub mod demo;
pub mod fixture;
pub mod http;
pub mod load;
pub mod manifests;
#[cfg(feature = "kubernetes")]
pub mod runtime;
pub mod scripted_socket;
pub mod workload;

pub use agent::{Agent, DeviceStatus, Problem, RunningAgent, Status, unit_capabilities};
pub use cleanup::remove_leftovers;
pub use cluster::{Client, Cluster, ClusterBuilder, Node, Pod, Underlay};
pub use downtime_log::DowntimeLog;
pub use load::{Connect, HeldConnections, Load, Testbed, testbed};
pub use mounts::{BPFFS, cgroup2_root, ensure_bpffs};
pub use netns::Netns;
pub use process::Process;
pub use random::Random;
pub use ruleset::Ruleset;
pub use scripted_socket::{CallResult, ScriptedSocket, SocketCall, SocketChurn, SocketKind};
pub use statistics::chi_squared_p;
pub use timing::{
    eventually, eventually_within, pause_between_polls, scaled_count, scaled_count_above, scaled_timeout,
    timeout_factor,
};

use std::net::SocketAddr;

use anyhow::ensure;
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Uid;

/// Checks that this process runs as root.
///
/// # Errors
/// If the effective user is not root.
fn require_root() -> anyhow::Result<()> {
    ensure!(
        Uid::effective().is_root(),
        "the test bed creates network namespaces and cgroups: run it as root"
    );
    Ok(())
}

/// Parses a socket address such as `10.96.0.10:53` or `[fd00:96::10]:53`.
///
/// # Panics
/// If `text` is not a socket address.
#[must_use]
pub fn addr(text: &str) -> SocketAddr {
    text.parse()
        .unwrap_or_else(|error| panic!("{text:?} is not a socket address: {error}"))
}

/// Returns nanoseconds of `CLOCK_MONOTONIC`, the clock of every timestamp in [`load`]. All processes share it.
///
/// # Panics
/// Never on Linux, which always has that clock.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("CLOCK_MONOTONIC exists");
    let seconds = u64::try_from(now.tv_sec()).unwrap_or_default();
    let nanoseconds = u64::try_from(now.tv_nsec()).unwrap_or_default();
    seconds * 1_000_000_000 + nanoseconds
}
