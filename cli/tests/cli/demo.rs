//! The demo: every sum.

use serde_json::Value;
use tollway_protocol::payment::{Amount, Rate};

use crate::support::{sum, tollway};

/// What every demo must come to.
#[track_caller]
fn check(report: &Value, size: u64, price: &str) {
    assert_eq!((report["bytes"].as_u64(), &report["sha256_ok"]), (Some(size), &Value::Bool(true)), "{report}");
    assert_eq!(report["items"].as_u64().unwrap(), size.div_ceil(64 * 1024), "{report}");
    assert!(report["elapsed_ms"].as_f64().unwrap() > 0.0, "{report}");
    let metered = report["metered_bytes"].as_u64().unwrap();
    assert!(metered > size && metered < size + size / 1000 + 64, "{report}");
    let cost = price.parse::<Rate>().map_or(Amount::ZERO, |rate| rate.cost(metered).unwrap());
    assert_eq!(sum(report, "spent"), cost.units(), "{report}");
    assert_eq!(sum(report, "payer_metered"), sum(report, "spent"), "{report}");
    assert_eq!(sum(report, "settled"), sum(report, "spent"), "{report}");
    assert_eq!(sum(report, "settled") + sum(report, "refunded"), sum(report, "deposit"), "{report}");
    assert!(sum(report, "accepted") >= sum(report, "spent"), "{report}");
    assert!(sum(report, "accepted") <= sum(report, "deposit"), "{report}");
    assert!(sum(report, "peak_ahead") <= sum(report, "max_ahead"), "{report}");
    assert_eq!(report["price"], price);
}

#[test]
fn every_sum_of_a_paid_demo_is_right() {
    let report = tollway(&["demo", "--json", "--size", "3MiB"]).success().json();
    check(&report, 3 << 20, "25/KiB");
    assert!(report["vouchers"].as_u64().unwrap() > 0, "{report}");
}

#[test]
fn every_conduit_brings_the_same_bytes_for_the_same_money() {
    let fetch = |conduit: &str| {
        let report = tollway(&["demo", "--json", "--size", "1MiB", "--conduit", conduit]).success().json();
        check(&report, 1 << 20, "25/KiB");
        assert_eq!(report["conduit"], conduit, "{report}");
        ["sha256", "bytes", "items", "metered_bytes", "spent", "settled", "deposit", "refunded", "max_ahead"]
            .map(|field| (field, report[field].clone()))
    };
    let tcp = fetch("tcp");
    for conduit in CONDUITS {
        assert_eq!(fetch(conduit), tcp, "{conduit}");
    }
}

/// Those that this system has beside TCP.
const CONDUITS: &[&str] = &[
    "tls",
    "quic",
    "ws",
    #[cfg(unix)]
    "unix",
];

#[test]
fn sizes_and_prices_that_do_not_divide_are_right_too() {
    for (size, price) in [("1", "1/KiB"), ("65537", "7/1000B"), ("1000003", "3/MiB"), ("0", "25/KiB")] {
        let report = tollway(&["demo", "--json", "--size", size, "--price", price]).success().json();
        check(&report, size.parse().unwrap(), price);
    }
}

#[test]
fn max_ahead_is_kept() {
    let report = tollway(&["demo", "--json", "--size", "4MiB", "--max-ahead", "6000"]).success().json();
    check(&report, 4 << 20, "25/KiB");
    assert_eq!(sum(&report, "max_ahead"), 6000, "{report}");
    // 102,400 and more in steps of at most 6,000.
    assert!(report["vouchers"].as_u64().unwrap() >= 18, "{report}");
}

#[test]
fn a_demo_without_payment_has_no_sums() {
    let report = tollway(&["demo", "--json", "--size", "200KiB", "--price", "0"]).success().json();
    check(&report, 200 << 10, "0");
    assert_eq!((sum(&report, "deposit"), report["vouchers"].as_u64()), (0, Some(0)), "{report}");
}

#[test]
fn a_named_file_is_fetched_as_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a file of 70%.txt");
    std::fs::write(&path, "abc").unwrap();
    let report = tollway(&["demo".as_ref(), "--json".as_ref(), "--file".as_ref(), path.as_os_str()]).success().json();
    check(&report, 3, "25/KiB");
    assert_eq!(report["sha256"], "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    let missing = dir.path().join("none");
    tollway(&["demo".as_ref(), "--file".as_ref(), missing.as_os_str()]).failure();
}

#[test]
fn people_get_a_report_they_can_read() {
    let report = tollway(&["demo", "--size", "1MiB"]).success();
    for word in ["1,048,576 bytes", "as served", "25/KiB", "refunded"] {
        assert!(report.stdout.contains(word), "{report:?}");
    }
}
