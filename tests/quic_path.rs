//! QUIC on a network that loses, delays, reorders, changes its path and breaks; and lanes that stand still.
#![allow(clippy::unwrap_used)]

#[path = "support/udp_relay.rs"]
#[allow(dead_code, reason = "each user takes its own part of it")]
mod udp_relay;

use std::future::{Future, poll_fn};
use std::time::Duration;

use bytes::Bytes;
use tollway::conduit::any::{AnyListener, ListenOptions};
use tollway::conduit::endpoint::Endpoint;
use tollway::conduit::listen::Listener;
use tollway::conduit::quic::{LANE_WINDOW, QuicConduit, QuicListener};
use tollway::conduit::tls::{ClientTls, Identity, ServerTls};
use tollway::conduit::{Conduit, FrameReader, FrameWriter, Lane, Received, Transmit};
use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Rx, Service, Services, stream};
use tollway::{Server, Session, SessionConfig};
use tollway_protocol::error::{Reason, SessionEnd, code};
use tollway_protocol::message::{Close, Header, Payment, decode_header};
use udp_relay::{Network, UdpRelay};

/// Answers a number with its double, and streams numbers.
struct Numbers;

fn method(name: &str) -> MethodId {
    MethodId::of("numbers", 1, name)
}

impl Service for Numbers {
    fn name(&self) -> &str {
        "numbers"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        if call.method() == method("count") {
            let (mut tx, items) = stream::<(u64, Bytes)>();
            tokio::spawn(async move {
                for number in 0..200 {
                    tx.send((number, Bytes::from(vec![number as u8; 8192]))).await?;
                }
                tx.finish();
                Ok::<(), tollway::rpc::StreamError>(())
            });
            return Reply::ok(&items).boxed();
        }
        Box::pin(async move {
            match call.args::<u64>() {
                Ok(number) => Reply::ok(&(number * 2)),
                Err(error) => Reply::invalid_payload(&error),
            }
        })
    }
}

/// A server, a relay in front of it, and a session through both.
async fn world(network: Network, config: SessionConfig) -> (UdpRelay, Session) {
    let mut options = ListenOptions::default();
    options.tls = Some(ServerTls::new(Identity::self_signed(&["localhost"]).unwrap()));
    let listener = AnyListener::bind(&"quic://127.0.0.1:0".parse().unwrap(), &options).await.unwrap();
    let endpoint = listener.endpoints().next().unwrap().clone();
    let server = SessionConfig { services: Services::new().with(Numbers), ..SessionConfig::default() };
    let server = Server::with_listener(listener, endpoint.clone(), server);
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    let relay = UdpRelay::start(format!("127.0.0.1:{}", endpoint.port()).parse().unwrap(), network).await;
    let endpoint = endpoint.with_address(relay.address());
    let session = within(tollway::connect(&endpoint, config)).await.unwrap();
    (relay, session)
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("the test hangs")
}

const CLEAN: Network = Network { loss_ppm: 0, delay: Duration::ZERO, jitter: Duration::ZERO, seed: 1 };

#[tokio::test]
async fn loss_delay_and_reordering_change_nothing_but_time() {
    let millisecond = Duration::from_millis(1);
    let network = Network { loss_ppm: 30_000, delay: millisecond, jitter: 2 * millisecond, seed: 7 };
    let (relay, session) = world(network, SessionConfig::default()).await;
    let (bulk, small) = within(async { tokio::join!(session.open("numbers"), session.open("numbers")) }).await;
    let (bulk, small) = (bulk.unwrap(), small.unwrap());
    let streaming = async {
        let mut items: Rx<(u64, Bytes)> = bulk.call(method("count"), &()).await.unwrap();
        let mut expected = 0;
        while let Some((number, bytes)) = items.recv().await.unwrap() {
            assert_eq!((number, &bytes[..]), (expected, &vec![number as u8; 8192][..]));
            expected += 1;
        }
        assert_eq!(expected, 200);
    };
    let calling = async {
        for number in 0..200_u64 {
            let double: u64 = small.call(method("double"), &number).await.unwrap();
            assert_eq!(double, number * 2);
        }
    };
    within(async { tokio::join!(streaming, calling) }).await;
    assert!(relay.dropped() > 0, "nothing was lost");
}

/// `[conduit.quic.migration]`
#[tokio::test]
async fn a_changed_path_keeps_the_session() {
    let (mut relay, session) = world(CLEAN, SessionConfig::default()).await;
    let connection = within(session.open("numbers")).await.unwrap();
    for number in 0..3_u64 {
        let double: u64 = within(connection.call(method("double"), &number)).await.unwrap();
        assert_eq!(double, number * 2);
        relay.change_path().await;
    }
    assert!(session.end().is_none());
}

/// QUIC has no deadline of its own: the session's is the one that fires. `[conduit.quic.idle]`
#[tokio::test]
async fn a_cut_path_ends_the_session_by_its_own_deadline() {
    let mut config = SessionConfig::default();
    config.protocol.ping_interval = Duration::from_millis(200);
    config.protocol.pong_timeout = Duration::from_millis(200);
    let (relay, session) = world(CLEAN, config).await;
    let connection = within(session.open("numbers")).await.unwrap();
    relay.cut();
    let call = within(connection.call::<_, u64>(method("double"), &1_u64)).await;
    assert!(call.is_err());
    assert_eq!(within(session.closed()).await, SessionEnd::PeerSilent);
}

async fn pair() -> (QuicConduit, QuicConduit) {
    let server = ServerTls::new(Identity::self_signed(&["localhost"]).unwrap());
    let listener = QuicListener::bind("127.0.0.1:0", &server).await.unwrap();
    let endpoint: Endpoint = format!("quic://{}", listener.local_addr().unwrap()).parse().unwrap();
    let (endpoint, client) = (endpoint.with_pin(server.pin()), ClientTls::default());
    let accepting = async { listener.next().await.unwrap().await.unwrap() };
    let (accepted, dialed) = tokio::join!(accepting, QuicConduit::connect(&endpoint, &client));
    (dialed.unwrap(), accepted)
}

fn frame(lane: u64, size: usize) -> Transmit {
    Transmit { lane: Lane(lane), head: [lane as u8].into_iter().collect(), payload: Bytes::from(vec![7; size]) }
}

/// A lane that takes nothing holds what is queued on it, counts as blocked until it is empty, and delays no other.
/// `[conduit.quic.windows]`
#[tokio::test]
async fn a_lane_that_stands_still_delays_no_other() {
    within(async {
        let (left, right) = pair().await;
        let ((_keep, mut writer), (mut reader, _writer)) = (left.split(), right.split());
        // More than a lane's window, and nobody reads it yet.
        let bulk = LANE_WINDOW as usize + 200_000;
        writer.start_send(frame(1, bulk));
        assert!(poll_fn(|cx| std::task::Poll::Ready(writer.poll_flush(cx))).await.is_pending());
        let stuck = writer.buffered();
        assert!(stuck > 0 && writer.is_blocked(Lane(1)));
        assert_eq!((writer.ahead(), writer.is_blocked(Lane(2))), (0, false));

        writer.start_send(frame(2, 1000));
        assert!(poll_fn(|cx| std::task::Poll::Ready(writer.poll_flush(cx))).await.is_pending());
        assert_eq!(writer.buffered(), stuck, "the other lane's frame is on its way");

        reader.set_max_frame(2 << 20);
        let mut frames = Vec::new();
        let receiving = async {
            while frames.len() < 2 {
                assert_ne!(reader.recv(&mut frames).await.unwrap(), Received::End);
            }
        };
        let (flushed, ()) = tokio::join!(writer.flush(), receiving);
        flushed.unwrap();
        assert!(!writer.is_blocked(Lane(1)));
        let freed: Vec<_> = std::iter::from_fn(|| writer.next_unblocked()).collect();
        assert!(freed.contains(&Lane(1)), "{freed:?}");
    })
    .await;
}

/// A lane ends with what was sent on it, and its connection's stream is free for another. `[conduit.quic.end]`
/// `[conduit.quic.streams]`
#[tokio::test]
async fn ended_lanes_make_room_for_more_than_may_be_open_at_once() {
    within(async {
        let (left, right) = pair().await;
        let ((mut left_reader, mut left_writer), (mut reader, mut writer)) = (left.split(), right.split());
        let lanes = 2000;
        let answering = async {
            let (mut frames, mut answered) = (Vec::new(), 0);
            while answered < lanes {
                reader.recv(&mut frames).await.unwrap();
                for (lane, _) in frames.drain(..) {
                    answered += 1;
                    writer.start_send(frame(lane.0, 10));
                    writer.end_lane(lane);
                }
                writer.flush().await.unwrap();
            }
        };
        let asking = async {
            let mut frames = Vec::new();
            for lane in 1..=lanes {
                left_writer.start_send(frame(lane, 10));
                left_writer.end_lane(Lane(lane));
                let sending = async {
                    left_writer.flush().await.unwrap();
                };
                let receiving = async {
                    while (frames.len() as u64) < lane {
                        left_reader.recv(&mut frames).await.unwrap();
                    }
                };
                tokio::join!(sending, receiving);
            }
            assert!(frames.iter().zip(1..).all(|((lane, _), expected)| lane.0 == expected));
        };
        tokio::join!(answering, asking);
    })
    .await;
}

/// `[conduit.quic.reset]`
#[tokio::test]
async fn a_lane_that_is_cut_off_stands_for_a_close_of_its_connection() {
    within(async {
        let (left, right) = pair().await;
        let ((_keep, mut writer), (mut reader, _writer)) = (left.split(), right.split());
        reader.set_max_frame(4 << 20);
        writer.start_send(frame(3, 10));
        // More than a lane's window: it cannot all be on its way.
        writer.start_send(frame(5, LANE_WINDOW as usize + 200_000));
        assert!(poll_fn(|cx| std::task::Poll::Ready(writer.poll_flush(cx))).await.is_pending());
        let mut frames = Vec::new();
        // A lane of which nothing was read is not known yet.
        while reader.recv(&mut frames).await.unwrap() != Received::Progress {}
        drop(writer);
        while frames.len() < 2 {
            assert_ne!(reader.recv(&mut frames).await.unwrap(), Received::End);
        }
        let (lane, mut body) = frames.remove(frames.iter().position(|(lane, _)| *lane == Lane(5)).unwrap());
        let close: Close = decode_header(&mut body).unwrap();
        assert_eq!((lane, close.connection.0, Reason::from(close.reason).code), (Lane(5), 5, code::DROPPED));
        assert_eq!(frames[0].0, Lane(3), "what was whole arrives");
    })
    .await;
}

/// `[conduit.quic.priority]`
#[tokio::test]
async fn what_is_the_sessions_own_and_payments_go_before_data() {
    within(async {
        let (left, right) = pair().await;
        let ((_keep, mut writer), (mut reader, _writer)) = (left.split(), right.split());
        // Far more than what QUIC sends before it hears of its arrival, and below the streams that may be open at first.
        let data = 100;
        (1..=data).for_each(|lane| writer.start_send(frame(lane, 1000)));
        let paid = data + 1;
        let mut payment = frame(paid, 50);
        payment.head = [Payment::KIND].into_iter().collect();
        writer.start_send(payment);
        writer.start_send(frame(0, 10));
        let mut frames = Vec::new();
        let receiving = async {
            while frames.len() < data as usize + 2 {
                assert_ne!(reader.recv(&mut frames).await.unwrap(), Received::End);
            }
        };
        let (flushed, ()) = tokio::join!(writer.flush(), receiving);
        flushed.unwrap();
        let place = |lane| frames.iter().position(|(found, _)| *found == Lane(lane)).unwrap();
        // Lanes whose first packets arrive together are looked at in the order of their streams.
        assert!(place(0) < data as usize / 2 && place(paid) < data as usize / 2, "{} {}", place(0), place(paid));
    })
    .await;
}

/// The connection's close says what the session's last frame would have said. `[conduit.quic.close]`
#[tokio::test]
async fn the_close_of_the_connection_carries_the_sessions_code() {
    within(async {
        let (left, right) = pair().await;
        let ((_reader, mut writer), (mut reader, _writer)) = (left.split(), right.split());
        writer.start_close(&Reason::new(1234, "enough"));
        drop((_reader, writer));
        let mut frames = Vec::new();
        while reader.recv(&mut frames).await.unwrap() != Received::Frames {}
        let (lane, body) = frames.remove(0);
        let close: tollway_protocol::message::Close =
            tollway_protocol::message::decode_header(&mut body.clone()).unwrap();
        assert_eq!((lane, close.connection.0), (Lane::ROOT, 0));
        assert_eq!(Reason::from(close.reason), Reason::new(1234, "enough"));
        assert_eq!(reader.recv(&mut frames).await.unwrap(), Received::End);
    })
    .await;
}
