//! Fault injection: every operation fails in turn, and the agent is killed before, within and after each. The retry or
//! the next agent must reach the desired state, and a concurrent reader of the maps must never see an invariant broken.

#[cfg(target_arch = "x86_64")]
mod agent_start;
mod maps;
mod other_layouts;
#[cfg(target_arch = "x86_64")]
mod ptrace;
mod reader;
