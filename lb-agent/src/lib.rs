//! The agent of lb: reads Services and endpoints, and writes the backends of each destination to the kernel's maps.
//!
//! ```text
//! source -> lb_core (index -> policy -> desired -> state -> plan -> writer) -> maps
//! ```
//!
//! The deciding part is the crate `lb-core`, which is synchronous and pure. Modules depend on each other in one direction, from
//! top to bottom:
//!
//! - [`cli`]: arguments and output of every subcommand; `lb-agent run` calls the daemon.
//! - [`daemon`]: the loop that connects everything below.
//! - [`config`] (kube-proxy's configuration file) and [`k8s_events`] (Kubernetes Events).
//! - [`server`]: HTTP servers for health and metrics.
//! - [`loader`]: loads, pins and attaches programs.
//! - [`node`]: devices, addresses, sockets and settings of the node, and the CT garbage collector.
//! - [`maps`]: the pinned maps.
//! - [`source`]: objects from the API server or from manifests. It uses none of the others.
#![deny(unsafe_code)]

pub mod cli;
mod clock;
pub mod config;
pub mod daemon;
mod ebpf_log;
#[cfg(test)]
mod fuzz;
pub mod heap;
pub mod k8s_events;
pub mod loader;
pub mod maps;
pub mod node;
pub mod server;
pub mod source;
