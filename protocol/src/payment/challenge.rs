//! One-time challenges: what a payer signs to prove that it holds the channel's key now, and not that it saw a voucher.
//!
//! A challenge is not signed but carries a MAC, so the payee keeps nothing for challenges that nobody answers. Its key
//! lives as long as the process. Answered challenges are remembered in [`UsedNonces`] until they would expire anyway.
//!
//! The MAC is keccak256(tag ‖ key ‖ content). A key in front is a sound MAC for a sponge such as Keccak, whose output
//! reveals nothing of the capacity: the length extension that makes HMAC necessary for SHA-2 does not exist. All parts
//! have fixed lengths, so that no two contents share an encoding.
//!
//! Time is in milliseconds of any clock of the issuer that does not go back, best a monotonic one; a payer never reads it.

use core::fmt;
use std::collections::{BTreeMap, BTreeSet};

use k256::elliptic_curve::subtle::ConstantTimeEq;
use serde::{Deserialize, Serialize};
use sha3::{Digest, Keccak256};

use super::Hash;

/// Keeps this use of the key apart from any other.
const MAC_TAG: &[u8; 32] = b"tollway challenge mac, version 1";

/// A challenge of the payee.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Challenge {
    /// When it was issued, in milliseconds of the issuer's clock.
    pub issued_ms: u64,
    /// Random.
    pub nonce: [u8; 16],
    /// The hash of the terms that it came with.
    pub terms_hash: Hash,
    /// Proves that the issuer made it.
    pub mac: [u8; 32],
}

impl Challenge {
    /// The hash that the possession signature covers: keccak256(issued_ms as 8 big-endian bytes ‖ nonce ‖ terms hash ‖ MAC).
    pub fn hash(&self) -> Hash {
        let mut hasher = Keccak256::new();
        hasher.update(self.issued_ms.to_be_bytes());
        hasher.update(self.nonce);
        hasher.update(self.terms_hash.as_bytes());
        hasher.update(self.mac);
        Hash(hasher.finalize().into())
    }
}

/// Why a challenge is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChallengeError {
    /// Another process issued it, or nobody.
    #[error("the challenge was not issued here")]
    NotOurs,
    /// It was issued with other terms.
    #[error("the challenge belongs to other terms")]
    OtherTerms,
    /// It is older than allowed.
    #[error("the challenge is {age_ms} ms old, and {max_age_ms} ms are allowed")]
    Expired {
        /// Its age in milliseconds.
        age_ms: u64,
        /// The greatest age in milliseconds.
        max_age_ms: u64,
    },
    /// It was issued later than now: the clock went back.
    #[error("the challenge comes from the future")]
    FromTheFuture,
    /// It has been used.
    #[error("the challenge has been used")]
    Used,
    /// As many challenges as can be remembered are in use; try again when some have expired.
    #[error("{capacity} used challenges are remembered, which is the limit")]
    Full {
        /// How many can be remembered.
        capacity: usize,
    },
}

/// The key that makes and checks the MACs of challenges.
#[derive(Clone)]
pub struct ChallengeKey([u8; 32]);

impl ChallengeKey {
    /// The key with these random bytes.
    pub const fn new(bytes: [u8; 32]) -> Self {
        ChallengeKey(bytes)
    }

    /// Issues a challenge. `nonce` is 16 fresh random bytes.
    pub fn issue(&self, issued_ms: u64, nonce: [u8; 16], terms_hash: Hash) -> Challenge {
        Challenge { issued_ms, nonce, terms_hash, mac: self.mac(issued_ms, &nonce, &terms_hash) }
    }

    /// Checks that this key issued the challenge with these terms, at most `max_age_ms` milliseconds before `now_ms`.
    ///
    /// # Errors
    /// Says which of it fails. That it is unused is for [`UsedNonces`] to say.
    pub fn verify(
        &self,
        challenge: &Challenge,
        terms_hash: &Hash,
        now_ms: u64,
        max_age_ms: u64,
    ) -> Result<(), ChallengeError> {
        // The MAC first and in constant time: nothing about a forged challenge is answered in more detail.
        let mac = self.mac(challenge.issued_ms, &challenge.nonce, &challenge.terms_hash);
        if !bool::from(mac.ct_eq(&challenge.mac)) {
            return Err(ChallengeError::NotOurs);
        }
        if challenge.terms_hash != *terms_hash {
            return Err(ChallengeError::OtherTerms);
        }
        let age_ms = now_ms.checked_sub(challenge.issued_ms).ok_or(ChallengeError::FromTheFuture)?;
        if age_ms > max_age_ms {
            return Err(ChallengeError::Expired { age_ms, max_age_ms });
        }
        Ok(())
    }

    fn mac(&self, issued_ms: u64, nonce: &[u8; 16], terms_hash: &Hash) -> [u8; 32] {
        let mut hasher = Keccak256::new();
        hasher.update(MAC_TAG);
        hasher.update(self.0);
        hasher.update(issued_ms.to_be_bytes());
        hasher.update(nonce);
        hasher.update(terms_hash.as_bytes());
        hasher.finalize().into()
    }
}

impl fmt::Debug for ChallengeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ChallengeKey(..)")
    }
}

/// The challenges that have been answered and could be answered again, were they not remembered here.
///
/// An entry is needed only until its challenge expires. When all places are taken, a further one is refused: forgetting
/// an entry early would let its challenge be used twice.
#[derive(Debug, Clone)]
pub struct UsedNonces {
    capacity: usize,
    // By nonce for the question, by expiry for forgetting; ordered maps, since hashing would need a random seed.
    by_nonce: BTreeMap<[u8; 16], u64>,
    by_expiry: BTreeSet<(u64, [u8; 16])>,
}

impl UsedNonces {
    /// Remembers at most `capacity` challenges, some 100 bytes each.
    pub const fn new(capacity: usize) -> Self {
        UsedNonces { capacity, by_nonce: BTreeMap::new(), by_expiry: BTreeSet::new() }
    }

    /// How many are remembered.
    pub fn len(&self) -> usize {
        self.by_nonce.len()
    }

    /// Whether none is remembered.
    pub fn is_empty(&self) -> bool {
        self.by_nonce.is_empty()
    }

    /// Uses up a challenge that was verified, at best after the possession signature over it was verified too, so that
    /// nobody else can use it up.
    ///
    /// # Errors
    /// [`ChallengeError::Used`] when it has been used, [`ChallengeError::Full`] when no place is free.
    pub fn insert(&mut self, challenge: &Challenge, now_ms: u64, max_age_ms: u64) -> Result<(), ChallengeError> {
        self.forget_expired(now_ms);
        if self.by_nonce.contains_key(&challenge.nonce) {
            return Err(ChallengeError::Used);
        }
        if self.by_nonce.len() >= self.capacity {
            return Err(ChallengeError::Full { capacity: self.capacity });
        }
        let expires_ms = challenge.issued_ms.saturating_add(max_age_ms);
        self.by_nonce.insert(challenge.nonce, expires_ms);
        self.by_expiry.insert((expires_ms, challenge.nonce));
        Ok(())
    }

    /// Whether the challenge has been used: the cheap question before anything is verified.
    pub fn contains(&self, challenge: &Challenge) -> bool {
        self.by_nonce.contains_key(&challenge.nonce)
    }

    fn forget_expired(&mut self, now_ms: u64) {
        // At its expiry itself a challenge is still taken, so it is kept through that millisecond.
        while let Some((expires_ms, nonce)) = self.by_expiry.first().copied().filter(|(expires, _)| *expires < now_ms) {
            self.by_expiry.remove(&(expires_ms, nonce));
            self.by_nonce.remove(&nonce);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const TERMS: Hash = Hash([3; 32]);

    fn key() -> ChallengeKey {
        ChallengeKey::new([7; 32])
    }

    #[test]
    fn an_issued_challenge_is_taken_up_to_its_age_limit_and_not_after() {
        let challenge = key().issue(1_000, [1; 16], TERMS);
        assert_eq!(key().verify(&challenge, &TERMS, 1_000, 500), Ok(()));
        assert_eq!(key().verify(&challenge, &TERMS, 1_500, 500), Ok(()));
        let expired = ChallengeError::Expired { age_ms: 501, max_age_ms: 500 };
        assert_eq!(key().verify(&challenge, &TERMS, 1_501, 500), Err(expired));
        assert_eq!(key().verify(&challenge, &TERMS, 999, 500), Err(ChallengeError::FromTheFuture));
    }

    #[test]
    fn each_field_of_a_challenge_is_covered_by_its_mac() {
        let challenge = key().issue(1_000, [1; 16], TERMS);
        let tampered = [
            Challenge { issued_ms: 1_001, ..challenge },
            Challenge { nonce: [2; 16], ..challenge },
            Challenge { terms_hash: Hash([4; 32]), ..challenge },
            Challenge { mac: [0; 32], ..challenge },
        ];
        for challenge in tampered {
            assert_eq!(key().verify(&challenge, &challenge.terms_hash, 1_100, 500), Err(ChallengeError::NotOurs));
        }
        let other_key = ChallengeKey::new([8; 32]);
        assert_eq!(other_key.verify(&challenge, &TERMS, 1_100, 500), Err(ChallengeError::NotOurs));
        assert_eq!(key().verify(&challenge, &Hash([4; 32]), 1_100, 500), Err(ChallengeError::OtherTerms));
    }

    /// `[pay.challenge.once]`
    #[test]
    fn a_challenge_is_used_once_while_it_could_still_be_taken() {
        let mut used = UsedNonces::new(8);
        let challenge = key().issue(1_000, [1; 16], TERMS);
        assert_eq!(used.insert(&challenge, 1_100, 500), Ok(()));
        assert!(used.contains(&challenge));
        assert_eq!(used.insert(&challenge, 1_500, 500), Err(ChallengeError::Used));
        assert_eq!(key().verify(&challenge, &TERMS, 1_500, 500), Ok(()));
        // One millisecond later the age limit refuses it, so the place is free again.
        used.insert(&key().issue(1_400, [2; 16], TERMS), 1_501, 500).unwrap();
        assert_eq!(used.len(), 1);
        assert!(key().verify(&challenge, &TERMS, 1_501, 500).is_err());
    }

    #[test]
    fn at_capacity_a_further_challenge_is_refused_and_none_is_forgotten() {
        let mut used = UsedNonces::new(2);
        for nonce in [[1; 16], [2; 16]] {
            used.insert(&key().issue(0, nonce, TERMS), 10, 100).unwrap();
        }
        let third = key().issue(0, [3; 16], TERMS);
        assert_eq!(used.insert(&third, 10, 100), Err(ChallengeError::Full { capacity: 2 }));
        assert_eq!(used.insert(&key().issue(0, [1; 16], TERMS), 10, 100), Err(ChallengeError::Used));
        assert_eq!(used.insert(&third, 101, 100), Ok(()));
    }

    #[test]
    fn the_key_never_appears_in_debug() {
        assert_eq!(format!("{:?}", key()), "ChallengeKey(..)");
    }
}
