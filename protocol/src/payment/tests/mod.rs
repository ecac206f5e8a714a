//! Tests that need several parts of the money at once, and what they share.

mod ledger;
mod objects;
mod signing;
mod vectors;

use super::*;

/// A key that is the same in every run.
pub(super) fn key(seed: u8) -> SecretKey {
    SecretKey::from_bytes([seed; 32]).unwrap()
}

pub(super) fn descriptor() -> ChannelDescriptor {
    ChannelDescriptor {
        protocol: VoucherProtocol::V1,
        payer: key(1).address(),
        payee: key(2).address(),
        operator: Address::ZERO,
        token: Address([0x20; 20]),
        salt: Hash([5; 32]),
        authorized_signer: Address::ZERO,
        expiring_nonce_hash: Hash::ZERO,
        escrow: Address([0xee; 20]),
        chain_id: 4217,
    }
}

pub(super) fn rate(amount: u64, per_bytes: u64) -> Rate {
    Rate { amount: Amount::from(amount), per_bytes: per_bytes.try_into().unwrap() }
}

pub(super) fn terms() -> Terms {
    Terms {
        payee: key(2).address(),
        escrow: Address([0xee; 20]),
        token: Address([0x20; 20]),
        chain_id: 4217,
        protocol: VoucherProtocol::V1,
        service: "files".into(),
        methods: vec![
            MethodPrice {
                method_id: 11,
                name: "read".into(),
                price: Price {
                    call: Amount::from(7),
                    item: Amount::from(3),
                    bytes_out: Some(rate(25, 1024)),
                    bytes_in: None,
                    max: None,
                },
                max_item_bytes: 2048,
                max_answer_bytes: 100,
            },
            MethodPrice {
                method_id: 12,
                name: "stat".into(),
                price: Price::default(),
                max_item_bytes: 0,
                max_answer_bytes: 512,
            },
        ],
        minimum_deposit: Amount::from(1_000),
        suggested_deposit: Amount::from(10_000),
        minimum_delta: Amount::from(10),
        patience_ms: 60_000,
        in_flight_cap: Amount::from(500),
        lease: Amount::from(100),
        binding: Binding::Exporter,
        ledger_url: Some("tcp://127.0.0.1:9".into()),
    }
}
