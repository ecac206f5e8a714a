//! Opening files, and making new ones that are whole or absent.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use redb::backends::FileBackend;
use redb::{Builder, Database, ReadableDatabase, ReadableTable, StorageBackend};

use super::{DiskError, Table};

/// What a file says of itself: its kind and its format.
const ABOUT: Table = Table::new("about");
const KIND: &[u8] = b"kind";
const FORMAT: &[u8] = b"format";

/// The layout of tables that this version writes.
const FILE_FORMAT: u32 = 1;

/// Pages that are kept in memory. A record has about 1.5 KiB and its branch of the tree stays, so this has room for some
/// ten thousand channels in use at once; what is not in it comes from the system's cache.
const CACHE_BYTES: usize = 64 << 20;

/// What a file is for. A wallet is never taken for a ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FileKind {
    Payee,
    Wallet,
    Ledger,
}

impl FileKind {
    pub(crate) const ALL: [FileKind; 3] = [FileKind::Payee, FileKind::Wallet, FileKind::Ledger];

    /// For people, and in the file.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            FileKind::Payee => "a payee's store",
            FileKind::Wallet => "a payer's wallet",
            FileKind::Ledger => "a ledger",
        }
    }
}

fn builder() -> Builder {
    let mut builder = Builder::new();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

/// Opens a file of a kind. With `create` one is made if there is none.
pub(crate) fn open_file(path: &Path, kind: FileKind, create: bool) -> Result<Database, DiskError> {
    if create && !path.exists() {
        make_file(path, |database| mark(database, kind))?;
    }
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    if file.metadata()?.len() == 0 {
        return Err(DiskError::OtherKind { expected: kind.name(), found: "an empty file".to_owned() });
    }
    let database = builder().create_with_backend(FileBackend::new(file)?)?;
    check(&database, kind)?;
    Ok(database)
}

/// Opens a kind of file on a backend, which may be empty.
pub(crate) fn open_backend(backend: impl StorageBackend, kind: FileKind) -> Result<Database, DiskError> {
    let database = builder().create_with_backend(backend)?;
    if format_of(&database)?.is_none() {
        mark(&database, kind)?;
    }
    check(&database, kind)?;
    Ok(database)
}

/// Makes a file under a name beside, fills it, and gives it its own name when it is whole and durable. Only its owner
/// can read it: who has traded what with whom is nobody else's business.
pub(crate) fn make_file(path: &Path, fill: impl FnOnce(&Database) -> Result<(), DiskError>) -> Result<(), DiskError> {
    let new = beside(path);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let backend = FileBackend::new(options.open(&new)?)?;
    let made = builder().create_with_backend(backend).map_err(DiskError::from).and_then(|database| {
        fill(&database)?;
        Ok(database.close()?)
    });
    if let Err(error) = made {
        // The error is what there is to tell; half a file is of no use to anybody.
        let _ = std::fs::remove_file(&new);
        return Err(error);
    }
    std::fs::rename(&new, path)?;
    sync_directory(path)?;
    Ok(())
}

fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    PathBuf::from(name)
}

/// The name of a new file is durable when its directory is.
fn sync_directory(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    if cfg!(unix) { File::open(parent)?.sync_all() } else { Ok(()) }
}

fn mark(database: &Database, kind: FileKind) -> Result<(), DiskError> {
    let transaction = database.begin_write()?;
    {
        let mut about = transaction.open_table(ABOUT)?;
        about.insert(KIND, kind.name().as_bytes())?;
        about.insert(FORMAT, FILE_FORMAT.to_le_bytes().as_slice())?;
    }
    Ok(transaction.commit()?)
}

fn check(database: &Database, kind: FileKind) -> Result<(), DiskError> {
    let expected = kind.name();
    match format_of(database)? {
        Some((found, FILE_FORMAT)) if found == expected => Ok(()),
        Some((found, format)) if found == expected => Err(DiskError::OtherFormat { found: format, known: FILE_FORMAT }),
        Some((found, _)) => Err(DiskError::OtherKind { expected, found }),
        None => Err(DiskError::OtherKind { expected, found: "a database of something else".to_owned() }),
    }
}

/// What a file says that it is, and the layout of its tables.
pub(crate) fn format_of(database: &Database) -> Result<Option<(String, u32)>, DiskError> {
    let transaction = database.begin_read()?;
    let about = match transaction.open_table(ABOUT) {
        Ok(about) => about,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let (Some(kind), Some(format)) = (about.get(KIND)?, about.get(FORMAT)?) else { return Ok(None) };
    let format = format.value().try_into().map_err(|_| DiskError::Corrupt("the file's format is no number".into()))?;
    Ok(Some((String::from_utf8_lossy(kind.value()).into_owned(), u32::from_le_bytes(format))))
}

/// All rows of a table of a file that nobody writes; none when the table is not there yet.
pub(crate) fn for_each_row(
    database: &Database,
    table: Table,
    mut row: impl FnMut(&[u8], &[u8]) -> Result<(), DiskError>,
) -> Result<(), DiskError> {
    let transaction = database.begin_read()?;
    let table = match transaction.open_table(table) {
        Ok(table) => table,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    for entry in table.iter()? {
        let (key, value) = entry?;
        row(key.value(), value.value())?;
    }
    Ok(())
}
