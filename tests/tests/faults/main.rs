//! Every operation fails in turn, and the agent dies before, within and after each: the next try, or the next agent,
//! ends in the desired state, and a reader who looks at the maps all the while never sees an invariant broken.

#[cfg(target_arch = "x86_64")]
mod agent_start;
mod maps;
#[cfg(target_arch = "x86_64")]
mod ptrace;
mod reader;
