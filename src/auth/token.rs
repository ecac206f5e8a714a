//! Bearer tokens: a secret in the hello's metadata.
//!
//! A token says who somebody is to everyone who sees it, so it belongs on encrypted conduits. It is kept out of `Debug`,
//! logs and errors, and compared in constant time: what is kept of it is a hash, so its length doesn't show either.

use std::fmt;

use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};
use tollway_protocol::metadata::{Entry, NO_PROPAGATE, SENSITIVE};
use tollway_protocol::payment::keccak256;

use super::{Authenticator, Greeting, Identity, Refusal};
use crate::future::BoxFuture;

/// The key of the metadata entry in which a token travels.
pub const TOKEN_KEY: &str = "authorization";

/// Fewest bytes of a token: 16 random bytes cannot be guessed, and as text take no less.
const MIN_BYTES: usize = 16;
/// Most bytes of a token: what metadata has room for beside other entries.
const MAX_BYTES: usize = 8 * 1024;

/// Text that is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum InvalidToken {
    /// One could guess it, or it does not fit the hello.
    #[error("a token has from {MIN_BYTES} to {MAX_BYTES} bytes, not {0}")]
    Length(usize),
    /// White space in it, or something that is not printable: more likely a mistake than a part of it.
    #[error("a token has no white space and no control characters in it")]
    Characters,
}

/// A secret that says who its bearer is.
#[derive(Clone)]
pub struct BearerToken {
    text: String,
}

impl fmt::Debug for BearerToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BearerToken(…)")
    }
}

impl BearerToken {
    /// Takes a token. White space around it, such as a line's end, is no part of it.
    ///
    /// # Errors
    /// When it is too short to be secret, too long, or has white space or control characters in it.
    pub fn new(text: impl AsRef<str>) -> Result<Self, InvalidToken> {
        let text = text.as_ref().trim();
        if !(MIN_BYTES..=MAX_BYTES).contains(&text.len()) {
            return Err(InvalidToken::Length(text.len()));
        }
        if text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(InvalidToken::Characters);
        }
        Ok(BearerToken { text: text.to_owned() })
    }

    /// The entry for the metadata of a hello: never logged, never passed on by a relay.
    pub fn entry(&self) -> Entry {
        let (key, value) = (TOKEN_KEY.to_owned(), self.text.clone().into_bytes());
        Entry { key, value, flags: SENSITIVE | NO_PROPAGATE }
    }
}

/// Knows who bears which token.
#[derive(Default)]
pub struct TokenAuthenticator {
    known: Vec<Known>,
}

struct Known {
    hash: [u8; 32],
    identity: Identity,
}

impl fmt::Debug for TokenAuthenticator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.known.iter().map(|known| known.identity.name())).finish()
    }
}

impl TokenAuthenticator {
    /// Knows nobody.
    pub fn new() -> Self {
        TokenAuthenticator::default()
    }

    /// Whoever bears this token is called so.
    #[must_use]
    pub fn with(self, name: impl Into<String>, token: &BearerToken) -> Self {
        self.with_identity(Identity::new(name, "token"), token)
    }

    /// Whoever bears this token has this identity.
    #[must_use]
    pub fn with_identity(mut self, identity: Identity, token: &BearerToken) -> Self {
        let hash = keccak256(token.text.as_bytes()).0;
        self.known.push(Known { hash, identity });
        self
    }

    /// How many tokens are known.
    pub fn len(&self) -> usize {
        self.known.len()
    }

    /// Whether nobody is known: then nobody gets in.
    pub fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Looks at every token, whichever it is: how long it takes says nothing.
    fn bearer_of(&self, token: &[u8]) -> Option<&Identity> {
        let hash = keccak256(token).0;
        let (mut found, mut place) = (Choice::from(0), 0u64);
        for (index, known) in (0u64..).zip(&self.known) {
            let same = known.hash.ct_eq(&hash);
            place.conditional_assign(&index, same);
            found |= same;
        }
        let known = self.known.get(usize::try_from(place).ok()?)?;
        bool::from(found).then_some(&known.identity)
    }
}

impl Authenticator for TokenAuthenticator {
    fn authenticate<'a>(&'a self, greeting: &'a mut Greeting) -> BoxFuture<'a, Result<Identity, Refusal>> {
        let answer = match greeting.metadata().value(TOKEN_KEY) {
            None => Err(Refusal::unauthenticated("this server asks for a token")),
            Some(token) => {
                self.bearer_of(token).cloned().ok_or_else(|| Refusal::unauthenticated("the token is not known"))
            }
        };
        Box::pin(std::future::ready(answer))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn each_token_has_its_bearer_and_no_other_one() {
        let tokens = ["the first of the tokens", "the-second-of-the-tokens", "the-third-of-the-tokens"];
        assert_eq!(BearerToken::new(tokens[0]).unwrap_err(), InvalidToken::Characters);
        let tokens = ["the-first-of-the-tokens", tokens[1], tokens[2]];
        let mut authenticator = TokenAuthenticator::new();
        for (number, token) in tokens.iter().enumerate() {
            authenticator = authenticator.with(format!("bearer {number}"), &BearerToken::new(token).unwrap());
        }
        for (number, token) in tokens.iter().enumerate() {
            assert_eq!(authenticator.bearer_of(token.as_bytes()).unwrap().name(), format!("bearer {number}"));
        }
        for wrong in ["", "the-first-of-the-token", "the-first-of-the-tokens ", "the-fourth-of-the-tokens"] {
            assert!(authenticator.bearer_of(wrong.as_bytes()).is_none(), "{wrong:?}");
        }
        assert!(TokenAuthenticator::new().bearer_of(b"").is_none());
    }

    #[test]
    fn a_token_is_shown_nowhere() {
        let token = BearerToken::new("  0123456789abcdef\n").unwrap();
        let authenticator = TokenAuthenticator::new().with("somebody", &token);
        let shown = format!("{token:?} {:?} {authenticator:?}", token.entry());
        assert!(!shown.contains("0123456789"), "{shown}");
        assert_eq!(token.entry().value, b"0123456789abcdef");
    }

    #[test]
    fn what_one_could_guess_is_no_token() {
        assert_eq!(BearerToken::new("x".repeat(15)).unwrap_err(), InvalidToken::Length(15));
        assert!(BearerToken::new("x".repeat(16)).is_ok());
        assert_eq!(BearerToken::new("x".repeat(8193)).unwrap_err(), InvalidToken::Length(8193));
    }
}
