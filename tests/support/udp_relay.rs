//! A network that misbehaves: a relay of UDP datagrams on loopback that delays, drops and reorders by a seed, and that can
//! be cut or made to change its path.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep_until};

/// What happens to each datagram, in both directions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Network {
    /// So many of a million are lost.
    pub(crate) loss_ppm: u32,
    /// How long each is on its way.
    pub(crate) delay: Duration,
    /// Up to so much longer, so that they overtake each other.
    pub(crate) jitter: Duration,
    /// Decides which.
    pub(crate) seed: u64,
}

/// Datagrams under way: more than the windows of a test let through.
const UNDER_WAY: usize = 65_536;
/// Larger than any datagram of QUIC's.
const DATAGRAM: usize = 2048;

/// A relay between one client and one server.
pub(crate) struct UdpRelay {
    address: SocketAddr,
    shared: Arc<Shared>,
    tasks: Vec<JoinHandle<()>>,
}

struct Shared {
    network: Network,
    server: SocketAddr,
    /// Where the client was last seen.
    client: Mutex<Option<SocketAddr>>,
    front: UdpSocket,
    /// What the server sees. A new one is a changed path.
    back: Mutex<Arc<UdpSocket>>,
    state: AtomicU64,
    cut: AtomicBool,
    dropped: AtomicU64,
}

impl UdpRelay {
    /// Relays to `server` until it is dropped.
    pub(crate) async fn start(server: SocketAddr, network: Network) -> Self {
        let front = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = front.local_addr().unwrap();
        let back = Mutex::new(Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap()));
        let (client, cut, dropped) = (Mutex::new(None), AtomicBool::new(false), AtomicU64::new(0));
        let state = AtomicU64::new(network.seed);
        let shared = Arc::new(Shared { network, server, client, front, back, state, cut, dropped });
        let mut relay = Self { address, shared, tasks: Vec::new() };
        let shared = relay.shared.clone();
        let deliver = relay.road(|shared, bytes| {
            let back = shared.back.lock().clone();
            // A socket that takes nothing is one more loss.
            let _ = back.try_send_to(&bytes, shared.server);
        });
        relay.tasks.push(tokio::spawn(async move {
            let mut bytes = [0; DATAGRAM];
            while let Ok((length, from)) = shared.front.recv_from(&mut bytes).await {
                *shared.client.lock() = Some(from);
                shared.send(&deliver, &bytes[..length]);
            }
        }));
        relay.listen_behind();
        relay
    }

    /// Where the client finds the server.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Datagrams that were lost.
    pub(crate) fn dropped(&self) -> u64 {
        self.shared.dropped.load(Ordering::Relaxed)
    }

    /// From here on the client seems to be elsewhere, as when a NAT forgets or a phone changes its network.
    pub(crate) async fn change_path(&mut self) {
        *self.shared.back.lock() = Arc::new(UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap());
        self.listen_behind();
    }

    /// Nothing passes any more.
    pub(crate) fn cut(&self) {
        self.shared.cut.store(true, Ordering::Relaxed);
    }

    /// Takes what the server sends to the socket of now.
    fn listen_behind(&mut self) {
        let deliver = self.road(|shared, bytes| {
            let client = *shared.client.lock();
            if let Some(client) = client {
                // A socket that takes nothing is one more loss.
                let _ = shared.front.try_send_to(&bytes, client);
            }
        });
        let (shared, back) = (self.shared.clone(), self.shared.back.lock().clone());
        self.tasks.push(tokio::spawn(async move {
            let mut bytes = [0; DATAGRAM];
            while let Ok((length, _)) = back.recv_from(&mut bytes).await {
                shared.send(&deliver, &bytes[..length]);
            }
        }));
    }

    /// One direction: each datagram is delivered at its time.
    fn road(&mut self, deliver: impl Fn(&Shared, Vec<u8>) + Send + 'static) -> mpsc::Sender<(Instant, Vec<u8>)> {
        let (enter, mut road) = mpsc::channel::<(Instant, Vec<u8>)>(UNDER_WAY);
        let shared = self.shared.clone();
        let mut waiting = std::collections::BTreeMap::new();
        let mut number = 0_u64;
        self.tasks.push(tokio::spawn(async move {
            loop {
                let next = waiting.first_key_value().map(|((at, _), _): (&(Instant, u64), &Vec<u8>)| *at);
                tokio::select! {
                    entered = road.recv() => match entered {
                        Some((at, bytes)) => {
                            number += 1;
                            waiting.insert((at, number), bytes);
                        }
                        None => return,
                    },
                    () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                        let now = Instant::now();
                        while let Some(due) = waiting.first_entry().filter(|due| due.key().0 <= now) {
                            deliver(&shared, due.remove());
                        }
                    }
                }
            }
        }));
        enter
    }
}

impl Shared {
    fn send(&self, road: &mpsc::Sender<(Instant, Vec<u8>)>, bytes: &[u8]) {
        let Network { loss_ppm, delay, jitter, .. } = self.network;
        let dice = self.roll();
        let lost = dice % 1_000_000 < u64::from(loss_ppm) || self.cut.load(Ordering::Relaxed);
        let late = jitter.mul_f64((dice >> 40) as f64 / f64::from(1 << 24));
        // A full road loses, as a router does.
        if lost || road.try_send((Instant::now() + delay + late, bytes.to_vec())).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// SplitMix64.
    fn roll(&self) -> u64 {
        let state = self.state.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let word = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }
}

impl Drop for UdpRelay {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}
