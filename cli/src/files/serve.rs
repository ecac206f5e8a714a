//! The payee's side: one task for each fetch reads a block ahead of what it sends, and holds no thread while it waits.

use std::fs::File;
use std::io::{self, Read};

use bytes::{Bytes, BytesMut};
use tokio::task::{JoinHandle, spawn_blocking};
use tollway::rpc::{CallContext, StreamError, Tx, stream};

use super::{CHUNK, FileError, FileReply, Files, FilesServer, Shelf, code};

/// What is read at once. Two such blocks are in memory for each fetch: one is sent while the other is read.
const BLOCK: usize = 16 * CHUNK;

/// Serves the files of a [`Shelf`].
#[derive(Debug)]
pub(crate) struct FileService {
    shelf: Shelf,
}

impl FileService {
    /// The service of a shelf's files. A fetch waits for the disk, so it has a task of its own.
    pub(crate) fn new(shelf: Shelf) -> FilesServer<Self> {
        FilesServer::new(FileService { shelf }).inline_within(None)
    }
}

impl Files for FileService {
    async fn get(&self, cx: &CallContext, name: String) -> Result<FileReply, FileError> {
        let (shelf, wanted) = (self.shelf.clone(), name.clone());
        let found = spawn_blocking(move || shelf.find(&wanted)).await.unwrap_or(Err(FileError::Unreadable));
        let peer = cx.peer();
        let (file, size) = found.inspect_err(|error| tracing::warn!(%peer, ?name, %error, "a file was refused"))?;
        tracing::info!(%peer, ?name, size, "a file is fetched");
        let (sent, chunks) = stream();
        tokio::spawn(send(file, size, sent));
        Ok(FileReply { size, chunks })
    }
}

/// Sends so many bytes of a file, or breaks the stream off with the reason.
async fn send(file: File, size: u64, mut chunks: Tx<Bytes>) {
    let mut left = size;
    let mut spare = None;
    let mut reading = next_block(file, left, BytesMut::new());
    while let Some(block) = reading.take() {
        let (file, block) = match block.await.unwrap_or_else(|error| Err(io::Error::other(error))) {
            Ok(read) => read,
            Err(error) => {
                tracing::warn!(%error, "a file could not be read to its end");
                let shrunk = error.kind() == io::ErrorKind::UnexpectedEof;
                return chunks.reset(if shrunk { code::SHRUNK } else { code::UNREADABLE });
            }
        };
        left -= block.len() as u64;
        reading = next_block(file, left, spare.take().unwrap_or_default());
        let block = block.freeze();
        if let Err(error) = send_block(&block, &mut chunks).await {
            // The fetcher has gone, or has enough: that is its right.
            return tracing::debug!(%error, "a fetch ended early");
        }
        spare = block.try_into_mut().ok();
    }
    chunks.finish();
}

async fn send_block(block: &Bytes, chunks: &mut Tx<Bytes>) -> Result<(), StreamError> {
    for start in (0..block.len()).step_by(CHUNK) {
        chunks.send(block.slice(start..block.len().min(start + CHUNK))).await?;
    }
    Ok(())
}

type Reading = JoinHandle<io::Result<(File, BytesMut)>>;

/// Starts to read the next block, if there is one, into a buffer that may have served before.
fn next_block(mut file: File, left: u64, mut buffer: BytesMut) -> Option<Reading> {
    let bytes = usize::try_from(left).unwrap_or(BLOCK).min(BLOCK);
    if bytes == 0 {
        return None;
    }
    Some(spawn_blocking(move || {
        buffer.resize(bytes, 0);
        file.read_exact(&mut buffer)?;
        Ok((file, buffer))
    }))
}
