//! The agent: reads Services, EndpointSlices and Nodes, and programs the kernel with them.

pub mod model;
pub mod source;
