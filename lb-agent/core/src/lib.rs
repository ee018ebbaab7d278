//! The deciding part of lb's agent: from Kubernetes objects to the contents of the maps.
//!
//! ```text
//! index -> policy -> desired -> state -> plan -> writer -> maps
//! ```
//!
//! Nothing here loads a program, opens a map, watches a cluster or reads a clock: this crate has neither aya nor tokio nor
//! kube among its dependencies. The maps are a trait ([`maps::Maps`]) that `lb-agent` implements for the kernel.
#![forbid(unsafe_code)]

mod actual;
mod alloc;
pub mod by_key;
pub mod desired;
pub mod explain;
mod index;
pub mod intern;
pub mod maps;
pub mod model;
pub mod names;
pub mod nodes;
mod plan;
pub mod policy;
pub mod reconcile;
pub mod state;
pub mod sync;
#[cfg(any(test, feature = "test-support"))]
pub mod testing;
pub mod verify;
mod writer;
