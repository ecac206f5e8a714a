//! h2 alone: HTTP/2 without anything on top. A call is a request, its payload the body; an item is a DATA frame; an open
//! stream is a request of which neither body has ended.

use std::future::poll_fn;

use bytes::{Bytes, BytesMut};
use h2::client::{self, SendRequest};
use h2::server::{self, SendResponse};
use h2::{RecvStream, SendStream};
use http::{Method, Request, Response};
use tokio::net::TcpStream;
use tollway_peers_harness::{Ends, Opens, Order, Peer, Result, Streams, Tally, parse_order};

/// A stream's window: 64 KiB by default, which a stream of items uses up at once.
pub(crate) const STREAM_WINDOW: u32 = 1 << 20;
/// The window that all streams of a connection share. One that is unread keeps its part of it: with room for 16, the
/// eight of the isolation leave some over. Twice as many unread would stall the connection.
pub(crate) const CONNECTION_WINDOW: u32 = 16 << 20;
/// Largest frame: an item of 64 KiB in one piece, where 16 KiB by default makes four of it.
pub(crate) const FRAME: u32 = 128 << 10;
/// What a connection buffers of what is sent: as much as the windows let it.
const SEND_BUFFER: usize = STREAM_WINDOW as usize;
/// Streams open at once.
const MAX_STREAMS: u32 = 20_000;
/// Capacity that a sender asks for at once, so that it asks seldom for small items.
const RESERVE: usize = 256 << 10;

const ECHO: &str = "http://peer/echo";
const ITEMS: &str = "http://peer/items";
const IDLE: &str = "http://peer/idle";

async fn body(mut body: RecvStream) -> Result<Bytes> {
    let mut whole = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        if whole.is_empty() && body.is_end_stream() {
            return Ok(chunk);
        }
        whole.extend_from_slice(&chunk);
    }
    Ok(whole.freeze())
}

async fn send_items(order: Order, mut out: SendStream<Bytes>) -> Result<()> {
    let item = order.item();
    for _ in 0..order.count {
        while out.capacity() < item.len() {
            out.reserve_capacity(RESERVE.max(item.len()));
            poll_fn(|cx| out.poll_capacity(cx)).await.ok_or("the stream has ended")??;
        }
        out.send_data(item.clone(), false)?;
    }
    out.send_data(Bytes::new(), true)?;
    Ok(())
}

async fn answer(request: Request<RecvStream>, mut respond: SendResponse<Bytes>) -> Result<()> {
    let items = request.uri().path() == "/items";
    let payload = body(request.into_body()).await?;
    let mut out = respond.send_response(Response::new(()), false)?;
    if items {
        return send_items(parse_order(&payload)?, out).await;
    }
    Ok(out.send_data(payload, true)?)
}

async fn serve(stream: TcpStream) -> Result<()> {
    let mut connection = server::Builder::new()
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(FRAME)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_streams(MAX_STREAMS)
        .handshake(stream)
        .await?;
    let mut idle = Vec::new();
    while let Some(accepted) = connection.accept().await {
        let (request, mut respond) = accepted?;
        if request.uri().path() == "/idle" {
            idle.push((respond.send_response(Response::new(()), false)?, request.into_body()));
        } else {
            // A task for each call: the connection's own must go on accepting.
            tokio::spawn(answer(request, respond));
        }
    }
    Ok(())
}

pub(crate) struct H2 {
    client: SendRequest<Bytes>,
}

/// A request and the response to it, of which the bodies are open.
async fn request(client: &SendRequest<Bytes>, uri: &'static str, payload: Option<Bytes>) -> Result<Exchange> {
    let request = Request::builder().method(Method::POST).uri(uri).body(())?;
    let mut client = client.clone().ready().await?;
    let (response, mut out) = client.send_request(request, false)?;
    if let Some(payload) = payload {
        out.send_data(payload, true)?;
    }
    Ok((out, response.await?.into_body()))
}

type Exchange = (SendStream<Bytes>, RecvStream);

impl Peer for H2 {
    const NAME: &'static str = "h2";

    type Caller = SendRequest<Bytes>;

    async fn start(ends: Ends) -> Result<Self> {
        let stream = ends.tcp(|stream| async move { drop(serve(stream).await) }).await?;
        let (client, connection) = client::Builder::new()
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .max_frame_size(FRAME)
            .max_send_buffer_size(SEND_BUFFER)
            .initial_max_send_streams(MAX_STREAMS as usize)
            .handshake(stream)
            .await?;
        tokio::spawn(connection);
        Ok(H2 { client })
    }

    async fn caller(&self) -> Result<Self::Caller> {
        Ok(self.client.clone())
    }

    async fn echo(client: &mut Self::Caller, payload: Bytes) -> Result<Bytes> {
        let (_out, answer) = request(client, ECHO, Some(payload)).await?;
        body(answer).await
    }
}

impl Streams for H2 {
    type Download = RecvStream;

    async fn download(&self, order: Order) -> Result<Self::Download> {
        let order = Bytes::copy_from_slice(&order.to_bytes());
        Ok(request(&self.client, ITEMS, Some(order)).await?.1)
    }

    async fn receive(mut items: Self::Download, tally: &mut Tally) -> Result<()> {
        while let Some(chunk) = items.data().await {
            let chunk = chunk?;
            items.flow_control().release_capacity(chunk.len())?;
            tally.chunk(&chunk)?;
        }
        Ok(())
    }
}

impl Opens for H2 {
    type Idle = Exchange;

    async fn open(&self) -> Result<Exchange> {
        request(&self.client, IDLE, None).await
    }
}
