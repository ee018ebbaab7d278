//! Every operation fails in turn, and the agent dies before, within and after each: the next try, or the next agent,
//! ends in the desired state, and a reader who looks at the maps all the while never sees an invariant broken.

mod maps;
mod reader;
#[cfg(target_arch = "x86_64")]
mod starts;
#[cfg(target_arch = "x86_64")]
mod trace;
