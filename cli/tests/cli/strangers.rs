//! Whoever knocks with something else is refused, and the payee goes on.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use tollway_protocol::frame::PREFACE;
use tollway_protocol::id::Parity;
use tollway_protocol::limits::SessionLimits;
use tollway_protocol::message::{Hello, encode_head};
use tollway_protocol::metadata::Metadata;

use crate::support::{PATIENCE, Shop, tollway};

/// Sends bytes and returns what comes back until the payee hangs up.
#[track_caller]
fn knock(shop: &Shop, bytes: &[u8]) -> Vec<u8> {
    let address = shop.url.strip_prefix("tcp://").unwrap();
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        Ok(_) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        Err(error) => panic!("{error} after {:?}", &bytes[..bytes.len().min(16)]),
    }
    // Fails only if the payee has hung up entirely.
    let _ = stream.shutdown(Shutdown::Both);
    answer
}

/// A frame after the preface.
fn frame(body: &[u8]) -> Vec<u8> {
    let length = u32::try_from(body.len()).unwrap().to_le_bytes();
    [&PREFACE[..], &length, body].concat()
}

#[test]
fn strangers_are_refused_and_the_payee_goes_on() {
    let shop = Shop::open("25/KiB");
    let bytes = shop.stock("a", 100_000);

    let answer = knock(&shop, b"GET /a HTTP/1.1\r\nHost: localhost\r\n\r\n");
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("Tollway"), "{answer}");

    let noise: Vec<u8> = (0..4096_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    knock(&shop, &noise);
    knock(&shop, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03");
    // Another generation, an oversized length, a kind that is none, an empty frame.
    knock(&shop, b"TOLLWAY\x02whatever");
    knock(&shop, &[&PREFACE[..], &[0xff; 4]].concat());
    knock(&shop, &frame(&[0x7f; 100]));
    knock(&shop, &frame(&[]));
    // A version that nobody speaks yet.
    let hello = Hello {
        min_version: 999,
        max_version: 1000,
        parity: Parity::Odd,
        limits: SessionLimits::default(),
        metadata: Metadata::new(),
    };
    let answer = knock(&shop, &frame(&encode_head(&hello)));
    assert!(answer.starts_with(&PREFACE), "{answer:?}");
    // One that says nothing and one that leaves in the middle of a frame.
    let silent = TcpStream::connect(shop.url.strip_prefix("tcp://").unwrap()).unwrap();
    drop(TcpStream::connect(shop.url.strip_prefix("tcp://").unwrap()).unwrap().write_all(&PREFACE[..5]));

    tollway(&shop.paid_fetch("a", 100_000)).success();
    assert_eq!(shop.got(), bytes);
    drop(silent);
}
