//! Key files.

use tollway_protocol::payment::Address;

use crate::support::tollway;

#[test]
fn keygen_prints_the_address_and_keeps_the_key_to_its_owner() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.key");
    let made = tollway(&["keygen".as_ref(), path.as_os_str()]).success();
    made.stdout.trim_end().parse::<Address>().unwrap();
    let key = std::fs::read_to_string(&path).unwrap();
    assert!(!made.stdout.contains(key.trim()) && !made.stderr.contains(key.trim()));
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    }
}

#[test]
fn keygen_overwrites_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.key");
    std::fs::write(&path, "precious").unwrap();
    let refused = tollway(&["keygen".as_ref(), path.as_os_str()]).failure();
    assert!(refused.stderr.contains("not overwritten"), "{refused:?}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

#[cfg(unix)]
#[test]
fn keygen_does_not_write_through_a_link() {
    let dir = tempfile::tempdir().unwrap();
    let (target, link) = (dir.path().join("target"), dir.path().join("a.key"));
    std::os::unix::fs::symlink(&target, &link).unwrap();
    tollway(&["keygen".as_ref(), link.as_os_str()]).failure();
    assert!(!target.exists());
}

#[cfg(unix)]
#[test]
fn a_key_that_others_can_read_is_not_used() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.key");
    tollway(&["keygen".as_ref(), path.as_os_str()]).success();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    let serve = ["ledger", "serve", "--dev", "--listen", "tcp://127.0.0.1:0", "--key"].map(Into::into);
    let refused = tollway(&[serve.as_slice(), &[path.into_os_string()]].concat()).failure();
    assert!(refused.stderr.contains("chmod 600"), "{refused:?}");
}

#[test]
fn every_help_has_an_example() {
    for command in [&["keygen"][..], &["ledger", "serve"], &["serve"], &["fetch"], &["demo"], &["voucher", "check"]] {
        let help = tollway(&[command, &["--help"]].concat()).success();
        let example = format!("  tollway {}", command.join(" "));
        assert!(help.stdout.contains(&example), "{}", help.stdout);
    }
}

#[test]
fn wrong_usage_is_told_apart_from_failure() {
    let wrong = tollway(&["fetch", "http://127.0.0.1:1/x"]);
    assert_eq!(wrong.code, Some(2));
    assert!(wrong.stderr.contains("tcp://"), "{wrong:?}");
    let nowhere = tollway(&["ledger", "serve", "--listen", "tcp://127.0.0.1:0", "--key", "none"]);
    assert_eq!(nowhere.code, Some(2));
    assert!(nowhere.stderr.contains("--store"), "{nowhere:?}");
}
