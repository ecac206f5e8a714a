//! Commands for those who open, pay, sell and close connections in tasks of their own: answers to opens, money credit,
//! payment messages, and what is open still.

use std::sync::Arc;

use bytes::Bytes;
use tollway_protocol::error::Reason;
use tollway_protocol::id::ConnectionId;
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;
use tollway_protocol::session::{CommandError, MoneyCount, PayeeMoney};

use super::{ConnectionCell, Shared};
use crate::observe::Happened;
use crate::payment::Mailbox;
use crate::rpc::accept_metadata;

impl Shared {
    /// The counts of a paid connection, open or ended.
    pub(crate) fn money(&self, id: ConnectionId, cell: &ConnectionCell) -> Option<MoneyCount> {
        self.lock().machine.money(id).or_else(|| cell.final_money())
    }

    /// The counts of a paid connection that is open.
    pub(crate) fn open_money(&self, id: ConnectionId) -> Option<MoneyCount> {
        self.lock().machine.money(id)
    }

    /// Payee: the counts of a paid connection that is open, and what it needs while something waits for money.
    pub(crate) fn payee_money(&self, id: ConnectionId) -> (Option<MoneyCount>, Option<Amount>) {
        let state = self.lock();
        (state.machine.money(id), state.machine.money_needed(id))
    }

    /// Payee: nothing more is charged, if no call is open; see [`Machine::stop_money`].
    pub(crate) fn stop_money(&self, id: ConnectionId) -> Result<Option<MoneyCount>, usize> {
        self.lock().machine.stop_money(id)
    }

    /// How many calls the peer takes at once.
    pub(crate) fn max_calls(&self, id: ConnectionId) -> u32 {
        self.lock().machine.limits(id).map_or(0, |(_, peer)| peer.max_calls)
    }

    /// What the peer takes on a connection.
    pub(crate) fn peer_limits(&self, id: ConnectionId) -> Option<ConnectionLimits> {
        self.lock().machine.limits(id).map(|(_, peer)| *peer)
    }

    pub(crate) fn has_mailbox(&self, id: ConnectionId) -> bool {
        self.lock().mailboxes.contains_key(&id)
    }

    /// Accepts a paid open. If the opener has given up, nothing happens.
    pub(crate) fn accept_paid(
        &self,
        id: ConnectionId,
        limits: ConnectionLimits,
        paid: (Bytes, PayeeMoney),
        mailbox: Arc<Mailbox>,
    ) {
        let mut state = self.lock();
        let entry = state.connections.get(&id).and_then(|cell| cell.service.clone());
        let metadata = accept_metadata(entry.as_ref().and_then(|entry| entry.schema));
        let result = state.machine.accept(id, limits, metadata, Some(paid));
        let opened = result.is_ok() && self.is_watched();
        let given_up = result.map(|()| drop(state.mailboxes.insert(id, mailbox))).err();
        Self::unlock_and_kick(state);
        if let Some(error) = given_up {
            tracing::debug!(%error, "a paid open was given up");
        }
        if opened {
            let service = entry.map(|entry| entry.service.name().to_owned());
            self.tell(Happened::Opened(id, service));
        }
    }

    pub(crate) fn reject(&self, id: ConnectionId, reason: Reason, metadata: Metadata, terms: Bytes) {
        let mut state = self.lock();
        let cell = state.connections.remove(&id);
        let relay = state.relays.remove(&id);
        let refused = self.is_watched().then(|| reason.clone());
        let given_up = state.machine.reject(id, reason, metadata, terms).err();
        Self::unlock_and_kick(state);
        if let Some(error) = given_up {
            tracing::debug!(%error, "an open was given up");
        }
        drop((cell, relay));
        self.notice_gone();
        if let Some(reason) = refused {
            self.tell(Happened::Refused(id, reason));
        }
    }

    /// The work for an open of the peer's has ended.
    pub(crate) fn finish_open(&self, id: ConnectionId) {
        self.lock().machine.finish_open(id);
    }

    pub(crate) fn fail_unpaid(&self, id: ConnectionId) {
        let mut state = self.lock();
        state.machine.fail_unpaid(id);
        Self::unlock_and_kick(state);
    }

    /// Waits until the connection has no open calls.
    pub(crate) async fn calls_ended(&self, id: ConnectionId) {
        loop {
            let gone = self.call_gone.notified();
            if self.open_calls(id) == 0 {
                return;
            }
            gone.await;
        }
    }

    /// Tells who waits for the ends of calls that some have ended.
    pub(crate) fn notice_calls_gone(&self) {
        self.call_gone.notify_waiters();
    }

    pub(crate) fn open_calls(&self, id: ConnectionId) -> usize {
        self.lock().machine.open_calls(id)
    }

    pub(crate) fn raise_money(&self, id: ConnectionId, leased: Amount) {
        let mut state = self.lock();
        state.machine.raise_money(id, leased);
        Self::unlock_and_kick(state);
    }

    pub(crate) fn set_received_mark(&self, id: ConnectionId, mark: Amount) {
        let mut state = self.lock();
        state.machine.set_received_mark(id, mark);
        // It may be an event at once, which the driver hands on.
        Self::unlock_and_kick(state);
    }

    /// Payer: grants may go on until the count reaches `hold`.
    pub(crate) fn raise_received_hold(&self, id: ConnectionId, hold: Amount) {
        let mut state = self.lock();
        state.machine.raise_received_hold(id, hold);
        Self::unlock_and_kick(state);
    }

    pub(crate) fn send_payment(&self, id: ConnectionId, message: Bytes) -> Result<(), CommandError> {
        let mut state = self.lock();
        let result = state.machine.send_payment(id, message);
        Self::unlock_and_kick(state);
        result
    }
}
