//! Tollway: a runtime for metered RPC.

pub mod future;
pub mod store;
