//! What a byte-stream conduit does with bytes that no conduit of ours would send: strangers, cut streams, bad lengths;
//! and what the reordering conduit and the accept loop promise beyond the shared suite.
#![allow(clippy::unwrap_used)]

#[path = "support/conduits.rs"]
#[allow(dead_code, reason = "each test file uses its own part of it")]
mod support;

use std::future::poll_fn;
use std::time::Duration;

use bytes::Bytes;
use support::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tollway::conduit::framed::{Framed, FramedReader, FramedWriter};
use tollway::conduit::tcp::TcpListener;
use tollway::conduit::{
    Conduit, ConduitError, FrameReader, FrameWriter, HANDSHAKE_MAX_FRAME, Lane, Lanes, PeerInfo, Received, Stranger,
    memory, refuse,
};

const PREFACE: &[u8] = b"TOLLWAY\x01";

/// A conduit, and the other end of its stream for raw bytes.
fn raw() -> (FramedReader<DuplexStream>, FramedWriter<DuplexStream>, DuplexStream, DuplexStream) {
    let (to_conduit, reader) = tokio::io::duplex(1 << 20);
    let (writer, from_conduit) = tokio::io::duplex(1 << 20);
    let (reader, writer) = Framed::new(reader, writer, PeerInfo::new("raw", "test")).split();
    (reader, writer, to_conduit, from_conduit)
}

fn strangers() -> Vec<(&'static [u8], Stranger)> {
    vec![
        (b"GET / HTTP/1.1\r\nHost: toll.example\r\n\r\n", Stranger::Http),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Stranger::Http),
        (&[0x16, 0x03, 0x01, 0x02, 0x00, 0x01, 0x00, 0x01, 0xfc, 0x03, 0x03], Stranger::Tls),
        (b"TOLLWAY\x02whatever comes next", Stranger::OtherGeneration(2)),
        (&[0x9f, 0x12, 0xee, 0x00, 0x41], Stranger::Unknown),
    ]
}

/// `[session.preface.stranger]`
#[tokio::test]
async fn strangers_are_refused_in_their_own_language() {
    for (bytes, expected) in strangers() {
        let (mut reader, writer, mut to_conduit, mut from_conduit) = raw();
        to_conduit.write_all(bytes).await.unwrap();
        let error = reader.recv(&mut Frames::new()).await.unwrap_err();
        let ConduitError::Stranger(stranger) = error else { panic!("{error:?}") };
        assert_eq!(stranger, expected);
        assert!(matches!(reader.recv(&mut Frames::new()).await, Err(ConduitError::Closed)));

        let mut answer = Vec::new();
        let client = async {
            from_conduit.read_to_end(&mut answer).await.unwrap();
            drop(to_conduit);
        };
        within(async { tokio::join!(refuse(reader, writer, stranger, Duration::from_secs(30)), client) }).await;
        assert_eq!(answer, stranger.reply());
    }
}

#[tokio::test]
async fn a_stranger_on_tcp_reads_the_whole_answer_although_it_keeps_sending() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (mut reader, writer) = listener.accept().await.split();
    client.write_all(b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n").await.unwrap();
    let error = reader.recv(&mut Frames::new()).await.unwrap_err();
    let ConduitError::Stranger(stranger) = error else { panic!("{error:?}") };
    let client = async {
        client.write_all(&[b'x'; 1_000_000]).await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        drop(client);
        answer
    };
    let refusing = refuse(reader, writer, stranger, Duration::from_secs(30));
    let ((), answer) = within(async { tokio::join!(refusing, client) }).await;
    assert_eq!(answer, Stranger::Http.reply());
}

#[tokio::test(start_paused = true)]
async fn a_stranger_that_never_closes_is_dropped_in_time() {
    let (reader, writer, to_conduit, _from_conduit) = raw();
    let began = tokio::time::Instant::now();
    refuse(reader, writer, Stranger::Unknown, Duration::from_secs(2)).await;
    assert_eq!(began.elapsed(), Duration::from_secs(2));
    drop(to_conduit);
}

#[tokio::test]
async fn a_stranger_is_known_at_the_first_byte_that_differs() {
    for at in 0..PREFACE.len() {
        let (mut reader, _writer, mut to_conduit, _from_conduit) = raw();
        let mut bytes = PREFACE[..=at].to_vec();
        bytes[at] ^= 0x80;
        to_conduit.write_all(&bytes).await.unwrap();
        // The stream stays open: the conduit must not wait for the rest.
        let error = within(reader.recv(&mut Frames::new())).await.unwrap_err();
        assert!(matches!(error, ConduitError::Stranger(_)), "{at}: {error:?}");
    }
}

#[tokio::test]
async fn preface_and_frame_may_be_cut_anywhere() {
    let wire = [PREFACE, &[3, 0, 0, 0], b"abc", &[1, 0, 0, 0], b"d"].concat();
    for cut in 1..wire.len() {
        let (mut reader, _writer, mut to_conduit, _from_conduit) = raw();
        let mut frames = Frames::new();
        to_conduit.write_all(&wire[..cut]).await.unwrap();
        let first = poll_once(|cx| reader.poll_recv(cx, &mut frames)).await;
        assert!(first.is_ready(), "bytes are life, even without a frame");
        while poll_once(|cx| reader.poll_recv(cx, &mut frames)).await.is_ready() {}
        to_conduit.write_all(&wire[cut..]).await.unwrap();
        drop(to_conduit);
        let (rest, end) = receive_all(&mut reader).await;
        end.unwrap();
        frames.extend(rest);
        let expected = [Bytes::from_static(b"abc"), Bytes::from_static(b"d")].map(|frame| (Lane::ROOT, frame));
        assert_eq!(frames, expected, "cut at {cut}");
    }
}

#[tokio::test]
async fn an_end_inside_a_frame_or_preface_is_a_truncation() {
    let wire = [PREFACE, &[3, 0, 0, 0], b"abc", &[1, 0, 0, 0], b"d"].concat();
    for end in 0..=wire.len() {
        let (mut reader, _writer, mut to_conduit, _from_conduit) = raw();
        to_conduit.write_all(&wire[..end]).await.unwrap();
        drop(to_conduit);
        let (frames, result) = receive_all(&mut reader).await;
        let whole = [0, 8, 15, 20].contains(&end);
        assert_eq!(frames.len(), usize::from(end >= 15) + usize::from(end >= 20), "the frames in front are delivered");
        match result {
            Ok(()) => assert!(whole, "{end}"),
            Err(error) => assert!(matches!(error, ConduitError::Truncated) && !whole, "{end}: {error:?}"),
        }
    }
}

/// `[session.frame.length]`
#[tokio::test]
async fn a_length_of_four_gibibytes_is_refused_before_its_body_and_an_empty_frame_too() {
    let (mut reader, _writer, mut to_conduit, _from_conduit) = raw();
    to_conduit.write_all(&[PREFACE, &[0xff; 4]].concat()).await.unwrap();
    let error = reader.recv(&mut Frames::new()).await.unwrap_err();
    let ConduitError::TooLarge { length, limit } = error else { panic!("{error:?}") };
    assert_eq!((length, limit), (u32::MAX as usize, HANDSHAKE_MAX_FRAME));

    let (mut reader, _writer, mut to_conduit, _from_conduit) = raw();
    to_conduit.write_all(&[PREFACE, &[0; 4]].concat()).await.unwrap();
    let error = reader.recv(&mut Frames::new()).await.unwrap_err();
    assert!(matches!(error, ConduitError::Empty), "{error:?}");
}

#[tokio::test]
async fn one_poll_delivers_a_bounded_number_of_frames_and_the_next_goes_on() {
    let (mut reader, _writer, mut to_conduit, _from_conduit) = raw();
    let mut wire = PREFACE.to_vec();
    (0..10_000).for_each(|_| wire.extend_from_slice(&[1, 0, 0, 0, 9]));
    to_conduit.write_all(&wire).await.unwrap();
    drop(to_conduit);
    let mut total = 0;
    loop {
        let mut frames = Frames::new();
        let received = reader.recv(&mut frames).await.unwrap();
        assert!(frames.len() <= 1024);
        total += frames.len();
        if received == Received::End {
            break;
        }
    }
    assert_eq!(total, 10_000);
}

#[tokio::test]
async fn a_listener_says_nothing_before_its_first_frame_and_then_its_preface_once() {
    let (_reader, mut writer, _to_conduit, mut from_conduit) = raw();
    writer.flush().await.unwrap();
    assert_eq!(writer.written(), 0);
    writer.start_send(frame(0, 0, 0));
    writer.flush().await.unwrap();
    writer.start_send(frame(0, 0, 0));
    writer.close().await.unwrap();
    let mut wire = Vec::new();
    from_conduit.read_to_end(&mut wire).await.unwrap();
    assert_eq!(wire, [PREFACE, &[4, 0, 0, 0, 0, 0, 0, 0], &[4, 0, 0, 0, 0, 0, 0, 0]].concat());
}

#[tokio::test]
async fn the_reordering_conduit_reorders_lanes_by_its_seed_alone() {
    async fn order(seed: u64) -> Vec<u64> {
        let (left, right) = memory::reordering(seed, 1 << 20);
        assert_eq!(left.lanes(), Lanes::PerConnection);
        let ((_keep, mut writer), (mut reader, _writer)) = (left.split(), right.split());
        (0..40).for_each(|head| writer.start_send(frame(u64::from(head) % 8, head, 10)));
        writer.close().await.unwrap();
        let (frames, end) = receive_all(&mut reader).await;
        end.unwrap();
        frames.into_iter().map(|(lane, _)| lane.0).collect()
    }
    let straight: Vec<u64> = (0..40).map(|head| head % 8).collect();
    assert_ne!(order(1).await, straight);
    assert_eq!(order(1).await, order(1).await);
    assert_ne!(order(1).await, order(2).await);
}

#[tokio::test]
async fn a_later_lane_overtakes_a_reader_that_is_always_in_time() {
    let (left, right) = memory::reordering(7, 1 << 20);
    let ((_keep, mut writer), (mut reader, _writer)) = (left.split(), right.split());
    let (mut frames, mut sent) = (Frames::new(), 0);
    // The reader polls after each single frame, and must not always get it at once.
    for head in 0..100 {
        writer.start_send(frame(u64::from(head) % 5, head, 1));
        writer.flush().await.unwrap();
        sent += 1;
        let _ = poll_once(|cx| reader.poll_recv(cx, &mut frames)).await;
    }
    while frames.len() < sent {
        poll_fn(|cx| reader.poll_recv(cx, &mut frames)).await.unwrap();
    }
    let heads: Vec<u8> = frames.iter().map(|(_, frame)| frame[0]).collect();
    assert!(!heads.is_sorted());
}

/// `[threat: accept loop dies on an accept error]`, with a real lack of descriptors: this test runs itself again under
/// a limit of 64.
#[cfg(target_os = "linux")]
#[test]
fn accept_survives_a_lack_of_file_descriptors() {
    const UNDER_LIMIT: &str = "TOLLWAY_TEST_UNDER_LIMIT";
    if std::env::var_os(UNDER_LIMIT).is_some() {
        return accept_without_descriptors();
    }
    let status = std::process::Command::new("sh")
        .args(["-c", "ulimit -n 64; exec \"$0\" --exact accept_survives_a_lack_of_file_descriptors"])
        .arg(std::env::current_exe().unwrap())
        .env(UNDER_LIMIT, "1")
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
}

#[cfg(target_os = "linux")]
fn accept_without_descriptors() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(within(async {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = tokio::net::TcpSocket::new_v4().unwrap();
        let fillers: Vec<_> = std::iter::from_fn(|| std::fs::File::open("/dev/null").ok()).collect();
        assert!(fillers.len() > 10);
        let _client = client.connect(listener.local_addr().unwrap()).await.unwrap();
        let mut accepting = std::pin::pin!(listener.accept());
        assert!(poll_once(|cx| accepting.as_mut().poll(cx)).await.is_pending(), "there was no descriptor for it");
        drop(fillers);
        accepting.await;
    }));
}
