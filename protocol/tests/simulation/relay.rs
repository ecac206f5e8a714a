//! A relay without I/O: two machines, and a bridge for each connection that goes from one to the other.
//!
//! It does what `proxy_connections` of the runtime does, frame by frame. Both sides may open.

use std::collections::BTreeMap;

use bytes::Bytes;
use tollway_protocol::error::{ConnectionEnd, Reason, SessionEnd, code};
use tollway_protocol::frame::Transmit;
use tollway_protocol::id::{ConnectionId, Parity};
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::relay::{Bridge, Relayed, Side, Terms};
use tollway_protocol::session::{Config, Event, Machine, OpenSpec, StreamSource};
use tollway_protocol::stream::{StreamKey, Taken};
use tollway_protocol::time::Time;

/// A connection from the machine that was asked, which is the bridge's left, to the other one.
#[derive(Debug)]
struct Line {
    left: (usize, ConnectionId),
    right: ConnectionId,
    parity: Parity,
    from_left: ConnectionLimits,
    has_credential: bool,
    bridge: Option<Bridge>,
}

/// All lines, and where each connection leads.
#[derive(Debug, Default)]
struct Lines {
    lines: Vec<Line>,
    index: [BTreeMap<ConnectionId, usize>; 2],
}

/// What a machine writes for its peer comes out of the bridges.
struct Bridges<'a> {
    lines: &'a mut Lines,
    which: usize,
}

/// The relay.
#[derive(Debug)]
pub(crate) struct RelayNode {
    pub(crate) machines: [Machine; 2],
    lines: Lines,
    /// What it receives on each connection itself.
    limits: ConnectionLimits,
}

impl Line {
    fn side(&self, which: usize) -> Side {
        if self.left.0 == which { Side::Left } else { Side::Right }
    }

    /// The machine and the connection at the other end of this one's.
    fn opposite(&self, which: usize) -> (usize, ConnectionId) {
        if self.left.0 == which { (1 - which, self.right) } else { self.left }
    }
}

impl StreamSource for Bridges<'_> {
    fn take(&mut self, _: StreamKey, _: usize, _: &dyn Fn(u64, u64) -> bool) -> Taken {
        Taken::Empty
    }

    fn take_relayed(&mut self, connection: ConnectionId, max_frame: usize) -> Relayed {
        let Some(&at) = self.lines.index[self.which].get(&connection) else { return Relayed::Empty };
        let line = &mut self.lines.lines[at];
        let side = line.side(self.which);
        line.bridge.as_mut().map_or(Relayed::Empty, |bridge| bridge.take(side, connection, max_frame))
    }
}

/// What the other side is told about the end of one.
fn passed_on(end: &ConnectionEnd) -> Reason {
    match end {
        ConnectionEnd::ClosedByPeer(reason)
        | ConnectionEnd::ClosedByUs(reason)
        | ConnectionEnd::Session(SessionEnd::ClosedByPeer(reason) | SessionEnd::ClosedByUs(reason)) => reason.clone(),
        other => Reason::new(code::UNREACHABLE, other.to_string()),
    }
}

impl RelayNode {
    /// It answers one side and opens the other.
    pub(crate) fn new(answering: Config, opening: Config, limits: ConnectionLimits) -> Self {
        let machines = [Machine::responder(answering, Time::ZERO), Machine::initiator(opening, Time::ZERO)];
        RelayNode { machines, lines: Lines::default(), limits }
    }

    /// The next frame that one of its machines writes.
    pub(crate) fn poll_transmit(&mut self, now: Time, which: usize) -> Option<Transmit> {
        self.settle(now);
        while self.machines[which].poll_ended_lane().is_some() {}
        let mut bridges = Bridges { lines: &mut self.lines, which };
        self.machines[which].poll_transmit(now, &mut bridges)
    }

    /// Does what follows from all that happened at both machines.
    pub(crate) fn settle(&mut self, now: Time) {
        while let Some((which, event)) =
            (0..2).find_map(|which| self.machines[which].poll_event().map(|event| (which, event)))
        {
            self.handle(now, which, event);
        }
    }

    fn handle(&mut self, now: Time, which: usize, event: Event) {
        match event {
            Event::SessionRequested { .. } => self.machines[which].accept_session(Metadata::new()),
            Event::ConnectionRequested { connection, service, metadata, limits, parity, credential } => {
                let has_credential = !credential.is_empty();
                let spec = OpenSpec {
                    service: &service,
                    parity,
                    limits: limits.through_relay(&self.limits),
                    metadata,
                    credential,
                };
                match self.machines[1 - which].open_relayed(now, spec) {
                    Ok(right) => self.enter(which, connection, right, parity, limits, has_credential),
                    Err(error) => self.refuse(which, connection, Reason::new(code::UNREACHABLE, error.to_string())),
                }
            }
            Event::ConnectionAccepted { connection, metadata, limits, receipt } => {
                self.join(which, connection, metadata, limits, receipt);
            }
            Event::ConnectionRejected { connection, reason, .. } => {
                if let Some(line) = self.line(which, connection) {
                    let (left, id) = line.left;
                    self.refuse(left, id, reason);
                }
                self.lines.index[which].remove(&connection);
            }
            Event::ConnectionClosed { connection, end, .. } => self.pass_end(which, connection, &end),
            Event::Relayed { connection, frame } => self.pass(which, connection, &frame),
            _ => {}
        }
    }

    fn refuse(&mut self, which: usize, connection: ConnectionId, reason: Reason) {
        _ = self.machines[which].reject(connection, reason, Metadata::new(), Bytes::new());
        self.lines.index[which].remove(&connection);
    }

    fn enter(
        &mut self,
        which: usize,
        left: ConnectionId,
        right: ConnectionId,
        parity: Parity,
        from_left: ConnectionLimits,
        has_credential: bool,
    ) {
        let at = self.lines.lines.len();
        let left = (which, left);
        self.lines.lines.push(Line { left, right, parity, from_left, has_credential, bridge: None });
        self.lines.index[which].insert(left.1, at);
        self.lines.index[1 - which].insert(right, at);
    }

    fn line(&mut self, which: usize, connection: ConnectionId) -> Option<&mut Line> {
        let at = *self.lines.index[which].get(&connection)?;
        self.lines.lines.get_mut(at)
    }

    /// The right side has accepted: both are joined before the left learns of it.
    fn join(&mut self, which: usize, id: ConnectionId, metadata: Metadata, receives: ConnectionLimits, receipt: Bytes) {
        let own = self.limits;
        let Some(line) = self.line(which, id) else { return };
        let may_send = receives.through_relay(&own);
        let left = Terms { parity: line.parity, receives: line.from_left, may_send, memory: None };
        let may_send_right = line.from_left.through_relay(&own);
        let right = Terms { parity: line.parity.other(), receives, may_send: may_send_right, memory: None };
        let is_paid = line.has_credential && !receipt.is_empty();
        line.bridge = Some(Bridge::new(&left, &right, is_paid).expect("opposite halves"));
        let (machine, connection) = line.left;
        if self.machines[machine].accept_relayed(connection, may_send, metadata, receipt).is_err() {
            // The left has given up meanwhile.
            self.machines[which].close(id, Reason::new(code::ABANDONED, "the opener gave up"));
        }
    }

    fn pass(&mut self, which: usize, connection: ConnectionId, frame: &Bytes) {
        let Some(line) = self.line(which, connection) else { return };
        let side = line.side(which);
        let Some(bridge) = &mut line.bridge else { panic!("a frame before both sides were joined") };
        bridge.handle_frame(side, frame).unwrap_or_else(|error| panic!("honest peers: {error}"));
        self.tell(which, connection);
    }

    /// Schedules the sides of a line for which something waits.
    fn tell(&mut self, which: usize, connection: ConnectionId) {
        while let Some(line) = self.line(which, connection)
            && let Some(side) = line.bridge.as_mut().and_then(Bridge::poll_told)
        {
            let (machine, there) = if line.side(which) == side { (which, connection) } else { line.opposite(which) };
            self.machines[machine].relay_ready(there);
        }
    }

    fn pass_end(&mut self, which: usize, connection: ConnectionId, end: &ConnectionEnd) {
        let Some(line) = self.line(which, connection) else { return };
        let (side, (other, there)) = (line.side(which), line.opposite(which));
        let reason = passed_on(end);
        let joined = line.bridge.as_mut().map(|bridge| bridge.finish(side, reason.clone()));
        match (joined, side) {
            (Some(()), _) => self.tell(which, connection),
            // Before the answer: the right is not wanted any more, or will not answer.
            (None, Side::Left) => self.machines[other].close(there, Reason::new(code::ABANDONED, "the opener gave up")),
            (None, Side::Right) => self.refuse(other, there, reason),
        }
        self.lines.index[which].remove(&connection);
    }

    /// Connections that lead somewhere: none, when both sides have closed all of theirs.
    pub(crate) fn live(&self) -> usize {
        self.lines.index.iter().map(BTreeMap::len).sum()
    }
}
