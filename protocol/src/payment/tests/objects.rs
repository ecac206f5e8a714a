//! Terms, credentials and receipts: whatever is changed on the way is refused.

use super::*;

type Edit<T> = (&'static str, fn(&mut T));

const TERMS_EDITS: &[Edit<Terms>] = &[
    ("payee", |terms| terms.payee = key(9).address()),
    ("escrow", |terms| terms.escrow = Address([1; 20])),
    ("token", |terms| terms.token = Address([1; 20])),
    ("chain_id", |terms| terms.chain_id += 1),
    ("protocol", |terms| terms.protocol = VoucherProtocol::V2),
    ("service", |terms| terms.service.push('x')),
    ("method_id", |terms| terms.methods[0].method_id = 99),
    ("name", |terms| terms.methods[0].name.push('x')),
    ("call", |terms| terms.methods[0].price.call = Amount::from(8)),
    ("item", |terms| terms.methods[0].price.item = Amount::from(4)),
    ("bytes_out", |terms| terms.methods[0].price.bytes_out = Some(rate(26, 1024))),
    ("bytes_in", |terms| terms.methods[0].price.bytes_in = Some(rate(1, 1))),
    ("max_item_bytes", |terms| terms.methods[0].max_item_bytes += 1),
    ("max_answer_bytes", |terms| terms.methods[0].max_answer_bytes += 1),
    ("methods", |terms| drop(terms.methods.pop())),
    ("minimum_deposit", |terms| terms.minimum_deposit = Amount::from(1)),
    ("suggested_deposit", |terms| terms.suggested_deposit = Amount::from(20_000)),
    ("minimum_delta", |terms| terms.minimum_delta = Amount::from(11)),
    ("patience_ms", |terms| terms.patience_ms += 1),
    ("in_flight_cap", |terms| terms.in_flight_cap = Amount::from(501)),
    ("lease", |terms| terms.lease = Amount::from(101)),
    ("binding", |terms| terms.binding = Binding::None),
    ("ledger_url", |terms| terms.ledger_url = None),
];

#[test]
fn signed_terms_come_back_as_they_were() {
    let signed = SignedTerms::sign(&terms(), &key(2)).unwrap();
    assert_eq!(signed.verify(None).unwrap(), terms());
    assert_eq!(signed.verify(Some(key(2).address())).unwrap(), terms());
    let wire = postcard::to_stdvec(&signed).unwrap();
    assert_eq!(postcard::from_bytes::<SignedTerms>(&wire).unwrap(), signed);
}

#[test]
fn terms_with_any_field_changed_are_refused() {
    let signed = SignedTerms::sign(&terms(), &key(2)).unwrap();
    for (field, edit) in TERMS_EDITS {
        let mut changed = terms();
        edit(&mut changed);
        assert_ne!(changed, terms(), "{field}");
        let forged = SignedTerms { bytes: postcard::to_stdvec(&changed).unwrap(), ..signed.clone() };
        let pinned = SignatureError::WrongSigner { expected: key(2).address() };
        assert_eq!(forged.verify(Some(key(2).address())), Err(TermsError::Signature(pinned)), "{field}");
        // Without a pinned payee the signature recovers some address, but not that of the payee in the terms.
        assert!(
            matches!(forged.verify(None), Err(TermsError::NotThePayee { .. } | TermsError::Signature(_))),
            "{field}"
        );
    }
    let elsewhere = [
        SignedTerms { chain_id: 1, ..signed.clone() },
        SignedTerms { escrow: Address([1; 20]), ..signed.clone() },
        SignedTerms { signature: key(9).sign_digest(&Hash([1; 32])), ..signed },
    ];
    for forged in elsewhere {
        assert!(forged.verify(None).is_err());
        assert!(forged.verify(Some(key(2).address())).is_err());
    }
}

/// `[pay.terms.signed]`
#[test]
fn terms_of_another_payee_are_refused_when_one_is_pinned() {
    let mut theirs = terms();
    theirs.payee = key(9).address();
    let signed = SignedTerms::sign(&theirs, &key(9)).unwrap();
    assert!(signed.verify(None).is_ok());
    assert!(signed.verify(Some(key(2).address())).is_err());
    assert!(matches!(SignedTerms::sign(&theirs, &key(2)), Err(TermsError::WrongKey { .. })));
}

/// Signs arbitrary bytes as terms, as a hostile payee can.
fn sign_bytes(bytes: Vec<u8>, chain_id: u64, escrow: Address, signer: &SecretKey) -> SignedTerms {
    let type_hash = eip712::keccak256(b"Terms(bytes32 hash)");
    let hash = eip712::StructHasher::new(&type_hash).word(&eip712::keccak256(&bytes)).finish();
    let digest = eip712::Domain::tollway(chain_id, escrow).separator().digest(&hash);
    SignedTerms { bytes, chain_id, escrow, signature: signer.sign_digest(&digest) }
}

/// `[pay.signed.canonical]`
#[test]
fn well_signed_terms_that_are_not_the_one_encoding_are_refused() {
    let good = postcard::to_stdvec(&terms()).unwrap();
    let sign = |bytes| sign_bytes(bytes, 4217, Address([0xee; 20]), &key(2));
    assert_eq!(sign(good.clone()), SignedTerms::sign(&terms(), &key(2)).unwrap());
    let codec = |bytes| match sign(bytes).verify(None) {
        Err(TermsError::Codec(error)) => error,
        other => panic!("{other:?}"),
    };

    let mut trailing = good.clone();
    trailing.push(0);
    assert_eq!(codec(trailing), CodecError::Trailing(1));
    assert!(matches!(codec(good[..good.len() - 1].to_vec()), CodecError::Postcard(_)));
    assert!(matches!(codec(vec![0; MAX_TERMS_BYTES + 1]), CodecError::TooLong { .. }));
    // The length of the service's name, 5, written as two bytes: postcard takes it, we do not.
    let at = good.windows(6).position(|window| window == b"\x05files").unwrap();
    let mut long = good.clone();
    long.splice(at..=at, [0x85, 0x00]);
    assert_eq!(codec(long), CodecError::NotCanonical);
    // A domain beside the bytes that is not the one in them.
    assert_eq!(sign_bytes(good.clone(), 1, Address([0xee; 20]), &key(2)).verify(None), Err(TermsError::OtherDomain));
    assert_eq!(sign_bytes(good, 4217, Address([1; 20]), &key(2)).verify(None), Err(TermsError::OtherDomain));
}

#[test]
fn terms_that_make_no_sense_are_neither_signed_nor_taken() {
    type Case = (Inconsistency, fn(&mut Terms));
    let cases: &[Case] = &[
        (Inconsistency::LongName, |terms| terms.service = "x".repeat(MAX_NAME_BYTES + 1)),
        (Inconsistency::LongName, |terms| terms.methods[1].name = "x".repeat(MAX_NAME_BYTES + 1)),
        (Inconsistency::LongLedgerUrl, |terms| terms.ledger_url = Some("x".repeat(MAX_LEDGER_URL_BYTES + 1))),
        (Inconsistency::MethodTwice, |terms| terms.methods[1].method_id = 11),
        (Inconsistency::SuggestedBelowMinimum, |terms| terms.suggested_deposit = Amount::from(999)),
        (Inconsistency::DepositAboveProtocol, |terms| {
            terms.protocol = VoucherProtocol::V2;
            terms.suggested_deposit = Amount::MAX;
        }),
        (Inconsistency::PriceTooLarge, |terms| terms.methods[0].price.call = Amount::MAX),
    ];
    for (reason, edit) in cases {
        let mut bad = terms();
        edit(&mut bad);
        assert_eq!(SignedTerms::sign(&bad, &key(2)), Err(TermsError::Inconsistent(*reason)));
        let signed = sign_bytes(postcard::to_stdvec(&bad).unwrap(), 4217, Address([0xee; 20]), &key(2));
        assert_eq!(signed.verify(None), Err(TermsError::Inconsistent(*reason)));
    }
    let mut at_the_limit = terms();
    at_the_limit.service = "x".repeat(MAX_NAME_BYTES);
    assert!(SignedTerms::sign(&at_the_limit, &key(2)).is_ok());
}

#[test]
fn the_dearest_unit_is_the_call_with_its_dearest_answering_frame() {
    let mut terms = terms();
    // 7 for the call, and an item: 3 + ceil(2048 × 25 / 1024) = 53; the response would be 3.
    assert_eq!(terms.dearest_unit(), Some(Amount::from(60)));
    assert_eq!(terms.minimum_max_ahead(), Some(Amount::from(70)));
    terms.methods[0].max_answer_bytes = 4096;
    assert_eq!(terms.dearest_unit(), Some(Amount::from(107)));
    terms.methods[0].price.bytes_out = Some(Rate { amount: Amount::MAX, per_bytes: 1.try_into().unwrap() });
    assert_eq!(terms.dearest_unit(), None);
    terms.methods.clear();
    assert_eq!(terms.dearest_unit(), Some(Amount::ZERO));
}

fn draft() -> CredentialDraft {
    let descriptor = descriptor();
    let voucher = Voucher::sign(&descriptor.voucher_domain(), &key(1), descriptor.id(), Amount::from(50)).unwrap();
    CredentialDraft {
        challenge: ChallengeKey::new([7; 32]).issue(1_000, [1; 16], Hash([3; 32])),
        descriptor,
        epoch: 4,
        received: Amount::from(40),
        proof: vec![1, 2, 3],
        voucher: Some(voucher.into()),
    }
}

fn place() -> Place<'static> {
    Place { service: "files", exporter: Hash([8; 32]) }
}

#[test]
fn a_credential_round_trips_and_proves_possession() {
    let credential = draft().sign(&key(1), place()).unwrap();
    let decoded = Credential::decode(&credential.encode().unwrap()).unwrap();
    assert_eq!(decoded, credential);
    let verifier = Verifier::new(decoded.descriptor.signer());
    assert_eq!(decoded.verify_possession(place(), &verifier), Ok(descriptor().id()));
    assert_eq!(decoded.verify_voucher(&verifier).unwrap().unwrap().amount, Amount::from(50));
    let without = CredentialDraft { voucher: None, ..draft() }.sign(&key(1), place()).unwrap();
    assert_eq!(without.verify_voucher(&verifier), Ok(None));
}

/// `[pay.possession.first]`
#[test]
fn a_credential_with_any_signed_field_changed_is_refused() {
    let edits: &[Edit<Credential>] = &[
        ("challenge.issued_ms", |credential| credential.challenge.issued_ms += 1),
        ("challenge.nonce", |credential| credential.challenge.nonce[0] ^= 1),
        ("challenge.terms_hash", |credential| credential.challenge.terms_hash.0[0] ^= 1),
        ("challenge.mac", |credential| credential.challenge.mac[0] ^= 1),
        ("protocol", |credential| credential.descriptor.protocol = VoucherProtocol::V2),
        ("payer", |credential| credential.descriptor.payer = key(9).address()),
        ("payee", |credential| credential.descriptor.payee = key(9).address()),
        ("operator", |credential| credential.descriptor.operator = key(9).address()),
        ("token", |credential| credential.descriptor.token = Address([1; 20])),
        ("salt", |credential| credential.descriptor.salt = Hash([1; 32])),
        ("authorized_signer", |credential| credential.descriptor.authorized_signer = key(9).address()),
        ("expiring_nonce_hash", |credential| credential.descriptor.expiring_nonce_hash = Hash([1; 32])),
        ("escrow", |credential| credential.descriptor.escrow = Address([1; 20])),
        ("chain_id", |credential| credential.descriptor.chain_id += 1),
        ("epoch", |credential| credential.epoch += 1),
        ("received", |credential| credential.received = Amount::from(41)),
        ("possession", |credential| credential.possession = key(9).sign_digest(&Hash([1; 32]))),
    ];
    let good = draft().sign(&key(1), place()).unwrap();
    for (field, edit) in edits {
        let mut bad = good.clone();
        edit(&mut bad);
        assert_ne!(bad, good, "{field}");
        assert!(bad.verify_possession(place(), &Verifier::new(bad.descriptor.signer())).is_err(), "{field}");
        assert!(bad.verify_possession(place(), &Verifier::new(good.descriptor.signer())).is_err(), "{field}");
    }
    let verifier = Verifier::new(good.descriptor.signer());
    for elsewhere in [Place { service: "file", ..place() }, Place { exporter: Hash::ZERO, ..place() }] {
        assert!(good.verify_possession(elsewhere, &verifier).is_err());
    }
    let mut dearer = good.clone();
    dearer.voucher.as_mut().unwrap().amount = Amount::from(51);
    assert!(dearer.verify_voucher(&verifier).is_err());
    let stolen = Credential { possession: good.voucher.unwrap().signature, ..good };
    assert!(stolen.verify_possession(place(), &verifier).is_err(), "a voucher's signature proves no possession");
}

#[test]
fn a_delegated_channel_is_possessed_by_the_delegate() {
    let descriptor = ChannelDescriptor { authorized_signer: key(3).address(), ..descriptor() };
    let draft = CredentialDraft { descriptor, voucher: None, ..draft() };
    assert_eq!(draft.clone().sign(&key(1), place()), Err(CredentialError::WrongKey));
    let credential = draft.sign(&key(3), place()).unwrap();
    assert!(credential.verify_possession(place(), &Verifier::new(key(3).address())).is_ok());
    assert!(credential.verify_possession(place(), &Verifier::new(key(1).address())).is_err());
}

#[test]
fn a_credential_is_taken_at_the_size_cap_and_refused_above_it() {
    let sized = |proof: usize| CredentialDraft { proof: vec![0; proof], ..draft() }.sign(&key(1), place()).unwrap();
    let overhead = postcard::to_stdvec(&sized(1_000)).unwrap().len() - 1_000;
    let at_the_cap = sized(MAX_CREDENTIAL_BYTES - overhead);
    let bytes = at_the_cap.encode().unwrap();
    assert_eq!(bytes.len(), MAX_CREDENTIAL_BYTES);
    assert_eq!(Credential::decode(&bytes).unwrap(), at_the_cap);
    let above = sized(MAX_CREDENTIAL_BYTES - overhead + 1);
    assert!(above.encode().is_err());
    let bytes = postcard::to_stdvec(&above).unwrap();
    assert!(matches!(Credential::decode(&bytes), Err(CredentialError::Codec(CodecError::TooLong { .. }))));
    let mut trailing = sized(0).encode().unwrap();
    trailing.push(0);
    assert!(Credential::decode(&trailing).is_err());
}

fn receipt() -> Receipt {
    Receipt {
        sequence: 3,
        time_ms: 1_700_000_000_000,
        accepted: Amount::from(100),
        spent: Amount::from(60),
        units: 4_096,
        settled: Amount::from(20),
        status: ReceiptStatus::Checkpoint,
        reference: Some(Hash([4; 32])),
    }
}

#[test]
fn a_receipt_is_evidence_for_its_channel_and_its_fields_only() {
    let channel = descriptor();
    let signed = SignedReceipt::sign(&receipt(), &channel, &key(2)).unwrap();
    assert_eq!(signed.verify(&channel), Ok(receipt()));
    assert_eq!(SignedReceipt::sign(&receipt(), &channel, &key(1)), Err(ReceiptError::WrongKey));

    let twin = ChannelDescriptor { salt: Hash([6; 32]), ..channel.clone() };
    assert!(matches!(signed.verify(&twin), Err(ReceiptError::OtherChannel { .. })));
    assert!(signed.verify(&ChannelDescriptor { chain_id: 1, ..channel.clone() }).is_err());
    assert!(signed.verify(&ChannelDescriptor { escrow: Address([1; 20]), ..channel.clone() }).is_err());
    assert!(signed.verify(&ChannelDescriptor { payee: key(9).address(), ..channel.clone() }).is_err());
    for at in 0..signed.bytes.len() {
        let mut bad = signed.clone();
        bad.bytes[at] ^= 1;
        assert!(matches!(bad.verify(&channel), Err(ReceiptError::Signature(_))), "byte {at}");
    }
}

#[test]
fn an_unknown_status_is_never_taken_for_success() {
    let bytes = postcard::to_stdvec(&receipt()).unwrap();
    let status = postcard::to_stdvec(&ReceiptStatus::Checkpoint).unwrap();
    let at = bytes.len() - 34;
    assert_eq!(bytes[at..=at], status);
    let mut unknown = bytes;
    unknown[at] = 100;
    assert!(postcard::from_bytes::<Receipt>(&unknown).is_err());
}
