//! Tollway: a runtime for metered RPC.

pub mod conduit;
pub mod escrow;
pub mod future;
pub mod store;
