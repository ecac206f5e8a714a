//! Tollway: a runtime for metered RPC.

mod client;
pub mod conduit;
mod connection;
mod driver;
pub mod escrow;
pub mod future;
mod handler;
#[cfg(test)]
mod leak_tests;
pub mod payment;
pub mod rpc;
mod server;
mod session;
mod settle;
mod shared;
pub mod store;

pub use client::{ConnectError, connect};
pub use connection::Connection;
pub use server::Server;
pub use session::{OpenError, Session, SessionConfig, SessionError};
pub use tollway_protocol as protocol;

/// Compiles and runs the example in the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
