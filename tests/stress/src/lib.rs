//! Lookups from every CPU while the maps of lb change in every way that they do: no lookup of a frontend that is always
//! there may miss, and none may end at a stranger's backend.
//!
//! The product is taken as it is: its loader, its maps, its reconciler ([`InProcessAgent`]). The lookups are made by a program in
//! the kernel (`lb-probe`), which reads the same maps in the same order as lb's own programs and judges what it finds;
//! [`run`] puts the two together.

pub mod objects;

mod counter;
mod in_process_agent;
mod probe;
mod run;
mod workload;

pub use counter::Counter;
pub use in_process_agent::{CAPACITIES, InProcessAgent, NODE};
pub use probe::{LookupCounts, Probe};
pub use run::{Options, Progress, Report, run};
pub use workload::ChangeKind;
