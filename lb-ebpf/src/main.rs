//! The kernel programs of lb. They look up maps, call `lb_common::logic`, apply its decision, count, and return the verdict.
//!
//! - Entry points: `sock_addr` and `sock` (cgroup hooks), `tc` (device hooks), `agent_calls` (run by the agent).
//! - Steps of the packet path: `ct`, `snat_port`, `send`, `reject`. They share `packet_ctx`; `skb` changes the packet.
//! - State of sockets: `sockets` (connected), `udp_dests` (unconnected UDP), `mptcp` (keys of MPTCP sockets).
//! - Both paths: `map_tables` (lookups for decisions), `backend` (selection), `count`, `trace`, `log`.
//! - Access to memory: `maps`, `volatile`, `atomic`.
//!
//! Imports go one way: no module imports one that imports it, directly or through others.
#![cfg_attr(target_arch = "bpf", no_std)]
#![cfg_attr(target_arch = "bpf", no_main)]
#![expect(
    clippy::needless_pass_by_value,
    reason = "the macros of entry points pass the context by value"
)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

mod agent_calls;
mod atomic;
mod backend;
mod count;
mod ct;
mod device;
mod family;
mod log;
mod map_tables;
mod maps;
mod mptcp;
mod next_hop;
mod packet_ctx;
mod reject;
mod send;
mod skb;
mod snat_port;
mod sock;
mod sock_addr;
mod sockets;
mod tc;
mod trace;
mod udp_dests;
mod volatile;

/// Never called: the verifier rejects a program with a path to a panic.
#[cfg(target_arch = "bpf")]
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Other targets only check this crate, with the standard library: a dependency may enable that there.
#[cfg(not(target_arch = "bpf"))]
fn main() {}

/// Some helpers are available only to programs under a GPL-compatible license.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
