//! Metadata: a short list of keyed values that travels with a hello, an open, a call or a close.

use core::fmt;

use serde::{Deserialize, Serialize};

/// The value must not appear in logs, errors or `Debug`.
pub const SENSITIVE: u8 = 1;
/// A relay must not forward the entry.
pub const NO_PROPAGATE: u8 = 2;

/// Most entries in one [`Metadata`]: authentication, tracing and a handful of the application's own.
pub const MAX_ENTRIES: usize = 64;
/// Most bytes of keys and values together in one [`Metadata`]: what HTTP servers allow for all headers by default.
pub const MAX_BYTES: usize = 16 * 1024;

/// One keyed value.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// The key: by convention lower-case words with dashes, such as `traceparent`.
    pub key: String,
    /// The value: any bytes.
    pub value: Vec<u8>,
    /// [`SENSITIVE`], [`NO_PROPAGATE`], both or neither. Unknown bits are carried and ignored.
    pub flags: u8,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.flags & SENSITIVE != 0 {
            write!(f, "{}: (sensitive)", self.key)
        } else {
            write!(f, "{}: {:?}", self.key, String::from_utf8_lossy(&self.value))
        }
    }
}

/// Keyed values in the order in which they were added. An empty list allocates nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Metadata {
    entries: Vec<Entry>,
}

/// Metadata above one of its caps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("metadata of {entries} entries and {bytes} bytes is above {MAX_ENTRIES} entries or {MAX_BYTES} bytes")]
pub struct MetadataTooLarge {
    /// Entries that were found.
    pub entries: usize,
    /// Bytes of keys and values that were found.
    pub bytes: usize,
}

impl Metadata {
    /// No entries.
    pub const fn new() -> Self {
        Metadata { entries: Vec::new() }
    }

    /// Adds an entry without flags.
    pub fn with(mut self, key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        self.push(Entry { key: key.into(), value: value.into(), flags: 0 });
        self
    }

    /// Adds an entry.
    pub fn push(&mut self, entry: Entry) {
        self.entries.push(entry);
    }

    /// The value of the first entry with this key.
    pub fn value(&self, key: &str) -> Option<&[u8]> {
        self.entries.iter().find(|entry| entry.key == key).map(|entry| entry.value.as_slice())
    }

    /// All entries in order.
    pub fn iter(&self) -> impl Iterator<Item = &Entry> {
        self.entries.iter()
    }

    /// What a relay passes on, if that is not all: the entries without [`NO_PROPAGATE`]. `[relay.no-propagate]`
    #[must_use]
    pub fn propagated(&self) -> Option<Self> {
        let stays = |entry: &&Entry| entry.flags & NO_PROPAGATE == 0;
        let any = self.entries.iter().any(|entry| !stays(&entry));
        any.then(|| Metadata { entries: self.entries.iter().filter(stays).cloned().collect() })
    }

    /// Whether there is no entry.
    pub const fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Checks both caps. `[session.metadata.caps]`
    ///
    /// # Errors
    /// When there are more than [`MAX_ENTRIES`] entries, or more than [`MAX_BYTES`] bytes in them.
    pub fn check(&self) -> Result<(), MetadataTooLarge> {
        let sum = |sum: usize, entry: &Entry| sum.saturating_add(entry.key.len()).saturating_add(entry.value.len());
        let (entries, bytes) = (self.entries.len(), self.entries.iter().fold(0, sum));
        if entries > MAX_ENTRIES || bytes > MAX_BYTES {
            return Err(MetadataTooLarge { entries, bytes });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caps_hold_at_the_limit_and_refuse_one_over() {
        let at = Metadata::new().with("k", vec![0; MAX_BYTES - 1]);
        assert_eq!(at.check(), Ok(()));
        let over = Metadata::new().with("k", vec![0; MAX_BYTES]);
        assert_eq!(over.check(), Err(MetadataTooLarge { entries: 1, bytes: MAX_BYTES + 1 }));
        let mut many = Metadata::new();
        for _ in 0..MAX_ENTRIES {
            many = many.with("", "");
        }
        assert_eq!(many.check(), Ok(()));
        assert!(many.with("", "").check().is_err());
    }

    #[test]
    fn a_sensitive_value_is_not_shown() {
        let mut metadata = Metadata::new();
        metadata.push(Entry { key: "authorization".into(), value: b"hunter2".to_vec(), flags: SENSITIVE });
        assert!(!format!("{metadata:?}").contains("hunter2"));
    }
}
