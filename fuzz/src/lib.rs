//! What the fuzz targets share: a watch over one machine that holds whatever its peer says and its application does.
//!
//! `.ci/run` has the commands; `seeds.py` makes the corpora to begin with from the golden frames.

use tollway_protocol::error::SessionEnd;
use tollway_protocol::frame::Transmit;
use tollway_protocol::message::{
    Challenge, Close, Header, Hello, HelloAck, Proof, ProtocolError, Refuse, decode_header,
};
use tollway_protocol::session::{Event, Machine};

/// Checks what a machine says, to its application and to its peer.
#[derive(Debug, Default)]
pub struct Watch {
    opened: bool,
    ended: bool,
    last_word: bool,
    /// Frames that were written since the machine ended.
    since_end: usize,
}

impl Watch {
    /// An event, in its order: a session opens at most once, ends at most once, and then says nothing more.
    pub fn event(&mut self, event: &Event) {
        assert!(!self.ended, "an event after the last: {event:?}");
        match event {
            Event::SessionOpened { .. } => assert!(!core::mem::replace(&mut self.opened, true), "opened twice"),
            Event::SessionEnded(_) => self.ended = true,
            _ => {}
        }
    }

    /// A frame that the machine gives out to be written.
    pub fn frame(&mut self, machine: &Machine, frame: &Transmit) {
        assert!(!self.last_word, "a frame after the last word: {:?}", frame.head);
        let kind = frame.head[0];
        let closes_root = kind == Close::KIND && {
            let mut head = bytes::Bytes::copy_from_slice(&frame.head);
            decode_header::<Close>(&mut head).expect("own frames decode").connection.is_root()
        };
        self.last_word = closes_root || [ProtocolError::KIND, Refuse::KIND].contains(&kind);
        let greets = [Hello::KIND, HelloAck::KIND, Challenge::KIND, Proof::KIND].contains(&kind) || self.last_word;
        assert!(self.opened || greets, "kind {kind} before the handshake has ended");
        match machine.end() {
            Some(SessionEnd::PeerViolation(_)) => assert_eq!(kind, ProtocolError::KIND, "a violation is answered once"),
            _ => assert_ne!(kind, ProtocolError::KIND, "nobody broke a rule"),
        }
        self.since_end += usize::from(machine.end().is_some());
    }

    /// Nothing more comes out for now.
    pub fn rest(&self, machine: &Machine) {
        assert_eq!(self.ended, machine.end().is_some(), "its end is an event");
        assert!(!machine.is_open() || self.opened, "its beginning, too");
        if let Some(end) = machine.end() {
            assert_eq!(machine.poll_timeout(), None, "who has ended waits for nothing");
            assert_eq!((machine.connection_count(), machine.call_count(), machine.stream_count()), (0, 0, 0));
            let told = matches!(end, SessionEnd::PeerViolation(_) | SessionEnd::ClosedByUs(_) | SessionEnd::RefusedByUs(_));
            assert!(!told || self.last_word, "{end:?} is told to the peer");
        }
    }
}
