//! The wire between the processes: an address that stays while the process behind it comes and goes, and the place where
//! the witness listens.

use std::io;
use std::net::{Shutdown, SocketAddr};
use std::sync::{Arc, Weak};

use bytes::Bytes;
use parking_lot::Mutex;
use socket2::SockRef;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

use crate::wire::{Conversation, Way, Witness};

/// Forwards every connection to where its process is now.
#[derive(Debug)]
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    target: watch::Sender<Option<SocketAddr>>,
    links: Arc<Mutex<Vec<Weak<Link>>>>,
}

/// A connection through the proxy.
#[derive(Debug)]
struct Link {
    ends: [TcpStream; 2],
    /// Held while bytes are taken from a socket and given to the witness: when the sockets are empty and this is free,
    /// the witness has seen everything.
    conversation: Mutex<Conversation>,
    witness: Option<Arc<Mutex<Witness>>>,
}

impl Proxy {
    /// A proxy to nowhere yet. With a witness, what passes is read.
    pub(crate) async fn start(witness: Option<Arc<Mutex<Witness>>>) -> io::Result<Proxy> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?;
        let (target, targets) = watch::channel(None);
        let links = Arc::new(Mutex::new(Vec::new()));
        tokio::spawn(accept(listener, targets, witness, links.clone()));
        Ok(Proxy { address, target, links })
    }

    /// From here on connections go there; those to nowhere wait.
    pub(crate) fn aim(&self, target: Option<SocketAddr>) {
        self.target.send_replace(target);
    }

    /// Whether everything that was written to the proxy has been read.
    pub(crate) fn is_drained(&self) -> bool {
        let mut links = self.links.lock();
        links.retain(|link| link.strong_count() > 0);
        links.iter().filter_map(Weak::upgrade).all(|link| {
            let _taken = link.conversation.lock();
            let mut byte = [std::mem::MaybeUninit::uninit()];
            // Nothing to look at: empty and open, or ended.
            link.ends.iter().all(|end| !matches!(SockRef::from(end).peek(&mut byte), Ok(1..)))
        })
    }
}

async fn accept(
    listener: TcpListener,
    mut targets: watch::Receiver<Option<SocketAddr>>,
    witness: Option<Arc<Mutex<Witness>>>,
    links: Arc<Mutex<Vec<Weak<Link>>>>,
) {
    while let Ok((client, _)) = listener.accept().await {
        let target = targets.wait_for(Option::is_some).await.ok().and_then(|target| *target);
        let (witness, links) = (witness.clone(), links.clone());
        tokio::spawn(async move {
            // A process that has just died: the client sees its connection end, and comes again.
            let Some(Ok(server)) = (match target {
                Some(target) => Some(TcpStream::connect(target).await),
                None => None,
            }) else {
                return;
            };
            // Not vital: a connection that waits for company is slower, and no less true.
            let _delay = (client.set_nodelay(true), server.set_nodelay(true));
            let conversation = Mutex::default();
            let link = Arc::new(Link { ends: [client, server], conversation, witness });
            links.lock().push(Arc::downgrade(&link));
            tokio::join!(carry(link.clone(), Way::Up), carry(link, Way::Down));
        });
    }
}

/// Carries bytes one way. The witness reads them before they go on, so nobody has received what it has not seen.
async fn carry(link: Arc<Link>, way: Way) {
    // Unbounded, so that a process that is stopped does not stop the witness; what comes is bounded by the credit that
    // the other side has granted.
    let (queue, mut queued) = mpsc::unbounded_channel::<Bytes>();
    let (from, to) = match way {
        Way::Up => (&link.ends[0], &link.ends[1]),
        Way::Down => (&link.ends[1], &link.ends[0]),
    };
    let reading = async {
        let mut buffer = vec![0; 64 << 10];
        loop {
            if from.readable().await.is_err() {
                break;
            }
            let mut conversation = link.conversation.lock();
            match from.try_read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => {
                    if let Some(witness) = &link.witness {
                        conversation.feed(way, &buffer[..read], &mut witness.lock());
                    }
                    // Nobody takes it when the other side has ended.
                    let _ended = queue.send(Bytes::copy_from_slice(&buffer[..read]));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => break,
            }
        }
        drop(queue);
    };
    let writing = async {
        while let Some(bytes) = queued.recv().await {
            if write_all(to, &bytes).await.is_err() {
                // The other side is gone: this one learns it by the end of its connection.
                queued.close();
                // It may have ended by itself.
                let _ended = SockRef::from(from).shutdown(Shutdown::Write);
                return;
            }
        }
        let _ended = SockRef::from(to).shutdown(Shutdown::Write);
    };
    tokio::join!(reading, writing);
}

async fn write_all(to: &TcpStream, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        to.writable().await?;
        match to.try_write(bytes) {
            Ok(written) => bytes = &bytes[written..],
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
