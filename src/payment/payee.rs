//! The payee's side: terms, and the opening of paid connections.
//!
//! A credential is checked cheap first: challenge, descriptor, possession, store, escrow. Each check runs in the
//! connection's own task, never in the session's; how many run at once is bounded.

use std::collections::HashMap;
use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use rustc_hash::{FxHashMap, FxHashSet};
use tokio::sync::{OwnedMutexGuard, Semaphore, watch};
use tollway_protocol::error::{Reason, code};
use tollway_protocol::id::ConnectionId;
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::channel::{
    ChannelParams, ChannelPhase, ChannelPolicy, Disputed, OpenError, StaleEpoch, StaleUpdate,
};
use tollway_protocol::payment::{
    Address, Amount, Binding, Challenge, ChallengeError, ChallengeKey, ChannelDescriptor, ChannelId, Credential,
    CredentialError, Hash, MethodPrice, PaymentChannel, PaymentMessage, Place, Quote, SecretKey, SignedAmount,
    SignedTerms, Terms, TermsError, UsedNonces, Verifier,
};
use tollway_protocol::session::PriceTable;

use super::answers::{Answers, IDEMPOTENCY_KEY, PaidFrom};
use super::mailbox::{Mailbox, PaymentEvent};
use super::payee_task::PayeeTask;
use super::reservation::{self, Reservation};
use super::verify::CheckCount;
use crate::escrow::{Escrow, EscrowChannel, EscrowError};
use crate::failpoint::broken;
use crate::queue::Gauge;
use crate::rpc::{BoxReply, IncomingCall, Service};
use crate::shared::{ConnectionCell, Shared};
use crate::store::{self, ApplyError, ChannelRecord, ChannelStore, StoreError};

/// A challenge must be answered within this time, in milliseconds: an open follows its quote at once, or after a look by
/// a person.
const CHALLENGE_AGE_MS: u64 = 300_000;
/// Used challenges that are remembered. One is used for each paid open: 100 a second over their whole age.
const MAX_USED_CHALLENGES: usize = 32_768;
/// Paid opens that are under way at once in this process. Each holds a credential and waits for store and escrow.
const MAX_OPENING: usize = 64;
/// Signature checks a second on one channel, by default: an honest payer signs once for each step of its `max_ahead`,
/// which is worth 10 ms of a fast stream, and a flood at this rate takes a twentieth of a core.
const DEFAULT_CHECK_RATE: NonZeroU32 = NonZeroU32::new(1000).expect("not zero");
/// How long what is reserved for a call is held by default: a long answer of a model takes minutes, and a handler that
/// hangs must not hold its payer's money for ever.
const DEFAULT_RESERVATION_EXPIRY: Duration = Duration::from_secs(600);
/// How long the escrow is given for an answer.
pub(super) const ESCROW_TIMEOUT: Duration = Duration::from_secs(15);
/// An escrow is looked at four times within its grace period, so that one look may be lost and a settlement tried again,
/// but never more often than this.
const LOOKS_PER_GRACE: u32 = 4;
const LEAST_WATCH: Duration = Duration::from_millis(100);
/// How long a connection that is superseded is given to hand its channel over.
const HANDOVER_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a fast local stream for which a lease and the in-flight cap have room by default.
const DEFAULT_LEASE_BYTES: u64 = 16 << 20;

/// What a payee sells, and on which terms. All amounts are base units.
#[derive(Clone)]
pub struct PayeeConfig {
    /// The payee's key: it signs terms, receipts and the orders to the escrow.
    pub key: Arc<SecretKey>,
    /// Where deposits lie.
    pub escrow: Arc<dyn Escrow>,
    /// Where channels are kept.
    pub store: Arc<dyn ChannelStore>,
    /// The service that is sold.
    pub service: String,
    /// The price list; a method that is not in it is free.
    pub prices: Vec<MethodPrice>,
    /// The token that amounts are in.
    pub token: Address,
    /// The smallest deposit that opens a channel.
    pub minimum_deposit: Amount,
    /// The deposit that is suggested.
    pub suggested_deposit: Amount,
    /// By how much a voucher must exceed the one before.
    pub minimum_delta: Amount,
    /// How long a voucher that is needed is waited for.
    pub patience: Duration,
    /// The most that may be lost in flight when the transport breaks.
    pub in_flight_cap: Amount,
    /// Spending that is made durable ahead of use.
    pub lease: Amount,
    /// Where payers reach the local ledger.
    pub ledger_url: Option<String>,
    /// How long after a connection was lost its channel is closed without the payer, if the store does not survive the
    /// process; a quarter of the escrow's grace period at most. In a store that does survive it, channels stay until their
    /// payers close them or withdraw.
    pub abandon_after: Duration,
    /// Above this much that was delivered and not paid out, a channel is settled while it is served.
    pub settle_above: Amount,
    /// How often a channel is settled however little is unclaimed.
    pub settle_every: Duration,
    /// How long after a settlement that failed it is tried again.
    pub settle_retry: Duration,
    /// At this much that is leased and not paid out, nothing more is leased until a settlement has succeeded: what a payee
    /// can lose if its escrow does not answer before a payer withdraws.
    pub exposure_cap: Amount,
    /// How often the escrow is asked whether a payer withdraws. If that is not four times within the escrow's grace period,
    /// as far as the escrow says what that is, it is asked more often: else what was delivered would be withdrawn before it
    /// is claimed.
    pub watch_escrow: Duration,
    /// How long a handler may hold what is reserved for its call; then it is dropped, and has failed.
    pub reservation_expiry: Duration,
    /// The most signatures that are checked on one channel in a second; what comes faster waits, and coalesces.
    pub check_rate: NonZeroU32,
}

impl fmt::Debug for PayeeConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PayeeConfig")
            .field("payee", &self.key.address())
            .field("service", &self.service)
            .field("prices", &self.prices)
            .finish_non_exhaustive()
    }
}

impl PayeeConfig {
    /// Terms with defaults that follow from the prices.
    ///
    /// A lease pays for 16 MiB or 64 of the dearest unit; the in-flight cap has room for twice the lease and the windows
    /// that fit beside it; a channel is settled at 64 leases and stops at 256 unclaimed ones; a voucher's step is a sixteenth of the dearest unit; the suggested deposit pays for 1 TiB, so
    /// that the payer's budget decides.
    pub fn new(
        key: SecretKey,
        escrow: Arc<dyn Escrow>,
        store: Arc<dyn ChannelStore>,
        service: &str,
        prices: Vec<MethodPrice>,
    ) -> Self {
        let unit = prices.iter().filter_map(MethodPrice::dearest_unit).max().unwrap_or(Amount::ZERO);
        let bytes = |count| {
            let costs = prices.iter().filter_map(|method| method.price.bytes_out?.cost(count));
            costs.max().unwrap_or(Amount::ZERO)
        };
        let times = |amount: Amount, factor: u128| amount.checked_mul(factor).unwrap_or(Amount::MAX);
        let lease = bytes(DEFAULT_LEASE_BYTES).max(times(unit, 64)).max(Amount::new(1));
        let minimum_delta = Amount::new((unit.units() / 16).max(1));
        let minimum_deposit = unit.saturating_add(minimum_delta);
        let suggested = bytes(1 << 40).max(times(unit, 1 << 20)).max(minimum_deposit);
        PayeeConfig {
            key: Arc::new(key),
            service: service.to_owned(),
            token: Address::ZERO,
            minimum_deposit,
            suggested_deposit: suggested.min(escrow.protocol().max_amount()),
            minimum_delta,
            patience: Duration::from_secs(60),
            in_flight_cap: times(lease, 4),
            lease,
            ledger_url: None,
            abandon_after: Duration::from_secs(60),
            settle_above: times(lease, 64),
            settle_every: Duration::from_secs(600),
            settle_retry: Duration::from_secs(10),
            exposure_cap: times(lease, 256),
            watch_escrow: Duration::from_secs(60),
            check_rate: DEFAULT_CHECK_RATE,
            reservation_expiry: DEFAULT_RESERVATION_EXPIRY,
            escrow,
            store,
            prices,
        }
    }

    /// Whatever was configured, a withdrawal is seen in time to claim what was delivered.
    fn keep_within_grace(&mut self) {
        let Some(grace) = self.escrow.grace() else { return };
        let most = (grace / LOOKS_PER_GRACE).max(LEAST_WATCH);
        if most > grace / 2 {
            tracing::warn!(
                ?grace,
                "the escrow's grace period leaves hardly any time to claim from a payer that withdraws"
            );
        }
        self.watch_escrow = self.watch_escrow.min(most);
        self.abandon_after = self.abandon_after.min(most);
    }

    fn terms(&self) -> Result<Terms, PayeeError> {
        let priced_in = |method: &MethodPrice| method.price.bytes_in.is_some_and(|rate| !rate.amount.is_zero());
        if self.prices.iter().any(priced_in) {
            return Err(PayeeError::Unsupported("a price for the bytes that the payer sends"));
        }
        let terms = Terms {
            payee: self.key.address(),
            escrow: self.escrow.address(),
            token: self.token,
            chain_id: self.escrow.chain_id(),
            protocol: self.escrow.protocol(),
            service: self.service.clone(),
            methods: self.prices.clone(),
            minimum_deposit: self.minimum_deposit,
            suggested_deposit: self.suggested_deposit,
            minimum_delta: self.minimum_delta,
            patience_ms: u64::try_from(self.patience.as_millis()).unwrap_or(u64::MAX),
            in_flight_cap: self.in_flight_cap,
            lease: self.lease,
            binding: Binding::None,
            ledger_url: self.ledger_url.clone(),
        };
        let unit = terms.dearest_unit().unwrap_or(Amount::MAX);
        if self.exposure_cap < self.lease {
            return Err(PayeeError::ExposureBelowLease { cap: self.exposure_cap, lease: self.lease });
        }
        if self.lease < unit {
            return Err(PayeeError::LeaseBelowUnit { lease: self.lease, unit });
        }
        Ok(terms)
    }
}

/// A configuration on which nothing can be sold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PayeeError {
    /// The terms contradict themselves.
    #[error(transparent)]
    Terms(#[from] TermsError),
    /// One unit would never fit a lease.
    #[error("the lease of {lease} base units is below the dearest unit of {unit}")]
    LeaseBelowUnit {
        /// The lease in base units.
        lease: Amount,
        /// The dearest unit in base units.
        unit: Amount,
    },
    /// Not even one lease could be unclaimed.
    #[error("the exposure cap of {cap} base units is below the lease of {lease}")]
    ExposureBelowLease {
        /// The cap in base units.
        cap: Amount,
        /// The lease in base units.
        lease: Amount,
    },
    /// Something that is not metered.
    #[error("not supported: {0}")]
    Unsupported(&'static str),
    /// The system has no randomness for challenges.
    #[error("the system gives no randomness: {0}")]
    NoRandomness(String),
}

/// Sells a service: quotes its terms, checks credentials, and runs the payment channel of each paid connection.
pub struct Payee {
    pub(super) config: PayeeConfig,
    pub(super) terms: Terms,
    signed: SignedTerms,
    terms_hash: Hash,
    pub(super) prices: Arc<PriceTable>,
    /// What is reserved for a call, by method.
    reserved: FxHashMap<u64, Amount>,
    /// Methods whose calls cost something.
    priced: FxHashSet<u64>,
    pub(super) answers: Answers,
    challenge_key: ChallengeKey,
    /// Challenges are dated from here on: a clock that is set back would bring used ones back.
    born: Instant,
    pub(super) used: Mutex<UsedNonces>,
    opening: Semaphore,
    /// How many of these places are taken.
    opening_now: Arc<Gauge>,
    pub(super) checks: CheckCount,
    /// Opens of one channel go one after the other: two that found no owner would both become it. Those that are under
    /// way, at most [`MAX_OPENING`].
    opens: Mutex<HashMap<ChannelId, Arc<tokio::sync::Mutex<()>>>>,
    owners: Mutex<HashMap<ChannelId, Owner>>,
    /// How many channels are being run or await their settlement.
    pub(super) running: watch::Sender<usize>,
    /// Settle what was abandoned now.
    pub(super) hurry: watch::Sender<bool>,
}

/// The methods whose calls state their cost, and the most that it may be.
fn reserved(terms: &Terms) -> impl Iterator<Item = (u64, Amount)> + '_ {
    terms.methods.iter().filter_map(|method| Some((method.method_id, method.price.max.map(|_| method.price.hold())?)))
}

/// The connection that owns a channel now.
#[derive(Clone)]
struct Owner {
    shared: Arc<Shared>,
    connection: ConnectionId,
    claim: Claim,
}

/// Who may act on a channel. The owner's task has the turn while it serves and while it settles, and leaves it to a newer
/// connection while it waits for its payer to come back. A takeover that fails changes nothing: the owner goes on.
#[derive(Debug, Clone, Default)]
pub(super) struct Claim {
    pub(super) turn: Arc<tokio::sync::Mutex<()>>,
    /// Set, by whom has the turn, when a newer connection has the channel: its former owner must not settle it.
    pub(super) taken: Arc<watch::Sender<bool>>,
}

/// A channel whose owner waits until this is dropped.
struct Handover {
    claim: Claim,
    _turn: OwnedMutexGuard<()>,
}

impl fmt::Debug for Payee {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Payee").field("config", &self.config).finish_non_exhaustive()
    }
}

/// A credential that opens nothing.
#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error(transparent)]
    Credential(#[from] CredentialError),
    #[error(transparent)]
    Challenge(#[from] ChallengeError),
    #[error("the channel is not one of these terms: its {0} differs")]
    OtherTerms(&'static str),
    #[error("the escrow knows no channel {0}")]
    NotDeposited(ChannelId),
    #[error("the channel has ended, or its payer withdraws")]
    Ending,
    #[error("the deposit of {deposit} base units is below the minimum of {minimum}")]
    DepositTooSmall { deposit: Amount, minimum: Amount },
    #[error("the channel is owned by epoch {}", .0.current)]
    StaleEpoch(StaleEpoch),
    #[error("the counts differ by more than the in-flight cap: {0}")]
    Disputed(#[from] Disputed),
    #[error("the channel's record is broken: {0}")]
    Record(#[from] OpenError),
    #[error(transparent)]
    Escrow(#[from] EscrowError),
    #[error(
        "the opener takes answers of {max_body} bytes and items of {max_item}, and what is sold has up to {answer} and \
         {item}: what is too large for it would cost it nothing"
    )]
    SmallLimits { max_body: u32, max_item: u32, answer: u64, item: u64 },
    #[error("the connection that owns the channel did not let go in time")]
    Handover,
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Apply(#[from] ApplyError),
}

impl Refusal {
    /// What the payer is told. A failure on this side is named as such and not described.
    fn reason(&self) -> (Reason, Metadata) {
        match self {
            Refusal::StaleEpoch(StaleEpoch { current })
            // Another process has the same store, and was faster.
            | Refusal::Apply(ApplyError::Stale(StaleUpdate::Epoch { current, .. })) => {
                let stale = StaleEpoch { current: *current };
                let metadata = Metadata::new().with("epoch", current.to_string());
                (Reason::new(code::STALE_EPOCH, Refusal::StaleEpoch(stale).to_string()), metadata)
            }
            Refusal::Store(_) | Refusal::Apply(_) | Refusal::Record(_) => {
                tracing::error!(error = %self, "a paid open failed on this side");
                (Reason::new(code::INTERNAL, "the payee's store failed"), Metadata::new())
            }
            _ => (Reason::new(code::PAYMENT_REFUSED, self.to_string()), Metadata::new()),
        }
    }
}

impl Payee {
    /// A payee that sells on these terms; they are signed once, here.
    ///
    /// # Errors
    /// When the terms make no sense.
    pub fn new(mut config: PayeeConfig) -> Result<Arc<Payee>, PayeeError> {
        config.keep_within_grace();
        let terms = config.terms()?;
        let signed = SignedTerms::sign(&terms, &config.key)?;
        let mut key = [0; 32];
        getrandom::fill(&mut key).map_err(|error| PayeeError::NoRandomness(error.to_string()))?;
        Ok(Arc::new(Payee {
            terms_hash: signed.hash(),
            prices: Arc::new(terms.methods.iter().map(|method| (method.method_id, method.price)).collect()),
            reserved: reserved(&terms).collect(),
            priced: terms.methods.iter().filter(|of| !of.price.is_free()).map(|of| of.method_id).collect(),
            answers: Answers::default(),
            terms,
            signed,
            config,
            challenge_key: ChallengeKey::new(key),
            born: Instant::now(),
            used: Mutex::new(UsedNonces::new(MAX_USED_CHALLENGES)),
            opening: Semaphore::new(MAX_OPENING),
            opening_now: Gauge::register("payee.opening", MAX_OPENING),
            checks: CheckCount::default(),
            opens: Mutex::default(),
            owners: Mutex::new(HashMap::new()),
            running: watch::Sender::new(0),
            hurry: watch::Sender::new(false),
        }))
    }

    /// Starts a call of a service that is sold.
    pub(crate) fn call(self: &Arc<Self>, service: &Arc<dyn Service>, incoming: IncomingCall) -> BoxReply {
        match incoming.context.metadata.value(IDEMPOTENCY_KEY) {
            Some(_) => self.call_once(service, incoming),
            None => self.call_reserved(&**service, incoming),
        }
    }

    /// Starts a call with the reservation that its price asks for.
    pub(super) fn call_reserved(&self, service: &dyn Service, mut incoming: IncomingCall) -> BoxReply {
        let Some(&maximum) = self.reserved.get(&incoming.method().0) else { return service.call(incoming) };
        let reservation = Arc::new(Reservation::new(maximum));
        incoming.context.reservation = Some(reservation.clone());
        reservation::hold(reservation, self.config.reservation_expiry, service.call(incoming))
    }

    /// Whether calls of this method cost something.
    pub(crate) fn is_priced(&self, method: u64) -> bool {
        self.priced.contains(&method)
    }

    /// Who is paid.
    pub fn address(&self) -> Address {
        self.terms.payee
    }

    /// The terms.
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// How many signatures of payers were checked since the start: the part of a flood that costs something.
    pub fn checks(&self) -> u64 {
        self.checks.count()
    }

    /// Settles channels whose payer has gone now, and waits until no channel is run any more: for a server that ends. In
    /// a store that survives the process the channels stay open, settled as far as vouchers reach.
    ///
    /// # Cancel safety
    /// Dropping the future leaves the settlements going on.
    pub async fn idle(&self) {
        self.hurry.send_replace(true);
        let mut running = self.running.subscribe();
        // The sender lives in `self`.
        let _never_closed = running.wait_for(|&count| count == 0).await;
        if self.config.store.survives_restart()
            && let Err(error) = self.look_after_idle().await
        {
            tracing::error!(%error, "the channels that are kept are not settled");
        }
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.born.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn quote(&self) -> Result<Bytes, Refusal> {
        let mut nonce = [0; 16];
        getrandom::fill(&mut nonce).map_err(|_| ChallengeError::Full { capacity: 0 })?;
        let challenge = self.challenge_key.issue(self.now_ms(), nonce, self.terms_hash);
        Ok(Bytes::from(Quote { terms: self.signed.clone(), challenge }.encode()))
    }

    /// Checks a credential, cheap first. Nothing about the channel is looked up before possession is proved.
    /// `[pay.possession.first]`
    fn check(&self, service: &str, credential: &[u8]) -> Result<(Credential, ChannelId, Verifier), Refusal> {
        let credential = Credential::decode(credential)?;
        self.challenge_key.verify(&credential.challenge, &self.terms_hash, self.now_ms(), CHALLENGE_AGE_MS)?;
        if self.used.lock().contains(&credential.challenge) {
            return Err(ChallengeError::Used.into());
        }
        self.check_descriptor(&credential.descriptor)?;
        let verifier = Verifier::new(credential.descriptor.signer());
        self.checks.add();
        let place = Place { service, exporter: Hash::ZERO };
        let id = credential.verify_possession(place, &verifier)?;
        Ok((credential, id, verifier))
    }

    /// A challenge is used up by a channel that has a deposit, before it has any effect: else whoever has a key of any
    /// sort could fill the memory for used ones, and nobody could open.
    fn use_up(&self, challenge: &Challenge) -> Result<(), Refusal> {
        Ok(self.used.lock().insert(challenge, self.now_ms(), CHALLENGE_AGE_MS)?)
    }

    /// Only a greater epoch takes a channel over; a stale one must not disturb its owner.
    async fn check_epoch(&self, id: ChannelId, epoch: u64) -> Result<(), Refusal> {
        let current = self.config.store.load(id).await?.map_or(0, |record| record.snapshot.epoch);
        if epoch > current { Ok(()) } else { Err(Refusal::StaleEpoch(StaleEpoch { current })) }
    }

    /// What the escrow says of a channel.
    pub(super) async fn look(&self, id: ChannelId) -> Result<Option<EscrowChannel>, EscrowError> {
        let look = tokio::time::timeout(ESCROW_TIMEOUT, self.config.escrow.channel(id)).await;
        look.map_err(|elapsed| EscrowError::Unavailable(elapsed.into()))?
    }

    /// A channel that may be served: with a deposit, and with no end in sight.
    async fn look_for_deposit(&self, id: ChannelId) -> Result<EscrowChannel, Refusal> {
        let held = self.look(id).await?.ok_or(Refusal::NotDeposited(id))?;
        if held.is_ending() {
            return Err(Refusal::Ending);
        }
        let (deposit, minimum) = (held.deposit, self.config.minimum_deposit);
        if deposit < minimum {
            return Err(Refusal::DepositTooSmall { deposit, minimum });
        }
        Ok(held)
    }

    fn check_descriptor(&self, descriptor: &ChannelDescriptor) -> Result<(), Refusal> {
        let terms = &self.terms;
        let same = [
            ("payee", descriptor.payee == terms.payee),
            ("token", descriptor.token == terms.token),
            ("escrow", descriptor.escrow == terms.escrow),
            ("chain", descriptor.chain_id == terms.chain_id),
            ("voucher protocol", descriptor.protocol == terms.protocol),
        ];
        match same.into_iter().find(|(_, same)| !same) {
            Some((what, _)) => Err(Refusal::OtherTerms(what)),
            None => Ok(()),
        }
    }

    /// The channel, as the escrow and the store have it, owned by this credential's epoch. Refused, it is as it was.
    async fn take_over(
        &self,
        credential: &Credential,
        id: ChannelId,
        held: &EscrowChannel,
    ) -> Result<PaymentChannel, Refusal> {
        let policy = ChannelPolicy { minimum_delta: self.config.minimum_delta, lease: self.config.lease };
        let store = &*self.config.store;
        let mut channel = match store.load(id).await? {
            Some(record) => PaymentChannel::restore(record.snapshot, policy)?,
            None => {
                let params = ChannelParams::new(&credential.descriptor, held.deposit, held.settled, policy);
                let channel = PaymentChannel::open(params)?;
                let record = ChannelRecord::new(credential.descriptor.clone(), channel.snapshot());
                store.update(id, None, record).await?;
                channel
            }
        };
        if channel.phase() != ChannelPhase::Open {
            return Err(Refusal::Ending);
        }
        // Every update carries the deposit.
        let _carried = channel.set_deposit(held.deposit);
        let (_lost, lost) = channel.resume(credential.received, self.config.in_flight_cap)?;
        let owned = channel.take_ownership(credential.epoch).map_err(Refusal::StaleEpoch)?;
        if let Some(update) = lost.filter(|_| !broken!("payee.forget-losses")) {
            store::apply(store, &update).await?;
        }
        // Compared by the store, too, and last: of two opens at once, one has the channel. [pay.epoch.greater]
        let record = store::apply(store, &owned).await?;
        // It may have begun to close since it was read.
        if record.snapshot.phase != ChannelPhase::Open {
            return Err(Refusal::Ending);
        }
        Ok(channel)
    }

    /// Makes the connection that owns the channel let go of it, until the result is dropped or the channel is taken.
    /// `None` when nobody owns it.
    async fn supersede(&self, id: ChannelId, epoch: u64) -> Result<Option<Handover>, Refusal> {
        let let_go = async {
            loop {
                let Some(owner) = self.owners.lock().get(&id).cloned() else { return Ok(None) };
                self.check_epoch(id, epoch).await?;
                let reason = Reason::new(code::PAYMENT_ENDED, "the channel was taken over by a newer connection");
                owner.shared.close_connection(owner.connection, reason);
                let turn = owner.claim.turn.clone().lock_owned().await;
                // Another one may have been faster, or the owner has settled the channel and is gone.
                if self.is_owner(id, &owner.claim) {
                    return Ok(Some(Handover { claim: owner.claim, _turn: turn }));
                }
            }
        };
        tokio::time::timeout(HANDOVER_TIMEOUT, let_go).await.map_err(|_| Refusal::Handover)?
    }

    /// Waits until no other open of this channel is under way.
    async fn enter_open(&self, id: ChannelId) -> Result<OwnedMutexGuard<()>, Refusal> {
        let open = {
            let mut opens = self.opens.lock();
            opens.retain(|_, open| Arc::strong_count(open) > 1);
            opens.entry(id).or_default().clone()
        };
        tokio::time::timeout(HANDOVER_TIMEOUT, open.lock_owned()).await.map_err(|_| Refusal::Handover)
    }

    pub(super) fn is_owned(&self, id: ChannelId) -> bool {
        self.owners.lock().contains_key(&id)
    }

    fn is_owner(&self, id: ChannelId, claim: &Claim) -> bool {
        self.owners.lock().get(&id).is_some_and(|owner| Arc::ptr_eq(&owner.claim.turn, &claim.turn))
    }
}

/// A request for a paid connection, to be answered in a task of its own.
pub(crate) struct OpenRequest {
    pub(crate) shared: Arc<Shared>,
    pub(crate) payee: Arc<Payee>,
    pub(crate) cell: Arc<ConnectionCell>,
    pub(crate) connection: ConnectionId,
    pub(crate) service: String,
    pub(crate) credential: Bytes,
    pub(crate) limits: ConnectionLimits,
}

impl Drop for OpenRequest {
    /// However it ends, by a panic too: the work for this open is done.
    fn drop(&mut self) {
        self.shared.finish_open(self.connection);
    }
}

impl OpenRequest {
    /// Rejects with a quote or a reason, or accepts and runs the channel to its end.
    pub(crate) async fn answer(self) {
        if self.credential.is_empty() {
            let reason = Reason::new(code::PAYMENT_REQUIRED, "the service must be paid for");
            match self.payee.quote() {
                Ok(terms) => self.shared.reject(self.connection, reason, Metadata::new(), terms),
                Err(refusal) => self.refuse(&refusal),
            }
            return;
        }
        match self.open().await {
            Ok((task, _running)) => task.run().await,
            Err(refusal) => self.refuse(&refusal),
        }
    }

    fn refuse(&self, refusal: &Refusal) {
        let (reason, metadata) = refusal.reason();
        tracing::info!(connection = %self.connection, %reason, "refused a paid open");
        self.shared.reject(self.connection, reason, metadata, Bytes::new());
    }

    /// An answer or an item that the opener does not take fails, and is free: it must take all that is sold.
    /// `[pay.open.limits]`
    fn check_limits(&self) -> Result<(), Refusal> {
        let Some(peer) = self.shared.peer_limits(self.connection) else { return Ok(()) };
        let methods = &self.payee.terms.methods;
        let largest = |of: fn(&MethodPrice) -> u64| methods.iter().map(of).max().unwrap_or(0);
        // What this side could not send in one piece anyhow is not asked of the opener.
        let defaults = ConnectionLimits::default();
        let answer = largest(|method| method.max_answer_bytes).min(u64::from(defaults.max_body));
        let item = largest(|method| method.max_item_bytes).min(u64::from(defaults.max_item));
        let ConnectionLimits { max_body, max_item, .. } = peer;
        if u64::from(max_body) < answer || u64::from(max_item) < item {
            return Err(Refusal::SmallLimits { max_body, max_item, answer, item });
        }
        Ok(())
    }

    /// As many open calls as may be lost: what they hold is a part of what a break can cost, and within a quarter of the
    /// in-flight cap. `[pay.cap.calls]`
    fn affordable_limits(&self) -> ConnectionLimits {
        let terms = &self.payee.terms;
        let dearest = terms.methods.iter().map(|method| method.price.hold()).max().unwrap_or_default();
        let room = Amount::new(terms.in_flight_cap.units() / 2).saturating_sub(terms.lease).units() / 2;
        let calls =
            room.checked_div(dearest.units()).map_or(u32::MAX, |calls| u32::try_from(calls).unwrap_or(u32::MAX));
        ConnectionLimits { max_calls: self.limits.max_calls.min(calls.max(1)), ..self.limits }
    }

    async fn open(&self) -> Result<(PayeeTask, Running), Refusal> {
        let payee = &self.payee;
        // Closed never: the semaphore lives as long as the payee.
        let _permit = payee.opening.acquire().await;
        let _inside = payee.opening_now.enter();
        let (credential, id, verifier) = {
            // [pay.possession.pace]
            let _checking = self.shared.credentials.enter().await;
            payee.check(&self.service, &self.credential)?
        };
        self.check_limits()?;
        let _alone = payee.enter_open(id).await?;
        payee.check_epoch(id, credential.epoch).await?;
        let mut held = payee.look_for_deposit(id).await?;
        payee.use_up(&credential.challenge)?;
        let handover = payee.supersede(id, credential.epoch).await?;
        if handover.is_some() {
            // It took a while, in which the payer may have asked to withdraw.
            held = payee.look_for_deposit(id).await?;
        }
        let channel = payee.take_over(&credential, id, &held).await?;
        let claim = Claim::default();
        let turn = claim.turn.clone().lock_owned().await;
        let owner = Owner { shared: self.shared.clone(), connection: self.connection, claim: claim.clone() };
        payee.owners.lock().insert(id, owner);
        if let Some(handover) = handover {
            handover.claim.taken.send_replace(true);
        }
        payee.running.send_modify(|count| *count += 1);
        let running = Running { payee: payee.clone(), channel: id, claim: claim.clone() };
        let mailbox = Arc::new(Mailbox::default());
        // One at or below what is accepted has no effect and is no error.
        if let Some(SignedAmount { amount, signature }) = credential.voucher
            && amount > channel.accepted()
        {
            let voucher = PaymentMessage::Voucher { amount, signature, received: credential.received };
            mailbox.post(PaymentEvent::Message(voucher.encode().into()));
        }
        let mut task = PayeeTask::new(
            (self.shared.clone(), self.connection, self.cell.clone()),
            payee.clone(),
            channel,
            (credential.descriptor, verifier),
            mailbox,
            (claim, turn),
        );
        self.cell.data().insert(PaidFrom(id));
        task.accept(self.affordable_limits());
        Ok((task, running))
    }
}

/// Counts a channel that is run, and lets go of it when dropped, however its task ends.
struct Running {
    payee: Arc<Payee>,
    channel: ChannelId,
    claim: Claim,
}

impl Drop for Running {
    fn drop(&mut self) {
        // A newer owner may stand there already.
        if self.payee.is_owner(self.channel, &self.claim) {
            self.payee.owners.lock().remove(&self.channel);
        }
        self.payee.running.send_modify(|count| *count -= 1);
    }
}
