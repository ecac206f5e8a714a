//! Serving at several places at once, and what TLS needs.

use std::path::Path;

use serde_json::Value;

use crate::support::{Running, tollway};

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Serves the files of `dir` for nothing at these places, and returns its URLs.
fn serve(dir: &Path, places: &[&str], more: &[&str]) -> (Running, Vec<String>) {
    let mut arguments = ["serve", "--json", "--price", "0", "--dir"].map(str::to_owned).to_vec();
    arguments.push(text(dir));
    places.iter().for_each(|place| arguments.extend(["--listen".to_owned(), (*place).to_owned()]));
    arguments.extend(more.iter().map(ToString::to_string));
    let mut server = Running::start(&arguments);
    let ready: Value = serde_json::from_str(&server.line()).unwrap();
    let urls: Vec<String> = ready["urls"].as_array().unwrap().iter().map(|url| url.as_str().unwrap().into()).collect();
    assert_eq!(ready["url"], urls[0]);
    (server, urls)
}

/// The URL of a file at a place.
fn at(url: &str, name: &str) -> String {
    match url.split_once('#') {
        Some((place, pin)) => format!("{place}/{name}#{pin}"),
        None if url.starts_with("unix:") => format!("{url}:/{name}"),
        None => format!("{url}/{name}"),
    }
}

#[test]
fn one_server_serves_at_all_its_places() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a"), "the same everywhere").unwrap();
    let socket = format!("unix://{}", text(&dir.path().join("s")));
    let mut places = vec![
        "tcp://127.0.0.1:0",
        "tls://127.0.0.1:0",
        "quic://127.0.0.1:0",
        "ws://127.0.0.1:0",
        "wss://127.0.0.1:0",
        "tcp://127.0.0.1:0",
    ];
    if cfg!(unix) {
        places.push(&socket);
    }
    let (_server, urls) = serve(dir.path(), &places, &[]);
    assert_eq!(urls.len(), places.len());
    let out = dir.path().join("out");
    for url in urls {
        tollway(&["fetch", &at(&url, "a"), "-o", &text(&out)]).success();
        assert_eq!(std::fs::read_to_string(&out).unwrap(), "the same everywhere", "{url}");
        std::fs::remove_file(&out).unwrap();
    }
}

#[test]
fn a_certificate_is_kept_and_its_pin_with_it() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a"), "a").unwrap();
    let key = text(&dir.path().join("payee.key"));
    tollway(&["keygen", &key]).success();
    let pin = |more: &[&str]| {
        let (server, urls) = serve(dir.path(), &["tls://127.0.0.1:0"], more);
        (server, urls[0].clone(), urls[0].split_once("#sha256=").unwrap().1.to_owned())
    };
    let (first, _, kept) = pin(&["--key", &key]);
    drop(first);
    assert!(dir.path().join("payee.key.tls").is_file());
    let (_second, now, again) = pin(&["--key", &key]);
    assert_eq!(again, kept, "the second start found the first one's certificate");
    let (_other, elsewhere, fresh) = pin(&[]);
    assert_ne!(fresh, kept);

    // The right pin at the wrong server, and none at all: a certificate that signs itself is no CA.
    let wrong = at(&elsewhere, "a").replace(&fresh, &kept);
    let out = text(&dir.path().join("out"));
    let refused = tollway(&["fetch", &wrong, "-o", &out]).failure();
    assert!(refused.stderr.contains("another certificate than the pinned one"), "{refused:?}");
    let unpinned = at(now.split_once('#').unwrap().0, "a");
    let ca = text(&dir.path().join("payee.key.tls"));
    let refused = tollway(&["fetch", &unpinned, "-o", &out, "--ca", &ca]).failure();
    assert!(refused.stderr.contains("certificate is not for") || refused.stderr.contains("#sha256="), "{refused:?}");
}

#[test]
fn plain_tcp_beyond_this_machine_is_warned_of() {
    let dir = tempfile::tempdir().unwrap();
    for (place, warned) in [("tcp://0.0.0.0:0", true), ("tcp://127.0.0.1:0", false), ("tls://0.0.0.0:0", false)] {
        let (server, _) = serve(dir.path(), &[place], &[]);
        server.interrupt();
        let ended = server.end();
        assert_eq!(ended.stderr.contains("not encrypted"), warned, "{place}: {ended:?}");
    }
}

#[cfg(unix)]
#[test]
fn a_killed_servers_socket_is_taken_over_and_a_live_ones_is_not() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("a"), "a").unwrap();
    let socket = format!("unix://{}", text(&dir.path().join("s")));
    let (killed, _) = serve(dir.path(), &[&socket], &[]);
    drop(killed);
    assert!(dir.path().join("s").exists(), "kill -9 leaves the file");
    let (_server, urls) = serve(dir.path(), &[&socket], &[]);
    let refused = tollway(&["serve", "--price", "0", "--dir", &text(dir.path()), "--listen", &socket]).failure();
    assert!(refused.stderr.contains("somebody listens there already"), "{refused:?}");
    let out = text(&dir.path().join("out"));
    tollway(&["fetch", &at(&urls[0], "a"), "-o", &out]).success();
}

/// Whoever asks for clients with certificates is not to serve everybody.
#[test]
fn options_of_tls_without_tls_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = text(dir.path());
    for options in [&["--client-ca", "ca.pem"][..], &["--tls-cert", "c.pem", "--tls-key", "k.pem"]] {
        let serve = ["serve", "--price", "0", "--dir", &path, "--listen", "tcp://127.0.0.1:0"];
        let refused = tollway(&[&serve, options].concat()).failure();
        assert!(refused.stderr.contains(&format!("{} is of no use", options[0])), "{refused:?}");
    }
}
