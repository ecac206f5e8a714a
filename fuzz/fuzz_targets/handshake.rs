//! A stranger and a machine that has not said hello, with whatever the application answers meanwhile.
//!
//! The first byte chooses role, lanes and how the application behaves. Then come steps: a byte says which, and a step
//! with a frame has its length in one byte and then its bytes. Frames travel as on a stream of bytes, so that lengths are
//! checked as a conduit checks them.
#![no_main]

use core::time::Duration;

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::arbitrary::Unstructured;
use libfuzzer_sys::fuzz_target;
use tollway_fuzz::Watch;
use tollway_protocol::error::{Reason, code};
use tollway_protocol::frame::{FrameDecoder, HANDSHAKE_MAX_FRAME, Lane};
use tollway_protocol::limits::{ConnectionLimits, HEADER_ALLOWANCE};
use tollway_protocol::metadata::Metadata;
use tollway_protocol::peer::{Peer, PeerEvent};
use tollway_protocol::session::{Config, Event, LaneMode};
use tollway_protocol::time::Time;

fuzz_target!(|data: &[u8]| {
    let mut bytes = Unstructured::new(data);
    let how: u8 = bytes.arbitrary().unwrap_or_default();
    let mut stage = Stage::new(how);
    while !bytes.is_empty() {
        stage.step(&mut bytes);
        stage.settle();
    }
    stage.finish();
});

struct Stage {
    peer: Peer,
    now: Time,
    /// Answers at once, challenges first, or lets the fuzzer say when.
    policy: u8,
    is_initiator: bool,
    buffer: BytesMut,
    watch: Watch,
}

impl Stage {
    fn new(how: u8) -> Self {
        let lanes = if how & 2 == 0 { LaneMode::One } else { LaneMode::PerConnection };
        let config = Config { lanes, ..Config::default() };
        let is_initiator = how & 1 == 1;
        let peer = match is_initiator {
            true => Peer::initiator(config, Time::ZERO),
            false => Peer::responder(config, Time::ZERO),
        };
        let (policy, buffer, watch) = (how >> 2 & 3, BytesMut::new(), Watch::default());
        Stage { peer, now: Time::ZERO, policy, is_initiator, buffer, watch }
    }

    fn step(&mut self, bytes: &mut Unstructured<'_>) {
        let session = self.peer.session_mut();
        match bytes.arbitrary::<u8>().unwrap_or_default() % 12 {
            0..=4 => {
                let length = usize::from(bytes.arbitrary::<u8>().unwrap_or_default()).min(bytes.len());
                let frame = bytes.bytes(length).unwrap_or_default();
                self.buffer.extend_from_slice(&(length as u32).to_le_bytes());
                self.buffer.extend_from_slice(frame);
            }
            5 => self.buffer.extend_from_slice(&bytes.arbitrary::<[u8; 4]>().unwrap_or_default()),
            6 => session.accept_session(Metadata::new().with("k", "v")),
            7 => session.refuse_session(Reason::new(code::FORBIDDEN, "no")),
            8 => _ = session.challenge_session("a method", Bytes::from_static(b"challenge")),
            9 => session.prove_session(Bytes::from_static(b"proof")),
            10 => _ = session.open(self.now, "service", ConnectionLimits::default(), Metadata::new(), None),
            _ => {
                let millis = bytes.arbitrary::<u16>().unwrap_or_default();
                self.now = self.now.after(Duration::from_millis(u64::from(millis)));
                self.peer.handle_timeout(self.now);
            }
        }
        let limit = if self.peer.session().is_open() { 1 << 20 } else { HANDSHAKE_MAX_FRAME };
        match FrameDecoder::new(limit).decode(&mut self.buffer) {
            Ok(Some(frame)) => self.peer.handle_frame(self.now, Lane::ROOT, frame),
            Ok(None) => {}
            Err(error) => self.peer.session_mut().handle_conduit_lost(error.to_string()),
        }
    }

    /// The application answers, frames go out, and nobody has said what it must not.
    fn settle(&mut self) {
        while let Some(event) = self.peer.poll_event() {
            let PeerEvent::Session(event) = event else { continue };
            self.watch.event(&event);
            let session = self.peer.session_mut();
            match (event, self.policy) {
                (Event::SessionRequested { .. }, 0) => session.accept_session(Metadata::new()),
                (Event::SessionRequested { .. }, 1) => {
                    session.challenge_session("a method", Bytes::from_static(b"challenge")).expect("it asks once");
                    // Until it is answered, that a session is accepted has no effect.
                    session.accept_session(Metadata::new());
                    assert!(!session.is_open());
                }
                (Event::SessionProved { .. }, 1) => session.accept_session(Metadata::new()),
                (Event::SessionChallenged { .. }, 0 | 1) => session.prove_session(Bytes::from_static(b"proof")),
                (Event::SessionOpened { limits, .. }, _) => assert!(limits.max_frame >= HEADER_ALLOWANCE),
                _ => {}
            }
        }
        while let Some(frame) = self.peer.poll_transmit(self.now) {
            self.watch.frame(self.peer.session(), &frame);
        }
        self.watch.rest(self.peer.session());
        let session = self.peer.session();
        assert!(session.is_open() || session.connection_count() == 0, "a connection before the handshake has ended");
    }

    /// Who has not said hello in time never will have.
    fn finish(mut self) {
        self.settle();
        if !self.peer.session().is_open() && self.peer.session().end().is_none() {
            let deadline = self.peer.poll_timeout().expect("a handshake has a deadline");
            assert_eq!(deadline, Time::ZERO.after(Config::default().handshake_timeout));
            self.now = self.now.max(deadline);
            self.peer.handle_timeout(self.now);
            self.settle();
            assert!(self.peer.session().end().is_some(), "initiator: {}", self.is_initiator);
        }
    }
}
