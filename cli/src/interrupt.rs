//! Ctrl-C and SIGTERM: the first asks a command to end in order, the second ends it at once.

use std::io;

use tokio::sync::watch;

/// Counts the signals of this process.
#[derive(Debug, Clone)]
pub(crate) struct Interrupts {
    count: watch::Receiver<u32>,
}

impl Interrupts {
    /// Takes the signals over from the system's default, which would end the process without a word.
    ///
    /// # Errors
    /// When the system does not let signals be handled.
    pub(crate) fn install() -> io::Result<Self> {
        let (sender, count) = watch::channel(0);
        let mut signals = Signals::new()?;
        tokio::spawn(async move {
            loop {
                signals.recv().await;
                sender.send_modify(|count| *count += 1);
            }
        });
        Ok(Interrupts { count })
    }

    /// Waits for the first signal, also if it has come already.
    pub(crate) async fn first(&self) {
        self.reached(1).await;
    }

    /// Waits for the second signal, also if it has come already.
    pub(crate) async fn second(&self) {
        self.reached(2).await;
    }

    async fn reached(&self, signals: u32) {
        let mut count = self.count.clone();
        if count.wait_for(|count| *count >= signals).await.is_err() {
            // Nobody counts any more: the runtime is going down, and this task with it.
            std::future::pending::<()>().await;
        }
    }
}

#[cfg(unix)]
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
}

#[cfg(unix)]
impl Signals {
    fn new() -> io::Result<Self> {
        use tokio::signal::unix::{SignalKind, signal};
        Ok(Signals { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    async fn recv(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(not(unix))]
struct Signals;

#[cfg(not(unix))]
impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Signals)
    }

    async fn recv(&mut self) {
        if tokio::signal::ctrl_c().await.is_err() {
            std::future::pending::<()>().await;
        }
    }
}
