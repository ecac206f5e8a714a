//! The payer's book and the payee's channel against each other, over a link that delays and breaks: nobody goes beyond
//! what the other allows, and nobody waits for ever.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::channel::fixtures::{CHANNEL, Spender, policy, verified_as, verified_close};
use super::channel::{ChannelParams, ReservationId, ReserveError};
use super::*;

#[derive(Debug, Clone, Copy)]
enum ToPayer {
    /// A unit of this cost, or the end of a reserved call that held `maximum`.
    Data {
        cost: Amount,
        maximum: Amount,
    },
    Need(NeedVoucher),
}

#[derive(Debug, Clone, Copy)]
enum ToPayee {
    Voucher(Amount),
    TopUp(Amount),
    Decline(Decline),
}

/// What waits to be served: a unit, or a call that reserves `maximum` and will cost `cost`.
#[derive(Debug, Clone, Copy)]
enum Work {
    Unit(Amount),
    Reserved { maximum: Amount, cost: Amount },
}

#[derive(Debug, Clone, Copy)]
enum Op {
    /// Percent of the dearest unit.
    Unit(u8),
    Reserved(u8, u8),
    Serve,
    EndCall(usize),
    DeliverToPayer,
    DeliverToPayee,
    /// The link breaks; which side also crashes.
    Break {
        payee: bool,
        payer: bool,
    },
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..=100u8).prop_map(Op::Unit),
        2 => (0..=100u8, 0..=100u8).prop_map(|(maximum, cost)| Op::Reserved(maximum, cost)),
        8 => Just(Op::Serve),
        2 => any::<usize>().prop_map(Op::EndCall),
        8 => Just(Op::DeliverToPayer),
        8 => Just(Op::DeliverToPayee),
        1 => any::<(bool, bool)>().prop_map(|(payee, payer)| Op::Break { payee, payer }),
    ]
}

#[derive(Debug, Clone, Copy)]
struct Terms {
    dearest: u128,
    delta: u128,
    slack: u128,
    lease: u128,
    deposit: u128,
    deposit_limit: u128,
    budget: u128,
}

fn terms() -> impl Strategy<Value = Terms> {
    (1..50u128, 0..40u128, 0..60u128, 1..60u128, 0..400u128, 0..1500u128, 0..1500u128).prop_map(
        |(dearest, delta, slack, lease, deposit, deposit_limit, budget)| Terms {
            dearest,
            delta,
            slack,
            lease,
            deposit,
            deposit_limit,
            budget,
        },
    )
}

struct Pair {
    terms: Terms,
    limits: PayerLimits,
    channel: PaymentChannel,
    gate: Spender,
    book: PayerBook,
    work: VecDeque<Work>,
    open: Vec<(ReservationId, Amount, Amount)>,
    to_payer: VecDeque<ToPayer>,
    to_payee: VecDeque<ToPayee>,
    declined: Option<Decline>,
    /// All that the payee ever asked for.
    asked: Vec<Amount>,
}

/// Data under way at most, in base units: what the payer's grants would enforce.
const WINDOW: u128 = 150;

fn units(amount: u128) -> Amount {
    Amount::new(amount)
}

fn plus(left: Amount, right: Amount) -> Amount {
    left.checked_add(right).unwrap()
}

impl Pair {
    fn new(terms: Terms) -> Self {
        let max_ahead = units(terms.dearest + terms.delta + terms.slack);
        let limits = PayerLimits {
            budget: units(terms.budget),
            max_ahead,
            low_mark: None,
            minimum_delta: units(terms.delta),
            deposit_limit: units(terms.deposit_limit),
            top_up_step: units(100),
            // The window, the unused lease (a lease and what was wanted of it) and the costs of open calls.
            in_flight_cap: units(WINDOW + terms.lease + terms.dearest + terms.dearest),
            loss_budget: Amount::MAX,
        };
        assert_eq!(limits.acceptable(units(terms.dearest)), Ok(()));
        let channel = PaymentChannel::open(ChannelParams {
            channel_id: CHANNEL,
            deposit: units(terms.deposit),
            settled: Amount::ZERO,
            voucher_ceiling: Amount::MAX,
            policy: policy(terms.delta, terms.lease),
        })
        .unwrap();
        let mut pair = Pair {
            terms,
            limits,
            gate: Spender::of(&channel),
            channel,
            book: PayerBook::open(limits, units(terms.deposit)),
            work: VecDeque::new(),
            open: vec![],
            to_payer: VecDeque::new(),
            to_payee: VecDeque::new(),
            declined: None,
            asked: vec![],
        };
        pair.payer_turn();
        pair
    }

    fn part(&self, percent: u8) -> Amount {
        units(self.terms.dearest * u128::from(percent) / 100)
    }

    fn under_way(&self) -> u128 {
        let cost = |message: &ToPayer| match message {
            ToPayer::Data { cost, .. } => cost.units(),
            ToPayer::Need(_) => 0,
        };
        self.to_payer.iter().map(cost).sum()
    }

    fn apply(&mut self, op: Op) -> bool {
        match op {
            Op::Unit(percent) => self.work.push_back(Work::Unit(self.part(percent))),
            Op::Reserved(maximum, part) => {
                let maximum = self.part(maximum);
                let cost = units(maximum.units() * u128::from(part) / 100);
                self.work.push_back(Work::Reserved { maximum, cost });
                self.update_reservations();
            }
            Op::Serve => return self.serve(),
            Op::EndCall(index) => return self.end_call(index),
            Op::DeliverToPayer => return self.deliver_to_payer(),
            Op::DeliverToPayee => return self.deliver_to_payee(),
            Op::Break { payee, payer } => self.break_link(payee, payer),
        }
        true
    }

    /// The payer knows which of its calls are open until it sees them end.
    fn update_reservations(&mut self) {
        let waiting = self.work.iter().map(|work| match work {
            Work::Unit(_) => 0,
            Work::Reserved { maximum, .. } => maximum.units(),
        });
        let ending = self.to_payer.iter().map(|message| match message {
            ToPayer::Data { maximum, .. } => maximum.units(),
            ToPayer::Need(_) => 0,
        });
        let open = self.open.iter().map(|call| call.1.units());
        self.book.record_open_reservations(units(waiting.chain(ending).chain(open).sum()));
    }

    fn lease_for(&mut self, wanted: Amount) -> bool {
        self.channel.record_spent(self.gate.spent).unwrap();
        let Some(plan) = self.channel.propose_lease(wanted).unwrap() else { return false };
        let commit = self.channel.commit_lease(plan).unwrap();
        self.gate.apply(&commit);
        true
    }

    fn ask(&mut self, cost: Amount) -> bool {
        self.channel.record_spent(self.gate.spent).unwrap();
        match self.channel.need(cost).unwrap() {
            Some(need) => {
                self.asked.push(need.required);
                self.to_payer.push_back(ToPayer::Need(need));
            }
            None => return false,
        }
        true
    }

    /// Serves the head of the queue; whether anything happened.
    fn serve(&mut self) -> bool {
        let Some(work) = self.work.front().copied() else { return false };
        match work {
            Work::Unit(cost) => {
                if self.under_way() + cost.units() > WINDOW {
                    return false;
                }
                while !self.gate.try_spend(cost) {
                    if !self.lease_for(cost) {
                        return self.ask(cost);
                    }
                }
                self.to_payer.push_back(ToPayer::Data { cost, maximum: Amount::ZERO });
            }
            Work::Reserved { maximum, cost } => loop {
                self.channel.record_spent(self.gate.spent).unwrap();
                match self.channel.reserve(maximum, 0) {
                    Ok(id) => {
                        self.open.push((id, maximum, cost));
                        break;
                    }
                    Err(ReserveError::Leased { missing }) => {
                        let lowered = self.gate.give_back(missing);
                        let plan = self.channel.propose_return(lowered).unwrap();
                        let _ = self.channel.commit_lease(plan).unwrap();
                    }
                    Err(ReserveError::Short { .. }) => return self.ask(maximum),
                    Err(other) => panic!("{other}"),
                }
            },
        }
        self.work.pop_front();
        true
    }

    fn end_call(&mut self, index: usize) -> bool {
        let Some(index) = index.checked_rem(self.open.len()) else { return false };
        let Some((id, maximum, cost)) = self.open.get(index).copied() else { return false };
        if self.under_way() + cost.units() > WINDOW {
            return false;
        }
        self.open.remove(index);
        self.channel.commit_reservation(id, cost).unwrap();
        assert!(self.lease_for(Amount::ZERO));
        self.to_payer.push_back(ToPayer::Data { cost, maximum });
        true
    }

    fn payer_turn(&mut self) {
        while let Some(amount) = self.book.next_voucher() {
            self.sign(amount);
        }
        if let Some(answer) = self.book.retry_need() {
            self.act(answer);
        }
    }

    fn sign(&mut self, amount: Amount) {
        if let Some(ceiling) = self.book.next_ceiling(amount) {
            self.book.record_ceiling(ceiling);
        }
        self.book.record_signed(amount).unwrap();
        assert!(amount <= plus(self.book.counted(), self.limits.max_ahead), "signed beyond max_ahead");
        assert!(amount <= self.limits.budget && amount <= self.book.deposit());
        self.to_payee.push_back(ToPayee::Voucher(amount));
    }

    fn act(&mut self, answer: NeedAnswer) {
        match answer {
            NeedAnswer::Sign(amount) => self.sign(amount),
            NeedAnswer::Silent => {}
            NeedAnswer::TopUp { to } => {
                assert!(to <= self.limits.deposit_limit && to > self.book.deposit());
                self.book.record_deposit(to);
                self.to_payee.push_back(ToPayee::TopUp(to));
                self.payer_turn();
            }
            NeedAnswer::Decline(decline) => self.to_payee.push_back(ToPayee::Decline(decline)),
        }
    }

    fn deliver_to_payer(&mut self) -> bool {
        let Some(message) = self.to_payer.pop_front() else { return false };
        match message {
            ToPayer::Data { cost, .. } => {
                self.book.record_received(plus(self.book.received(), cost));
                self.update_reservations();
                self.payer_turn();
            }
            ToPayer::Need(need) => {
                let answer = self.book.handle_need(need);
                self.act(answer);
            }
        }
        true
    }

    fn deliver_to_payee(&mut self) -> bool {
        let Some(message) = self.to_payee.pop_front() else { return false };
        match message {
            ToPayee::Voucher(amount) => {
                let (voucher, verified) = verified_as(amount.units(), 1);
                let precheck = self.channel.precheck_voucher(&voucher);
                assert!(precheck.is_ok(), "an honest voucher is refused: {precheck:?}");
                if let Some(plan) = self.channel.propose_voucher(&verified).unwrap() {
                    self.channel.commit_voucher(plan).unwrap();
                }
            }
            ToPayee::TopUp(to) => {
                let _ = self.channel.set_deposit(to);
            }
            ToPayee::Decline(decline) => self.declined = Some(decline),
        }
        true
    }

    fn break_link(&mut self, payee_crashes: bool, payer_crashes: bool) {
        self.to_payer.clear();
        self.to_payee.clear();
        for (id, ..) in self.open.drain(..) {
            self.channel.release(id).unwrap();
        }
        if payee_crashes {
            self.channel = PaymentChannel::restore(self.channel.snapshot(), self.channel.policy()).unwrap();
            self.gate = Spender::of(&self.channel);
        } else {
            self.channel.record_spent(self.gate.spent).unwrap();
        }
        if payer_crashes {
            self.book = PayerBook::restore(self.limits, self.book.snapshot());
        }
        let epoch = self.book.next_epoch(None).unwrap();
        let _ = self.channel.take_ownership(epoch).unwrap();
        // The payee reads the deposit from the escrow when a connection opens.
        let _ = self.channel.set_deposit(self.book.deposit());
        let (payee, _) = self.channel.resume(self.book.received(), self.limits.in_flight_cap).unwrap();
        let payer = self.book.resume(self.channel.spent()).unwrap();
        assert_eq!(payee, payer, "both books show the same loss");
        self.book.record_connected(self.channel.accepted());
        self.update_reservations();
        self.payer_turn();
    }

    fn check(&self) {
        assert!(self.gate.spent <= self.channel.accepted(), "spent beyond what is accepted");
        assert!(self.channel.accepted() <= self.book.signed());
        assert!(self.book.peak_ahead() <= self.limits.max_ahead);
        // The payer's greatest loss: what it authorised and did not get.
        let at_risk = self.channel.accepted().saturating_sub(self.book.counted());
        assert!(at_risk <= self.limits.max_ahead);
    }

    /// Lets everything happen that can; true when all was served.
    fn settle_down(&mut self) -> bool {
        loop {
            let moved = [self.serve(), self.end_call(0), self.deliver_to_payer(), self.deliver_to_payee()];
            self.check();
            if self.declined.is_some() || !moved.contains(&true) {
                return self.work.is_empty() && self.open.is_empty();
            }
        }
    }

    /// Whether a refusal is one that the user's limits explain: what was asked for, or the least step, is above one.
    fn explained(&self, decline: Decline) -> bool {
        let step = plus(self.channel.accepted(), self.limits.minimum_delta);
        let limit = match decline.reason {
            DeclineReason::Budget => self.limits.budget,
            DeclineReason::Deposit => self.limits.deposit_limit.max(self.book.deposit()),
            DeclineReason::MaxAhead | DeclineReason::Counts => return false,
        };
        let needed = decline.needed;
        decline.limit == limit && needed > limit && (needed <= step || self.asked.contains(&needed))
    }
}

proptest! {
    #[test]
    fn honest_sides_stay_in_bounds_and_never_wait_for_ever(
        terms in terms(),
        ops in proptest::collection::vec(ops(), 1..150),
    ) {
        let mut pair = Pair::new(terms);
        for op in ops {
            pair.apply(op);
            pair.check();
            if pair.declined.is_some() {
                break;
            }
        }
        let served = pair.declined.is_none() && pair.settle_down() && pair.declined.is_none();
        if !served {
            let decline = pair.declined;
            prop_assert!(decline.is_some(), "both wait: {:?} {:?}", pair.channel, pair.book);
            prop_assert!(pair.explained(decline.unwrap()), "{decline:?} {:?}", pair.channel);
            return Ok(());
        }
        // All calls have ended and all has arrived: the close voucher is taken, at the common count.
        pair.channel.record_spent(pair.gate.spent).unwrap();
        let amount = pair.book.close_amount(pair.channel.settled());
        prop_assert_eq!(amount, pair.channel.spent());
        let taken = matches!(pair.channel.close(&verified_close(amount.units())), Ok(channel::CloseAnswer::Taken { .. }));
        prop_assert!(taken);
    }
}
