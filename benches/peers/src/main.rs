//! Tollway beside its peers. What is measured and how is in `tollway-peers-harness`; here is a file for each peer, with
//! the settings that were chosen for it and why.
//!
//! Every peer gets what serves it best on loopback: no delay, windows that never run dry, large frames. Where a library leaves open
//! how to do something, such as a call over streams of bytes, the faster way was taken.

#![forbid(unsafe_code)]

mod by_hand;
mod floor;
mod floor_pipe;
mod h2;
mod quinn;
mod tarpc;
mod tollway;
mod tonic;
mod yamux;

use std::process::ExitCode;

use tollway_peers_harness::{Entry, run};

fn main() -> ExitCode {
    let contenders = vec![
        Entry::<tollway::Tollway<tollway::Tcp>>::sequential().in_flight().streams().opens().isolation().build(),
        Entry::<tollway::Tollway<tollway::Quic>>::sequential().in_flight().streams().opens().isolation().build(),
        Entry::<by_hand::ByHand>::sequential().in_flight().streams().build(),
        Entry::<floor::Floor>::sequential().streams().build(),
        Entry::<floor_pipe::FloorPipe>::sequential().in_flight().build(),
        Entry::<tarpc::Tarpc>::sequential().in_flight().build(),
        Entry::<tonic::Tonic>::sequential().in_flight().streams().isolation().build(),
        Entry::<h2::H2>::sequential().in_flight().streams().opens().isolation().build(),
        Entry::<quinn::Quinn>::sequential().in_flight().streams().opens().isolation().build(),
        Entry::<yamux::Yamux>::sequential().in_flight().streams().opens().isolation().build(),
    ];
    run("tollway-peers", contenders)
}
