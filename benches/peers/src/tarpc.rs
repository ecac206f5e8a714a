//! tarpc over its serde transport: bincode in frames with a length. It has no streams.

use bytes::Bytes;
use futures::StreamExt;
use tarpc::server::{BaseChannel, Channel};
use tarpc::{client, context, serde_transport, server};
use tokio::net::TcpStream;
use tokio_serde::formats::Bincode;
use tokio_util::codec::{Framed, LengthDelimitedCodec};
use tollway_peers_harness::{Ends, Peer, Result};

/// Requests in the queues of either side: more than are ever in flight, where 100 by default makes them wait.
const QUEUE: usize = 1024;

/// `Bytes` travels as one run of bytes, where a `Vec<u8>` would be encoded byte by byte.
#[tarpc::service]
pub(crate) trait Answering {
    async fn echo(payload: Bytes) -> Bytes;
}

#[derive(Clone)]
struct Server;

impl Answering for Server {
    async fn echo(self, _: context::Context, payload: Bytes) -> Bytes {
        payload
    }
}

/// The socket has TCP_NODELAY, which `serde_transport::tcp` leaves to its users.
fn transport<Item, SinkItem>(
    stream: TcpStream,
) -> serde_transport::Transport<TcpStream, Item, SinkItem, Bincode<Item, SinkItem>>
where
    Item: for<'de> serde::Deserialize<'de>,
    SinkItem: serde::Serialize,
{
    serde_transport::new(Framed::new(stream, LengthDelimitedCodec::new()), Bincode::default())
}

async fn serve(stream: TcpStream) {
    let config = server::Config { pending_response_buffer: QUEUE };
    // A task for each call, as its documentation does it.
    BaseChannel::new(config, transport(stream))
        .execute(Server.serve())
        .for_each(|call| async move { drop(tokio::spawn(call)) })
        .await;
}

pub(crate) struct Tarpc {
    client: AnsweringClient,
}

impl Peer for Tarpc {
    const NAME: &'static str = "tarpc";

    type Caller = AnsweringClient;

    async fn start(ends: Ends) -> Result<Self> {
        let stream = ends.tcp(serve).await?;
        let mut config = client::Config::default();
        config.max_in_flight_requests = QUEUE;
        config.pending_request_buffer = QUEUE;
        Ok(Tarpc { client: AnsweringClient::new(config, transport(stream)).spawn() })
    }

    async fn caller(&self) -> Result<Self::Caller> {
        Ok(self.client.clone())
    }

    async fn echo(client: &mut Self::Caller, payload: Bytes) -> Result<Bytes> {
        Ok(client.echo(context::current(), payload).await?)
    }
}
