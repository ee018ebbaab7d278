//! The agent's view of the node's kernel apart from the maps: network namespaces, their sockets, the
//! node's devices and addresses, tc filters, and settings.
//!
//! Separate threads do this work, with their own map handles: applying changes of the source never waits
//! for them.

pub mod addrs;
pub(crate) mod cgroup;
pub mod ct_gc;
pub mod destroy;
pub mod devices;
pub(crate) mod filters;
pub mod links;
pub mod map_usage;
pub(crate) mod memory;
mod netlink;
pub(crate) mod netns;
pub mod nf_conntrack;
pub mod oom;
pub mod ports;
pub(crate) mod sockdiag;
mod socket_verdict;
mod sysctl;

pub(crate) use socket_verdict::CONNECTING;
