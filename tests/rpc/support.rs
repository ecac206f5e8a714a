//! A service, and a server that can be made to die and to return.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tollway::conduit::endpoint::Endpoint;
use tollway::conduit::memory;
use tollway::future::BoxFuture;
use tollway::protocol::error::{Reason, SessionEnd};
use tollway::reconnect::Dial;
use tollway::rpc::middleware::TraceContext;
use tollway::rpc::{CallContext, Services};
use tollway::{ConnectError, Session, SessionConfig, SessionError};

/// Guards against hanging, not a measure of speed.
pub(crate) const LONG: Duration = Duration::from_secs(60);

#[tollway::service]
pub(crate) trait Desk {
    /// Answers with the number, and counts.
    async fn double(&self, number: u64) -> u64;
    #[idempotent]
    async fn look(&self) -> u64;
    /// Waits until it is let go.
    async fn wait(&self) -> u64;
    #[idempotent]
    async fn wait_idempotently(&self) -> u64;
    async fn fail(&self) -> Result<u64, String>;
    async fn panic(&self);
    /// Calls its caller back, and says which trace it was called in.
    async fn trace(&self, cx: &CallContext, back: bool) -> Vec<String>;
    async fn connection(&self, cx: &CallContext) -> u64;
}

#[derive(Default)]
pub(crate) struct Clerk {
    pub(crate) executed: AtomicU32,
    pub(crate) begun: Notify,
    pub(crate) go: Notify,
}

impl Clerk {
    pub(crate) fn executed(&self) -> u32 {
        self.executed.load(Ordering::SeqCst)
    }

    async fn waited(&self) -> u64 {
        let count = self.executed.fetch_add(1, Ordering::SeqCst) + 1;
        self.begun.notify_one();
        self.go.notified().await;
        u64::from(count)
    }
}

impl Desk for Clerk {
    async fn double(&self, number: u64) -> u64 {
        self.executed.fetch_add(1, Ordering::SeqCst);
        2 * number
    }

    async fn look(&self) -> u64 {
        u64::from(self.executed.fetch_add(1, Ordering::SeqCst))
    }

    async fn wait(&self) -> u64 {
        self.waited().await
    }

    async fn wait_idempotently(&self) -> u64 {
        self.waited().await
    }

    async fn fail(&self) -> Result<u64, String> {
        Err("as it should".to_owned())
    }

    async fn panic(&self) {
        panic!("a handler panics")
    }

    async fn trace(&self, cx: &CallContext, back: bool) -> Vec<String> {
        let mut traces: Vec<String> =
            TraceContext::from_metadata(cx.metadata()).iter().map(ToString::to_string).collect();
        if back {
            let connection = cx.connection().with_middleware(tollway::rpc::middleware::Tracing::new());
            let caller = DeskClient::from(connection);
            traces.extend(cx.scope(async move { caller.trace(false).await }).await.unwrap());
        }
        traces
    }

    async fn connection(&self, cx: &CallContext) -> u64 {
        cx.connection_id().0
    }
}

pub(crate) fn desk() -> (Arc<Clerk>, DeskServer<Clerk>) {
    let clerk = Arc::new(Clerk::default());
    (clerk.clone(), DeskServer::from(clerk))
}

/// Two ends in memory.
pub(crate) async fn pair(client: SessionConfig, server: SessionConfig) -> (Session, Session) {
    let (left, right) = memory::pair(64 * 1024);
    let (client, server) = tokio::join!(Session::connect(left, client), Session::accept(right, server));
    (client.unwrap(), server.unwrap())
}

/// A server in memory that is there or not.
#[derive(Clone, Default)]
pub(crate) struct Host {
    inner: Arc<HostInner>,
}

#[derive(Default)]
struct HostInner {
    services: Mutex<Option<Services>>,
    sessions: Mutex<Vec<Session>>,
    dialled: AtomicU32,
}

impl Host {
    pub(crate) fn up(services: Services) -> Self {
        let host = Host::default();
        host.rise(services);
        host
    }

    pub(crate) fn rise(&self, services: Services) {
        *self.inner.services.lock() = Some(services);
    }

    pub(crate) fn dialled(&self) -> u32 {
        self.inner.dialled.load(Ordering::SeqCst)
    }

    /// The newest session as the server holds it.
    pub(crate) fn session(&self) -> Session {
        self.inner.sessions.lock().last().unwrap().clone()
    }

    /// Ends all sessions, and takes no new ones.
    pub(crate) fn die(&self) {
        *self.inner.services.lock() = None;
        self.drop_sessions();
    }

    pub(crate) fn drop_sessions(&self) {
        for session in std::mem::take(&mut *self.inner.sessions.lock()) {
            session.close(Reason::new(0, "the server dies"));
        }
    }
}

impl Dial for Host {
    fn dial(&self, config: SessionConfig) -> BoxFuture<'static, Result<Session, ConnectError>> {
        self.inner.dialled.fetch_add(1, Ordering::SeqCst);
        let (host, services) = (self.inner.clone(), self.inner.services.lock().clone());
        Box::pin(async move {
            tokio::task::yield_now().await;
            let Some(services) = services else { return Err(nobody()) };
            let (client, server) = pair(config, SessionConfig { services, ..SessionConfig::default() }).await;
            host.sessions.lock().push(server);
            Ok(client)
        })
    }

    fn address(&self) -> String {
        "memory".to_owned()
    }
}

fn nobody() -> ConnectError {
    let endpoint: Endpoint = "tcp://127.0.0.1:9".parse().unwrap();
    let end = SessionEnd::ConduitLost("nobody is there".to_owned());
    SessionError { peer: endpoint.to_string(), end }.into()
}
