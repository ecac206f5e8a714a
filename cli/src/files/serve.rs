//! The payee's side: one task for each fetch reads a block ahead of what it sends, and holds no thread while it waits.

use std::fs::File;
use std::io::{self, Read};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::task::{JoinHandle, spawn_blocking};
use tollway::rpc::{BoxReply, IncomingCall, Reply, Service, StreamError, Tx, stream};

use super::{CHUNK, FileError, FileReply, SERVICE, Shelf, code, method};

/// What is read at once. Two such blocks are in memory for each fetch: one is sent while the other is read.
const BLOCK: usize = 16 * CHUNK;

/// Serves the files of a [`Shelf`].
#[derive(Debug)]
pub(crate) struct FileService {
    shelf: Shelf,
}

impl FileService {
    pub(crate) fn new(shelf: Shelf) -> Self {
        FileService { shelf }
    }
}

impl Service for FileService {
    fn name(&self) -> &str {
        SERVICE
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        if call.method() != method() {
            return Reply::unknown_method().boxed();
        }
        let (shelf, peer) = (self.shelf.clone(), call.context().peer().to_string());
        Box::pin(async move {
            let name: String = match call.args() {
                Ok(name) => name,
                Err(error) => return Reply::invalid_payload(&error),
            };
            let found = {
                let name = name.clone();
                spawn_blocking(move || shelf.find(&name)).await.unwrap_or(Err(FileError::Unreadable))
            };
            match found {
                Ok((file, size)) => {
                    tracing::info!(%peer, ?name, size, "a file is fetched");
                    let (chunks, rx) = stream();
                    let reply = Reply::ok(&FileReply { size, chunks: rx });
                    tokio::spawn(send(file, size, chunks));
                    reply
                }
                Err(error) => {
                    tracing::warn!(%peer, ?name, %error, "a file was refused");
                    Reply::error(&error)
                }
            }
        })
    }

    fn inline_within(&self) -> Option<Duration> {
        // A fetch waits for the disk.
        None
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
