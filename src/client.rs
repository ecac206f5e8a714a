//! Connecting to a URL.

use std::io;

use crate::conduit::any::{self, AnyConduit, ConnectOptions, EstablishError};
use crate::conduit::endpoint::{Endpoint, Scheme};
#[cfg(feature = "tls")]
use crate::conduit::tls::TlsError;
use crate::session::{Session, SessionConfig, SessionError};

/// A URL to which no session could be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The other end could not be reached.
    #[error("cannot reach {endpoint}: {source}")]
    Unreachable {
        /// Where.
        endpoint: Box<Endpoint>,
        /// Why.
        source: io::Error,
    },
    /// The other end could be reached, and is not whom it should be, or does not want us.
    #[cfg(feature = "tls")]
    #[error("cannot connect to {endpoint}: {source}")]
    Tls {
        /// Where.
        endpoint: Box<Endpoint>,
        /// Why, and what to do.
        source: TlsError,
    },
    /// The other end was reached, and there is no session.
    #[error(transparent)]
    Session(#[from] SessionError),
}

/// Starts a session with the peer at a URL, such as `tcp://127.0.0.1:7400`. A path in it is not looked at.
///
/// # Errors
/// When the peer cannot be reached, does not speak Tollway, refuses, or does not answer in time.
///
/// # Cancel safety
/// Dropping the future ends the conduit.
pub async fn connect(endpoint: &Endpoint, config: SessionConfig) -> Result<Session, ConnectError> {
    connect_with(endpoint, config, &ConnectOptions::default()).await
}

/// As [`connect`], with CAs or a client certificate of one's own.
///
/// # Errors
/// As [`connect`].
///
/// # Cancel safety
/// Dropping the future ends the conduit.
pub async fn connect_with(
    endpoint: &Endpoint,
    config: SessionConfig,
    options: &ConnectOptions,
) -> Result<Session, ConnectError> {
    let unreachable = |source| ConnectError::Unreachable { endpoint: Box::new(endpoint.clone()), source };
    #[cfg(feature = "tls")]
    let untrusted = |source| ConnectError::Tls { endpoint: Box::new(endpoint.clone()), source };
    // A listener that accepts and never shakes hands costs no more time than one that never says hello.
    let established = tokio::time::timeout(config.protocol.handshake_timeout, any::connect(endpoint, options)).await;
    let conduit = match established {
        Err(_late) => return Err(unreachable(no_answer(endpoint.scheme()))),
        Ok(Err(EstablishError::Io(source))) => return Err(unreachable(source)),
        #[cfg(feature = "tls")]
        Ok(Err(EstablishError::Tls(source))) => return Err(untrusted(source)),
        Ok(Err(other)) => return Err(unreachable(io::Error::other(other))),
        Ok(Ok(conduit)) => conduit,
    };
    #[cfg(feature = "tls")]
    let failure = conduit.tls_failure();
    let session = match conduit {
        // The kind that is counted in nanoseconds gets a driver of its own.
        AnyConduit::Tcp(conduit) => Session::connect(conduit, config).await,
        #[allow(unreachable_patterns, reason = "which kinds there are depends on the build")]
        conduit => Session::connect(conduit, config).await,
    };
    // That a client's certificate is refused is heard only after the handshake.
    #[cfg(feature = "tls")]
    if session.is_err()
        && let Some(source) = failure.and_then(|failure| failure.get().cloned())
    {
        return Err(untrusted(source));
    }
    Ok(session?)
}

/// Nobody has answered in time.
fn no_answer(scheme: Scheme) -> io::Error {
    match scheme {
        // Over UDP nobody says that nobody is there.
        Scheme::Quic => io::Error::new(
            io::ErrorKind::TimedOut,
            "nobody answers over UDP: check host and port, that the peer listens there at quic://, and that no firewall \
             is in the way (tls:// needs TCP alone)",
        ),
        _ => io::ErrorKind::TimedOut.into(),
    }
}
