//! The rules of the local ledger: no I/O, no clock, no randomness.
//!
//! It does what the deployed v1 contract does, with accounts in place of token transfers and signed orders in place of
//! transactions. Every order checks all it has to check before it changes anything, so a refused order changes nothing.
//! The outcome depends on the orders and their times alone. What an order has changed is known by row ([`Row`]), so that a
//! ledger in a file writes just that.
//!
//! Invariants: for each token, balances + deposits that are not paid out = what was funded, to the unit; for each
//! channel, `settled ≤ deposit`; an id that was opened stays known for ever.
//!
//! Who runs the ledger holds the deposits.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use tollway_protocol::payment::ledger_messages::{
    Close, Fund, LedgerIdentity, LedgerMessage, OpenChannel, RequestClose, Settle, Signed, TopUp, Transfer, Withdraw,
};
use tollway_protocol::payment::{
    Address, Amount, ChannelId, Hash, Signature, Verifier, Voucher, VoucherDomain, VoucherProtocol,
};

use super::{EscrowChannel, EscrowRefusal, Settlement};
use crate::failpoint::broken;

/// The grace period of the deployed v1 contract, 15 minutes, in milliseconds.
pub const DEFAULT_GRACE_MS: u64 = 15 * 60 * 1_000;
/// The most that a ledger in development mode makes up for one deposit, in base units: what the smaller vouchers can
/// state. All money of a token has to stay below 2^128, so that one deposit near it would leave none for others.
pub const MAX_DEV_CREDIT: Amount = Amount::MAX_U96;

/// How a ledger behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LedgerConfig {
    /// How long a payee may still settle after the payer asked to withdraw, in milliseconds.
    pub grace_ms: u64,
    /// For development: credits any payer what a deposit needs. It counts as funding, so the books still balance.
    pub dev: bool,
}

impl Default for LedgerConfig {
    fn default() -> Self {
        LedgerConfig { grace_ms: DEFAULT_GRACE_MS, dev: false }
    }
}

/// The books of one token do not balance: money appeared or vanished. A bug, never an outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("token {token}: {held:?} is held, and {funded} was funded")]
pub struct LedgerImbalance {
    /// The token.
    pub token: Address,
    /// Balances and deposits in base units; `None` past 2^128.
    pub held: Option<Amount>,
    /// What was funded in base units.
    pub funded: Amount,
}

/// A channel and what is needed to answer a repeated order as the first time.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) channel: EscrowChannel,
    /// The digest of the order that opened it.
    opened_by: Hash,
    last_settle: Option<Settlement>,
    ending: Option<Ending>,
}

impl Entry {
    /// Nothing more may happen to an ended channel.
    fn require_open(&self) -> Result<(), EscrowRefusal> {
        match self.ending {
            None => Ok(()),
            Some(_) => Err(EscrowRefusal::Finalized { settled: self.channel.settled }),
        }
    }

    /// What is neither paid out nor returned.
    fn held(&self) -> Amount {
        match self.ending {
            None => self.channel.deposit.saturating_sub(self.channel.settled),
            Some(_) => Amount::ZERO,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Ending {
    Closed(Settlement),
    Withdrawn(Settlement),
}

/// The last order of an account that had a nonce.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct LastOrder {
    pub(super) nonce: u64,
    /// So that the same order again is known.
    digest: Hash,
}

/// A part of the books that is changed as a whole.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Row {
    Balance(Address, Address),
    Funded(Address),
    LastOrder(Address),
    Channel(ChannelId),
}

/// What is in a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Content {
    Amount(Amount),
    LastOrder(LastOrder),
    Entry(Box<Entry>),
}

/// The local ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ledger {
    identity: LedgerIdentity,
    domain: VoucherDomain,
    config: LedgerConfig,
    /// By (holder, token).
    balances: BTreeMap<(Address, Address), Amount>,
    /// By token. No balance and no deposit can pass it, so sums of them cannot overflow.
    funded: BTreeMap<Address, Amount>,
    /// With the highest nonce of each account that gives orders.
    last_orders: BTreeMap<Address, LastOrder>,
    channels: BTreeMap<ChannelId, Entry>,
    /// What has changed since somebody took note of it: at most all of the above.
    touched: BTreeSet<Row>,
}

impl Ledger {
    /// An empty ledger.
    pub fn new(identity: LedgerIdentity, config: LedgerConfig) -> Self {
        Ledger {
            identity,
            domain: VoucherDomain::new(VoucherProtocol::V1, identity.chain_id, identity.escrow),
            config,
            balances: BTreeMap::new(),
            funded: BTreeMap::new(),
            last_orders: BTreeMap::new(),
            channels: BTreeMap::new(),
            touched: BTreeSet::new(),
        }
    }

    /// What the ledger is known by.
    pub const fn identity(&self) -> LedgerIdentity {
        self.identity
    }

    /// How it behaves.
    pub const fn config(&self) -> LedgerConfig {
        self.config
    }

    /// What is in an account, in base units.
    pub fn balance(&self, holder: Address, token: Address) -> Amount {
        self.balances.get(&(holder, token)).copied().unwrap_or_default()
    }

    /// The highest nonce that a payer has used; its next order needs a higher one.
    pub fn last_nonce(&self, payer: Address) -> u64 {
        self.last_orders.get(&payer).map_or(0, |last| last.nonce)
    }

    /// A channel, also an ended one; `None` when it was never opened.
    pub fn channel(&self, id: ChannelId) -> Option<&EscrowChannel> {
        self.channels.get(&id).map(|entry| &entry.channel)
    }

    /// Puts new money into an account. Only the operator may do that, and whoever can call this is the operator.
    ///
    /// # Errors
    /// [`EscrowRefusal::TooMuch`] when all money of the token would pass 2^128.
    pub fn fund(&mut self, holder: Address, token: Address, amount: Amount) -> Result<(), EscrowRefusal> {
        let funded = self.funded.get(&token).copied().unwrap_or_default();
        let funded = funded.checked_add(amount).ok_or(EscrowRefusal::TooMuch)?;
        let balance = self.balance(holder, token).checked_add(amount).ok_or(EscrowRefusal::TooMuch)?;
        self.funded.insert(token, funded);
        self.touched.insert(Row::Funded(token));
        self.set_balance(holder, token, balance);
        Ok(())
    }

    /// Puts new money into an account by the operator's order, and answers with what is in it. The operator's last order
    /// repeated has no effect and is answered with what is in the account now.
    ///
    /// # Errors
    /// The refusal; nothing has changed then.
    pub fn fund_by(&mut self, order: &Signed<Fund>, now_ms: u64) -> Result<Amount, EscrowRefusal> {
        let Fund { holder, token, amount, nonce, expiry } = order.message;
        let operator = self.identity.escrow;
        self.authorise(order, operator)?;
        let last = LastOrder { nonce, digest: order.message.digest(&self.identity) };
        if !self.is_repeated(operator, last) {
            if holder.is_zero() {
                return Err(EscrowRefusal::NobodyPaid);
            }
            self.check_fresh(operator, nonce, expiry, now_ms)?;
            self.fund(holder, token, amount)?;
            self.note_order(operator, last);
        }
        Ok(self.balance(holder, token))
    }

    /// Moves money between two accounts, and answers with what is left in the one that it leaves. The account's last
    /// order repeated has no effect and is answered with what is in the account now.
    ///
    /// # Errors
    /// The refusal; nothing has changed then.
    pub fn transfer(&mut self, order: &Signed<Transfer>, now_ms: u64) -> Result<Amount, EscrowRefusal> {
        let Transfer { from, to, token, amount, nonce, expiry } = order.message;
        self.authorise(order, from)?;
        let last = LastOrder { nonce, digest: order.message.digest(&self.identity) };
        if !self.is_repeated(from, last) {
            if to.is_zero() {
                return Err(EscrowRefusal::NobodyPaid);
            }
            self.check_fresh(from, nonce, expiry, now_ms)?;
            let available = self.balance(from, token);
            let short = EscrowRefusal::InsufficientBalance { needed: amount, available };
            let rest = available.checked_sub(amount).ok_or(short)?;
            // To oneself nothing moves.
            if from != to {
                let balance = self.balance(to, token).checked_add(amount).ok_or(EscrowRefusal::TooMuch)?;
                self.set_balance(from, token, rest);
                self.set_balance(to, token, balance);
            }
            self.note_order(from, last);
        }
        Ok(self.balance(from, token))
    }

    /// Opens a channel with a deposit from the payer's account. Repeated, it answers with the channel as it is now.
    ///
    /// # Errors
    /// The refusal; nothing has changed then.
    pub fn open(&mut self, order: &Signed<OpenChannel>, now_ms: u64) -> Result<EscrowChannel, EscrowRefusal> {
        let open = &order.message;
        self.authorise(order, open.payer)?;
        let descriptor = open.descriptor(&self.identity);
        let id = descriptor.id();
        let opened_by = open.digest(&self.identity);
        if let Some(entry) = self.channels.get(&id) {
            let repeated = entry.opened_by == opened_by && entry.ending.is_none();
            return if repeated { Ok(entry.channel.clone()) } else { Err(EscrowRefusal::IdUsed(id)) };
        }
        descriptor.check().map_err(|_| EscrowRefusal::NobodyPaid)?;
        if open.deposit.is_zero() {
            return Err(EscrowRefusal::ZeroDeposit);
        }
        self.check_fresh(open.payer, open.nonce, open.expiry, now_ms)?;
        self.take(open.payer, open.token, open.deposit)?;
        self.note_order(open.payer, LastOrder { nonce: open.nonce, digest: opened_by });
        let channel = EscrowChannel {
            descriptor,
            deposit: open.deposit,
            settled: Amount::ZERO,
            close_requested_at_ms: None,
            finalized: false,
        };
        self.channels.insert(id, Entry { channel: channel.clone(), opened_by, last_settle: None, ending: None });
        self.touched.insert(Row::Channel(id));
        Ok(channel)
    }

    /// Raises a deposit to an amount. At or below the deposit it has no effect, so it may be repeated. As in the v1
    /// contract, raising the deposit cancels a requested close.
    ///
    /// # Errors
    /// The refusal; nothing has changed then.
    pub fn top_up(&mut self, order: &Signed<TopUp>, now_ms: u64) -> Result<EscrowChannel, EscrowRefusal> {
        let top_up = &order.message;
        let entry = self.entry(top_up.channel_id)?;
        let (payer, token) = (entry.channel.descriptor.payer, entry.channel.descriptor.token);
        self.authorise(order, payer)?;
        entry.require_open()?;
        let more = match top_up.deposit.checked_sub(entry.channel.deposit) {
            None | Some(Amount::ZERO) => return Ok(entry.channel.clone()),
            Some(more) => more,
        };
        self.check_fresh(payer, top_up.nonce, top_up.expiry, now_ms)?;
        self.take(payer, token, more)?;
        self.note_order(payer, LastOrder { nonce: top_up.nonce, digest: top_up.digest(&self.identity) });
        let channel = &mut self.entry_mut(top_up.channel_id)?.channel;
        channel.deposit = top_up.deposit;
        channel.close_requested_at_ms = None;
        Ok(channel.clone())
    }

    /// Pays the payee up to the voucher's amount, exactly.
    ///
    /// # Errors
    /// The refusal; nothing has changed then.
    pub fn settle(&mut self, order: &Signed<Settle>, voucher: &Signature) -> Result<Settlement, EscrowRefusal> {
        let Settle { channel_id, amount } = order.message;
        let entry = self.entry(channel_id)?;
        self.authorise(order, entry.channel.descriptor.payee)?;
        self.check_voucher(entry, amount, voucher)?;
        // The same amount is the same order: it was lost on its way back, and is answered as the first time.
        if let Some(repeated) = entry.last_settle.filter(|last| last.settled == amount) {
            return Ok(repeated);
        }
        entry.require_open()?;
        let (settled, deposit) = (entry.channel.settled, entry.channel.deposit);
        if amount <= settled {
            return Err(EscrowRefusal::NotAboveSettled { amount, settled });
        }
        if amount > deposit {
            return Err(EscrowRefusal::AboveDeposit { amount, deposit });
        }
        self.pay_out(channel_id, amount)?;
        let reference = order.message.digest(&self.identity);
        let settlement = Settlement { reference, settled: amount, refunded: Amount::ZERO };
        self.entry_mut(channel_id)?.last_settle = Some(settlement);
        Ok(settlement)
    }

    /// Pays the payee up to the amount, returns the rest to the payer and ends the channel.
    ///
    /// At the amount that is paid out already no voucher is needed, and there is no payout; an unused channel closes at
    /// zero that way. A voucher that is given is verified all the same.
    ///
    /// # Errors
    /// The refusal; nothing has changed then.
    pub fn close(&mut self, order: &Signed<Close>, voucher: Option<&Signature>) -> Result<Settlement, EscrowRefusal> {
        let Close { channel_id, amount } = order.message;
        let entry = self.entry(channel_id)?;
        self.authorise(order, entry.channel.descriptor.payee)?;
        if let Some(voucher) = voucher {
            self.check_voucher(entry, amount, voucher)?;
        }
        if let Some(Ending::Closed(closed)) = entry.ending.filter(|_| entry.channel.settled == amount) {
            return Ok(closed);
        }
        entry.require_open()?;
        let (settled, deposit) = (entry.channel.settled, entry.channel.deposit);
        if amount < settled {
            return Err(EscrowRefusal::BelowSettled { amount, settled });
        }
        if amount > deposit {
            return Err(EscrowRefusal::AboveDeposit { amount, deposit });
        }
        if amount > settled {
            voucher.ok_or(EscrowRefusal::VoucherMissing { amount })?;
            self.pay_out(channel_id, amount)?;
        }
        let reference = order.message.digest(&self.identity);
        self.end(channel_id, reference, Ending::Closed)
    }

    /// Announces a withdrawal. As in the v1 contract a second request does not begin the grace period anew.
    ///
    /// # Errors
    /// The refusal; nothing has changed then.
    pub fn request_close(&mut self, order: &Signed<RequestClose>, now_ms: u64) -> Result<EscrowChannel, EscrowRefusal> {
        let RequestClose { channel_id, nonce, expiry } = order.message;
        let entry = self.entry(channel_id)?;
        let payer = entry.channel.descriptor.payer;
        self.authorise(order, payer)?;
        entry.require_open()?;
        if entry.channel.close_requested_at_ms.is_some() {
            return Ok(entry.channel.clone());
        }
        // The nonce matters here: a top-up cancels a request, and nobody may bring the cancelled one back.
        self.check_fresh(payer, nonce, expiry, now_ms)?;
        self.note_order(payer, LastOrder { nonce, digest: order.message.digest(&self.identity) });
        let channel = &mut self.entry_mut(channel_id)?.channel;
        channel.close_requested_at_ms = Some(now_ms);
        Ok(channel.clone())
    }

    /// Returns to the payer what was not paid out, after the grace period, and ends the channel.
    ///
    /// # Errors
    /// The refusal; nothing has changed then.
    pub fn withdraw(&mut self, order: &Signed<Withdraw>, now_ms: u64) -> Result<Settlement, EscrowRefusal> {
        let Withdraw { channel_id, nonce, expiry } = order.message;
        let entry = self.entry(channel_id)?;
        let payer = entry.channel.descriptor.payer;
        self.authorise(order, payer)?;
        if let Some(Ending::Withdrawn(withdrawn)) = entry.ending {
            return Ok(withdrawn);
        }
        entry.require_open()?;
        let requested_ms = entry.channel.close_requested_at_ms.ok_or(EscrowRefusal::NoCloseRequested)?;
        let until_ms = requested_ms.saturating_add(self.config.grace_ms);
        if now_ms < until_ms {
            return Err(EscrowRefusal::GracePeriod { until_ms, now_ms });
        }
        self.check_fresh(payer, nonce, expiry, now_ms)?;
        let reference = order.message.digest(&self.identity);
        self.note_order(payer, LastOrder { nonce, digest: reference });
        self.end(channel_id, reference, Ending::Withdrawn)
    }

    /// Checks that no money appeared or vanished: for each token, balances and deposits are what was funded.
    ///
    /// # Errors
    /// The first token whose books do not balance.
    pub fn conservation(&self) -> Result<(), LedgerImbalance> {
        let mut held: BTreeMap<Address, Option<Amount>> =
            self.funded.keys().map(|token| (*token, Some(Amount::ZERO))).collect();
        let balances = self.balances.iter().map(|((_, token), balance)| (*token, *balance));
        let deposits = self.channels.values().map(|entry| (entry.channel.descriptor.token, entry.held()));
        for (token, amount) in balances.chain(deposits) {
            let sum = held.entry(token).or_insert(Some(Amount::ZERO));
            *sum = sum.and_then(|sum| sum.checked_add(amount));
        }
        for (token, held) in held {
            let funded = self.funded.get(&token).copied().unwrap_or_default();
            if held != Some(funded) {
                return Err(LedgerImbalance { token, held, funded });
            }
        }
        Ok(())
    }

    fn entry(&self, id: ChannelId) -> Result<&Entry, EscrowRefusal> {
        self.channels.get(&id).ok_or(EscrowRefusal::UnknownChannel(id))
    }

    fn entry_mut(&mut self, id: ChannelId) -> Result<&mut Entry, EscrowRefusal> {
        let entry = self.channels.get_mut(&id).ok_or(EscrowRefusal::UnknownChannel(id))?;
        self.touched.insert(Row::Channel(id));
        Ok(entry)
    }

    fn set_balance(&mut self, holder: Address, token: Address, balance: Amount) {
        self.balances.insert((holder, token), balance);
        self.touched.insert(Row::Balance(holder, token));
    }

    fn note_order(&mut self, giver: Address, last: LastOrder) {
        self.last_orders.insert(giver, last);
        self.touched.insert(Row::LastOrder(giver));
    }

    fn is_repeated(&self, giver: Address, order: LastOrder) -> bool {
        self.last_orders.get(&giver) == Some(&order)
    }

    /// The rows that have changed since the last time, and their contents.
    pub(super) fn take_touched(&mut self) -> Vec<(Row, Content)> {
        let touched = std::mem::take(&mut self.touched);
        touched.into_iter().filter_map(|row| Some((row, self.content(&row)?))).collect()
    }

    fn content(&self, row: &Row) -> Option<Content> {
        Some(match row {
            Row::Balance(holder, token) => Content::Amount(self.balance(*holder, *token)),
            Row::Funded(token) => Content::Amount(*self.funded.get(token)?),
            Row::LastOrder(giver) => Content::LastOrder(*self.last_orders.get(giver)?),
            Row::Channel(id) => Content::Entry(Box::new(self.channels.get(id)?.clone())),
        })
    }

    /// Puts a row back that was stored. A content that is not of the row's kind is refused.
    #[cfg(feature = "redb")]
    pub(super) fn restore(&mut self, row: Row, content: Content) -> Result<(), (Row, Content)> {
        match (row, content) {
            (Row::Balance(holder, token), Content::Amount(amount)) => {
                self.balances.insert((holder, token), amount);
            }
            (Row::Funded(token), Content::Amount(amount)) => drop(self.funded.insert(token, amount)),
            (Row::LastOrder(giver), Content::LastOrder(last)) => drop(self.last_orders.insert(giver, last)),
            (Row::Channel(id), Content::Entry(entry)) if entry.channel.descriptor.id() == id => {
                self.channels.insert(id, *entry);
            }
            other => return Err(other),
        }
        Ok(())
    }

    /// How many channels it knows, ended ones included.
    pub fn channel_count(&self) -> usize {
        self.channels.len()
    }

    /// Always first: nothing is answered to whom it does not concern.
    fn authorise<M: LedgerMessage>(&self, order: &Signed<M>, expected: Address) -> Result<(), EscrowRefusal> {
        order.verify(&self.identity, expected).map_err(|_| EscrowRefusal::Unauthorised { expected })
    }

    fn check_voucher(&self, entry: &Entry, amount: Amount, signature: &Signature) -> Result<(), EscrowRefusal> {
        let expected = entry.channel.descriptor.signer();
        let voucher = Voucher { channel_id: entry.channel.descriptor.id(), amount, signature: *signature };
        voucher.verify(&self.domain, &Verifier::new(expected)).map_err(|_| EscrowRefusal::BadVoucher { expected })
    }

    /// An order of a payer is taken once and before it lapses.
    fn check_fresh(&self, payer: Address, nonce: u64, expiry_ms: u64, now_ms: u64) -> Result<(), EscrowRefusal> {
        if expiry_ms != 0 && now_ms > expiry_ms {
            return Err(EscrowRefusal::Expired { expiry_ms, now_ms });
        }
        let last = self.last_nonce(payer);
        if nonce <= last {
            return Err(EscrowRefusal::NonceUsed { nonce, last });
        }
        Ok(())
    }

    /// Takes a deposit out of an account; in development mode the account is first funded with what it lacks.
    fn take(&mut self, payer: Address, token: Address, amount: Amount) -> Result<(), EscrowRefusal> {
        let available = self.balance(payer, token);
        let missing = amount.saturating_sub(available);
        if !missing.is_zero() {
            if !self.config.dev || missing > MAX_DEV_CREDIT {
                return Err(EscrowRefusal::InsufficientBalance { needed: amount, available });
            }
            self.fund(payer, token, missing)?;
        }
        let rest = self.balance(payer, token).checked_sub(amount);
        let rest = rest.ok_or(EscrowRefusal::InsufficientBalance { needed: amount, available })?;
        self.set_balance(payer, token, rest);
        Ok(())
    }

    /// Moves the payee's share from the deposit to its account. The caller has checked that settled ≤ amount ≤ deposit.
    fn pay_out(&mut self, id: ChannelId, amount: Amount) -> Result<(), EscrowRefusal> {
        let channel = &self.entry(id)?.channel;
        let (payee, token) = (channel.descriptor.payee, channel.descriptor.token);
        let settled = if broken!("ledger.forget-settled") { Amount::ZERO } else { channel.settled };
        let share = amount.checked_sub(settled).ok_or(EscrowRefusal::BelowSettled { amount, settled })?;
        let balance = self.balance(payee, token).checked_add(share).ok_or(EscrowRefusal::TooMuch)?;
        self.entry_mut(id)?.channel.settled = amount;
        self.set_balance(payee, token, balance);
        Ok(())
    }

    /// Returns what is left to the payer and ends the channel.
    fn end(
        &mut self,
        id: ChannelId,
        reference: Hash,
        ending: impl Fn(Settlement) -> Ending,
    ) -> Result<Settlement, EscrowRefusal> {
        let entry = self.entry(id)?;
        let (payer, token) = (entry.channel.descriptor.payer, entry.channel.descriptor.token);
        let settlement = Settlement { reference, settled: entry.channel.settled, refunded: entry.held() };
        let balance = self.balance(payer, token).checked_add(settlement.refunded).ok_or(EscrowRefusal::TooMuch)?;
        let entry = self.entry_mut(id)?;
        entry.channel.finalized = true;
        entry.ending = Some(ending(settlement));
        self.set_balance(payer, token, balance);
        Ok(settlement)
    }
}

#[cfg(test)]
mod tests;
