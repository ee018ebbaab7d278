//! Types and decisions that the kernel programs and the agent share.
//!
//! - [`abi`]: every type that crosses the kernel boundary. Their layout is a contract between builds, since maps
//!   outlive the agent that made them.
//! - [`logic`]: the decisions of the data plane, pure functions of values. The kernel programs call them, and so do the
//!   agent's `explain` and the tests, so the two cannot disagree.
#![no_std]
#![forbid(unsafe_code)]

pub mod abi;
pub mod errno;
pub mod logic;
mod mix;
