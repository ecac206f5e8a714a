//! [`TunnelService`]: takes the tunnels that peers make.
//!
//! The call that makes a tunnel is answered at once, so no limit of calls sees what goes on in the tunnel. A service counts
//! that itself (`Live`), of all sessions and of each.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::num::NonZeroUsize;
use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use tollway_protocol::error::{Reason, code};

use super::Tunnel;
use crate::connection::Connection;
use crate::rpc::{BoxReply, CallContext, IncomingCall, MethodId, Reply, Rx, Service, Tx};

/// The method by which a tunnel is made, on any service: its arguments are what the service reads (`Rx<Bytes>`) and what
/// it writes (`Tx<Bytes>`), and it returns nothing, at once. A price list names it like any other method. `[call.tunnel]`
pub const METHOD: MethodId = MethodId::of("tollway.tunnel", 1, "open");

/// Tasks of tunnels that a service has at once by default: what each holds is often a socket, of which a process has some
/// thousands.
pub const MAX_TUNNELS: NonZeroUsize = NonZeroUsize::new(4096).expect("it is not zero");

/// Of these, tasks of one session by default: as many as one connection has calls, and a quarter of all, so that one peer
/// does not take the places of the others.
pub const MAX_SESSION_TUNNELS: NonZeroUsize = NonZeroUsize::new(1024).expect("it is not zero");

/// A service that does something with each tunnel, in a task of its own. It has at most [`MAX_TUNNELS`] tasks at once, and
/// [`MAX_SESSION_TUNNELS`] of one session, or [as many as it is told](Self::with_limits): more tunnels are refused with
/// [`AT_CAPACITY`](code::AT_CAPACITY). A task counts until it ends.
///
/// ```
/// use tokio::io::copy;
/// use tollway::rpc::Services;
/// use tollway::tunnel::TunnelService;
///
/// let echo = TunnelService::new("echo", |tunnel, _context| async {
///     let (mut reader, mut writer) = tunnel.into_split();
///     if copy(&mut reader, &mut writer).await.is_ok() {
///         // Without it the peer would read an error.
///         let _ = tokio::io::AsyncWriteExt::shutdown(&mut writer).await;
///     }
/// });
/// let services = Services::new().with(echo);
/// ```
pub struct TunnelService<F> {
    name: String,
    take: F,
    live: Arc<Live>,
}

/// The tasks that are there.
struct Live {
    max: usize,
    max_session: usize,
    counts: Mutex<Counts>,
}

#[derive(Default)]
struct Counts {
    all: usize,
    /// By the address of what a session's handles share. Whoever counts here holds it.
    sessions: HashMap<usize, usize>,
}

impl Live {
    fn new(max: NonZeroUsize, max_session: NonZeroUsize) -> Arc<Self> {
        Arc::new(Live { max: max.get(), max_session: max_session.get(), counts: Mutex::default() })
    }

    /// A place for one more, if there is one.
    fn enter(self: &Arc<Self>, connection: Connection) -> Option<Place> {
        let session = session_of(&connection);
        let mut counts = self.counts.lock();
        let own = counts.sessions.get(&session).copied().unwrap_or(0);
        if counts.all >= self.max || own >= self.max_session {
            return None;
        }
        counts.all += 1;
        counts.sessions.insert(session, own + 1);
        Some(Place { live: self.clone(), connection })
    }
}

fn session_of(connection: &Connection) -> usize {
    Arc::as_ptr(connection.shared()).addr()
}

/// What a task has while it lives.
struct Place {
    live: Arc<Live>,
    connection: Connection,
}

impl Drop for Place {
    fn drop(&mut self) {
        let session = session_of(&self.connection);
        let mut counts = self.live.counts.lock();
        counts.all -= 1;
        if let Some(own) = counts.sessions.get_mut(&session) {
            *own -= 1;
            if *own == 0 {
                counts.sessions.remove(&session);
            }
        }
    }
}

impl<F> fmt::Debug for TunnelService<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TunnelService").field("name", &self.name).finish_non_exhaustive()
    }
}

impl<F, Fut> TunnelService<F>
where
    F: Fn(Tunnel, CallContext) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    /// Hands each tunnel to `take`.
    ///
    /// # Cancel safety
    /// Its future is dropped when the connection ends before the peer has ended its direction in order: nothing complete
    /// can come of it any more. It goes on if the peer has ended it, or if the reader was dropped or stopped.
    pub fn new(name: impl Into<String>, take: F) -> Self {
        TunnelService { name: name.into(), take, live: Live::new(MAX_TUNNELS, MAX_SESSION_TUNNELS) }
    }

    /// The same service with at most so many tasks at once in all, and of one session.
    #[must_use]
    pub fn with_limits(mut self, all: NonZeroUsize, session: NonZeroUsize) -> Self {
        self.live = Live::new(all, session);
        self
    }

    fn accept(&self, (rx, tx): (Rx<Bytes>, Tx<Bytes>), context: CallContext) -> Reply {
        let connection = context.connection();
        let Some(place) = self.live.enter(connection.clone()) else {
            return Reply::refused(&Reason::new(code::AT_CAPACITY, "too many tunnels are open"));
        };
        let incoming = rx.core().clone();
        let take = (self.take)(Tunnel::on(Some(connection), tx, rx), context);
        tokio::spawn(async move {
            let mut take = pin!(take);
            tokio::select! {
                () = &mut take => return,
                _end = place.connection.closed() => {}
            }
            if !incoming.lacks_end() {
                take.await;
            }
        });
        Reply::ok(&())
    }
}

impl<F, Fut> Service for TunnelService<F>
where
    F: Fn(Tunnel, CallContext) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    fn name(&self) -> &str {
        &self.name
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        if call.method() != METHOD {
            return Reply::unknown_method().boxed();
        }
        let (context, mut args) = call.into_parts();
        let reply = match args.decode::<(Rx<Bytes>, Tx<Bytes>)>() {
            Ok(streams) => self.accept(streams, context),
            Err(error) => Reply::invalid_payload(&error),
        };
        reply.boxed()
    }
}
