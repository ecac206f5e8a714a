//! The directory whose files are served, and the rule that no name leads out of it.

use std::fs::File;
use std::io;
use std::path::{Component, Path, PathBuf};

use super::{FileError, MAX_NAME};

/// A directory of files for sale.
///
/// A name is a relative path below it. Symbolic links are followed as long as they stay inside. Whoever can write to the
/// directory can of course put into it what they can read; that is not what the rule is about.
#[derive(Debug, Clone)]
pub(crate) struct Shelf {
    /// Without symbolic links in it.
    root: PathBuf,
}

impl Shelf {
    /// # Errors
    /// When it is not there or not a directory.
    pub(crate) fn open(dir: &Path) -> io::Result<Self> {
        let root = dir.canonicalize()?;
        if !root.is_dir() {
            return Err(io::Error::from(io::ErrorKind::NotADirectory));
        }
        Ok(Shelf { root })
    }

    /// Opens the file with this name. Blocks.
    ///
    /// # Errors
    /// When there is none that may be served.
    pub(super) fn find(&self, name: &str) -> Result<(File, u64), FileError> {
        let path = self.root.join(checked(name)?).canonicalize().map_err(kind)?;
        if !path.starts_with(&self.root) {
            return Err(FileError::Forbidden);
        }
        // Looked at before it is opened: opening a pipe would wait for its writer.
        if !path.metadata().map_err(kind)?.is_file() {
            return Err(FileError::NotAFile);
        }
        let file = File::open(&path).map_err(kind)?;
        let metadata = file.metadata().map_err(kind)?;
        if !metadata.is_file() {
            return Err(FileError::NotAFile);
        }
        Ok((file, metadata.len()))
    }
}

/// The name as a path of plain components.
fn checked(name: &str) -> Result<&Path, FileError> {
    if name.is_empty() || name.len() > MAX_NAME || name.contains('\0') {
        return Err(FileError::InvalidName);
    }
    let path = Path::new(name);
    let plain = path.components().all(|component| matches!(component, Component::Normal(_)));
    plain.then_some(path).ok_or(FileError::Forbidden)
}

fn kind(error: io::Error) -> FileError {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => FileError::NotFound,
        io::ErrorKind::InvalidInput | io::ErrorKind::InvalidFilename => FileError::InvalidName,
        _ => {
            tracing::warn!(%error, "a file cannot be read");
            FileError::Unreadable
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn shelf() -> (tempfile::TempDir, Shelf) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("secret"), "outside").unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("sub")).unwrap();
        std::fs::write(root.join("a"), "12345").unwrap();
        std::fs::write(root.join("sub/b c"), "").unwrap();
        let shelf = Shelf::open(&root).unwrap();
        (dir, shelf)
    }

    #[test]
    fn files_inside_are_found() {
        let (_dir, shelf) = shelf();
        assert_eq!(shelf.find("a").unwrap().1, 5);
        assert_eq!(shelf.find("sub/b c").unwrap().1, 0);
        assert_eq!(shelf.find("sub//b c").unwrap().1, 0);
    }

    #[test]
    fn no_name_leads_out() {
        let (dir, shelf) = shelf();
        let absolute = dir.path().join("secret");
        for name in
            ["../secret", "sub/../../secret", "..", "/etc/passwd", absolute.to_str().unwrap(), "sub/../a", "./a"]
        {
            assert_eq!(shelf.find(name).unwrap_err(), FileError::Forbidden, "{name}");
        }
        for name in ["", "a\0", "a\0/../secret"] {
            assert_eq!(shelf.find(name).unwrap_err(), FileError::InvalidName, "{name:?}");
        }
        assert_eq!(shelf.find(&"x".repeat(MAX_NAME + 1)).unwrap_err(), FileError::InvalidName);
        assert_eq!(shelf.find("none").unwrap_err(), FileError::NotFound);
        assert_eq!(shelf.find("a/b").unwrap_err(), FileError::NotFound);
        assert_eq!(shelf.find("sub").unwrap_err(), FileError::NotAFile);
    }

    #[cfg(unix)]
    #[test]
    fn links_may_stay_inside_and_not_leave() {
        use std::os::unix::fs::symlink;
        let (dir, shelf) = shelf();
        let root = dir.path().join("root");
        symlink("a", root.join("inside")).unwrap();
        symlink("../secret", root.join("outside")).unwrap();
        symlink(dir.path(), root.join("up")).unwrap();
        symlink("nowhere", root.join("dangling")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        assert_eq!(shelf.find("inside").unwrap().1, 5);
        assert_eq!(shelf.find("outside").unwrap_err(), FileError::Forbidden);
        assert_eq!(shelf.find("up/secret").unwrap_err(), FileError::Forbidden);
        assert_eq!(shelf.find("dangling").unwrap_err(), FileError::NotFound);
        assert_eq!(shelf.find("loop").unwrap_err(), FileError::Unreadable);
    }

    #[test]
    fn a_shelf_is_a_directory() {
        let (dir, _) = shelf();
        assert!(Shelf::open(&dir.path().join("none")).is_err());
        assert!(Shelf::open(&dir.path().join("secret")).is_err());
    }
}
