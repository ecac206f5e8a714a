//! How a client knows the listener: by a CA or by a pin. Whatever is wrong is a [`TlsError`] that says what to do.

use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, Error, OtherError, SignatureScheme};

use super::config::fingerprint;
use super::{TlsError, TlsFailure};
use crate::conduit::endpoint::Fingerprint;

/// By what the listener is known.
#[derive(Debug)]
pub(super) enum Trust {
    /// By the fingerprint of its certificate and nothing else. That it has the key is proved by the handshake's signature,
    /// as always. `[conduit.tls.pin]`
    Pin(Fingerprint),
    /// By a CA and its name.
    Ca(Arc<WebPkiServerVerifier>),
}

/// Decides about the listener's certificate.
#[derive(Debug)]
pub(super) struct Verifier {
    pub(super) trust: Trust,
    /// Where what is wrong with it is left.
    pub(super) failure: TlsFailure,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = match &self.trust {
            Trust::Pin(pin) => match fingerprint(end_entity) {
                found if found == *pin => Ok(ServerCertVerified::assertion()),
                found => Err(refusal(TlsError::WrongPin { expected: *pin, found })),
            },
            Trust::Ca(cas) => cas
                .verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now)
                .map_err(|error| told(error, end_entity, server_name)),
        };
        if let Err(error) = &verified {
            // The first failure is the one to tell.
            let _ = self.failure.set(TlsError::of(error));
        }
        verified
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, cert, dss, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// What is wrong, in words that help.
fn told(error: Error, end_entity: &CertificateDer<'_>, server_name: &ServerName<'_>) -> Error {
    match &error {
        // A bad signature is what a CA of the same name with another key leads to.
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            unknown_issuer(end_entity)
        }
        // How webpki says that a self-signed certificate with the rights of a CA is used by a listener.
        Error::InvalidCertificate(CertificateError::Other(inner)) if is_ca_as_end_entity(inner) => {
            unknown_issuer(end_entity)
        }
        Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => refusal(TlsError::WrongHost { host: server_name.to_str().into_owned() }),
        _ => error,
    }
}

fn is_ca_as_end_entity(error: &OtherError) -> bool {
    error.to_string().contains("CaUsedAsEndEntity")
}

fn unknown_issuer(end_entity: &CertificateDer<'_>) -> Error {
    refusal(TlsError::UnknownIssuer { fingerprint: fingerprint(end_entity) })
}

/// In this form the peer is told `certificate_unknown`, and our own side finds the cause again.
fn refusal(error: TlsError) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(error))))
}
