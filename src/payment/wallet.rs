//! The payer's side: a wallet that looks at terms, deposits, and opens paid connections within its bounds.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tollway_protocol::error::ConnectionEnd;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::ledger_messages::{LedgerIdentity, OpenChannel, Signed, is_reserved_chain};
use tollway_protocol::payment::{
    Address, Amount, Binding, ChannelDescriptor, Credential, CredentialDraft, Decline, Hash, PayerBook, PayerLimits,
    PaymentMessage, Place, Quote, SecretKey, Terms, TermsError, UnworkableTerms, VoucherProtocol,
};
use tollway_protocol::session::PayerMoney;

use super::mailbox::Mailbox;
use super::paid::{Opened, PaidConnection};
use super::windows::paid_limits;
use crate::escrow::{Escrow, EscrowError, EscrowRefusal, LedgerClient};
use crate::session::{OpenError, Session};

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
        let key = self.config.key.clone();
        Ok(PaidConnection::start(Opened { connection, terms, descriptor, book, mailbox, key }))
    }
}
