//! Peers that misbehave on purpose: a raw TCP client breaks each rule of SPEC.md and tries each attack that has hit a
//! system of this kind. Each case is answered as SPEC.md says, while an honest session on the same server stays well.
#![allow(clippy::unwrap_used)]

mod abuse;
mod bounds;
mod calls;
mod connections;
mod frames;
mod handshake;
mod preface;
mod slow;
mod stage;
mod streams;
