//! What a side shows over TLS and whom it trusts: [`Identity`], [`ClientTls`], [`ServerTls`]. TLS, QUIC and WebSocket
//! over TLS share them.
//!
//! TLS 1.3 alone, with the algorithms of ring; no session is resumed with early data, so nothing that spends money can
//! be replayed.

use std::io::{self, Write};
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use sha2::{Digest, Sha256};

use super::verify::{Trust, Verifier};
use super::{TlsError, TlsFailure};
use crate::conduit::endpoint::Fingerprint;

/// The protocol's name inside TLS. `[conduit.tls.alpn]`
pub const ALPN: &[u8] = b"tollway/1";

/// What the bytes that bind a signature to this conduit are exported under (RFC 8446, 7.5). `[conduit.tls.exporter]`
pub(crate) const EXPORTER_LABEL: &[u8] = b"EXPORTER-tollway";

/// Certificates beyond this many in a file are a mistake: a chain has two to four.
const MAX_CHAIN: usize = 16;

/// A certificate with its chain, and its key.
pub struct Identity {
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    /// No CA vouches for it: others must pin it.
    self_made: bool,
}

impl Clone for Identity {
    fn clone(&self) -> Self {
        Self { chain: self.chain.clone(), key: self.key.clone_key(), self_made: self.self_made }
    }
}

impl std::fmt::Debug for Identity {
    /// The key is never shown.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Identity").field("fingerprint", &self.fingerprint()).finish_non_exhaustive()
    }
}

impl Identity {
    /// Makes a certificate that signs itself, for these host names and addresses; whoever pins it looks at none of them.
    /// It has no end: a pinned certificate is trusted until it is replaced.
    ///
    /// # Errors
    /// When a name cannot stand in a certificate, or the system gives no random numbers.
    pub fn self_signed(names: &[&str]) -> Result<Self, TlsError> {
        Self::make(names).map(|(identity, _)| identity)
    }

    /// The identity, and certificate and key as PEM.
    fn make(names: &[&str]) -> Result<(Self, String), TlsError> {
        let failed = |error: rcgen::Error| TlsError::Config(format!("no certificate can be made: {error}"));
        let names = names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let mut params = rcgen::CertificateParams::new(names).map_err(failed)?;
        params.distinguished_name.push(rcgen::DnType::CommonName, "tollway");
        let key = rcgen::KeyPair::generate().map_err(failed)?;
        let certificate = params.self_signed(&key).map_err(failed)?;
        let pem = certificate.pem() + &key.serialize_pem();
        let key = PrivatePkcs8KeyDer::from(key.serialize_der());
        Ok((Self { chain: vec![certificate.der().clone()], key: key.into(), self_made: true }, pem))
    }

    /// Reads a chain (the own certificate first) and a key from PEM; one text may hold both.
    ///
    /// # Errors
    /// When one of them is not there or not PEM.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> Result<Self, TlsError> {
        let chain = certificates(chain)?;
        let key = PrivateKeyDer::from_pem_slice(key)
            .map_err(|error| TlsError::Config(format!("there is no private key in PEM: {error}")))?;
        Ok(Self { chain, key, self_made: false })
    }

    /// Reads the identity in a file, or makes one that signs itself and keeps it there, readable by its owner alone.
    ///
    /// # Errors
    /// When the file holds something else, others than its owner can read it, or it cannot be written.
    pub fn load_or_create(path: &Path) -> Result<Self, TlsError> {
        let failed = |what: &str, error: io::Error| {
            TlsError::Config(format!("cannot {what} the certificate in {}: {error}", path.display()))
        };
        match read_private(path) {
            Ok(pem) => {
                let found = Self::from_pem(&pem, &pem)
                    .map_err(|error| TlsError::Config(format!("{} holds no identity: {error}", path.display())))?;
                return Ok(Self { self_made: true, ..found });
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed("use", error)),
        }
        let (identity, pem) = Self::make(&["localhost"])?;
        write_private(path, &pem).map_err(|error| failed("write", error))?;
        Ok(identity)
    }

    /// The fingerprint of the own certificate, by which others may pin it.
    pub fn fingerprint(&self) -> Fingerprint {
        // An identity has at least one certificate.
        self.chain.first().map_or(Fingerprint([0; 32]), fingerprint)
    }
}

/// Writes a new file for its owner alone, which appears whole or not at all.
fn write_private(path: &Path, text: &str) -> io::Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push("~");
    // One that was cut off by a crash is of no use.
    let _ = std::fs::remove_file(&partial);
    let mut options = std::fs::OpenOptions::new();
    options.write(true).create_new(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    let mut file = options.open(&partial)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&partial, path)
}

/// Reads a file that must be its owner's alone.
fn read_private(path: &Path) -> io::Result<Vec<u8>> {
    #[cfg(unix)]
    {
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(path)?.permissions()) & 0o7777;
        if mode & 0o077 != 0 {
            let path = path.display();
            let text = format!("others can read it (mode {mode:04o}): run `chmod 600 {path}`");
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
    }
    std::fs::read(path)
}

/// The certificates in a PEM text, at least one.
///
/// # Errors
/// When there is none, or it is not PEM.
pub fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found = CertificateDer::pem_slice_iter(pem).take(MAX_CHAIN + 1).collect::<Result<Vec<_>, _>>();
    let found = found.map_err(|error| TlsError::Config(format!("this is not PEM: {error}")))?;
    match found.len() {
        0 => Err(TlsError::Config("there is no certificate in PEM".to_owned())),
        1..=MAX_CHAIN => Ok(found),
        _ => Err(TlsError::Config(format!("more than {MAX_CHAIN} certificates"))),
    }
}

/// The SHA-256 of a certificate.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> Fingerprint {
    Fingerprint(Sha256::digest(certificate.as_ref()).into())
}

/// Whom a client trusts, and what it shows. Without anything: the CAs of this system, and no certificate.
#[derive(Debug, Clone, Default)]
pub struct ClientTls {
    roots: Option<Vec<CertificateDer<'static>>>,
    identity: Option<Identity>,
}

impl ClientTls {
    /// Trusts these CAs and not those of the system. A pin in a URL goes before both.
    #[must_use]
    pub fn with_roots(mut self, roots: Vec<CertificateDer<'static>>) -> Self {
        self.roots = Some(roots);
        self
    }

    /// Shows this certificate to a listener that asks for one.
    #[must_use]
    pub fn with_identity(mut self, identity: Identity) -> Self {
        self.identity = Some(identity);
        self
    }

    /// As rustls has it, for a peer with this pin or one that a CA vouches for. What is wrong with its certificate is left
    /// in `failure`.
    pub(crate) fn config(
        &self,
        pin: Option<Fingerprint>,
        alpn: &[u8],
        failure: TlsFailure,
    ) -> Result<ClientConfig, TlsError> {
        let provider = provider();
        let algorithms = provider.signature_verification_algorithms;
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| TlsError::Config(error.to_string()))?
            .dangerous();
        let trust = match pin {
            Some(pin) => Trust::Pin(pin),
            None => {
                let roots = match &self.roots {
                    Some(roots) => root_store(roots)?,
                    None => system_roots()?,
                };
                let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider).build();
                Trust::Ca(verifier.map_err(|error| TlsError::Config(error.to_string()))?)
            }
        };
        let builder = builder.with_custom_certificate_verifier(Arc::new(Verifier { trust, failure, algorithms }));
        let mut config = match &self.identity {
            None => builder.with_no_client_auth(),
            Some(Identity { chain, key, .. }) => builder
                .with_client_auth_cert(chain.clone(), key.clone_key())
                .map_err(|error| TlsError::Config(format!("the client certificate cannot be used: {error}")))?,
        };
        config.alpn_protocols = vec![alpn.to_vec()];
        Ok(config)
    }
}

/// What a listener shows, and which clients it takes.
#[derive(Debug, Clone)]
pub struct ServerTls {
    identity: Identity,
    client_roots: Option<Vec<CertificateDer<'static>>>,
}

impl ServerTls {
    /// Shows this certificate and takes every client.
    pub fn new(identity: Identity) -> Self {
        Self { identity, client_roots: None }
    }

    /// Takes only clients with a certificate that one of these CAs has issued (mutual TLS).
    #[must_use]
    pub fn with_client_roots(mut self, roots: Vec<CertificateDer<'static>>) -> Self {
        self.client_roots = Some(roots);
        self
    }

    /// The certificate that is shown, for others to pin.
    pub fn fingerprint(&self) -> Fingerprint {
        self.identity.fingerprint()
    }

    /// What clients must pin, if nobody but the certificate itself vouches for it.
    pub fn pin(&self) -> Option<Fingerprint> {
        self.identity.self_made.then(|| self.fingerprint())
    }

    /// As rustls has it.
    pub(crate) fn config(&self, alpn: &[u8]) -> Result<ServerConfig, TlsError> {
        let provider = provider();
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| TlsError::Config(error.to_string()))?;
        let builder = match &self.client_roots {
            None => builder.with_no_client_auth(),
            Some(roots) => {
                let verifier = WebPkiClientVerifier::builder_with_provider(root_store(roots)?, provider)
                    .build()
                    .map_err(|error| TlsError::Config(format!("the CAs of clients cannot be used: {error}")))?;
                builder.with_client_cert_verifier(verifier)
            }
        };
        let Identity { chain, key, .. } = &self.identity;
        let mut config = builder
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(|error| TlsError::Config(format!("the certificate cannot be used: {error}")))?;
        config.alpn_protocols = vec![alpn.to_vec()];
        // Nothing may be replayed. [conduit.tls.no-early-data]
        config.max_early_data_size = 0;
        Ok(config)
    }
}

fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: OnceLock<Arc<CryptoProvider>> = OnceLock::new();
    PROVIDER.get_or_init(|| Arc::new(rustls::crypto::ring::default_provider())).clone()
}

fn root_store(roots: &[CertificateDer<'static>]) -> Result<Arc<RootCertStore>, TlsError> {
    let mut store = RootCertStore::empty();
    for root in roots {
        store.add(root.clone()).map_err(|error| TlsError::Config(format!("a CA's certificate is bad: {error}")))?;
    }
    Ok(Arc::new(store))
}

/// The CAs of this system, read once: it takes milliseconds.
fn system_roots() -> Result<Arc<RootCertStore>, TlsError> {
    static ROOTS: OnceLock<Arc<RootCertStore>> = OnceLock::new();
    if let Some(roots) = ROOTS.get() {
        return Ok(roots.clone());
    }
    let found = rustls_native_certs::load_native_certs();
    let mut store = RootCertStore::empty();
    // Systems have old certificates that nobody can parse: they are skipped.
    let (added, _skipped) = store.add_parsable_certificates(found.certs);
    if added == 0 {
        let errors = found.errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        let text = format!("this system has no CAs ({errors}): install them, give one, or pin the peer's certificate");
        return Err(TlsError::Config(text));
    }
    Ok(ROOTS.get_or_init(|| Arc::new(store)).clone())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// Neither side of TLS, nor of QUIC on it, sends or takes anything before the handshake has ended.
    /// `[conduit.tls.no-early-data]`
    #[test]
    fn nothing_is_sent_or_taken_before_the_handshake_has_ended() {
        let identity = Identity::self_signed(&["localhost"]).unwrap();
        let server = ServerTls::new(identity).config(b"tollway/1").unwrap();
        assert_eq!((server.max_early_data_size, server.send_half_rtt_data), (0, false));
        let pin = Some(Fingerprint([0; 32]));
        let client = ClientTls::default().config(pin, b"tollway/1", TlsFailure::default()).unwrap();
        assert!(!client.enable_early_data);
    }

    #[test]
    fn an_identity_is_made_once_kept_to_its_owner_and_found_again() {
        let dir = std::env::temp_dir().join(format!("tollway-identity-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("tls.pem");
        let made = Identity::load_or_create(&path).unwrap();
        let found = Identity::load_or_create(&path).unwrap();
        assert_eq!((made.fingerprint(), &made.chain), (found.fingerprint(), &found.chain));
        assert_eq!(made.key, found.key);
        ServerTls::new(found).config(ALPN).unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
            let error = Identity::load_or_create(&path).unwrap_err().to_string();
            assert!(error.contains("chmod 600"), "{error}");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        std::fs::write(&path, "something else").unwrap();
        assert!(Identity::load_or_create(&path).is_err());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "something else");
        std::fs::remove_dir_all(&dir).unwrap();
    }

    /// Over TLS and over QUIC, which asks these, too. `[conduit.tls.no-early-data]`
    #[test]
    fn nobody_sends_or_takes_early_data() {
        let identity = Identity::self_signed(&["localhost"]).unwrap();
        let pin = Some(identity.fingerprint());
        assert_eq!(ServerTls::new(identity).config(ALPN).unwrap().max_early_data_size, 0);
        assert!(!ClientTls::default().config(pin, ALPN, TlsFailure::default()).unwrap().enable_early_data);
    }

    #[test]
    fn an_identity_is_shown_without_its_key() {
        let identity = Identity::self_signed(&["localhost"]).unwrap();
        let shown = format!("{:?}", ServerTls::new(identity.clone()));
        assert!(shown.contains(&identity.fingerprint().to_string()) && !shown.contains("key"), "{shown}");
    }
}
