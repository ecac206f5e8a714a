//! The machine against a plain model: bare integers, one rule after the other, written from the design's formulas and not
//! from the machine. Random operations, with writes that are delayed, lost or confirmed late, and crashes between.

use proptest::prelude::*;

use super::fixtures::{Spender, channel, forged, policy, verified_as, verified_close, verify};
use super::*;

const DELTA: u128 = 10;
const LEASE: u128 = 40;

#[derive(Debug, Clone)]
enum Op {
    /// Amount relative to accepted, quality of the signature: 0 forged, 1 and 2 two good variants.
    Voucher(i16, u8),
    /// Verified long ago, proposed without the cheap checks, as the voucher of a credential is.
    LateVoucher(u16),
    WriteVoucher(usize),
    CommitVoucher(usize),
    Lease(u8),
    Return(u8),
    WriteLease,
    CommitLease,
    AbandonLease,
    Spend(u8),
    Sync,
    ForgedSpent(u16),
    Reserve(u8, u8),
    CommitReservation(usize, u8),
    Release(usize),
    Tick(u8),
    Need(u8),
    Deposit(u16),
    Settled(u16),
    Own(u8),
    Close(i8),
    Finalize(u16),
    Crash,
}

fn ops() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (-20..60i16, 0..3u8).prop_map(|(step, quality)| Op::Voucher(step, quality)),
        1 => (0..600u16).prop_map(Op::LateVoucher),
        6 => any::<usize>().prop_map(Op::WriteVoucher),
        6 => any::<usize>().prop_map(Op::CommitVoucher),
        6 => any::<u8>().prop_map(Op::Lease),
        1 => any::<u8>().prop_map(Op::Return),
        8 => Just(Op::WriteLease),
        8 => Just(Op::CommitLease),
        1 => Just(Op::AbandonLease),
        10 => (0..30u8).prop_map(Op::Spend),
        5 => Just(Op::Sync),
        1 => (0..600u16).prop_map(Op::ForgedSpent),
        4 => (0..60u8, 0..50u8).prop_map(|(maximum, ttl)| Op::Reserve(maximum, ttl)),
        4 => (any::<usize>(), 0..60u8).prop_map(|(index, cost)| Op::CommitReservation(index, cost)),
        1 => any::<usize>().prop_map(Op::Release),
        2 => (0..20u8).prop_map(Op::Tick),
        4 => (0..80u8).prop_map(Op::Need),
        2 => (0..600u16).prop_map(Op::Deposit),
        1 => (0..400u16).prop_map(Op::Settled),
        1 => (0..20u8).prop_map(Op::Own),
        1 => (-40..40i8).prop_map(Op::Close),
        1 => (0..600u16).prop_map(Op::Finalize),
        2 => Just(Op::Crash),
    ]
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum End {
    Open,
    Disputed,
    Closing(u128),
    Finalized,
}

/// What the store has, in bare numbers.
#[derive(Debug, Clone)]
struct Disk {
    deposit: u128,
    accepted: u128,
    leased: u128,
    settled: u128,
    epoch: u64,
    end: End,
    variant: Option<u8>,
}

#[derive(Debug, Clone)]
struct Model {
    now: Disk,
    disk: Disk,
    spent: u128,
    gate_spent: u128,
    gate_leased: u128,
    clock: u64,
    /// (id, maximum, deadline) of held ones; the costs that are due; the costs that are in the planned lease.
    held: Vec<(ReservationId, u128, u64)>,
    due: Vec<u128>,
    planned: Vec<u128>,
    /// (from, to, extra, epoch, written)
    lease: Option<(u128, u128, u128, u64, bool)>,
    asked: Option<(u128, u128)>,
}

impl Model {
    fn new(deposit: u128) -> Self {
        let now = Disk { deposit, accepted: 0, leased: 0, settled: 0, epoch: 0, end: End::Open, variant: None };
        Model {
            disk: now.clone(),
            now,
            spent: 0,
            gate_spent: 0,
            gate_leased: 0,
            clock: 0,
            held: vec![],
            due: vec![],
            planned: vec![],
            lease: None,
            asked: None,
        }
    }

    fn reserved(&self) -> u128 {
        self.held.iter().map(|held| held.1).chain(self.due.iter().copied()).chain(self.planned.iter().copied()).sum()
    }

    fn free(&self) -> u128 {
        self.now.accepted - self.now.leased - self.reserved() - self.lease.map_or(0, |lease| lease.2)
    }

    fn open(&self) -> bool {
        self.now.end == End::Open
    }

    /// A voucher's step, by the rules of the page: which check fails, if any.
    fn step(&self, amount: u128) -> Option<&'static str> {
        if amount < self.now.accepted + DELTA && amount != self.now.deposit {
            Some("delta")
        } else if amount > self.now.deposit {
            Some("deposit")
        } else {
            None
        }
    }

    fn need(&mut self, cost: u128) -> Option<u128> {
        let (accepted, reserved) = (self.now.accepted, self.reserved());
        if accepted - self.spent - reserved >= cost {
            return None;
        }
        let required = (self.spent + reserved + cost).max((accepted + DELTA).min(self.now.deposit));
        match self.asked {
            Some((at, before)) if at == accepted && before <= required => None,
            _ => {
                self.asked = Some((accepted, required));
                Some(required)
            }
        }
    }

    fn crash(&mut self) {
        *self = Model {
            now: self.disk.clone(),
            spent: self.disk.leased,
            gate_spent: self.disk.leased,
            gate_leased: self.disk.leased,
            clock: self.clock,
            ..Model::new(0)
        };
        self.disk = self.now.clone();
    }
}

struct World {
    machine: PaymentChannel,
    gate: Spender,
    store: ChannelSnapshot,
    vouchers: Vec<(VoucherPlan, u128, u8, bool)>,
    lease: Option<LeasePlan>,
    model: Model,
}

fn units(amount: u128) -> Amount {
    Amount::new(amount)
}

impl World {
    fn new(deposit: u128) -> Self {
        let machine = channel(deposit);
        let (gate, store) = (Spender::of(&machine), machine.snapshot());
        World { machine, gate, store, vouchers: vec![], lease: None, model: Model::new(deposit) }
    }

    fn propose(&mut self, amount: u128, variant: u8) {
        let step = self.machine.propose_voucher(&verified_as(amount, variant).1);
        if !self.model.open() {
            assert!(matches!(step, Err(VoucherRefusal::Closed(_))));
        } else if amount <= self.model.now.accepted {
            assert_eq!(step, Ok(None));
        } else {
            match self.model.step(amount) {
                Some("delta") => assert!(matches!(step, Err(VoucherRefusal::BelowMinimumDelta { .. }))),
                Some(_) => assert!(matches!(step, Err(VoucherRefusal::AboveDeposit { .. }))),
                None => self.vouchers.push((step.unwrap().unwrap(), amount, variant, false)),
            }
        }
    }

    fn voucher(&mut self, step: i16, quality: u8) {
        let amount = u128::try_from(i128::try_from(self.model.now.accepted).unwrap() + i128::from(step)).unwrap_or(0);
        let voucher = if quality == 0 { forged(amount) } else { verified_as(amount, quality).0 };
        let precheck = self.machine.precheck_voucher(&voucher);
        let model = &self.model;
        if !model.open() {
            return assert!(matches!(precheck, Err(VoucherRefusal::Closed(_))));
        }
        if amount == model.now.accepted && model.now.variant == Some(quality) && quality != 0 {
            return assert_eq!(precheck, Ok(Precheck::Again));
        }
        if amount <= model.now.accepted {
            return assert!(matches!(precheck, Err(VoucherRefusal::NotAbove { .. })));
        }
        assert_eq!(precheck.is_ok(), model.step(amount).is_none());
        if quality == 0 {
            return assert!(verify(&voucher).is_err());
        }
        if precheck.is_ok() {
            self.propose(amount, quality);
        }
    }

    fn write_voucher(&mut self, index: usize) {
        let Some(index) = index.checked_rem(self.vouchers.len()) else { return };
        let (plan, amount, variant, written) = &mut self.vouchers[index];
        let result = plan.update().apply_to(&mut self.store);
        let disk = &mut self.model.disk;
        if disk.end != End::Open {
            assert!(matches!(result, Err(StaleUpdate::Closed(_))));
            if !*written {
                let _ = self.vouchers.remove(index);
            }
            return;
        }
        assert_eq!(result, Ok(()));
        *written = true;
        if *amount > disk.accepted {
            (disk.accepted, disk.variant) = (*amount, Some(*variant));
        }
        disk.deposit = disk.deposit.max(self.store.deposit.units());
    }

    fn commit_voucher(&mut self, index: usize) {
        let Some(index) = index.checked_rem(self.vouchers.len()) else { return };
        if !self.vouchers[index].3 {
            return;
        }
        let (plan, amount, variant, _) = self.vouchers.remove(index);
        let accepted = self.machine.commit_voucher(plan).unwrap();
        if amount > self.model.now.accepted {
            (self.model.now.accepted, self.model.now.variant) = (amount, Some(variant));
        }
        assert_eq!(accepted.units(), self.model.now.accepted);
    }

    fn propose_lease(&mut self, wanted: u128) {
        let plan = self.machine.propose_lease(units(wanted));
        let model = &mut self.model;
        if !model.open() {
            return assert!(plan.is_err());
        }
        let extra = if model.now.leased - model.spent < wanted { LEASE.min(model.free()) } else { 0 };
        if model.lease.is_some() || (extra == 0 && model.due.is_empty()) {
            return assert_eq!(plan, Ok(None));
        }
        model.planned = std::mem::take(&mut model.due);
        let to = model.now.leased + extra + model.planned.iter().sum::<u128>();
        model.lease = Some((model.now.leased, to, extra, model.now.epoch, false));
        self.lease = plan.unwrap();
        assert!(self.lease.is_some());
    }

    fn propose_return(&mut self, amount: u128) {
        if self.model.lease.is_some() {
            return assert_eq!(self.machine.propose_return(self.gate.leased), Err(LeaseError::Busy));
        }
        self.gate.give_back(units(amount));
        let model = &mut self.model;
        model.gate_leased -= amount.min(model.gate_leased - model.gate_spent);
        self.lease = Some(self.machine.propose_return(self.gate.leased).unwrap());
        model.lease = Some((model.now.leased, model.gate_leased, 0, model.now.epoch, false));
    }

    fn write_lease(&mut self) {
        let Some(plan) = &self.lease else { return };
        let result = plan.update().apply_to(&mut self.store);
        let model = &mut self.model;
        let (from, to, _, epoch, written) = model.lease.as_mut().unwrap();
        if *written && *epoch == model.disk.epoch {
            // Written again after a lost answer.
            return assert!(result.is_ok() || model.disk.end != End::Open);
        }
        let refused = *epoch != model.disk.epoch || (model.disk.end != End::Open && to > from);
        assert_eq!(result.is_err(), refused, "{result:?}");
        if !refused {
            *written = true;
            model.disk.leased = *to;
        }
    }

    fn commit_lease(&mut self) {
        let Some((_, to, _, _, true)) = self.model.lease else { return };
        let commit = self.machine.commit_lease(self.lease.take().unwrap()).unwrap();
        self.gate.apply(&commit);
        let model = &mut self.model;
        model.lease = None;
        model.now.leased = to;
        let costs: u128 = std::mem::take(&mut model.planned).iter().sum();
        model.spent += costs;
        model.gate_spent += costs;
        model.gate_leased = model.gate_leased.max(to);
        assert_eq!((commit.leased, commit.reserved_costs), (units(to), units(costs)));
    }

    fn abandon_lease(&mut self) {
        let Some((_, _, _, _, false)) = self.model.lease else { return };
        self.machine.abandon_lease(self.lease.take().unwrap()).unwrap();
        self.model.lease = None;
        let mut planned = std::mem::take(&mut self.model.planned);
        self.model.due.append(&mut planned);
        // A return that was not written gives the gate its lease back.
        self.gate.raise(self.machine.leased());
        self.model.gate_leased = self.model.gate_leased.max(self.model.now.leased);
    }

    fn spend(&mut self, cost: u128) {
        let fits = self.model.gate_spent + cost <= self.model.gate_leased;
        if !self.model.open() {
            return;
        }
        assert_eq!(self.gate.try_spend(units(cost)), fits);
        if fits {
            self.model.gate_spent += cost;
        }
    }

    fn sync(&mut self) {
        assert_eq!(self.machine.record_spent(self.gate.spent), Ok(()));
        self.model.spent = self.model.gate_spent;
    }

    fn forged_spent(&mut self, spent: u128) {
        let limit = self.model.lease.map_or(u128::MAX, |lease| lease.1).min(self.model.now.leased);
        // What is above the gate's own count and within the lease is a lie that the machine cannot see.
        if spent <= self.model.spent {
            assert_eq!(self.machine.record_spent(units(spent)), Ok(()));
        } else if spent > limit || !self.model.open() {
            assert!(self.machine.record_spent(units(spent)).is_err());
        }
    }

    fn reserve(&mut self, maximum: u128, ttl: u64) {
        let deadline = self.model.clock + ttl;
        let result = self.machine.reserve(units(maximum), deadline);
        let model = &mut self.model;
        if !model.open() {
            assert!(matches!(result, Err(ReserveError::Closed(_))));
        } else if maximum > model.now.accepted - model.spent - model.reserved() {
            assert!(matches!(result, Err(ReserveError::Short { .. })));
        } else if maximum > model.free() {
            assert_eq!(result, Err(ReserveError::Leased { missing: units(maximum - model.free()) }));
        } else {
            model.held.push((result.unwrap(), maximum, deadline));
        }
    }

    fn commit_reservation(&mut self, index: usize, cost: u128) {
        let Some(index) = index.checked_rem(self.model.held.len()) else { return };
        let (id, maximum, _) = self.model.held[index];
        let result = self.machine.commit_reservation(id, units(cost));
        assert_eq!(result.is_ok(), self.model.open() && cost <= maximum);
        if result.is_ok() {
            self.model.held.remove(index);
            self.model.due.push(cost);
        }
    }

    fn close(&mut self, step: i8) {
        self.sync();
        let spent = self.model.spent;
        let amount = u128::try_from(i128::try_from(spent).unwrap() + i128::from(step)).unwrap_or(0);
        let result = self.machine.close(&verified_close(amount));
        let model = &mut self.model;
        let fits = model.now.settled <= amount && amount <= model.now.accepted;
        let again = matches!(model.now.end, End::Closing(_));
        let free_to_close = match model.now.end {
            End::Open | End::Disputed => fits && model.reserved() == 0 && model.lease.is_none(),
            End::Closing(at) => at == amount,
            End::Finalized => return,
        };
        assert_eq!(result.is_ok(), free_to_close, "{result:?}");
        let Ok(answer) = result else { return };
        let update = match answer {
            CloseAnswer::Taken { close, update } => {
                assert!((again || amount >= spent) && close.amount.units() == amount);
                model.now.end = End::Closing(amount);
                update
            }
            CloseAnswer::Disputed { claimed, spent: stated, update } => {
                assert!(!again && amount < spent && claimed.units() == amount && stated.units() == spent);
                model.now.end = End::Disputed;
                update
            }
        };
        let result = update.apply_to(&mut self.store);
        if model.now.epoch == model.disk.epoch {
            // The store may not have a voucher yet that the machine has only if it was never written: impossible.
            assert_eq!(result, Ok(()));
            model.disk.end = model.now.end;
        }
    }

    fn apply(&mut self, op: Op) {
        match op {
            Op::Voucher(step, quality) => self.voucher(step, quality),
            Op::LateVoucher(amount) => self.propose(amount.into(), 1),
            Op::WriteVoucher(index) => self.write_voucher(index),
            Op::CommitVoucher(index) => self.commit_voucher(index),
            Op::Lease(wanted) => self.propose_lease(wanted.into()),
            Op::Return(amount) => self.propose_return(amount.into()),
            Op::WriteLease => self.write_lease(),
            Op::CommitLease => self.commit_lease(),
            Op::AbandonLease => self.abandon_lease(),
            Op::Spend(cost) => self.spend(cost.into()),
            Op::Sync => self.sync(),
            Op::ForgedSpent(spent) => self.forged_spent(spent.into()),
            Op::Reserve(maximum, ttl) => self.reserve(maximum.into(), ttl.into()),
            Op::CommitReservation(index, cost) => self.commit_reservation(index, cost.into()),
            Op::Release(index) => {
                let Some(index) = index.checked_rem(self.model.held.len()) else { return };
                let (id, maximum, _) = self.model.held.remove(index);
                assert_eq!(self.machine.release(id), Ok(units(maximum)));
            }
            Op::Tick(ms) => {
                self.model.clock += u64::from(ms);
                let now = self.model.clock;
                let expired = self.machine.expire(now).len();
                let before = self.model.held.len();
                self.model.held.retain(|held| held.2 > now);
                assert_eq!(expired, before - self.model.held.len());
            }
            Op::Need(cost) => {
                let need = self.machine.need(units(cost.into()));
                if self.model.open() {
                    let required = need.unwrap().map(|need| need.required.units());
                    assert_eq!(required, self.model.need(cost.into()));
                } else {
                    assert!(need.is_err());
                }
            }
            Op::Deposit(deposit) => {
                let raised = u128::from(deposit) > self.model.now.deposit;
                assert_eq!(self.machine.set_deposit(units(deposit.into())).is_some(), raised);
                self.model.now.deposit = self.model.now.deposit.max(deposit.into());
            }
            Op::Settled(settled) => {
                let result = self.machine.set_settled(units(settled.into()));
                assert_eq!(result.is_ok(), u128::from(settled) <= self.model.now.accepted);
                if result.is_ok() {
                    self.model.now.settled = self.model.now.settled.max(settled.into());
                }
            }
            Op::Own(epoch) => self.own(epoch.into()),
            Op::Close(step) => self.close(step),
            Op::Finalize(settled) => self.finalize(settled.into()),
            Op::Crash => self.crash(),
        }
    }

    fn own(&mut self, epoch: u64) {
        let result = self.machine.take_ownership(epoch);
        assert_eq!(result.is_ok(), epoch > self.model.now.epoch);
        let Ok(update) = result else { return };
        self.model.now.epoch = epoch;
        self.model.asked = None;
        let written = update.apply_to(&mut self.store);
        assert_eq!(written.is_err(), self.model.disk.end == End::Finalized);
        if written.is_ok() {
            self.model.disk.epoch = epoch;
        }
    }

    fn finalize(&mut self, settled: u128) {
        // Rarely, and only after a close: else most runs would end here.
        if !matches!(self.model.now.end, End::Closing(_)) {
            return;
        }
        let result = self.machine.finalize(units(settled));
        assert_eq!(result.is_ok(), settled <= self.model.now.accepted);
        let Ok(update) = result else { return };
        assert_eq!(update.apply_to(&mut self.store), Ok(()));
        self.model.now.settled = self.model.now.settled.max(settled);
        self.model.now.end = End::Finalized;
        self.model.disk.end = End::Finalized;
    }

    fn crash(&mut self) {
        let handed_out = self.gate.spent;
        self.machine = PaymentChannel::restore(self.store.clone(), policy(DELTA, LEASE)).unwrap();
        assert!(self.machine.spent() >= handed_out, "what was delivered would be delivered again for nothing");
        self.gate = Spender::of(&self.machine);
        self.vouchers.clear();
        self.lease = None;
        // Deposit and settled are facts that any update may have carried.
        self.model.disk.deposit = self.store.deposit.units();
        self.model.disk.settled = self.store.settled.units();
        self.model.crash();
    }

    fn check(&self) {
        let (machine, model) = (&self.machine, &self.model);
        let snapshot = machine.snapshot();
        assert_eq!(snapshot.validate(), Ok(()));
        assert_eq!(self.store.validate(), Ok(()));
        let now = &model.now;
        assert_eq!(snapshot.deposit.units(), now.deposit);
        assert_eq!(snapshot.accepted.units(), now.accepted);
        assert_eq!(snapshot.leased.units(), now.leased);
        assert_eq!(snapshot.spent.units(), model.spent);
        assert_eq!(snapshot.settled.units(), now.settled);
        assert_eq!(snapshot.epoch, now.epoch);
        assert_eq!(machine.reserved().units(), model.reserved());
        assert_eq!(machine.free().units(), model.free());
        assert_eq!((self.gate.spent.units(), self.gate.leased.units()), (model.gate_spent, model.gate_leased));
        assert_eq!(self.store.accepted.units(), model.disk.accepted);
        assert_eq!(self.store.leased.units(), model.disk.leased);
        assert!(machine.leased().units() + machine.reserved().units() <= machine.accepted().units());
        assert!(self.gate.spent <= self.gate.leased && self.gate.leased <= machine.leased());
        assert!(self.store.leased >= self.gate.spent, "spending ran ahead of what is durable");
        assert!(self.store.accepted >= machine.accepted(), "a voucher counts that is not durable");
        assert!(snapshot.vouchers.len() <= StoredVouchers::CAPACITY);
        let end = match snapshot.phase {
            ChannelPhase::Open => End::Open,
            ChannelPhase::Disputed { .. } => End::Disputed,
            ChannelPhase::Closing { close } => End::Closing(close.amount.units()),
            ChannelPhase::Finalized { .. } => End::Finalized,
        };
        assert_eq!(end, now.end);
        let beyond = now.settled.checked_sub(model.spent).filter(|excess| *excess > 0);
        assert_eq!(machine.settled_beyond_spent().map(Amount::units), beyond);
    }
}

proptest! {
    /// `[pay.counters]`
    #[test]
    fn the_machine_agrees_with_the_model(deposit in 0..500u128, ops in proptest::collection::vec(ops(), 1..120)) {
        let mut world = World::new(deposit);
        for op in ops {
            world.apply(op);
            world.check();
        }
    }
}
