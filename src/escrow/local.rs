//! The local ledger as an escrow in this process.

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tollway_protocol::payment::ledger_messages::{
    Close, LedgerIdentity, OpenChannel, RequestClose, Settle, Signed, TopUp, Withdraw,
};
use tollway_protocol::payment::{Address, Amount, ChannelId, Signature, VoucherProtocol};

use super::{Escrow, EscrowChannel, EscrowError, EscrowRefusal, Ledger, Settlement};
use crate::future::BoxFuture;

/// Tells the time in milliseconds since 1970.
type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// A [`Ledger`] behind a lock, for payer and payee in one process. Clones share the ledger.
///
/// The lock is held for one order at a time, some 0.1 ms of signature checks, and never across an await.
#[derive(Clone)]
pub struct LocalLedger {
    identity: LedgerIdentity,
    ledger: Arc<Mutex<Ledger>>,
    clock: Clock,
}

impl LocalLedger {
    /// Serves a ledger by the system's clock.
    pub fn new(ledger: Ledger) -> Self {
        let since_1970 = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        Self::with_clock(ledger, move || u64::try_from(since_1970()).unwrap_or(u64::MAX))
    }

    /// Serves a ledger by another clock, in milliseconds since 1970.
    pub fn with_clock(ledger: Ledger, clock: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        LocalLedger { identity: ledger.identity(), ledger: Arc::new(Mutex::new(ledger)), clock: Arc::new(clock) }
    }

    /// What the ledger is known by.
    pub const fn identity(&self) -> LedgerIdentity {
        self.identity
    }

    /// Puts new money into an account; see [`Ledger::fund`].
    ///
    /// # Errors
    /// [`EscrowRefusal::TooMuch`] when all money of the token would pass 2^128.
    pub fn fund(&self, holder: Address, token: Address, amount: Amount) -> Result<(), EscrowRefusal> {
        self.ledger.lock().fund(holder, token, amount)
    }

    /// Reads from the ledger, such as balances, nonces or its conservation.
    pub fn read<T>(&self, read: impl FnOnce(&Ledger) -> T) -> T {
        read(&self.ledger.lock())
    }

    fn act<T: Send + 'static>(
        &self,
        act: impl FnOnce(&mut Ledger, u64) -> Result<T, EscrowRefusal> + Send + 'static,
    ) -> BoxFuture<'_, Result<T, EscrowError>> {
        Box::pin(async move {
            let now_ms = (self.clock)();
            Ok(act(&mut self.ledger.lock(), now_ms)?)
        })
    }
}

impl fmt::Debug for LocalLedger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LocalLedger").field("identity", &self.identity).finish_non_exhaustive()
    }
}

impl Escrow for LocalLedger {
    fn chain_id(&self) -> u64 {
        self.identity.chain_id
    }

    fn address(&self) -> Address {
        self.identity.escrow
    }

    fn protocol(&self) -> VoucherProtocol {
        VoucherProtocol::V1
    }

    fn channel(&self, id: ChannelId) -> BoxFuture<'_, Result<Option<EscrowChannel>, EscrowError>> {
        self.act(move |ledger, _| Ok(ledger.channel(id).cloned()))
    }

    fn open(&self, order: Signed<OpenChannel>) -> BoxFuture<'_, Result<EscrowChannel, EscrowError>> {
        self.act(move |ledger, now_ms| ledger.open(&order, now_ms))
    }

    fn top_up(&self, order: Signed<TopUp>) -> BoxFuture<'_, Result<EscrowChannel, EscrowError>> {
        self.act(move |ledger, now_ms| ledger.top_up(&order, now_ms))
    }

    fn settle(&self, order: Signed<Settle>, voucher: Signature) -> BoxFuture<'_, Result<Settlement, EscrowError>> {
        self.act(move |ledger, _| ledger.settle(&order, &voucher))
    }

    fn close(
        &self,
        order: Signed<Close>,
        voucher: Option<Signature>,
    ) -> BoxFuture<'_, Result<Settlement, EscrowError>> {
        self.act(move |ledger, _| ledger.close(&order, voucher.as_ref()))
    }

    fn request_close(&self, order: Signed<RequestClose>) -> BoxFuture<'_, Result<EscrowChannel, EscrowError>> {
        self.act(move |ledger, now_ms| ledger.request_close(&order, now_ms))
    }

    fn withdraw(&self, order: Signed<Withdraw>) -> BoxFuture<'_, Result<Settlement, EscrowError>> {
        self.act(move |ledger, now_ms| ledger.withdraw(&order, now_ms))
    }
}
