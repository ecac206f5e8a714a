//! The payer's side: a wallet that opens paid connections, meters what arrives, and signs ahead within its bounds.
//!
//! One task for each paid connection signs vouchers, off the session's task: the session counts the price of what
//! arrives and says when the count has reached a mark; the task signs the next voucher and sets the next mark. What may
//! be signed is decided by [`PayerBook`] alone, whatever the payee claims.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tollway_protocol::error::{ConnectionEnd, Reason, code};
use tollway_protocol::id::ConnectionId;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::ledger_messages::{LedgerIdentity, OpenChannel, Signed, is_reserved_chain};
use tollway_protocol::payment::{
    Address, Amount, Binding, ChannelDescriptor, ChannelId, CloseVoucher, Credential, CredentialDraft, Decline,
    DeclineReason, Hash, NeedAnswer, NeedVoucher, PayerBook, PayerLimits, PaymentMessage, Place, Quote, Receipt,
    ReceiptStatus, SecretKey, Terms, TermsError, UnworkableTerms, Voucher, VoucherDomain, VoucherProtocol,
};
use tollway_protocol::session::{MoneyCount, PayerMoney};

use super::mailbox::{Letters, Mailbox};
use super::windows::paid_limits;
use crate::connection::Connection;
use crate::escrow::{Escrow, EscrowError, EscrowRefusal, LedgerClient};
use crate::session::{OpenError, Session};
use crate::shared::Shared;

/// How long a close waits for the calls of its connection to end, and then for the payee's final receipt.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);
/// How long an order to the ledger is good for.
const ORDER_LIFETIME: Duration = Duration::from_secs(300);
/// How often an order is signed anew because another one of this payer was faster.
const NONCE_TRIES: u32 = 32;
/// With no `max_ahead` given: so many of the dearest unit, and at least the price of [`DEFAULT_AHEAD_BYTES`].
const DEFAULT_AHEAD_UNITS: u128 = 16;
/// With no `max_ahead` given: about 10 ms of a fast local stream.
const DEFAULT_AHEAD_BYTES: u64 = 16 * 1024 * 1024;

/// What a wallet may do. All amounts are base units.
#[derive(Debug, Clone)]
pub struct WalletConfig {
    /// The payer's key.
    pub key: Arc<SecretKey>,
    /// The payee that is trusted; `None` trusts whoever signs the terms, for a user who has looked at them.
    pub payee: Option<Address>,
    /// Escrows besides local ledgers that are trusted. The signed terms of a pinned payee vouch for a ledger.
    pub escrows: Vec<Address>,
    /// The most that one connection may cost.
    pub budget: Amount,
    /// The most that is authorised beyond what was received; `None` for a default by the terms.
    pub max_ahead: Option<Amount>,
}

impl WalletConfig {
    /// A wallet with this key that spends at most `budget` base units on a connection.
    pub fn new(key: SecretKey, budget: Amount) -> Self {
        WalletConfig { key: Arc::new(key), payee: None, escrows: Vec::new(), budget, max_ahead: None }
    }
}

/// Why a wallet did not pay, or stopped paying.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WalletError {
    /// The service is free: open it without a wallet.
    #[error("the service was accepted without payment; open it without a wallet")]
    NotPriced,
    /// What the peer sent as terms is none.
    #[error("the peer's quote is malformed: {0}")]
    MalformedQuote(String),
    /// The terms are not signed by the payee that is trusted, or make no sense.
    #[error("the terms are refused: {0}")]
    Terms(#[from] TermsError),
    /// The terms are of another payee than the one that is trusted. Nothing was paid.
    #[error("the payee is {found}, and only {expected} is trusted; nothing was paid")]
    PayeeMismatch {
        /// Who is trusted.
        expected: Address,
        /// Who signed the terms.
        found: Address,
    },
    /// The terms are for another service.
    #[error("the terms are for the service '{found}', not '{expected}'")]
    OtherService {
        /// What was asked for.
        expected: String,
        /// What the terms name.
        found: String,
    },
    /// The escrow is neither a local ledger nor on the trust list.
    #[error("the escrow {escrow} on chain {chain_id} is not trusted")]
    EscrowNotTrusted {
        /// The escrow.
        escrow: Address,
        /// Its chain.
        chain_id: u64,
    },
    /// The ledger at the terms' URL is not the one that the terms name.
    #[error("the ledger at {url} is not the one in the terms")]
    OtherLedger {
        /// Where the terms say that it is.
        url: String,
    },
    /// The terms ask for something that this wallet does not do.
    #[error("the terms ask for {0}, which this wallet does not do")]
    Unsupported(&'static str),
    /// One unit costs more than is authorised ahead.
    #[error(transparent)]
    Unworkable(#[from] UnworkableTerms),
    /// The budget does not reach.
    #[error("the budget is too small: {needed} base units are needed, and the budget is {budget}")]
    BudgetTooSmall {
        /// What is needed in all to go on, in base units.
        needed: Amount,
        /// The budget in base units.
        budget: Amount,
    },
    /// The payer declined a voucher for another reason.
    #[error("payment was declined: {0}")]
    Declined(Decline),
    /// The escrow did not do as it was told.
    #[error("{0}")]
    Escrow(String),
    /// The connection was not opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The payee refused a voucher or the close.
    #[error("the payee refused: {0}")]
    Refused(String),
    /// The payee says that it delivered more than was received.
    #[error("disputed: {claimed} base units were received, and the payee says that it delivered {spent}")]
    Disputed {
        /// What was received, in base units.
        claimed: Amount,
        /// The payee's count, in base units.
        spent: Amount,
    },
    /// The payee sent something that is no payment message, or is not signed as it must be.
    #[error("the payee sent a bad payment message: {0}")]
    BadMessage(String),
    /// The connection ended.
    #[error("the paid connection ended: {0}")]
    Ended(ConnectionEnd),
    /// The calls of the connection, or the final receipt, did not come in time.
    #[error("{0} did not come in time")]
    Timeout(&'static str),
}

impl From<EscrowError> for WalletError {
    fn from(error: EscrowError) -> Self {
        WalletError::Escrow(error.to_string())
    }
}

/// How a paid connection stands. All amounts are cumulative base units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PaymentStats {
    /// What the escrow holds.
    pub deposit: Amount,
    /// The highest voucher that was signed.
    pub signed: Amount,
    /// The price of what arrived, by the payer's own count.
    pub received: Amount,
    /// Vouchers that were signed.
    pub vouchers: u64,
    /// The most that was ever signed beyond what was received.
    pub peak_ahead: Amount,
    /// What may be signed beyond what was received.
    pub max_ahead: Amount,
    /// What the connection may cost.
    pub budget: Amount,
    /// Metered bytes that arrived.
    pub bytes: u64,
    /// Metered items that arrived.
    pub items: u64,
}

/// How a channel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClosedChannel {
    /// The channel.
    pub channel_id: ChannelId,
    /// The payee's final receipt, verified.
    pub receipt: Receipt,
    /// The payer's own account.
    pub stats: PaymentStats,
}

/// Opens paid connections. Clones share nothing but the key.
#[derive(Debug, Clone)]
pub struct Wallet {
    config: WalletConfig,
}

/// Terms whose signature was verified, and the challenge that came with them.
struct Quoted {
    terms: Terms,
    challenge: tollway_protocol::payment::Challenge,
}

impl Wallet {
    /// A wallet with these bounds.
    pub fn new(config: WalletConfig) -> Self {
        Wallet { config }
    }

    /// The payer's address.
    pub fn address(&self) -> Address {
        self.config.key.address()
    }

    /// Asks for the terms of a service, and verifies who signed them. Nothing is paid.
    ///
    /// # Errors
    /// When the service is free or not there, or its terms are refused.
    pub async fn quote(&self, session: &Session, service: &str) -> Result<Terms, WalletError> {
        Ok(self.ask(session, service).await?.terms)
    }

    async fn ask(&self, session: &Session, service: &str) -> Result<Quoted, WalletError> {
        let terms = match session.open(service).await {
            Ok(_free) => return Err(WalletError::NotPriced),
            Err(OpenError::PaymentRequired { terms }) => terms,
            Err(error) => return Err(error.into()),
        };
        let quote = Quote::decode(&terms).map_err(|error| WalletError::MalformedQuote(error.to_string()))?;
        // Whoever signed is named before the pinned payee is compared, so that the error can say both.
        let terms = quote.terms.verify(None)?;
        // [pay.terms.signed]
        if let Some(expected) = self.config.payee.filter(|&expected| expected != terms.payee) {
            return Err(WalletError::PayeeMismatch { expected, found: terms.payee });
        }
        if terms.service != service {
            return Err(WalletError::OtherService { expected: service.to_owned(), found: terms.service });
        }
        if quote.challenge.terms_hash != quote.terms.hash() {
            return Err(WalletError::MalformedQuote("the challenge is for other terms".to_owned()));
        }
        Ok(Quoted { terms, challenge: quote.challenge })
    }

    /// What the wallet does under these terms, or why it does nothing.
    fn limits_for(&self, terms: &Terms) -> Result<PayerLimits, WalletError> {
        if terms.protocol != VoucherProtocol::V1 {
            return Err(WalletError::Unsupported("vouchers of another protocol than v1"));
        }
        if terms.binding != Binding::None {
            return Err(WalletError::Unsupported("a binding to TLS, which this conduit lacks"));
        }
        if terms.methods.iter().any(|method| method.price.bytes_in.is_some_and(|rate| !rate.amount.is_zero())) {
            return Err(WalletError::Unsupported("payment for the bytes that the payer sends"));
        }
        let budget = self.config.budget;
        if terms.minimum_deposit > budget {
            return Err(WalletError::BudgetTooSmall { needed: terms.minimum_deposit, budget });
        }
        // `check` has made sure that both sums exist.
        let dearest_unit = terms.dearest_unit().unwrap_or(Amount::MAX);
        let default = || {
            let units = dearest_unit.saturating_add(terms.minimum_delta).checked_mul(DEFAULT_AHEAD_UNITS);
            let bytes = terms.methods.iter().filter_map(|method| method.price.bytes_out?.cost(DEFAULT_AHEAD_BYTES));
            units.unwrap_or(Amount::MAX).max(bytes.max().unwrap_or(Amount::ZERO))
        };
        let max_ahead = self.config.max_ahead.unwrap_or_else(default);
        let limits = PayerLimits {
            budget,
            max_ahead,
            low_mark: None,
            minimum_delta: terms.minimum_delta,
            deposit_limit: Amount::ZERO,
            top_up_step: Amount::ZERO,
            in_flight_cap: terms.in_flight_cap,
            loss_budget: Amount::ZERO,
        };
        // [pay.terms.workable]
        limits.acceptable(dearest_unit)?;
        Ok(limits)
    }

    /// The escrow of the terms, if it is one that may be trusted with a deposit.
    async fn escrow(&self, terms: &Terms) -> Result<LedgerClient, WalletError> {
        let (escrow, chain_id) = (terms.escrow, terms.chain_id);
        let is_ledger = is_reserved_chain(chain_id) && LedgerIdentity { chain_id, escrow }.is_consistent();
        if !is_ledger {
            return Err(if self.config.escrows.contains(&escrow) {
                WalletError::Unsupported("an escrow that is not a local ledger")
            } else {
                WalletError::EscrowNotTrusted { escrow, chain_id }
            });
        }
        let url = terms.ledger_url.clone().ok_or(WalletError::Unsupported("a ledger without a URL"))?;
        let endpoint = url.parse().map_err(|_| WalletError::Unsupported("a ledger at a URL of another scheme"))?;
        let ledger = LedgerClient::connect(&endpoint).await?;
        if (ledger.chain_id(), ledger.address()) != (chain_id, escrow) {
            return Err(WalletError::OtherLedger { url });
        }
        Ok(ledger)
    }

    /// Deposits at the escrow: min(budget, suggested deposit).
    async fn deposit(&self, terms: &Terms) -> Result<(ChannelDescriptor, Amount), WalletError> {
        let ledger = self.escrow(terms).await?;
        let mut salt = [0; 32];
        getrandom::fill(&mut salt).map_err(|error| WalletError::Escrow(format!("no randomness: {error}")))?;
        let mut above = 0;
        for _ in 0..NONCE_TRIES {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            // Nonces rise; the clock does so by itself, also after a restart.
            let nonce = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX).max(above);
            let order = OpenChannel {
                payer: self.address(),
                payee: terms.payee,
                token: terms.token,
                salt: Hash(salt),
                authorized_signer: Address::ZERO,
                deposit: self.config.budget.min(terms.suggested_deposit),
                nonce,
                expiry: u64::try_from((now + ORDER_LIFETIME).as_millis()).unwrap_or(u64::MAX),
            };
            let (descriptor, deposit) = (order.descriptor(&ledger.identity()), order.deposit);
            match ledger.open(Signed::sign(order, &ledger.identity(), &self.config.key)).await {
                // Vouchers are signed for the channel that was ordered, whatever the ledger calls it: another one's could
                // lie on a real chain.
                Ok(channel) if channel.descriptor == descriptor => {
                    return Ok((descriptor, deposit.min(channel.deposit)));
                }
                Ok(_) => return Err(WalletError::Escrow("the ledger answered with another channel".to_owned())),
                // Another order of this payer was faster: nothing has happened, and a later nonce is taken.
                Err(EscrowError::Refused(EscrowRefusal::NonceUsed { last, .. })) => above = last.saturating_add(1),
                Err(error) => return Err(error.into()),
            }
        }
        Err(WalletError::Timeout("an order that is not overtaken by another of this payer"))
    }

    /// Opens a connection to a priced service: asks for its terms, deposits, proves possession of the channel, and
    /// begins to pay.
    ///
    /// # Errors
    /// When the terms are refused, before anything is paid; when the escrow or the payee refuses. A deposit that was
    /// made and not used is returned by the escrow after its grace period.
    ///
    /// # Cancel safety
    /// A dropped future may have deposited. Nothing beyond the deposit was authorised.
    pub async fn open(&self, session: &Session, service: &str) -> Result<PaidConnection, WalletError> {
        let Quoted { terms, challenge } = self.ask(session, service).await?;
        let limits = self.limits_for(&terms)?;
        let (descriptor, deposit) = self.deposit(&terms).await?;
        let mut book = PayerBook::open(limits, deposit);
        let epoch = book.next_epoch(None).ok_or(WalletError::Unsupported("more epochs than there are"))?;
        let draft = CredentialDraft {
            challenge,
            descriptor: descriptor.clone(),
            epoch,
            received: Amount::ZERO,
            proof: Vec::new(),
            voucher: None,
        };
        let place = Place { service, exporter: Hash::ZERO };
        let credential = draft
            .sign(&self.config.key, place)
            .and_then(|credential: Credential| credential.encode())
            .map_err(|error| WalletError::MalformedQuote(error.to_string()))?;
        let prices = Arc::new(terms.methods.iter().map(|method| (method.method_id, method.price)).collect());
        let mailbox = Arc::new(Mailbox::default());
        let money = PayerMoney { prices, received: Amount::ZERO, mark: Amount::ZERO };
        let windows = paid_limits(&terms, limits.max_ahead);
        let paid = (Bytes::from(credential), money, mailbox.clone());
        let (connection, receipt) = session.open_with(service, windows, Metadata::new(), Some(paid)).await?;
        // Who cannot sign for the payee has accepted in its place: nothing is authorised. [pay.receipt.accept]
        match PaymentMessage::decode(&receipt) {
            Ok(PaymentMessage::Receipt(receipt)) => {
                receipt.verify(&descriptor).map_err(|error| WalletError::BadMessage(error.to_string()))?;
            }
            _ => return Err(WalletError::BadMessage("the connection was accepted without a receipt".to_owned())),
        }
        book.record_connected(Amount::ZERO);
        // The payee may hold the price of every call that it takes at once, and ask for what comes beyond.
        let dearest_call = terms.methods.iter().map(|method| method.price.call).max().unwrap_or_default();
        let calls = u128::from(connection.inner().session.shared.max_calls(connection.id()));
        book.record_open_reservations(dearest_call.checked_mul(calls).unwrap_or(Amount::MAX));
        Ok(PaidConnection::start(connection, terms, descriptor, book, mailbox, self.config.clone(), limits))
    }
}

/// A connection that is paid for as it is used. Close it with [`close`](Self::close): dropped, it leaves the settlement
/// to the payee.
pub struct PaidConnection {
    connection: Connection,
    terms: Terms,
    state: Arc<Mutex<PayerState>>,
    failed: watch::Receiver<Option<WalletError>>,
    close: mpsc::Sender<CloseOrder>,
}

impl fmt::Debug for PaidConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PaidConnection").field("connection", &self.connection).finish_non_exhaustive()
    }
}

type CloseOrder = oneshot::Sender<Result<ClosedChannel, WalletError>>;

/// What handle and task share.
struct PayerState {
    book: PayerBook,
    vouchers: u64,
}

impl PaidConnection {
    fn start(
        connection: Connection,
        terms: Terms,
        descriptor: ChannelDescriptor,
        book: PayerBook,
        mailbox: Arc<Mailbox>,
        config: WalletConfig,
        limits: PayerLimits,
    ) -> Self {
        let state = Arc::new(Mutex::new(PayerState { book, vouchers: 0 }));
        let (fail, failed) = watch::channel(None);
        let (close, orders) = mpsc::channel(1);
        let task = PayerTask {
            shared: connection.inner().session.shared.clone(),
            id: connection.id(),
            channel_id: descriptor.id(),
            domain: descriptor.voucher_domain(),
            descriptor,
            mailbox,
            key: config.key,
            state: state.clone(),
            limits,
            fail,
            ordered: None,
            closing: None,
        };
        let paid = PaidConnection { connection, terms, state, failed, close };
        tokio::spawn(task.run(orders));
        paid
    }

    /// The connection, to call on.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The terms under which it was opened.
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// How it stands.
    pub fn stats(&self) -> PaymentStats {
        let count = self.connection.money();
        let state = self.state.lock();
        stats(&state, count)
    }

    /// Why payment stopped, once it did: calls then fail for want of it.
    pub fn failure(&self) -> Option<WalletError> {
        self.failed.borrow().clone()
    }

    /// Waits until payment stops.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn failed(&self) -> WalletError {
        let mut failed = self.failed.clone();
        match failed.wait_for(Option::is_some).await {
            Ok(error) => error.clone().unwrap_or(WalletError::Timeout("the payment task")),
            // The task has ended without an error: with the connection.
            Err(_) => WalletError::Ended(self.connection.closed().await),
        }
    }

    /// Waits for all calls to end, states what was received in a close voucher, and waits for the payee's final
    /// receipt. Then the connection is closed.
    ///
    /// # Errors
    /// When the payee disputes or does not answer; what it can settle by then is bounded by the vouchers that it has.
    ///
    /// # Cancel safety
    /// A dropped future may have closed the channel.
    pub async fn close(self) -> Result<ClosedChannel, WalletError> {
        let (order, answer) = oneshot::channel();
        if self.close.send(order).await.is_err() {
            return Err(self.failure().unwrap_or(WalletError::Ended(self.connection.closed().await)));
        }
        let closed = match tokio::time::timeout(2 * CLOSE_TIMEOUT, answer).await {
            Ok(Ok(closed)) => closed,
            Ok(Err(_ended)) => Err(WalletError::Ended(self.connection.closed().await)),
            Err(_elapsed) => Err(WalletError::Timeout("the payee's final receipt")),
        };
        self.connection.close(Reason::new(code::NONE, "the channel is closed"));
        closed
    }
}

fn stats(state: &PayerState, count: Option<MoneyCount>) -> PaymentStats {
    let limits = state.book.limits();
    let received = count.map_or(state.book.received(), |count| count.amount);
    PaymentStats {
        deposit: state.book.deposit(),
        signed: state.book.signed(),
        received,
        vouchers: state.vouchers,
        peak_ahead: state.book.peak_ahead(),
        max_ahead: limits.max_ahead,
        budget: limits.budget,
        bytes: count.map_or(0, |count| count.bytes),
        items: count.map_or(0, |count| count.items),
    }
}

/// Pays for one connection.
struct PayerTask {
    shared: Arc<Shared>,
    id: ConnectionId,
    channel_id: ChannelId,
    descriptor: ChannelDescriptor,
    domain: VoucherDomain,
    mailbox: Arc<Mailbox>,
    key: Arc<SecretKey>,
    state: Arc<Mutex<PayerState>>,
    limits: PayerLimits,
    fail: watch::Sender<Option<WalletError>>,
    /// A close that waits for the ends of all calls, which are paid until then, and for how long.
    ordered: Option<(CloseOrder, Instant)>,
    /// A close that waits for the final receipt.
    closing: Option<CloseOrder>,
}

impl PayerTask {
    async fn run(mut self, mut orders: mpsc::Receiver<CloseOrder>) {
        self.pay();
        let mut handle_lives = true;
        loop {
            let deadline = self.ordered.as_ref().map(|(_, deadline)| *deadline);
            let calls_ended = async {
                match deadline {
                    Some(deadline) => tokio::time::timeout_at(deadline, self.shared.calls_ended(self.id)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                letters = self.mailbox.take() => {
                    if !self.handle(letters) {
                        return;
                    }
                }
                ended = calls_ended => self.start_close(ended.is_ok()),
                // The handle goes with its order, so that there is one.
                order = orders.recv(), if handle_lives => match order {
                    Some(order) => self.ordered = Some((order, Instant::now() + CLOSE_TIMEOUT)),
                    // The handle was dropped: the connection goes with it, and the mailbox says so.
                    None => {
                        handle_lives = false;
                        self.shared.close_connection(self.id, Reason::new(code::DROPPED, "the payer has gone"));
                    }
                },
            }
        }
    }

    /// Works the mailbox off. Returns whether the connection goes on.
    fn handle(&mut self, letters: Letters) -> bool {
        if let Some(received) = letters.received {
            self.state.lock().book.record_received(received);
        }
        for message in letters.messages {
            match PaymentMessage::decode(&message) {
                Ok(message) => self.handle_message(message),
                Err(error) => self.stop(WalletError::BadMessage(error.to_string())),
            }
        }
        if let Some(money) = letters.ended {
            if let Some(count) = money {
                self.state.lock().book.record_received(count.amount);
            }
            return false;
        }
        self.pay();
        true
    }

    /// Signs what is due, and says when the next voucher will be.
    fn pay(&mut self) {
        if self.closing.is_some() {
            return;
        }
        let (due, mark) = {
            let mut state = self.state.lock();
            let due = match state.book.retry_need() {
                Some(NeedAnswer::Sign(amount)) => Some(amount),
                _ => state.book.next_voucher(),
            };
            (due, state.book.next_mark())
        };
        match due {
            Some(amount) => self.sign(amount),
            None => self.shared.set_received_mark(self.id, mark),
        }
    }

    /// Books, signs and sends a voucher.
    fn sign(&mut self, amount: Amount) {
        let mut state = self.state.lock();
        if let Some(ceiling) = state.book.next_ceiling(amount) {
            // Without a durable wallet the ceiling lives as long as the channel: it is never resumed.
            state.book.record_ceiling(ceiling);
        }
        if let Err(error) = state.book.record_signed(amount) {
            drop(state);
            return self.stop(WalletError::BadMessage(error.to_string()));
        }
        state.vouchers += 1;
        let (received, mark) = (state.book.received(), state.book.next_mark());
        drop(state);
        match Voucher::sign(&self.domain, &self.key, self.channel_id, amount) {
            Ok(voucher) => self.send(&PaymentMessage::Voucher { amount, signature: voucher.signature, received }),
            Err(error) => self.stop(WalletError::BadMessage(error.to_string())),
        }
        self.shared.set_received_mark(self.id, mark);
    }

    fn send(&self, message: &PaymentMessage) {
        // Fails only when the connection has ended, which the mailbox says too.
        let _ended = self.shared.send_payment(self.id, Bytes::from(message.encode()));
    }

    /// Payment stops. The first reason stands.
    fn stop(&mut self, error: WalletError) {
        if let Some(order) = self.closing.take() {
            // Whoever closes has dropped the future if it does not listen.
            let _dropped = order.send(Err(error.clone()));
        }
        self.fail.send_if_modified(|failed| failed.is_none() && failed.replace(error).is_none());
    }

    fn handle_message(&mut self, message: PaymentMessage) {
        match message {
            // It crossed our Close: all calls have ended, and nothing waits any more.
            PaymentMessage::NeedVoucher { .. } if self.closing.is_some() => {}
            PaymentMessage::NeedVoucher { required, accepted, spent, deposit } => {
                let need = NeedVoucher { required, accepted, spent, deposit };
                let answer = {
                    let mut state = self.state.lock();
                    // The session may have counted more than its last mark said.
                    if let Some(count) = self.shared.open_money(self.id) {
                        state.book.record_received(count.amount);
                    }
                    state.book.handle_need(need)
                };
                match answer {
                    NeedAnswer::Sign(amount) => self.sign(amount),
                    NeedAnswer::Decline(decline) => self.decline(decline),
                    // The deposit limit is zero, so that no top-up is ever asked for.
                    _ => {}
                }
            }
            PaymentMessage::Receipt(signed) => match signed.verify(&self.descriptor) {
                Ok(receipt) => self.handle_receipt(receipt),
                Err(error) => self.stop(WalletError::BadMessage(error.to_string())),
            },
            PaymentMessage::Refused { reason } => self.stop(WalletError::Refused(reason)),
            PaymentMessage::Disputed { claimed, spent } => self.stop(WalletError::Disputed { claimed, spent }),
            _ => self.stop(WalletError::BadMessage("a message that only a payer sends".to_owned())),
        }
    }

    fn decline(&mut self, decline: Decline) {
        self.send(&PaymentMessage::Decline { reason: decline.to_string() });
        let budget = self.limits.budget;
        self.stop(match decline.reason {
            // A deposit of the whole budget is the budget's limit, too.
            DeclineReason::Budget | DeclineReason::Deposit if decline.limit >= budget => {
                WalletError::BudgetTooSmall { needed: decline.needed, budget }
            }
            _ => WalletError::Declined(decline),
        });
    }

    fn handle_receipt(&mut self, receipt: Receipt) {
        let is_final = matches!(receipt.status, ReceiptStatus::Closed | ReceiptStatus::ClosedForced);
        if let (true, Some(order)) = (is_final, self.closing.take()) {
            let count = self.shared.open_money(self.id);
            let state = self.state.lock();
            let stats = stats(&state, count);
            drop(state);
            let _dropped = order.send(Ok(ClosedChannel { channel_id: self.channel_id, receipt, stats }));
        }
    }

    /// Sends the close voucher, if all calls have ended in time.
    fn start_close(&mut self, calls_ended: bool) {
        let Some((order, _)) = self.ordered.take() else { return };
        if !calls_ended {
            let _dropped = order.send(Err(WalletError::Timeout("the end of all calls")));
            return;
        }
        let (amount, received) = {
            let mut state = self.state.lock();
            if let Some(count) = self.shared.open_money(self.id) {
                state.book.record_received(count.amount);
            }
            (state.book.close_amount(Amount::ZERO), state.book.received())
        };
        match CloseVoucher::sign(&self.domain, &self.key, self.channel_id, amount) {
            Ok(voucher) => {
                self.closing = Some(order);
                self.send(&PaymentMessage::Close { voucher, received });
            }
            Err(error) => {
                let _dropped = order.send(Err(WalletError::BadMessage(error.to_string())));
            }
        }
    }
}
