//! `tollway voucher check`: verifies vouchers that are written down in JSON.
//!
//! The format is that of `protocol/vectors/vouchers.json`. Ids, digests and signers are computed, never copied; of what
//! the record states, the channel id, the signer and the close digest are compared. Unknown fields are ignored. A record
//! that cannot be read is a line like any other, with the reason.
//!
//! The records are first cut out as raw text and then parsed one by one, so that a number which is out of range or a
//! broken escape in one of them spoils no other.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::Path;
use std::str::FromStr;

use serde::Serialize;
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Map, Value};
use tollway_protocol::payment::{
    Address, Amount, ChannelDescriptor, ChannelId, Hash, VoucherDomain, VoucherProtocol, VoucherRecord, check_record,
};

/// Why a file cannot be checked at all.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CheckError {
    /// The file cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// What the system says.
        source: io::Error,
    },
    /// The file is not JSON with a list of records.
    #[error("{path} is not a JSON object with a list \"vectors\": {source}")]
    Json {
        /// The file.
        path: String,
        /// Where and why.
        source: serde_json::Error,
    },
    /// There are no records.
    #[error("{path} has no list \"vectors\" at its top")]
    NoVectors {
        /// The file.
        path: String,
    },
    /// The result cannot be written.
    #[error("cannot write the result: {0}")]
    Write(#[from] io::Error),
}

/// A JSON object whose values stay text. A map, since a derived struct would take a list for an object.
type Raw = BTreeMap<String, Box<RawValue>>;

/// What is printed for one record.
#[derive(Debug, Serialize)]
struct Line {
    id: Option<Box<RawValue>>,
    valid: bool,
    signer: Option<Address>,
    channel_id: Option<ChannelId>,
    digest: Option<Hash>,
    reason: Option<String>,
}

/// Checks each record of `vectors` in `file` and writes one JSON line for each.
///
/// # Errors
/// When the file cannot be read, is not JSON or has no `vectors`, or the output cannot be written. A record that is
/// not valid is no error.
pub(crate) fn check(file: &Path, out: &mut impl Write) -> Result<(), CheckError> {
    let path = || file.display().to_string();
    let bytes = std::fs::read(file).map_err(|source| CheckError::Read { path: path(), source })?;
    let json = |source| CheckError::Json { path: path(), source };
    let file: Raw = serde_json::from_slice(&bytes).map_err(json)?;
    let vectors = file.get("vectors").ok_or_else(|| CheckError::NoVectors { path: path() })?;
    for record in serde_json::from_str::<Vec<Box<RawValue>>>(vectors.get()).map_err(json)? {
        serde_json::to_writer(&mut *out, &check_one(&record)).map_err(io::Error::from)?;
        out.write_all(b"\n")?;
    }
    out.flush()?;
    Ok(())
}

fn check_one(record: &RawValue) -> Line {
    let id = read_id(record);
    let mut line = Line { id, valid: false, signer: None, channel_id: None, digest: None, reason: None };
    let parsed: Result<Value, _> = serde_json::from_str(record.get());
    match parsed.map_err(|error| error.to_string()).and_then(|record| verify(&record, &mut line)) {
        Ok(()) => line.valid = true,
        Err(reason) => line.reason = Some(reason),
    }
    line
}

/// The id as it is written, so that a number keeps all its digits; on one line.
fn read_id(record: &RawValue) -> Option<Box<RawValue>> {
    let id = serde_json::from_str::<Raw>(record.get()).ok()?.remove("id")?;
    if !id.get().contains(['\n', '\r']) {
        return Some(id);
    }
    let parsed: Value = serde_json::from_str(id.get()).ok()?;
    to_raw_value(&parsed).ok()
}

/// Fills in what can be computed, as far as the record can be read, and returns why the record is not valid.
fn verify(record: &Value, line: &mut Line) -> Result<(), String> {
    let fields = Fields { object: record.as_object().ok_or("a record is an object")?, within: "" };
    let descriptor = read_descriptor(&fields)?;
    line.channel_id = Some(descriptor.id());
    let (chain_id, escrow) = (fields.number("chainId")?, fields.text("escrow")?);
    let amount: Amount = fields.text("cumulativeAmount")?;
    let domain = VoucherDomain::new(descriptor.protocol, chain_id, escrow);
    line.digest = domain.voucher_digest(&descriptor.id(), amount).ok();

    let signature = fields.bytes("signature")?.ok_or("signature is missing")?;
    let close_signature = fields.bytes("closeSignature")?;
    let verdict = check_record(&VoucherRecord {
        descriptor,
        chain_id,
        escrow,
        channel_id: fields.text("channelId")?,
        amount,
        signature: &signature,
        expected_signer: fields.optional("expectedSigner")?,
        close_digest: fields.optional("closeDigest")?,
        close_signature: close_signature.as_deref(),
    });
    line.signer = verdict.signer;
    verdict.error.map_or(Ok(()), |error| Err(error.to_string()))
}

fn read_descriptor(fields: &Fields<'_>) -> Result<ChannelDescriptor, String> {
    let protocol: VoucherProtocol = fields.text("sessionProtocol")?;
    let inputs = fields.object("channelIdInputs")?;
    let is_v2 = protocol == VoucherProtocol::V2;
    Ok(ChannelDescriptor {
        protocol,
        payer: inputs.text("payer")?,
        payee: inputs.text("payee")?,
        operator: if is_v2 { inputs.text("operator")? } else { Address::ZERO },
        token: inputs.text("token")?,
        salt: inputs.text("salt")?,
        authorized_signer: inputs.text("authorizedSigner")?,
        expiring_nonce_hash: if is_v2 { inputs.text("expiringNonceHash")? } else { Hash::ZERO },
        escrow: inputs.text("escrow")?,
        chain_id: inputs.number("chainId")?,
    })
}

/// Reads the fields of an object and names in its errors the one that is wrong.
struct Fields<'a> {
    object: &'a Map<String, Value>,
    within: &'static str,
}

impl<'a> Fields<'a> {
    /// A field that is there and not null.
    fn present(&self, name: &str) -> Option<&'a Value> {
        self.object.get(name).filter(|value| !value.is_null())
    }

    fn required(&self, name: &str) -> Result<&'a Value, String> {
        self.present(name).ok_or_else(|| format!("{}{name} is missing", self.within))
    }

    fn object(&self, name: &str) -> Result<Fields<'a>, String> {
        let object = self.required(name)?.as_object();
        let object = object.ok_or_else(|| format!("{}{name} must be an object", self.within))?;
        Ok(Fields { object, within: "channelIdInputs." })
    }

    fn number(&self, name: &str) -> Result<u64, String> {
        let number = self.required(name)?.as_u64();
        number.ok_or_else(|| format!("{}{name} must be a whole number below 2^64", self.within))
    }

    fn text<T: FromStr<Err: std::fmt::Display>>(&self, name: &str) -> Result<T, String> {
        self.parse(name, self.required(name)?)
    }

    fn optional<T: FromStr<Err: std::fmt::Display>>(&self, name: &str) -> Result<Option<T>, String> {
        self.present(name).map(|value| self.parse(name, value)).transpose()
    }

    fn parse<T: FromStr<Err: std::fmt::Display>>(&self, name: &str, value: &Value) -> Result<T, String> {
        let text = value.as_str().ok_or_else(|| format!("{}{name} must be a string", self.within))?;
        text.parse().map_err(|error| format!("{}{name}: {error}", self.within))
    }

    /// Hex of any length; whether the length suits is for the signature to say.
    fn bytes(&self, name: &str) -> Result<Option<Vec<u8>>, String> {
        let Some(value) = self.present(name) else { return Ok(None) };
        let text = value.as_str().ok_or_else(|| format!("{name} must be a string"))?;
        let digits =
            text.strip_prefix("0x").ok_or_else(|| format!("{name}: expected 0x in front of the hex digits"))?;
        let (pairs, odd) = digits.as_bytes().as_chunks::<2>();
        if !odd.is_empty() {
            return Err(format!("{name}: an odd number of hex digits"));
        }
        let nibble = |digit: u8| char::from(digit).to_digit(16);
        let byte = |&[high, low]: &[u8; 2]| u8::try_from(nibble(high)? << 4 | nibble(low)?).ok();
        let bytes: Option<Vec<u8>> = pairs.iter().map(byte).collect();
        bytes.map(Some).ok_or_else(|| format!("{name}: not a hex digit"))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    const VECTORS: &str = include_str!("../../protocol/vectors/vouchers.json");

    fn run(file: &str) -> Result<Vec<Value>, CheckError> {
        let mut input = tempfile::NamedTempFile::new().unwrap();
        input.write_all(file.as_bytes()).unwrap();
        let mut out = Vec::new();
        check(input.path(), &mut out)?;
        Ok(out
            .split(|byte| *byte == b'\n')
            .filter(|l| !l.is_empty())
            .map(|l| serde_json::from_slice(l).unwrap())
            .collect())
    }

    fn vectors() -> Vec<Value> {
        serde_json::from_str::<Value>(VECTORS).unwrap()["vectors"].as_array().unwrap().clone()
    }

    fn vector(id: u64) -> Value {
        vectors().into_iter().find(|vector| vector["id"] == id).unwrap()
    }

    fn line(record: Value) -> Value {
        run(&json!({ "vectors": [record] }).to_string()).unwrap().remove(0)
    }

    #[test]
    fn each_vector_is_answered_as_it_expects() {
        let lines = run(VECTORS).unwrap();
        assert_eq!(lines.len(), vectors().len());
        for (line, vector) in lines.iter().zip(vectors()) {
            let valid = vector["expect"] != "reject";
            assert_eq!(line["id"], vector["id"]);
            assert_eq!(line["valid"], valid, "{line}");
            assert_eq!(line["reason"].is_null(), valid, "{line}");
            assert_eq!(line["channel_id"], vector["channelId"]);
            assert_eq!(line["digest"], vector["digest"]);
            if valid {
                assert_eq!(line["signer"], vector["expectedSigner"]);
            }
            let keys: Vec<&String> = line.as_object().unwrap().keys().collect();
            assert_eq!(keys.len(), 6);
        }
    }

    #[test]
    fn stated_ids_and_digests_are_never_copied() {
        let good = vector(1);
        let mut bad = good.clone();
        bad["channelId"] = json!(format!("0x{}", "11".repeat(32)));
        bad["digest"] = json!("0x00");
        let line = line(bad);
        assert_eq!(line["valid"], false);
        assert_eq!(line["channel_id"], good["channelId"]);
        assert_eq!(line["digest"], good["digest"]);
        assert!(line["reason"].as_str().unwrap().contains("channel id"));
    }

    #[test]
    fn each_missing_field_is_named_and_aborts_nothing() {
        for field in
            ["sessionProtocol", "chainId", "escrow", "channelIdInputs", "channelId", "cumulativeAmount", "signature"]
        {
            let mut bad = vector(8);
            bad.as_object_mut().unwrap().remove(field);
            let file = json!({ "vectors": [bad, vector(1)] }).to_string();
            let lines = run(&file).unwrap();
            assert_eq!(lines[0]["id"], 8);
            assert_eq!(lines[0]["valid"], false);
            assert!(lines[0]["reason"].as_str().unwrap().contains(field), "{}", lines[0]);
            assert_eq!(lines[1]["valid"], true);
        }
        for field in vector(8)["channelIdInputs"].as_object().unwrap().keys() {
            let mut bad = vector(8);
            bad["channelIdInputs"].as_object_mut().unwrap().remove(field);
            let line = line(bad);
            assert_eq!(line["valid"], false);
            assert!(line["reason"].as_str().unwrap().contains(field.as_str()), "{line}");
            assert!(line["channel_id"].is_null());
        }
    }

    #[test]
    fn malformed_values_are_invalid_with_a_reason() {
        let values = [json!(1), json!(1.5), json!("+1"), json!("1e3"), json!(""), json!(true), json!([]), json!({})];
        for amount in values {
            let mut bad = vector(2);
            bad["cumulativeAmount"] = amount;
            assert_eq!(line(bad)["valid"], false);
        }
        for (field, value) in [
            ("escrow", json!("0x00")),
            ("chainId", json!(-1)),
            ("chainId", json!("4217")),
            ("sessionProtocol", json!("v3")),
            ("expectedSigner", json!("0x12")),
            ("signature", json!("0x1")),
            ("signature", json!("0xzz")),
            ("signature", json!("éé")),
            ("signature", json!(7)),
            ("channelIdInputs", json!([])),
        ] {
            let mut bad = vector(2);
            bad[field] = value.clone();
            let line = line(bad);
            assert_eq!(line["valid"], false, "{field} {value}");
            assert!(line["reason"].is_string());
        }
        let mut short = vector(2);
        short["signature"] = json!("0x1234");
        let line = line(short);
        assert_eq!(line["digest"], vector(2)["digest"]);
        assert!(line["signer"].is_null() && line["reason"].as_str().unwrap().contains("65 bytes"));
    }

    #[test]
    fn a_record_that_is_no_object_is_a_line_too() {
        let lines = run(r#"{"vectors":[1,null,"x",[],{},{"id":{"a":1}}]}"#).unwrap();
        assert_eq!(lines.len(), 6);
        assert!(lines.iter().all(|line| line["valid"] == false && line["reason"].is_string()));
        assert!(lines[0]["id"].is_null());
        assert_eq!(lines[5]["id"], json!({ "a": 1 }));
    }

    #[test]
    fn a_record_that_no_parser_takes_spoils_no_other() {
        let deep = format!("{}{}", "[".repeat(500), "]".repeat(500));
        for broken in ["1e999", r#"{"id":5,"chainId":1e999}"#, r#"{"id":5,"note":"\ud800"}"#, &deep] {
            let lines = run(&format!(r#"{{"vectors":[{broken},{}]}}"#, vector(1))).unwrap();
            assert_eq!(lines.len(), 2);
            assert_eq!(lines[0]["valid"], false);
            assert!(lines[0]["reason"].is_string());
            assert!(lines[0]["id"] == 5 || lines[0]["id"].is_null());
            assert_eq!(lines[1]["valid"], true);
        }
    }

    #[test]
    fn an_id_is_echoed_digit_for_digit_and_on_one_line() {
        let mut out = Vec::new();
        let mut input = tempfile::NamedTempFile::new().unwrap();
        input.write_all(b"{\"vectors\":[{\"id\":123456789012345678901234567890},{\"id\":{\n\"a\":1}}]}").unwrap();
        check(input.path(), &mut out).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert_eq!(out.lines().count(), 2);
        assert!(out.contains(r#""id":123456789012345678901234567890,"#) && out.contains(r#""id":{"a":1},"#));
    }

    #[test]
    fn a_wrong_signer_chain_or_close_authorization_is_invalid() {
        let other = vector(2)["expectedSigner"].clone();
        let edits: [(u64, &str, Value); 6] = [
            (1, "expectedSigner", other),
            (1, "chainId", json!(1)),
            (1, "escrow", json!(format!("0x{}", "11".repeat(20)))),
            (31, "closeSignature", vector(31)["signature"].clone()),
            (31, "closeDigest", vector(31)["digest"].clone()),
            (1, "closeSignature", vector(31)["closeSignature"].clone()),
        ];
        for (id, field, value) in edits {
            let mut bad = vector(id);
            bad[field] = value;
            let line = line(bad);
            assert_eq!(line["valid"], false, "{id} {field}");
        }
        let mut unknown = vector(1);
        unknown["somethingElse"] = json!(1);
        assert_eq!(line(unknown)["valid"], true);
    }

    #[test]
    fn a_file_without_records_is_an_error() {
        assert!(matches!(run("not json"), Err(CheckError::Json { .. })));
        assert!(matches!(run("{}"), Err(CheckError::NoVectors { .. })));
        assert!(matches!(run(r#"{"vectors":{}}"#), Err(CheckError::Json { .. })));
        assert!(matches!(run("[[]]"), Err(CheckError::Json { .. })));
        let missing = check(Path::new("/nonexistent/file"), &mut Vec::new());
        assert!(matches!(missing, Err(CheckError::Read { .. })));
    }
}
