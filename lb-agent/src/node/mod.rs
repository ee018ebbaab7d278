//! What the agent learns from the node's kernel, and does there, beside the maps: network namespaces, their sockets, and
//! the node's addresses.
//!
//! Threads of their own do this work, with maps that they opened themselves: applying what the source says never waits
//! for it.

pub mod addrs;
pub mod conntrack;
pub mod destroy;
pub mod flows;
mod judge;
mod netlink;
pub(crate) mod netns;
pub mod oom;
pub(crate) mod sockdiag;

pub(crate) use judge::CONNECTING;
