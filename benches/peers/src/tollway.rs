//! Tollway, as its users would: a service written by hand, all limits as they are by default.

use std::future::pending;
use std::marker::PhantomData;
use std::time::Duration;

use bytes::Bytes;
use tollway::conduit::any::{AnyListener, ListenOptions};
use tollway::conduit::tls::{Identity, ServerTls};
use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Rx, Service, Services, StreamError, Tx, stream};
use tollway::{Connection, Server, Session, SessionConfig};
use tollway_peers_harness::{Ends, Opens, Order, Peer, Result, Streams, Tally};

const SERVICE: &str = "peer";

/// The ids of the methods, which are hashes: worked out once.
#[derive(Clone, Copy)]
struct Methods {
    echo: MethodId,
    items: MethodId,
}

impl Methods {
    fn new() -> Self {
        let of = |method| MethodId::of(SERVICE, 1, method);
        Methods { echo: of("echo"), items: of("items") }
    }
}

/// The service.
struct Answering(Methods);

impl Service for Answering {
    fn name(&self) -> &str {
        SERVICE
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        if call.method() == self.0.echo {
            Box::pin(async move {
                match call.args::<Bytes>() {
                    Ok(payload) => Reply::ok(&payload),
                    Err(error) => Reply::invalid_payload(&error),
                }
            })
        } else if call.method() == self.0.items {
            match call.args::<(u64, u64)>() {
                Ok((bytes, count)) => {
                    let (tx, items) = stream::<Bytes>();
                    tokio::spawn(send(Order { bytes: bytes as usize, count, apart: false }, tx));
                    Reply::ok(&items).boxed()
                }
                Err(error) => Reply::invalid_payload(&error).boxed(),
            }
        } else {
            Reply::unknown_method().boxed()
        }
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
    connection: Connection,
    methods: Methods,
    carrier: PhantomData<C>,
}

impl<C: Carrier> Peer for Tollway<C> {
    const NAME: &'static str = C::NAME;

    type Caller = (Connection, MethodId);

    async fn start(ends: Ends) -> Result<Self> {
        let methods = Methods::new();
        let serving = SessionConfig { services: Services::new().with(Answering(methods)), ..SessionConfig::default() };
        let start = async move {
            let server = C::listen(serving).await?;
            let endpoint = server.endpoint().clone();
            tokio::spawn(server.run(pending(), Duration::ZERO));
            Ok(endpoint)
        };
        let endpoint = ends.on_server(start).await?;
        let session = tollway::connect(&endpoint, SessionConfig::default()).await?;
        let connection = session.open(SERVICE).await?;
        Ok(Tollway { session, connection, methods, carrier: PhantomData })
    }

    async fn caller(&self) -> Result<Self::Caller> {
        Ok((self.connection.clone(), self.methods.echo))
    }

    async fn echo((connection, method): &mut Self::Caller, payload: Bytes) -> Result<Bytes> {
        Ok(connection.call(*method, &payload).await?)
    }
}

impl<C: Carrier> Streams for Tollway<C> {
    type Download = (Connection, Rx<Bytes>);

    async fn download(&self, order: Order) -> Result<Self::Download> {
        let connection = if order.apart { self.session.open(SERVICE).await? } else { self.connection.clone() };
        let items = connection.call(self.methods.items, &(order.bytes as u64, order.count)).await?;
        Ok((connection, items))
    }

    async fn receive((_connection, mut items): Self::Download, tally: &mut Tally) -> Result<()> {
        while let Some(item) = items.recv().await? {
            tally.item(&item)?;
        }
        Ok(())
    }
}

impl<C: Carrier> Opens for Tollway<C> {
    type Idle = Connection;

    async fn open(&self) -> Result<Connection> {
        Ok(self.session.open(SERVICE).await?)
    }
}
