//! The maps in the kernel: what implements [`lb_core::maps::Maps`], and handles for the agent's threads and commands that
//! read them next to the reconciler.

mod batch;
pub mod bpf;
pub mod ct;
mod devices;
pub(crate) mod gate;
pub mod grace;
pub(crate) mod moves;
pub(crate) mod old;
pub(crate) mod records;
pub(crate) mod sys;
