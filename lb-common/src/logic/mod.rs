//! The decisions of the data plane: pure functions of values, without maps, clock or I/O.

pub mod affinity;
pub mod backend;
pub mod checksum;
pub mod ct;
mod ct_words;
pub mod decide;
pub mod delivery;
pub mod frontend;
pub mod generation;
pub mod headers;
pub mod idle;
pub mod ip128;
pub mod log;
pub mod packet;
pub mod record;
pub mod selection;
pub mod tcp_state;
pub mod translation;
pub mod udp_dest;
