//! Random orders against a plain model: the ledger takes what the model takes, refuses what it refuses, and money is
//! conserved to the unit after each step.

use std::collections::HashMap;

use super::*;

const ACTORS: u8 = 3;
const TOKENS: [Address; 2] = [Address([0x20; 20]), Address([0x21; 20])];

#[derive(Debug, Clone)]
enum Step {
    Fund { who: u8, token: usize, units: u64 },
    Open { payer: u8, payee: u8, token: usize, salt: u8, units: u64, stale: bool },
    TopUp { channel: usize, units: u64, stale: bool },
    Settle { channel: usize, units: u64 },
    Close { channel: usize, units: u64, voucher: bool },
    RequestClose { channel: usize },
    Withdraw { channel: usize },
    Wait { ms: u64 },
}

fn step() -> impl Strategy<Value = Step> {
    let actor = 1..=ACTORS;
    let units = 0u64..400;
    prop_oneof![
        2 => (actor.clone(), 0..2usize, units.clone()).prop_map(|(who, token, units)| Step::Fund { who, token, units }),
        4 => (actor.clone(), actor, 0..2usize, 0..3u8, units.clone(), prop::bool::weighted(0.1))
            .prop_map(|(payer, payee, token, salt, units, stale)| Step::Open { payer, payee, token, salt, units, stale }),
        2 => (0..3usize, units.clone(), prop::bool::weighted(0.1))
            .prop_map(|(channel, units, stale)| Step::TopUp { channel, units, stale }),
        5 => (0..3usize, units.clone()).prop_map(|(channel, units)| Step::Settle { channel, units }),
        2 => (0..3usize, units, any::<bool>()).prop_map(|(channel, units, voucher)| Step::Close { channel, units, voucher }),
        2 => (0..3usize).prop_map(|channel| Step::RequestClose { channel }),
        3 => (0..3usize).prop_map(|channel| Step::Withdraw { channel }),
        1 => (0u64..1_500).prop_map(|ms| Step::Wait { ms }),
    ]
}

#[derive(Debug, Clone)]
struct Channel {
    descriptor: ChannelDescriptor,
    payer: u8,
    payee: u8,
    token: usize,
    deposit: i128,
    settled: i128,
    last_settle: Option<i128>,
    requested: Option<u64>,
    closed: bool,
    withdrawn: bool,
}

/// Signed numbers that may go wrong visibly.
#[derive(Debug, Default)]
struct Model {
    now_ms: u64,
    balances: HashMap<(u8, usize), i128>,
    funded: [i128; 2],
    nonces: HashMap<u8, u64>,
    channels: Vec<Channel>,
}

impl Model {
    fn balance(&mut self, who: u8, token: usize) -> &mut i128 {
        self.balances.entry((who, token)).or_default()
    }

    fn nonce(&self, who: u8, stale: bool) -> u64 {
        self.nonces.get(&who).copied().unwrap_or_default() + u64::from(!stale)
    }
}

/// Applies a step to both and returns what each says of it.
struct Run {
    ledger: Ledger,
    model: Model,
}

impl Run {
    fn apply(&mut self, step: &Step, signer: impl Fn(u8) -> u8) -> (bool, bool) {
        match *step {
            Step::Fund { who, token, units } => {
                *self.model.balance(who, token) += i128::from(units);
                self.model.funded[token] += i128::from(units);
                (self.ledger.fund(key(who).address(), TOKENS[token], amount(units)).is_ok(), true)
            }
            Step::Wait { ms } => {
                self.model.now_ms += ms;
                (true, true)
            }
            Step::Open { .. } => self.open(step, signer),
            Step::TopUp { channel, .. }
            | Step::Settle { channel, .. }
            | Step::Close { channel, .. }
            | Step::RequestClose { channel }
            | Step::Withdraw { channel } => {
                // Mostly the latest channels, so that few orders go to those that have ended.
                let Some(at) = self.model.channels.len().checked_sub(1 + channel) else { return (true, true) };
                let of = self.model.channels[at].clone();
                match step {
                    Step::Settle { .. } | Step::Close { .. } => self.by_payee(step, at, of, signer),
                    _ => self.by_payer(step, at, of, signer),
                }
            }
        }
    }

    fn open(&mut self, step: &Step, signer: impl Fn(u8) -> u8) -> (bool, bool) {
        let Step::Open { payer, payee, token, salt, units, stale } = *step else { unreachable!() };
        let nonce = self.model.nonce(payer, stale);
        let order = OpenChannel {
            payer: key(payer).address(),
            payee: key(payee).address(),
            token: TOKENS[token],
            salt: Hash([salt; 32]),
            authorized_signer: Address::ZERO,
            deposit: amount(units),
            nonce,
            expiry: 0,
        };
        let descriptor = order.descriptor(&identity());
        let signed = sign(order, signer(payer));
        let now = self.model.now_ms;
        let taken = self.ledger.open(&signed, now).is_ok();
        if taken {
            let after = self.ledger.clone();
            assert!(self.ledger.open(&signed, now).is_ok());
            assert_eq!(self.ledger, after);
        }
        let fits = (1..=*self.model.balance(payer, token)).contains(&i128::from(units));
        let fresh = !self.model.channels.iter().any(|channel| channel.descriptor == descriptor);
        let expected = signer(payer) == payer && fits && fresh && !stale;
        if expected {
            *self.model.balance(payer, token) -= i128::from(units);
            self.model.nonces.insert(payer, nonce);
            self.model.channels.push(Channel {
                descriptor,
                payer,
                payee,
                token,
                deposit: i128::from(units),
                settled: 0,
                last_settle: None,
                requested: None,
                closed: false,
                withdrawn: false,
            });
        }
        (taken, expected)
    }

    fn by_payer(&mut self, step: &Step, at: usize, of: Channel, signer: impl Fn(u8) -> u8) -> (bool, bool) {
        let (channel_id, now) = (of.descriptor.id(), self.model.now_ms);
        let live = !of.closed && !of.withdrawn;
        let by_payer = signer(of.payer) == of.payer;
        match *step {
            Step::TopUp { units, stale, .. } => {
                let nonce = self.model.nonce(of.payer, stale);
                let order = sign(TopUp { channel_id, deposit: amount(units), nonce, expiry: 0 }, signer(of.payer));
                let taken = self.twice(|ledger| ledger.top_up(&order, now)).is_ok();
                let more = i128::from(units) - of.deposit;
                let raises = more > 0;
                let affordable = more <= *self.model.balance(of.payer, of.token);
                let expected = by_payer && live && (!raises || (affordable && !stale));
                if expected && raises {
                    *self.model.balance(of.payer, of.token) -= more;
                    self.model.nonces.insert(of.payer, nonce);
                    self.model.channels[at] = Channel { deposit: of.deposit + more, requested: None, ..of };
                }
                (taken, expected)
            }
            Step::RequestClose { .. } => {
                let nonce = self.model.nonce(of.payer, false);
                let order = sign(RequestClose { channel_id, nonce, expiry: 0 }, signer(of.payer));
                let taken = self.twice(|ledger| ledger.request_close(&order, now)).is_ok();
                let expected = by_payer && live;
                if expected && of.requested.is_none() {
                    self.model.nonces.insert(of.payer, nonce);
                    self.model.channels[at].requested = Some(now);
                }
                (taken, expected)
            }
            Step::Withdraw { .. } => {
                let nonce = self.model.nonce(of.payer, false);
                let order = sign(Withdraw { channel_id, nonce, expiry: 0 }, signer(of.payer));
                let taken = self.twice(|ledger| ledger.withdraw(&order, now)).is_ok();
                let ripe = live && of.requested.is_some_and(|requested| now >= requested + GRACE_MS);
                let expected = by_payer && (ripe || of.withdrawn);
                if expected && ripe {
                    self.model.nonces.insert(of.payer, nonce);
                    *self.model.balance(of.payer, of.token) += of.deposit - of.settled;
                    self.model.channels[at] = Channel { withdrawn: true, ..of };
                }
                (taken, expected)
            }
            _ => unreachable!(),
        }
    }

    fn by_payee(&mut self, step: &Step, at: usize, of: Channel, signer: impl Fn(u8) -> u8) -> (bool, bool) {
        let channel_id = of.descriptor.id();
        let live = !of.closed && !of.withdrawn;
        let (by_payer, by_payee) = (signer(of.payer) == of.payer, signer(of.payee) == of.payee);
        match *step {
            Step::Settle { units, .. } => {
                let order = sign(Settle { channel_id, amount: amount(units) }, signer(of.payee));
                let voucher = voucher(&of.descriptor, units, signer(of.payer));
                let taken = self.twice(|ledger| ledger.settle(&order, &voucher)).is_ok();
                let units = i128::from(units);
                let pays = live && units > of.settled && units <= of.deposit;
                let expected = by_payee && by_payer && (pays || of.last_settle == Some(units));
                if expected && pays {
                    *self.model.balance(of.payee, of.token) += units - of.settled;
                    self.model.channels[at] = Channel { settled: units, last_settle: Some(units), ..of };
                }
                (taken, expected)
            }
            Step::Close { units, voucher: with, .. } => {
                let order = sign(Close { channel_id, amount: amount(units) }, signer(of.payee));
                let voucher = with.then(|| voucher(&of.descriptor, units, signer(of.payer)));
                let taken = self.twice(|ledger| ledger.close(&order, voucher.as_ref())).is_ok();
                let units = i128::from(units);
                let signed = by_payee && (!with || by_payer);
                let closes = live && (of.settled..=of.deposit).contains(&units) && (with || units == of.settled);
                let expected = signed && (closes || (of.closed && units == of.settled));
                if expected && closes {
                    *self.model.balance(of.payee, of.token) += units - of.settled;
                    *self.model.balance(of.payer, of.token) += of.deposit - units;
                    self.model.channels[at] = Channel { settled: units, closed: true, ..of };
                }
                (taken, expected)
            }
            _ => unreachable!(),
        }
    }

    /// Gives an order twice: the second time nothing changes and the answer is the same.
    fn twice<T: PartialEq + std::fmt::Debug>(
        &mut self,
        order: impl Fn(&mut Ledger) -> Result<T, EscrowRefusal>,
    ) -> Result<T, EscrowRefusal> {
        let answer = order(&mut self.ledger);
        let after = self.ledger.clone();
        assert_eq!(order(&mut self.ledger), answer);
        assert_eq!(self.ledger, after);
        answer
    }

    fn check(&mut self) {
        self.ledger.conservation().unwrap();
        for (token, address) in TOKENS.iter().enumerate() {
            let mut sum = 0;
            for who in 1..=ACTORS {
                let held = *self.model.balance(who, token);
                assert!(held >= 0);
                assert_eq!(self.ledger.balance(key(who).address(), *address).units(), u128::try_from(held).unwrap());
                sum += held;
            }
            let live = self.model.channels.iter().filter(|channel| !channel.closed && !channel.withdrawn);
            sum += live.filter(|channel| channel.token == token).map(|of| of.deposit - of.settled).sum::<i128>();
            assert_eq!(sum, self.model.funded[token]);
        }
        for of in &self.model.channels {
            let channel = self.ledger.channel(of.descriptor.id()).unwrap();
            assert_eq!(channel.deposit.units(), u128::try_from(of.deposit).unwrap());
            assert_eq!(channel.settled.units(), u128::try_from(of.settled).unwrap());
            assert_eq!(channel.finalized, of.closed || of.withdrawn);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// One order in eight is signed by a stranger, and must be refused without a trace.
    #[test]
    fn random_orders_agree_with_the_model_and_conserve_money(
        steps in prop::collection::vec((step(), prop::bool::weighted(0.125)), 1..60),
    ) {
        let config = LedgerConfig { grace_ms: GRACE_MS, dev: false };
        let mut run = Run { ledger: Ledger::new(identity(), config), model: Model::default() };
        for (who, token) in (1..=ACTORS).flat_map(|who| [(who, 0), (who, 1)]) {
            run.apply(&Step::Fund { who, token, units: 400 }, |party| party);
        }
        for (step, forged) in steps {
            let before = run.ledger.clone();
            let signer = |party: u8| if forged { 9 } else { party };
            let (taken, expected) = run.apply(&step, signer);
            prop_assert_eq!(taken, expected, "{:?}", step);
            if !taken {
                prop_assert_eq!(&run.ledger, &before);
            }
            run.check();
        }
    }
}
