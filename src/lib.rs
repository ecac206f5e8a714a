//! Tollway: a runtime for metered RPC.

mod admission;
pub mod auth;
mod client;
pub mod conduit;
mod connection;
#[cfg(feature = "redb")]
pub mod disk;
mod driver;
pub mod escrow;
#[cfg(not(feature = "failpoints"))]
mod failpoint;
#[cfg(feature = "failpoints")]
pub mod failpoint;
pub mod future;
mod handler;
mod incoming;
#[cfg(feature = "keystore")]
pub mod keystore;
#[cfg(test)]
mod leak_tests;
#[cfg(feature = "redb")]
pub mod maintenance;
pub mod observe;
pub mod payment;
pub mod queue;
mod random;
pub mod reconnect;
pub mod relay;
pub mod rpc;
mod server;
mod session;
mod settle;
mod shared;
pub mod store;
mod together;
pub mod tunnel;

pub use client::{ConnectError, connect, connect_with};
pub use connection::{Connection, Draining};
pub use incoming::{Acceptor, IncomingOpen};
pub use reconnect::{Client, ClientConfig};
pub use relay::proxy_connections;
pub use server::{Server, ServerConfig, ServerHandle, Stopped};
pub use session::{OpenError, PROCESS_MEMORY, Session, SessionConfig, SessionError, process_memory};
#[cfg(feature = "macros")]
pub use tollway_macros::service;
pub use tollway_protocol as protocol;

#[doc(hidden)]
#[cfg(feature = "macros")]
pub use rpc::generated as __private;

/// Compiles and runs the example in the README.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
