//! A login by key: what the initiator of a session signs to prove who it is.
//!
//! The responder picks a nonce for this one handshake, and the signature covers it, so a proof that was recorded is of no
//! use in any other `[session.auth.fresh]`. It covers the name of who is to be convinced, so that a dishonest server
//! cannot pass it on to another one `[session.auth.audience]`, and what both ends of an encrypted conduit alone have in
//! common, so that nobody in between can `[session.auth.exporter]`.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use crate::payment::eip712::{Domain, StructHasher};
use crate::payment::{Address, Hash, SecretKey, Signature, SignatureError, keccak256};

/// The `method` of a Challenge that asks for this proof; the Challenge's payload is the nonce, 32 bytes.
pub const LOGIN_METHOD: &str = "tollway-key/1";

/// Bytes of a nonce.
pub const NONCE_BYTES: usize = 32;

static LOGIN_TYPE: LazyLock<Hash> =
    LazyLock::new(|| keccak256(b"Login(bytes32 nonce,string audience,bytes32 exporter)"));

/// What is signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Login<'a> {
    /// The responder's, for this handshake alone.
    pub nonce: [u8; NONCE_BYTES],
    /// Who is to be convinced: a name on which both sides have agreed beforehand.
    pub audience: &'a str,
    /// What the ends of the conduit have in common and nobody else has; zeros where there is nothing of the kind.
    pub exporter: [u8; 32],
}

/// Why a proof proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoginError {
    /// Its bytes are none.
    #[error("the proof cannot be decoded")]
    Malformed,
    /// The signature is not of who it says, or is of another handshake, audience or conduit.
    #[error("the proof is not of {address} for this handshake")]
    WrongSignature {
        /// Who it says that it is of.
        address: Address,
    },
}

/// A proof as it travels: the postcard bytes of both fields.
#[derive(Serialize, Deserialize)]
struct Proof {
    address: Address,
    signature: Signature,
}

impl Login<'_> {
    fn digest(&self) -> Hash {
        let hash = StructHasher::new(&LOGIN_TYPE)
            .word(&Hash(self.nonce))
            .text(self.audience)
            .word(&Hash(self.exporter))
            .finish();
        Domain::tollway(0, Address::ZERO).separator().digest(&hash)
    }

    /// The payload of a Proof frame.
    pub fn prove(&self, key: &SecretKey) -> Vec<u8> {
        let proof = Proof { address: key.address(), signature: key.sign_digest(&self.digest()) };
        postcard::to_stdvec(&proof).expect("an address and a signature always encode")
    }

    /// Verifies the payload of a Proof frame, and returns who has proved to be there.
    ///
    /// The address travels along and is compared: that a signature recovers to some key says nothing.
    ///
    /// # Errors
    /// When the bytes are no proof, or it is not for this login.
    pub fn verify(&self, proof: &[u8]) -> Result<Address, LoginError> {
        let (proof, rest) = postcard::take_from_bytes::<Proof>(proof).map_err(|_| LoginError::Malformed)?;
        if !rest.is_empty() {
            return Err(LoginError::Malformed);
        }
        let address = proof.address;
        let recovered: Result<Address, SignatureError> = proof.signature.recover(&self.digest());
        if recovered != Ok(address) {
            return Err(LoginError::WrongSignature { address });
        }
        Ok(address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGIN: Login<'static> = Login { nonce: [7; 32], audience: "files.example", exporter: [9; 32] };

    fn key(seed: u8) -> SecretKey {
        SecretKey::from_bytes([seed; 32]).unwrap()
    }

    /// `[session.auth.fresh]` `[session.auth.audience]` `[session.auth.exporter]`
    #[test]
    fn a_proof_is_for_one_handshake_one_audience_and_one_conduit() {
        let proof = LOGIN.prove(&key(1));
        assert_eq!(LOGIN.verify(&proof), Ok(key(1).address()));
        let others = [
            Login { nonce: [8; 32], ..LOGIN },
            Login { audience: "files.example.org", ..LOGIN },
            Login { exporter: [0; 32], ..LOGIN },
        ];
        for other in others {
            assert_eq!(other.verify(&proof), Err(LoginError::WrongSignature { address: key(1).address() }));
        }
    }

    #[test]
    fn a_proof_in_the_name_of_another_proves_nothing() {
        let mut proof = LOGIN.prove(&key(1));
        proof[..20].copy_from_slice(&LOGIN.prove(&key(2))[..20]);
        assert_eq!(LOGIN.verify(&proof), Err(LoginError::WrongSignature { address: key(2).address() }));
    }

    #[test]
    fn every_other_length_is_refused() {
        let proof = LOGIN.prove(&key(1));
        for length in 0..proof.len() {
            assert_eq!(LOGIN.verify(&proof[..length]), Err(LoginError::Malformed), "{length} bytes");
        }
        assert_eq!(LOGIN.verify(&[&proof[..], &[0]].concat()), Err(LoginError::Malformed));
    }
}
