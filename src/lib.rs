//! Tollway: a runtime for metered RPC.
