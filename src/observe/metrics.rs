//! Metrics of sessions and connections, through the facade `metrics`, for whichever recorder the program installs.
//!
//! | name | kind | unit | labels |
//! |---|---|---|---|
//! | `tollway.sessions` | gauge | sessions that are open | `network.transport` |
//! | `tollway.session.opened` | counter | sessions | `network.transport` |
//! | `tollway.session.closed` | counter | sessions | `network.transport`, and `error.type` unless a side closed it |
//! | `tollway.session.refused` | counter | peers that a server refused in their handshake | `error.type`, the code |
//! | `tollway.session.rtt` | histogram | seconds, one round trip for each ping | |
//! | `tollway.session.frames` | counter | frames | `network.io.direction`: `receive` or `transmit` |
//! | `tollway.session.io` | counter | bytes of frames | `network.io.direction` |
//! | `tollway.connection.opened` | counter | connections | |
//! | `tollway.connection.refused` | counter | opens | `error.type`, the code |
//! | `tollway.connection.closed` | counter | connections | |
//!
//! Frames and bytes are added when a session has ended and whenever it is looked at by a snapshot. No label has an address or
//! an id in it. Calls have their own, `rpc.client.call.duration` and `rpc.server.call.duration`, which are the business of
//! whoever installs middleware.

use std::time::Duration;

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram, gauge, histogram};
use tollway_protocol::error::{Reason, SessionEnd};

use super::{Happened, Traffic};
use crate::conduit::PeerInfo;

const TRANSPORT: &str = "network.transport";
const ERROR: &str = "error.type";
const DIRECTION: &str = "network.io.direction";

/// Describes the metrics of sessions and connections to the recorder that is installed now.
pub fn describe() {
    describe_gauge!("tollway.sessions", "Sessions that are open.");
    describe_counter!("tollway.session.opened", "Sessions that have opened.");
    describe_counter!("tollway.session.closed", "Sessions that have ended.");
    describe_counter!("tollway.session.refused", "Peers that a server has refused in their handshake.");
    describe_histogram!("tollway.session.rtt", Unit::Seconds, "Round trips of pings.");
    describe_counter!("tollway.session.frames", "Frames that sessions have carried.");
    describe_counter!("tollway.session.io", Unit::Bytes, "Bytes of the frames that sessions have carried.");
    describe_counter!("tollway.connection.opened", "Virtual connections that have opened.");
    describe_counter!("tollway.connection.refused", "Opens that were rejected, by either side.");
    describe_counter!("tollway.connection.closed", "Virtual connections that have ended.");
}

pub(crate) fn session_opened(peer: &PeerInfo) {
    gauge!("tollway.sessions", TRANSPORT => peer.transport()).increment(1.0);
    counter!("tollway.session.opened", TRANSPORT => peer.transport()).increment(1);
}

pub(crate) fn session_closed(peer: &PeerInfo, end: &SessionEnd) {
    gauge!("tollway.sessions", TRANSPORT => peer.transport()).decrement(1.0);
    match error_type(end) {
        None => counter!("tollway.session.closed", TRANSPORT => peer.transport()).increment(1),
        Some(kind) => counter!("tollway.session.closed", TRANSPORT => peer.transport(), ERROR => kind).increment(1),
    }
}

/// A word for an end that nobody has wanted.
fn error_type(end: &SessionEnd) -> Option<&'static str> {
    Some(match end {
        SessionEnd::ClosedByUs(_) | SessionEnd::ClosedByPeer(_) | SessionEnd::Idle => return None,
        SessionEnd::PeerViolation(_) => "peer_violation",
        SessionEnd::ReportedViolation(_) => "reported_violation",
        SessionEnd::RefusedByPeer(_) | SessionEnd::RefusedByUs(_) => "refused",
        SessionEnd::HandshakeTimeout => "handshake_timeout",
        SessionEnd::PeerSilent => "peer_silent",
        SessionEnd::PeerNotReading => "peer_not_reading",
        SessionEnd::ConduitLost(_) => "conduit_lost",
        _ => "_OTHER",
    })
}

pub(crate) fn session_refused(reason: &Reason) {
    counter!("tollway.session.refused", ERROR => reason.code.to_string()).increment(1);
}

pub(crate) fn rtt(rtt: Duration) {
    histogram!("tollway.session.rtt").record(rtt.as_secs_f64());
}

/// What was carried since it was told last.
pub(crate) fn carried(since: Traffic) {
    for (direction, frames, bytes) in
        [("receive", since.frames_received, since.bytes_received), ("transmit", since.frames_sent, since.bytes_sent)]
    {
        counter!("tollway.session.frames", DIRECTION => direction).increment(frames);
        counter!("tollway.session.io", DIRECTION => direction).increment(bytes);
    }
}

pub(crate) fn happened(happened: &Happened) {
    match happened {
        Happened::Opened(..) => counter!("tollway.connection.opened").increment(1),
        Happened::Refused(_, reason) => {
            counter!("tollway.connection.refused", ERROR => reason.code.to_string()).increment(1);
        }
        Happened::Closed(..) => counter!("tollway.connection.closed").increment(1),
    }
}
