//! What a wallet tells an escrow: deposits, top-ups, and the end of a channel without its payee.
//!
//! A record is written before each order that moves money, so that an order whose answer was lost is known after a crash
//! and is sent again: the escrow carries it out once.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tollway_protocol::payment::ledger_messages::{
    LedgerIdentity, OpenChannel, RequestClose, Signed, TopUp, Withdraw, is_reserved_chain,
};
use tollway_protocol::payment::{
    Address, Amount, ChannelDescriptor, Hash, LedgerOrder, PayerSnapshot, SigningRequest, Terms,
};

use super::wallet::Wallet;
use super::wallet_error::WalletError;
use super::wallet_store::{WalletChannel, WalletPhase};
use crate::escrow::remote::LedgerCall;
use crate::escrow::{Escrow, EscrowChannel, EscrowError, EscrowRefusal, LedgerClient};
use crate::failpoint::failpoint;

/// How long an order to the ledger is good for.
const ORDER_LIFETIME: Duration = Duration::from_secs(300);
/// How often an order is signed anew because another one of this payer was faster.
const NONCE_TRIES: u32 = 32;

pub(super) fn now_ms() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX)
}

/// The ledger at a URL, if it is the one that was named.
pub(super) async fn reach(url: Option<&str>, chain_id: u64, escrow: Address) -> Result<LedgerClient, WalletError> {
    let url = url.ok_or(WalletError::Unsupported("a ledger without a URL"))?;
    let endpoint = url.parse().map_err(|_| WalletError::Unsupported("a ledger at a URL of another scheme"))?;
    let ledger = LedgerClient::connect(&endpoint).await?;
    if (ledger.chain_id(), ledger.address()) != (chain_id, escrow) {
        return Err(WalletError::OtherLedger { url: url.to_owned() });
    }
    Ok(ledger)
}

/// The ledger of a channel.
pub(super) async fn ledger_of(channel: &WalletChannel) -> Result<LedgerClient, WalletError> {
    let ChannelDescriptor { chain_id, escrow, .. } = channel.descriptor;
    reach(channel.ledger_url.as_deref(), chain_id, escrow).await
}

impl Wallet {
    /// The escrow of the terms, if it is one that may be trusted with a deposit.
    async fn escrow(&self, terms: &Terms) -> Result<LedgerClient, WalletError> {
        let (escrow, chain_id) = (terms.escrow, terms.chain_id);
        let is_ledger = is_reserved_chain(chain_id) && LedgerIdentity { chain_id, escrow }.is_consistent();
        if !is_ledger {
            return Err(if self.config().escrows.contains(&escrow) {
                WalletError::Unsupported("an escrow that is not a local ledger")
            } else {
                WalletError::EscrowNotTrusted { escrow, chain_id }
            });
        }
        reach(terms.ledger_url.as_deref(), chain_id, escrow).await
    }

    /// Sends an order with a nonce that has not been used. The record that `note` makes of it is written before it leaves.
    async fn order<M>(
        &self,
        ledger: &LedgerClient,
        make: impl Fn(u64, u64) -> M,
        note: impl Fn(&Signed<M>) -> Option<WalletChannel>,
    ) -> Result<<Signed<M> as LedgerCall>::Answer, WalletError>
    where
        M: Clone + Into<LedgerOrder>,
        Signed<M>: LedgerCall + Sync,
    {
        let mut above = 0;
        for _ in 0..NONCE_TRIES {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            // Nonces rise; the clock does so by itself, also after a restart.
            let nonce = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX).max(above);
            let expiry = u64::try_from((now + ORDER_LIFETIME).as_millis()).unwrap_or(u64::MAX);
            let message = make(nonce, expiry);
            let order = message.clone().into();
            let signature = self.sign(SigningRequest::Order { ledger: ledger.identity(), order }).await?;
            let order = Signed { message, signature };
            if let Some(channel) = note(&order) {
                self.store().save(channel, None).await?;
            }
            failpoint!("wallet.before-order");
            let answer = ledger.call(order).await;
            failpoint!("wallet.ordered");
            match answer {
                // Another order of this payer was faster: nothing has happened, and a later nonce is taken.
                Err(EscrowError::Refused(EscrowRefusal::NonceUsed { last, .. })) => above = last.saturating_add(1),
                answer => return Ok(answer?),
            }
        }
        Err(WalletError::Timeout("an order that is not overtaken by another of this payer"))
    }

    /// Makes a channel with a deposit of min(`budget`, suggested deposit).
    pub(super) async fn deposit(&self, terms: &Terms, budget: Amount) -> Result<WalletChannel, WalletError> {
        let ledger = self.escrow(terms).await?;
        let mut salt = [0; 32];
        getrandom::fill(&mut salt).map_err(|error| WalletError::Escrow(format!("no randomness: {error}")))?;
        let deposit = budget.min(terms.suggested_deposit);
        let authorized_signer = self.config().session_signer.as_ref().map_or(Address::ZERO, |signer| signer.address());
        let make = |nonce, expiry| OpenChannel {
            payer: self.address(),
            payee: terms.payee,
            token: terms.token,
            salt: Hash(salt),
            authorized_signer,
            deposit,
            nonce,
            expiry,
        };
        let mut channel = WalletChannel {
            descriptor: make(0, 0).descriptor(&ledger.identity()),
            service: terms.service.clone(),
            ledger_url: terms.ledger_url.clone(),
            payee_url: self.config().payee_url.clone(),
            book: PayerSnapshot::default(),
            phase: WalletPhase::Open,
            last_receipt: 0,
            made_ms: now_ms(),
        };
        let before = channel.clone();
        let note = move |order: &Signed<OpenChannel>| {
            Some(WalletChannel { phase: WalletPhase::Opening { order: order.clone() }, ..before.clone() })
        };
        let opened = self.order(&ledger, make, note).await;
        // After a lost answer it is not known whether it was carried out: it is sent again when a channel is needed next.
        take_deposit(&mut channel, &opened?, deposit)?;
        self.store().save(channel.clone(), None).await?;
        Ok(channel)
    }

    /// A channel whose deposit was ordered, and nobody knows whether it was made: orders it again. `None` when it was
    /// not made, and the order has lapsed.
    pub(super) async fn finish_deposit(
        &self,
        mut channel: WalletChannel,
    ) -> Result<Option<WalletChannel>, WalletError> {
        let WalletPhase::Opening { order } = channel.phase.clone() else { return Ok(Some(channel)) };
        let ledger = ledger_of(&channel).await?;
        let deposit = order.message.deposit;
        let opened = match ledger.open(order).await {
            Ok(held) => {
                take_deposit(&mut channel, &held, deposit)?;
                channel.phase = WalletPhase::Open;
                true
            }
            Err(EscrowError::Refused(_)) => {
                // It was opened and has ended, or it never was.
                let settled = ledger.channel(channel.id()).await?.map_or(Amount::ZERO, |held| held.settled);
                channel.phase = WalletPhase::Ended { settled };
                false
            }
            Err(error) => return Err(error.into()),
        };
        self.store().save(channel.clone(), None).await?;
        Ok(opened.then_some(channel))
    }

    /// Raises the deposit of a channel **to** an amount. Returns what the escrow holds.
    pub(super) async fn top_up(&self, channel: &WalletChannel, to: Amount) -> Result<Amount, WalletError> {
        let (channel_id, ledger) = (channel.id(), ledger_of(channel).await?);
        let make = |nonce, expiry| TopUp { channel_id, deposit: to, nonce, expiry };
        // At the same deposit it has no effect, so an order whose answer was lost does no harm.
        let held = self.order(&ledger, make, |_| None).await?;
        Ok(held.deposit.min(to.max(channel.book.deposit)))
    }

    /// Asks the escrow how a channel stands, and records it.
    ///
    /// # Errors
    /// When the escrow cannot be asked, or the record cannot be written.
    pub async fn refresh(&self, channel: WalletChannel) -> Result<WalletChannel, WalletError> {
        if matches!(channel.phase, WalletPhase::Ended { .. }) {
            return Ok(channel);
        }
        let mut next = channel.clone();
        match ledger_of(&channel).await?.channel(channel.id()).await? {
            Some(held) if held.finalized => next.phase = WalletPhase::Ended { settled: held.settled },
            Some(_) => {}
            None if matches!(channel.phase, WalletPhase::Opening { .. }) => {}
            None => return Err(WalletError::Channel { id: channel.id(), what: "is unknown to its ledger" }),
        }
        if next != channel {
            self.store().save(next.clone(), None).await?;
        }
        Ok(next)
    }

    /// Tells the escrow that the payer withdraws: the payee has the grace period to claim what it delivered. Repeated, it
    /// has no effect.
    ///
    /// # Errors
    /// When the channel has ended, the escrow refuses or cannot be asked, or the record cannot be written.
    pub async fn request_close(&self, channel: WalletChannel) -> Result<WalletChannel, WalletError> {
        let id = channel.id();
        let Some(channel) = self.finish_deposit(channel).await? else {
            return Err(WalletError::Channel { id, what: "has ended: its deposit was never made" });
        };
        let (channel_id, ledger) = (channel.id(), ledger_of(&channel).await?);
        // Written first: from the order on nothing more may be signed on it.
        let next = WalletChannel { phase: WalletPhase::Withdrawing, ..channel };
        self.store().save(next.clone(), None).await?;
        let make = |nonce, expiry| RequestClose { channel_id, nonce, expiry };
        self.order(&ledger, make, |_| None).await?;
        Ok(next)
    }

    /// Takes back what the payee has not claimed, when the grace period is over. Repeated, it gives the same answer.
    /// Returns the record and what came back, in base units.
    ///
    /// # Errors
    /// When no withdrawal was announced, its grace period lasts on, the escrow cannot be asked, or the record cannot be
    /// written.
    pub async fn withdraw(&self, channel: WalletChannel) -> Result<(WalletChannel, Amount), WalletError> {
        let (channel_id, ledger) = (channel.id(), ledger_of(&channel).await?);
        // Its record is written before the ledger is told, and a crash may have come between.
        let held = ledger.channel(channel_id).await?;
        if channel.phase == WalletPhase::Withdrawing && held.is_some_and(|held| !held.is_ending()) {
            let ask = |nonce, expiry| RequestClose { channel_id, nonce, expiry };
            self.order(&ledger, ask, |_| None).await?;
        }
        let make = |nonce, expiry| Withdraw { channel_id, nonce, expiry };
        let (settled, refunded) = match self.order(&ledger, make, |_| None).await {
            Ok(settlement) => (settlement.settled, settlement.refunded),
            Err(error) => {
                // The payee may have closed it within the grace period: then the rest is in the account.
                match ledger.channel(channel_id).await? {
                    Some(held) if held.finalized => (held.settled, held.deposit.saturating_sub(held.settled)),
                    _ => return Err(error),
                }
            }
        };
        let ended = WalletChannel { phase: WalletPhase::Ended { settled }, ..channel };
        self.store().save(ended.clone(), None).await?;
        Ok((ended, refunded))
    }
}

/// Books what the escrow holds. Vouchers are signed for the channel that was ordered, whatever the ledger calls it:
/// another one's could lie on a real chain.
fn take_deposit(channel: &mut WalletChannel, held: &EscrowChannel, ordered: Amount) -> Result<(), WalletError> {
    if held.descriptor != channel.descriptor {
        return Err(WalletError::Escrow("the ledger answered with another channel".to_owned()));
    }
    channel.book.deposit = channel.book.deposit.max(ordered.min(held.deposit));
    Ok(())
}
