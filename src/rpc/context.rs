//! What a handler may know of the call that it answers, beside the arguments.

use std::any::{Any, TypeId};
use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tollway_protocol::id::ConnectionId;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;
use tollway_protocol::session::CallKey;

use super::meter::Meter;
use super::method::MethodId;
use super::scope::Scope;
use crate::auth::Identity;
use crate::conduit::PeerInfo;
use crate::connection::Connection;
use crate::payment::Reservation;
use crate::shared::{ConnectionCell, Shared};

/// A call that is being answered: who makes it, on which connection, until when.
///
/// A method of a `#[tollway::service]` gets it by declaring an argument of type `&CallContext` behind `&self`; it is no
/// argument for the client.
pub struct CallContext {
    pub(crate) cell: Arc<ConnectionCell>,
    pub(crate) connection: ConnectionId,
    pub(crate) method: MethodId,
    pub(crate) metadata: Metadata,
    pub(crate) deadline: Option<Instant>,
    /// Made for the first that asks; cancelled with the context, which lives as long as the handler.
    pub(crate) token: OnceLock<CancellationToken>,
    pub(crate) reservation: Option<Arc<Reservation>>,
    /// A call with a price and an idempotency key.
    pub(crate) named: Option<NamedCall>,
}

/// A call that its payer has named, so that it can make it again.
pub(crate) struct NamedCall {
    pub(crate) shared: Arc<Shared>,
    pub(crate) call: CallKey,
}

impl NamedCall {
    /// Begins it. What comes back says what it has cost; `None` when its caller is gone, and nothing is to be executed.
    pub(crate) fn begin(self, paid_before: Amount) -> Option<oneshot::Receiver<Amount>> {
        let mut state = self.shared.lock();
        if !state.machine.begin_named(self.call, paid_before) {
            return None;
        }
        let (tell, cost) = oneshot::channel();
        state.costs.insert(self.call, tell);
        Some(cost)
    }
}

impl fmt::Debug for CallContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallContext")
            .field("method", &self.method)
            .field("connection", &self.connection)
            .field("peer", self.peer())
            .field("metadata", &self.metadata)
            .finish_non_exhaustive()
    }
}

impl CallContext {
    /// The method.
    pub fn method(&self) -> MethodId {
        self.method
    }

    /// The name of the service that is called.
    pub fn service(&self) -> &str {
        self.cell.service.as_ref().map_or("", |entry| entry.service.name())
    }

    /// The method's name, if the service knows it: see [`Service::method_name`](super::Service::method_name).
    pub fn method_name(&self) -> Option<&'static str> {
        self.cell.service.as_ref().and_then(|entry| entry.service.method_name(self.method))
    }

    /// The caller's metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// Bytes of the largest answer that the caller takes.
    pub(crate) fn max_answer(&self) -> u32 {
        self.cell.shared.peer_limits(self.connection).map_or(0, |limits| limits.max_body)
    }

    /// When the caller gives up, if it said so.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The time that is left until the deadline, zero when it has passed.
    pub fn time_left(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// Takes the call's deadline, and the trace that it belongs to, along to a task of its own: what the future calls takes
    /// over what is left of it, as what the handler calls itself does.
    ///
    /// ```
    /// # use tollway::rpc::CallContext;
    /// # use std::time::Duration;
    /// fn later(cx: &CallContext, work: impl Future<Output = ()> + Send + 'static) {
    ///     tokio::spawn(cx.scope(work));
    /// }
    /// ```
    pub fn scope<F: Future>(&self, future: F) -> impl Future<Output = F::Output> + use<F> {
        Scope { deadline: self.deadline, ..Scope::current() }.hold(future)
    }

    /// The other end of the conduit.
    pub fn peer(&self) -> &PeerInfo {
        &self.cell.peer().info
    }

    /// Who the peer has proved to be, if an [`Authenticator`](crate::auth::Authenticator) has decided about it.
    pub fn identity(&self) -> Option<&Identity> {
        self.cell.peer().identity.get()
    }

    /// The id of the connection in its session.
    pub fn connection_id(&self) -> ConnectionId {
        self.connection
    }

    /// The connection on which the call came, to call the caller back: if that serves something on it.
    ///
    /// The handle keeps nothing open; on a connection that has ended its calls fail.
    pub fn connection(&self) -> Connection {
        Connection::served(self.cell.clone(), self.connection)
    }

    /// What is reserved for this call, if the method's price has a maximum and the connection is paid.
    pub fn reservation(&self) -> Option<&Arc<Reservation>> {
        self.reservation.as_ref()
    }

    /// Meters streams of this call: see [`MeterStream::metered`](super::MeterStream::metered).
    pub fn meter(&self) -> Meter {
        Meter::new(self.deadline)
    }

    /// What handlers keep for as long as the connection lives.
    pub fn data(&self) -> &ConnectionData {
        self.cell.data()
    }

    /// Tells what a handler has set going elsewhere that it is over: cancelled when the handler has returned, and when it was
    /// dropped because the caller lost interest, the deadline passed or the connection ended. The handler's own future
    /// needs none.
    ///
    /// ```
    /// # use tollway::rpc::CallContext;
    /// async fn search(cx: &CallContext, term: String) -> u64 {
    ///     let cancelled = cx.cancellation();
    ///     let search = tokio::task::spawn_blocking(move || {
    ///         let mut looked_at = 0;
    ///         while !cancelled.is_cancelled() && looked_at < 1_000_000 {
    ///             looked_at += term.len() as u64;
    ///         }
    ///         looked_at
    ///     });
    ///     search.await.unwrap_or(0)
    /// }
    /// ```
    pub fn cancellation(&self) -> CancellationToken {
        self.token.get_or_init(CancellationToken::new).clone()
    }
}

impl Drop for CallContext {
    fn drop(&mut self) {
        if let Some(token) = self.token.get() {
            token.cancel();
        }
    }
}

/// Values that handlers keep with a connection, one of each type: a login, a cursor, a cache. They are dropped with it.
#[derive(Default)]
pub struct ConnectionData {
    /// A list: a service keeps a handful of types at most, which it names itself.
    values: Mutex<Vec<(TypeId, Arc<dyn Any + Send + Sync>)>>,
}

impl fmt::Debug for ConnectionData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectionData").field("values", &self.values.lock().len()).finish()
    }
}

impl ConnectionData {
    /// The value of a type.
    pub fn get<T: Send + Sync + 'static>(&self) -> Option<Arc<T>> {
        let values = self.values.lock();
        let (_, value) = values.iter().find(|(of, _)| *of == TypeId::of::<T>())?;
        value.clone().downcast().ok()
    }

    /// Keeps a value, in place of the one of its type that was there.
    pub fn insert<T: Send + Sync + 'static>(&self, value: T) -> Option<Arc<T>> {
        let value: Arc<dyn Any + Send + Sync> = Arc::new(value);
        let mut values = self.values.lock();
        match values.iter_mut().find(|(of, _)| *of == TypeId::of::<T>()) {
            Some((_, there)) => std::mem::replace(there, value).downcast().ok(),
            None => {
                values.push((TypeId::of::<T>(), value));
                None
            }
        }
    }

    /// The value of a type, which is made if there is none. Of two that are made at once, the first is kept.
    pub fn get_or_insert_with<T: Send + Sync + 'static>(&self, make: impl FnOnce() -> T) -> Arc<T> {
        if let Some(value) = self.get() {
            return value;
        }
        // Made without the lock: it is the user's code.
        let made = Arc::new(make());
        let mut values = self.values.lock();
        let there = values.iter().find(|(of, _)| *of == TypeId::of::<T>());
        if let Some(Ok(value)) = there.map(|(_, value)| value.clone().downcast()) {
            return value;
        }
        values.push((TypeId::of::<T>(), made.clone()));
        made
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_value_of_each_type_is_kept() {
        let data = ConnectionData::default();
        assert_eq!(data.get::<u32>(), None);
        assert_eq!(data.insert(7u32), None);
        assert_eq!(data.insert("name"), None);
        assert_eq!(data.insert(8u32).as_deref(), Some(&7));
        assert_eq!((data.get::<u32>().as_deref(), data.get::<&str>().as_deref()), (Some(&8), Some(&"name")));
        assert_eq!(*data.get_or_insert_with(|| 9u32), 8);
        assert_eq!(*data.get_or_insert_with(|| 9u64), 9);
    }
}
