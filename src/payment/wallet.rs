//! The payer's side: a wallet that looks at terms, deposits, and opens paid connections within its bounds.
//!
//! A wallet remembers its channels in a [`WalletStore`]. A payee that it has a channel with is paid from that one; what was
//! signed, received and lost before stands. What must survive is written before it is sent: see `wallet_store.rs`.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tollway_protocol::error::code;
use tollway_protocol::payment::{
    Address, Amount, Binding, Challenge, ChannelDescriptor, ChannelId, CredentialDraft, CredentialError, Hash,
    PayerBook, PayerLimits, PaymentMessage, Place, Quote, Receipt, ReceiptStatus, ResumeRefusal, Signature,
    SignedReceipt, SigningRequest, Terms, VoucherProtocol,
};
use tollway_protocol::session::PayerMoney;

use super::mailbox::Mailbox;
use super::paid::PaidConnection;
use super::payer_task::{Opened, checkpoint_room};
use super::signer::{Signer, SignerError};
use super::wallet_error::WalletError;
use super::wallet_store::{MemoryWallet, StoredReceipt, WalletChannel, WalletPhase, WalletStore};
use super::windows::paid_limits;
use crate::session::{OpenError, Session};
use crate::shared::Opening;

/// With no `max_ahead` given: so many of the dearest unit, and at least the price of [`DEFAULT_AHEAD_BYTES`].
const DEFAULT_AHEAD_UNITS: u128 = 16;
/// With no `max_ahead` given: about 10 ms of a fast local stream.
const DEFAULT_AHEAD_BYTES: u64 = 16 * 1024 * 1024;
/// With no `loss_budget` given: so many times `max_ahead`. A payee whose process dies costs at most one lease, which is
/// about as much; one that breaks off more often than this is not worth its deposit.
const DEFAULT_LOSSES: u128 = 4;
/// How long a signer is given: a person who presses a button on a device needs seconds, a payee's patience is a minute.
const SIGN_TIMEOUT: Duration = Duration::from_secs(30);
/// How often an open is tried with another channel or another epoch. Each time something is known that was not before.
const OPEN_TRIES: u32 = 8;

/// What a wallet may do. All amounts are base units.
#[derive(Clone)]
pub struct WalletConfig {
    /// Signs for the payer: its key, or what keeps it.
    pub signer: Arc<dyn Signer>,
    /// Signs the vouchers of new channels in the payer's place: a delegated session key, which can authorise no more than
    /// their deposits and can give no orders to an escrow. `None` for the payer itself. Channels of another session key than
    /// this one are left alone.
    pub session_signer: Option<Arc<dyn Signer>>,
    /// The payee that is trusted; `None` trusts whoever signs the terms, for a user who has looked at them.
    pub payee: Option<Address>,
    /// Escrows besides local ledgers that are trusted. The signed terms of a pinned payee vouch for a ledger.
    pub escrows: Vec<Address>,
    /// The most that one connection may cost.
    pub budget: Amount,
    /// The most that all channels of the wallet's store may cost together; `None` for no bound but those of each.
    pub total_budget: Option<Amount>,
    /// The most that is authorised beyond what was received; `None` for a default by the terms.
    pub max_ahead: Option<Amount>,
    /// The most that a payee may cost by breaking off, over all its channels; `None` for four times `max_ahead`.
    pub loss_budget: Option<Amount>,
    /// Up to where a channel's deposit may grow by top-ups; `None` for as far as the budget reaches.
    pub deposit_limit: Option<Amount>,
    /// Where the payee is, to be remembered with the channel.
    pub payee_url: Option<String>,
    /// Where channels are remembered: in memory by default, so that they are closed before the process ends. Every wallet
    /// of one key that is used at the same time is a clone of one, so that no channel is paid from twice at once.
    pub store: Arc<dyn WalletStore>,
}

impl fmt::Debug for WalletConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WalletConfig")
            .field("payer", &self.signer.address())
            .field("payee", &self.payee)
            .field("budget", &self.budget)
            .field("max_ahead", &self.max_ahead)
            .finish_non_exhaustive()
    }
}

impl WalletConfig {
    /// A wallet with this key, or another signer, that spends at most `budget` base units on a connection.
    pub fn new(signer: impl Signer, budget: Amount) -> Self {
        WalletConfig {
            signer: Arc::new(signer),
            session_signer: None,
            payee: None,
            escrows: Vec::new(),
            budget,
            total_budget: None,
            max_ahead: None,
            loss_budget: None,
            deposit_limit: None,
            payee_url: None,
            store: Arc::new(MemoryWallet::new()),
        }
    }
}

/// Opens paid connections. Clones are the same wallet.
#[derive(Clone)]
pub struct Wallet {
    inner: Arc<Inner>,
}

struct Inner {
    config: WalletConfig,
    /// Channels that are paid from now.
    in_use: Mutex<HashSet<ChannelId>>,
}

impl fmt::Debug for Wallet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Wallet").field("config", &self.inner.config).finish_non_exhaustive()
    }
}

/// A channel that nobody else pays from while this lives.
pub(super) struct InUse {
    wallet: Wallet,
    id: ChannelId,
}

impl Drop for InUse {
    fn drop(&mut self) {
        self.wallet.inner.in_use.lock().remove(&self.id);
    }
}

/// Terms whose signature was verified, and the challenge that came with them.
struct Quoted {
    terms: Terms,
    challenge: Challenge,
}

/// Asks for the terms of a service, and verifies that its payee has signed them. Nothing is paid, and no key is needed.
///
/// # Errors
/// When the service is free or not there, or its terms are refused; with `payee`, also when they are another's.
pub async fn quote(session: &Session, service: &str, payee: Option<Address>) -> Result<Terms, WalletError> {
    Ok(ask(session, service, payee).await?.terms)
}

async fn ask(session: &Session, service: &str, payee: Option<Address>) -> Result<Quoted, WalletError> {
    let terms = match session.open(service).await {
        Ok(_free) => return Err(WalletError::NotPriced),
        Err(OpenError::PaymentRequired { terms }) => terms,
        Err(error) => return Err(error.into()),
    };
    let quote = Quote::decode(&terms).map_err(|error| WalletError::MalformedQuote(error.to_string()))?;
    // Whoever signed is named before the pinned payee is compared, so that the error can say both.
    let terms = quote.terms.verify(None)?;
    // [pay.terms.signed]
    if let Some(expected) = payee.filter(|&expected| expected != terms.payee) {
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

impl Wallet {
    /// A wallet with these bounds.
    pub fn new(config: WalletConfig) -> Self {
        Wallet { inner: Arc::new(Inner { config, in_use: Mutex::default() }) }
    }

    pub(super) fn config(&self) -> &WalletConfig {
        &self.inner.config
    }

    pub(super) fn store(&self) -> &dyn WalletStore {
        &*self.inner.config.store
    }

    /// The payer's address.
    pub fn address(&self) -> Address {
        self.config().signer.address()
    }

    /// The channels that it remembers.
    ///
    /// # Errors
    /// When its store failed.
    pub async fn channels(&self) -> Result<Vec<WalletChannel>, WalletError> {
        Ok(self.store().channels().await?)
    }

    /// The receipts that it remembers.
    ///
    /// # Errors
    /// When its store failed.
    pub async fn receipts(&self) -> Result<Vec<StoredReceipt>, WalletError> {
        Ok(self.store().receipts().await?)
    }

    /// Asks for the terms of a service, and verifies who signed them. Nothing is paid.
    ///
    /// # Errors
    /// When the service is free or not there, or its terms are refused.
    pub async fn quote(&self, session: &Session, service: &str) -> Result<Terms, WalletError> {
        quote(session, service, self.config().payee).await
    }

    /// What the wallet does under these terms, or why it does nothing.
    fn limits_for(&self, terms: &Terms, budget: Amount) -> Result<PayerLimits, WalletError> {
        if terms.protocol != VoucherProtocol::V1 {
            return Err(WalletError::Unsupported("vouchers of another protocol than v1"));
        }
        if terms.binding != Binding::None {
            return Err(WalletError::Unsupported("a binding to TLS, which this conduit lacks"));
        }
        if terms.methods.iter().any(|method| method.price.bytes_in.is_some_and(|rate| !rate.amount.is_zero())) {
            return Err(WalletError::Unsupported("payment for the bytes that the payer sends"));
        }
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
        let max_ahead = self.config().max_ahead.unwrap_or_else(default);
        let limits = PayerLimits {
            budget,
            max_ahead,
            low_mark: None,
            minimum_delta: terms.minimum_delta,
            deposit_limit: self.config().deposit_limit.unwrap_or(budget).min(budget),
            top_up_step: terms.suggested_deposit,
            in_flight_cap: terms.in_flight_cap,
            loss_budget: self
                .config()
                .loss_budget
                .unwrap_or(max_ahead.checked_mul(DEFAULT_LOSSES).unwrap_or(Amount::MAX)),
        };
        // [pay.terms.workable]
        limits.acceptable(dearest_unit)?;
        Ok(limits)
    }

    /// Opens a connection to a priced service: asks for its terms, takes the channel that it has with the payee or
    /// deposits for one, proves possession of it, and begins to pay.
    ///
    /// # Errors
    /// When the terms are refused, before anything is paid; when the escrow or the payee refuses; when the payee's count
    /// after a break is not believed. A deposit that was made stays in the wallet's store for the next time.
    ///
    /// # Cancel safety
    /// A dropped future may have deposited. Nothing beyond the deposit was authorised.
    pub async fn open(&self, session: &Session, service: &str) -> Result<PaidConnection, WalletError> {
        self.open_on(session, service, None).await
    }

    /// Opens a connection on a channel that the wallet has, such as to close it with its payee.
    ///
    /// # Errors
    /// As [`Wallet::open`], and when the channel is not there, in use, or at its end.
    pub async fn resume(
        &self,
        session: &Session,
        service: &str,
        channel: ChannelId,
    ) -> Result<PaidConnection, WalletError> {
        self.open_on(session, service, Some(channel)).await
    }

    async fn open_on(
        &self,
        session: &Session,
        service: &str,
        wanted: Option<ChannelId>,
    ) -> Result<PaidConnection, WalletError> {
        for _ in 0..OPEN_TRIES {
            let quoted = ask(session, service, self.config().payee).await?;
            let (channel, in_use, limits) = self.pick(&quoted.terms, wanted).await?;
            match self.connect(session, service, quoted, (channel, in_use, limits)).await? {
                Attempt::Opened(paid) => return Ok(*paid),
                Attempt::Again => {}
            }
        }
        Err(WalletError::Timeout("a channel that the payee takes"))
    }

    /// The channel to pay from, which nobody else uses meanwhile, and the bounds for it.
    async fn pick(
        &self,
        terms: &Terms,
        wanted: Option<ChannelId>,
    ) -> Result<(WalletChannel, InUse, PayerLimits), WalletError> {
        let known = self.channels().await?;
        let others = |id: Option<ChannelId>| known.iter().filter(move |channel| Some(channel.id()) != id);
        let sum = |amounts: &mut dyn Iterator<Item = Amount>| amounts.fold(Amount::ZERO, Amount::saturating_add);
        // What may still be spent, and still be lost, beside what the other channels have cost.
        let limits = |channel: Option<&WalletChannel>| -> Result<PayerLimits, WalletError> {
            let id = channel.map(WalletChannel::id);
            let counted = channel.map_or(Amount::ZERO, WalletChannel::counted);
            let spent = sum(&mut others(id).map(WalletChannel::cost));
            let total = self.config().total_budget.map_or(Amount::MAX, |total| total.saturating_sub(spent));
            let budget = counted.saturating_add(self.config().budget).min(total);
            let mut limits = self.limits_for(terms, budget)?;
            let lost = others(id).filter(|channel| channel.descriptor.payee == terms.payee);
            let lost = sum(&mut lost.map(WalletChannel::loss));
            let limit = limits.loss_budget;
            if lost > limit {
                return Err(ResumeRefusal::LossBudget { lost, limit }.into());
            }
            limits.loss_budget = limit.saturating_sub(lost);
            Ok(limits)
        };
        for channel in known.iter().filter(|channel| self.fits(channel, terms, wanted)) {
            let Some(in_use) = self.take(channel.id()) else { continue };
            // Who had it until now may have written it since the list was read.
            let Some(channel) = self.find(channel.id()).await?.filter(|channel| self.fits(channel, terms, wanted))
            else {
                continue;
            };
            let limits = limits(Some(&channel))?;
            if let Some(channel) = self.finish_deposit(channel).await? {
                return Ok((channel, in_use, limits));
            }
        }
        if let Some(id) = wanted {
            return Err(WalletError::Channel {
                id,
                what: "is not there, in use, at its end, or not one of these terms",
            });
        }
        let limits = limits(None)?;
        let channel = self.deposit(terms, limits.budget).await?;
        let in_use = self.take(channel.id());
        let in_use = in_use.ok_or(WalletError::Channel { id: channel.id(), what: "is new and in use" })?;
        Ok((channel, in_use, limits))
    }

    async fn find(&self, id: ChannelId) -> Result<Option<WalletChannel>, WalletError> {
        Ok(self.channels().await?.into_iter().find(|channel| channel.id() == id))
    }

    fn take(&self, id: ChannelId) -> Option<InUse> {
        self.inner.in_use.lock().insert(id).then(|| InUse { wallet: self.clone(), id })
    }

    /// Whether a channel can be paid from under these terms.
    fn fits(&self, channel: &WalletChannel, terms: &Terms, wanted: Option<ChannelId>) -> bool {
        let descriptor = &channel.descriptor;
        matches!(channel.phase, WalletPhase::Open | WalletPhase::Opening { .. })
            && wanted.is_none_or(|wanted| wanted == channel.id())
            && descriptor.payer == self.address()
            && self.signer_of(descriptor.signer()).is_some()
            && (descriptor.payee, descriptor.token) == (terms.payee, terms.token)
            && (descriptor.escrow, descriptor.chain_id) == (terms.escrow, terms.chain_id)
            && descriptor.protocol == terms.protocol
    }

    /// Who signs for an address, if this wallet has it.
    fn signer_of(&self, address: Address) -> Option<&Arc<dyn Signer>> {
        let config = self.config();
        let signers = config.session_signer.iter().chain([&config.signer]);
        signers.into_iter().find(|signer| signer.address() == address)
    }

    /// Has something signed by whoever is to sign it.
    pub(super) async fn sign(&self, request: SigningRequest) -> Result<Signature, WalletError> {
        let address = request.signer().unwrap_or_else(|| self.address());
        let Some(signer) = self.signer_of(address) else {
            return Err(SignerError::Refused(format!("nobody here signs for {address}")).into());
        };
        match tokio::time::timeout(SIGN_TIMEOUT, signer.sign(request)).await {
            Ok(signed) => Ok(signed?),
            Err(_late) => Err(SignerError::Unreachable("no answer in time".to_owned()).into()),
        }
    }

    async fn connect(
        &self,
        session: &Session,
        service: &str,
        Quoted { terms, challenge }: Quoted,
        (mut channel, in_use, limits): (WalletChannel, InUse, PayerLimits),
    ) -> Result<Attempt, WalletError> {
        let mut book = PayerBook::restore(limits, channel.book);
        let epoch = book.next_epoch(None).ok_or(WalletError::Unsupported("more epochs than there are"))?;
        // Durable before it is sent: after a crash a greater one must be known to take the channel over.
        channel.book = book.snapshot();
        self.store().save(channel.clone(), None).await?;
        let draft = CredentialDraft {
            challenge,
            descriptor: channel.descriptor.clone(),
            epoch,
            received: book.received(),
            proof: Vec::new(),
            voucher: None,
        };
        let place = Place { service, exporter: Hash::ZERO };
        let malformed = |error: CredentialError| WalletError::MalformedQuote(error.to_string());
        let possession = self.sign(draft.request(place).map_err(malformed)?).await?;
        let credential = draft.with(possession).encode().map_err(malformed)?;
        let prices = Arc::new(terms.methods.iter().map(|method| (method.method_id, method.price)).collect());
        let mailbox = Arc::new(Mailbox::default());
        let hold = book.received().saturating_add(checkpoint_room(&terms));
        let money = PayerMoney { prices, received: book.received(), mark: Amount::ZERO, hold };
        let windows = paid_limits(&terms, limits.max_ahead);
        let paid = (Bytes::from(credential), money, mailbox.clone());
        let (connection, receipt) =
            match session.open_with(Opening { paid: Some(paid), ..Opening::of(service, windows) }).await {
                Ok(opened) => opened,
                Err(error) => return self.learn(channel, error).await,
            };
        // Who cannot sign for the payee has accepted in its place: nothing is authorised. [pay.receipt.accept]
        let (signed, receipt) = accepted_by(&receipt, &channel.descriptor, channel.last_receipt)?;
        // What did not arrive before the break stands as lost in both books, or the channel is not used any more.
        let resumed = book.resume(receipt.spent);
        channel.last_receipt = receipt.sequence;
        channel.book = book.snapshot();
        self.store().save(channel.clone(), Some(signed)).await?;
        if let Err(refusal) = resumed {
            return Err(self.give_up(channel, refusal).await);
        }
        book.record_connected(receipt.accepted);
        // The payee may hold the price of every call that it takes at once, and ask for what comes beyond.
        let dearest_call = terms.methods.iter().map(|method| method.price.hold()).max().unwrap_or_default();
        let calls = u128::from(connection.shared().max_calls(connection.id()));
        book.record_open_reservations(dearest_call.checked_mul(calls).unwrap_or(Amount::MAX));
        let opened = Opened { wallet: self.clone(), in_use, connection, terms, channel, book, mailbox };
        Ok(Attempt::Opened(Box::new(PaidConnection::start(opened))))
    }

    /// A channel whose payee states what cannot be, or has cost too much, is ended without it.
    async fn give_up(&self, channel: WalletChannel, refusal: ResumeRefusal) -> WalletError {
        let id = channel.id();
        if let Err(error) = self.request_close(channel).await {
            tracing::warn!(%error, channel = %id, "a channel that is given up cannot be withdrawn yet");
        }
        refusal.into()
    }

    /// What a refusal tells of the channel: if it is something new, another try may do better.
    async fn learn(&self, mut channel: WalletChannel, error: OpenError) -> Result<Attempt, WalletError> {
        let OpenError::Rejected { reason, metadata } = &error else { return Err(error.into()) };
        match reason.code {
            code::STALE_EPOCH => {
                let current = metadata.value("epoch").and_then(|text| std::str::from_utf8(text).ok()?.parse().ok());
                let Some(current) = current.filter(|current| *current > channel.book.epoch) else {
                    return Err(error.into());
                };
                channel.book.epoch = current;
                self.store().save(channel, None).await?;
                Ok(Attempt::Again)
            }
            // The payee may have closed it while this payer was away.
            code::PAYMENT_REFUSED => match self.refresh(channel).await {
                Ok(WalletChannel { phase: WalletPhase::Ended { .. }, .. }) => Ok(Attempt::Again),
                _ => Err(error.into()),
            },
            _ => Err(error.into()),
        }
    }
}

enum Attempt {
    Opened(Box<PaidConnection>),
    /// The record of the channel has changed: with what is known now it may be opened.
    Again,
}

/// The payee's receipt for the opening: of this channel, newer than all before, and of a channel that serves.
pub(super) fn accepted_by(
    message: &[u8],
    channel: &ChannelDescriptor,
    last_receipt: u64,
) -> Result<(SignedReceipt, Receipt), WalletError> {
    let bad = |what: &str| WalletError::BadMessage(what.to_owned());
    let Ok(PaymentMessage::Receipt(signed)) = PaymentMessage::decode(message) else {
        return Err(bad("the connection was accepted without a receipt"));
    };
    let receipt = signed.verify(channel).map_err(|error| bad(&error.to_string()))?;
    if receipt.sequence <= last_receipt {
        return Err(bad("the connection was accepted with an old receipt"));
    }
    if receipt.status != ReceiptStatus::Open {
        return Err(bad("the connection was accepted with a receipt of a channel that does not serve"));
    }
    Ok((signed, receipt))
}
