//! The agent of lb: reads Services and endpoints, decides which backends serve which destination, and makes the kernel's
//! maps say so.
//!
//! ```text
//! source -> index -> policy -> desired -> diff -> reconcile (apply) -> maps
//! ```
//!
//! Arrows go one way. What decides (`index`, [`policy`], [`desired`], `diff`, `verify`) is synchronous and pure.
#![deny(unsafe_code)]

pub mod cli;
mod clock;
pub mod config;
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
