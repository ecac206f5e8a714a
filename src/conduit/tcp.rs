//! TCP: [`TcpConduit`] and the [`TcpListener`] that yields them.

use std::future::{Ready, ready};
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpStream, ToSocketAddrs};

use super::PeerInfo;
use super::framed::{Framed, framed_conduit};
use super::listen::{Listener, accept_from};

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

    /// Uses a connected stream, and sets its options: Nagle's algorithm is off, since the session batches by itself and
    /// what it writes is to leave at once; the system looks after a connection that nobody talks on, and gives one up on
    /// which what was sent stays unacknowledged.
    ///
    /// # Errors
    /// If the stream is not connected any more.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        set_options(&stream)?;
        let peer = PeerInfo::new("tcp", stream.peer_addr()?.to_string());
        let (reader, writer) = stream.into_split();
        Ok(Self { framed: Framed::new(reader, writer, peer) })
    }
}

/// Quiet time after which the system probes the peer: the session's own pings come sooner, so that these are for a process
/// that has stopped and holds its sockets.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);
/// Time between two probes; with the system's usual nine, three minutes.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(15);
/// How long sent bytes may stay unacknowledged. Longer than the session's keepalive and write timeout, which tell a better
/// cause; without it the system retries for a quarter of an hour, also for the last words of a session.
#[cfg(any(target_os = "linux", target_os = "android", target_os = "fuchsia"))]
const USER_TIMEOUT: Duration = Duration::from_secs(30);

/// Sets what every TCP stream below a conduit has.
pub(super) fn set_options(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE_AFTER).with_interval(KEEPALIVE_EVERY))?;
    #[cfg(any(target_os = "linux", target_os = "android", target_os = "fuchsia"))]
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    Ok(())
}

framed_conduit!(TcpConduit, OwnedReadHalf, OwnedWriteHalf);

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
        set_options(&stream).map_err(|error| io::Error::new(io::ErrorKind::ConnectionAborted, error))?;
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn both_ends_have_their_options() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (far, _) = listener.accept().await.unwrap();
        for stream in [near, far] {
            set_options(&stream).unwrap();
            let socket = SockRef::from(&stream);
            assert!(stream.nodelay().unwrap() && socket.keepalive().unwrap());
            assert_eq!(socket.tcp_keepalive_time().unwrap(), KEEPALIVE_AFTER);
            assert_eq!(socket.tcp_keepalive_interval().unwrap(), KEEPALIVE_EVERY);
            #[cfg(target_os = "linux")]
            assert_eq!(socket.tcp_user_timeout().unwrap(), Some(USER_TIMEOUT));
        }
    }
}
