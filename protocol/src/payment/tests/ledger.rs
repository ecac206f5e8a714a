//! The local ledger's identity and orders.

use super::*;
use crate::payment::ledger_messages::*;

fn open() -> OpenChannel {
    OpenChannel {
        payer: key(1).address(),
        payee: key(2).address(),
        token: Address([0x20; 20]),
        salt: Hash([5; 32]),
        authorized_signer: Address::ZERO,
        deposit: Amount::from(1_000),
        nonce: 1,
        expiry: 9_000,
    }
}

/// `[pay.ledger.identity]`
#[test]
fn a_ledger_is_known_by_its_key_and_found_out_with_another_chain_id() {
    let ledger = LedgerIdentity::of(&key(7));
    assert_eq!(ledger.escrow, key(7).address());
    assert!(is_reserved_chain(ledger.chain_id) && ledger.is_consistent());
    assert!(!LedgerIdentity { chain_id: ledger.chain_id ^ 1, ..ledger }.is_consistent());
    assert_eq!(ledger.chain_id - (1 << 63), u64::from_str_radix(&ledger.escrow.to_string()[34..], 16).unwrap());
}

#[test]
fn the_reserved_range_has_two_to_the_32_chains() {
    for chain_id in [1 << 63, (1 << 63) + 1, (1 << 63) + u64::from(u32::MAX)] {
        assert!(is_reserved_chain(chain_id));
    }
    for chain_id in [0, 1, 4217, (1 << 63) - 1, (1 << 63) + (1 << 32), u64::MAX] {
        assert!(!is_reserved_chain(chain_id));
    }
}

#[test]
fn an_order_is_valid_for_its_ledger_its_signer_and_its_fields_only() {
    let ledger = LedgerIdentity::of(&key(7));
    let signed = Signed::sign(open(), &ledger, &key(1));
    assert_eq!(signed.verify(&ledger, key(1).address()), Ok(()));
    assert!(signed.verify(&ledger, key(2).address()).is_err());
    assert!(signed.verify(&LedgerIdentity::of(&key(8)), key(1).address()).is_err());
    let edits: &[fn(&mut OpenChannel)] = &[
        |open| open.payer = key(9).address(),
        |open| open.payee = key(9).address(),
        |open| open.token = Address([1; 20]),
        |open| open.salt = Hash([1; 32]),
        |open| open.authorized_signer = key(9).address(),
        |open| open.deposit = Amount::from(1_001),
        |open| open.nonce += 1,
        |open| open.expiry = 0,
    ];
    for edit in edits {
        let mut bad = signed.clone();
        edit(&mut bad.message);
        assert!(bad.verify(&ledger, key(1).address()).is_err(), "{:?}", bad.message);
    }
    let wire = postcard::to_stdvec(&signed).unwrap();
    assert_eq!(postcard::from_bytes::<Signed<OpenChannel>>(&wire).unwrap(), signed);
}

#[test]
fn orders_of_different_kinds_with_the_same_fields_never_share_a_signature() {
    let ledger = LedgerIdentity::of(&key(7));
    let (channel_id, amount) = (ChannelId([1; 32]), Amount::from(5));
    let digests = [
        Settle { channel_id, amount }.digest(&ledger),
        Close { channel_id, amount }.digest(&ledger),
        RequestClose { channel_id, nonce: 5, expiry: 0 }.digest(&ledger),
        Withdraw { channel_id, nonce: 5, expiry: 0 }.digest(&ledger),
        TopUp { channel_id, deposit: amount, nonce: 5, expiry: 0 }.digest(&ledger),
        Fund { holder: key(1).address(), token: Address::ZERO, amount, nonce: 5, expiry: 0 }.digest(&ledger),
        Transfer { from: key(1).address(), to: Address::ZERO, token: Address::ZERO, amount, nonce: 5, expiry: 0 }
            .digest(&ledger),
        VoucherDomain::new(VoucherProtocol::V1, ledger.chain_id, ledger.escrow)
            .voucher_digest(&channel_id, amount)
            .unwrap(),
    ];
    for (at, digest) in digests.iter().enumerate() {
        assert!(!digests[..at].contains(digest));
    }
}

#[test]
fn an_opened_channel_is_a_v1_channel_of_the_ledger() {
    let ledger = LedgerIdentity::of(&key(7));
    let descriptor = open().descriptor(&ledger);
    assert_eq!(descriptor.check(), Ok(()));
    assert_eq!((descriptor.chain_id, descriptor.escrow), (ledger.chain_id, ledger.escrow));
    assert_eq!(descriptor.signer(), key(1).address());
}

#[test]
fn funding_and_transfers_are_signed_with_all_their_fields() {
    let ledger = LedgerIdentity::of(&key(7));
    let (holder, token, amount) = (key(1).address(), Address([0x20; 20]), Amount::from(5));
    let fund = Fund { holder, token, amount, nonce: 1, expiry: 2 };
    let transfer = Transfer { from: holder, to: key(2).address(), token, amount, nonce: 1, expiry: 2 };
    let funds: &[fn(&mut Fund)] = &[
        |order| order.holder = Address([9; 20]),
        |order| order.token = Address([9; 20]),
        |order| order.amount = Amount::from(6),
        |order| order.nonce += 1,
        |order| order.expiry += 1,
    ];
    for edit in funds {
        let mut other = fund.clone();
        edit(&mut other);
        assert_ne!(other.digest(&ledger), fund.digest(&ledger), "{other:?}");
    }
    let transfers: &[fn(&mut Transfer)] = &[
        |order| order.from = Address([9; 20]),
        |order| order.to = Address([9; 20]),
        |order| order.token = Address([9; 20]),
        |order| order.amount = Amount::from(6),
        |order| order.nonce += 1,
        |order| order.expiry += 1,
    ];
    for edit in transfers {
        let mut other = transfer.clone();
        edit(&mut other);
        assert_ne!(other.digest(&ledger), transfer.digest(&ledger), "{other:?}");
    }
}
