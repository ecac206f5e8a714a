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

/// Accepts the certificate with this fingerprint and no other. That the peer has its key is proved by the handshake's
/// signature, as always. `[conduit.tls.pin]`
#[derive(Debug)]
pub(super) struct PinVerifier {
    pub(super) pin: Fingerprint,
    pub(super) failure: TlsFailure,
    pub(super) algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let found = fingerprint(end_entity);
        match found == self.pin {
            true => Ok(ServerCertVerified::assertion()),
            false => {
                let error = TlsError::WrongPin { expected: self.pin, found };
                // The first failure is the one to tell.
                let _ = self.failure.set(error.clone());
                Err(refusal(error))
            }
        }
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

/// Asks the CAs, and says what is wrong in a way that helps.
#[derive(Debug)]
pub(super) struct CaVerifier {
    pub(super) inner: Arc<WebPkiServerVerifier>,
    pub(super) failure: TlsFailure,
}

impl ServerCertVerifier for CaVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let verified = self.inner.verify_server_cert(end_entity, intermediates, server_name, ocsp_response, now);
        verified.map_err(|error| {
            let error = told(error, end_entity, server_name);
            // The first failure is the one to tell.
            let _ = self.failure.set(TlsError::of(&error));
            error
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
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
