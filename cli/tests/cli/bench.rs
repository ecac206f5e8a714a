//! The load tool: what it counts fits together, here and between two processes.

use serde_json::Value;

use crate::support::{Outcome, Running, tollway};

/// Runs a workload for a second, and returns what it printed.
#[track_caller]
fn bench(arguments: &[&str]) -> Value {
    tollway(&[&["bench"], arguments, &["--seconds", "1", "--json"]].concat()).success().json()
}

/// A number of a report.
#[track_caller]
fn number(report: &Value, name: &str) -> f64 {
    report[name].as_f64().unwrap_or_else(|| panic!("{name} is no number: {report}"))
}

/// What is true of everything that is counted: so many, in a second or more, at a rate that says the same.
#[track_caller]
fn check_rate(report: &Value, count: &str, rate: &str) {
    let (count, elapsed_ms, rate) = (number(report, count), number(report, "elapsed_ms"), number(report, rate));
    assert!(count > 0.0 && elapsed_ms > 0.0, "{report}");
    assert!((rate * elapsed_ms / 1e3 - count).abs() <= count / 1e3, "{report}");
}

/// Times rise with their quantiles.
#[track_caller]
fn check_latency(report: &Value) {
    let latency = &report["latency_us"];
    let times = ["p50", "p90", "p99", "p99_9", "max"].map(|name| number(latency, name));
    assert!(times[0] > 0.0 && times.is_sorted(), "{report}");
}

#[track_caller]
fn check_calls(report: &Value) {
    check_rate(report, "calls", "calls_per_second");
    check_latency(report);
    assert_eq!(report["errors"], 0, "{report}");
}

#[track_caller]
fn check_settings(report: &Value, workload: &str, size: u64, in_flight: u64) {
    assert_eq!((&report["ok"], &report["error"]), (&Value::Bool(true), &Value::Null), "{report}");
    assert_eq!(report["workload"], workload, "{report}");
    assert_eq!((report["size"].as_u64(), report["in_flight"].as_u64()), (Some(size), Some(in_flight)), "{report}");
    assert_eq!(report["seconds"], 1, "{report}");
    assert!(number(report, "warm_up_ms") > 0.0, "{report}");
}

#[test]
fn calls_are_counted_and_timed() {
    let report = bench(&["unary", "--size", "1KiB", "--in-flight", "3"]);
    check_settings(&report, "unary", 1024, 3);
    check_calls(&report);
    assert!(number(&report, "elapsed_ms") >= 1000.0, "{report}");
    assert_eq!(report["to"], Value::Null);
    // Half of the calls took that long, and three at once had the time that was measured, and some before it.
    let calls_at_once = number(&report, "calls_per_second") * number(&report["latency_us"], "p50") / 1e6;
    assert!(calls_at_once < 4.0 * 3.0, "half of the calls took longer than there was time: {report}");
}

#[test]
fn items_are_counted_with_their_bytes() {
    let report = bench(&["stream", "--size", "100", "--in-flight", "2"]);
    check_settings(&report, "stream", 100, 2);
    check_rate(&report, "items", "items_per_second");
    assert_eq!(number(&report, "bytes"), 100.0 * number(&report, "items"), "{report}");
    let megabytes = number(&report, "items_per_second") * 100.0 / 1e6;
    assert!((number(&report, "megabytes_per_second") - megabytes).abs() <= megabytes / 1e3, "{report}");
    assert_eq!(report["errors"], 0, "{report}");
}

#[test]
fn what_is_opened_is_closed() {
    let report = bench(&["open", "--in-flight", "4"]);
    check_settings(&report, "open", 64, 4);
    check_rate(&report, "opens", "opens_per_second");
    check_latency(&report);
    assert_eq!(report["opens"], report["closes"], "{report}");
}

#[test]
fn calls_are_answered_beside_streams_read_and_unread() {
    let report = bench(&["isolation", "--in-flight", "2"]);
    check_settings(&report, "isolation", 64, 2);
    check_calls(&report["alone"]);
    let (unread, bulk) = (&report["beside_unread"], &report["beside_bulk"]);
    check_calls(unread);
    check_calls(bulk);
    assert_eq!((&unread["streams"], &unread["received"]), (&2.into(), &Value::Null), "{report}");
    assert_eq!(bulk["streams"], 1, "{report}");
    check_rate(&bulk["received"], "items", "items_per_second");
}

#[test]
fn people_get_a_table() {
    let report = tollway(&["bench", "--seconds", "1", "--size", "0"]).success();
    for word in ["calls of 0 bytes, 64 in flight", "in this process", "warm-up", "/s", "p50", "p99.9"] {
        assert!(report.stdout.contains(word), "{report:?}");
    }
    assert_eq!(report.stderr, "", "no bar where nobody looks");
}

/// A server of a process of its own, and where it is.
fn server(place: &str) -> (Running, String) {
    let mut server = Running::start(&["bench", "--serve", place, "--json"]);
    let ready: Value = serde_json::from_str(&server.line()).unwrap();
    assert_eq!(ready["event"], "ready");
    (server, ready["url"].as_str().unwrap().to_owned())
}

#[test]
fn a_link_with_tls_needs_no_more_than_the_url_of_the_server() {
    let (_server, url) = server("tls://127.0.0.1:0");
    let report = bench(&["unary", "--to", &url]);
    assert_eq!(report["to"], url.as_str(), "{report}");
    check_calls(&report);
}

#[test]
#[cfg(unix)]
fn a_server_of_another_process_is_measured_until_it_is_interrupted() {
    let (server, url) = server("tcp://127.0.0.1:0");
    for workload in ["unary", "stream", "open"] {
        let report = bench(&[workload, "--to", &url]);
        assert_eq!((&report["ok"], &report["to"]), (&Value::Bool(true), &url.as_str().into()), "{report}");
    }
    server.interrupt();
    server.end().success();
    let gone = tollway(&["bench", "unary", "--to", &url]).failure();
    assert!(gone.stderr.contains("cannot reach"), "{gone:?}");
}

/// Whether a line of the log tells of a rate above zero.
fn counts(line: &str, unit: &str) -> bool {
    line.trim_end().ends_with(unit) && !line.trim_end().ends_with(&format!(" 0{unit}"))
}

#[test]
#[cfg(unix)]
fn an_interrupt_prints_what_was_measured_so_far() {
    let (server, url) = server("tcp://127.0.0.1:0");
    let mut client = Running::start_logging(&["bench", "unary", "--to", &url, "--seconds", "3600", "--json"]);
    client.wait_for_note(|line| counts(line, " calls/s"));
    client.interrupt();
    let outcome = client.end();
    assert_eq!(outcome.code, Some(130), "{outcome:?}");
    let report = outcome.json();
    assert_eq!((&report["ok"], &report["error"]), (&Value::Bool(false), &"interrupted".into()), "{report}");
    check_calls(&report);
    assert!(number(&report, "elapsed_ms") < 3_600_000.0, "{report}");
    drop(server);
}

#[test]
fn a_link_that_breaks_is_a_failure_with_what_was_measured_so_far() {
    let (server, url) = server("tcp://127.0.0.1:0");
    let mut client = Running::start_logging(&["bench", "stream", "--to", &url, "--seconds", "3600", "--json"]);
    client.wait_for_note(|line| counts(line, " items/s"));
    // Killed.
    drop(server);
    let outcome = client.end().failure();
    let report = outcome.json();
    check_rate(&report, "items", "items_per_second");
    assert!(report["error"].as_str().is_some_and(|error| error.contains("stream")), "{report}");
}

#[test]
fn a_server_that_serves_something_else_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let arguments = ["serve", "--listen", "tcp://127.0.0.1:0", "--json", "--price", "0", "--dir"];
    let mut other = Running::start(&[&arguments[..], &[dir.path().to_str().unwrap()]].concat());
    let ready: Value = serde_json::from_str(&other.line()).unwrap();
    for workload in ["unary", "stream", "open", "isolation"] {
        let outcome = tollway(&["bench", workload, "--to", ready["url"].as_str().unwrap()]).failure();
        assert!(outcome.stderr.contains("tollway bench --serve"), "{outcome:?}");
        assert_eq!(outcome.stdout, "", "nothing was measured");
    }
}

#[test]
fn what_cannot_be_measured_is_said_at_once() {
    let failure = |arguments: &[&str]| tollway(&[&["bench"], arguments].concat()).failure().stderr;
    // The largest call of 1 MiB has its length in front of its bytes.
    let call = failure(&["unary", "--size", "1048572"]);
    assert!(call.contains("1048571") && call.contains("bench stream"), "{call}");
    assert!(failure(&["isolation", "--size", "1GiB"]).contains("a call of 1073741824 bytes"));
    assert!(failure(&["stream", "--size", "8GiB"]).contains("an item of 8589934592 bytes"));
    assert!(failure(&["isolation", "--in-flight", "101"]).contains("100 are the limit"));
    assert!(failure(&["--serve", "tcp://192.0.2.1:1"]).contains("cannot listen"));
    bench(&["unary", "--size", "1048571", "--in-flight", "1"]);
    bench(&["stream", "--size", "1048571"]);
}

#[test]
fn wrong_flags_are_wrong_usage() {
    let wrong: [&[&str]; 8] = [
        &["bulk"],
        &["unary", "--in-flight", "0"],
        &["unary", "--in-flight", "1001"],
        &["unary", "--seconds", "0"],
        &["unary", "--seconds", "3601"],
        &["unary", "--size", "-1"],
        &["--serve", "tcp://127.0.0.1:0", "--to", "tcp://127.0.0.1:1"],
        &["--serve", "tcp://127.0.0.1:0", "--size", "1"],
    ];
    for arguments in wrong {
        let Outcome { code, stdout, stderr } = tollway(&[&["bench"], arguments].concat());
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{arguments:?}: {stderr}");
    }
    let help = tollway(&["bench", "--help"]).success().stdout;
    assert!(help.contains("tollway bench unary --to"), "{help}");
}

#[test]
fn what_only_a_server_shows_is_refused_without_one() {
    for more in [&[][..], &["--to", "tls://127.0.0.1:1"]] {
        let refused = tollway(&[&["bench", "unary", "--client-ca", "ca.pem"], more].concat()).failure();
        assert!(refused.stderr.contains("--client-ca is for a server: give --serve URL"), "{refused:?}");
    }
}
