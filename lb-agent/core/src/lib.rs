//! The deciding part of lb's agent: from Kubernetes objects to the contents of the maps.
//!
//! ```text
//! index -> policy -> desired -> state -> plan -> writer -> maps
//! ```
//!
//! - [`reconcile`] is the entry point: it owns the [`state`] and the writer.
//! - [`model`] has the input: objects of the API, and batches of their changes.
//! - `index` relates the objects, [`policy`] chooses endpoints, [`desired`] and [`nodes`] derive the content of the maps.
//! - `plan` compares it with `actual`, the record of the maps' content, and allocates by `alloc`. The writer executes plans.
//! - [`verify`] and [`explain`] read a copy of the maps ([`maps::Dump`]).
//!
//! Nothing here loads a program, opens a map, watches a cluster or reads a clock: this crate has neither aya nor tokio nor
//! kube among its dependencies. The maps are a trait ([`maps::Maps`]) that `lb-agent` implements for the kernel.
#![forbid(unsafe_code)]

mod actual;
mod alloc;
mod by_key;
pub mod desired;
pub mod explain;
mod index;
pub mod intern;
pub mod maps;
pub mod model;
pub mod names;
pub mod nodes;
pub mod places;
mod plan;
pub mod policy;
pub mod reconcile;
pub mod state;
pub mod sync;
#[cfg(any(test, feature = "test-support"))]
pub mod testing;
pub mod verify;
mod writer;
