//! What the two halves of a QUIC conduit share: the connection, the streams that one half has opened or accepted for the
//! other, and what the peer is told when the last half goes.

use std::io;
use std::sync::Arc;
use std::task::Waker;

use parking_lot::Mutex;
use quinn::{ConnectionError, RecvStream, SendStream, VarInt};
use tollway_protocol::error::Reason;

use crate::conduit::tls::TlsFailure;
use crate::conduit::{ConduitError, Lane};

/// The connection, and what passes between its halves.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) connection: quinn::Connection,
    failure: TlsFailure,
    exchange: Mutex<Exchange>,
}

#[derive(Debug, Default)]
struct Exchange {
    /// Sending halves of the streams that the peer has opened.
    accepted: Vec<(Lane, SendStream)>,
    /// Receiving halves of the streams that this side has opened.
    opened: Vec<(Lane, RecvStream)>,
    /// The reader's task, which `opened` is news to.
    reader: Option<Waker>,
    last_word: Option<Reason>,
}

impl Shared {
    pub(super) fn new(connection: quinn::Connection, failure: TlsFailure) -> Arc<Self> {
        Arc::new(Self { connection, failure, exchange: Mutex::default() })
    }

    /// What a lost connection means for a half that still has work.
    pub(super) fn lost(&self, error: &ConnectionError) -> ConduitError {
        ConduitError::Io(match error {
            ConnectionError::ApplicationClosed(_) => {
                io::Error::new(io::ErrorKind::ConnectionReset, "the peer closed the connection")
            }
            ConnectionError::TimedOut => io::ErrorKind::TimedOut.into(),
            other => match super::tls_error(other) {
                Some(error) => io::Error::new(io::ErrorKind::InvalidData, self.failure.get_or_init(|| error).clone()),
                None => io::Error::new(io::ErrorKind::ConnectionReset, other.clone()),
            },
        })
    }

    /// Hands a stream of the peer's to the writer, which looks for it when it has something to send there.
    pub(super) fn put_accepted(&self, lane: Lane, stream: SendStream) {
        self.exchange.lock().accepted.push((lane, stream));
    }

    pub(super) fn take_accepted(&self) -> Vec<(Lane, SendStream)> {
        std::mem::take(&mut self.exchange.lock().accepted)
    }

    /// Hands a stream of our own to the reader.
    pub(super) fn put_opened(&self, lane: Lane, stream: RecvStream) {
        let mut exchange = self.exchange.lock();
        exchange.opened.push((lane, stream));
        let reader = exchange.reader.take();
        drop(exchange);
        if let Some(reader) = reader {
            reader.wake();
        }
    }

    /// Takes what the writer has opened, and remembers whom to wake for more.
    pub(super) fn take_opened(&self, waker: &Waker) -> Vec<(Lane, RecvStream)> {
        let mut exchange = self.exchange.lock();
        if !exchange.reader.as_ref().is_some_and(|reader| reader.will_wake(waker)) {
            exchange.reader = Some(waker.clone());
        }
        std::mem::take(&mut exchange.opened)
    }

    /// What the peer is told when the connection closes.
    pub(super) fn set_last_word(&self, reason: Reason) {
        self.exchange.lock().last_word = Some(reason);
    }
}

impl Drop for Shared {
    /// With the last half the connection is closed, with the session's own code. `[conduit.quic.close]`
    fn drop(&mut self) {
        let reason = self.exchange.get_mut().last_word.take().unwrap_or_else(Reason::none);
        self.connection.close(reason.code.into(), reason.text.as_bytes());
    }
}

/// A code of ours out of one of QUIC's, which may be larger.
pub(super) fn code(wire: VarInt) -> u32 {
    u32::try_from(wire.into_inner()).unwrap_or(u32::MAX)
}
