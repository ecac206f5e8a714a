//! TCP: [`TcpConduit`] and the [`TcpListener`] that yields them.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpStream, ToSocketAddrs};

use super::framed::{Framed, FramedReader, FramedWriter};
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
        accept_from(|| async {
            let (stream, _) = self.listener.accept().await?;
            // A peer that is gone already is the same as one that was aborted in the backlog.
            TcpConduit::new(stream).map_err(|error| io::Error::new(io::ErrorKind::ConnectionAborted, error))
        })
        .await
    }
}

/// The first pause after an error that is not the connection's own; it doubles with each error that follows.
const FIRST_PAUSE: Duration = Duration::from_millis(5);

/// The longest pause: descriptors that become free are used within a second.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

async fn accept_from<T, F: Future<Output = io::Result<T>>>(mut accept: impl FnMut() -> F) -> T {
    let mut pause = FIRST_PAUSE;
    loop {
        match accept().await {
            Ok(conduit) => return conduit,
            Err(error) if is_of_one_connection(&error) => {
                tracing::debug!(%error, "a connection was lost before accept")
            }
            Err(error) => {
                tracing::warn!(%error, pause_ms = pause.as_millis(), "cannot accept: trying again");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

/// Errors of a connection that was still in the backlog: the next one may be fine, so there is nothing to wait for.
fn is_of_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::Interrupted
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    /// EMFILE on Linux and macOS.
    const TOO_MANY_FILES: i32 = 24;

    #[tokio::test(start_paused = true)]
    async fn accept_survives_every_error_and_backs_off_up_to_a_second() {
        let began = Instant::now();
        let mut errors = vec![TOO_MANY_FILES; 12].into_iter();
        let next = || std::future::ready(errors.next().map_or(Ok(7), |code| Err(io::Error::from_raw_os_error(code))));
        assert_eq!(accept_from(next).await, 7);
        // 5 + 10 + … + 640 ms, then four times a second.
        assert_eq!(began.elapsed(), Duration::from_millis(5 * 255 + 4 * 1000));
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_lost_in_the_backlog_delays_nobody() {
        let began = Instant::now();
        let mut errors = vec![io::ErrorKind::ConnectionAborted; 1000].into_iter();
        let next = || std::future::ready(errors.next().map_or(Ok(()), |kind| Err(kind.into())));
        accept_from(next).await;
        assert_eq!(began.elapsed(), Duration::ZERO);
    }
}
