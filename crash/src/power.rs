//! A disk that loses power with its process.
//!
//! A killed process loses nothing that it has written: the kernel has it. So that a kill is also a failure of the
//! power, this disk keeps what was written and not synced in its own memory, and the file has what was synced; of the
//! rest it has the sectors that the seed picks, since a real disk may have written any of them. A kill within a sync leaves
//! a part of it.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use parking_lot::Mutex;
use tollway::disk::StorageBackend;
use tollway::failpoint::is_broken;

use crate::scene::Random;

/// What a disk writes at once.
const SECTOR: usize = 512;

#[derive(Debug)]
struct State {
    /// As the process sees it.
    data: Vec<u8>,
    /// The sectors by offset that the file has not got yet.
    unsynced: BTreeMap<usize, usize>,
    random: Random,
}

/// See the head of the module.
#[derive(Debug)]
pub(crate) struct PowerDisk {
    file: File,
    state: Mutex<State>,
}

impl PowerDisk {
    /// On a file, as it is when the power comes back.
    pub(crate) fn open(path: &Path, seed: u64) -> io::Result<Self> {
        let data = std::fs::read(path)?;
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let state = State { data, unsynced: BTreeMap::new(), random: Random::new(seed) };
        Ok(PowerDisk { file, state: Mutex::new(state) })
    }
}

impl StorageBackend for PowerDisk {
    fn len(&self) -> io::Result<u64> {
        Ok(self.state.lock().data.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let state = self.state.lock();
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let from = state.data.get(start..).and_then(|data| data.get(..out.len()));
        out.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut state = self.state.lock();
        let length = usize::try_from(len).map_err(io::Error::other)?;
        state.data.resize(length, 0);
        state.unsynced.retain(|offset, _| *offset < length);
        // A file may grow before the sync; cut off at once, it would lose what was synced.
        if len > self.file.metadata()?.len() { self.file.set_len(len) } else { Ok(()) }
    }

    fn sync_data(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        if is_broken("disk.lie") {
            return Ok(());
        }
        let unsynced = std::mem::take(&mut state.unsynced);
        for (offset, length) in unsynced {
            let end = (offset + length).min(state.data.len());
            self.file.write_all_at(&state.data[offset..end], offset as u64)?;
        }
        self.file.set_len(state.data.len() as u64)
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut state = self.state.lock();
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let end = start + bytes.len();
        if state.data.len() < end {
            state.data.resize(end, 0);
        }
        state.data[start..end].copy_from_slice(bytes);
        for (at, sector) in bytes.chunks(SECTOR).enumerate() {
            let offset = start + at * SECTOR;
            if !is_broken("disk.lie") && state.random.percent(25) {
                self.file.write_all_at(sector, offset as u64)?;
                state.unsynced.remove(&offset);
            } else {
                let longest = state.unsynced.entry(offset).or_default();
                *longest = sector.len().max(*longest);
            }
        }
        Ok(())
    }
}
