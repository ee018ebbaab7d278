//! Where API objects come from: parsing, validation, and what changed since the last look.
//!
//! A source hands [`Batch`](crate::model::Batch)es of validated objects to the index. It knows nothing of maps, and
//! it treats everything it reads as untrusted: bad input becomes a [`Problem`](crate::model::Problem), never a panic.

pub mod convert;
pub mod manifests;
pub(crate) mod parse;
pub mod watch;

#[cfg(test)]
mod tests;
