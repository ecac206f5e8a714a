//! [`TlsError`]: why two sides do not come together over TLS, each with what to do about it.

use std::io;

use rustls::{AlertDescription, CertificateError, InvalidMessage, PeerIncompatible};

use crate::conduit::endpoint::Fingerprint;

/// Why there is no TLS with the peer. Each says what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The peer speaks TLS, and has not agreed to speak Tollway over it.
    #[error("the peer speaks TLS but not Tollway (ALPN `tollway/1`): check the host and the port")]
    NotTollway,
    /// What the peer sends is not TLS.
    #[error(
        "the peer does not speak TLS 1.3 on this port: use the same scheme on both sides, such as tcp:// if it listens \
         there without TLS"
    )]
    NotTls,
    /// The certificate's time is over.
    #[error("the peer's certificate has expired: it must be renewed there (and check this machine's clock)")]
    Expired,
    /// The certificate's time has not begun.
    #[error("the peer's certificate is not valid yet: check the clocks of both machines")]
    NotYetValid,
    /// The certificate is self-signed, or its CA is not one of the trusted ones.
    #[error(
        "the peer's certificate is self-signed or of a CA that is not trusted here: trust its CA, or, if its owner \
         confirms the fingerprint, write #sha256={fingerprint} behind the URL"
    )]
    UnknownIssuer {
        /// The certificate that was shown.
        fingerprint: Fingerprint,
    },
    /// The certificate is for other hosts.
    #[error("the peer's certificate is not for `{host}`: use a name that it is for, or check who answers there")]
    WrongHost {
        /// The host that was asked for.
        host: String,
    },
    /// The certificate is not the pinned one.
    #[error(
        "the peer shows another certificate than the pinned one: #sha256={found}, not {expected}. Ask its owner whether \
         it was changed; if not, somebody else answers there"
    )]
    WrongPin {
        /// The certificate in the URL.
        expected: Fingerprint,
        /// The one that was shown.
        found: Fingerprint,
    },
    /// The certificate is not accepted for another reason.
    #[error("the peer's certificate is not accepted: {0}")]
    BadCertificate(String),
    /// The listener wants a client certificate, and none was given.
    #[error("the peer requires a client certificate: give one that its CA has issued")]
    CertificateRequired,
    /// The peer refuses the certificate that this side showed.
    #[error("the peer refuses this side's certificate ({0}): use one that it trusts and that is still valid")]
    CertificateRefused(String),
    /// A client came without a certificate, and this side requires one.
    #[error("the client shows no certificate, and this listener requires one")]
    NoClientCertificate,
    /// The host of the URL cannot stand in a certificate.
    #[error("`{0}` is not a name or an address that a certificate could be for")]
    InvalidName(String),
    /// Certificates, keys or roots of this side cannot be used.
    #[error("{0}")]
    Config(String),
    /// Both speak TLS, and something else went wrong.
    #[error("TLS failed: {0}")]
    Protocol(String),
}

impl TlsError {
    /// What an error of rustls means.
    pub(crate) fn of(error: &rustls::Error) -> Self {
        match error {
            rustls::Error::InvalidCertificate(error) => Self::of_certificate(error),
            rustls::Error::NoCertificatesPresented => Self::NoClientCertificate,
            rustls::Error::NoApplicationProtocol => Self::NotTollway,
            rustls::Error::AlertReceived(alert) => Self::of_alert(*alert),
            rustls::Error::InvalidMessage(
                InvalidMessage::InvalidContentType
                | InvalidMessage::UnknownProtocolVersion
                | InvalidMessage::MessageTooLarge,
            )
            | rustls::Error::PeerIncompatible(
                PeerIncompatible::Tls12NotOfferedOrEnabled
                | PeerIncompatible::ServerDoesNotSupportTls12Or13
                | PeerIncompatible::SupportedVersionsExtensionRequired
                | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig,
            ) => Self::NotTls,
            other => Self::Protocol(other.to_string()),
        }
    }

    fn of_certificate(error: &CertificateError) -> Self {
        match error {
            // Those of this side's own verifier carry their meaning with them.
            CertificateError::Other(inner) => match inner.0.downcast_ref::<TlsError>() {
                Some(error) => error.clone(),
                None => Self::BadCertificate(inner.to_string()),
            },
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => Self::Expired,
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => Self::NotYetValid,
            other => Self::BadCertificate(other.to_string()),
        }
    }

    pub(crate) fn of_alert(alert: AlertDescription) -> Self {
        match alert {
            AlertDescription::NoApplicationProtocol => Self::NotTollway,
            // What a plain listener answers, too.
            AlertDescription::ProtocolVersion => Self::NotTls,
            AlertDescription::CertificateRequired => Self::CertificateRequired,
            AlertDescription::BadCertificate
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::AccessDenied
            // How a CA of the same name with another key shows.
            | AlertDescription::DecryptError => Self::CertificateRefused(format!("{alert:?}")),
            other => Self::Protocol(format!("the peer reports {other:?}")),
        }
    }

    /// What an error of a TLS stream means; `None` for those of the network below it.
    pub(crate) fn of_io(error: &io::Error) -> Option<Self> {
        let inner = error.get_ref()?;
        match inner.downcast_ref::<rustls::Error>() {
            Some(error) => Some(Self::of(error)),
            None => inner.downcast_ref::<TlsError>().cloned(),
        }
    }
}
