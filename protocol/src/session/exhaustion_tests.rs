//! Ids that run out: sessions that start close to the end of their id spaces. No peer gets there in 292,000 years, so
//! the spaces are set by hand. `[session.id.exhausted]`

use bytes::Bytes;

use super::*;
use crate::error::{Reason, Violation};
use crate::limits::ConnectionLimits;
use crate::message::{Flow, Header, Open, encode_head};
use crate::stream::Taken;

struct NoStreams;

impl StreamSource for NoStreams {
    fn take(&mut self, _: StreamKey, _: usize, _: &dyn Fn(u64, u64) -> bool) -> Taken {
        Taken::Empty
    }
}

/// Moves all frames of one to the other.
fn deliver(from: &mut Machine, to: &mut Machine) {
    while let Some(frame) = from.poll_transmit(Time::ZERO, &mut NoStreams) {
        let bytes = [frame.head.as_slice(), &frame.payload].concat();
        to.handle_frame(Time::ZERO, frame.lane, bytes.into());
    }
}

/// Two machines whose initiator has `left` connection ids left.
fn near_the_end(left: u64) -> [Machine; 2] {
    let mut a = Machine::initiator(Config::default(), Time::ZERO);
    let mut b = Machine::responder(Config::default(), Time::ZERO);
    deliver(&mut a, &mut b);
    b.accept_session(Metadata::new());
    deliver(&mut b, &mut a);
    deliver(&mut a, &mut b);
    let next = u64::MAX - 2 * (left - 1);
    a.own_ids = IdSequence::starting_at(next);
    b.peer_ids = PeerIds::starting_at(next);
    [a, b]
}

fn open(machine: &mut Machine) -> Result<ConnectionId, CommandError> {
    machine.open(Time::ZERO, "echo", ConnectionLimits::default(), Metadata::new(), None)
}

fn call(machine: &mut Machine, connection: ConnectionId, slots: &[Flow]) -> Result<(), CommandError> {
    let spec =
        CallSpec { connection, method: 1, deadline: None, metadata: Metadata::new(), payload: Bytes::new(), slots };
    machine.start_call(spec).map(drop)
}

fn connect([a, b]: &mut [Machine; 2]) -> ConnectionId {
    let id = open(a).unwrap();
    deliver(a, b);
    b.accept(id, ConnectionLimits::default(), Metadata::new(), None).unwrap();
    deliver(b, a);
    id
}

#[test]
fn the_last_connection_ids_are_used_and_then_opens_are_refused_while_the_session_drains() {
    let mut pair = near_the_end(2);
    let [first, last] = [connect(&mut pair), connect(&mut pair)];
    assert_eq!((first.0, last.0), (u64::MAX - 2, u64::MAX));
    assert_eq!(open(&mut pair[0]), Err(CommandError::IdsExhausted));
    // What is open goes on, and ends in order.
    call(&mut pair[0], last, &[]).unwrap();
    let [a, b] = &mut pair;
    deliver(a, b);
    assert_eq!(b.call_count(), 1);
    a.close(first, Reason::none());
    a.close(last, Reason::none());
    for _ in 0..2 {
        deliver(a, b);
        deliver(b, a);
    }
    assert_eq!((a.connection_count(), b.connection_count()), (0, 0));
    assert_eq!((a.end(), b.end()), (None, None));
    b.go_away(Reason::none());
    deliver(b, a);
    assert_eq!(a.end(), None, "GoAway names the very last id");
}

#[test]
fn an_id_behind_the_last_one_is_a_violation_and_does_not_wrap() {
    for (wrapped, parity) in [(1, Parity::Odd), (0, Parity::Odd), (u64::MAX, Parity::Odd), (2, Parity::Even)] {
        let mut pair = near_the_end(1);
        connect(&mut pair);
        let connection = ConnectionId(wrapped);
        let limits = ConnectionLimits::default();
        let open = Open { connection, service: "echo".into(), parity, limits, metadata: Metadata::new() };
        pair[1].handle_frame(Time::ZERO, Lane(0), Bytes::copy_from_slice(&encode_head(&open)));
        let end = pair[1].end();
        assert_eq!(end, Some(&SessionEnd::PeerViolation(Violation::ConnectionId { id: connection })), "{}", Open::NAME);
    }
}

#[test]
fn calls_and_streams_that_run_out_of_ids_are_refused_before_one_is_lost() {
    let mut pair = near_the_end(1);
    let id = connect(&mut pair);
    let [a, b] = &mut pair;
    for machine in [&mut *a, &mut *b] {
        let live = machine.connections.get_mut(&id).unwrap();
        let ours = live.opened_by_us;
        let next = u64::MAX - 2;
        let (calls, streams) = match ours {
            true => (&mut live.own_calls, &mut live.own_streams),
            false => (&mut live.peer_calls, &mut live.peer_streams),
        };
        (*calls, *streams) = (IdSequence::starting_at(next), IdSequence::starting_at(next));
    }
    assert_eq!(call(a, id, &[Flow::ToPeer; 3]), Err(CommandError::IdsExhausted), "three streams, two ids");
    call(a, id, &[Flow::ToPeer; 2]).unwrap();
    call(a, id, &[]).unwrap();
    assert_eq!(call(a, id, &[]), Err(CommandError::IdsExhausted), "two calls wait for the last two ids");
    deliver(a, b);
    assert_eq!((b.call_count(), b.stream_count(), b.end()), (2, 2, None));
    assert_eq!(call(a, id, &[]), Err(CommandError::IdsExhausted));
}
