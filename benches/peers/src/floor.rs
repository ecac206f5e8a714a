//! The floor: what one loop on each side costs that does nothing but frames with a length. One caller at a time, and no
//! way to tell calls apart.
//!
//! A request is an echo, or an order of items if the top bit of its length is set. Items leave through a write buffer
//! of 64 KiB that is flushed when it is full: a real sender could not hold items back like that.

use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufWriter};
use tokio::net::TcpStream;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tollway_peers_harness::{Ends, Order, Peer, Result, Streams, Tally, framed, parse_order};

const ORDER: u32 = 1 << 31;
const BUFFER: usize = 64 << 10;

/// A socket, and what was read ahead from it.
pub(crate) struct Wire {
    stream: TcpStream,
    read: BytesMut,
}

impl Wire {
    fn new(stream: TcpStream) -> Self {
        Wire { stream, read: BytesMut::with_capacity(2 * BUFFER) }
    }

    /// The next frame and its length as it came; `None` at the end.
    async fn frame(&mut self) -> Result<Option<(u32, Bytes)>> {
        loop {
            if let Some(mut prefix) = self.read.get(..4) {
                let length = prefix.get_u32();
                let end = 4 + (length & !ORDER) as usize;
                if self.read.len() >= end {
                    let mut frame = self.read.split_to(end);
                    frame.advance(4);
                    return Ok(Some((length, frame.freeze())));
                }
                self.read.reserve(end - self.read.len());
            }
            self.read.reserve(BUFFER);
            if self.stream.read_buf(&mut self.read).await? == 0 {
                return Ok(None);
            }
        }
    }
}

async fn serve(mut wire: Wire) -> Result<()> {
    while let Some((length, payload)) = wire.frame().await? {
        if length & ORDER == 0 {
            wire.stream.write_all(&framed(&payload)).await?;
            continue;
        }
        let order = parse_order(&payload)?;
        let item = order.item();
        let mut out = BufWriter::with_capacity(BUFFER, &mut wire.stream);
        for _ in 0..order.count {
            out.write_u32(order.bytes as u32).await?;
            out.write_all(&item).await?;
        }
        out.flush().await?;
    }
    Ok(())
}

pub(crate) struct Floor {
    wire: Arc<Mutex<Wire>>,
}

impl Peer for Floor {
    const NAME: &'static str = "floor";

    type Caller = OwnedMutexGuard<Wire>;

    async fn start(ends: Ends) -> Result<Self> {
        let serve = |stream| async move { drop(serve(Wire::new(stream)).await) };
        Ok(Floor { wire: Arc::new(Mutex::new(Wire::new(ends.tcp(serve).await?))) })
    }

    async fn caller(&self) -> Result<Self::Caller> {
        Ok(self.wire.clone().try_lock_owned()?)
    }

    async fn echo(wire: &mut Self::Caller, payload: Bytes) -> Result<Bytes> {
        wire.stream.write_all(&framed(&payload)).await?;
        let (_length, answer) = wire.frame().await?.ok_or("the server is gone")?;
        Ok(answer)
    }
}

impl Streams for Floor {
    type Download = (Order, OwnedMutexGuard<Wire>);

    async fn download(&self, order: Order) -> Result<Self::Download> {
        let mut wire = self.caller().await?;
        let mut request = BytesMut::new();
        request.put_u32(ORDER | 16);
        request.put_slice(&order.to_bytes());
        wire.stream.write_all(&request).await?;
        Ok((order, wire))
    }

    async fn receive((order, mut wire): Self::Download, tally: &mut Tally) -> Result<()> {
        for _ in 0..order.count {
            let (_length, item) = wire.frame().await?.ok_or("the server is gone")?;
            tally.item(&item)?;
        }
        Ok(())
    }
}
