//! Serve and fetch, as two processes.

use std::time::{Duration, Instant};

use tollway_protocol::payment::Address;

use crate::support::{PATIENCE, Running, Shop, sum, tollway};

#[test]
fn a_file_is_paid_for_and_complete() {
    let shop = Shop::open("25/KiB");
    let bytes = shop.stock("a", 1_000_000);
    let report = tollway(&shop.paid_fetch("a", 1_000_000)).success().json();
    assert_eq!(shop.got(), bytes);
    assert_eq!(shop.out().len(), 1);
    assert_eq!((&report["ok"], report["bytes"].as_u64()), (&true.into(), Some(1_000_000)));
    // 15 chunks of 64 KiB and a rest, three bytes of length for each; 3 + 1 for the answer.
    assert_eq!(report["metered_bytes"].as_u64(), Some(1_000_000 + 16 * 3 + 4), "{report}");
    assert_eq!(sum(&report, "spent"), (1_000_052_u128 * 25).div_ceil(1024));
    assert_eq!(sum(&report, "payer_metered"), sum(&report, "spent"), "{report}");
    let channel = shop.channel(&report);
    assert!(channel.finalized);
    assert_eq!(channel.settled.units(), sum(&report, "spent"));
    assert_eq!(shop.balance(shop.address.unwrap(), channel.descriptor.token), channel.settled);
    let returned = channel.deposit.checked_sub(channel.settled).unwrap();
    assert_eq!(shop.balance(channel.descriptor.payer, channel.descriptor.token), returned);
}

#[test]
fn a_free_file_needs_no_key() {
    let shop = Shop::open("0");
    for (name, size) in [("empty", 0), ("one", 1), ("chunk", 65_536), ("more", 200_001)] {
        let bytes = shop.stock(name, size);
        let report = tollway(&shop.fetch(name, &["--sha256"])).success().json();
        assert_eq!(shop.got(), bytes, "{name}");
        assert_eq!(report["bytes"].as_u64(), Some(size as u64));
        assert_eq!(report["sha256"].as_str().unwrap().len(), 64);
        assert!(report["channel_id"].is_null(), "{report}");
    }
}

#[test]
fn one_payee_serves_many_one_after_another_and_at_once() {
    let shop = Shop::open("25/KiB");
    let bytes = shop.stock("a", 300_000);
    for _ in 0..3 {
        tollway(&shop.paid_fetch("a", 100_000)).success();
        assert_eq!(shop.got(), bytes);
    }
    let fetches: Vec<Running> = (0..3)
        .map(|number| {
            let key = shop.path(&format!("{number}.key")).to_str().unwrap().to_owned();
            tollway(&["keygen", &key]).success();
            let out = shop.path("out").join(number.to_string()).to_str().unwrap().to_owned();
            let (url, payee) = (format!("{}/a", shop.url), shop.address.unwrap().to_string());
            Running::start(&["fetch", &url, "-o", &out, "--key", &key, "--payee", &payee, "--budget", "100000"])
        })
        .collect();
    for (number, fetch) in fetches.into_iter().enumerate() {
        fetch.end().success();
        assert_eq!(std::fs::read(shop.path("out").join(number.to_string())).unwrap(), bytes);
    }
}

#[test]
fn a_budget_that_is_too_small_leaves_no_file_and_pays_for_what_came() {
    let shop = Shop::open("25/KiB");
    shop.stock("a", 1 << 20);
    // The file costs 25,602.
    for budget in [25_601, 20_000] {
        let outcome = tollway(&shop.paid_fetch("a", budget)).failure();
        assert_eq!(shop.out(), Vec::<std::path::PathBuf>::new());
        for number in ["25602", &budget.to_string()] {
            assert!(outcome.stderr.contains(number), "{outcome:?}");
        }
        let report = outcome.json();
        assert_eq!((&report["ok"], &report["out"]), (&false.into(), &serde_json::Value::Null), "{report}");
        let channel = shop.channel(&report);
        assert!(channel.finalized, "{channel:?}");
        assert_eq!(channel.settled.units(), sum(&report, "spent"), "{report}");
        assert_eq!(sum(&report, "payer_metered"), sum(&report, "spent"), "{report}");
        assert!(channel.settled.units() <= u128::from(budget));
    }
    tollway(&shop.paid_fetch("a", 25_602)).success();
}

#[test]
fn a_budget_that_opens_no_channel_says_what_is_needed() {
    let shop = Shop::open("25/KiB");
    shop.stock("a", 1 << 20);
    let outcome = tollway(&shop.paid_fetch("a", 1)).failure();
    assert!(outcome.stderr.contains("budget"), "{outcome:?}");
    assert!(shop.out().is_empty());
}

#[test]
fn another_payee_gets_nothing() {
    let shop = Shop::open("25/KiB");
    shop.stock("a", 1000);
    let other = Address([0x11; 20]);
    let arguments = shop.fetch("a", &["--payee", &other.to_string(), "--budget", "1000000"]);
    let outcome = tollway(&arguments).failure();
    for address in [other, shop.address.unwrap()] {
        assert!(outcome.stderr.contains(&address.to_string()), "{outcome:?}");
    }
    let report = outcome.json();
    assert!(report["channel_id"].is_null() && report["spent"].is_null(), "{report}");
    assert!(shop.out().is_empty());
}

#[test]
fn a_payee_that_nobody_can_confirm_is_not_paid() {
    let shop = Shop::open("25/KiB");
    shop.stock("a", 1000);
    let outcome = tollway(&shop.fetch("a", &["--budget", "1000000"])).failure();
    let payee = shop.address.unwrap().to_string();
    for text in [payee.as_str(), "25/KiB", "--payee", "tcp://"] {
        assert!(outcome.stderr.contains(text), "{text}: {outcome:?}");
    }
    assert!(outcome.json()["channel_id"].is_null());
    let outcome = tollway(&shop.fetch("a", &[])).failure();
    assert!(outcome.stderr.contains("--budget"), "{outcome:?}");
}

#[test]
fn no_name_leaves_the_directory() {
    for price in ["0", "25/KiB"] {
        let shop = Shop::open(price);
        shop.stock("a", 1000);
        std::fs::write(shop.path("secret"), "secret").unwrap();
        std::fs::create_dir(shop.path("files/sub")).unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink("../secret", shop.path("files/link")).unwrap();
        let absolute = shop.path("secret").to_str().unwrap().to_owned();
        let forbidden = ["../secret", "..%2fsecret", "sub/../../secret", "link", &absolute, "/etc/passwd"];
        for name in forbidden.into_iter().chain(["sub", "a%00", "none"]) {
            if cfg!(not(unix)) && name == "link" {
                continue;
            }
            let arguments = match price {
                "0" => shop.fetch(name, &[]),
                _ => shop.paid_fetch(name, 1_000_000),
            };
            let outcome = tollway(&arguments).failure();
            let reason = match name {
                "sub" => "not a regular file",
                "a%00" => "not a file name",
                "none" => "no such file",
                _ => "out of the directory",
            };
            assert!(outcome.stderr.contains(reason), "{name}: {outcome:?}");
            assert!(shop.out().is_empty(), "{name}");
        }
    }
}

#[test]
fn a_file_with_another_hash_is_not_kept() {
    let shop = Shop::open("0");
    shop.stock("a", 1000);
    let hash = format!("--sha256={}", "11".repeat(32));
    let outcome = tollway(&shop.fetch("a", &[&hash])).failure();
    assert!(outcome.stderr.contains(&"11".repeat(32)), "{outcome:?}");
    assert!(shop.out().is_empty());
    let found = outcome.json()["sha256"].as_str().unwrap().to_owned();
    tollway(&shop.fetch("a", &[&format!("--sha256={found}")])).success();
}

#[test]
fn what_is_not_a_file_is_not_replaced() {
    let shop = Shop::open("0");
    shop.stock("a", 1000);
    std::fs::create_dir(shop.path("out/got")).unwrap();
    tollway(&shop.fetch("a", &[])).failure();
    assert!(shop.path("out/got").is_dir());
    std::fs::remove_dir(shop.path("out/got")).unwrap();
    std::fs::write(shop.path("out/got"), "old").unwrap();
    tollway(&shop.fetch("none", &[])).failure();
    assert_eq!(shop.got(), b"old", "a fetch that fails leaves what was there");
}

/// A file that takes a while, and no room on the disk.
#[cfg(unix)]
fn huge(shop: &Shop) {
    std::fs::File::create(shop.path("files/huge")).unwrap().set_len(64 << 30).unwrap();
}

#[cfg(unix)]
fn wait_for_partial_file(shop: &Shop) {
    let deadline = Instant::now() + PATIENCE;
    while !shop.out().iter().any(|path| path.to_str().unwrap().contains(".partial-")) {
        assert!(Instant::now() < deadline, "nothing comes");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_no_file_and_closes_the_channel() {
    let shop = Shop::open("25/KiB");
    huge(&shop);
    let fetch = Running::start(&shop.paid_fetch("huge", 10_000_000_000));
    wait_for_partial_file(&shop);
    fetch.interrupt();
    let outcome = fetch.end();
    assert_eq!(outcome.code, Some(130), "{outcome:?}");
    assert!(shop.out().is_empty(), "{:?}", shop.out());
    let report = outcome.json();
    let channel = shop.channel(&report);
    assert!(channel.finalized, "{channel:?}");
    assert_eq!(channel.settled.units(), sum(&report, "spent"), "{report}");
    assert_eq!(sum(&report, "payer_metered"), sum(&report, "spent"), "{report}");
}

#[cfg(unix)]
#[test]
fn a_payee_that_is_killed_leaves_no_file() {
    let shop = Shop::open("0");
    huge(&shop);
    let fetch = Running::start(&shop.fetch("huge", &[]));
    wait_for_partial_file(&shop);
    let Shop { dir, payee, .. } = shop;
    drop(payee);
    let outcome = fetch.end().failure();
    assert!(!outcome.json()["ok"].as_bool().unwrap());
    assert_eq!(std::fs::read_dir(dir.path().join("out")).unwrap().count(), 0);
}

#[cfg(unix)]
#[test]
fn ctrl_c_ends_a_payee_in_order() {
    let shop = Shop::open("25/KiB");
    shop.stock("a", 1000);
    tollway(&shop.paid_fetch("a", 100_000)).success();
    shop.payee.interrupt();
    shop.payee.end().success();
}
