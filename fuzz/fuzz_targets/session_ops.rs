//! What an application and a peer do in a session, in any order.
//!
//! The first byte chooses. Odd: two honest peers, with or without a relay between them, whose every choice is one of the
//! bytes that follow; it is the simulation of `protocol/tests/simulation`, with all its checks. Even: one machine and a
//! peer that sends what it likes, while the application goes on; a byte says which step comes, and a step with a frame
//! has its length in one byte and then its bytes.
#![no_main]

#[path = "../../protocol/tests/simulation/check.rs"]
mod check;
#[path = "../../protocol/tests/simulation/choices.rs"]
mod choices;
#[path = "hostile_peer.rs"]
mod hostile;
#[path = "../../protocol/tests/simulation/net.rs"]
mod net;
#[path = "../../protocol/tests/machine/pair.rs"]
mod pair;
#[path = "../../protocol/tests/simulation/referee.rs"]
mod referee;
#[path = "../../protocol/tests/simulation/relay.rs"]
mod relay;
#[path = "../../protocol/tests/simulation/world.rs"]
mod world;

use choices::Choices;
use libfuzzer_sys::fuzz_target;

/// A run does no more than this, however long the input is.
const STEPS: usize = 300;

fuzz_target!(|data: &[u8]| {
    let [how, bytes @ ..] = data else { return };
    match how & 1 {
        1 => world::World::new(Choices::Bytes { bytes: bytes.to_vec(), at: 0 }).play(STEPS),
        _ => hostile::run(*how, bytes),
    }
});
