//! The decisions of the data plane: values in, values out. No maps, no clock, no IO.

pub mod affinity;
pub mod checksum;
pub mod connect;
pub mod conntrack;
pub mod flow;
pub mod generation;
pub mod idle;
pub mod packet;
pub mod record;
pub mod route;
pub mod select;
pub mod tcp_state;
pub mod translation;
pub mod words;
