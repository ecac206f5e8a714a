//! The file that the demo fetches: a named one, or one that is made.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

const BLOCK: usize = 1 << 20;

/// A file to be served.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) dir: PathBuf,
    pub(super) name: String,
    pub(super) size: u64,
    pub(super) sha256: [u8; 32],
}

impl Source {
    /// A file that is there. Blocks while it is hashed.
    ///
    /// # Errors
    /// When it cannot be read or its name is not text.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let path = path.canonicalize()?;
        let name = path.file_name().and_then(|name| name.to_str()).map(str::to_owned);
        let (Some(dir), Some(name)) = (path.parent().map(PathBuf::from), name) else {
            return Err(io::ErrorKind::InvalidFilename.into());
        };
        let (size, sha256) = hash(&path)?;
        Ok(Source { dir, name, size, sha256 })
    }

    /// Makes a file of so many bytes that depend on the seed alone. Blocks.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(super) fn make(dir: &Path, size: u64, seed: u64) -> io::Result<Self> {
        let name = "demo.bin";
        let mut file = File::create(dir.join(name))?;
        let mut sha256 = Sha256::new();
        let (mut left, mut state, mut block) = (size, seed, vec![0; BLOCK]);
        while left > 0 {
            let bytes = usize::try_from(left).unwrap_or(BLOCK).min(BLOCK);
            for word in block.chunks_exact_mut(8) {
                word.copy_from_slice(&split_mix(&mut state).to_le_bytes());
            }
            sha256.update(&block[..bytes]);
            file.write_all(&block[..bytes])?;
            left -= bytes as u64;
        }
        // What is on the disk is not written out while the fetch is timed.
        file.sync_data()?;
        Ok(Source { dir: dir.to_owned(), name: name.to_owned(), size, sha256: sha256.finalize().into() })
    }
}

/// The size and the hash of a file. Blocks.
///
/// # Errors
/// When it cannot be read.
pub(super) fn hash(path: &Path) -> io::Result<(u64, [u8; 32])> {
    let (mut file, mut sha256, mut size, mut block) = (File::open(path)?, Sha256::new(), 0, vec![0; BLOCK]);
    loop {
        match file.read(&mut block) {
            Ok(0) => return Ok((size, sha256.finalize().into())),
            Ok(bytes) => {
                sha256.update(&block[..bytes]);
                size += bytes as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// SplitMix64: bytes that do not compress, and the same ones for the same seed.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_makes_one_file_and_its_hash_is_that_of_the_disk() {
        let dir = tempfile::tempdir().unwrap();
        let size = (BLOCK + 13) as u64;
        let made = Source::make(dir.path(), size, 7).unwrap();
        let again = Source::make(dir.path(), size, 7).unwrap();
        let other = Source::make(dir.path(), size, 8).unwrap();
        assert_eq!(made.sha256, again.sha256);
        assert_ne!(made.sha256, other.sha256);
        let named = Source::of(&dir.path().join(&made.name)).unwrap();
        assert_eq!((named.size, named.sha256), (size, other.sha256));
    }
}
