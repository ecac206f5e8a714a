//! Key files: an Ethereum keystore that a passphrase encrypts, or one line, `0x` and 64 hex digits; in either form readable by
//! their owner alone.
//!
//! A key is never printed and never overwritten, and a file that others can read is not used: who reads it can spend. A
//! passphrase comes from a file or from the terminal, never from the command line, which others on the machine can see.

use std::fs::{File, OpenOptions};
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tollway::keystore::{self, KeystoreError, MAX_KEYSTORE_BYTES};
use tollway_protocol::payment::{Address, Hex, SecretKey, SecretKeyError, parse_hex};
use zeroize::Zeroizing;

/// The longest passphrase, in bytes: what is longer in a passphrase file is no passphrase.
const MAX_PASSPHRASE_BYTES: u64 = 4096;

/// Where passphrases are read, when not on the terminal; from the command line, once.
static PASSPHRASE_FILE: OnceLock<PathBuf> = OnceLock::new();

/// Reads passphrases from this file.
pub(crate) fn set_passphrase_file(path: PathBuf) {
    // The command line is looked at once.
    let _again = PASSPHRASE_FILE.set(path);
}

/// How a key lies in its file.
pub(crate) enum Protection {
    /// As it is.
    Plain,
    /// Encrypted with this passphrase.
    Passphrase(Zeroizing<Vec<u8>>),
}

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
    #[error("there is no file {path}: make a key with `tollway key new {path}`", path = .0.display())]
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
    #[error("{} is not a key file: it must be an Ethereum keystore, or one line with 0x and 64 hex digits", .0.display())]
    Malformed(PathBuf),
    /// The number in the file is not a key.
    #[error("{} is not a key file: {source}", .path.display())]
    NotAKey {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: SecretKeyError,
    },
    /// The keystore cannot be read or made.
    #[error("{}: {source}", .path.display())]
    Keystore {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: KeystoreError,
    },
    /// The key is encrypted, and nobody can be asked for the passphrase.
    #[error("{}: its passphrase is needed: give --passphrase-file FILE, or start the command on a terminal", .0.display())]
    NoPassphrase(PathBuf),
    /// The terminal could not be read.
    #[error("cannot read a passphrase from the terminal: {0}")]
    Terminal(#[source] io::Error),
    /// Two different passphrases, or none.
    #[error("the passphrase is empty, or was not given the same twice")]
    BadPassphrase,
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
    write(&key, path, &Protection::Plain)?;
    Ok(key.address())
}

/// Writes a key into a new file that only the owner can read.
///
/// # Errors
/// When the file exists or cannot be written; then no half of a key is left.
pub(crate) fn write(key: &SecretKey, path: &Path, protection: &Protection) -> Result<(), KeyFileError> {
    let text = match protection {
        Protection::Plain => {
            let secret = Zeroizing::new(key.to_bytes());
            Zeroizing::new(Hex(secret.as_slice()).to_string())
        }
        Protection::Passphrase(passphrase) => Zeroizing::new(
            keystore::encrypt(key, passphrase)
                .map_err(|source| KeyFileError::Keystore { path: path.to_owned(), source })?,
        ),
    };
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => KeyFileError::Exists(path.to_owned()),
        _ => KeyFileError::Write { path: path.to_owned(), source },
    };
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(path).map_err(failed)?;
    let written = writeln!(file, "{}", *text).and_then(|()| file.sync_all());
    if let Err(error) = written {
        // The error of the write is the one to tell; a file without a whole key is of no use to anybody.
        let _ = std::fs::remove_file(path);
        return Err(failed(error));
    }
    Ok(())
}

/// Reads a key file, and asks for its passphrase if it has one.
///
/// # Errors
/// When it is not there, not a key file, open to others than its owner, or the passphrase is wrong.
pub(crate) fn load(path: &Path) -> Result<SecretKey, KeyFileError> {
    let text = read_private(path, MAX_KEYSTORE_BYTES as u64)?;
    if is_keystore(&text) {
        let passphrase = passphrase(path)?;
        return keystore::decrypt(&text, &passphrase)
            .map_err(|source| KeyFileError::Keystore { path: path.to_owned(), source });
    }
    let bytes = parse_hex(text.trim_end()).map(Zeroizing::new).map_err(|_| KeyFileError::Malformed(path.to_owned()))?;
    SecretKey::from_bytes(*bytes).map_err(|source| KeyFileError::NotAKey { path: path.to_owned(), source })
}

/// The address that an encrypted key file states beside its key; `None` for a plain one.
///
/// # Errors
/// When it is not there, not a key file, or open to others than its owner.
pub(crate) fn stated_address(path: &Path) -> Result<Option<Address>, KeyFileError> {
    let text = read_private(path, MAX_KEYSTORE_BYTES as u64)?;
    if !is_keystore(&text) {
        return Ok(None);
    }
    keystore::stated_address(&text).map_err(|source| KeyFileError::Keystore { path: path.to_owned(), source })
}

fn is_keystore(text: &str) -> bool {
    text.trim_start().starts_with('{')
}

/// The passphrase of a key file.
fn passphrase(of: &Path) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
    match PASSPHRASE_FILE.get() {
        Some(path) => passphrase_in(path),
        None if io::stdin().is_terminal() => ask(&format!("Passphrase of {}: ", of.display())),
        None => Err(KeyFileError::NoPassphrase(of.to_owned())),
    }
}

/// The passphrase for a new key file, asked twice on a terminal.
///
/// # Errors
/// When it is empty, differs, or cannot be asked for.
pub(crate) fn new_passphrase() -> Result<Protection, KeyFileError> {
    let passphrase = match PASSPHRASE_FILE.get() {
        Some(path) => passphrase_in(path)?,
        None if io::stdin().is_terminal() => {
            let (first, second) = (ask("New passphrase: ")?, ask("Once more: ")?);
            if first != second {
                return Err(KeyFileError::BadPassphrase);
            }
            first
        }
        None => return Err(KeyFileError::NoPassphrase(PathBuf::from("the new key file"))),
    };
    if passphrase.is_empty() { Err(KeyFileError::BadPassphrase) } else { Ok(Protection::Passphrase(passphrase)) }
}

fn ask(prompt: &str) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
    let typed = rpassword::prompt_password(prompt).map_err(KeyFileError::Terminal)?;
    Ok(Zeroizing::new(typed.into_bytes()))
}

/// The first line of a passphrase file: editors end it with a line feed, which belongs to no passphrase.
fn passphrase_in(path: &Path) -> Result<Zeroizing<Vec<u8>>, KeyFileError> {
    let text = read_private(path, MAX_PASSPHRASE_BYTES)?;
    Ok(Zeroizing::new(text.lines().next().unwrap_or_default().as_bytes().to_vec()))
}

/// Reads a file that others must not read, up to `limit` bytes.
fn read_private(path: &Path, limit: u64) -> Result<Zeroizing<String>, KeyFileError> {
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
    // In one piece, so that no smaller buffer with a part of it is left behind.
    let mut text = Zeroizing::new(String::with_capacity(MAX_KEYSTORE_BYTES + 1));
    match file.take(limit + 1).read_to_string(&mut text) {
        Ok(_) if text.len() as u64 <= limit => Ok(text),
        Ok(_) => Err(KeyFileError::Malformed(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(KeyFileError::Malformed(path.to_owned())),
        Err(error) => Err(failed(error)),
    }
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
