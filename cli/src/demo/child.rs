//! A `tollway` process of the demo's.
//!
//! It ends with the demo, however that ends: it is killed when its handle is dropped, and it ends by itself when its
//! standard input does, which the system closes even when the demo is killed.

use std::ffi::OsStr;
use std::process::Stdio;
use std::time::Duration;

use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child as Process, ChildStdout, Command};

/// How long a server may take to be ready.
const READY: Duration = Duration::from_secs(20);
/// How long a server may take to end in order.
const END: Duration = Duration::from_secs(10);

/// Why a process of the demo's is of no use.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChildError {
    /// It could not be started.
    #[error("cannot start {name}: {source}")]
    Start {
        /// What it was to be.
        name: &'static str,
        /// What the system says.
        source: std::io::Error,
    },
    /// It ended, or said nothing, instead of being ready.
    #[error("{name} did not become ready; see what it says above")]
    NotReady {
        /// What it was to be.
        name: &'static str,
    },
    /// It said something else.
    #[error("{name} is ready but says it in an unknown way: {source}")]
    Unknown {
        /// What it was to be.
        name: &'static str,
        /// Why it is not understood.
        source: serde_json::Error,
    },
}

/// A running server.
#[derive(Debug)]
pub(super) struct Child {
    process: Process,
    /// Held open: a server that could not print would fail.
    _stdout: BufReader<ChildStdout>,
}

impl Child {
    /// Starts this same program with these arguments and waits for its line of JSON.
    ///
    /// # Errors
    /// When it does not become ready.
    pub(super) async fn start<R: DeserializeOwned>(
        name: &'static str,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<(Self, R), ChildError> {
        let start = |source| ChildError::Start { name, source };
        let mut command = Command::new(std::env::current_exe().map_err(start)?);
        command.args(arguments).args(["--json", "--exit-with-stdin"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true);
        // Ctrl-C on the terminal is for the demo alone, which still needs its servers to close the channel.
        #[cfg(unix)]
        command.process_group(0);
        let mut process = command.spawn().map_err(start)?;
        let stdout = process.stdout.take().ok_or(ChildError::NotReady { name })?;
        let mut stdout = BufReader::new(stdout);
        let mut line = String::new();
        let read = tokio::time::timeout(READY, stdout.read_line(&mut line)).await;
        if !matches!(read, Ok(Ok(1..))) {
            return Err(ChildError::NotReady { name });
        }
        let ready = serde_json::from_str(&line).map_err(|source| ChildError::Unknown { name, source })?;
        Ok((Child { process, _stdout: stdout }, ready))
    }

    /// Ends the server in order, or kills it when it does not end.
    pub(super) async fn stop(mut self) {
        drop(self.process.stdin.take());
        if tokio::time::timeout(END, self.process.wait()).await.is_err() {
            tracing::warn!("a server of the demo did not end and is killed");
        }
    }
}
