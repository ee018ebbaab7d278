//! What the agent learns from the node's kernel, and does there, beside the maps: network namespaces, their sockets, the
//! node's devices and addresses, and what stands at tc.
//!
//! Threads of their own do this work, with maps that they opened themselves: applying what the source says never waits
//! for it.

pub mod addrs;
pub mod conntrack;
pub mod destroy;
pub mod devices;
pub(crate) mod filters;
pub mod flows;
mod judge;
pub mod links;
mod netlink;
pub(crate) mod netns;
pub mod oom;
pub mod ports;
pub(crate) mod sockdiag;
mod sysctl;

pub(crate) use judge::CONNECTING;
