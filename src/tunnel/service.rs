//! [`TunnelService`]: takes the tunnels that peers make.

use std::fmt;
use std::future::Future;

use bytes::Bytes;

use super::Tunnel;
use crate::rpc::{BoxReply, CallContext, IncomingCall, MethodId, Reply, Rx, Service, Tx};

/// The method by which a tunnel is made, on any service: its arguments are what the service reads (`Rx<Bytes>`) and what
/// it writes (`Tx<Bytes>`), and it returns nothing, at once. A price list names it like any other method. `[call.tunnel]`
pub const METHOD: MethodId = MethodId::of("tollway.tunnel", 1, "open");

/// A service that does something with each tunnel, in a task of its own.
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
    /// Hands each tunnel to `take`. Its future goes on when the peer has gone; it notices when it reads or writes.
    pub fn new(name: impl Into<String>, take: F) -> Self {
        TunnelService { name: name.into(), take }
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
            Ok((rx, tx)) => {
                let tunnel = Tunnel::on(Some(context.connection()), tx, rx);
                tokio::spawn((self.take)(tunnel, context));
                Reply::ok(&())
            }
            Err(error) => Reply::invalid_payload(&error),
        };
        reply.boxed()
    }
}
