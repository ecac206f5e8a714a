//! The service that is measured: `tollway.bench`.
//!
//! `echo(bytes) -> bytes` answers with its argument, `items(size) -> stream` with a stream of items of that size which
//! goes on until nobody wants it.

use bytes::Bytes;
use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Service, Tx, stream};
use tollway_protocol::limits::ConnectionLimits;

/// The service's name.
pub(super) const SERVICE: &str = "tollway.bench";

/// Answers with the argument.
pub(super) fn echo() -> MethodId {
    MethodId::of(SERVICE, 1, "echo")
}

/// Answers with an endless stream of items of so many bytes.
pub(super) fn items() -> MethodId {
    MethodId::of(SERVICE, 1, "items")
}

/// Serves what is measured. It holds nothing beyond what sessions hold for their streams.
#[derive(Debug)]
pub(super) struct BenchService {
    echo: MethodId,
    items: MethodId,
}

impl BenchService {
    pub(super) fn new() -> Self {
        BenchService { echo: echo(), items: items() }
    }
}

impl Service for BenchService {
    fn name(&self) -> &str {
        SERVICE
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        if call.method() == self.echo {
            return Box::pin(async move {
                match call.args::<Bytes>() {
                    Ok(bytes) => Reply::ok(&bytes),
                    Err(error) => Reply::invalid_payload(&error),
                }
            });
        }
        if call.method() != self.items {
            return Reply::unknown_method().boxed();
        }
        match call.args::<u32>() {
            Ok(size) if size <= ConnectionLimits::default().max_item => {
                let (tx, rx) = stream();
                tokio::spawn(send(tx, Bytes::from(vec![7; size as usize])));
                Reply::ok(&rx).boxed()
            }
            // No receiver takes an item of that size, and nobody is to make this side allocate it.
            Ok(size) => Reply::error(&size).boxed(),
            Err(error) => Reply::invalid_payload(&error).boxed(),
        }
    }
}

/// Sends until nobody wants more, which is how such a stream ends.
async fn send(mut tx: Tx<Bytes>, item: Bytes) {
    while tx.send(item.clone()).await.is_ok() {}
}
