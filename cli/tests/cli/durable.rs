//! Channels that outlive their processes: a ledger, a payee and a wallet in files, with everybody killed in between.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use tollway_protocol::payment::Address;

use crate::support::{PATIENCE, Running, sum, tollway};

const PRICE: &str = "25/KiB";
/// What a file of this many bytes costs, items of 64 KiB as framed included, to within a thousandth.
const FUNDS: &str = "1000000000000";

struct World {
    dir: tempfile::TempDir,
    ledger: String,
    payee_address: String,
    payer_address: String,
    /// Killed with the world.
    _ledger: Running,
}

fn ready(process: &mut Running) -> Value {
    serde_json::from_str(&process.line()).unwrap()
}

fn text(value: &Value, name: &str) -> String {
    value[name].as_str().unwrap_or_else(|| panic!("{name}: {value}")).to_owned()
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        for name in ["files", "out"] {
            std::fs::create_dir(path(name)).unwrap();
        }
        let [_, payee_address, payer_address] = ["ledger.key", "payee.key", "payer.key"].map(|key| {
            let made = tollway(&["keygen", &path(key)]).success();
            made.stdout.trim().to_owned()
        });
        let (book, key) = (path("ledger.redb"), path("ledger.key"));
        let mut process = Running::start(&[
            "ledger",
            "serve",
            "--listen",
            "tcp://127.0.0.1:0",
            "--json",
            "--store",
            &book,
            "--key",
            &key,
        ]);
        let ledger = text(&ready(&mut process), "url");
        let fund = ["ledger", "fund", &ledger, "--key", &key, "--to", &payer_address, "--amount", FUNDS];
        tollway(&fund).success();
        World { ledger, payee_address, payer_address, _ledger: process, dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// A payee, killed when it is dropped, and where it is.
    fn payee(&self) -> (Running, String) {
        let [files, key, store] = ["files", "payee.key", "payee.redb"].map(|name| self.path(name));
        let mut payee = Running::start(&[
            "serve",
            "--listen",
            "tcp://127.0.0.1:0",
            "--json",
            "--price",
            PRICE,
            "--dir",
            &files,
            "--key",
            &key,
            "--store",
            &store,
            "--ledger",
            &self.ledger,
        ]);
        let url = text(&ready(&mut payee), "url");
        (payee, url)
    }

    fn fetch(&self, url: &str, name: &str, budget: &str) -> Vec<String> {
        let [out, key, wallet] = ["out/got", "payer.key", "payer.redb"].map(|name| self.path(name));
        let url = format!("{url}/{name}");
        [
            "fetch",
            &url,
            "--json",
            "-o",
            &out,
            "--key",
            &key,
            "--wallet",
            &wallet,
            "--payee",
            &self.payee_address,
            "--budget",
            budget,
            "--max-ahead",
            "100000",
            "--loss-budget",
            "10000000",
        ]
        .map(str::to_owned)
        .to_vec()
    }

    fn stock(&self, name: &str, size: u64) {
        File::create(self.dir.path().join("files").join(name)).unwrap().set_len(size).unwrap();
    }

    fn show(&self, side: [&str; 2], id: &str) -> Value {
        let file = self.path(side[1]);
        tollway(&["channels", "show", id, side[0], &file, "--json"]).success().json()
    }

    fn balance(&self, holder: &str) -> u128 {
        let holder: Address = holder.parse().unwrap();
        sum(&tollway(&["ledger", "balance", &self.ledger, &holder.to_string(), "--json"]).success().json(), "balance")
    }
}

const PAYER: [&str; 2] = ["--wallet", "payer.redb"];
const PAYEE: [&str; 2] = ["--store", "payee.redb"];

fn wait_for_bytes(out: &Path, bytes: u64) {
    let deadline = Instant::now() + PATIENCE;
    let largest = || {
        let sizes = std::fs::read_dir(out).unwrap().filter_map(|entry| Some(entry.ok()?.metadata().ok()?.len()));
        sizes.max().unwrap_or(0)
    };
    while largest() < bytes {
        assert!(Instant::now() < deadline, "{} of {bytes} bytes came", largest());
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn three_fetches_use_one_channel_though_payer_and_payee_are_killed_between_them() {
    let world = World::new();
    world.stock("small", 1 << 20);
    world.stock("huge", 64 << 30);

    let (payee, url) = world.payee();
    let first = tollway(&world.fetch(&url, "small", "1000000")).success().json();
    let id = text(&first, "channel_id");
    assert_eq!(first["kept"], true, "{first}");
    let paid_first = sum(&first, "payer_metered");
    assert!((25_600..26_000).contains(&paid_first), "{first}");
    drop(payee);

    // The second is cut down on both sides while money flows. Its budget is above the deposit, which grows on the way.
    let (payee, url) = world.payee();
    let second = Running::start(&world.fetch(&url, "huge", "2000000000"));
    wait_for_bytes(&world.dir.path().join("out"), 8 << 20);
    drop(second);
    drop(payee);
    let before = world.show(PAYER, &id);
    assert_eq!(text(&before, "state"), "open");
    let counted = |channel: &Value| sum(channel, "received") + sum(channel, "lost_in_flight");
    assert!(sum(&before, "received") >= paid_first, "{before}");
    assert!(sum(&before, "signing_ceiling") > counted(&before), "{before}");

    let (payee, url) = world.payee();
    let third = tollway(&world.fetch(&url, "small", "1000000")).success().json();
    assert_eq!(text(&third, "channel_id"), id);
    drop(payee);
    let payer = world.show(PAYER, &id);
    // It was resumed where it stood: what the third has cost, and nothing else, came on top of what was recorded.
    assert_eq!(sum(&third, "payer_metered"), sum(&payer, "received"));
    assert_eq!(sum(&payer, "received"), sum(&before, "received") + paid_first, "{before} {payer}");
    assert!(sum(&payer, "lost_in_flight") > 0, "{payer}");
    let books = world.show(PAYEE, &id);
    assert_eq!(sum(&payer, "lost_in_flight"), sum(&books, "lost_in_flight"), "{payer} {books}");

    // Closed from the command line, at what both agree on; the ledger pays that and gives the rest back.
    let (payee, url) = world.payee();
    let (wallet, key) = (world.path("payer.redb"), world.path("payer.key"));
    let close = ["channels", "close", &id, "--wallet", &wallet, "--key", &key, "--payee-at", &url, "--json"];
    let closed = tollway(&close).success().json();
    assert_eq!(text(&closed, "state"), "ended");
    drop(payee);
    let ended = world.show(PAYEE, &id);
    let settled = sum(&closed, "settled");
    assert_eq!((settled, text(&ended, "state")), (sum(&ended, "settled"), "ended".to_owned()));
    assert_eq!(settled, counted(&closed));
    assert!(settled >= sum(&ended, "spent"), "{ended}");
    assert_eq!(world.balance(&world.payee_address), settled);
    assert_eq!(world.balance(&world.payer_address), FUNDS.parse::<u128>().unwrap() - settled);
    check_files(world);
}

fn check_files(world: World) {
    let World { dir, _ledger, .. } = world;
    drop(_ledger);
    for name in ["ledger.redb", "payee.redb", "payer.redb"] {
        let file: PathBuf = dir.path().join(name);
        let report = tollway(&["store", "verify", file.to_str().unwrap(), "--json"]).success().json();
        assert_eq!((&report["channels"], &report["broken"]), (&1.into(), &Value::Array(Vec::new())), "{report}");
    }
    let wallet = dir.path().join("payer.redb");
    let receipts = tollway(&["receipts", "--wallet", wallet.to_str().unwrap(), "--csv"]).success().stdout;
    let lines: Vec<_> = receipts.lines().collect();
    assert!(lines[0].starts_with("channel_id,payee,sequence,"), "{receipts}");
    assert!(lines.last().is_some_and(|line| line.contains(",closed,")), "{receipts}");
}

/// The payee has gone: the payer gets back what is left, without it.
#[test]
fn a_channel_whose_payee_has_gone_is_withdrawn_by_force() {
    let world = World::new();
    world.stock("small", 1 << 20);
    let (payee, url) = world.payee();
    let fetched = tollway(&world.fetch(&url, "small", "1000000")).success().json();
    let id = text(&fetched, "channel_id");
    drop(payee);
    let (wallet, key) = (world.path("payer.redb"), world.path("payer.key"));
    let force = ["channels", "close", &id, "--wallet", &wallet, "--key", &key, "--force", "--json"];
    let asked = tollway(&force).success();
    assert_eq!(text(&asked.json(), "state"), "withdrawing");
    assert!(asked.stderr.contains("grace period"), "{asked:?}");
    // The payee is back in time: its store has the voucher, and it claims by itself what it has delivered.
    let (payee, _) = world.payee();
    let deadline = Instant::now() + PATIENCE;
    while world.balance(&world.payee_address) == 0 {
        assert!(Instant::now() < deadline, "the payee claims nothing");
        std::thread::sleep(Duration::from_millis(50));
    }
    drop(payee);
    let ended = tollway(&force).success().json();
    assert_eq!(text(&ended, "state"), "ended");
    let settled = sum(&ended, "settled");
    assert!(settled >= sum(&fetched, "payer_metered"), "{ended}");
    assert!(settled <= sum(&fetched, "payer_metered") + 100_000, "{ended}");
    assert_eq!(world.balance(&world.payer_address), FUNDS.parse::<u128>().unwrap() - settled);
    let list = tollway(&["channels", "list", "--wallet", &wallet]).success().stdout;
    assert!(list.starts_with("channel  payee  state"), "{list}");
    let all = tollway(&["channels", "list", "--all", "--wallet", &wallet]).success().stdout;
    assert!(all.contains(&id) && all.contains("ended"), "{all}");
}

#[test]
fn a_quote_is_printed_with_its_payee_and_costs_nothing() {
    let world = World::new();
    let (_payee, url) = world.payee();
    let quote = tollway(&["quote", &url, "--json"]).success().json();
    assert_eq!(text(&quote, "payee"), world.payee_address);
    assert_eq!(text(&quote["methods"][0], "price"), "25/KiB received");
    let other = tollway(&["quote", &url, "--payee", &world.payer_address]).failure();
    assert!(other.stderr.contains("only"), "{other:?}");
    assert_eq!(world.balance(&world.payer_address), FUNDS.parse::<u128>().unwrap());
}
