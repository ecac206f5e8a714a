//! Listening: what a server needs of each kind of conduit, and how an accept loop survives every error.

use std::future::Future;
use std::io;
use std::time::Duration;

use super::Conduit;

/// Something at which conduits arrive.
pub trait Listener: Send + Sync + 'static {
    /// What arrives.
    type Conduit: Conduit;
    /// What is still to be done for a conduit after it was accepted, such as a TLS handshake: it may take as long as the
    /// other end likes, so a server awaits it beside its accept loop and within the deadline of the whole handshake.
    type Pending: Future<Output = io::Result<Self::Conduit>> + Send + 'static;

    /// Waits for the next one.
    ///
    /// # Errors
    /// When the system cannot hand one out. That is no reason to end: see [`accept`].
    ///
    /// # Cancel safety
    /// Dropping the future loses no connection.
    fn next(&self) -> impl Future<Output = io::Result<Self::Pending>> + Send;
}

/// Waits for the next conduit, whatever happens. It never fails: no error of one connection, nor a lack of file
/// descriptors or memory, may end a server. It backs off and goes on.
///
/// # Cancel safety
/// Dropping the future loses no connection.
pub async fn accept<L: Listener>(listener: &L) -> L::Pending {
    accept_from(|| listener.next()).await
}

/// The first pause after an error that is not the connection's own; it doubles with each error that follows.
const FIRST_PAUSE: Duration = Duration::from_millis(5);

/// The longest pause: descriptors that become free are used within a second.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

pub(super) async fn accept_from<T, F: Future<Output = io::Result<T>>>(mut accept: impl FnMut() -> F) -> T {
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
