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

#[test]
fn an_encrypted_key_is_made_shown_used_exported_and_imported() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).into_os_string();
    let write_private = |name: &str, text: &str| {
        std::fs::write(path(name), text).unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            std::fs::set_permissions(path(name), std::fs::Permissions::from_mode(0o600)).unwrap();
        }
    };
    write_private("passphrase", "correct horse\n");
    write_private("wrong", "battery staple\n");
    let key = |words: &[&str], files: &[&str], passphrase: &str| {
        let words = ["key"].iter().chain(words).map(|word| std::ffi::OsString::from(*word));
        let files = files.iter().map(|name| path(name));
        let last = ["--passphrase-file".into(), path(passphrase)];
        tollway(&words.chain(files).chain(last).collect::<Vec<_>>())
    };
    let made = key(&["new"], &["a.json"], "passphrase").success();
    let address: Address = made.stdout.trim_end().parse().unwrap();
    let text = std::fs::read_to_string(path("a.json")).unwrap();
    assert!(text.contains("aes-128-ctr") && text.contains("scrypt") && !text.contains("correct horse"));
    let shown = key(&["show", "--verify", "--json"], &["a.json"], "passphrase").success();
    assert!(shown.stdout.contains(&address.to_string()) && shown.stdout.contains("\"encrypted\":true"), "{shown:?}");
    let refused = key(&["show", "--verify"], &["a.json"], "wrong").failure();
    assert!(refused.stderr.contains("passphrase is wrong"), "{refused:?}");
    // Exported as a plain key, and imported again under another passphrase: the same address.
    key(&["export"], &["a.json", "plain.key"], "passphrase").success();
    let again = key(&["import"], &["plain.key", "b.json"], "wrong").success();
    assert_eq!(again.stdout.trim_end(), address.to_string());
    let secret = std::fs::read_to_string(path("plain.key")).unwrap();
    assert!(!text.contains(secret.trim().trim_start_matches("0x")));
    // Whoever asks for it without a passphrase is told what to do, and hangs on no terminal.
    let bare = tollway(&["key".into(), "show".into(), "--verify".into(), path("b.json")]).failure();
    assert!(bare.stderr.contains("--passphrase-file"), "{bare:?}");
    key(&["show", "--verify"], &["b.json"], "wrong").success();
    // Where a key is wanted, an encrypted one does: the ledger's address is that of its key.
    let ledger = ["ledger".into(), "address".into(), "--key".into(), path("a.json")];
    let passphrase = ["--passphrase-file".into(), path("passphrase")];
    let told = tollway(&[ledger.as_slice(), &passphrase].concat()).success();
    assert!(told.stdout.to_lowercase().contains(&address.to_string().to_lowercase()), "{told:?}");
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        assert_eq!(std::fs::metadata(path("a.json")).unwrap().permissions().mode() & 0o7777, 0o600);
        std::fs::set_permissions(path("passphrase"), std::fs::Permissions::from_mode(0o644)).unwrap();
        let open = key(&["show", "--verify"], &["a.json"], "passphrase").failure();
        assert!(open.stderr.contains("chmod 600"), "{open:?}");
    }
}
