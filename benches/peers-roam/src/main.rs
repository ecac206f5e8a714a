//! roam, measured as `tollway-peers` measures, which takes it along by `--roam PATH`. It is a crate apart since its
//! dependencies go with no newer ones:
//!
//! ```console
//! $ cargo build --release --locked --manifest-path benches/peers-roam/Cargo.toml --target-dir target/peers-roam
//! $ cargo run --release -p tollway-peers -- --roam target/peers-roam/release/tollway-peers-roam
//! ```
//!
//! A stream has a credit of 16 items, which `roam::channel` fixes. On an idle virtual connection both sides run its driver, as
//! they must: one that nobody drives stalls the session.

use std::process::ExitCode;

use bytes::Bytes;
use roam::{
    AcceptedConnection, BareConduit, ConnectionAcceptor, ConnectionHandle, ConnectionId, ConnectionSettings, Driver,
    DriverCaller, MessageFamily, Metadata, MetadataEntry, Parity, Rx, SessionHandle, Tx, acceptor, initiator,
};
use roam_stream::StreamLink;
use tokio::net::TcpStream;
use tollway_peers_harness::{Ends, Entry, Opens, Order, Peer, Result, Streams, Tally, run};

/// Requests at once on a connection: more than are ever in flight, where 64 by default makes them wait.
const MAX_REQUESTS: u32 = 1024;

#[roam::service]
trait Answering {
    async fn echo(&self, payload: Vec<u8>) -> Vec<u8>;
    async fn items(&self, bytes: u64, count: u64, output: Tx<Vec<u8>>) -> bool;
}

#[derive(Clone)]
struct Server;

impl Answering for Server {
    async fn echo(&self, payload: Vec<u8>) -> Vec<u8> {
        payload
    }

    /// Whether all were sent. The stream ends with it.
    async fn items(&self, bytes: u64, count: u64, output: Tx<Vec<u8>>) -> bool {
        let item = Order { bytes: bytes as usize, count, apart: false }.item().to_vec();
        for _ in 0..count {
            if output.send(item.clone()).await.is_err() {
                return false;
            }
        }
        output.close(Metadata::default()).await.is_ok()
    }
}

fn settings(parity: Parity) -> ConnectionSettings {
    ConnectionSettings { parity, max_concurrent_requests: MAX_REQUESTS }
}

/// Serves every virtual connection, as the root.
struct Accepting;

impl ConnectionAcceptor for Accepting {
    fn accept(
        &self,
        _id: ConnectionId,
        peer: &ConnectionSettings,
        _metadata: &[MetadataEntry],
    ) -> Result<AcceptedConnection, Metadata<'static>> {
        Ok(AcceptedConnection {
            settings: settings(peer.parity.other()),
            metadata: Metadata::default(),
            setup: Box::new(|handle| {
                let mut driver = Driver::new(handle, AnsweringDispatcher::new(Server));
                tokio::spawn(async move { driver.run().await });
            }),
        })
    }
}

fn conduit(
    stream: TcpStream,
) -> BareConduit<MessageFamily, impl roam::Link<Tx: Send + Sync, Rx: Send> + Send + 'static> {
    BareConduit::new(StreamLink::tcp(stream))
}

async fn serve(stream: TcpStream) {
    let session = acceptor(conduit(stream))
        .root_settings(settings(Parity::Even))
        .on_connection(Accepting)
        .establish::<DriverCaller>(AnsweringDispatcher::new(Server))
        .await;
    // The session lives as long as its handles.
    let _session = session;
    std::future::pending::<()>().await;
}

struct Roam {
    client: AnsweringClient,
    session: SessionHandle,
}

/// A client on a virtual connection, whose driver runs as a task.
fn client_on(handle: ConnectionHandle) -> AnsweringClient {
    let mut driver = Driver::new(handle, ());
    let client = AnsweringClient::new(driver.caller());
    tokio::spawn(async move { driver.run().await });
    client
}

impl Peer for Roam {
    const NAME: &'static str = "roam";

    type Caller = AnsweringClient;

    async fn start(ends: Ends) -> Result<Self> {
        let stream = ends.tcp(serve).await?;
        let (client, session) = initiator(conduit(stream))
            .root_settings(settings(Parity::Odd))
            .establish::<AnsweringClient>(())
            .await
            .map_err(|error| format!("{error:?}"))?;
        Ok(Roam { client, session })
    }

    async fn caller(&self) -> Result<Self::Caller> {
        Ok(self.client.clone())
    }

    async fn echo(client: &mut Self::Caller, payload: Bytes) -> Result<Bytes> {
        let answer = client.echo(payload.to_vec()).await.map_err(|error| format!("{error:?}"))?;
        Ok(answer.into())
    }
}

impl Streams for Roam {
    type Download = (AnsweringClient, Rx<Vec<u8>>);

    async fn download(&self, order: Order) -> Result<Self::Download> {
        let client = if order.apart { self.open().await? } else { self.client.clone() };
        let (tx, items) = roam::channel();
        let calling = client.clone();
        // The answer comes after the last item.
        tokio::spawn(async move { calling.items(order.bytes as u64, order.count, tx).await });
        Ok((client, items))
    }

    async fn receive((_client, mut items): Self::Download, tally: &mut Tally) -> Result<()> {
        loop {
            match items.recv().await {
                Ok(Some(item)) => tally.item(&item)?,
                Ok(None) => return Ok(()),
                // The call that binds the stream has not begun yet.
                Err(roam::RxError::Unbound) => tokio::task::yield_now().await,
                Err(error) => return Err(format!("{error:?}").into()),
            }
        }
    }
}

impl Opens for Roam {
    type Idle = AnsweringClient;

    async fn open(&self) -> Result<Self::Idle> {
        let opened = self.session.open_connection(settings(Parity::Odd), Metadata::default()).await;
        Ok(client_on(opened.map_err(|error| format!("{error:?}"))?))
    }
}

fn main() -> ExitCode {
    let roam = Entry::<Roam>::sequential().in_flight().streams().opens().isolation().build();
    run("tollway-peers-roam", vec![roam])
}
