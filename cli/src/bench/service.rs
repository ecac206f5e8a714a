//! The service that is measured: `tollway.bench`.

use bytes::Bytes;
use tollway::rpc::{Rx, Tx, stream};
use tollway_protocol::limits::ConnectionLimits;

/// What is measured.
#[tollway::service(name = "tollway.bench")]
pub(super) trait Bench {
    /// Answers with its argument.
    async fn echo(&self, payload: Bytes) -> Bytes;
    /// Items of so many bytes, until nobody wants more. Fails with a size that no receiver takes.
    async fn items(&self, size: u32) -> Result<Rx<Bytes>, u32>;
}

/// Serves what is measured. It holds nothing beyond what sessions hold for their streams.
#[derive(Debug)]
pub(super) struct Source;

impl Bench for Source {
    async fn echo(&self, payload: Bytes) -> Bytes {
        payload
    }

    async fn items(&self, size: u32) -> Result<Rx<Bytes>, u32> {
        // Nobody is to make this side allocate what no receiver takes.
        if size > ConnectionLimits::default().max_item {
            return Err(size);
        }
        let (tx, rx) = stream();
        tokio::spawn(send(tx, Bytes::from(vec![7; size as usize])));
        Ok(rx)
    }
}

/// Sends until nobody wants more, which is how such a stream ends.
async fn send(mut tx: Tx<Bytes>, item: Bytes) {
    while tx.send(item.clone()).await.is_ok() {}
}
