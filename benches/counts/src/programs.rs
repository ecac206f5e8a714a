//! The programs that are run: the two that do the work, and valgrind's.

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tollway_counts::Workload;

/// Why nothing was counted.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error("{program} cannot be run: {source}{hint}")]
    NotRun { program: String, source: io::Error, hint: &'static str },
    #[error("{program} failed, {status}:\n{stderr}")]
    Failed { program: String, status: std::process::ExitStatus, stderr: String },
    #[error("{program} printed what is no count:\n{output}")]
    NotUnderstood { program: String, output: String },
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{} is no record: {source}", path.display())]
    Record { path: PathBuf, source: serde_json::Error },
}

/// Runs what was built together with this program.
pub(crate) struct Programs {
    directory: PathBuf,
}

impl Programs {
    pub(crate) fn beside_this_one() -> Result<Self, Failure> {
        let this = std::env::current_exe().map_err(|source| Failure::File { path: "this program".into(), source })?;
        Ok(Programs { directory: this.parent().unwrap_or(Path::new(".")).to_owned() })
    }

    /// The program that does the work and counts nothing.
    pub(crate) fn work(&self) -> PathBuf {
        self.directory.join("tollway-counts-work")
    }

    /// Allocations of all units of a workload.
    pub(crate) fn allocations(&self, workload: Workload) -> Result<u64, Failure> {
        let program = self.directory.join("tollway-counts-allocations");
        let units = workload.units().to_string();
        let printed = output(Command::new(&program).args([workload.name(), &units]))?;
        let not_understood =
            |_| Failure::NotUnderstood { program: program.display().to_string(), output: printed.clone() };
        printed.trim().parse().map_err(not_understood)
    }

    /// The compiler, on which the counts depend.
    pub(crate) fn compiler(&self) -> Result<String, Failure> {
        Ok(output(Command::new("rustc").arg("--version"))?.trim().to_owned())
    }
}

/// Runs a program to its end, and returns what it printed.
pub(crate) fn output(command: &mut Command) -> Result<String, Failure> {
    let program = command.get_program().to_string_lossy().into_owned();
    let Output { status, stdout, stderr } = command.output().map_err(|source| {
        let valgrind = program == "valgrind" || program == "callgrind_annotate";
        let hint = if valgrind { ": install valgrind (apt-get install valgrind)" } else { "" };
        Failure::NotRun { program: program.clone(), source, hint }
    })?;
    if !status.success() {
        return Err(Failure::Failed { program, status, stderr: String::from_utf8_lossy(&stderr).into_owned() });
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}
