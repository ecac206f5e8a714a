//! The pure floor of Tollway: no sockets, no clock, no threads, no async runtime.
//!
//! `SPEC.md` beside this crate's manifest is the normative text; a line that enforces one of its rules cites the rule's
//! id in brackets, such as `[session.open.parity]`.

#![deny(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

pub mod frame;
pub mod payment;
