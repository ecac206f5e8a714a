//! Starting, stopping and killing the processes.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

use crate::roles::{Failure, Role};

/// How long a process may take until it is ready, on a loaded machine.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How often a process that is to die by itself is looked at.
const LOOK: Duration = Duration::from_millis(1);

/// What a process is started with.
#[derive(Debug, Clone)]
pub(crate) struct Start<'a> {
    pub(crate) role: Role,
    pub(crate) directory: &'a Path,
    pub(crate) ledger: SocketAddr,
    pub(crate) payee: SocketAddr,
    pub(crate) seed: u64,
    pub(crate) power: Option<u64>,
    /// The guard that is taken away.
    pub(crate) without: Option<&'a str>,
}

/// A running process. Dropped, it is killed.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) role: Role,
    child: Child,
    orders: ChildStdin,
    lines: mpsc::Receiver<String>,
    /// Where it listens, if it does.
    pub(crate) address: Option<SocketAddr>,
}

impl Process {
    /// Starts a process, and waits until it is ready.
    pub(crate) fn start(start: &Start<'_>) -> Result<Process, Failure> {
        let name = start.role.name();
        let log = start.directory.join(name).with_extension("log");
        let log: File = OpenOptions::new().create(true).append(true).open(log)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["role", name, "--directory"]).arg(start.directory);
        command.args(["--ledger", &start.ledger.to_string(), "--payee", &start.payee.to_string()]);
        command.args(["--seed", &start.seed.to_string()]);
        if let Some(seed) = start.power {
            command.args(["--power", &seed.to_string()]);
        }
        command.env_remove("TOLLWAY_FAILPOINT").env_remove("TOLLWAY_BREAK");
        if let Some(guard) = start.without {
            command.env("TOLLWAY_BREAK", guard);
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(log).spawn()?;
        let orders = child.stdin.take().ok_or("no standard input")?;
        let out = child.stdout.take().ok_or("no standard output")?;
        let (send, lines) = mpsc::channel();
        let read = move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        };
        std::thread::Builder::new().name(format!("{name} says")).spawn(read)?;
        let mut process = Process { role: start.role, child, orders, lines, address: None };
        process.wait_until_ready()?;
        Ok(process)
    }

    fn wait_until_ready(&mut self) -> Result<(), Failure> {
        let line = self.lines.recv_timeout(START_TIMEOUT);
        let line = line.map_err(|_| format!("the {} did not start; its log says why", self.role.name()))?;
        let mut words = line.split(' ');
        if words.next() != Some("ready") {
            return Err(format!("the {} says '{line}' at its start", self.role.name()).into());
        }
        self.address = words.next().map(str::parse).transpose()?;
        Ok(())
    }

    /// What it has said since.
    pub(crate) fn said(&self) -> impl Iterator<Item = String> + '_ {
        self.lines.try_iter()
    }

    /// Waits until it has said this.
    pub(crate) fn wait_for(&self, wanted: &str, timeout: Duration, mut others: impl FnMut(String)) -> bool {
        let until = Instant::now() + timeout;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) if line == wanted => return true,
                Ok(line) => others(line),
                Err(_) => return false,
            }
        }
    }

    pub(crate) fn order(&mut self, line: &str) {
        // It has died: who asks finds out by its end.
        let _dead = writeln!(self.orders, "{line}");
    }

    /// Waits for it to die by itself.
    pub(crate) fn wait_for_death(&mut self, timeout: Duration) -> Result<Option<ExitStatus>, Failure> {
        let until = Instant::now() + timeout;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= until {
                return Ok(None);
            }
            std::thread::sleep(LOOK);
        }
    }

    /// SIGKILL, and its end.
    pub(crate) fn kill(&mut self) -> Result<(), Failure> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    fn pid(&self) -> Result<Pid, Failure> {
        let id = i32::try_from(self.child.id())?;
        Ok(Pid::from_raw(id).ok_or("a process without a number")?)
    }

    /// Stops it where it is, and waits until all of its threads stand still.
    pub(crate) fn freeze(&self) -> Result<(), Failure> {
        kill_process(self.pid()?, Signal::STOP)?;
        match waitpid(Some(self.pid()?), WaitOptions::UNTRACED)? {
            Some((_, status)) if status.stopped() => Ok(()),
            _ => Err(format!("the {} has died by itself; its log says why", self.role.name()).into()),
        }
    }

    pub(crate) fn thaw(&self) -> Result<(), Failure> {
        Ok(kill_process(self.pid()?, Signal::CONT)?)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may be dead already.
        let _dead = self.kill();
    }
}
