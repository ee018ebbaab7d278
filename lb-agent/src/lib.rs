//! The agent of lb: reads Services and endpoints, decides which backends serve which destination, and makes the kernel's
//! maps say so.
//!
//! ```text
//! source -> index -> policy -> desired -> diff -> reconcile (apply) -> maps
//! ```
//!
//! Arrows go one way. What decides (`index`, [`policy`], [`desired`], `diff`, `verify`) is synchronous and pure.
#![deny(unsafe_code)]

mod actual;
mod alloc;
pub mod cli;
mod clock;
pub mod config;
pub mod desired;
mod diff;
mod explain;
pub mod face;
#[cfg(test)]
mod fuzz;
mod index;
pub mod intern;
mod keyed;
pub mod loader;
pub mod maps;
mod memory;
pub mod model;
pub mod node;
pub mod nodes;
mod owner;
pub mod policy;
pub mod reconcile;
pub mod source;
#[cfg(test)]
mod testing;
pub mod verify;
