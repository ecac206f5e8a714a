//! Who may come in with a token, and who may look.

use serde_json::Value;

use crate::support::{Running, tollway};

#[test]
fn a_token_lets_in_and_an_operators_shows_what_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
    write("a", "what was asked for");
    write("tokens", "# who may come\nalice alice-has-this-token\n\nbob bobs-is-another-token operator\n");
    write("alice", "alice-has-this-token\n");
    write("bob", "bob bobs-is-another-token\n");
    write("mallory", "mallory-made-this-up\n");
    let (dir, known) = (folder.path().to_str().unwrap().to_owned(), path("tokens"));
    let serve = ["serve", "--listen", "tcp://127.0.0.1:0", "--dir", &dir, "--price", "0", "--json"];
    let mut shop = Running::start(&[&serve[..], &["--token-file", &known]].concat());
    let ready: Value = serde_json::from_str(&shop.line()).unwrap();
    let url = ready["url"].as_str().unwrap();
    let (file, copy) = (format!("{url}/a"), path("copy"));

    let fetch = |token: &str| tollway(&["fetch", &file, "-o", &copy, "--token-file", &path(token)]);
    fetch("alice").success();
    assert_eq!(std::fs::read_to_string(&copy).unwrap(), "what was asked for");
    let refused = fetch("mallory").failure();
    assert!(refused.stderr.contains("token") && !refused.stderr.contains("mallory-made-this-up"), "{refused:?}");
    tollway(&["fetch", &file, "-o", &copy]).failure();

    let inspect = |token: &str| tollway(&["inspect", url, "--token-file", &path(token), "--json"]);
    let seen = inspect("bob").success().json();
    let sessions = seen["snapshot"]["sessions"].as_array().unwrap();
    assert!(sessions.iter().any(|session| session["identity"] == "bob"), "{seen}");
    let refused = inspect("alice").failure();
    assert!(refused.stderr.contains("operators"), "{refused:?}");

    let watch = ["inspect", url, "--token-file", &path("bob"), "--json", "--watch"];
    let mut watch = Running::start(&watch);
    assert!(watch.line().contains("snapshot"));
    fetch("alice").success();
    let opened = loop {
        let line: Value = serde_json::from_str(&watch.line()).unwrap();
        if line["event"]["SessionOpened"]["identity"] == "alice" {
            break line;
        }
    };
    assert!(opened["event"]["SessionOpened"]["peer"].as_str().unwrap().starts_with("tcp://"), "{opened}");
}

#[test]
fn a_token_file_that_is_none_says_which_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokens");
    std::fs::write(&path, "alice alice-has-this-token\nbob short\n").unwrap();
    let (dir, path) = (folder.path().to_str().unwrap(), path.to_str().unwrap());
    let serve = ["serve", "--listen", "tcp://127.0.0.1:0", "--dir", dir, "--price", "0", "--token-file", path];
    let failed = tollway(&serve).failure();
    assert!(failed.stderr.contains("line 2") && !failed.stderr.contains("short\""), "{failed:?}");
}
