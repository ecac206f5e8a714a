//! Every peer works, and what is printed for programs is as documented. Nothing here looks at how fast.

use std::collections::BTreeMap;
use std::process::{Command, Output};

use serde_json::Value;

const EVERYBODY: [&str; 10] =
    ["floor", "floor-pipe", "h2", "quinn", "tarpc", "tollway", "tollway-by-hand", "tollway-quic", "tonic", "yamux"];

fn peers(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_tollway-peers")).args(arguments).output().expect("the binary runs")
}

#[test]
fn every_peer_has_the_cells_of_its_workloads() {
    let workloads = ["unary-seq-64k", "unary-64x64", "stream-4k"];
    let output = peers(&[&workloads[..], &["--json", "--rounds", "2", "--millis", "20"]].concat());
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let mut found: BTreeMap<(String, String), Vec<String>> = BTreeMap::new();
    for line in String::from_utf8(output.stdout).expect("UTF-8").lines() {
        let cell: Value = serde_json::from_str(line).expect("one object on a line");
        let text = |name: &str| cell[name].as_str().unwrap_or_else(|| panic!("{name} in {cell}")).to_owned();
        let number = |name: &str| cell[name].as_f64().unwrap_or_else(|| panic!("{name} in {cell}"));
        assert!(!text("unit").is_empty() && number("rounds") == 2.0, "{cell}");
        assert!(number("min") <= number("median") && number("median") <= number("max"), "{cell}");
        assert!(number("median") > 0.0, "{cell}");
        found.entry((text("workload"), text("metric"))).or_default().push(text("peer"));
    }
    found.values_mut().for_each(|peers| peers.sort_unstable());
    let of = |workload: &str, metric: &str| found.get(&(workload.to_owned(), metric.to_owned())).cloned();
    let without = |absent: &[&str]| {
        Some(EVERYBODY.into_iter().filter(|peer| !absent.contains(peer)).map(str::to_owned).collect())
    };
    for metric in ["p50", "p99"] {
        assert_eq!(of("unary-seq-64k", metric), without(&[]), "{metric}");
    }
    for metric in ["rate", "cpu"] {
        assert_eq!(of("unary-64x64", metric), without(&["floor"]), "{metric}");
    }
    for metric in ["rate", "throughput"] {
        assert_eq!(of("stream-4k", metric), without(&["floor-pipe", "tarpc"]), "{metric}");
    }
    assert_eq!(found.len(), 6);
}

#[test]
fn a_table_ends_with_the_goals_that_it_can_tell() {
    let output = peers(&["unary-64x64", "--peer", "tollway", "--peer", "tarpc", "--rounds", "1", "--millis", "20"]);
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(output.status.success() && text.contains("unary-64x64 rate: goal ≥ 2x tarpc: "), "{text}");
    assert!(!text.contains("floor-pipe"), "{text}");
}

#[test]
fn who_runs_apart_is_told_no_goals() {
    let arguments =
        ["unary-64x64", "--peer", "tollway", "--peer", "tarpc", "--rounds", "1", "--millis", "20", "--split"];
    let output = peers(&arguments);
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(output.status.success() && text.contains("tarpc") && !text.contains("goal"), "{text}");
}

#[test]
fn unknown_names_are_answered_with_the_known_ones() {
    let output = peers(&["unary-9"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("unary-64x64"));
    let output = peers(&["--peer", "carrier-pigeon"]);
    assert_eq!(output.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&output.stderr).contains("tollway, tollway-quic, tollway-by-hand, floor"));
}
