//! Who signs for a payer: a key in this process, or something that keeps the key to itself.
//!
//! A [`Signer`] is asked for one message at a time, in full, so that it can hold bounds of its own: which payees, how much
//! on a channel, how much a day. The wallet's bounds are checked before it is asked, and what it signed is written down
//! before it is asked, too; so a signer that answers late or twice authorises nothing that is not in the books.

use std::fmt;
use std::future::ready;

use tollway_protocol::payment::{Address, SecretKey, Signature, SigningRequest, VoucherError};

use crate::future::BoxFuture;

/// Why a signer did not sign.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SignerError {
    /// It is beyond the signer's own bounds.
    #[error("the signer refuses: {0}")]
    Refused(String),
    /// It cannot be asked, or did not answer.
    #[error("the signer does not answer: {0}")]
    Unreachable(String),
    /// What it was asked for is no message of the protocol.
    #[error(transparent)]
    Request(#[from] VoucherError),
}

/// Signs for a payer, or with a delegated session key for its channels.
///
/// ```
/// use tollway::future::BoxFuture;
/// use tollway::payment::{Signer, SignerError};
/// use tollway::protocol::payment::{Address, Amount, SecretKey, Signature, SigningRequest};
///
/// /// A key that signs for one payee, up to an amount for each channel.
/// #[derive(Debug)]
/// struct Bounded { key: SecretKey, payee: Address, most: Amount }
///
/// impl Signer for Bounded {
///     fn address(&self) -> Address {
///         self.key.address()
///     }
///
///     fn sign(&self, request: SigningRequest) -> BoxFuture<'_, Result<Signature, SignerError>> {
///         let fits = match &request {
///             SigningRequest::Voucher { channel, amount } => channel.payee == self.payee && *amount <= self.most,
///             _ => true,
///         };
///         let signed = if fits { Ok(()) } else { Err(SignerError::Refused("beyond the bounds".to_owned())) };
///         Box::pin(async move { signed.and_then(|()| Ok(request.sign(&self.key)?)) })
///     }
/// }
/// ```
pub trait Signer: fmt::Debug + Send + Sync + 'static {
    /// The address of the key.
    fn address(&self) -> Address;

    /// Signs one message: low-s, v 27 or 28, as every implementation of the protocol wants it. The wallet waits for it at most
    /// half a minute, and delivery may pause meanwhile; the same request may come again.
    ///
    /// # Errors
    /// When it does not sign. A wallet then signs nothing more on the connection, and says why.
    fn sign(&self, request: SigningRequest) -> BoxFuture<'_, Result<Signature, SignerError>>;
}

impl Signer for SecretKey {
    fn address(&self) -> Address {
        SecretKey::address(self)
    }

    fn sign(&self, request: SigningRequest) -> BoxFuture<'_, Result<Signature, SignerError>> {
        Box::pin(ready(request.sign(self).map_err(SignerError::from)))
    }
}
