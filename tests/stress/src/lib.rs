//! Lookups from every CPU while the maps of lb change in every way that they do: no lookup of a frontend that is always
//! there may miss, and none may end at a stranger's backend.
//!
//! The product is taken as it is: its loader, its maps, its reconciler ([`Site`]). The lookups are made by a program in
//! the kernel (`lb-probe`), which reads the same maps in the same order as lb's own programs and judges what it finds;
//! [`run`] puts the two together.

pub mod objects;

mod counter;
mod probe;
mod run;
mod site;
mod world;

pub use counter::Counter;
pub use probe::{Answers, Probe};
pub use run::{Options, Outcome, Progress, run};
pub use site::{CAPACITIES, NODE, Site};
pub use world::Kind;
