//! Looks frontends up on every CPU while the maps of lb change in every way. No lookup of a frontend that always exists may
//! miss, and none may find a backend of another Service.
//!
//! The test uses lb-agent's own loader, maps and reconciler ([`InProcessAgent`]). A kernel program (`lb-probe`) makes the
//! lookups: it reads the same maps in the same order as lb's own programs and checks the values. [`run`] runs both. In between,
//! it can replace the maps by larger and smaller ones.

pub mod objects;

mod counter;
mod in_process_agent;
mod probe;
mod resize;
mod run;
mod workload;

pub use counter::Counter;
pub use in_process_agent::{CAPACITIES, InProcessAgent, NODE};
pub use probe::{LookupCounts, Probe};
pub use resize::resize_rounds;
pub use run::{Options, Progress, Report, run};
pub use workload::ChangeKind;
