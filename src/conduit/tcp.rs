//! TCP: [`TcpConduit`] and the [`TcpListener`] that yields them.

use std::future::{Ready, ready};
use std::io;
use std::net::SocketAddr;

use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpStream, ToSocketAddrs};

use super::framed::{Framed, FramedReader, FramedWriter};
use super::listen::{Listener, accept_from};
use super::{Conduit, Lanes, PeerInfo};

/// A conduit over one TCP connection. One lane.
#[derive(Debug)]
pub struct TcpConduit {
    framed: Framed<OwnedReadHalf, OwnedWriteHalf>,
}

impl TcpConduit {
    /// Connects to the first of the addresses that answers. A host name is resolved.
    ///
    /// There is no time limit but the system's: whoever opens a session bounds it together with the handshake.
    ///
    /// # Errors
    /// If no address can be found or none answers.
    ///
    /// # Cancel safety
    /// Dropping the future gives the attempt up.
    pub async fn connect(addresses: impl ToSocketAddrs) -> io::Result<Self> {
        Self::new(TcpStream::connect(addresses).await?)
    }

    /// Uses a connected stream, and switches Nagle's algorithm off: the session batches by itself, and what it writes
    /// is to leave at once.
    ///
    /// # Errors
    /// If the stream is not connected any more.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let peer = PeerInfo::new("tcp", stream.peer_addr()?.to_string());
        let (reader, writer) = stream.into_split();
        Ok(Self { framed: Framed::new(reader, writer, peer) })
    }
}

impl Conduit for TcpConduit {
    type Reader = FramedReader<OwnedReadHalf>;
    type Writer = FramedWriter<OwnedWriteHalf>;

    fn lanes(&self) -> Lanes {
        self.framed.lanes()
    }

    fn peer(&self) -> PeerInfo {
        self.framed.peer()
    }

    fn split(self) -> (Self::Reader, Self::Writer) {
        self.framed.split()
    }
}

/// Accepts TCP conduits, whatever happens.
#[derive(Debug)]
pub struct TcpListener {
    listener: tokio::net::TcpListener,
}

impl TcpListener {
    /// Listens on the first of the addresses that can be bound. Port 0 lets the system choose one.
    ///
    /// # Errors
    /// If none of the addresses can be bound.
    pub async fn bind(addresses: impl ToSocketAddrs) -> io::Result<Self> {
        Ok(Self { listener: tokio::net::TcpListener::bind(addresses).await? })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Waits for the next conduit. It never fails: no error of one connection, nor a lack of file descriptors or memory,
    /// may end a server. It backs off and goes on.
    ///
    /// # Cancel safety
    /// Dropping the future loses no connection.
    pub async fn accept(&self) -> TcpConduit {
        accept_from(|| self.try_accept()).await
    }

    /// The next stream, for what speaks something else below its frames.
    #[cfg(any(feature = "tls", feature = "ws"))]
    pub(super) async fn next_stream(&self) -> io::Result<(TcpStream, SocketAddr)> {
        let (stream, address) = self.listener.accept().await?;
        stream.set_nodelay(true).map_err(|error| io::Error::new(io::ErrorKind::ConnectionAborted, error))?;
        Ok((stream, address))
    }

    async fn try_accept(&self) -> io::Result<TcpConduit> {
        let (stream, _) = self.listener.accept().await?;
        // A peer that is gone already is the same as one that was aborted in the backlog.
        TcpConduit::new(stream).map_err(|error| io::Error::new(io::ErrorKind::ConnectionAborted, error))
    }
}

impl Listener for TcpListener {
    type Conduit = TcpConduit;
    type Pending = Ready<io::Result<TcpConduit>>;

    async fn next(&self) -> io::Result<Self::Pending> {
        Ok(ready(Ok(self.try_accept().await?)))
    }
}
