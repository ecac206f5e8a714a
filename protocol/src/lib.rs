//! The pure floor of Tollway: no sockets, no clock, no threads, no async runtime.
//!
//! `SPEC.md` beside this crate's manifest is the normative text; a line that enforces one of its rules cites the rule's
//! id in brackets, such as `[session.open.parity]`.
//!
//! - [`frame`] cuts a byte stream into frames, [`message`] has their headers.
//! - [`session`] is the session machine: handshake, virtual connections, calls, credit, fairness, keepalive.
//! - [`memory`] bounds what peers may make this side hold, for a session and for a process.
//! - [`stream`] has the two ends of a stream of items, which a runtime keeps behind locks of their own.
//! - [`peer`] joins both into one peer without locks: simulation, fuzzing and the specification's tests run on it.
//! - [`login`] is how the initiator proves a key.
//! - [`relay`] joins a connection of one session to one of another.
//! - [`payment`] is the money: amounts, vouchers, metering, and the payment-channel machine.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]
#![cfg_attr(test, allow(clippy::arithmetic_side_effects, clippy::indexing_slicing, clippy::unwrap_used))]

pub mod error;
pub mod frame;
mod head;
pub mod id;
pub mod limits;
pub mod login;
pub mod memory;
pub mod message;
pub mod metadata;
pub mod payment;
pub mod peer;
pub mod relay;
pub mod session;
pub mod stream;
pub mod time;
