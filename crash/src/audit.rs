//! What is compared at each kill, and what it means when it differs.
//!
//! All three processes stand still, one of them dead, and the witness has read all that they had written to their sockets.
//! So the files are what a crash of all three at that instant would leave, and everything that anybody was ever told must
//! stand in them.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;
use tollway::escrow::EscrowChannel;
use tollway::payment::{WalletChannel, WalletPhase};
use tollway::protocol::payment::ChannelId;
use tollway::protocol::payment::channel::ChannelPhase;
use tollway::store::ChannelRecord;

use crate::books::Books;
use crate::scene::{FUNDED, IN_FLIGHT_CAP};
use crate::wire::{Seen, Witness};

/// What a finding is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Check {
    /// The payee has told the payer of a voucher that its store does not have.
    VouchersLost,
    /// More was delivered than is authorised and leased in the payee's store.
    Overdelivered,
    /// The payer signed beyond its bounds, or its wallet does not know of an amount, an epoch or a deposit that left.
    Oversigned,
    /// The ledger paid what no voucher says, twice, or otherwise than the books of the payee have it.
    DoublePaid,
    /// What was lost at a break is above its cap, or differs between the books.
    LostInFlight,
    /// Money appeared or vanished.
    Conserved,
    /// The books of one side contradict themselves, or a file cannot be opened.
    Books,
    /// Nothing went on after a restart, or a process reported what no kill explains.
    Stopped,
}

impl fmt::Display for Check {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = serde_json::to_value(self).ok().and_then(|value| value.as_str().map(str::to_owned));
        f.write_str(&name.unwrap_or_default())
    }
}

/// A difference that must not be.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Finding {
    pub(crate) check: Check,
    /// By how many base units, or 1 where it is not about an amount.
    pub(crate) amount: u128,
    /// What the books said.
    pub(crate) what: String,
}

/// What stood in the books at the kill before.
#[derive(Debug, Default)]
pub(crate) struct Auditor {
    lost: BTreeMap<ChannelId, u128>,
    /// The most that one break has cost, in base units.
    pub(crate) most_lost: u128,
}

/// What one channel is in all books.
struct Account<'a> {
    id: ChannelId,
    seen: &'a Seen,
    wallet: Option<&'a WalletChannel>,
    payee: Option<&'a ChannelRecord>,
    ledger: Option<&'a EscrowChannel>,
    findings: Vec<Finding>,
}

impl Auditor {
    /// Compares all books.
    pub(crate) fn audit(&mut self, books: &Books, witness: &Witness) -> Vec<Finding> {
        let mut findings = check_ledger(books);
        for what in &witness.garbled {
            findings.push(Finding { check: Check::Books, amount: 1, what: format!("the witness cannot read: {what}") });
        }
        let unseen = Seen::default();
        let mut ids: Vec<_> = witness.channels.keys().chain(books.ledger.keys()).copied().collect();
        ids.extend(books.wallet.keys().chain(books.payee.keys()));
        ids.sort_unstable();
        ids.dedup();
        for id in ids {
            let mut account = Account {
                id,
                seen: witness.channels.get(&id).unwrap_or(&unseen),
                wallet: books.wallet.get(&id),
                payee: books.payee.get(&id),
                ledger: books.ledger.get(&id),
                findings: Vec::new(),
            };
            account.check_payee();
            account.check_payer();
            account.check_payments();
            self.check_losses(&mut account);
            findings.append(&mut account.findings);
        }
        findings
    }

    /// What a break has cost stands in both books, and within the cap.
    fn check_losses(&mut self, account: &mut Account<'_>) {
        let (Some(wallet), Some(payee)) = (account.wallet, account.payee) else { return };
        let (ours, theirs) = (wallet.book.lost_in_flight.units(), payee.snapshot.lost_in_flight.units());
        let before = self.lost.insert(account.id, theirs).unwrap_or(0);
        let lost = theirs.saturating_sub(before);
        self.most_lost = self.most_lost.max(lost);
        account.at_most(Check::LostInFlight, lost, IN_FLIGHT_CAP, "this break lost");
        // Both have written it as soon as the payer goes on; an opening that is on its way may be in one book alone.
        let seen = account.seen;
        if seen.active_epoch == seen.offered_epoch && ours != theirs {
            let what = format!("the payer's book says that {ours} were lost in flight, the payee's {theirs}");
            account.find(Check::LostInFlight, ours.abs_diff(theirs), what);
        }
        // And what a break at this instant would cost.
        if matches!((&wallet.phase, payee.snapshot.phase), (WalletPhase::Open, ChannelPhase::Open)) {
            let would_be = payee.snapshot.leased.units().saturating_sub(wallet.counted().units());
            account.at_most(Check::LostInFlight, would_be, IN_FLIGHT_CAP, "a break now would lose");
        }
    }
}

/// To the unit: what the two have and what the ledger holds is what was funded.
fn check_ledger(books: &Books) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut find = |check, amount, what: String| findings.push(Finding { check, amount, what });
    let unknown = books.ledger_channels.saturating_sub(books.ledger.len());
    if unknown > 0 {
        let what = format!("the ledger has {unknown} deposits that neither wallet nor payee knows of");
        return vec![Finding { check: Check::Oversigned, amount: unknown as u128, what }];
    }
    let settled: u128 = books.ledger.values().map(|channel| channel.settled.units()).sum();
    if settled != books.payee_balance {
        let what = format!("{settled} were settled, and the payee's account has {}", books.payee_balance);
        find(Check::DoublePaid, settled.abs_diff(books.payee_balance), what);
    }
    let open = books.ledger.values().filter(|channel| !channel.finalized);
    let held: u128 = open.map(|channel| channel.deposit.saturating_sub(channel.settled).units()).sum();
    let sum = books.payer_balance + books.payee_balance + held;
    if sum != FUNDED {
        let what = format!("{} + {} + {held} held is {sum}, not {FUNDED}", books.payer_balance, books.payee_balance);
        find(Check::Conserved, sum.abs_diff(FUNDED), what);
    }
    findings
}

impl Account<'_> {
    fn find(&mut self, check: Check, amount: u128, what: String) {
        let what = format!("channel {}: {what}", self.id);
        self.findings.push(Finding { check, amount: amount.max(1), what });
    }

    fn at_most(&mut self, check: Check, amount: u128, most: u128, what: &str) {
        if amount > most {
            self.find(check, amount - most, format!("{what} {amount}, and at most {most} may be"));
        }
    }

    /// What the payee has told and delivered stands in its store.
    fn check_payee(&mut self) {
        let seen = self.seen;
        let Some(record) = self.payee else {
            if seen.accepted_epoch > 0 {
                self.find(Check::VouchersLost, 1, "the payee has served it, and its store has no record".to_owned());
            }
            return;
        };
        let snapshot = &record.snapshot;
        self.at_most(
            Check::VouchersLost,
            seen.stated_accepted,
            snapshot.accepted.units(),
            "the payee has acknowledged",
        );
        self.at_most(Check::VouchersLost, snapshot.accepted.units(), seen.highest(), "the payee has accepted");
        self.at_most(Check::Overdelivered, seen.delivered, snapshot.leased.units(), "what was delivered costs");
        self.at_most(Check::DoublePaid, seen.stated_settled, snapshot.settled.units(), "the payee has said to be paid");
        if snapshot.epoch < seen.accepted_epoch {
            let what = format!("epoch {} was accepted, and the payee has {}", seen.accepted_epoch, snapshot.epoch);
            self.find(Check::Overdelivered, 1, what);
        }
    }

    /// What the payer has signed and sent stands in its wallet, and is within its bounds.
    fn check_payer(&mut self) {
        let seen = self.seen;
        self.at_most(Check::Oversigned, seen.signed_beyond, 0, "beyond what was received and may be ahead were signed");
        let Some(wallet) = self.wallet else {
            let what = "it was opened, and the wallet has no record".to_owned();
            return self.find(Check::Oversigned, 1, what);
        };
        let deposit = self.ledger.map_or(0, |held| held.deposit.units());
        self.at_most(Check::Oversigned, seen.highest(), wallet.book.ceiling.units(), "the payer signed");
        self.at_most(Check::Oversigned, seen.highest(), deposit, "on this deposit the payer signed");
        self.at_most(Check::Oversigned, wallet.counted().units(), seen.counted, "the payer has counted");
        if wallet.book.epoch < seen.offered_epoch {
            let what = format!("epoch {} was sent, and the wallet has {}", seen.offered_epoch, wallet.book.epoch);
            self.find(Check::Oversigned, 1, what);
        }
    }

    /// What the ledger paid is what the payer signed, once, and what everybody was told.
    fn check_payments(&mut self) {
        let Some(held) = self.ledger else {
            let opening = self.wallet.is_some_and(|wallet| {
                // An order that was never carried out.
                matches!(wallet.phase, WalletPhase::Opening { .. })
                    || matches!(wallet.phase, WalletPhase::Ended { settled } if settled.is_zero())
            });
            if !opening || self.payee.is_some() {
                self.find(Check::Conserved, 1, "the ledger does not know it".to_owned());
            }
            return;
        };
        let settled = held.settled.units();
        if settled > 0 && !self.seen.signed.contains(&settled) {
            self.find(Check::DoublePaid, settled, format!("{settled} were paid, which no voucher says"));
        }
        if let Some(WalletChannel { phase: WalletPhase::Ended { settled: ended }, .. }) = self.wallet
            && ended.units() != settled
        {
            self.find(Check::DoublePaid, 1, format!("the wallet says that it ended at {ended}, the ledger {settled}"));
        }
        let Some(record) = self.payee else { return };
        let claimed = record.snapshot.settled.units();
        self.at_most(Check::DoublePaid, claimed, settled, "the payee's store says that it was paid");
        if let ChannelPhase::Finalized { close } = record.snapshot.phase {
            // A close states at least what was settled before it.
            let at = close.map_or(settled, |close| close.amount.units());
            if !held.finalized || at != settled {
                let what = format!("the payee closed it at {at}, and the ledger has paid {settled}");
                self.find(Check::DoublePaid, at.abs_diff(settled), what);
            }
        }
    }
}

/// What must be so when the payer has closed everything.
pub(crate) fn check_end(books: &Books) -> Vec<Finding> {
    let open = books.ledger.iter().filter(|(_, held)| !held.finalized);
    let findings = open.map(|(id, held)| Finding {
        check: Check::Conserved,
        amount: held.deposit.saturating_sub(held.settled).units(),
        what: format!("channel {id}: it was closed, and the ledger still holds its deposit"),
    });
    findings.collect()
}
