//! The `tollway` command as a user runs it: real processes, real sockets, real files.

#![allow(clippy::unwrap_used)]

mod support;

mod bench;
mod conduits;
mod demo;
mod durable;
mod fetch;
mod keys;
mod strangers;
mod tokens;
