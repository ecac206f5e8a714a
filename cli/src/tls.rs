//! Certificates of the command: what a server shows, whom it takes, and whom a client trusts.

use std::path::{Path, PathBuf};

use clap::Args;
use tollway::conduit::any::{ConnectOptions, ListenOptions};
use tollway::conduit::endpoint::Endpoint;
use tollway::conduit::tls::{ClientTls, Identity, ServerTls, TlsError, certificates};

use crate::output;

/// What a server shows where there is TLS.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "TLS (tls://, quic://, wss://)")]
pub(crate) struct ServerArguments {
    /// The certificate that a CA has issued, with its chain, as PEM. Without it the server makes one that signs itself,
    /// and prints URLs with its #sha256=…, which clients need instead of a CA.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The key of --tls-cert, as PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// Where the certificate that signs itself is kept; by default beside --key, with .tls behind its name.
    #[arg(long, value_name = "FILE", conflicts_with = "tls_cert")]
    tls_self: Option<PathBuf>,
    /// Take only clients with a certificate of these CAs, as PEM.
    #[arg(long, value_name = "FILE")]
    client_ca: Option<PathBuf>,
}

/// Whom a client trusts, and what it shows, where there is TLS.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "TLS (tls://, quic://, wss://)")]
pub(crate) struct ClientArguments {
    /// Trust the CAs in this file, as PEM, and not those of the system. A #sha256=… in the URL goes before both.
    #[arg(long, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Show this certificate, as PEM, to a server that asks for one.
    #[arg(long, value_name = "FILE", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// The key of --tls-cert, as PEM.
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
}

/// A file that is of no use for TLS.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsFileError {
    #[error("cannot read {}: {source}", .path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: {source}", .path.display())]
    Use { path: PathBuf, source: TlsError },
    #[error("{option} is of no use: nothing listens with TLS. Listen at tls://, quic:// or wss://, or leave it away")]
    NothingEncrypted { option: &'static str },
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl ServerArguments {
    /// What these places need. `key` is the server's key file, beside which a certificate is kept.
    ///
    /// # Errors
    /// When a file cannot be used.
    pub(crate) fn options(&self, places: &[Endpoint], key: Option<&Path>) -> Result<ListenOptions, TlsFileError> {
        let mut options = ListenOptions::default();
        if !places.iter().any(|place| place.scheme().is_encrypted()) {
            // --tls-self names a file that may be there for another start; the others say what cannot be had.
            return match self.first_given() {
                None | Some("--tls-self") => Ok(options),
                Some(option) => Err(TlsFileError::NothingEncrypted { option }),
            };
        }
        let mut tls = ServerTls::new(self.identity(key)?);
        if let Some(path) = &self.client_ca {
            tls = tls.with_client_roots(read_certificates(path)?);
        }
        options.tls = Some(tls);
        Ok(options)
    }

    /// One of these options that was given, for those who have no use for it.
    pub(crate) fn first_given(&self) -> Option<&'static str> {
        let given = [
            ("--client-ca", &self.client_ca),
            ("--tls-cert", &self.tls_cert),
            ("--tls-key", &self.tls_key),
            ("--tls-self", &self.tls_self),
        ];
        given.into_iter().find_map(|(name, value)| value.is_some().then_some(name))
    }

    fn identity(&self, key: Option<&Path>) -> Result<Identity, TlsFileError> {
        if let (Some(cert), Some(key)) = (&self.tls_cert, &self.tls_key) {
            return read_identity(cert, key);
        }
        let beside = key.map(|key| {
            let mut path = key.as_os_str().to_owned();
            path.push(".tls");
            PathBuf::from(path)
        });
        match self.tls_self.clone().or(beside) {
            Some(path) => Ok(Identity::load_or_create(&path)?),
            None => {
                output::note(
                    "The certificate, and with it #sha256=…, changes with each start: --tls-self FILE keeps it.",
                );
                Ok(Identity::self_signed(&["localhost"])?)
            }
        }
    }
}

impl ClientArguments {
    /// What connecting needs.
    ///
    /// # Errors
    /// When a file cannot be used.
    pub(crate) fn options(&self) -> Result<ConnectOptions, TlsFileError> {
        let mut tls = ClientTls::default();
        if let Some(path) = &self.ca {
            tls = tls.with_roots(read_certificates(path)?);
        }
        if let (Some(cert), Some(key)) = (&self.tls_cert, &self.tls_key) {
            tls = tls.with_identity(read_identity(cert, key)?);
        }
        let mut options = ConnectOptions::default();
        options.tls = tls;
        Ok(options)
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsFileError> {
    std::fs::read(path).map_err(|source| TlsFileError::Read { path: path.to_owned(), source })
}

fn read_certificates(path: &Path) -> Result<Vec<tollway::conduit::tls::CertificateDer<'static>>, TlsFileError> {
    certificates(&read(path)?).map_err(|source| TlsFileError::Use { path: path.to_owned(), source })
}

fn read_identity(cert: &Path, key: &Path) -> Result<Identity, TlsFileError> {
    let identity = Identity::from_pem(&read(cert)?, &read(key)?);
    identity.map_err(|source| TlsFileError::Use { path: cert.to_owned(), source })
}
