//! The thread that writes a file, and the group commit.

use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use redb::{Database, ReadTransaction, ReadableDatabase, WriteTransaction};
use tokio::sync::oneshot;

use super::DiskError;
use crate::failpoint::{broken, failpoint};
use crate::queue;

/// Changes that share a commit at most. A commit of 256 costs about twice one of a single change, and from there on the
/// time of a commit only grows with the changes in it.
const MAX_GROUP: usize = 256;
/// Changes that wait in the queue: four groups. Who comes later waits to enter it, in the order of coming.
const QUEUE: usize = 4 * MAX_GROUP;

/// Whether a change has changed anything. A group in which none has is not committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    Written,
    Nothing,
}

/// A file and the thread that writes it. Dropped, it finishes what is in the queue and lets the file go.
#[derive(Debug)]
pub(crate) struct Disk {
    database: Arc<Database>,
    failed: Arc<OnceLock<Arc<DiskError>>>,
    /// `None` only while this is being dropped.
    queue: Option<queue::Sender<Box<dyn Change>>>,
    thread: Option<JoinHandle<()>>,
}

/// One change on its way through the thread.
trait Change: Send {
    /// Makes the change in the group's transaction. After an error nothing of the group is written.
    fn make(&mut self, transaction: &WriteTransaction) -> Result<Effect, DiskError>;
    /// Says what has become of it. It is durable when `outcome` is `Ok`.
    fn answer(self: Box<Self>, outcome: Result<(), Arc<DiskError>>);
}

struct Asked<T, M, D> {
    make: Option<M>,
    made: Option<T>,
    durable: D,
    answer: oneshot::Sender<Result<T, DiskError>>,
}

impl<T, M, D> Change for Asked<T, M, D>
where
    T: Send,
    M: FnOnce(&WriteTransaction) -> Result<(T, Effect), DiskError> + Send,
    D: FnOnce(&T) + Send,
{
    fn make(&mut self, transaction: &WriteTransaction) -> Result<Effect, DiskError> {
        let make = self.make.take().expect("a change is made once");
        let (made, effect) = make(transaction)?;
        self.made = Some(made);
        Ok(effect)
    }

    fn answer(self: Box<Self>, outcome: Result<(), Arc<DiskError>>) {
        let Asked { made, durable, answer, .. } = *self;
        let said = match (outcome, made) {
            (Ok(()), Some(made)) => {
                durable(&made);
                Ok(made)
            }
            (Ok(()), None) => unreachable!("a group whose changes are not all made is not committed"),
            (Err(error), _) => Err(DiskError::Failed(error)),
        };
        // Who asked may have gone; what is durable stays.
        let _gone = answer.send(said);
    }
}

impl Disk {
    /// Starts the thread of a file. `name` is that of the thread.
    pub(crate) fn start(database: Database, name: &str) -> Result<Self, DiskError> {
        let (queue, changes) = queue::channel(format!("disk.{name}"), QUEUE);
        let database = Arc::new(database);
        let failed = Arc::new(OnceLock::new());
        let writer = Writer { database: database.clone(), failed: failed.clone() };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || writer.run(changes))?;
        Ok(Disk { database, failed, queue: Some(queue), thread: Some(thread) })
    }

    /// Fails when the file has failed before: then nothing of it may be shown or served.
    pub(crate) fn check(&self) -> Result<(), DiskError> {
        match self.failed.get() {
            None => Ok(()),
            Some(error) => Err(DiskError::Failed(error.clone())),
        }
    }

    /// Makes a change on the file's thread, together with others, and answers when it is durable. `durable` is called
    /// on that thread before the answer, in the order of the changes, also when nobody waits for it any more.
    ///
    /// # Cancel safety
    /// When the future is dropped, the change may or may not be made.
    pub(crate) async fn write<T: Send + 'static>(
        &self,
        make: impl FnOnce(&WriteTransaction) -> Result<(T, Effect), DiskError> + Send + 'static,
        durable: impl FnOnce(&T) + Send + 'static,
    ) -> Result<T, DiskError> {
        self.check()?;
        let (answer, answered) = oneshot::channel();
        let change = Box::new(Asked { make: Some(make), made: None, durable, answer });
        let queue = self.queue.as_ref().expect("only a drop takes it");
        if !queue.send(change).await {
            return Err(self.check().err().unwrap_or_else(stopped));
        }
        answered.await.unwrap_or_else(|_| Err(self.check().err().unwrap_or_else(stopped)))
    }

    /// Reads on a thread for blocking work: a page may have to come from the disk. It sees what is durable and no more.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&ReadTransaction) -> Result<T, DiskError> + Send + 'static,
    ) -> Result<T, DiskError> {
        self.check()?;
        let database = self.database.clone();
        let read = tokio::task::spawn_blocking(move || read(&database.begin_read()?)).await;
        // A group may have failed meanwhile; what was read was durable before.
        read.unwrap_or_else(|_| Err(stopped()))
    }
}

fn stopped() -> DiskError {
    DiskError::Corrupt("the file's thread has ended".to_owned())
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.queue = None;
        // At most one group is left to write. The lock on the file is gone when this returns.
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            // A panic there has been reported by its hook.
            let _panicked = thread.join();
        }
    }
}

struct Writer {
    database: Arc<Database>,
    failed: Arc<OnceLock<Arc<DiskError>>>,
}

impl Writer {
    fn run(self, mut changes: queue::Receiver<Box<dyn Change>>) {
        let mut group = Vec::with_capacity(MAX_GROUP);
        while changes.blocking_recv_many(&mut group, MAX_GROUP) > 0 {
            let outcome = match self.failed.get() {
                Some(error) => Err(error.clone()),
                None => self.commit(&mut group).map_err(|error| {
                    let error = Arc::new(error);
                    tracing::error!(%error, "a file failed; nothing more is read from it or written to it");
                    self.failed.get_or_init(|| error).clone()
                }),
            };
            for change in group.drain(..) {
                change.answer(outcome.clone());
            }
        }
    }

    /// One transaction and one fsync for all. Nothing of it is visible to a reader before it is durable.
    fn commit(&self, group: &mut Vec<Box<dyn Change>>) -> Result<(), DiskError> {
        let mut transaction = self.database.begin_write()?;
        let mut effect = Effect::Nothing;
        for change in group.iter_mut() {
            if change.make(&transaction)? == Effect::Written {
                effect = Effect::Written;
            }
        }
        if effect == Effect::Nothing {
            return Ok(transaction.abort()?);
        }
        if broken!("disk.answer-first") {
            group.drain(..).for_each(|change| change.answer(Ok(())));
        }
        if broken!("disk.lose-last") {
            transaction.set_durability(redb::Durability::None).map_err(redb::Error::from)?;
        }
        failpoint!("disk.before-commit");
        transaction.commit()?;
        failpoint!("disk.after-commit");
        Ok(())
    }
}
