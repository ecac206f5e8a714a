//! What a contender is: the traits that it implements, and what all of them need to do so.

use std::future::Future;
use std::net::SocketAddr;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;

/// A failed measurement ends it; nobody tells one from another but by its text.
pub type Error = Box<dyn std::error::Error + Send + Sync>;
/// See [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// One session, both ends of it in this process, over loopback.
pub trait Peer: Sized + Send + Sync + 'static {
    /// Its name in the table and on the command line.
    const NAME: &'static str;

    /// Whoever makes one call after the other. Many share the session.
    type Caller: Send + 'static;

    /// Starts a server on the runtime of `ends`, and connects to it on the runtime that this is called on.
    fn start(ends: Ends) -> impl Future<Output = Result<Self>> + Send;

    /// One more caller.
    fn caller(&self) -> impl Future<Output = Result<Self::Caller>> + Send;

    /// A unary call: the server answers with the payload.
    fn echo(caller: &mut Self::Caller, payload: Bytes) -> impl Future<Output = Result<Bytes>> + Send;
}

/// A peer that streams items from server to client inside one call.
pub trait Streams: Peer {
    /// The receiving end of such a call.
    type Download: Send + 'static;

    /// Orders items. None is read before [`receive`](Self::receive), so that a download that is kept is one unread.
    fn download(&self, order: Order) -> impl Future<Output = Result<Self::Download>> + Send;

    /// Reads all items to the end, and tells each to the tally.
    fn receive(download: Self::Download, tally: &mut Tally) -> impl Future<Output = Result<()>> + Send;
}

/// A peer whose streams or virtual connections can be open and idle.
pub trait Opens: Peer {
    /// This side of one. The server keeps the other side.
    type Idle: Send + 'static;

    /// Opens one, and waits until the server has confirmed it.
    fn open(&self) -> impl Future<Output = Result<Self::Idle>> + Send;
}

/// Where the server runs.
#[derive(Debug, Clone)]
pub struct Ends {
    server: Handle,
}

impl Ends {
    pub(crate) fn new(server: Handle) -> Self {
        Ends { server }
    }

    /// Runs the server's start on its runtime. What it spawns lives there, too.
    ///
    /// # Errors
    /// When the start fails.
    pub async fn on_server<T: Send + 'static>(
        &self,
        start: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        self.server.spawn(start).await?
    }

    /// Listens on loopback and serves the first connection, on the server's runtime; returns this end of it. Both ends
    /// send at once what they are given (TCP_NODELAY).
    ///
    /// # Errors
    /// When there is no such connection.
    pub async fn tcp<F>(&self, serve: impl FnOnce(TcpStream) -> F + Send + 'static) -> Result<TcpStream>
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listening = async { Ok(TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).await?) };
        let listener = self.on_server(listening).await?;
        let address = listener.local_addr()?;
        let accepted = self.server.spawn(async move { listener.accept().await });
        let stream = TcpStream::connect(address).await?;
        stream.set_nodelay(true)?;
        let (served, _from) = accepted.await??;
        served.set_nodelay(true)?;
        self.server.spawn(serve(served));
        Ok(stream)
    }
}

/// Items that a client wants streamed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Order {
    /// Size of each item, in bytes.
    pub bytes: usize,
    /// How many.
    pub count: u64,
    /// On a virtual connection of its own, if the peer has such.
    pub apart: bool,
}

impl Order {
    /// The items are all the same: byte `i` of each is `i` modulo 251, so that a shifted or torn one shows.
    pub fn item(&self) -> Bytes {
        (0..self.bytes).map(pattern).collect()
    }

    /// The order as 16 bytes, for peers without a codec.
    pub fn to_bytes(&self) -> [u8; 16] {
        let (bytes, count) = (self.bytes as u64, self.count);
        let mut encoded = [0; 16];
        encoded[..8].copy_from_slice(&bytes.to_be_bytes());
        encoded[8..].copy_from_slice(&count.to_be_bytes());
        encoded
    }
}

/// Reads what [`Order::to_bytes`] wrote.
///
/// # Errors
/// When it is not an order.
pub fn parse_order(encoded: &[u8]) -> Result<Order> {
    let encoded: [u8; 16] = encoded.try_into().map_err(|_| "an order has 16 bytes")?;
    let (bytes, count) = encoded.split_at(8);
    let bytes = usize::try_from(u64::from_be_bytes(bytes.try_into()?))?;
    let count = u64::from_be_bytes(count.try_into()?);
    Ok(Order { bytes, count, apart: false })
}

fn pattern(at: usize) -> u8 {
    (at % 251) as u8
}

/// What arrived of an order. Every byte is counted; of each item or chunk the first and the last byte are compared.
#[derive(Debug)]
pub struct Tally {
    order: Order,
    received: u64,
}

impl Tally {
    pub(crate) fn new(order: Order) -> Self {
        Tally { order, received: 0 }
    }

    /// One item, from a peer that keeps items apart.
    ///
    /// # Errors
    /// When it is not what was ordered.
    pub fn item(&mut self, item: &[u8]) -> Result<()> {
        ensure(item.len() == self.order.bytes, || format!("an item of {} bytes", item.len()))?;
        self.chunk(item)
    }

    /// Some bytes, from a peer that has a stream of bytes: items are counted by their size.
    ///
    /// # Errors
    /// When they are not what was ordered.
    pub fn chunk(&mut self, chunk: &[u8]) -> Result<()> {
        let (Some(first), Some(last)) = (chunk.first(), chunk.last()) else { return Ok(()) };
        let at = (self.received % self.order.bytes as u64) as usize;
        let end = (at + chunk.len() - 1) % self.order.bytes;
        ensure(*first == pattern(at) && *last == pattern(end), || "an item is not what was sent".to_owned())?;
        self.received += chunk.len() as u64;
        Ok(())
    }

    pub(crate) fn check_complete(&self) -> Result<()> {
        let expected = self.order.bytes as u64 * self.order.count;
        ensure(self.received == expected, || format!("{} of {expected} bytes came", self.received))
    }
}

/// Fails with the text unless `holds`.
///
/// # Errors
/// When it does not hold.
pub fn ensure(holds: bool, text: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(text().into()) }
}

/// A payload behind its length in 4 bytes, for peers that carry bytes only.
pub fn framed(payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::with_capacity(4 + payload.len());
    frame.put_u32(payload.len() as u32);
    frame.put_slice(payload);
    frame.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ORDER: Order = Order { bytes: 300, count: 2, apart: false };

    #[test]
    fn an_order_survives_its_encoding() {
        assert_eq!(parse_order(&ORDER.to_bytes()).ok(), Some(ORDER));
        assert!(parse_order(&[0; 15]).is_err());
    }

    #[test]
    fn a_tally_takes_what_was_ordered_and_nothing_else() {
        let item = ORDER.item();
        let mut tally = Tally::new(ORDER);
        assert!(tally.item(&item[1..]).is_err(), "too short");
        assert!(tally.chunk(&item[1..]).is_err(), "shifted");
        tally.item(&item).expect("an item");
        assert!(tally.check_complete().is_err(), "one is missing");
        tally.chunk(&item[..7]).expect("a part");
        tally.chunk(&item[7..]).expect("the rest");
        tally.check_complete().expect("two items");
        tally.item(&item).expect("an item");
        assert!(tally.check_complete().is_err(), "one too many");
    }
}
