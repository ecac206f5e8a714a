//! Processes that cannot outlive their test, and a payee with a ledger to fetch from.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tollway::conduit::endpoint::Endpoint;
use tollway::escrow::{Escrow, EscrowChannel, LedgerClient};
use tollway_protocol::payment::{Address, Amount, ChannelId};

/// Nothing here takes a tenth of it, even in a debug build on a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What a process did.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    #[track_caller]
    pub(crate) fn success(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:?}");
        self
    }

    #[track_caller]
    pub(crate) fn failure(self) -> Self {
        assert_eq!(self.code, Some(1), "{self:?}");
        self
    }

    /// The one JSON object on standard output.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// A process that is killed when it is dropped.
pub(crate) struct Running {
    child: Child,
    stdout: mpsc::Receiver<String>,
    stderr: mpsc::Receiver<String>,
}

impl Running {
    pub(crate) fn start(arguments: &[impl AsRef<OsStr>]) -> Self {
        Running::start_with(env!("CARGO_BIN_EXE_tollway"), arguments)
    }

    /// Starts another program, such as a shell that sets limits and becomes the command.
    pub(crate) fn start_with(program: &str, arguments: &[impl AsRef<OsStr>]) -> Self {
        Running::spawn(Command::new(program).args(arguments))
    }

    /// As [`start`](Self::start), with what the command logs for those who look into it.
    pub(crate) fn start_logging(arguments: &[impl AsRef<OsStr>]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tollway"));
        Running::spawn(command.env("RUST_LOG", "tollway=debug").args(arguments))
    }

    fn spawn(command: &mut Command) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdout = lines(child.stdout.take().unwrap());
        let stderr = lines(child.stderr.take().unwrap());
        Running { child, stdout, stderr }
    }

    /// The next line on standard output.
    #[track_caller]
    pub(crate) fn line(&mut self) -> String {
        match self.stdout.recv_timeout(PATIENCE) {
            Ok(line) => line,
            Err(_) => panic!("no line: {}", self.stderr.try_iter().collect::<String>()),
        }
    }

    /// Waits for a line on standard error.
    #[track_caller]
    pub(crate) fn wait_for_note(&mut self, is_it: impl Fn(&str) -> bool) {
        while let Ok(line) = self.stderr.recv_timeout(PATIENCE) {
            if is_it(&line) {
                return;
            }
        }
        panic!("it does not say so");
    }

    #[cfg(unix)]
    pub(crate) fn interrupt(&self) {
        let status = Command::new("kill").args(["-INT", &self.child.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Waits for the end.
    #[track_caller]
    pub(crate) fn end(mut self) -> Outcome {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break status,
                None if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
                None => panic!("it does not end: {}", self.stderr.try_iter().collect::<String>()),
            }
        };
        // The process is gone, so both end.
        let (stdout, stderr) = (self.stdout.iter().collect(), self.stderr.iter().collect());
        Outcome { code: status.code(), stdout, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Fails only if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads on a thread of its own, so that no wait is for ever and no pipe gets full.
fn lines(from: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut line = String::new();
        while from.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
            if sender.send(std::mem::take(&mut line)).is_err() {
                break;
            }
        }
    });
    receiver
}

/// Runs the command to its end.
#[track_caller]
pub(crate) fn tollway(arguments: &[impl AsRef<OsStr>]) -> Outcome {
    Running::start(arguments).end()
}

/// A directory with a payee's and a payer's key, and a payee that sells what is in `files/`.
pub(crate) struct Shop {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) payee: Running,
    pub(crate) url: String,
    pub(crate) address: Option<Address>,
    ledger: Option<Endpoint>,
}

impl Shop {
    /// Sells at this price, with a ledger beside the files.
    pub(crate) fn open(price: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).into_os_string();
        std::fs::create_dir(path("files")).unwrap();
        std::fs::create_dir(path("out")).unwrap();
        for key in ["payee.key", "payer.key"] {
            tollway(&["keygen".into(), path(key)]).success();
        }
        let mut arguments =
            ["serve", "--listen", "tcp://127.0.0.1:0", "--json", "--price", price, "--dir"].map(Into::into).to_vec();
        arguments.push(path("files"));
        if price != "0" {
            arguments.extend(["--key".into(), path("payee.key"), "--dev-ledger".into()]);
        }
        let mut payee = Running::start(&arguments);
        let ready: Value = serde_json::from_str(&payee.line()).unwrap();
        let text = |name: &str| ready[name].as_str().map(str::to_owned);
        let address = text("payee").map(|text| text.parse().unwrap());
        let ledger = text("ledger").map(|text| text.parse().unwrap());
        Shop { url: text("url").unwrap(), dir, payee, address, ledger }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Puts a file of so many bytes up for sale, and returns them.
    pub(crate) fn stock(&self, name: &str, size: usize) -> Vec<u8> {
        let bytes: Vec<u8> = (0..size).map(|at| (at * 31 + at / 251) as u8).collect();
        std::fs::write(self.path("files").join(name), &bytes).unwrap();
        bytes
    }

    /// The arguments of a fetch to `out/NAME`.
    pub(crate) fn fetch(&self, name: &str, more: &[&str]) -> Vec<String> {
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let mut arguments = vec!["fetch".to_owned(), format!("{}/{name}", self.url), "--json".to_owned()];
        arguments.extend(["-o".to_owned(), text(&self.path("out").join("got"))]);
        if self.address.is_some() {
            arguments.extend(["--key".to_owned(), text(&self.path("payer.key"))]);
        }
        arguments.extend(more.iter().map(ToString::to_string));
        arguments
    }

    /// As [`fetch`](Self::fetch), with the right payee and a budget.
    pub(crate) fn paid_fetch(&self, name: &str, budget: u64) -> Vec<String> {
        let (payee, budget) = (self.address.unwrap().to_string(), budget.to_string());
        self.fetch(name, &["--payee", &payee, "--budget", &budget])
    }

    /// The file that was fetched.
    pub(crate) fn got(&self) -> Vec<u8> {
        std::fs::read(self.path("out").join("got")).unwrap()
    }

    /// What lies where files are fetched to, partial files included.
    pub(crate) fn out(&self) -> Vec<PathBuf> {
        std::fs::read_dir(self.path("out")).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    /// What the ledger says of the channel of a report.
    #[track_caller]
    pub(crate) fn channel(&self, report: &Value) -> EscrowChannel {
        let id: ChannelId = report["channel_id"].as_str().unwrap_or_else(|| panic!("{report}")).parse().unwrap();
        self.ask(async |ledger: LedgerClient| Escrow::channel(&ledger, id).await.unwrap().unwrap())
    }

    /// What the ledger has in an account, in the token of these tests.
    pub(crate) fn balance(&self, holder: Address, token: Address) -> Amount {
        self.ask(async |ledger: LedgerClient| ledger.balance(holder, token).await.unwrap())
    }

    fn ask<T>(&self, question: impl AsyncFnOnce(LedgerClient) -> T) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let ledger = self.ledger.as_ref().unwrap();
        let ask = async { question(LedgerClient::connect(ledger).await.unwrap()).await };
        runtime.block_on(async { tokio::time::timeout(PATIENCE, ask).await.unwrap() })
    }
}

/// A sum of a report.
#[track_caller]
pub(crate) fn sum(report: &Value, name: &str) -> u128 {
    let text = report[name].as_str().unwrap_or_else(|| panic!("{name} is no decimal string: {report}"));
    text.parse().unwrap()
}
