//! A server: accepts conduits at an endpoint and holds a session on each.

use std::fmt;
use std::io;
use std::pin::pin;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tollway_protocol::error::{Reason, SessionEnd, code};

use crate::conduit::endpoint::{Endpoint, Scheme};
use crate::conduit::tcp::TcpListener;
use crate::session::{Session, SessionConfig};

/// Listens at an endpoint. Nothing is accepted before [`run`](Self::run).
pub struct Server {
    listener: TcpListener,
    endpoint: Endpoint,
    config: SessionConfig,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl Server {
    /// Binds an endpoint. Port 0 takes a free one, which [`endpoint`](Self::endpoint) names.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn bind(endpoint: &Endpoint, config: SessionConfig) -> io::Result<Server> {
        match endpoint.scheme() {
            Scheme::Tcp => {
                let listener = TcpListener::bind(endpoint.address()).await?;
                let address = listener.local_addr()?;
                let endpoint = format!("tcp://{address}").parse().map_err(io::Error::other)?;
                Ok(Server { listener, endpoint, config })
            }
        }
    }

    /// Where the server listens, with the real port.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Changes what is served, for a service that must know the server's own endpoint.
    pub fn set_config(&mut self, config: SessionConfig) {
        self.config = config;
    }

    /// Holds a session on each conduit that comes, until `shutdown` is ready. Then it accepts no more, says so to every
    /// peer, and waits for their connections to end, at most for `grace`; what is left is closed.
    ///
    /// No error of one conduit ends it, nor one of the listener, such as a lack of file descriptors.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send, grace: Duration) {
        let Server { listener, config, .. } = self;
        let (stop, stopping) = watch::channel(false);
        let mut sessions = JoinSet::new();
        let mut shutdown = pin!(shutdown);
        loop {
            tokio::select! {
                () = &mut shutdown => break,
                conduit = listener.accept() => {
                    // The handshake runs in the session's own task: a slow one delays nobody.
                    sessions.spawn(serve(conduit, config.clone(), stopping.clone()));
                }
                // Sessions that ended are forgotten as they end.
                Some(_) = sessions.join_next() => {}
            }
        }
        drop(listener);
        // Nobody listens when no session is left.
        let _no_session = stop.send(true);
        let drained = tokio::time::timeout(grace, async { while sessions.join_next().await.is_some() {} }).await;
        if drained.is_err() {
            tracing::warn!(sessions = sessions.len(), "sessions did not end within the grace period");
            sessions.shutdown().await;
        }
    }
}

async fn serve(conduit: crate::conduit::tcp::TcpConduit, config: SessionConfig, mut stopping: watch::Receiver<bool>) {
    let session = match Session::accept(conduit, config).await {
        Ok(session) => session,
        Err(error) => {
            tracing::warn!(%error, "no session");
            return;
        }
    };
    tracing::debug!(peer = %session.peer(), "session opened");
    tokio::select! {
        end = session.closed() => {
            match end {
                SessionEnd::PeerViolation(_) | SessionEnd::ReportedViolation(_) => {
                    tracing::warn!(peer = %session.peer(), %end, "session ended");
                }
                _ => tracing::debug!(peer = %session.peer(), %end, "session ended"),
            }
            return;
        }
        _ = stopping.wait_for(|stop| *stop) => {}
    }
    session.drain(Reason::new(code::GOING_AWAY, "the server is shutting down")).await;
}
