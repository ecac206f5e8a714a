//! Authentication: who gets a session, decided once, before it is open.
//!
//! A server's [`Authenticator`] sees the peer's [`Greeting`]: the metadata of its hello and what its conduit has proved.
//! It may put a challenge to it. It answers with an [`Identity`], which handlers find in every call of the session, or
//! with a [`Refusal`], which the peer is told. It runs in a task of its own, within the handshake's deadline, while the
//! peer holds one of the places for those that have not ended their handshake.
//!
//! Shipped: [`TokenAuthenticator`] for bearer tokens, [`KeyAuthenticator`] for keys such as a payer's. A conduit's own
//! proof, such as a certificate, is in [`PeerInfo::identity`].

use std::any::Any;
use std::fmt;
use std::sync::{Arc, OnceLock};

use bytes::Bytes;
use tollway_protocol::error::{Reason, code};
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Address;

use crate::conduit::PeerInfo;
use crate::future::BoxFuture;
use crate::shared::Shared;

mod key;
mod token;

pub use key::{KeyAuthenticator, KeyProver};
pub use token::{BearerToken, InvalidToken, TOKEN_KEY, TokenAuthenticator};

/// Decides who a peer is and whether it gets a session.
pub trait Authenticator: fmt::Debug + Send + Sync + 'static {
    /// Answers a greeting. A panic in it refuses the peer.
    fn authenticate<'a>(&'a self, greeting: &'a mut Greeting) -> BoxFuture<'a, Result<Identity, Refusal>>;
}

/// Answers the challenge of a server's authenticator.
pub trait Prover: fmt::Debug + Send + Sync + 'static {
    /// Answers a challenge of a method. `peer` is the other end of the conduit.
    ///
    /// Should this side not want to prove anything by this method, or to this peer, the session is closed.
    fn prove<'a>(
        &'a self,
        method: &'a str,
        challenge: Bytes,
        peer: &'a PeerInfo,
    ) -> BoxFuture<'a, Result<Bytes, Refusal>>;
}

/// Who a peer has proved to be. Clones are cheap.
#[derive(Clone)]
pub struct Identity {
    inner: Arc<IdentityInner>,
}

struct IdentityInner {
    name: String,
    method: &'static str,
    address: Option<Address>,
    data: Option<Arc<dyn Any + Send + Sync>>,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let IdentityInner { name, method, address, .. } = &*self.inner;
        f.debug_struct("Identity")
            .field("name", name)
            .field("method", method)
            .field("address", address)
            .finish_non_exhaustive()
    }
}

impl Identity {
    /// An identity by its name, and by what method it was proved, such as `"token"`.
    pub fn new(name: impl Into<String>, method: &'static str) -> Self {
        let (address, data) = (None, None);
        Identity { inner: Arc::new(IdentityInner { name: name.into(), method, address, data }) }
    }

    /// With the address of the key that was proved.
    #[must_use]
    pub fn with_address(self, address: Address) -> Self {
        let IdentityInner { name, method, data, .. } = &*self.inner;
        let (name, data, address) = (name.clone(), data.clone(), Some(address));
        Identity { inner: Arc::new(IdentityInner { name, method, address, data }) }
    }

    /// With something of the application's own, such as the rights that go with the identity.
    #[must_use]
    pub fn with_data<T: Any + Send + Sync>(self, data: T) -> Self {
        let IdentityInner { name, method, address, .. } = &*self.inner;
        let data: Option<Arc<dyn Any + Send + Sync>> = Some(Arc::new(data));
        Identity { inner: Arc::new(IdentityInner { name: name.clone(), method, address: *address, data }) }
    }

    /// The name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// By what method it was proved.
    pub fn method(&self) -> &'static str {
        self.inner.method
    }

    /// The address of the key that was proved, if it was a key.
    pub fn address(&self) -> Option<Address> {
        self.inner.address
    }

    /// What the authenticator has put in with [`with_data`](Self::with_data), if it is a `T`.
    pub fn data<T: Any + Send + Sync>(&self) -> Option<&T> {
        self.inner.data.as_ref()?.downcast_ref()
    }
}

/// No session, and what the peer is told about it. Nothing secret belongs into the text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct Refusal {
    /// Code and text as they travel.
    pub reason: Reason,
}

impl Refusal {
    /// A refusal with a code of [`code`], or of the application's own from [`code::APPLICATION`] up.
    pub fn new(code: u32, text: impl Into<String>) -> Self {
        Refusal { reason: Reason::new(code, text) }
    }

    /// The peer has not proved who it is.
    pub fn unauthenticated(text: impl Into<String>) -> Self {
        Refusal::new(code::UNAUTHENTICATED, text)
    }

    /// It is known who the peer is, and it may not have a session.
    pub fn forbidden(text: impl Into<String>) -> Self {
        Refusal::new(code::FORBIDDEN, text)
    }
}

/// What a peer says, and what is known about it, before it has a session.
pub struct Greeting {
    metadata: Metadata,
    peer: Arc<SessionPeer>,
    shared: Arc<Shared>,
}

impl fmt::Debug for Greeting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Greeting")
            .field("metadata", &self.metadata)
            .field("peer", &self.peer.info)
            .finish_non_exhaustive()
    }
}

impl Greeting {
    pub(crate) fn new(metadata: Metadata, peer: Arc<SessionPeer>, shared: Arc<Shared>) -> Self {
        Greeting { metadata, peer, shared }
    }

    /// The metadata of the peer's hello. Nothing in it is proved.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// The other end of the conduit, and what that has proved.
    pub fn peer(&self) -> &PeerInfo {
        &self.peer.info
    }

    /// Puts a challenge to the peer and waits for its proof: once in a handshake. What the proof is worth is for the
    /// caller to find out.
    ///
    /// # Errors
    /// When the peer was challenged before, or has gone.
    pub async fn challenge(&mut self, method: &str, challenge: Bytes) -> Result<Bytes, Refusal> {
        let gone = |_| Refusal::unauthenticated("the challenge was not answered");
        let proof = self
            .shared
            .challenge(method, challenge)
            .map_err(|error| Refusal::new(code::INTERNAL, error.to_string()))?;
        proof.await.map_err(gone)
    }
}

/// The peer of a session as its handlers see it.
#[derive(Debug)]
pub(crate) struct SessionPeer {
    pub(crate) info: PeerInfo,
    /// Set once, before the session is open.
    pub(crate) identity: OnceLock<Identity>,
}

impl SessionPeer {
    pub(crate) fn new(info: PeerInfo) -> Arc<Self> {
        Arc::new(SessionPeer { info, identity: OnceLock::new() })
    }
}

/// Answers a challenge for the initiator, in a task of its own.
pub(crate) async fn answer_challenge(
    shared: Arc<Shared>,
    prover: Option<Arc<dyn Prover>>,
    peer: Arc<SessionPeer>,
    (method, challenge): (String, Bytes),
) {
    let proof = match &prover {
        Some(prover) => {
            tokio::select! {
                proof = prover.prove(&method, challenge, &peer.info) => proof,
                _ended = shared.closed() => return,
            }
        }
        None => Err(Refusal::unauthenticated(format!("this side has nothing to prove itself with by '{method}'"))),
    };
    match proof {
        Ok(proof) => shared.prove(proof),
        Err(refusal) => shared.close_session(refusal.reason),
    }
}
