//! The local ledger as a service of a session, and the client that is an [`Escrow`] over it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tollway_protocol::payment::ledger_messages::{
    Close, Fund, LedgerIdentity, OpenChannel, RequestClose, Settle, Signed, TopUp, Transfer, Withdraw,
};
use tollway_protocol::payment::{Address, Amount, ChannelId, Signature, VoucherProtocol};

use super::remote::{
    CloseWith, DispatchError, FindBalance, FindChannel, Identify, LEDGER_SERVICE, LedgerCall, LedgerInfo, LedgerMethod,
    SettleWith, dispatch,
};
use super::{Escrow, EscrowChannel, EscrowError, EscrowRefusal, LocalLedger, Settlement};
use crate::conduit::endpoint::Endpoint;
use crate::connection::Connection;
use crate::future::BoxFuture;
use crate::rpc::{BoxReply, CallError, IncomingCall, MethodId, Reply, Service};
use crate::session::SessionConfig;

/// The version of the ledger's service; part of its method ids.
const VERSION: u32 = 1;
/// How long one order may take. It is a lookup and at most two signature checks.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);

fn method_id(method: LedgerMethod) -> MethodId {
    MethodId::of(LEDGER_SERVICE, VERSION, method.name())
}

/// Serves a [`LocalLedger`] to payers and payees under the name [`LEDGER_SERVICE`].
///
/// Whoever runs it holds the deposits.
#[derive(Debug, Clone)]
pub struct LedgerService {
    ledger: LocalLedger,
}

impl LedgerService {
    /// Serves this ledger.
    pub const fn new(ledger: LocalLedger) -> Self {
        LedgerService { ledger }
    }
}

impl Service for LedgerService {
    fn name(&self) -> &str {
        LEDGER_SERVICE
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        let method = LedgerMethod::ALL.into_iter().find(|&method| method_id(method) == call.method());
        let Some(method) = method else { return Reply::unknown_method().boxed() };
        let ledger = self.ledger.clone();
        Box::pin(async move {
            match dispatch(&ledger, method, call.payload()).await {
                Ok(answer) => Reply::raw(Bytes::from(answer)),
                Err(DispatchError::Refused(refusal)) => Reply::error(&refusal),
                Err(error @ DispatchError::Arguments { .. }) => Reply::invalid_payload(&error),
                Err(DispatchError::Unavailable(error)) => {
                    tracing::error!(%error, "the ledger failed");
                    Reply::failed()
                }
            }
        })
    }
}

/// A ledger that runs elsewhere. Connects again when the connection was lost; every order may be repeated.
pub struct LedgerClient {
    info: LedgerInfo,
    link: Arc<Link>,
}

/// The connection to a ledger, and how to get another one.
struct Link {
    endpoint: Endpoint,
    identity: LedgerIdentity,
    current: Mutex<Connection>,
    /// Held by who connects.
    connecting: tokio::sync::Mutex<()>,
}

impl Link {
    /// The connection, or the next one if it has ended.
    ///
    /// It is made in a task of its own. Whoever asks may rest while its own task does something else, such as waiting for
    /// another answer of this ledger: connecting by itself, it would keep all others from the ledger meanwhile.
    async fn connection(self: &Arc<Self>) -> Result<Connection, EscrowError> {
        let current = self.current.lock().clone();
        if current.end().is_none() {
            return Ok(current);
        }
        let link = self.clone();
        let connecting = tokio::spawn(async move { tokio::time::timeout(CALL_TIMEOUT, link.connect_again()).await });
        connecting.await.map_err(unavailable)?.map_err(unavailable)?
    }

    /// The same ledger must answer.
    async fn connect_again(&self) -> Result<Connection, EscrowError> {
        let _connecting = self.connecting.lock().await;
        let current = self.current.lock().clone();
        if current.end().is_none() {
            return Ok(current);
        }
        let next = open(&self.endpoint).await?;
        let info = ask(&next, &Identify).await?;
        if info.identity() != self.identity {
            return Err(unavailable("another ledger answers at this URL now"));
        }
        *self.current.lock() = next.clone();
        Ok(next)
    }
}

impl fmt::Debug for LedgerClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LedgerClient")
            .field("endpoint", &self.link.endpoint)
            .field("info", &self.info)
            .finish_non_exhaustive()
    }
}

fn unavailable(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> EscrowError {
    EscrowError::Unavailable(error.into())
}

async fn open(endpoint: &Endpoint) -> Result<Connection, EscrowError> {
    let session = crate::client::connect(endpoint, SessionConfig::default()).await.map_err(unavailable)?;
    session.open(LEDGER_SERVICE).await.map_err(unavailable)
}

async fn ask<C: LedgerCall>(connection: &Connection, args: &C) -> Result<C::Answer, EscrowError> {
    let call = connection.call::<C, C::Answer>(method_id(C::METHOD), args).or_error::<EscrowRefusal>();
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(CallError::App(refusal))) => Err(EscrowError::Refused(refusal)),
        Ok(Err(error)) => Err(unavailable(error)),
        Err(elapsed) => Err(unavailable(elapsed)),
    }
}

impl LedgerClient {
    /// Connects to the ledger at a URL and asks who it is. Whether it is the right one is for the caller to compare.
    ///
    /// # Errors
    /// When there is no ledger at the URL.
    pub async fn connect(endpoint: &Endpoint) -> Result<Self, EscrowError> {
        let connection = open(endpoint).await?;
        let info = ask(&connection, &Identify).await?;
        if !info.identity().is_consistent() {
            return Err(unavailable("the ledger's chain id is not that of its address"));
        }
        let link = Link {
            endpoint: endpoint.clone(),
            identity: info.identity(),
            current: Mutex::new(connection),
            connecting: tokio::sync::Mutex::default(),
        };
        Ok(LedgerClient { info, link: Arc::new(link) })
    }

    /// What the ledger says of itself.
    pub const fn info(&self) -> LedgerInfo {
        self.info
    }

    /// What vouchers and orders name.
    pub const fn identity(&self) -> LedgerIdentity {
        self.info.identity()
    }

    /// What an account holds, in base units.
    ///
    /// # Errors
    /// [`EscrowError::Unavailable`].
    pub async fn balance(&self, holder: Address, token: Address) -> Result<Amount, EscrowError> {
        self.call(FindBalance { holder, token }).await
    }

    /// Puts new money into an account, by an order that is signed with the ledger's own key. Answers with what is in it.
    ///
    /// # Errors
    /// When the ledger refuses or is unavailable; after the latter the same order is to be sent again.
    pub async fn fund(&self, order: Signed<Fund>) -> Result<Amount, EscrowError> {
        self.call(order).await
    }

    /// Moves money from one account to another. Answers with what is left.
    ///
    /// # Errors
    /// When the ledger refuses or is unavailable; after the latter the same order is to be sent again.
    pub async fn transfer(&self, order: Signed<Transfer>) -> Result<Amount, EscrowError> {
        self.call(order).await
    }

    /// Calls, on a new connection if the last one has ended. The same ledger must answer there.
    pub(crate) async fn call<C: LedgerCall + Sync>(&self, args: C) -> Result<C::Answer, EscrowError> {
        let connection = self.link.connection().await?;
        ask(&connection, &args).await
    }
}

impl Escrow for LedgerClient {
    fn chain_id(&self) -> u64 {
        self.info.chain_id
    }

    fn address(&self) -> Address {
        self.info.escrow
    }

    fn protocol(&self) -> VoucherProtocol {
        VoucherProtocol::V1
    }

    fn grace(&self) -> Option<Duration> {
        Some(Duration::from_millis(self.info.grace_ms))
    }

    fn channel(&self, id: ChannelId) -> BoxFuture<'_, Result<Option<EscrowChannel>, EscrowError>> {
        Box::pin(self.call(FindChannel { id }))
    }

    fn open(&self, order: Signed<OpenChannel>) -> BoxFuture<'_, Result<EscrowChannel, EscrowError>> {
        Box::pin(self.call(order))
    }

    fn top_up(&self, order: Signed<TopUp>) -> BoxFuture<'_, Result<EscrowChannel, EscrowError>> {
        Box::pin(self.call(order))
    }

    fn settle(&self, order: Signed<Settle>, voucher: Signature) -> BoxFuture<'_, Result<Settlement, EscrowError>> {
        Box::pin(self.call(SettleWith { order, voucher }))
    }

    fn close(
        &self,
        order: Signed<Close>,
        voucher: Option<Signature>,
    ) -> BoxFuture<'_, Result<Settlement, EscrowError>> {
        Box::pin(self.call(CloseWith { order, voucher }))
    }

    fn request_close(&self, order: Signed<RequestClose>) -> BoxFuture<'_, Result<EscrowChannel, EscrowError>> {
        Box::pin(self.call(order))
    }

    fn withdraw(&self, order: Signed<Withdraw>) -> BoxFuture<'_, Result<Settlement, EscrowError>> {
        Box::pin(self.call(order))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::pin::pin;

    use tollway_protocol::payment::SecretKey;

    use super::*;
    use crate::Server;
    use crate::escrow::{Ledger, LedgerConfig};
    use crate::rpc::Services;

    /// A ledger at this place, until the result is sent or dropped.
    async fn serve(at: &Endpoint) -> (Endpoint, tokio::sync::oneshot::Sender<()>, tokio::task::JoinHandle<()>) {
        let key = SecretKey::from_bytes([9; 32]).unwrap();
        let ledger = LocalLedger::new(Ledger::new(LedgerIdentity::of(&key), LedgerConfig::default()));
        let services = Services::new().with(LedgerService::new(ledger));
        let server = Server::bind(at, SessionConfig { services, ..SessionConfig::default() }).await.unwrap();
        let endpoint = server.endpoint().clone();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let stopped = async move { drop(stopped.await) };
        let served = tokio::spawn(async move {
            server.run(stopped, Duration::ZERO).await;
        });
        (endpoint, stop, served)
    }

    /// A payee watches a channel beside its other work. While that work waits for the ledger, the watch rests, and may do
    /// so while it connects.
    #[tokio::test]
    async fn who_rests_while_connecting_keeps_nobody_from_the_ledger() {
        let any = "tcp://127.0.0.1:0".parse().unwrap();
        let (endpoint, stop, served) = serve(&any).await;
        let client = LedgerClient::connect(&endpoint).await.unwrap();
        drop(stop);
        served.await.unwrap();
        let lost = client.link.current.lock().clone();
        lost.closed().await;
        let (_, _stop, _served) = serve(&endpoint).await;
        let id = ChannelId([7; 32]);
        let mut resting = pin!(client.channel(id));
        tokio::select! {
            biased;
            _ = &mut resting => panic!("nothing is connected yet"),
            () = std::future::ready(()) => {}
        }
        let asked = tokio::time::timeout(Duration::from_secs(60), client.channel(id)).await;
        assert!(matches!(asked, Ok(Ok(None))), "{asked:?}");
        assert!(matches!(resting.await, Ok(None)));
    }
}
