//! Connecting to a URL.

use std::io;

use crate::conduit::endpoint::{Endpoint, Scheme};
use crate::conduit::tcp::TcpConduit;
use crate::session::{Session, SessionConfig, SessionError};

/// A URL to which no session could be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectError {
    /// The other end could not be reached.
    #[error("cannot reach {endpoint}: {source}")]
    Unreachable {
        /// Where.
        endpoint: Endpoint,
        /// Why.
        source: io::Error,
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
    match endpoint.scheme() {
        Scheme::Tcp => {
            let conduit = TcpConduit::connect(endpoint.address())
                .await
                .map_err(|source| ConnectError::Unreachable { endpoint: endpoint.clone(), source })?;
            Ok(Session::connect(conduit, config).await?)
        }
    }
}
