//! How much a payer lets be on its way: its windows, by the price of what they hold.

use tollway_protocol::limits::{ConnectionLimits, ITEM_OVERHEAD};
use tollway_protocol::payment::{Amount, Terms};

/// Streams that a paid connection may have open at once, so that their windows together stay within the cap.
const MAX_PAID_STREAMS: u32 = 8;

/// The limits with which a payer opens a paid connection.
///
/// The price of all that may be on its way (the windows of bodies and streams, at the dearest price of any method) stays
/// within half of the in-flight cap less one lease, and within `max_ahead`; where calls have a price, half of that is
/// theirs. `[pay.cap.windows]` A window is never below
/// one largest item, which may start with a single byte of credit anyhow.
pub(crate) fn paid_limits(terms: &Terms, max_ahead: Amount) -> ConnectionLimits {
    let defaults = ConnectionLimits::default();
    let largest = |of: fn(&tollway_protocol::payment::MethodPrice) -> u64| {
        let bytes = terms.methods.iter().map(of).max().unwrap_or(0);
        u32::try_from(bytes).unwrap_or(u32::MAX).max(1)
    };
    let max_item = largest(|method| method.max_item_bytes).min(defaults.max_item);
    let max_body = largest(|method| method.max_answer_bytes).min(defaults.max_body);
    let half_cap = Amount::new(terms.in_flight_cap.units() / 2).saturating_sub(terms.lease);
    let calls_cost = terms.methods.iter().any(|method| !method.price.hold().is_zero());
    let for_windows = if calls_cost { Amount::new(half_cap.units() / 2) } else { half_cap };
    let room = for_windows.min(max_ahead);
    // One part for bodies, the others for the streams.
    let share = Amount::new(room.units() / u128::from(MAX_PAID_STREAMS + 1));
    let affordable = terms
        .methods
        .iter()
        .map(|method| {
            let by_bytes = method.price.bytes_out.map_or(u64::MAX, |rate| rate.affordable_bytes(share));
            // An item costs at least its overhead in credit.
            let items = share.units().checked_div(method.price.item.units()).unwrap_or(u128::MAX);
            let by_items = u64::try_from(items).unwrap_or(u64::MAX).saturating_mul(ITEM_OVERHEAD);
            by_bytes.min(by_items)
        })
        .min()
        .unwrap_or(u64::MAX);
    let window = |default: u32, least: u32| u32::try_from(affordable).unwrap_or(u32::MAX).min(default).max(least);
    ConnectionLimits {
        max_item,
        max_body,
        window: window(defaults.window, max_body),
        stream_window: window(defaults.stream_window, 1),
        max_calls: defaults.max_calls,
        max_streams: MAX_PAID_STREAMS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tollway_protocol::payment::{Address, Binding, MethodPrice, Price, VoucherProtocol};

    fn terms(rate: &str, in_flight_cap: u128, lease: u128) -> Terms {
        Terms {
            payee: Address::ZERO,
            escrow: Address::ZERO,
            token: Address::ZERO,
            chain_id: 1,
            protocol: VoucherProtocol::V1,
            service: "s".to_owned(),
            methods: vec![MethodPrice {
                method_id: 1,
                name: "m".to_owned(),
                price: Price::per_bytes_out(rate.parse().expect("a rate")),
                max_item_bytes: 65_536,
                max_answer_bytes: 1_024,
            }],
            minimum_deposit: Amount::ZERO,
            suggested_deposit: Amount::ZERO,
            minimum_delta: Amount::ZERO,
            patience_ms: 1,
            in_flight_cap: Amount::new(in_flight_cap),
            lease: Amount::new(lease),
            binding: Binding::None,
            ledger_url: None,
        }
    }

    /// `[pay.cap.windows]`
    #[test]
    fn what_may_be_on_its_way_is_within_the_cap_and_within_what_is_authorised_ahead() {
        for (cap, lease, ahead) in [(10_000_000, 10_000, 100_000), (400_000, 10_000, 1_000_000)] {
            let terms = terms("1/KiB", cap, lease);
            let limits = paid_limits(&terms, Amount::new(ahead));
            let bytes = u64::from(limits.window) + u64::from(limits.max_streams) * u64::from(limits.stream_window);
            let price = terms.methods[0].price.bytes_out.and_then(|rate| rate.cost(bytes)).expect("a price");
            assert!(price <= Amount::new(ahead), "{price} for {limits:?}");
            assert!(price <= Amount::new(cap / 2 - lease), "{price} for {limits:?}");
            assert!(limits.stream_window >= 65_536, "{limits:?}");
        }
    }

    #[test]
    fn a_dear_service_leaves_small_windows_that_still_let_one_item_start() {
        let limits = paid_limits(&terms("1000/B", 1_000, 10), Amount::new(100));
        assert_eq!(limits.stream_window, 1);
        assert!(limits.check(&Default::default()).is_ok(), "{limits:?}");
    }
}
