//! That the harness can fail: each guard is taken away in turn, and must be found missing.

use serde::Serialize;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::campaign::Plan;
use crate::roles::Failure;
use crate::{Arguments, campaign, print};

/// The guards that can be taken away, and what is left without them.
const GUARDS: [(&str, &str); 14] = [
    ("disk.answer-first", "a change is answered before it is committed"),
    ("disk.lie", "a sync is answered and not made"),
    ("disk.lose-last/2", "every second commit is lost in a crash"),
    ("wallet.sign-first", "a voucher leaves before its ceiling is written"),
    ("wallet.forget-ceiling", "the signing ceiling is not written"),
    ("wallet.forget-epoch", "the epoch is not written before it is sent"),
    ("wallet.forget-received", "what was received is not written"),
    ("wallet.forget-order", "the order for a deposit is not written before it is sent"),
    ("wallet.sign-all", "the bound on what is signed ahead is ignored"),
    ("payee.deliver-first", "accepted money is spent before it is leased"),
    ("payee.deliver-unpaid", "the deposit is spent, whatever was authorised"),
    ("payee.forget-losses", "a channel is resumed without booking what was in flight"),
    ("payee.claim-all", "a close is settled by the highest voucher instead of the close's"),
    ("ledger.forget-settled", "a settlement pays what was paid before once more"),
];

pub(crate) fn is_guard(name: &str) -> bool {
    GUARDS.iter().any(|(guard, _)| *guard == name)
}

pub(crate) fn names() -> Vec<&'static str> {
    GUARDS.iter().map(|(guard, _)| *guard).collect()
}

/// How a missing guard was found out.
#[derive(Debug, Serialize)]
struct Proof {
    guard: &'static str,
    without_it: &'static str,
    /// At which kill; `None` if it was not within the kills.
    kill: Option<u64>,
    check: Option<String>,
    what: Option<String>,
}

/// Takes each guard away in turn. Returns whether every one was missed.
pub(crate) fn run(arguments: &Arguments, runtime: &Runtime) -> Result<bool, Failure> {
    let mut proofs = Vec::new();
    if !arguments.json {
        print(&format!("{:<24} {:>7}  {:<15} {}", "guard taken away", "at kill", "found by", "what the books said"));
    }
    for (guard, without_it) in GUARDS {
        let plan = Plan { kills: arguments.kills, seed: arguments.seed, without: Some(guard.to_owned()) };
        let directory = TempDir::with_prefix("tollway-crash-")?;
        let report = campaign(&plan, runtime, directory.path())?;
        let first = report.findings.first();
        let proof = Proof {
            guard,
            without_it,
            kill: first.map(|found| found.kill),
            check: first.map(|found| found.finding.check.to_string()),
            what: first.map(|found| found.finding.what.clone()),
        };
        if !arguments.json {
            let kill = proof.kill.map_or("NEVER".to_owned(), |kill| kill.to_string());
            let (check, what) = (proof.check.as_deref().unwrap_or("-"), proof.what.as_deref().unwrap_or("-"));
            print(&format!("{guard:<24} {kill:>7}  {check:<15} {what}"));
        }
        proofs.push(proof);
    }
    if arguments.json {
        print(&serde_json::to_string(&proofs)?);
    }
    Ok(proofs.iter().all(|proof| proof.kill.is_some()))
}
