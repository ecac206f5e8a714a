//! Bytes of a stranger: the preface, frames cut out of a stream however it is read, and all that stands in frames.
//!
//! The first byte chooses the limit on frames, the second how the rest is cut into reads.
#![no_main]

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::fuzz_target;
use tollway_protocol::frame::{FrameDecoder, FrameError, LENGTH_BYTES, PREFACE, PrefaceCheck, check_preface};
use tollway_protocol::message::*;
use tollway_protocol::payment::{Credential, PaymentMessage, Quote};
use tollway_protocol::stream::{ItemRun, write_item};

fuzz_target!(|data: &[u8]| {
    let [limit, cut, rest @ ..] = data else { return };
    check_prefaces(rest);
    let limit = [1, 16, 256, 65_536, 1 << 20][usize::from(*limit) % 5];
    let whole = frames(rest, limit, rest.len().max(1));
    // However a stream is read, the same frames come out of it.
    assert_eq!(whole, frames(rest, limit, usize::from(*cut) % 61 + 1));
    whole.0.iter().for_each(check_frame);
    check_payload(&Bytes::copy_from_slice(rest));
});

/// A stream is found out at its first byte that differs, and what it was taken for stands.
fn check_prefaces(bytes: &[u8]) {
    for end in 0..=bytes.len().min(24) {
        let seen = &bytes[..end];
        match check_preface(seen) {
            PrefaceCheck::NeedMore => assert!(end < PREFACE.len() && PREFACE.starts_with(seen)),
            PrefaceCheck::Ok => assert!(seen.starts_with(&PREFACE)),
            PrefaceCheck::Stranger(stranger) => {
                let common = end.min(PREFACE.len());
                assert_ne!(seen[..common], PREFACE[..common], "{stranger}");
                assert!(!stranger.reply().is_empty());
            }
        }
    }
}

/// The frames of a stream that is read in pieces of `cut` bytes; what is left; and the error that ended it.
fn frames(bytes: &[u8], limit: usize, cut: usize) -> (Vec<Bytes>, usize, Option<FrameError>) {
    let (mut decoder, mut buffer, mut frames) = (FrameDecoder::new(limit), BytesMut::new(), Vec::new());
    for piece in bytes.chunks(cut) {
        buffer.extend_from_slice(piece);
        loop {
            let hint = decoder.reserve_hint(&buffer);
            assert!(hint <= limit + LENGTH_BYTES && hint <= buffer.len().max(1 << 20), "{hint} bytes are reserved");
            let before = buffer.len();
            match decoder.decode(&mut buffer) {
                Ok(Some(frame)) => {
                    assert!((1..=limit).contains(&frame.len()));
                    assert_eq!(before - buffer.len(), frame.len() + LENGTH_BYTES);
                    frames.push(frame);
                }
                Ok(None) => break,
                // The rest of the stream is never looked at.
                Err(error) => return (frames, 0, Some(error)),
            }
        }
    }
    (frames, buffer.len(), None)
}

/// What decodes is encoded to something that decodes to the same.
fn check_header<H: Header + PartialEq + core::fmt::Debug>(frame: &Bytes) {
    let mut payload = frame.clone();
    let Ok(header) = decode_header::<H>(&mut payload) else { return };
    assert!(H::HAS_PAYLOAD || payload.is_empty());
    let mut again = BytesMut::from(encode_head(&header).as_slice());
    // Longer forms of integers decode, and are never written.
    assert!(again.len() + payload.len() <= frame.len());
    again.extend_from_slice(&payload);
    let mut again = again.freeze();
    assert_eq!((decode_header::<H>(&mut again).as_ref(), &again), (Ok(&header), &payload));
}

fn check_frame(frame: &Bytes) {
    macro_rules! check {
        ($($header:ident)*) => {
            match frame[0] {
                $($header::KIND => check_header::<$header>(frame),)*
                _ => {}
            }
        };
    }
    check!(
        Hello HelloAck Refuse ProtocolError GoAway Ping Pong Challenge Proof Open Accept Reject Close Request Response Cancel Done
        Items End Reset Stop Credit Window Payment
    );
    let mut payload = frame.clone();
    if frame[0] == Items::KIND && decode_header::<Items>(&mut payload).is_ok() {
        check_items(&payload);
    }
    check_payload(&frame.slice(1..));
}

/// A run is what its items say, and has one form.
fn check_items(payload: &Bytes) {
    for max_item in [0, 100, u32::MAX] {
        let Ok(mut run) = ItemRun::parse(payload.clone(), max_item) else { continue };
        let (mut items, mut bytes, mut again) = (0, 0, Vec::new());
        let (count, sum, credit) = (run.items(), run.item_bytes(), run.credit());
        while let Some(item) = run.next_item() {
            assert!(item.len() <= max_item as usize);
            (items, bytes) = (items + 1, bytes + item.len() as u64);
            write_item(&mut again, &item);
        }
        assert_eq!((count, sum, credit), (items, bytes, bytes + 16 * u64::from(items)));
        assert_eq!(again, payload[..]);
    }
}

/// Messages about money have one form each.
fn check_payload(payload: &Bytes) {
    if let Ok(message) = PaymentMessage::decode(payload) {
        assert_eq!(message.encode(), payload[..]);
    }
    if let Ok(quote) = Quote::decode(payload) {
        assert_eq!(quote.encode(), payload[..]);
    }
    if let Ok(credential) = Credential::decode(payload) {
        assert_eq!(credential.encode().expect("it was decoded"), payload[..]);
    }
    check_items(payload);
}
