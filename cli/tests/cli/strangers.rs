//! Whoever knocks with something else is refused, and the payee goes on.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};

use tollway_protocol::frame::PREFACE;
use tollway_protocol::id::Parity;
use tollway_protocol::limits::SessionLimits;
use tollway_protocol::message::{Hello, encode_head};
use tollway_protocol::metadata::Metadata;

use crate::support::{PATIENCE, Running, Shop, tollway};

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

/// Nobody closes the descriptors that a crowd holds, so the payee runs out of them; it goes on when the crowd is gone.
#[cfg(unix)]
#[test]
fn a_payee_without_file_descriptors_goes_on_when_there_are_some_again() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("a"), b"what was asked for").unwrap();
    let serve = format!(
        "ulimit -n 32 && exec '{}' serve --listen tcp://127.0.0.1:0 --dir '{}' --price 0 --json",
        env!("CARGO_BIN_EXE_tollway"),
        folder.path().display()
    );
    let mut shop = Running::start_with("sh", &["-c", &serve]);
    let ready: serde_json::Value = serde_json::from_str(&shop.line()).unwrap();
    let url = ready["url"].as_str().unwrap();
    let address = url.strip_prefix("tcp://").unwrap();
    // The system accepts them all; the payee can open two dozen.
    let crowd: Vec<TcpStream> = (0..64).map(|_| TcpStream::connect(address).unwrap()).collect();
    // The last of them would be told what this port speaks, if there were a descriptor for it.
    let mut last = crowd.last().unwrap();
    last.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    last.set_read_timeout(Some(std::time::Duration::from_millis(300))).unwrap();
    assert!(last.read(&mut [0; 1]).is_err(), "the payee has a descriptor for everybody: this shows nothing");
    drop(crowd);
    let copy = folder.path().join("copy");
    tollway(&["fetch", &format!("{url}/a"), "-o", copy.to_str().unwrap()]).success();
    assert_eq!(std::fs::read(copy).unwrap(), b"what was asked for");
}
