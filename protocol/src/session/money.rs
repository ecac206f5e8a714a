//! Authorised money as a third kind of credit: what the session counts of a paid connection.
//!
//! The payee's side holds an integer credit, `leased − spent − held`, and charges it when a frame is taken for writing.
//! The payer's side counts the price of what arrives. Both run [`CallMeter`](crate::payment::CallMeter) on the same
//! frames with the same prices. Where the credit comes from, and what the count is used for, is the payment channel's
//! business; it works beside the session and never on a frame's path.

use std::collections::VecDeque;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::event::IncomingCall;
use super::outbox::Body;
use crate::metadata::Metadata;
use crate::payment::{Amount, Price};
use crate::stream::StreamKey;

/// The prices of a service by method id. What is not listed is free.
#[derive(Debug, Default, Clone)]
pub struct PriceTable {
    index: FxHashMap<u64, u32>,
    prices: Vec<Price>,
}

impl FromIterator<(u64, Price)> for PriceTable {
    fn from_iter<I: IntoIterator<Item = (u64, Price)>>(methods: I) -> Self {
        let mut table = PriceTable::default();
        for (method, price) in methods {
            if price.is_free() {
                continue;
            }
            let index = u32::try_from(table.prices.len()).expect("a price list is a part of a frame");
            table.index.insert(method, index);
            table.prices.push(price);
        }
        table
    }
}

impl PriceTable {
    /// The method's entry, or `None` if it is free.
    pub(super) fn index(&self, method: u64) -> Option<u32> {
        self.index.get(&method).copied()
    }

    pub(super) fn price(&self, index: u32) -> Price {
        self.prices.get(index as usize).copied().unwrap_or_default()
    }
}

/// What makes a connection one that is paid to this side.
#[derive(Debug, Clone)]
pub struct PayeeMoney {
    /// The prices in the terms.
    pub prices: Arc<PriceTable>,
    /// The price of all that was handed over before, in base units.
    pub spent: Amount,
    /// Up to where spending is authorised and durable, in base units.
    pub leased: Amount,
    /// Below this much credit, in base units, [`Event::MoneyLow`](super::Event::MoneyLow) asks for more ahead of need.
    pub low: Amount,
}

/// What makes a connection one for which this side pays.
#[derive(Debug, Clone)]
pub struct PayerMoney {
    /// The prices in the terms.
    pub prices: Arc<PriceTable>,
    /// The price of all that was received before, in base units.
    pub received: Amount,
    /// When `received` reaches it, [`Event::ReceivedMark`](super::Event::ReceivedMark) says so.
    pub mark: Amount,
    /// When `received` reaches it, grants are withheld until it is raised: the count up to there is not durable yet.
    /// [`Amount::MAX`] for a payer that keeps no durable count.
    pub hold: Amount,
}

/// The counts of a paid connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MoneyCount {
    /// Payee: the price of all that was taken for writing. Payer: the price of all that arrived. In base units.
    pub amount: Amount,
    /// Metered bytes on this connection, from payee to payer.
    pub bytes: u64,
    /// Metered items on this connection, from payee to payer.
    pub items: u64,
}

#[derive(Debug)]
pub(super) enum Money {
    Payee(Payee),
    Payer(Payer),
}

#[derive(Debug)]
pub(super) struct Payee {
    pub(super) prices: Arc<PriceTable>,
    spent: Amount,
    leased: Amount,
    /// Call prices of handlers that run and have not answered.
    held: Amount,
    low: Amount,
    low_said: bool,
    /// What the head of all that waits for money costs, once it was said.
    needed: Option<Amount>,
    given_up: bool,
    stopped: bool,
    bytes: u64,
    items: u64,
    /// What could not be paid, in order. While anything is here, nothing priced passes.
    pub(super) calls: VecDeque<IncomingCall>,
    pub(super) responses: VecDeque<Body>,
    pub(super) streams: Vec<StreamKey>,
}

#[derive(Debug)]
pub(super) struct Payer {
    pub(super) prices: Arc<PriceTable>,
    received: Amount,
    mark: Amount,
    mark_said: bool,
    hold: Amount,
    /// Grants that were due while they are withheld.
    pub(super) held_credits: Vec<StreamKey>,
    pub(super) held_window: bool,
    bytes: u64,
    items: u64,
}

impl Payee {
    pub(super) fn new(money: PayeeMoney) -> Self {
        Payee {
            prices: money.prices,
            spent: money.spent,
            leased: money.leased,
            held: Amount::ZERO,
            low: money.low,
            low_said: false,
            needed: None,
            given_up: false,
            stopped: false,
            bytes: 0,
            items: 0,
            calls: VecDeque::new(),
            responses: VecDeque::new(),
            streams: Vec::new(),
        }
    }

    /// Credit for more: `leased − spent − held`, never below zero.
    pub(super) fn available(&self) -> Amount {
        self.leased.saturating_sub(self.spent).saturating_sub(self.held)
    }

    /// Whether something priced waits already, so that nothing priced may pass it.
    pub(super) const fn is_blocked(&self) -> bool {
        self.needed.is_some()
    }

    /// What is needed beyond all that is spent, while something waits.
    pub(super) fn needed(&self) -> Option<Amount> {
        self.needed.map(|cost| self.held.saturating_add(cost))
    }

    /// What the answer to a call states that ends for want of `cost`: what is spent, and what would have had to be
    /// authorised.
    pub(super) fn unpaid(&self, cost: Amount) -> Metadata {
        let required = self.spent.saturating_add(self.held).saturating_add(cost);
        Metadata::new().with("spent", self.spent.to_string()).with("required", required.to_string())
    }

    pub(super) const fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// The channel closes: nothing more is charged, whatever was leased. `[pay.close.stops]`
    pub(super) fn stop(&mut self) {
        self.leased = self.spent;
        (self.given_up, self.stopped) = (true, true);
    }

    /// No more money will come.
    pub(super) fn give_up(&mut self) {
        self.given_up = true;
    }

    pub(super) const fn has_given_up(&self) -> bool {
        self.given_up
    }

    /// Holds a call's price from the start of its handler to its first charge. `[pay.call.hold]`
    pub(super) fn hold(&mut self, price: Amount) -> bool {
        if self.available() < price {
            return false;
        }
        self.held = self.held.saturating_add(price);
        true
    }

    pub(super) fn release(&mut self, price: Amount) {
        self.held = self.held.saturating_sub(price);
    }

    /// Charges; the caller has compared with [`available`](Self::available). Returns whether the credit is low now, and
    /// was not said to be.
    pub(super) fn spend(&mut self, cost: Amount, items: u64, bytes: u64) -> bool {
        self.spent = self.spent.saturating_add(cost);
        debug_assert!(self.spent <= self.leased, "charged beyond the lease");
        self.bytes = self.bytes.saturating_add(bytes);
        self.items = self.items.saturating_add(items);
        let low = self.available() < self.low;
        low && !core::mem::replace(&mut self.low_said, true)
    }

    /// Notes that something waits which adds `cost` to all that is spent and held. Returns what must be said to be
    /// needed beyond what is spent: once for each exhaustion.
    pub(super) fn need(&mut self, cost: Amount) -> Option<Amount> {
        if self.is_blocked() {
            return None;
        }
        self.needed = Some(cost);
        self.needed()
    }

    /// Raises the lease; it goes down only at the end.
    pub(super) fn raise(&mut self, leased: Amount) {
        if !self.stopped {
            self.leased = self.leased.max(leased);
        }
        self.low_said = false;
    }

    /// Hands over all that waits. Nothing is blocked then.
    pub(super) fn take_waiting(&mut self) -> (VecDeque<IncomingCall>, VecDeque<Body>, Vec<StreamKey>) {
        self.needed = None;
        (core::mem::take(&mut self.calls), core::mem::take(&mut self.responses), core::mem::take(&mut self.streams))
    }
}

impl Payer {
    pub(super) fn new(money: PayerMoney) -> Self {
        Payer {
            prices: money.prices,
            received: money.received,
            mark: money.mark,
            mark_said: false,
            hold: money.hold,
            held_credits: Vec::new(),
            held_window: false,
            bytes: 0,
            items: 0,
        }
    }

    /// Whether grants are withheld: what has come is not in the payer's durable count. `[pay.received.held]`
    pub(super) fn withholds(&self) -> bool {
        self.received >= self.hold
    }

    /// The count is durable as far as that it may go up to `hold`. Hands over the grants that wait, if any may go.
    pub(super) fn raise_hold(&mut self, hold: Amount) -> Option<(Vec<StreamKey>, bool)> {
        self.hold = self.hold.max(hold);
        let freed = !self.withholds();
        freed.then(|| (core::mem::take(&mut self.held_credits), core::mem::take(&mut self.held_window)))
    }

    /// Counts what arrived. Returns the count if it has reached the mark, and that was not said. `[pay.received.arrival]`
    pub(super) fn receive(&mut self, cost: Amount, items: u64, bytes: u64) -> Option<Option<Amount>> {
        self.received = self.received.checked_add(cost)?;
        self.bytes = self.bytes.saturating_add(bytes);
        self.items = self.items.saturating_add(items);
        let reached =
            self.received >= self.mark && !core::mem::replace(&mut self.mark_said, self.received >= self.mark);
        Some(reached.then_some(self.received))
    }

    /// Sets the mark anew. Returns the count if it is there already.
    pub(super) fn set_mark(&mut self, mark: Amount) -> Option<Amount> {
        (self.mark, self.mark_said) = (mark, self.received >= mark);
        self.mark_said.then_some(self.received)
    }
}

impl Money {
    pub(super) const fn count(&self) -> MoneyCount {
        match self {
            Money::Payee(payee) => MoneyCount { amount: payee.spent, bytes: payee.bytes, items: payee.items },
            Money::Payer(payer) => MoneyCount { amount: payer.received, bytes: payer.bytes, items: payer.items },
        }
    }
}
