//! Unix domain sockets: [`UnixConduit`] and the [`UnixListener`] that yields them.
//!
//! Who may connect is a matter of the socket's file, which is its owner's alone (mode 0600) from the moment that it can
//! be found: it is bound under the name with a `~` behind it, closed to others, and moved to its place.

use std::future::{Ready, ready};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::framed::{Framed, framed_conduit};
use super::listen::Listener;
use super::{PeerIdentity, PeerInfo};

/// A conduit over one Unix socket. One lane.
#[derive(Debug)]
pub struct UnixConduit {
    framed: Framed<OwnedReadHalf, OwnedWriteHalf>,
}

impl UnixConduit {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// If nobody listens there, or its owner is somebody else.
    ///
    /// # Cancel safety
    /// Dropping the future gives the attempt up.
    pub async fn connect(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref();
        Ok(Self::new(UnixStream::connect(path).await?, path))
    }

    fn new(stream: UnixStream, path: &Path) -> Self {
        let mut peer = PeerInfo::new("unix", path.display().to_string());
        // A system that does not tell leaves it unproved.
        if let Ok(cred) = stream.peer_cred() {
            peer = peer.with_identity(PeerIdentity::Process { uid: cred.uid(), gid: cred.gid(), pid: cred.pid() });
        }
        let (reader, writer) = stream.into_split();
        Self { framed: Framed::new(reader, writer, peer) }
    }
}

framed_conduit!(UnixConduit, OwnedReadHalf, OwnedWriteHalf);

/// Accepts conduits at a socket, whatever happens. Its file goes with it.
#[derive(Debug)]
pub struct UnixListener {
    listener: tokio::net::UnixListener,
    path: PathBuf,
    /// Device and inode of the file that is ours: whoever took its place keeps theirs.
    file: (u64, u64),
}

impl UnixListener {
    /// Listens at `path`. A socket there that nobody listens on any more, as a killed process leaves it, is replaced; one
    /// that is in use, and a file that is no socket, are left alone.
    ///
    /// # Errors
    /// [`io::ErrorKind::AddrInUse`] when somebody listens there, [`io::ErrorKind::AlreadyExists`] when the file is no
    /// socket, and whatever the system has against it.
    pub fn bind(path: impl AsRef<Path>) -> io::Result<Self> {
        let path = path.as_ref().to_owned();
        clear_stale(&path)?;
        let mut hidden = path.clone().into_os_string();
        hidden.push("~");
        let hidden = PathBuf::from(hidden);
        clear_stale(&hidden)?;
        // Of two that start at the same time, one fails here.
        let listener = tokio::net::UnixListener::bind(&hidden)?;
        let placed = place(&hidden, &path);
        if placed.is_err() {
            // The error to tell is the first one.
            let _ = std::fs::remove_file(&hidden);
        }
        Ok(Self { listener, file: placed?, path })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Listener for UnixListener {
    type Conduit = UnixConduit;
    type Pending = Ready<io::Result<UnixConduit>>;

    async fn next(&self) -> io::Result<Self::Pending> {
        let (stream, _) = self.listener.accept().await?;
        Ok(ready(Ok(UnixConduit::new(stream, &self.path))))
    }
}

impl Drop for UnixListener {
    fn drop(&mut self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.file) {
            // What cannot be removed is a stale file, which the next listener replaces.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// Closes a fresh socket to others and gives it its name.
fn place(hidden: &Path, path: &Path) -> io::Result<(u64, u64)> {
    std::fs::set_permissions(hidden, std::fs::Permissions::from_mode(0o600))?;
    let meta = std::fs::symlink_metadata(hidden)?;
    std::fs::rename(hidden, path)?;
    Ok((meta.dev(), meta.ino()))
}

/// Removes a socket on which nobody listens.
fn clear_stale(path: &Path) -> io::Result<()> {
    let meta = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        meta => meta?,
    };
    if !meta.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket"));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "somebody listens there already")),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A directory of this test's own, which goes with it.
    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let dir = std::env::temp_dir().join(format!("tollway-{name}-{}", std::process::id()));
            std::fs::create_dir_all(&dir).unwrap();
            Dir(dir)
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            std::fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[tokio::test]
    async fn the_socket_is_its_owners_alone_and_goes_with_the_listener() {
        let dir = Dir::new("mode");
        let path = dir.0.join("s");
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(&dir.0).unwrap().count(), 1, "nothing else is left");
        drop(listener);
        assert_eq!(std::fs::read_dir(&dir.0).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = Dir::new("stale");
        let path = dir.0.join("s");
        // What a killed process leaves: the standard library's listener does not remove its file.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        drop(std::os::unix::net::UnixListener::bind(dir.0.join("s~")).unwrap());
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(UnixListener::bind(&path).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        let (dialed, _accepted) = tokio::join!(UnixConduit::connect(&path), listener.next());
        dialed.unwrap();
    }

    #[tokio::test]
    async fn a_file_that_is_no_socket_is_left_alone() {
        let dir = Dir::new("file");
        let path = dir.0.join("s");
        std::fs::write(&path, "precious").unwrap();
        assert_eq!(UnixListener::bind(&path).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_listener_leaves_its_successors_file_alone() {
        let dir = Dir::new("successor");
        let path = dir.0.join("s");
        let first = UnixListener::bind(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let second = UnixListener::bind(&path).unwrap();
        drop(first);
        let (dialed, _accepted) = tokio::join!(UnixConduit::connect(&path), second.next());
        dialed.unwrap();
    }
}
