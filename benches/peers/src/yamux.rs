//! yamux: streams of bytes over one TCP connection. A caller has a stream of its own for all its calls, not one for
//! each; an item is a write, and so a frame.

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use bytes::{Bytes, BytesMut};
use futures::{AsyncReadExt, AsyncWriteExt};
use parking_lot::Mutex;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot};
use tokio_util::compat::{Compat, TokioAsyncReadCompatExt};
use tollway_peers_harness::{Ends, Opens, Order, Peer, Result, Streams, Tally, framed, parse_order};
use yamux::{Config, Connection, Mode, Stream};

/// Streams open at once: 512 by default.
const MAX_STREAMS: usize = 20_000;
/// Largest frame: an item of 64 KiB in one piece, where 16 KiB by default makes four of it.
const FRAME: usize = 128 << 10;
/// Opens that wait for the connection's task.
const QUEUE: usize = 64;
/// What is read at once at most.
const READ: usize = 256 << 10;

/// The first byte of a stream says what it is for.
const ECHO: u8 = 0;
const ITEMS: u8 = 1;
const IDLE: u8 = 2;

/// The windows grow by themselves, from 256 KiB a stream; without a bound they may, for so many streams.
fn config() -> Config {
    let mut config = Config::default();
    config.set_max_connection_receive_window(None).set_max_num_streams(MAX_STREAMS).set_split_send_size(FRAME);
    config
}

/// Bytes with their length in front, from a stream on which they follow each other.
async fn read_framed(stream: &mut Stream) -> Result<Bytes> {
    let mut length = [0; 4];
    stream.read_exact(&mut length).await?;
    let mut payload = BytesMut::zeroed(u32::from_be_bytes(length) as usize);
    stream.read_exact(&mut payload).await?;
    Ok(payload.freeze())
}

async fn answer(mut stream: Stream, idle: Arc<Mutex<Vec<Stream>>>) -> Result<()> {
    let mut kind = [0];
    stream.read_exact(&mut kind).await?;
    match kind[0] {
        ECHO => loop {
            let payload = read_framed(&mut stream).await?;
            stream.write_all(&framed(&payload)).await?;
        },
        ITEMS => {
            let order = parse_order(&read_framed(&mut stream).await?)?;
            let item = order.item();
            for _ in 0..order.count {
                stream.write_all(&item).await?;
            }
            stream.close().await?;
        }
        _ => {
            stream.write_all(&kind).await?;
            idle.lock().push(stream);
        }
    }
    Ok(())
}

async fn serve(stream: TcpStream) -> Result<()> {
    let mut connection = Connection::new(stream.compat(), config(), Mode::Server);
    let idle = Arc::default();
    while let Some(stream) = poll_fn(|cx| connection.poll_next_inbound(cx)).await {
        tokio::spawn(answer(stream?, Arc::clone(&idle)));
    }
    Ok(())
}

type Answer = oneshot::Sender<Result<Stream, yamux::ConnectionError>>;

/// Drives the client's end: it makes streams only between turns of its connection.
async fn drive(mut connection: Connection<Compat<TcpStream>>, mut opens: mpsc::Receiver<Answer>) {
    let mut waiting: Option<Answer> = None;
    poll_fn(|cx| {
        loop {
            if waiting.is_none() {
                match opens.poll_recv(cx) {
                    Poll::Ready(Some(answer)) => waiting = Some(answer),
                    Poll::Ready(None) => return Poll::Ready(()),
                    Poll::Pending => {}
                }
            }
            if let Some(answer) = waiting.take() {
                match connection.poll_new_outbound(cx) {
                    Poll::Ready(stream) => {
                        // Whoever asked may be gone.
                        let _gone = answer.send(stream);
                        continue;
                    }
                    Poll::Pending => waiting = Some(answer),
                }
            }
            // Polled last, since this is what drives everything else.
            match connection.poll_next_inbound(cx) {
                Poll::Ready(Some(Ok(_unasked))) => {}
                Poll::Ready(_ended) => return Poll::Ready(()),
                Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await;
}

pub(crate) struct Yamux {
    opens: mpsc::Sender<Answer>,
}

impl Yamux {
    /// A stream with its first bytes.
    async fn stream(&self, kind: u8, first: &[u8]) -> Result<Stream> {
        let (answer, opened) = oneshot::channel();
        self.opens.send(answer).await?;
        let mut stream = opened.await??;
        stream.write_all(&[&[kind], first].concat()).await?;
        Ok(stream)
    }
}

impl Peer for Yamux {
    const NAME: &'static str = "yamux";

    type Caller = Stream;

    async fn start(ends: Ends) -> Result<Self> {
        let stream = ends.tcp(|stream| async move { drop(serve(stream).await) }).await?;
        let (opens, queue) = mpsc::channel(QUEUE);
        tokio::spawn(drive(Connection::new(stream.compat(), config(), Mode::Client), queue));
        Ok(Yamux { opens })
    }

    /// A stream is acknowledged with the first frame on it, and no more than 256 may wait for that.
    async fn caller(&self) -> Result<Self::Caller> {
        let mut stream = self.stream(ECHO, &[]).await?;
        Self::echo(&mut stream, Bytes::new()).await?;
        Ok(stream)
    }

    async fn echo(stream: &mut Self::Caller, payload: Bytes) -> Result<Bytes> {
        stream.write_all(&framed(&payload)).await?;
        read_framed(stream).await
    }
}

impl Streams for Yamux {
    type Download = Stream;

    async fn download(&self, order: Order) -> Result<Self::Download> {
        self.stream(ITEMS, &framed(&order.to_bytes())).await
    }

    async fn receive(mut items: Self::Download, tally: &mut Tally) -> Result<()> {
        let mut chunk = vec![0; READ];
        loop {
            match items.read(&mut chunk).await? {
                0 => return Ok(()),
                bytes => tally.chunk(&chunk[..bytes])?,
            }
        }
    }
}

impl Opens for Yamux {
    type Idle = Stream;

    /// A stream is nothing before its first byte, so one byte goes over and one comes back.
    async fn open(&self) -> Result<Stream> {
        let mut stream = self.stream(IDLE, &[]).await?;
        stream.read_exact(&mut [0]).await?;
        Ok(stream)
    }
}
