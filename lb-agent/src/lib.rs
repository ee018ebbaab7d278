//! The agent of lb: reads Services and endpoints, and writes the backends of each destination to the kernel's maps.
//!
//! ```text
//! source -> lb_core (index -> policy -> desired -> state -> plan -> writer) -> maps
//! ```
//!
//! Modules depend on each other in one direction: [`cli`] on [`daemon`], the daemon on [`server`], [`k8s_events`] and
//! [`config`], and these on [`source`], [`node`], [`loader`] and [`maps`]. The deciding part is the crate `lb-core`, which
//! is synchronous and pure.
#![deny(unsafe_code)]

pub mod cli;
mod clock;
pub mod config;
pub mod daemon;
mod ebpf_log;
#[cfg(test)]
mod fuzz;
mod heap;
pub mod k8s_events;
pub mod loader;
pub mod maps;
pub mod node;
pub mod server;
pub mod source;
