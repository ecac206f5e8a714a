//! quinn: QUIC over loopback UDP, which is always encrypted. A caller has a stream of its own for all its calls, not
//! one for each; items are runs of bytes on one stream.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use quinn::rustls::RootCertStore;
use quinn::rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};
use quinn::{ClientConfig, Connection, Endpoint, RecvStream, SendStream, ServerConfig, TransportConfig, VarInt};
use tollway_peers_harness::{Ends, Opens, Order, Peer, Result, Streams, Tally, framed, parse_order};

/// A stream's window: as in the others.
const STREAM_WINDOW: u32 = 1 << 20;
/// The window of all streams together, in either direction: as in the others.
const CONNECTION_WINDOW: u32 = 16 << 20;
/// Streams open at once.
const MAX_STREAMS: u32 = 20_000;
/// What is read at once at most.
const READ: usize = 1 << 20;

/// The first byte of a stream says what it is for.
const ECHO: u8 = 0;
const ITEMS: u8 = 1;
const IDLE: u8 = 2;

fn transport() -> Arc<TransportConfig> {
    let mut transport = TransportConfig::default();
    transport
        .stream_receive_window(VarInt::from_u32(STREAM_WINDOW))
        .receive_window(VarInt::from_u32(CONNECTION_WINDOW))
        .send_window(u64::from(CONNECTION_WINDOW))
        .max_concurrent_bidi_streams(VarInt::from_u32(MAX_STREAMS));
    Arc::new(transport)
}

/// Bytes with their length in front, from a stream on which they follow each other; `None` at the end.
async fn read_framed(stream: &mut RecvStream) -> Result<Option<Bytes>> {
    let mut length = [0; 4];
    match stream.read_exact(&mut length).await {
        Err(quinn::ReadExactError::FinishedEarly(0)) => return Ok(None),
        done => done?,
    }
    let mut payload = BytesMut::zeroed(u32::from_be_bytes(length) as usize);
    stream.read_exact(&mut payload).await?;
    Ok(Some(payload.freeze()))
}

/// Both ends of idle streams on the server's side.
type Idle = Arc<Mutex<Vec<(SendStream, RecvStream)>>>;

async fn answer(mut out: SendStream, mut input: RecvStream, idle: Idle) -> Result<()> {
    let mut kind = [0];
    input.read_exact(&mut kind).await?;
    match kind[0] {
        ECHO => {
            while let Some(payload) = read_framed(&mut input).await? {
                out.write_chunk(framed(&payload)).await?;
            }
        }
        ITEMS => {
            let order = parse_order(&read_framed(&mut input).await?.ok_or("no order")?)?;
            let item = order.item();
            for _ in 0..order.count {
                out.write_chunk(item.clone()).await?;
            }
            out.finish()?;
            out.stopped().await?;
        }
        _ => {
            out.write_all(&kind).await?;
            idle.lock().push((out, input));
        }
    }
    Ok(())
}

async fn serve(endpoint: Endpoint) -> Result<()> {
    let connection = endpoint.accept().await.ok_or("nobody came")?.await?;
    let idle = Idle::default();
    loop {
        let (out, input) = connection.accept_bi().await?;
        tokio::spawn(answer(out, input, idle.clone()));
    }
}

pub(crate) struct Quinn {
    connection: Connection,
    /// Its sockets are driven as long as it lives.
    _endpoint: Endpoint,
}

impl Quinn {
    /// A stream with its first bytes.
    async fn stream(&self, kind: u8, first: &[u8]) -> Result<(SendStream, RecvStream)> {
        let (mut out, input) = self.connection.open_bi().await?;
        out.write_all(&[&[kind], first].concat()).await?;
        Ok((out, input))
    }
}

impl Peer for Quinn {
    const NAME: &'static str = "quinn";

    type Caller = (SendStream, RecvStream);

    async fn start(ends: Ends) -> Result<Self> {
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let certified = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()])?;
        let certificate = CertificateDer::from(certified.cert);
        let key = PrivatePkcs8KeyDer::from(certified.signing_key.serialize_der());
        let mut serving = ServerConfig::with_single_cert(vec![certificate.clone()], key.into())?;
        serving.transport_config(transport());
        let start = async move {
            let endpoint = Endpoint::server(serving, loopback)?;
            let address = endpoint.local_addr()?;
            tokio::spawn(serve(endpoint));
            Ok(address)
        };
        let address = ends.on_server(start).await?;
        let mut roots = RootCertStore::empty();
        roots.add(certificate)?;
        let mut config = ClientConfig::with_root_certificates(Arc::new(roots))?;
        config.transport_config(transport());
        let endpoint = Endpoint::client(loopback)?;
        let connection = endpoint.connect_with(config, address, "localhost")?.await?;
        Ok(Quinn { connection, _endpoint: endpoint })
    }

    async fn caller(&self) -> Result<Self::Caller> {
        self.stream(ECHO, &[]).await
    }

    async fn echo((out, input): &mut Self::Caller, payload: Bytes) -> Result<Bytes> {
        out.write_chunk(framed(&payload)).await?;
        Ok(read_framed(input).await?.ok_or("the stream has ended")?)
    }
}

impl Streams for Quinn {
    type Download = (SendStream, RecvStream);

    async fn download(&self, order: Order) -> Result<Self::Download> {
        self.stream(ITEMS, &framed(&order.to_bytes())).await
    }

    async fn receive((_out, mut items): Self::Download, tally: &mut Tally) -> Result<()> {
        while let Some(chunk) = items.read_chunk(READ, true).await? {
            tally.chunk(&chunk.bytes)?;
        }
        Ok(())
    }
}

impl Opens for Quinn {
    type Idle = (SendStream, RecvStream);

    /// A stream is nothing before its first byte, so one byte goes over and one comes back.
    async fn open(&self) -> Result<Self::Idle> {
        let (out, mut input) = self.stream(IDLE, &[]).await?;
        input.read_exact(&mut [0]).await?;
        Ok((out, input))
    }
}
