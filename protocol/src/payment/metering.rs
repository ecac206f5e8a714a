//! What is counted, and what it costs. Payer and payee run this same code on the same frames.
//!
//! A metered **byte** is a payload byte of a request, a response or an item, as framed; an item's length prefix,
//! headers, control and payment frames are free. The cost of a call so far is
//!
//! ```text
//! call + items × item + ceil(bytes_out × amount / per_bytes) + ceil(bytes_in × amount / per_bytes)
//! ```
//!
//! over the response and all streams of the call; each charge is the difference to the charge before, so that rounding
//! happens once for each call and direction, however the bytes were cut into frames. `[pay.meter.rounding]`
//!
//! What a call costs may be known only at its end. Such a method has a price with a **maximum**: that much is reserved
//! when the handler starts, the response states what of it was used, and the rest is free again. `[pay.reserve.commit]`

use serde::{Deserialize, Serialize};

use super::Amount;

/// So many base units for so many bytes: `25/KiB` is 25 base units for each 1,024 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Base units for each `per_bytes` bytes.
    pub amount: Amount,
    /// Bytes that `amount` pays for, at least 1.
    pub per_bytes: core::num::NonZeroU64,
}

impl Rate {
    /// What `bytes` cost, rounded up once, or `None` above [`Amount::MAX`].
    pub fn cost(&self, bytes: u64) -> Option<Amount> {
        let product = u128::from(bytes).checked_mul(self.amount.units())?;
        Some(Amount::new(product.div_ceil(u128::from(self.per_bytes.get()))))
    }

    /// The largest number of bytes that cost at most `budget` and whose cost can be expressed.
    pub fn affordable_bytes(&self, budget: Amount) -> u64 {
        // ceil(b × a / p) ≤ m  ⇔  b × a ≤ m × p. Saturating loses nothing: `cost` needs b × a to fit 128 bits as well.
        let product = budget.units().saturating_mul(u128::from(self.per_bytes.get()));
        // A free rate affords every number of bytes.
        product.checked_div(self.amount.units()).map_or(u64::MAX, |bytes| u64::try_from(bytes).unwrap_or(u64::MAX))
    }
}

/// The metadata entry of a call whose value names it within its channel and method, so that it is executed and charged once
/// however often it is made. `[pay.key.once]`
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";

/// The price of one method. What is left at its default is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Price {
    /// For each call, charged when its handler starts.
    pub call: Amount,
    /// For each item that the payee sends.
    pub item: Amount,
    /// For the bytes from payee to payer.
    pub bytes_out: Option<Rate>,
    /// For the bytes from payer to payee.
    pub bytes_in: Option<Rate>,
    /// The most, at least `call`, that a call may cost whose response states its cost: it is reserved when the handler
    /// starts. What is stated stands in the place of `call`, which is the least it costs; items and bytes come on top.
    /// `None` for a call that costs `call`.
    pub max: Option<Amount>,
}

impl Price {
    /// A price for the bytes that the payee sends, and nothing else.
    pub const fn per_bytes_out(rate: Rate) -> Self {
        Price { call: Amount::ZERO, item: Amount::ZERO, bytes_out: Some(rate), bytes_in: None, max: None }
    }

    /// What is held from the start of a handler to the end of its call, in base units: the call price, or the maximum.
    pub fn hold(&self) -> Amount {
        self.max.map_or(self.call, |max| max.max(self.call))
    }

    /// How far the stated cost of a call may be above its call price, in base units.
    pub fn above_call(&self) -> Amount {
        self.hold().saturating_sub(self.call)
    }

    /// Whether nothing costs anything.
    pub fn is_free(&self) -> bool {
        let free = |rate: Option<Rate>| rate.is_none_or(|rate| rate.amount.is_zero());
        self.hold().is_zero() && self.item.is_zero() && free(self.bytes_out) && free(self.bytes_in)
    }

    /// The cost of a call that has carried so much, or `None` above [`Amount::MAX`].
    pub fn cost(&self, usage: Usage) -> Option<Amount> {
        let rated = |rate: Option<Rate>, bytes| rate.map_or(Some(Amount::ZERO), |rate| rate.cost(bytes));
        self.call
            .checked_add(self.item.checked_mul(u128::from(usage.items))?)?
            .checked_add(rated(self.bytes_out, usage.bytes_out)?)?
            .checked_add(rated(self.bytes_in, usage.bytes_in)?)
    }
}

/// What a call has carried so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Usage {
    /// Items from payee to payer, over all streams of the call.
    pub items: u64,
    /// Payload bytes from payee to payer.
    pub bytes_out: u64,
    /// Payload bytes from payer to payee.
    pub bytes_in: u64,
}

impl Usage {
    /// The sum of both, or `None` past 2^64.
    pub fn checked_add(self, more: Usage) -> Option<Usage> {
        Some(Usage {
            items: self.items.checked_add(more.items)?,
            bytes_out: self.bytes_out.checked_add(more.bytes_out)?,
            bytes_in: self.bytes_in.checked_add(more.bytes_in)?,
        })
    }
}

/// The running cost of one call.
///
/// A meter starts at zero: the call price is part of its first charge, so that a call which was never answered has cost
/// the payer's count nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CallMeter {
    usage: Usage,
    charged: Amount,
    /// What the response stated above the call price.
    above_call: Amount,
    /// What an earlier attempt of the same call has cost.
    paid_before: Amount,
}

impl CallMeter {
    /// What the call has carried.
    pub const fn usage(&self) -> Usage {
        self.usage
    }

    /// What the call has cost.
    pub const fn charged(&self) -> Amount {
        self.charged
    }

    /// The response states a cost of so much above the call price: the next charge has it in it. At most what the price
    /// allows counts.
    pub fn state_above_call(&mut self, price: &Price, above_call: Amount) {
        self.above_call = above_call.min(price.above_call());
    }

    /// So much of the cost was paid with an earlier attempt of the same call. It is said before anything is charged, else it
    /// has no effect.
    pub fn state_paid_before(&mut self, paid_before: Amount) {
        if self.usage == Usage::default() && self.charged.is_zero() {
            self.paid_before = paid_before;
        }
    }

    /// What carrying `more` would add to the cost, or `None` where the numbers end.
    pub fn quote(&self, price: &Price, more: Usage) -> Option<Amount> {
        self.cost(price, self.usage.checked_add(more)?)?.checked_sub(self.charged)
    }

    fn cost(&self, price: &Price, usage: Usage) -> Option<Amount> {
        Some(price.cost(usage)?.checked_add(self.above_call)?.saturating_sub(self.paid_before))
    }

    /// Counts `more` and returns what it adds to the cost, or `None` (and counts nothing) where the numbers end.
    pub fn charge(&mut self, price: &Price, more: Usage) -> Option<Amount> {
        let usage = self.usage.checked_add(more)?;
        let cost = self.cost(price, usage)?;
        let difference = cost.checked_sub(self.charged)?;
        self.usage = usage;
        self.charged = cost;
        Some(difference)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::arithmetic_side_effects)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Numbers of every magnitude, so that both the small and the overflowing ends are reached.
    fn magnitudes() -> impl Strategy<Value = u128> {
        prop_oneof![0..2000u128, any::<u64>().prop_map(u128::from), any::<u128>(), Just(u128::MAX)]
    }

    fn rates() -> impl Strategy<Value = Rate> {
        (magnitudes(), prop_oneof![1..5000u64, 1..=u64::MAX]).prop_map(|(amount, per)| Rate {
            amount: Amount::new(amount),
            per_bytes: core::num::NonZeroU64::new(per).unwrap(),
        })
    }

    fn usages() -> impl Strategy<Value = Usage> {
        (0..100u64, 0..100_000u64, 0..100_000u64).prop_map(|(items, bytes_out, bytes_in)| Usage {
            items,
            bytes_out,
            bytes_in,
        })
    }

    fn prices() -> impl Strategy<Value = Price> {
        let small = || {
            proptest::option::of((0..1000u128, 1..5000u64).prop_map(|(amount, per)| Rate {
                amount: Amount::new(amount),
                per_bytes: core::num::NonZeroU64::new(per).unwrap(),
            }))
        };
        (0..1000u64, 0..1000u64, small(), small()).prop_map(|(call, item, bytes_out, bytes_in)| Price {
            call: call.into(),
            item: item.into(),
            bytes_out,
            bytes_in,
            max: None,
        })
    }

    proptest! {
        #[test]
        fn cuts_do_not_change_the_cost(price in prices(), cuts in proptest::collection::vec(usages(), 1..20)) {
            let mut meter = CallMeter::default();
            let mut whole = Usage::default();
            let mut sum = Amount::ZERO;
            for cut in cuts {
                whole = whole.checked_add(cut).unwrap();
                let quote = meter.quote(&price, cut);
                let charge = meter.charge(&price, cut);
                prop_assert_eq!(quote, charge);
                sum = sum.checked_add(charge.unwrap()).unwrap();
            }
            prop_assert_eq!(Some(sum), price.cost(whole));
            prop_assert_eq!(CallMeter::default().charge(&price, whole), Some(sum));
            prop_assert_eq!(meter.charged(), sum);
        }

        #[test]
        fn affordable_bytes_is_exact(rate in rates(), budget in magnitudes()) {
            let budget = Amount::new(budget);
            let bytes = rate.affordable_bytes(budget);
            prop_assert!(rate.cost(bytes).is_some_and(|cost| cost <= budget));
            if let Some(more) = bytes.checked_add(1) {
                prop_assert!(rate.cost(more).is_none_or(|cost| cost > budget));
            }
        }
    }

    /// `[pay.reserve.commit]`
    #[test]
    fn a_stated_cost_is_charged_once_and_never_above_the_maximum() {
        let amount = Amount::new;
        let price = Price { call: amount(10), item: amount(3), max: Some(amount(100)), ..Price::default() };
        assert_eq!((price.hold(), price.above_call()), (amount(100), amount(90)));
        let mut meter = CallMeter::default();
        let item = Usage { items: 1, ..Usage::default() };
        assert_eq!(meter.charge(&price, item), Some(amount(13)));
        meter.state_above_call(&price, amount(32));
        assert_eq!(meter.charge(&price, Usage::default()), Some(amount(32)));
        assert_eq!(meter.charge(&price, item), Some(amount(3)));
        let mut greedy = CallMeter::default();
        greedy.state_above_call(&price, Amount::MAX);
        assert_eq!(greedy.charge(&price, Usage::default()), Some(amount(100)));
        let below = Price { max: Some(amount(5)), ..price };
        assert_eq!((below.hold(), below.above_call()), (amount(10), Amount::ZERO));
    }

    #[test]
    fn a_charge_past_the_range_counts_nothing() {
        let price = Price { item: Amount::MAX, ..Price::default() };
        let mut meter = CallMeter::default();
        let one = Usage { items: 1, ..Usage::default() };
        assert_eq!(meter.charge(&price, one), Some(Amount::MAX));
        assert_eq!(meter.charge(&price, one), None);
        assert_eq!(meter.usage(), one);
    }
}
