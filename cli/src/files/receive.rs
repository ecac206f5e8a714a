//! The payer's side: asks for a file and takes it in.

use std::time::{Duration, Instant};

use bytes::Bytes;
use tollway::Connection;
use tollway::rpc::{CallError, Rx, StreamError};
use tollway_protocol::payment::Usage;

use super::{FileError, FileReply, FilesClient, Sink, SinkError, code, item_bytes, reply_bytes, usage};
use crate::files::sink::Written;

/// Why a file did not come.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransferError {
    /// The payee does not serve it.
    #[error("the payee does not serve {name:?}: {error}")]
    Refused {
        /// The file's name.
        name: String,
        /// Why not.
        error: FileError,
    },
    /// The call failed.
    #[error("asking for the file failed: {0}")]
    Call(#[from] CallError),
    /// The payee could not read on.
    #[error("the payee could not read the file to its end")]
    Unreadable,
    /// The file changed while it was sent.
    #[error("the file became shorter while it was sent; try again")]
    Shrunk,
    /// The stream broke off.
    #[error("the transfer broke off: {0}")]
    Stream(#[from] StreamError),
    /// Other than so many bytes came.
    #[error("the payee announced {announced} bytes and sent {sent}")]
    WrongSize {
        /// The announced size in bytes.
        announced: u64,
        /// What came, in bytes.
        sent: u64,
    },
    /// The disk failed.
    #[error(transparent)]
    Sink(#[from] SinkError),
}

/// A file that the payee is about to send. Dropped, it stops the payee.
#[derive(Debug)]
pub(crate) struct Incoming {
    /// The file's size in bytes, as the payee says.
    pub(crate) size: u64,
    chunks: Rx<Bytes>,
    asked: Instant,
}

/// A file that has come.
#[derive(Debug)]
pub(crate) struct Received {
    /// On the disk.
    pub(crate) file: Written,
    /// The file's size in bytes.
    pub(crate) size: u64,
    /// From the request to the last byte.
    pub(crate) elapsed: Duration,
    /// What this side counted, by the rules of metering.
    pub(crate) usage: Usage,
}

/// Asks for a file.
///
/// # Errors
/// When the payee does not serve it, or the connection ends.
pub(crate) async fn request(connection: &Connection, name: &str) -> Result<Incoming, TransferError> {
    let asked = Instant::now();
    let files = FilesClient::from(connection.clone());
    let FileReply { size, chunks } = files.get(name.to_owned()).await.map_err(|error| match error.into_app() {
        Ok(error) => TransferError::Refused { name: name.to_owned(), error },
        Err(error) => TransferError::Call(error),
    })?;
    Ok(Incoming { size, chunks, asked })
}

impl Incoming {
    /// What the whole file will be metered as.
    pub(crate) fn usage(&self, name: &str) -> Usage {
        usage(name, self.size)
    }

    /// Takes the file in, and tells `progress` how many bytes came with each chunk.
    ///
    /// # Errors
    /// When not exactly the announced bytes come, or the disk fails.
    ///
    /// # Cancel safety
    /// Dropping the future stops the payee and deletes what was written.
    pub(crate) async fn save(
        mut self,
        mut sink: Sink,
        mut progress: impl FnMut(u64),
    ) -> Result<Received, TransferError> {
        let (mut sent, mut items, mut bytes_out) = (0, 0, reply_bytes(self.size));
        while let Some(chunk) = self.next().await? {
            items += 1;
            bytes_out += item_bytes(chunk.len());
            sent += chunk.len() as u64;
            if sent > self.size {
                break;
            }
            progress(chunk.len() as u64);
            sink.write(chunk).await?;
        }
        let elapsed = self.asked.elapsed();
        if sent != self.size {
            return Err(TransferError::WrongSize { announced: self.size, sent });
        }
        let usage = Usage { items, bytes_out, bytes_in: 0 };
        Ok(Received { file: sink.finish().await?, size: self.size, elapsed, usage })
    }

    async fn next(&mut self) -> Result<Option<Bytes>, TransferError> {
        self.chunks.recv().await.map_err(|error| match error {
            StreamError::Reset(code::UNREADABLE) => TransferError::Unreadable,
            StreamError::Reset(code::SHRUNK) => TransferError::Shrunk,
            error => TransferError::Stream(error),
        })
    }
}
