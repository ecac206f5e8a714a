//! Every record of `protocol/vectors/vouchers.json`.

use std::sync::LazyLock;

use serde_json::Value;

use super::*;
use crate::payment::voucher::type_hashes;

static FILE: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(include_str!("../../../vectors/vouchers.json")).unwrap());

fn hex(value: &Value) -> Vec<u8> {
    let digits = value.as_str().unwrap().strip_prefix("0x").unwrap();
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap()).collect()
}

fn text<T: std::str::FromStr<Err: std::fmt::Debug>>(value: &Value) -> T {
    value.as_str().unwrap().parse().unwrap()
}

fn record_descriptor(vector: &Value) -> ChannelDescriptor {
    let inputs = &vector["channelIdInputs"];
    let optional = |name: &str| inputs.get(name);
    ChannelDescriptor {
        protocol: text(&vector["sessionProtocol"]),
        payer: text(&inputs["payer"]),
        payee: text(&inputs["payee"]),
        operator: optional("operator").map_or(Address::ZERO, text),
        token: text(&inputs["token"]),
        salt: text(&inputs["salt"]),
        authorized_signer: text(&inputs["authorizedSigner"]),
        expiring_nonce_hash: optional("expiringNonceHash").map_or(Hash::ZERO, text),
        escrow: text(&inputs["escrow"]),
        chain_id: inputs["chainId"].as_u64().unwrap(),
    }
}

fn check_vector(id: u64) {
    let vector = FILE["vectors"].as_array().unwrap().iter().find(|vector| vector["id"] == id).unwrap();
    let descriptor = record_descriptor(vector);
    let amount: Amount = text(&vector["cumulativeAmount"]);
    let (chain_id, escrow) = (vector["chainId"].as_u64().unwrap(), text(&vector["escrow"]));
    let domain = VoucherDomain::new(descriptor.protocol, chain_id, escrow);
    let channel_id: ChannelId = text(&vector["channelId"]);

    assert_eq!(descriptor.check(), Ok(()));
    assert_eq!(descriptor.id(), channel_id);
    assert_eq!(descriptor.voucher_domain(), domain);
    assert_eq!(*domain.separator().as_hash(), text(&vector["domainSeparator"]));
    assert_eq!(descriptor.signer(), text(&vector["expectedSigner"]));
    match vector["digest"].as_str() {
        Some(digest) => {
            assert_eq!(domain.voucher_struct_hash(&channel_id, amount), Ok(text(&vector["structHash"])));
            assert_eq!(domain.voucher_digest(&channel_id, amount), Ok(digest.parse().unwrap()));
        }
        None => assert!(matches!(domain.voucher_digest(&channel_id, amount), Err(VoucherError::AmountTooLarge { .. }))),
    }

    let key = SecretKey::from_bytes(hex(&vector["privateKey"]).try_into().unwrap()).unwrap();
    assert_eq!(key.address(), text(&vector["expectedSigner"]));
    let payer = SecretKey::from_bytes(hex(&vector["payerPrivateKey"]).try_into().unwrap()).unwrap();
    assert_eq!(payer.address(), descriptor.payer);
    let accept = vector["expect"] != "reject";
    let canonical = vector.get("canonicalSignature").or(accept.then(|| &vector["signature"]));
    if let Some(canonical) = canonical {
        let signed = Voucher::sign(&domain, &key, channel_id, amount).unwrap();
        assert_eq!(signed.signature.as_bytes().as_slice(), hex(canonical));
    }

    let verifier = Verifier::new(descriptor.signer());
    let presented = || -> Result<(), VoucherError> {
        let signature = Signature::parse(&hex(&vector["signature"]))?;
        Voucher { channel_id, amount, signature }.verify(&domain, &verifier)
    };
    assert_eq!(presented().is_ok(), accept, "{:?}", presented());
    // Again with the key in the cache: the faster way gives the same verdict.
    if let Ok(digest) = domain.voucher_digest(&channel_id, Amount::ZERO) {
        verifier.verify(&digest, &key.sign_digest(&digest)).unwrap();
        assert!(verifier.knows_key());
    }
    assert_eq!(presented().is_ok(), accept, "{:?}", presented());
    check_close_and_verdict(vector, &descriptor, &domain, &key, amount, accept);
}

fn check_close_and_verdict(
    vector: &Value,
    descriptor: &ChannelDescriptor,
    domain: &VoucherDomain,
    key: &SecretKey,
    amount: Amount,
    accept: bool,
) {
    let close_signature = vector.get("closeSignature").map(hex);
    if let Some(bytes) = &close_signature {
        let authorization = CloseAuthorization::sign(domain, key, descriptor.id(), amount).unwrap();
        assert_eq!(domain.close_digest(&descriptor.id(), amount), Ok(text(&vector["closeDigest"])));
        assert_eq!(authorization.signature.as_bytes().as_slice(), bytes.as_slice());
        assert_eq!(authorization.verify(domain, &Verifier::new(descriptor.signer())), Ok(()));
    }
    let signature = hex(&vector["signature"]);
    let record = VoucherRecord {
        descriptor: descriptor.clone(),
        chain_id: vector["chainId"].as_u64().unwrap(),
        escrow: text(&vector["escrow"]),
        channel_id: text(&vector["channelId"]),
        amount,
        signature: &signature,
        expected_signer: Some(text(&vector["expectedSigner"])),
        close_digest: vector.get("closeDigest").map(text),
        close_signature: close_signature.as_deref(),
    };
    let verdict = check_record(&record);
    assert_eq!(verdict.valid(), accept, "{:?}", verdict.error);
    assert_eq!(verdict.digest, vector["digest"].as_str().map(|digest| digest.parse().unwrap()));
    // A voucher presented as the close authorisation, and the reverse, are refused.
    if close_signature.is_some() {
        let swapped = VoucherRecord { close_signature: Some(&signature), ..record.clone() };
        assert!(matches!(check_record(&swapped).error, Some(RecordError::Close(_))));
    }
    let stated = VoucherRecord { channel_id: ChannelId([9; 32]), ..record };
    assert!(matches!(check_record(&stated).error, Some(RecordError::ChannelId { .. })));
}

macro_rules! vectors {
    ($($name:ident = $id:literal),+ $(,)?) => {
        $(#[test]
        fn $name() {
            check_vector($id);
        })+

        /// `[pay.channel.computed]`
        #[test]
        fn every_vector_of_the_file_has_its_test() {
            let ids: Vec<u64> =
                FILE["vectors"].as_array().unwrap().iter().map(|vector| vector["id"].as_u64().unwrap()).collect();
            assert_eq!(ids, [$($id),+]);
        }
    };
}

vectors! {
    v1_zero = 1,
    v1_one = 2,
    v1_delegated = 3,
    v1_above_u64 = 4,
    v1_above_u96 = 6,
    v1_maximum = 7,
    v2_zero = 8,
    v2_one = 9,
    v2_above_u64 = 11,
    v2_maximum = 12,
    v1_compact_form_is_taken = 13,
    v2_compact_form_is_taken = 15,
    v_zero_or_one_is_refused = 16,
    high_s_is_refused = 17,
    another_chain_is_refused = 19,
    another_escrow_is_refused = 20,
    another_channel_is_refused = 21,
    v1_types_on_a_v2_channel_are_refused = 23,
    a_close_authorization_is_no_voucher = 24,
    the_payer_does_not_sign_for_a_delegate = 25,
    r_zero_is_refused = 27,
    s_zero_is_refused = 28,
    v2_above_u96_is_refused = 30,
    v2_close_authorization = 31,
}

#[test]
fn type_hashes_are_those_of_the_file() {
    let stated = ["v1", "v2", "v2close"].map(|name| text::<Hash>(&FILE["typeHashes"][name]));
    assert_eq!(type_hashes(), stated);
    let strings =
        ["v1", "v2", "v2close"].map(|name| eip712::keccak256(FILE["typeStrings"][name].as_str().unwrap().as_bytes()));
    assert_eq!(type_hashes(), strings);
    for (protocol, name) in [(VoucherProtocol::V1, "v1"), (VoucherProtocol::V2, "v2")] {
        assert_eq!(protocol.domain_name(), FILE["domains"][name]);
    }
}

#[test]
fn amount_strings_are_taken_and_refused_as_the_file_says() {
    for pair in FILE["amountStrings"]["accept"].as_array().unwrap() {
        let text = pair[0].as_str().unwrap();
        assert_eq!(text.parse::<Amount>().unwrap().to_string(), text);
        assert_eq!(serde_json::from_value::<Amount>(pair[0].clone()).unwrap().to_string(), text);
    }
    for text in FILE["amountStrings"]["reject"].as_array().unwrap() {
        assert!(text.as_str().unwrap().parse::<Amount>().is_err(), "{text}");
        assert!(serde_json::from_value::<Amount>(text.clone()).is_err(), "{text}");
    }
    for value in FILE["amountStrings"]["rejectJsonTypes"].as_array().unwrap() {
        assert!(serde_json::from_value::<Amount>(value.clone()).is_err(), "{value}");
        assert!(serde_json::from_str::<Amount>(&value.to_string()).is_err(), "{value}");
    }
}

#[test]
fn an_amount_is_read_from_escaped_text_and_from_a_stream() {
    assert_eq!(serde_json::from_str::<Amount>(r#""\u0031\u0032""#).unwrap(), Amount::from(12));
    assert_eq!(serde_json::from_reader::<_, Amount>(&br#""12""#[..]).unwrap(), Amount::from(12));
}
