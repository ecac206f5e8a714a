//! The floor of an RPC with many calls in flight: an id for each call, a oneshot for its answer, and writers that send
//! what has gathered in one write. Nothing is checked, nothing can be cancelled, nothing is bounded but the queue.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tollway_peers_harness::{Ends, Peer, Result};

/// Length and id.
const HEAD: usize = 4 + 8;
const READ: usize = 64 << 10;
/// Calls that wait for the writer: more than are ever in flight.
const QUEUE: usize = 1024;

type Pending = Arc<Mutex<HashMap<u64, oneshot::Sender<Bytes>>>>;

fn put_frame(out: &mut BytesMut, id: u64, payload: &[u8]) {
    out.reserve(HEAD + payload.len());
    out.put_u32(payload.len() as u32);
    out.put_u64(id);
    out.put_slice(payload);
}

/// Takes a whole frame out of the buffer, if there is one.
fn take_frame(read: &mut BytesMut) -> Option<(u64, Bytes)> {
    let length = read.get(..4)?.get_u32() as usize;
    if read.len() < HEAD + length {
        return None;
    }
    let mut frame = read.split_to(HEAD + length);
    frame.advance(4);
    let id = frame.get_u64();
    Some((id, frame.freeze()))
}

async fn serve(mut stream: TcpStream) -> Result<()> {
    let (mut read, mut out) = (BytesMut::new(), BytesMut::new());
    loop {
        read.reserve(READ);
        if stream.read_buf(&mut read).await? == 0 {
            return Ok(());
        }
        while let Some((id, payload)) = take_frame(&mut read) {
            put_frame(&mut out, id, &payload);
        }
        stream.write_all(&out).await?;
        out.clear();
    }
}

async fn write(mut stream: OwnedWriteHalf, mut calls: mpsc::Receiver<(u64, Bytes)>) -> Result<()> {
    let (mut batch, mut out) = (Vec::with_capacity(QUEUE), BytesMut::new());
    while calls.recv_many(&mut batch, QUEUE).await > 0 {
        for (id, payload) in batch.drain(..) {
            put_frame(&mut out, id, &payload);
        }
        stream.write_all(&out).await?;
        out.clear();
    }
    Ok(())
}

async fn read(mut stream: OwnedReadHalf, pending: Pending) -> Result<()> {
    let mut read = BytesMut::new();
    let mut answers = Vec::new();
    loop {
        read.reserve(READ);
        if stream.read_buf(&mut read).await? == 0 {
            return Ok(());
        }
        {
            let mut pending = pending.lock();
            while let Some((id, payload)) = take_frame(&mut read) {
                answers.extend(pending.remove(&id).map(|caller| (caller, payload)));
            }
        }
        for (caller, payload) in answers.drain(..) {
            // A caller that is gone wants no answer.
            let _gone = caller.send(payload);
        }
    }
}

#[derive(Clone)]
pub(crate) struct FloorPipe {
    calls: mpsc::Sender<(u64, Bytes)>,
    pending: Pending,
    ids: Arc<std::sync::atomic::AtomicU64>,
}

impl Peer for FloorPipe {
    const NAME: &'static str = "floor-pipe";

    type Caller = FloorPipe;

    async fn start(ends: Ends) -> Result<Self> {
        let stream = ends.tcp(|stream| async move { drop(serve(stream).await) }).await?;
        let (reading, writing) = stream.into_split();
        let (calls, queue) = mpsc::channel(QUEUE);
        let pending = Pending::default();
        tokio::spawn(write(writing, queue));
        tokio::spawn(read(reading, pending.clone()));
        Ok(FloorPipe { calls, pending, ids: Arc::default() })
    }

    async fn caller(&self) -> Result<Self::Caller> {
        Ok(self.clone())
    }

    async fn echo(pipe: &mut Self::Caller, payload: Bytes) -> Result<Bytes> {
        let id = pipe.ids.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (answer, answered) = oneshot::channel();
        pipe.pending.lock().insert(id, answer);
        pipe.calls.send((id, payload)).await?;
        Ok(answered.await?)
    }
}
