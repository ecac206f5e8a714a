//! Tollway, as its users would: a service that is a trait and its typed client, all limits as they are by default.

use std::future::pending;
use std::marker::PhantomData;
use std::time::Duration;

use bytes::Bytes;
use tollway::conduit::any::{AnyListener, ListenOptions};
use tollway::conduit::tls::{Identity, ServerTls};
use tollway::rpc::{Rx, ServiceClient, Services, StreamError, Tx, stream};
use tollway::{Connection, Server, Session, SessionConfig};
use tollway_peers_harness::{Ends, Opens, Order, Peer, Result, Streams, Tally};

#[tollway::service]
pub(crate) trait Yard {
    async fn echo(&self, payload: Bytes) -> Bytes;
    async fn items(&self, bytes: u64, count: u64) -> Rx<Bytes>;
}

/// The service.
struct Answering;

impl Yard for Answering {
    async fn echo(&self, payload: Bytes) -> Bytes {
        payload
    }

    async fn items(&self, bytes: u64, count: u64) -> Rx<Bytes> {
        let (tx, items) = stream();
        tokio::spawn(send(Order { bytes: bytes as usize, count, apart: false }, tx));
        items
    }
}

async fn send(order: Order, mut tx: Tx<Bytes>) -> Result<(), StreamError> {
    let item = order.item();
    for _ in 0..order.count {
        tx.send(item.clone()).await?;
    }
    tx.finish();
    Ok(())
}

/// What carries it.
pub(crate) trait Carrier: Send + Sync + 'static {
    const NAME: &'static str;

    fn listen(config: SessionConfig) -> impl Future<Output = Result<Server>> + Send;
}

/// TCP, as the others but quinn.
pub(crate) struct Tcp;

impl Carrier for Tcp {
    const NAME: &'static str = "tollway";

    async fn listen(config: SessionConfig) -> Result<Server> {
        Ok(Server::bind(&"tcp://127.0.0.1:0".parse()?, config).await?)
    }
}

/// QUIC, to stand beside quinn by itself.
pub(crate) struct Quic;

impl Carrier for Quic {
    const NAME: &'static str = "tollway-quic";

    async fn listen(config: SessionConfig) -> Result<Server> {
        let mut options = ListenOptions::default();
        options.tls = Some(ServerTls::new(Identity::self_signed(&["localhost"])?));
        let listener = AnyListener::bind(&"quic://127.0.0.1:0".parse()?, &options).await?;
        let endpoint = listener.endpoints().next().ok_or("it listens nowhere")?.clone();
        Ok(Server::with_listener(listener, endpoint, config))
    }
}

pub(crate) struct Tollway<C> {
    session: Session,
    yard: YardClient,
    carrier: PhantomData<C>,
}

impl<C: Carrier> Peer for Tollway<C> {
    const NAME: &'static str = C::NAME;

    type Caller = YardClient;

    async fn start(ends: Ends) -> Result<Self> {
        let services = Services::new().with(YardServer::new(Answering));
        let serving = SessionConfig { services, ..SessionConfig::default() };
        let start = async move {
            let server = C::listen(serving).await?;
            let endpoint = server.endpoint().clone();
            tokio::spawn(server.run(pending(), Duration::ZERO));
            Ok(endpoint)
        };
        let endpoint = ends.on_server(start).await?;
        let session = tollway::connect(&endpoint, SessionConfig::default()).await?;
        let yard = session.open_client().await?;
        Ok(Tollway { session, yard, carrier: PhantomData })
    }

    async fn caller(&self) -> Result<Self::Caller> {
        Ok(self.yard.clone())
    }

    async fn echo(yard: &mut Self::Caller, payload: Bytes) -> Result<Bytes> {
        Ok(yard.echo(payload).await?)
    }
}

impl<C: Carrier> Streams for Tollway<C> {
    type Download = (YardClient, Rx<Bytes>);

    async fn download(&self, order: Order) -> Result<Self::Download> {
        let yard = if order.apart { self.session.open_client().await? } else { self.yard.clone() };
        let items = yard.items(order.bytes as u64, order.count).await?;
        Ok((yard, items))
    }

    async fn receive((_yard, mut items): Self::Download, tally: &mut Tally) -> Result<()> {
        while let Some(item) = items.recv().await? {
            tally.item(&item)?;
        }
        Ok(())
    }
}

impl<C: Carrier> Opens for Tollway<C> {
    type Idle = Connection;

    async fn open(&self) -> Result<Connection> {
        Ok(self.session.open(YardClient::NAME).await?)
    }
}
