//! The decisions of the data plane: values in, values out. No maps, no clock, no IO.

pub mod connect;
pub mod generation;
pub mod record;
pub mod select;
pub mod words;
