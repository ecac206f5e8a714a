//! Where a fetched file is written: complete under its name, or absent.
//!
//! Bytes go to `NAME.partial-XXXXXX` in the same directory, which is synced and renamed when all have come, and deleted
//! when the [`Sink`] is dropped before. A thread of its own writes and hashes, fed by a queue of a few MiB, so that
//! neither the disk nor the hash holds up the session.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tempfile::{NamedTempFile, TempPath};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, spawn_blocking};

/// Bytes that are handed to the writer at once: one wake-up for 16 chunks.
const BATCH: usize = 1 << 20;
/// Batches that may wait for the writer.
const QUEUE: usize = 4;

/// Why a file could not be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SinkError {
    /// There is something that must not be replaced.
    #[error("{} is not a regular file, so it is not replaced", .0.display())]
    NotAFile(PathBuf),
    /// The name has no last part, or its directory is not there.
    #[error("cannot write to {}: {source}", .path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// Whether the hash of the bytes is wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hashing {
    /// Nobody asked: it would cost the writer half of its speed.
    No,
    /// SHA-256.
    Sha256,
}

/// A file that is being written.
#[derive(Debug)]
pub(crate) struct Sink {
    target: PathBuf,
    /// Dropped, it deletes the file.
    partial: TempPath,
    batch: Vec<Bytes>,
    batched: usize,
    queue: mpsc::Sender<Vec<Bytes>>,
    writer: JoinHandle<io::Result<Option<[u8; 32]>>>,
}

/// A file that is written and on the disk, and not yet under its name. Dropped, it is deleted.
#[derive(Debug)]
pub(crate) struct Written {
    target: PathBuf,
    partial: TempPath,
    /// The hash, if it was wanted.
    pub(crate) sha256: Option<[u8; 32]>,
}

/// Refuses a target that is there and not a regular file: a rename would replace a device or fail on a directory, after
/// everything was paid for.
///
/// # Errors
/// [`SinkError::NotAFile`].
pub(crate) fn check_target(target: &Path) -> Result<(), SinkError> {
    match target.metadata() {
        Ok(metadata) if !metadata.is_file() => Err(SinkError::NotAFile(target.to_owned())),
        _ => Ok(()),
    }
}

impl Sink {
    /// Makes the partial file beside `target`.
    ///
    /// # Errors
    /// When that is not possible.
    pub(crate) fn create(target: &Path, hashing: Hashing) -> Result<Self, SinkError> {
        check_target(target)?;
        let failed = |source| SinkError::Write { path: target.to_owned(), source };
        let mut prefix = target.file_name().ok_or_else(|| failed(io::ErrorKind::IsADirectory.into()))?.to_owned();
        prefix.push(".partial-");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix);
        // As any file that is made here, by the user's mask: a temporary file would be the owner's alone.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let partial: NamedTempFile = builder.tempfile_in(directory(target)).map_err(failed)?;
        let (file, partial) = partial.into_parts();
        let (queue, batches) = mpsc::channel(QUEUE);
        let writer = spawn_blocking(move || write(file, batches, hashing));
        Ok(Sink { target: target.to_owned(), partial, batch: Vec::new(), batched: 0, queue, writer })
    }

    /// Takes bytes; waits while the disk is slower.
    ///
    /// # Errors
    /// When the disk failed.
    pub(crate) async fn write(&mut self, bytes: Bytes) -> Result<(), SinkError> {
        self.batched += bytes.len();
        self.batch.push(bytes);
        if self.batched < BATCH { Ok(()) } else { self.hand_over().await }
    }

    async fn hand_over(&mut self) -> Result<(), SinkError> {
        self.batched = 0;
        if self.queue.send(std::mem::take(&mut self.batch)).await.is_ok() {
            return Ok(());
        }
        // The writer takes no more: it ended with an error.
        let error = match (&mut self.writer).await {
            Ok(Err(error)) => error,
            Ok(Ok(_)) => io::ErrorKind::BrokenPipe.into(),
            Err(error) => io::Error::other(error),
        };
        Err(self.failed(error))
    }

    /// All bytes were given: waits until they are on the disk.
    ///
    /// # Errors
    /// When the disk failed.
    pub(crate) async fn finish(mut self) -> Result<Written, SinkError> {
        self.hand_over().await?;
        let Sink { target, partial, queue, writer, .. } = self;
        drop(queue);
        match writer.await.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(sha256) => Ok(Written { target, partial, sha256 }),
            Err(source) => Err(SinkError::Write { path: target, source }),
        }
    }

    fn failed(&self, source: io::Error) -> SinkError {
        SinkError::Write { path: self.target.clone(), source }
    }
}

impl Written {
    /// Gives the file its name, in place of one that had it.
    ///
    /// # Errors
    /// When that is not possible; then the file is deleted.
    pub(crate) fn keep(self) -> Result<(), SinkError> {
        let Written { target, partial, .. } = self;
        let kept = partial.persist(&target).map_err(|error| error.error).and_then(|()| sync_directory(&target));
        kept.map_err(|source| SinkError::Write { path: target, source })
    }
}

fn directory(target: &Path) -> &Path {
    match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Makes the new name survive a loss of power.
fn sync_directory(target: &Path) -> io::Result<()> {
    if cfg!(unix) { File::open(directory(target))?.sync_all() } else { Ok(()) }
}

/// Writes what comes until the queue is closed. If that was a drop of the sink, the file is deleted already.
fn write(mut file: File, mut batches: mpsc::Receiver<Vec<Bytes>>, hashing: Hashing) -> io::Result<Option<[u8; 32]>> {
    let mut sha256 = (hashing == Hashing::Sha256).then(Sha256::new);
    while let Some(batch) = batches.blocking_recv() {
        for bytes in batch {
            if let Some(sha256) = &mut sha256 {
                sha256.update(&bytes);
            }
            file.write_all(&bytes)?;
        }
    }
    file.sync_all()?;
    Ok(sha256.map(|sha256| sha256.finalize().into()))
}
