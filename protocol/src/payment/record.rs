//! Checks a voucher that somebody wrote down with all that it claims, such as a test vector or a piece of evidence.
//!
//! Everything is computed from the inputs; what the record states of ids and digests is compared, never copied. This
//! part knows no text format: the caller parses, and hands over what it could read.

use super::{
    Address, Amount, ChannelDescriptor, ChannelId, Hash, Signature, SignatureError, VoucherDomain, VoucherError,
};

/// A voucher with all that was written down about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VoucherRecord<'a> {
    /// What the channel's id is computed from.
    pub descriptor: ChannelDescriptor,
    /// The chain that the voucher is presented for.
    pub chain_id: u64,
    /// The escrow that the voucher is presented for.
    pub escrow: Address,
    /// The channel's id as stated.
    pub channel_id: ChannelId,
    /// The cumulative amount in base units.
    pub amount: Amount,
    /// The signature's bytes, in whatever form.
    pub signature: &'a [u8],
    /// Whose signature it is said to be.
    pub expected_signer: Option<Address>,
    /// The digest of the close authorisation as stated.
    pub close_digest: Option<Hash>,
    /// The signature of the close authorisation, when there is one.
    pub close_signature: Option<&'a [u8]>,
}

/// Why a record is not valid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The stated id is not the one of the inputs.
    #[error("the channel id is {computed}, not the stated {stated}")]
    ChannelId {
        /// As computed from the descriptor.
        computed: ChannelId,
        /// As stated.
        stated: ChannelId,
    },
    /// The voucher is presented for another chain or escrow than the channel's.
    #[error("the voucher's chain or escrow is not the channel's")]
    OtherEscrow,
    /// The voucher is not one.
    #[error("{0}")]
    Voucher(#[from] VoucherError),
    /// It is said to be of somebody who does not sign for this channel.
    #[error("the channel's signer is {signer}, not the stated {stated}")]
    StatedSigner {
        /// Who signs for the channel.
        signer: Address,
        /// Who is said to.
        stated: Address,
    },
    /// The voucher is valid, but the close authorisation is not.
    #[error("close authorization: {0}")]
    Close(VoucherError),
    /// The stated digest of the close authorisation is not the one of the inputs.
    #[error("the close digest is {computed}, not the stated {stated}")]
    CloseDigest {
        /// As computed.
        computed: Hash,
        /// As stated.
        stated: Hash,
    },
}

/// What came out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VoucherVerdict {
    /// The channel's id, computed.
    pub channel_id: ChannelId,
    /// The voucher's digest, computed; `None` when the amount does not fit the protocol.
    pub digest: Option<Hash>,
    /// Who signed the digest; `None` when nobody can have, or there is no digest.
    pub signer: Option<Address>,
    /// Why the record is not valid; `None` when it is.
    pub error: Option<RecordError>,
}

impl VoucherVerdict {
    /// Whether the record is valid.
    pub const fn valid(&self) -> bool {
        self.error.is_none()
    }
}

/// Checks a record: id, chain, escrow, amount, signature, and the close authorisation when there is one.
pub fn check_record(record: &VoucherRecord<'_>) -> VoucherVerdict {
    let channel_id = record.descriptor.id();
    let domain = VoucherDomain::new(record.descriptor.protocol, record.chain_id, record.escrow);
    let digest = domain.voucher_digest(&channel_id, record.amount);
    let recovered = digest.and_then(|digest| Ok(Signature::parse(record.signature)?.recover(&digest)?));
    let error = check_claims(record, channel_id)
        .and_then(|()| expect_signer(record, recovered))
        .and_then(|()| check_close(record, &domain, channel_id))
        .err();
    VoucherVerdict { channel_id, digest: digest.ok(), signer: recovered.ok(), error }
}

fn check_claims(record: &VoucherRecord<'_>, computed: ChannelId) -> Result<(), RecordError> {
    if record.channel_id != computed {
        return Err(RecordError::ChannelId { computed, stated: record.channel_id });
    }
    if (record.chain_id, record.escrow) != (record.descriptor.chain_id, record.descriptor.escrow) {
        return Err(RecordError::OtherEscrow);
    }
    Ok(())
}

fn expect_signer(record: &VoucherRecord<'_>, recovered: Result<Address, VoucherError>) -> Result<(), RecordError> {
    let signer = record.descriptor.signer();
    if recovered? != signer {
        return Err(VoucherError::from(SignatureError::WrongSigner { expected: signer }).into());
    }
    match record.expected_signer {
        Some(stated) if stated != signer => Err(RecordError::StatedSigner { signer, stated }),
        _ => Ok(()),
    }
}

fn check_close(record: &VoucherRecord<'_>, domain: &VoucherDomain, channel_id: ChannelId) -> Result<(), RecordError> {
    if record.close_digest.is_none() && record.close_signature.is_none() {
        return Ok(());
    }
    let computed = domain.close_digest(&channel_id, record.amount).map_err(RecordError::Close)?;
    if let Some(stated) = record.close_digest.filter(|stated| *stated != computed) {
        return Err(RecordError::CloseDigest { computed, stated });
    }
    let Some(bytes) = record.close_signature else { return Ok(()) };
    let expected = record.descriptor.signer();
    let signer = Signature::parse(bytes).and_then(|signature| signature.recover(&computed));
    match signer {
        Ok(signer) if signer == expected => Ok(()),
        Ok(_) => Err(RecordError::Close(SignatureError::WrongSigner { expected }.into())),
        Err(error) => Err(RecordError::Close(error.into())),
    }
}
