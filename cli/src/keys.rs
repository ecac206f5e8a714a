//! Key files: one line, `0x` and 64 hex digits, readable by their owner alone.
//!
//! A key is never printed and never overwritten, and a file that others can read is not used: who reads it can spend.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use tollway_protocol::payment::{Address, Hex, SecretKey, SecretKeyError, parse_hex};

/// What can be wrong with a key file. Nothing of its content is ever in an error.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeyFileError {
    /// There is a file already.
    #[error("{} exists and is not overwritten: name another file, or move this one away", .0.display())]
    Exists(PathBuf),
    /// The file cannot be written.
    #[error("cannot write the key to {}: {source}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file is not there.
    #[error("there is no key file {path}: make one with `tollway keygen {path}`", path = .0.display())]
    Missing(PathBuf),
    /// The file cannot be read.
    #[error("cannot read the key file {}: {source}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// Others than the owner have access.
    #[error(
        "the key file {path} has mode {mode:04o}, so others can use the key: run `chmod 600 {path}`, or make a new key if \
         others have read it",
        path = .path.display()
    )]
    OpenToOthers {
        /// The file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// There is something else in the file.
    #[error("{} is not a key file: it must be one line with 0x and 64 hex digits", .0.display())]
    Malformed(PathBuf),
    /// The number in the file is not a key.
    #[error("{} is not a key file: {source}", .path.display())]
    NotAKey {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: SecretKeyError,
    },
    /// The system gives no random numbers.
    #[error("the system gives no random numbers: {0}")]
    Random(#[from] getrandom::Error),
}

/// A new key.
///
/// # Errors
/// When the system gives no random numbers.
pub(crate) fn generate() -> Result<SecretKey, KeyFileError> {
    loop {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes)?;
        // One in 2^128 is out of range.
        if let Ok(key) = SecretKey::from_bytes(bytes) {
            return Ok(key);
        }
    }
}

/// Makes a key and a file for it that only the owner can read, and returns the key's address.
///
/// # Errors
/// When the file exists or cannot be written; then no half of a key is left.
pub(crate) fn create(path: &Path) -> Result<Address, KeyFileError> {
    let key = generate()?;
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => KeyFileError::Exists(path.to_owned()),
        _ => KeyFileError::Write { path: path.to_owned(), source },
    };
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path).map_err(failed)?;
    let written = writeln!(file, "{}", Hex(&key.to_bytes())).and_then(|()| file.sync_all());
    if let Err(error) = written {
        // The error of the write is the one to tell; a file without a whole key is of no use to anybody.
        let _ = std::fs::remove_file(path);
        return Err(failed(error));
    }
    Ok(key.address())
}

/// Reads a key file.
///
/// # Errors
/// When it is not there, not a key file, or open to others than its owner.
pub(crate) fn load(path: &Path) -> Result<SecretKey, KeyFileError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound => KeyFileError::Missing(path.to_owned()),
        _ => KeyFileError::Read { path: path.to_owned(), source },
    };
    let file = File::open(path).map_err(failed)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = file.metadata().map_err(failed)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(KeyFileError::OpenToOthers { path: path.to_owned(), mode });
        }
    }
    let mut text = String::new();
    // A key file has 67 bytes; what is longer is none, whatever its size.
    match file.take(128).read_to_string(&mut text) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            return Err(KeyFileError::Malformed(path.to_owned()));
        }
        Err(error) => return Err(failed(error)),
    }
    let bytes = parse_hex(text.trim_end()).map_err(|_| KeyFileError::Malformed(path.to_owned()))?;
    SecretKey::from_bytes(bytes).map_err(|source| KeyFileError::NotAKey { path: path.to_owned(), source })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_was_written_is_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.key");
        let address = create(&path).unwrap();
        assert_eq!(load(&path).unwrap().address(), address);
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!((text.len(), &text[..2], &text[66..]), (67, "0x", "\n"));
    }

    #[test]
    fn a_key_file_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.key");
        create(&path).unwrap();
        let before = std::fs::read(&path).unwrap();
        assert!(matches!(create(&path), Err(KeyFileError::Exists(_))));
        assert_eq!(std::fs::read(&path).unwrap(), before);
    }

    #[cfg(unix)]
    #[test]
    fn a_key_file_that_others_can_read_is_refused_with_the_remedy() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.key");
        create(&path).unwrap();
        for mode in [0o640, 0o604, 0o620, 0o644] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let error = load(&path).unwrap_err();
            assert!(matches!(error, KeyFileError::OpenToOthers { .. }), "{mode:o}");
            assert!(error.to_string().contains("chmod 600"), "{error}");
        }
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
        load(&path).unwrap();
    }

    #[test]
    fn what_is_no_key_is_refused_without_showing_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.key");
        create(&path).unwrap();
        let zero = format!("0x{}\n", "00".repeat(32));
        let long = format!("0x{}\n", "11".repeat(33));
        for text in ["", "secret", &zero, &long, &"11".repeat(32)] {
            std::fs::write(&path, text).unwrap();
            let error = load(&path).unwrap_err();
            assert!(matches!(error, KeyFileError::Malformed(_) | KeyFileError::NotAKey { .. }), "{error:?}");
            assert!(text.is_empty() || !error.to_string().contains(text.trim()), "{error}");
        }
        assert!(matches!(load(&dir.path().join("none")), Err(KeyFileError::Missing(_))));
    }
}
