//! Disks that fail on purpose, and disks that remember what a crash would leave of them.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tollway::disk::StorageBackend;

/// What a disk writes at once: a crash may leave the first sectors of a write and not the others.
const SECTOR: usize = 512;

/// A disk in memory that has room for so many more writes and syncs, and then is full.
#[derive(Debug, Clone)]
pub(crate) struct FullDisk {
    data: Arc<Mutex<Vec<u8>>>,
    left: Arc<AtomicU64>,
}

impl FullDisk {
    pub(crate) fn new() -> Self {
        FullDisk { data: Arc::default(), left: Arc::new(AtomicU64::new(u64::MAX)) }
    }

    /// From now on so many writes and syncs succeed.
    pub(crate) fn fail_after(&self, operations: u64) {
        self.left.store(operations, Ordering::SeqCst);
    }

    /// The same bytes on a disk that has room again, as after an operator has made some.
    pub(crate) fn with_room(&self) -> FullDisk {
        FullDisk { data: Arc::new(Mutex::new(self.data.lock().clone())), left: Arc::new(AtomicU64::new(u64::MAX)) }
    }

    fn room(&self) -> io::Result<()> {
        let take = |left: u64| if left == u64::MAX { Some(left) } else { left.checked_sub(1) };
        match self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, take) {
            Ok(_) => Ok(()),
            Err(_) => Err(io::ErrorKind::StorageFull.into()),
        }
    }
}

fn read_at(data: &[u8], offset: u64, out: &mut [u8]) -> io::Result<()> {
    let start = usize::try_from(offset).map_err(io::Error::other)?;
    let from = data.get(start..).and_then(|data| data.get(..out.len())).ok_or(io::ErrorKind::UnexpectedEof)?;
    out.copy_from_slice(from);
    Ok(())
}

fn write_at(data: &mut Vec<u8>, offset: usize, bytes: &[u8]) {
    if data.len() < offset + bytes.len() {
        data.resize(offset + bytes.len(), 0);
    }
    data[offset..offset + bytes.len()].copy_from_slice(bytes);
}

impl StorageBackend for FullDisk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.data.lock().len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        read_at(&self.data.lock(), offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.data.lock().resize(len as usize, 0);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.room()
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.room()?;
        write_at(&mut self.data.lock(), offset as usize, bytes);
        Ok(())
    }
}

/// A change of a file that no sync has made durable yet.
#[derive(Debug, Clone)]
enum Unsynced {
    Write { offset: usize, bytes: Vec<u8> },
    Length(usize),
}

/// What was on the disk for certain when it was synced, what else had been written, and what `promises` held then.
#[derive(Debug, Clone)]
pub(crate) struct SyncPoint<P> {
    durable: Vec<u8>,
    unsynced: Vec<Unsynced>,
    pub(crate) promised: P,
}

impl<P> SyncPoint<P> {
    /// What a crash at this point leaves: all that is durable, and of the rest the sectors that `survives` picks.
    pub(crate) fn image(&self, mut survives: impl FnMut() -> bool) -> Vec<u8> {
        let mut image = self.durable.clone();
        for change in &self.unsynced {
            match change {
                Unsynced::Length(length) if survives() => image.resize(*length, 0),
                Unsynced::Length(_) => {}
                Unsynced::Write { offset, bytes } => {
                    for (at, sector) in bytes.chunks(SECTOR).enumerate() {
                        if survives() {
                            write_at(&mut image, offset + at * SECTOR, sector);
                        }
                    }
                }
            }
        }
        image
    }
}

#[derive(Debug)]
struct Tape<P> {
    /// As the process sees it.
    data: Vec<u8>,
    durable: Vec<u8>,
    unsynced: Vec<Unsynced>,
    points: Vec<SyncPoint<P>>,
}

/// A disk that keeps what a crash would leave of it before each of its syncs, beside what had been promised until then.
#[derive(Debug)]
pub(crate) struct CrashDisk<P> {
    tape: Arc<Mutex<Tape<P>>>,
    promises: Arc<Mutex<P>>,
}

impl<P> Clone for CrashDisk<P> {
    fn clone(&self) -> Self {
        CrashDisk { tape: self.tape.clone(), promises: self.promises.clone() }
    }
}

impl<P: Clone> CrashDisk<P> {
    pub(crate) fn new(promises: Arc<Mutex<P>>) -> Self {
        let tape = Tape { data: Vec::new(), durable: Vec::new(), unsynced: Vec::new(), points: Vec::new() };
        CrashDisk { tape: Arc::new(Mutex::new(tape)), promises }
    }

    /// Forgets the points so far: what follows starts from a file that is there.
    pub(crate) fn rewind(&self) {
        self.tape.lock().points.clear();
    }

    pub(crate) fn points(&self) -> Vec<SyncPoint<P>> {
        self.tape.lock().points.clone()
    }
}

impl<P: Clone + Send + std::fmt::Debug + 'static> StorageBackend for CrashDisk<P> {
    fn len(&self) -> io::Result<u64> {
        Ok(self.tape.lock().data.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        read_at(&self.tape.lock().data, offset, out)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut tape = self.tape.lock();
        tape.data.resize(len as usize, 0);
        tape.unsynced.push(Unsynced::Length(len as usize));
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        // What is promised while the sync runs depends on it; so the promises come first.
        let promised = self.promises.lock().clone();
        let mut tape = self.tape.lock();
        let unsynced = std::mem::take(&mut tape.unsynced);
        let durable = tape.durable.clone();
        tape.points.push(SyncPoint { durable, unsynced, promised });
        tape.durable = tape.data.clone();
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut tape = self.tape.lock();
        write_at(&mut tape.data, offset as usize, bytes);
        tape.unsynced.push(Unsynced::Write { offset: offset as usize, bytes: bytes.to_vec() });
        Ok(())
    }
}

/// A disk with these bytes on it.
pub(crate) fn disk_with(bytes: Vec<u8>) -> FullDisk {
    FullDisk { data: Arc::new(Mutex::new(bytes)), left: Arc::new(AtomicU64::new(u64::MAX)) }
}

/// A generator of its seed's numbers, the same each time.
pub(crate) struct Seeded(u64);

impl Seeded {
    pub(crate) fn new(seed: u64) -> Self {
        Seeded(seed.wrapping_mul(2).wrapping_add(1))
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) % bound
    }
}

/// What was promised, by name: the least number that must be there.
pub(crate) type Promises<K> = Arc<Mutex<BTreeMap<K, u64>>>;
