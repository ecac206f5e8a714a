//! What goes around calls, and clients that connect when they are wanted.
#![allow(clippy::unwrap_used)]

mod client;
#[cfg(feature = "metrics")]
mod metrics;
mod middleware;
mod paid_client;
mod spans;
mod support;
#[cfg(feature = "tower")]
mod tower;
