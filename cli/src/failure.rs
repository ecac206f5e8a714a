//! How a command ends when it does not succeed, and the exit code that says so.

use std::error::Error;
use std::process::ExitCode;

/// Why a command did not do what it was told.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Somebody pressed Ctrl-C, or the process was told to terminate.
    Interrupted,
    /// It failed, and this is why.
    Failed(Box<dyn Error + Send + Sync>),
}

impl Failure {
    /// 130 after an interrupt, as shells expect; 1 for the rest. Wrong usage is 2, which the parser answers itself.
    pub(crate) fn exit_code(&self) -> ExitCode {
        match self {
            Failure::Interrupted => ExitCode::from(130),
            Failure::Failed(_) => ExitCode::FAILURE,
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Failure::Interrupted => f.write_str("interrupted"),
            Failure::Failed(error) => error.fmt(f),
        }
    }
}

impl<E: Error + Send + Sync + 'static> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::Failed(Box::new(error))
    }
}
