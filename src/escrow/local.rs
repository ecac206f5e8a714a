//! The local ledger as an escrow in this process: in memory, or in a file.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tollway_protocol::payment::ledger_messages::{
    Close, Fund, LedgerIdentity, OpenChannel, RequestClose, Settle, Signed, TopUp, Transfer, Withdraw,
};
use tollway_protocol::payment::{Address, Amount, ChannelId, Signature, VoucherProtocol};

#[cfg(feature = "redb")]
use super::file::{LedgerFile, LedgerFileError};
use super::ledger::{Content, Row};
use super::remote::LedgerInfo;
use super::{Escrow, EscrowChannel, EscrowError, EscrowRefusal, Ledger, LedgerConfig, Settlement};
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
    /// With a file, every order is durable before it is answered, and reads see nothing that is not.
    #[cfg(feature = "redb")]
    file: Option<Arc<LedgerFile>>,
}

impl LocalLedger {
    /// Serves a ledger by the system's clock.
    pub fn new(ledger: Ledger) -> Self {
        let since_1970 = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        Self::with_clock(ledger, move || u64::try_from(since_1970()).unwrap_or(u64::MAX))
    }

    /// Serves a ledger by another clock, in milliseconds since 1970.
    pub fn with_clock(ledger: Ledger, clock: impl Fn() -> u64 + Send + Sync + 'static) -> Self {
        LocalLedger {
            identity: ledger.identity(),
            ledger: Arc::new(Mutex::new(ledger)),
            clock: Arc::new(clock),
            #[cfg(feature = "redb")]
            file: None,
        }
    }

    /// Opens the ledger in a file, and makes the file if there is none. Only one process can have it open. After a
    /// failure of the disk it answers nothing until the file is opened again.
    ///
    /// # Errors
    /// When the file is in use, cannot be read or written, is no ledger or that of another key, or its books do not
    /// balance.
    #[cfg(feature = "redb")]
    pub fn open(
        path: impl AsRef<std::path::Path>,
        identity: LedgerIdentity,
        config: LedgerConfig,
    ) -> Result<Self, LedgerFileError> {
        let (ledger, file) = LedgerFile::open(path.as_ref(), identity, config)?;
        Ok(Self::filed(ledger, file))
    }

    /// As [`LocalLedger::open`], on a backend of its own kind, which may be empty.
    ///
    /// # Errors
    /// As [`LocalLedger::open`].
    #[cfg(feature = "redb")]
    pub fn open_on(
        backend: impl crate::disk::StorageBackend,
        identity: LedgerIdentity,
        config: LedgerConfig,
    ) -> Result<Self, LedgerFileError> {
        let (ledger, file) = LedgerFile::on(backend, identity, config)?;
        Ok(Self::filed(ledger, file))
    }

    #[cfg(feature = "redb")]
    fn filed(ledger: Ledger, file: LedgerFile) -> Self {
        LocalLedger { file: Some(Arc::new(file)), ..Self::new(ledger) }
    }

    /// What the ledger is known by.
    pub const fn identity(&self) -> LedgerIdentity {
        self.identity
    }

    /// What it tells of itself to who asks.
    pub fn info(&self) -> LedgerInfo {
        let LedgerConfig { grace_ms, dev } = self.read(Ledger::config);
        LedgerInfo { chain_id: self.identity.chain_id, escrow: self.identity.escrow, dev, grace_ms }
    }

    /// Puts new money into an account, without an order: whoever holds this is the operator. See [`Ledger::fund`].
    ///
    /// # Errors
    /// When all money of the token would pass 2^128, and when the file failed.
    pub async fn fund(&self, holder: Address, token: Address, amount: Amount) -> Result<(), EscrowError> {
        self.act(move |ledger, _| ledger.fund(holder, token, amount)).await
    }

    /// Puts new money into an account by the operator's order; see [`Ledger::fund_by`].
    ///
    /// # Errors
    /// When the ledger refuses, or its file failed.
    pub async fn fund_by(&self, order: Signed<Fund>) -> Result<Amount, EscrowError> {
        self.act(move |ledger, now_ms| ledger.fund_by(&order, now_ms)).await
    }

    /// Moves money between two accounts; see [`Ledger::transfer`].
    ///
    /// # Errors
    /// When the ledger refuses, or its file failed.
    pub async fn transfer(&self, order: Signed<Transfer>) -> Result<Amount, EscrowError> {
        self.act(move |ledger, now_ms| ledger.transfer(&order, now_ms)).await
    }

    /// What is in an account, in base units.
    ///
    /// # Errors
    /// When the ledger's file failed.
    pub async fn balance(&self, holder: Address, token: Address) -> Result<Amount, EscrowError> {
        self.act(move |ledger, _| Ok(ledger.balance(holder, token))).await
    }

    /// Reads from the ledger as it is in memory, such as nonces or its conservation. With a file, that may be ahead of
    /// what is durable: for looking at it, not for acting on it.
    pub fn read<T>(&self, read: impl FnOnce(&Ledger) -> T) -> T {
        read(&self.ledger.lock())
    }

    fn act<T: Send + 'static>(
        &self,
        act: impl FnOnce(&mut Ledger, u64) -> Result<T, EscrowRefusal> + Send + 'static,
    ) -> BoxFuture<'_, Result<T, EscrowError>> {
        Box::pin(async move {
            let now_ms = (self.clock)();
            #[cfg(feature = "redb")]
            if let Some(file) = &self.file {
                let ledger = self.ledger.clone();
                return Ok(file.write(move || act_on(&ledger, |ledger| act(ledger, now_ms))).await??);
            }
            Ok(act_on(&self.ledger, |ledger| act(ledger, now_ms)).0?)
        })
    }
}

/// Carries an order out in memory, and says what it has changed there.
fn act_on<T>(
    ledger: &Mutex<Ledger>,
    act: impl FnOnce(&mut Ledger) -> Result<T, EscrowRefusal>,
) -> (Result<T, EscrowRefusal>, Vec<(Row, Content)>) {
    let mut ledger = ledger.lock();
    let result = act(&mut ledger);
    (result, ledger.take_touched())
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

    fn grace(&self) -> Option<Duration> {
        Some(Duration::from_millis(self.read(Ledger::config).grace_ms))
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
