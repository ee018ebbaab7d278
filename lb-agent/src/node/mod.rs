//! What the agent learns from the node's kernel, and does there, beside the maps: network namespaces, their sockets, the
//! node's devices and addresses, and what stands at tc.
//!
//! Threads of their own do this work, with maps that they opened themselves: applying what the source says never waits
//! for it.

pub mod addrs;
pub mod ct_gc;
pub mod destroy;
pub mod devices;
pub(crate) mod filters;
pub mod links;
mod netlink;
pub(crate) mod netns;
pub mod nf_conntrack;
pub mod oom;
pub mod ports;
pub(crate) mod sockdiag;
mod socket_verdict;
mod sysctl;

pub(crate) use socket_verdict::CONNECTING;
