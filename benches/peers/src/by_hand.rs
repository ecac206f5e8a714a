//! Tollway with a service and a client written by hand against the `Service` trait, beside what is generated: what the
//! macro costs.

use std::future::pending;
use std::time::Duration;

use bytes::Bytes;
use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Rx, Service, Services, StreamError, Tx, stream};
use tollway::{Connection, Session, SessionConfig};
use tollway_peers_harness::{Ends, Order, Peer, Result, Streams, Tally};

use crate::tollway::{Carrier, Tcp};

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

pub(crate) struct ByHand {
    session: Session,
    connection: Connection,
    methods: Methods,
}

impl Peer for ByHand {
    const NAME: &'static str = "tollway-by-hand";

    type Caller = (Connection, MethodId);

    async fn start(ends: Ends) -> Result<Self> {
        let methods = Methods::new();
        let serving = SessionConfig { services: Services::new().with(Answering(methods)), ..SessionConfig::default() };
        let start = async move {
            let server = Tcp::listen(serving).await?;
            let endpoint = server.endpoint().clone();
            tokio::spawn(server.run(pending(), Duration::ZERO));
            Ok(endpoint)
        };
        let endpoint = ends.on_server(start).await?;
        let session = tollway::connect(&endpoint, SessionConfig::default()).await?;
        let connection = session.open(SERVICE).await?;
        Ok(ByHand { session, connection, methods })
    }

    async fn caller(&self) -> Result<Self::Caller> {
        Ok((self.connection.clone(), self.methods.echo))
    }

    async fn echo((connection, method): &mut Self::Caller, payload: Bytes) -> Result<Bytes> {
        Ok(connection.call(*method, &payload).await?)
    }
}

impl Streams for ByHand {
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
