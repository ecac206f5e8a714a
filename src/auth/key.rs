//! Login by key: the peer signs a nonce of the server's, with a payer's key for instance.
//!
//! See [`Login`] for what the signature covers. The nonce is random and lives only in the task of one handshake, so there
//! is nothing to be kept or to expire.

use std::collections::HashMap;
use std::fmt;

use bytes::Bytes;
use tollway_protocol::error::code;
use tollway_protocol::login::{LOGIN_METHOD, Login, NONCE_BYTES};
use tollway_protocol::payment::{Address, SecretKey};

use super::{Authenticator, Greeting, Identity, Prover, Refusal};
use crate::conduit::PeerInfo;
use crate::future::BoxFuture;

fn login<'a>(nonce: [u8; NONCE_BYTES], audience: &'a str, peer: &PeerInfo) -> Login<'a> {
    Login { nonce, audience, exporter: peer.exporter().copied().unwrap_or_default() }
}

/// Lets in who can sign with a known key, or with any key.
#[derive(Debug)]
pub struct KeyAuthenticator {
    audience: String,
    /// `None`: everybody, under the name of the address.
    known: Option<HashMap<Address, Identity>>,
}

impl KeyAuthenticator {
    /// Lets in whoever proves to have a key: its address is the identity. `audience` is the name of this server on which
    /// the clients have agreed, such as its payee's address: a proof for one server is none for another.
    pub fn any(audience: impl Into<String>) -> Self {
        KeyAuthenticator { audience: audience.into(), known: None }
    }

    /// Lets in nobody but the keys that are added by [`with`](Self::with).
    pub fn known(audience: impl Into<String>) -> Self {
        KeyAuthenticator { audience: audience.into(), known: Some(HashMap::new()) }
    }

    /// Whoever has the key of this address is called so.
    #[must_use]
    pub fn with(mut self, address: Address, name: impl Into<String>) -> Self {
        let identity = Identity::new(name, "key").with_address(address);
        self.known.get_or_insert_default().insert(address, identity);
        self
    }
}

impl Authenticator for KeyAuthenticator {
    fn authenticate<'a>(&'a self, greeting: &'a mut Greeting) -> BoxFuture<'a, Result<Identity, Refusal>> {
        Box::pin(async move {
            let mut nonce = [0; NONCE_BYTES];
            getrandom::fill(&mut nonce)
                .map_err(|_| Refusal::new(code::INTERNAL, "this server has no random numbers at the moment"))?;
            let proof = greeting.challenge(LOGIN_METHOD, Bytes::copy_from_slice(&nonce)).await?;
            let address = login(nonce, &self.audience, greeting.peer())
                .verify(&proof)
                .map_err(|error| Refusal::unauthenticated(error.to_string()))?;
            match &self.known {
                None => Ok(Identity::new(address.to_string(), "key").with_address(address)),
                Some(known) => {
                    let unknown = || Refusal::forbidden(format!("{address} is not known here"));
                    known.get(&address).cloned().ok_or_else(unknown)
                }
            }
        })
    }
}

/// Signs in with a key.
pub struct KeyProver {
    key: SecretKey,
    audience: String,
}

impl fmt::Debug for KeyProver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyProver").field("address", &self.key.address()).field("audience", &self.audience).finish()
    }
}

impl KeyProver {
    /// Proves to whoever goes by the name of `audience` that it has this key, and to nobody else.
    pub fn new(key: SecretKey, audience: impl Into<String>) -> Self {
        KeyProver { key, audience: audience.into() }
    }
}

impl Prover for KeyProver {
    fn prove<'a>(
        &'a self,
        method: &'a str,
        challenge: Bytes,
        peer: &'a PeerInfo,
    ) -> BoxFuture<'a, Result<Bytes, Refusal>> {
        let answer = if method != LOGIN_METHOD {
            Err(Refusal::unauthenticated(format!("this side proves itself by '{LOGIN_METHOD}', not by '{method}'")))
        } else {
            match <[u8; NONCE_BYTES]>::try_from(&challenge[..]) {
                Ok(nonce) => Ok(login(nonce, &self.audience, peer).prove(&self.key).into()),
                Err(_) => Err(Refusal::new(code::MALFORMED, "the challenge is none")),
            }
        };
        Box::pin(std::future::ready(answer))
    }
}
