//! Tollway: a runtime for metered RPC.

pub mod conduit;
