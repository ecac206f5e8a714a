//! One suite for all conduits: whatever carries a session, the session must not notice.
#![allow(clippy::unwrap_used)]

#[path = "support/conduits.rs"]
#[allow(dead_code, reason = "each test file uses its own part of it")]
mod support;

use bytes::Bytes;
use support::*;
use tollway::conduit::{Conduit, ConduitError, FrameReader, FrameWriter, HANDSHAKE_MAX_FRAME, Received};

macro_rules! suite {
    ($($(#[$when:meta])? $conduit:ident = $pairs:ty;)*) => { $(
        $(#[$when])?
        mod $conduit {
            suite!(@tests $pairs:
                frames_arrive_whole_and_in_order_per_lane, one_poll_at_a_time_loses_nothing,
                empty_payload_and_maximal_frame_pass, one_byte_over_the_maximum_is_refused,
                own_limit_stops_a_frame_before_it_is_sent, frame_without_body_is_never_sent,
                limit_may_be_raised_by_the_frame_before, close_loses_nothing, half_closed_conduit_still_receives,
                nothing_is_sent_after_close, cancelled_flush_and_close_go_on,
                writing_to_a_peer_that_is_gone_fails_once_with_its_cause, back_pressure_is_seen_and_bounded,
                two_floods_through_a_narrow_pipe_make_progress, dropped_writer_ends_the_peer,
                discarding_hears_the_end,
            );
        }
    )* };
    (@tests $pairs:ty: $($test:ident,)*) => { $(
        #[tokio::test]
        async fn $test() {
            super::support::within(super::$test::<$pairs>()).await;
        }
    )* };
}

suite! {
    tcp = crate::support::Tcp;
    #[cfg(unix)] unix = crate::support::Unix;
    #[cfg(feature = "tls")] tls = crate::support::Tls;
    #[cfg(feature = "quic")] quic = crate::support::Quic;
    #[cfg(feature = "quic")] quic_on_a_bad_network = crate::support::ShakenQuic;
    #[cfg(feature = "ws")] ws = crate::support::Ws;
    #[cfg(all(feature = "ws", feature = "tls"))] wss = crate::support::Wss;
    memory = crate::support::Memory;
    reordering = crate::support::Reordering;
    one_byte_at_a_time = crate::support::Trickle;
    nested = crate::support::Nested<crate::support::Memory>;
    nested_in_lanes = crate::support::Nested<crate::support::Reordering>;
    nested_one_byte_at_a_time = crate::support::NestedTrickle;
    #[cfg(feature = "tls")] nested_tls = crate::support::NestedTls;
}

/// Frames of all sorts of sizes on six lanes: `[lesson 1]` cancels `recv` at every poll, here and in all tests that use
/// `receive_all`, and the trickling pipe makes each byte a poll.
fn assorted(count: u32) -> Vec<tollway::conduit::Transmit> {
    let sizes = [0, 1, 63, 64, 65, 1000, 4095, 4096, 4097, 20_000];
    (0..count).map(|head| frame(u64::from(head) * 7 % 6, head, sizes[head as usize % sizes.len()])).collect()
}

/// Both sides send on the same lanes at once, which on QUIC both have opened. `[conduit.quic.lane]`
async fn frames_arrive_whole_and_in_order_per_lane<P: Pairs>() {
    let (left, right) = P::pair(64 * 1024).await;
    let lanes = left.lanes();
    let (there, back) = (assorted(200), assorted(77));
    let (at_left, at_right) = tokio::join!(exchange(left, &there, 64 * 1024), exchange(right, &back, 64 * 1024));
    assert_delivered(lanes, &there, &at_right);
    assert_delivered(lanes, &back, &at_left);
}

async fn one_poll_at_a_time_loses_nothing<P: Pairs>() {
    let (left, right) = P::pair(100).await;
    let lanes = left.lanes();
    let ((_keep, mut writer), (mut reader, _writer)) = (left.split(), right.split());
    let sent = assorted(30);
    let sending = async {
        for frame in &sent {
            writer.start_send(frame.clone());
            writer.flush().await.unwrap();
        }
        writer.close().await.unwrap();
    };
    let ((), (received, end)) = tokio::join!(sending, receive_all(&mut reader));
    end.unwrap();
    assert_delivered(lanes, &sent, &received);
}

async fn empty_payload_and_maximal_frame_pass<P: Pairs>() {
    let (left, right) = P::pair(1024).await;
    let lanes = left.lanes();
    let ((_keep, mut writer), (mut reader, _writer)) = (left.split(), right.split());
    let sent = [frame(0, 1, 0), frame(0, 2, HANDSHAKE_MAX_FRAME - 4), frame(0, 3, 0)];
    sent.iter().for_each(|frame| writer.start_send(frame.clone()));
    let (closed, (received, end)) = tokio::join!(writer.close(), receive_all(&mut reader));
    closed.unwrap();
    end.unwrap();
    assert_delivered(lanes, &sent, &received);
}

async fn one_byte_over_the_maximum_is_refused<P: Pairs>() {
    let (left, right) = P::pair(1024).await;
    let ((_keep, mut writer), (mut reader, _writer)) = (left.split(), right.split());
    let sent = [frame(0, 1, 10), frame(0, 2, HANDSHAKE_MAX_FRAME - 3)];
    sent.iter().for_each(|frame| writer.start_send(frame.clone()));
    let receiving = async {
        let (received, end) = receive_all(&mut reader).await;
        assert_eq!(received.len(), 1, "the frame in front is delivered");
        let Err(ConduitError::TooLarge { length, limit }) = end else { panic!("{end:?}") };
        assert_eq!((length, limit), (HANDSHAKE_MAX_FRAME + 1, HANDSHAKE_MAX_FRAME));
        let again = reader.recv(&mut Frames::new()).await;
        assert!(matches!(again, Err(ConduitError::Closed)), "{again:?}");
        drop(reader);
    };
    // The writer may notice that its reader is gone, or not.
    let _ = tokio::join!(writer.flush(), receiving);
}

async fn own_limit_stops_a_frame_before_it_is_sent<P: Pairs>() {
    let (left, _right) = P::pair(1024).await;
    let (_reader, mut writer) = left.split();
    writer.set_max_frame(14);
    writer.start_send(frame(0, 1, 10));
    writer.flush().await.unwrap();
    writer.start_send(frame(0, 1, 11));
    let error = writer.flush().await.unwrap_err();
    assert!(matches!(error, ConduitError::TooLarge { length: 15, limit: 14 }), "{error:?}");
    assert!(matches!(writer.flush().await, Err(ConduitError::Closed)));
    assert!(matches!(writer.close().await, Err(ConduitError::Closed)));
}

async fn frame_without_body_is_never_sent<P: Pairs>() {
    let (left, _right) = P::pair(1024).await;
    let (_reader, mut writer) = left.split();
    let mut empty = frame(0, 1, 0);
    empty.head.clear();
    writer.start_send(empty);
    assert!(matches!(writer.flush().await, Err(ConduitError::Empty)));
    assert_eq!((writer.written(), writer.buffered()), (0, 0));
}

async fn limit_may_be_raised_by_the_frame_before<P: Pairs>() {
    let (left, right) = P::pair(1 << 20).await;
    let ((_keep, mut writer), (mut reader, _writer)) = (left.split(), right.split());
    writer.start_send(frame(0, 1, 10));
    writer.start_send(frame(0, 2, 2 * HANDSHAKE_MAX_FRAME));
    let receiving = async {
        let mut frames = Frames::new();
        receive_some(&mut reader, &mut frames).await.unwrap();
        assert_eq!(frames.len(), 1);
        reader.set_max_frame(2 * HANDSHAKE_MAX_FRAME + 4);
        receive_some(&mut reader, &mut frames).await.unwrap();
        assert_eq!(frames.len(), 2);
    };
    let (flushed, ()) = tokio::join!(writer.flush(), receiving);
    flushed.unwrap();
}

async fn close_loses_nothing<P: Pairs>() {
    let (left, right) = P::pair(1024).await;
    let lanes = left.lanes();
    let ((_keep, mut writer), (mut reader, _writer)) = (left.split(), right.split());
    let sent: Vec<_> = (0..2000).map(|head| frame(u64::from(head % 3), head, 40)).collect();
    sent.iter().for_each(|frame| writer.start_send(frame.clone()));
    let closing = async {
        writer.close().await.unwrap();
        writer.close().await.unwrap();
        drop(writer);
    };
    let ((), (received, end)) = tokio::join!(closing, receive_all(&mut reader));
    end.unwrap();
    assert_delivered(lanes, &sent, &received);
    assert_eq!(reader.recv(&mut Frames::new()).await.unwrap(), Received::End, "the end stays the end");
}

/// `[conduit.ws.end]`
async fn half_closed_conduit_still_receives<P: Pairs>() {
    let (left, right) = P::pair(1024).await;
    let ((mut left_reader, mut left_writer), (mut right_reader, mut right_writer)) = (left.split(), right.split());
    left_writer.close().await.unwrap();
    let (received, end) = receive_all(&mut right_reader).await;
    end.unwrap();
    assert!(received.is_empty());
    for head in 0..10 {
        right_writer.start_send(frame(0, head, 10));
        right_writer.flush().await.unwrap();
    }
    right_writer.close().await.unwrap();
    let (received, end) = receive_all(&mut left_reader).await;
    end.unwrap();
    assert_eq!(received.len(), 10);
}

async fn nothing_is_sent_after_close<P: Pairs>() {
    let (left, right) = P::pair(1024).await;
    let ((_keep, mut writer), (mut reader, _writer)) = (left.split(), right.split());
    writer.close().await.unwrap();
    writer.start_send(frame(0, 1, 10));
    assert_eq!(writer.buffered(), 0);
    assert!(matches!(writer.flush().await, Err(ConduitError::Closed)));
    let (received, end) = receive_all(&mut reader).await;
    end.unwrap();
    assert!(received.is_empty());
}

async fn cancelled_flush_and_close_go_on<P: Pairs>() {
    let (left, right) = P::pair(64).await;
    let lanes = left.lanes();
    let ((_keep, mut writer), (mut reader, _writer)) = (left.split(), right.split());
    let sent = assorted(20);
    sent.iter().for_each(|frame| writer.start_send(frame.clone()));
    let closing = async {
        // Each turn drops the future of the one before.
        std::future::poll_fn(|cx| std::pin::pin!(writer.flush()).as_mut().poll(cx)).await.unwrap();
        std::future::poll_fn(|cx| std::pin::pin!(writer.close()).as_mut().poll(cx)).await.unwrap();
    };
    let ((), (received, end)) = tokio::join!(closing, receive_all(&mut reader));
    end.unwrap();
    assert_delivered(lanes, &sent, &received);
}

async fn writing_to_a_peer_that_is_gone_fails_once_with_its_cause<P: Pairs>() {
    let (left, right) = P::pair(1024).await;
    let (_keep, mut writer) = left.split();
    drop(right);
    let error = loop {
        writer.start_send(frame(0, 1, 1000));
        match writer.flush().await {
            // A network takes some before it knows.
            Ok(()) => tokio::task::yield_now().await,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, ConduitError::Io(_)), "{error:?}");
    assert_eq!(writer.buffered(), 0);
    writer.start_send(frame(0, 1, 10));
    assert!(matches!(writer.flush().await, Err(ConduitError::Closed)));
}

async fn back_pressure_is_seen_and_bounded<P: Pairs>() {
    let (left, right) = P::pair(1024).await;
    let ((_keep, mut writer), (mut reader, _writer)) = (left.split(), right.split());
    reader.set_max_frame(1 << 20);
    let payload = Bytes::from(vec![7; 64 * 1024]);
    let count = P::BULK / payload.len();
    for _ in 0..count {
        let mut next = frame(0, 1, 0);
        next.payload = payload.clone();
        writer.start_send(next);
    }
    let total = writer.buffered();
    assert!(total >= P::BULK);
    // A network moves bytes into its own buffers for a while; then it stands still.
    let mut before = u64::MAX;
    while before != writer.written() {
        before = writer.written();
        for _ in 0..100 {
            assert!(poll_once(|cx| writer.poll_flush(cx)).await.is_pending());
            tokio::task::yield_now().await;
        }
    }
    assert!(writer.buffered() > 0);
    assert_eq!(writer.buffered() as u64 + writer.written(), total as u64);

    let (closed, (received, end)) = tokio::join!(writer.close(), receive_all(&mut reader));
    closed.unwrap();
    end.unwrap();
    assert_eq!((received.len(), writer.buffered(), writer.written()), (count, 0, total as u64));
}

/// `[lesson 11]`: with a reader that waits for its writer, both sides would stop here.
async fn two_floods_through_a_narrow_pipe_make_progress<P: Pairs>() {
    let (left, right) = P::pair(1024).await;
    let lanes = left.lanes();
    let size = 10_000;
    let flood: Vec<_> = (0..P::BULK / size / 2).map(|head| frame(head as u64 % 4, head as u32, size)).collect();
    let (at_left, at_right) = tokio::join!(exchange(left, &flood, 100_000), exchange(right, &flood, 100_000));
    assert_delivered(lanes, &flood, &at_left);
    assert_delivered(lanes, &flood, &at_right);
}

/// `[conduit.quic.reset]`
async fn dropped_writer_ends_the_peer<P: Pairs>() {
    let (left, right) = P::pair(1024).await;
    let ((_keep, mut writer), (mut reader, _writer)) = (left.split(), right.split());
    writer.start_send(frame(0, 1, 10));
    writer.flush().await.unwrap();
    drop(writer);
    let (received, end) = receive_all(&mut reader).await;
    end.unwrap();
    assert_eq!(received.len(), 1);
}

async fn discarding_hears_the_end<P: Pairs>() {
    let (left, right) = P::pair(1024).await;
    let ((_keep, mut writer), (mut reader, _writer)) = (left.split(), right.split());
    assorted(40).into_iter().for_each(|frame| writer.start_send(frame));
    let (closed, ()) = tokio::join!(writer.close(), std::future::poll_fn(|cx| reader.poll_discard(cx)));
    closed.unwrap();
}
