//! Tollway: a runtime for metered RPC.

pub mod conduit;
mod connection;
mod driver;
pub mod escrow;
pub mod future;
mod handler;
pub mod payment;
pub mod rpc;
mod session;
mod shared;
pub mod store;

pub use connection::Connection;
pub use session::{OpenError, Session, SessionConfig, SessionError};
pub use tollway_protocol as protocol;
