//! Keys encrypted with a passphrase: version 3 of the Ethereum keystore, also called Web3 Secret Storage, which wallets and
//! nodes of that world read and write.
//!
//! The passphrase is stretched by scrypt (or, in files of others, PBKDF2-HMAC-SHA256); one half of what comes out
//! encrypts the key with AES-128-CTR, the other authenticates the ciphertext by a keccak256. Files are not this module's
//! business: it makes and reads their text. What is secret is wiped from memory when it is no longer needed, and is in no error.

use aes::Aes128;
use ctr::Ctr128BE;
use ctr::cipher::{KeyIvInit, StreamCipher};
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use subtle::ConstantTimeEq;
use tollway_protocol::payment::{Address, SecretKey, SecretKeyError, keccak256};
use zeroize::Zeroizing;

/// The cost of new keystores: 2^18 rounds over 128 × 8 bytes take 256 MiB and most of a second, once for each start.
const LOG_N: u8 = 18;
const R: u32 = 8;
const P: u32 = 1;
/// What scrypt may take for a file of somebody else, in bytes: four times what new ones take. A file must not be able to
/// use up the machine.
const MAX_SCRYPT_BYTES: u64 = 1 << 30;
/// Passes over the memory, and rounds of PBKDF2, for a file of somebody else: seconds.
const MAX_P: u32 = 16;
const MAX_ROUNDS: u32 = 10_000_000;
/// The longest keystore, in bytes: real ones have about 500.
pub const MAX_KEYSTORE_BYTES: usize = 16 * 1024;

/// Why a keystore was not read, or not made. Nothing secret is in it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeystoreError {
    /// It is no JSON of this form.
    #[error("this is no keystore of version 3: {0}")]
    Malformed(String),
    /// It is of another version, or uses another cipher or key derivation.
    #[error("the keystore's {what} {found:?} is not supported; {supported} is")]
    Unsupported {
        /// What it is about.
        what: &'static str,
        /// What the file has.
        found: String,
        /// What there is.
        supported: &'static str,
    },
    /// Its key derivation would take more than is given to it.
    #[error("the keystore asks for a key derivation that is too dear or none: {0}")]
    Cost(&'static str),
    /// The passphrase is another one, or the file was damaged.
    #[error("the passphrase is wrong, or the keystore is damaged")]
    WrongPassphrase,
    /// It holds no key.
    #[error("what the keystore holds is no key: {0}")]
    NotAKey(#[from] SecretKeyError),
    /// The address beside the key is another key's.
    #[error("the keystore says that its key is that of {stated}, and it is that of {found}")]
    OtherAddress {
        /// What the file says.
        stated: Address,
        /// Whose key it is.
        found: Address,
    },
    /// The system has no randomness.
    #[error("the system gives no randomness: {0}")]
    NoRandomness(String),
}

#[derive(Serialize, Deserialize)]
struct Keystore {
    version: u32,
    #[serde(default)]
    id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    address: Option<String>,
    // Some writers have it in capitals.
    #[serde(alias = "Crypto")]
    crypto: Crypto,
}

#[derive(Serialize, Deserialize)]
struct Crypto {
    cipher: String,
    cipherparams: CipherParams,
    ciphertext: String,
    kdf: String,
    kdfparams: KdfParams,
    mac: String,
}

#[derive(Serialize, Deserialize)]
struct CipherParams {
    iv: String,
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum KdfParams {
    Scrypt { dklen: u32, n: u64, p: u32, r: u32, salt: String },
    Pbkdf2 { c: u32, dklen: u32, prf: String, salt: String },
}

/// Encrypts a key with a passphrase. Each time the text is another one.
///
/// It takes about a second and 256 MiB: from an async task, use a blocking thread.
///
/// # Errors
/// When the system has no randomness.
pub fn encrypt(key: &SecretKey, passphrase: &[u8]) -> Result<String, KeystoreError> {
    encrypt_at(key, passphrase, LOG_N)
}

fn encrypt_at(key: &SecretKey, passphrase: &[u8], log_n: u8) -> Result<String, KeystoreError> {
    let mut random = [0; 64];
    getrandom::fill(&mut random).map_err(|error| KeystoreError::NoRandomness(error.to_string()))?;
    let (salt, rest) = random.split_at(32);
    let (iv, id) = rest.split_at(16);
    let kdfparams = KdfParams::Scrypt { dklen: 32, n: 1 << log_n, p: P, r: R, salt: hex(salt) };
    let derived = kdfparams.derive("scrypt", passphrase)?;
    let mut secret = Zeroizing::new(key.to_bytes());
    let (cipher_key, mac_key) = derived.split_at(16);
    apply_cipher(cipher_key, iv, &mut *secret)?;
    let mac = keccak256(&[mac_key, secret.as_slice()].concat());
    let crypto = Crypto {
        cipher: "aes-128-ctr".to_owned(),
        cipherparams: CipherParams { iv: hex(iv) },
        ciphertext: hex(secret.as_slice()),
        kdf: "scrypt".to_owned(),
        kdfparams,
        mac: hex(mac.as_bytes()),
    };
    let address = Some(hex(&key.address().0));
    let keystore = Keystore { version: 3, id: random_uuid(id), address, crypto };
    serde_json::to_string_pretty(&keystore).map_err(|error| KeystoreError::Malformed(error.to_string()))
}

/// Decrypts a keystore.
///
/// It takes as long as the file asks for, seconds at most: from an async task, use a blocking thread.
///
/// # Errors
/// When the text is no keystore of version 3, asks for too much, or the passphrase is wrong.
pub fn decrypt(text: &str, passphrase: &[u8]) -> Result<SecretKey, KeystoreError> {
    let Keystore { version, crypto, address, .. } = parse(text)?;
    let unsupported = |what, found: &str, supported| {
        Err(KeystoreError::Unsupported { what, found: found.chars().take(64).collect(), supported })
    };
    if version != 3 {
        return unsupported("version", &version.to_string(), "3");
    }
    if crypto.cipher != "aes-128-ctr" {
        return unsupported("cipher", &crypto.cipher, "aes-128-ctr");
    }
    let derived = crypto.kdfparams.derive(&crypto.kdf, passphrase)?;
    let (cipher_key, mac_key) = derived.split_at(16);
    let ciphertext: [u8; 32] = unhex(&crypto.ciphertext)?;
    let mac: [u8; 32] = unhex(&crypto.mac)?;
    let computed = keccak256(&[mac_key, &ciphertext].concat());
    if !bool::from(computed.as_bytes().as_slice().ct_eq(&mac)) {
        return Err(KeystoreError::WrongPassphrase);
    }
    let iv: [u8; 16] = unhex(&crypto.cipherparams.iv)?;
    let mut secret = Zeroizing::new(ciphertext);
    apply_cipher(cipher_key, &iv, &mut *secret)?;
    let key = SecretKey::from_bytes(*secret)?;
    match address.as_deref().map(unhex).transpose()?.map(Address) {
        Some(stated) if stated != key.address() => Err(KeystoreError::OtherAddress { stated, found: key.address() }),
        _ => Ok(key),
    }
}

/// The address that a keystore states beside its key, without a passphrase. Nothing proves it.
///
/// # Errors
/// When the text is no keystore.
pub fn stated_address(text: &str) -> Result<Option<Address>, KeystoreError> {
    parse(text)?.address.as_deref().map(|hex| unhex(hex).map(Address)).transpose()
}

fn parse(text: &str) -> Result<Keystore, KeystoreError> {
    if text.len() > MAX_KEYSTORE_BYTES {
        return Err(KeystoreError::Malformed(format!("it is longer than {MAX_KEYSTORE_BYTES} bytes")));
    }
    // The position of the error, never what stands there.
    serde_json::from_str(text)
        .map_err(|error| KeystoreError::Malformed(format!("line {}, column {}", error.line(), error.column())))
}

impl KdfParams {
    fn derive(&self, kdf: &str, passphrase: &[u8]) -> Result<Zeroizing<[u8; 32]>, KeystoreError> {
        let mut derived = Zeroizing::new([0; 32]);
        match (kdf, self) {
            ("scrypt", &KdfParams::Scrypt { dklen: 32, n, p, r, ref salt }) => {
                let bytes = n.checked_mul(u64::from(r)).and_then(|blocks| blocks.checked_mul(128));
                if !n.is_power_of_two() || p > MAX_P || bytes.is_none_or(|bytes| bytes > MAX_SCRYPT_BYTES) {
                    return Err(KeystoreError::Cost("scrypt"));
                }
                // A power of two of 64 bits.
                let log_n = u8::try_from(n.trailing_zeros()).unwrap_or(u8::MAX);
                let params = scrypt::Params::new(log_n, r, p).map_err(|_| KeystoreError::Cost("scrypt"))?;
                scrypt::scrypt(passphrase, &unhex_any(salt)?, &params, &mut *derived)
                    .map_err(|_| KeystoreError::Cost("scrypt"))?;
            }
            ("pbkdf2", &KdfParams::Pbkdf2 { dklen: 32, c, ref prf, ref salt }) if prf == "hmac-sha256" => {
                if c == 0 || c > MAX_ROUNDS {
                    return Err(KeystoreError::Cost("pbkdf2"));
                }
                pbkdf2::pbkdf2_hmac::<Sha256>(passphrase, &unhex_any(salt)?, c, &mut *derived);
            }
            _ => {
                return Err(KeystoreError::Unsupported {
                    what: "key derivation",
                    found: kdf.chars().take(64).collect(),
                    supported: "scrypt or pbkdf2 with hmac-sha256, for 32 bytes,",
                });
            }
        }
        Ok(derived)
    }
}

fn apply_cipher(key: &[u8], iv: &[u8], data: &mut [u8]) -> Result<(), KeystoreError> {
    let cipher = Ctr128BE::<Aes128>::new_from_slices(key, iv);
    cipher.map_err(|_| KeystoreError::Malformed("the lengths of a key".to_owned()))?.apply_keystream(data);
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex_any(text: &str) -> Result<Vec<u8>, KeystoreError> {
    let wrong = || KeystoreError::Malformed("a field is not hexadecimal, or too long".to_owned());
    let digits = text.strip_prefix("0x").unwrap_or(text).as_bytes();
    let (pairs, rest) = digits.as_chunks::<2>();
    if !rest.is_empty() || pairs.len() > 256 {
        return Err(wrong());
    }
    let digit = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
    pairs.iter().map(|&[high, low]| Some(digit(high)? * 16 + digit(low)?)).collect::<Option<_>>().ok_or_else(wrong)
}

fn unhex<const N: usize>(text: &str) -> Result<[u8; N], KeystoreError> {
    let wrong = |_| KeystoreError::Malformed(format!("a field has not {N} bytes"));
    unhex_any(text)?.try_into().map_err(wrong)
}

/// A version 4 UUID, which is all that the format wants of an id.
fn random_uuid(random: &[u8]) -> String {
    let digits = hex(random);
    let part = |from: usize, to: usize| digits.get(from..to).unwrap_or_default();
    format!("{}-{}-4{}-a{}-{}", part(0, 8), part(8, 12), part(13, 16), part(17, 20), part(20, 32))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The test vectors of the definition of Web3 Secret Storage; both hold the same key.
    const SCRYPT: &str = r#"{"crypto":{"cipher":"aes-128-ctr","cipherparams":{"iv":"83dbcc02d8ccb40e466191a123791e0e"},
        "ciphertext":"d172bf743a674da9cdad04534d56926ef8358534d458fffccd4e6ad2fbde479c","kdf":"scrypt",
        "kdfparams":{"dklen":32,"n":262144,"p":8,"r":1,
        "salt":"ab0c7876052600dd703518d6fc3fe8984592145b591fc8fb5c6d43190334ba19"},
        "mac":"2103ac29920d71da29f15d75b4a16dbe95cfd7ff8faea1056c33131d846e3097"},
        "id":"3198bc9c-6672-5ab3-d995-4942343ae5b6","version":3}"#;
    const PBKDF2: &str = r#"{"crypto":{"cipher":"aes-128-ctr","cipherparams":{"iv":"6087dab2f9fdbbfaddc31a909735c1e6"},
        "ciphertext":"5318b4d5bcd28de64ee5559e671353e16f075ecae9f99c7a79a38af5f869aa46","kdf":"pbkdf2",
        "kdfparams":{"c":262144,"dklen":32,"prf":"hmac-sha256",
        "salt":"ae3cd4e7013836a3df6bd7241b12db061dbe2c6785853cce422d148a624ce0bd"},
        "mac":"517ead924a9d0dc3124507e3393d175ce3ff7c1e96529c6c555ce9e51205e9b2"},
        "id":"3198bc9c-6672-5ab3-d995-4942343ae5b6","version":3}"#;
    const SECRET: &str = "7a28b5ba57c53603b0b07b56bba752f7784bf506fa95edc395f5cf6c7514fe9d";

    #[test]
    fn the_published_vectors_are_read() {
        for text in [SCRYPT, PBKDF2] {
            assert_eq!(hex(&decrypt(text, b"testpassword").unwrap().to_bytes()), SECRET);
            assert!(matches!(decrypt(text, b"testpasswore"), Err(KeystoreError::WrongPassphrase)));
        }
        assert_eq!(stated_address(SCRYPT).unwrap(), None);
    }

    #[test]
    fn what_is_written_is_read_and_is_never_the_same_twice() {
        let key = SecretKey::from_bytes([7; 32]).unwrap();
        let [one, other] = [0, 1].map(|_| encrypt_at(&key, "ü passphrase".as_bytes(), 4).unwrap());
        assert_ne!(one, other);
        assert!(!one.contains(&"07".repeat(8)));
        assert_eq!(stated_address(&one).unwrap(), Some(key.address()));
        for text in [one, other] {
            assert_eq!(decrypt(&text, "ü passphrase".as_bytes()).unwrap().to_bytes(), [7; 32]);
            assert!(matches!(decrypt(&text, b""), Err(KeystoreError::WrongPassphrase)));
        }
    }

    #[test]
    fn what_is_damaged_foreign_or_too_dear_is_refused_by_name() {
        // A cheap one: it is derived from again and again.
        let key = SecretKey::from_bytes([7; 32]).unwrap();
        let good = encrypt_at(&key, b"testpassword", 4).unwrap();
        let Keystore { crypto, .. } = parse(&good).unwrap();
        let refusal = |from: &str, to: &str| {
            assert!(good.contains(from), "{from} in {good}");
            decrypt(&good.replacen(from, to, 1), b"testpassword").unwrap_err()
        };
        let flipped = |digits: &str| {
            let other = if digits.starts_with('0') { "1" } else { "0" };
            refusal(digits, &format!("{other}{}", &digits[1..]))
        };
        assert!(matches!(flipped(&crypto.ciphertext), KeystoreError::WrongPassphrase));
        assert!(matches!(flipped(&crypto.mac), KeystoreError::WrongPassphrase));
        assert!(matches!(refusal("\"version\": 3", "\"version\": 1"), KeystoreError::Unsupported { .. }));
        assert!(matches!(refusal("aes-128-ctr", "aes-256-gcm"), KeystoreError::Unsupported { .. }));
        assert!(matches!(refusal("\"kdf\": \"scrypt\"", "\"kdf\": \"none\""), KeystoreError::Unsupported { .. }));
        assert!(matches!(refusal("\"dklen\": 32", "\"dklen\": 16"), KeystoreError::Unsupported { .. }));
        assert!(matches!(refusal("\"n\": 16", "\"n\": 17"), KeystoreError::Cost(_)));
        assert!(matches!(refusal("\"n\": 16", "\"n\": 18014398509481984"), KeystoreError::Cost(_)));
        assert!(matches!(refusal("\"p\": 1", "\"p\": 17"), KeystoreError::Cost(_)));
        assert!(matches!(refusal(&crypto.mac, &crypto.mac[2..]), KeystoreError::Malformed(_)));
        assert!(matches!(refusal(&crypto.mac, "é"), KeystoreError::Malformed(_)));
        assert!(matches!(refusal("\"mac\"", "\"nac\""), KeystoreError::Malformed(_)));
        let address = hex(&key.address().0);
        assert!(matches!(refusal(&address, &"11".repeat(20)), KeystoreError::OtherAddress { .. }));
        let long = " ".repeat(MAX_KEYSTORE_BYTES + 1);
        for text in ["", "{", "7", &long] {
            assert!(matches!(decrypt(text, b""), Err(KeystoreError::Malformed(_))), "{}", text.len());
        }
    }
}
