//! Keys, signatures and vouchers: round trips, forgeries, and replay anywhere else.

use proptest::prelude::*;

use super::*;

/// The order of secp256k1.
const ORDER: [u8; 32] = [
    0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xfe, 0xba, 0xae, 0xdc,
    0xe6, 0xaf, 0x48, 0xa0, 0x3b, 0xbf, 0xd2, 0x5e, 0x8c, 0xd0, 0x36, 0x41, 0x41,
];

/// order − s, the other s that satisfies the same equation.
fn mirror(s: &[u8]) -> Vec<u8> {
    let mut borrow = 0i32;
    let mut out = vec![0; 32];
    for at in (0..32).rev() {
        let mut digit = i32::from(ORDER[at]) - i32::from(s[at]) - borrow;
        borrow = i32::from(digit < 0);
        digit += 256 * borrow;
        out[at] = u8::try_from(digit).unwrap();
    }
    out
}

#[test]
fn keys_of_zero_and_of_the_group_order_are_refused() {
    assert_eq!(SecretKey::from_bytes([0; 32]).unwrap_err(), SecretKeyError::OutOfRange);
    assert_eq!(SecretKey::from_bytes(ORDER).unwrap_err(), SecretKeyError::OutOfRange);
    let mut last = ORDER;
    last[31] -= 1;
    assert_eq!(SecretKey::from_bytes(last).unwrap().to_bytes(), last);
}

#[test]
fn a_secret_key_shows_its_address_only() {
    let shown = format!("{:?}", key(0x5a));
    assert!(shown.contains(&key(0x5a).address().to_string()));
    assert!(!shown.contains("5a5a5a5a") && !shown.contains("90, 90"));
}

#[test]
fn the_address_of_key_one_is_the_known_one() {
    let mut one = [0; 32];
    one[31] = 1;
    let address = SecretKey::from_bytes(one).unwrap().address();
    assert_eq!(address.to_string(), "0x7e5f4552091a69125d5dfcb7b8c2659029395bdf");
}

/// `[pay.signature.canonical]`
#[test]
fn each_non_canonical_form_is_refused_by_name() {
    let digest = Hash([1; 32]);
    let good = *key(3).sign_digest(&digest).as_bytes();
    let parse = |edit: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.to_vec();
        edit(&mut bytes);
        Signature::parse(&bytes).map(|_| ())
    };
    assert_eq!(parse(&|_| ()), Ok(()));
    for length in [0, 1, 32, 63, 66, 130] {
        assert_eq!(parse(&|bytes| bytes.resize(length, 0)), Err(SignatureError::Length { found: length }));
    }
    for v in (0..=255).filter(|v| ![27, 28].contains(v)) {
        assert_eq!(parse(&|bytes| bytes[64] = v), Err(SignatureError::RecoveryByte(v)));
    }
    assert_eq!(parse(&|bytes| bytes[..32].fill(0)), Err(SignatureError::R));
    assert_eq!(parse(&|bytes| bytes[..32].copy_from_slice(&ORDER)), Err(SignatureError::R));
    assert_eq!(parse(&|bytes| bytes[..32].fill(0xff)), Err(SignatureError::R));
    assert_eq!(parse(&|bytes| bytes[32..64].fill(0)), Err(SignatureError::S));
    assert_eq!(parse(&|bytes| bytes[32..64].copy_from_slice(&ORDER)), Err(SignatureError::S));
    let high = mirror(&good[32..64]);
    assert_eq!(parse(&|bytes| bytes[32..64].copy_from_slice(&high)), Err(SignatureError::HighS));
}

#[test]
fn half_the_order_is_the_largest_s() {
    // (order − 1) / 2, from the definition of the lower half.
    let mut half = ORDER;
    let mut carry = 0;
    for byte in &mut half {
        let value = u16::from(*byte) + (carry << 8);
        *byte = u8::try_from(value / 2).unwrap();
        carry = value % 2;
    }
    let mut bytes = *key(3).sign_digest(&Hash([1; 32])).as_bytes();
    bytes[32..64].copy_from_slice(&half);
    assert!(Signature::parse(&bytes).is_ok());
    bytes[63] += 1;
    assert_eq!(Signature::parse(&bytes), Err(SignatureError::HighS));
}

#[test]
fn a_compact_signature_with_high_s_is_refused() {
    let compact = key(3).sign_digest(&Hash([1; 32])).to_compact();
    let mut high = compact;
    high[32] = 0x7f;
    high[33..].fill(0xff);
    // 2^255 − 1 is above half the order: the top bit is the parity, the rest is s.
    assert_eq!(Signature::parse(&high), Err(SignatureError::HighS));
    high[32] = 0xff;
    assert_eq!(Signature::parse(&high), Err(SignatureError::HighS));
}

#[test]
fn a_decoded_signature_is_canonical_too() {
    let good = key(3).sign_digest(&Hash([1; 32]));
    let bytes = postcard::to_stdvec(&good).unwrap();
    assert_eq!(bytes, good.as_bytes());
    assert_eq!(postcard::from_bytes::<Signature>(&bytes).unwrap(), good);
    let mut bad = bytes;
    bad[64] = 0;
    assert!(postcard::from_bytes::<Signature>(&bad).is_err());
    let json = serde_json::to_string(&good).unwrap();
    assert_eq!(serde_json::from_str::<Signature>(&json).unwrap(), good);
    let compact = format!("\"{}\"", Hex(&good.to_compact()));
    assert_eq!(serde_json::from_str::<Signature>(&compact).unwrap(), good);
}

#[test]
fn a_voucher_is_valid_on_its_own_channel_escrow_chain_and_protocol_only() {
    let base = descriptor();
    let mut places = vec![base.clone()];
    places.push(ChannelDescriptor { salt: Hash([6; 32]), ..base.clone() });
    places.push(ChannelDescriptor { payee: key(9).address(), ..base.clone() });
    places.push(ChannelDescriptor { token: Address([0x21; 20]), ..base.clone() });
    places.push(ChannelDescriptor { escrow: Address([0xef; 20]), ..base.clone() });
    places.push(ChannelDescriptor { chain_id: 4218, ..base.clone() });
    places.push(ChannelDescriptor { protocol: VoucherProtocol::V2, ..base.clone() });
    places.push(ChannelDescriptor { protocol: VoucherProtocol::V2, operator: key(8).address(), ..base.clone() });
    places.push(ChannelDescriptor { protocol: VoucherProtocol::V2, expiring_nonce_hash: Hash([1; 32]), ..base });
    let amount = Amount::from(1_000);
    for (from, made_for) in places.iter().enumerate() {
        let voucher = Voucher::sign(&made_for.voucher_domain(), &key(1), made_for.id(), amount).unwrap();
        for (to, shown_at) in places.iter().enumerate() {
            let verifier = Verifier::new(shown_at.signer());
            let replayed = SignedAmount::from(voucher).on(shown_at.id());
            for _again_with_cached_key in 0..2 {
                assert_eq!(
                    replayed.verify(&shown_at.voucher_domain(), &verifier).is_ok(),
                    from == to,
                    "{from} at {to}"
                );
            }
        }
    }
}

#[test]
fn v2_amounts_end_at_96_bits_and_v1_has_no_close_authorization() {
    let v2 = ChannelDescriptor { protocol: VoucherProtocol::V2, ..descriptor() };
    let above = Amount::MAX_U96.checked_add(Amount::from(1)).unwrap();
    assert!(Voucher::sign(&v2.voucher_domain(), &key(1), v2.id(), Amount::MAX_U96).is_ok());
    assert!(matches!(
        Voucher::sign(&v2.voucher_domain(), &key(1), v2.id(), above),
        Err(VoucherError::AmountTooLarge { .. })
    ));
    assert!(CloseAuthorization::sign(&v2.voucher_domain(), &key(1), v2.id(), above).is_err());
    let v1 = descriptor();
    let refused = CloseAuthorization::sign(&v1.voucher_domain(), &key(1), v1.id(), Amount::ZERO);
    assert_eq!(refused, Err(VoucherError::NoCloseAuthorization(VoucherProtocol::V1)));
}

#[test]
fn a_v1_descriptor_with_fields_of_v2_is_refused() {
    let base = descriptor();
    assert_eq!(base.check(), Ok(()));
    let operator = ChannelDescriptor { operator: Address([1; 20]), ..base.clone() };
    assert_eq!(operator.id(), base.id());
    assert_eq!(operator.check(), Err(DescriptorError::FieldsOfV2));
    let nonce = ChannelDescriptor { expiring_nonce_hash: Hash([1; 32]), ..base.clone() };
    assert_eq!(nonce.check(), Err(DescriptorError::FieldsOfV2));
    assert!(ChannelDescriptor { payer: Address::ZERO, ..base.clone() }.check().is_err());
    assert!(ChannelDescriptor { payee: Address::ZERO, ..base }.check().is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn what_a_key_signs_its_address_verifies(secret in prop::array::uniform32(1u8..), digest: [u8; 32]) {
        let digest = Hash(digest);
        let key = SecretKey::from_bytes(secret).unwrap_or_else(|_| super::key(1));
        let signature = key.sign_digest(&digest);
        prop_assert_eq!(signature.recover(&digest), Ok(key.address()));
        prop_assert_eq!(Signature::parse(signature.as_bytes()), Ok(signature));
        prop_assert_eq!(Signature::parse(&signature.to_compact()), Ok(signature));
        prop_assert_eq!(key.sign_digest(&digest), signature);
    }

    /// Recovery and the cached key agree on every signature: right, of another key, with the other v, with a flipped
    /// bit, and on random bytes.
    #[test]
    fn a_cached_key_gives_the_verdict_of_recovery(digest: [u8; 32], flip in 0usize..520, noise in prop::array::uniform32(0u8..)) {
        let digest = Hash(digest);
        let (signer, other) = (key(3), key(4));
        let verifier = Verifier::new(signer.address());
        verifier.verify(&digest, &signer.sign_digest(&digest)).unwrap();
        prop_assert!(verifier.knows_key());

        let good = *signer.sign_digest(&digest).as_bytes();
        let mut twin = good;
        twin[64] = 55 - twin[64];
        let mut flipped = good;
        flipped[flip / 8] ^= 1 << (flip % 8);
        let mut random = good;
        random[..32].copy_from_slice(&noise);
        for bytes in [good, twin, flipped, random, *other.sign_digest(&digest).as_bytes()] {
            let Ok(signature) = Signature::parse(&bytes) else { continue };
            let recovered = signature.recover(&digest) == Ok(signer.address());
            prop_assert_eq!(verifier.verify(&digest, &signature).is_ok(), recovered);
            prop_assert_eq!(recovered, bytes == good);
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..80), digest: [u8; 32]) {
        if let Ok(signature) = Signature::parse(&bytes) {
            let _ = signature.recover(&Hash(digest));
        }
        let _ = Credential::decode(&bytes);
    }

    #[test]
    fn a_voucher_for_another_amount_is_refused(amount: u64, other: u64) {
        let descriptor = descriptor();
        let voucher =
            Voucher::sign(&descriptor.voucher_domain(), &key(1), descriptor.id(), Amount::from(amount)).unwrap();
        let claimed = Voucher { amount: Amount::from(other), ..voucher };
        let verifier = Verifier::new(descriptor.signer());
        prop_assert_eq!(claimed.verify(&descriptor.voucher_domain(), &verifier).is_ok(), amount == other);
    }
}
