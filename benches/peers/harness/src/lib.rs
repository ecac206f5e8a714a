//! Measures peers against each other: the workloads, the rounds, the figures and the table.
//!
//! A contender implements [`Peer`], and [`Streams`] and [`Opens`] if it has such things; [`run`] is the `main` of a binary
//! with a list of them. This crate knows none by name but in its goals, so that a peer whose dependencies do not go together with
//! the others' can have a binary of its own that measures and prints the same.
//!
//! A *cell* is one metric of one contender in one workload. Every round measures all contenders in turn, each in a
//! runtime and on connections of its own, and a cell is the median over the rounds.

mod goals;
mod measure;
mod memory;
mod output;
mod peer;
mod run;
mod workload;

pub use measure::{Contender, Entry};
pub use peer::{Ends, Error, Opens, Order, Peer, Result, Streams, Tally, ensure, framed, parse_order};
pub use run::run;
