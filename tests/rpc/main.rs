//! What goes around calls, and clients that connect when they are wanted.
#![allow(clippy::unwrap_used)]

mod client;
mod middleware;
mod paid_client;
mod support;
#[cfg(feature = "tower")]
mod tower;
