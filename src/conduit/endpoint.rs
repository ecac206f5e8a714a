//! [`Endpoint`]: where a peer is reached, as people write it: `tcp://host:port/path`, `unix:///socket:/path`,
//! `tls://host:port/path#sha256=…`.
//!
//! ```text
//! scheme :// host : port [/path] [#sha256=64 hex digits]       tcp, tls, quic, ws, wss; the pin where there is TLS
//! unix   :// /path/of/the/socket [:/path]
//! ```

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;
use std::str::FromStr;

/// A kind of conduit that an [`Endpoint`] can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scheme {
    /// Plain TCP.
    Tcp,
    /// A Unix domain socket.
    Unix,
    /// TLS over TCP; feature `tls`.
    Tls,
    /// QUIC; feature `quic`.
    Quic,
    /// WebSocket over plain TCP; feature `ws`.
    Ws,
    /// WebSocket over TLS; features `ws` and `tls`.
    Wss,
}

impl Scheme {
    /// All schemes that there are.
    const ALL: [Self; 6] = [Self::Tcp, Self::Unix, Self::Tls, Self::Quic, Self::Ws, Self::Wss];

    /// The schemes of this build.
    pub const SUPPORTED: &[Self] = &[
        Self::Tcp,
        #[cfg(unix)]
        Self::Unix,
        #[cfg(feature = "tls")]
        Self::Tls,
        #[cfg(feature = "quic")]
        Self::Quic,
        #[cfg(feature = "ws")]
        Self::Ws,
        #[cfg(all(feature = "ws", feature = "tls"))]
        Self::Wss,
    ];

    /// The scheme's name, as it stands before `://`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Unix => "unix",
            Self::Tls => "tls",
            Self::Quic => "quic",
            Self::Ws => "ws",
            Self::Wss => "wss",
        }
    }

    /// Whether the peer is authenticated and what is sent is encrypted.
    pub fn is_encrypted(&self) -> bool {
        matches!(self, Self::Tls | Self::Quic | Self::Wss)
    }

    fn supported_names() -> String {
        Self::SUPPORTED.iter().map(|scheme| format!("{}://", scheme.name())).collect::<Vec<_>>().join(", ")
    }
}

/// The SHA-256 of a certificate in its DER form, by which a peer is known without a CA.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub [u8; 32]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

impl FromStr for Fingerprint {
    type Err = EndpointError;

    /// 64 hex digits; `openssl x509 -fingerprint` puts colons between them, which are skipped.
    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let invalid = || EndpointError::InvalidPin { pin: text.to_owned() };
        let nibble = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
        let digits: Option<Vec<u8>> = text.bytes().filter(|byte| *byte != b':').map(nibble).collect();
        let digits = digits.filter(|digits| digits.len() == 64).ok_or_else(invalid)?;
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            *byte = pair.iter().fold(0, |byte, digit| byte << 4 | digit);
        }
        Ok(Self(bytes))
    }
}

/// Where a peer is reached: scheme, host and port or a socket's path, an optional path that names a service or a thing
/// there, and where there is TLS an optional pin of the peer's certificate.
///
/// ```
/// # use tollway::conduit::endpoint::Endpoint;
/// let endpoint: Endpoint = "tcp://[::1]:4100/quotes".parse()?;
/// assert_eq!((endpoint.host(), endpoint.port(), endpoint.path()), ("::1", 4100, Some("/quotes")));
/// # Ok::<(), tollway::conduit::endpoint::EndpointError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Endpoint {
    scheme: Scheme,
    place: Place,
    path: Option<String>,
    pin: Option<Fingerprint>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Place {
    Net { host: String, port: u16 },
    Socket(String),
}

impl Endpoint {
    /// The kind of conduit.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The host: a name, an IPv4 address, or an IPv6 address without its brackets. Empty for a Unix socket.
    pub fn host(&self) -> &str {
        match &self.place {
            Place::Net { host, .. } => host,
            Place::Socket(_) => "",
        }
    }

    /// The port. 0 makes sense for listening alone: the system chooses one. 0 for a Unix socket, too.
    pub fn port(&self) -> u16 {
        match &self.place {
            Place::Net { port, .. } => *port,
            Place::Socket(_) => 0,
        }
    }

    /// The file of a Unix socket.
    pub fn socket(&self) -> Option<&Path> {
        match &self.place {
            Place::Net { .. } => None,
            Place::Socket(path) => Some(Path::new(path)),
        }
    }

    /// The path with its leading `/`, if there is one. A lone `/` is none.
    pub fn path(&self) -> Option<&str> {
        self.path.as_deref()
    }

    /// The certificate that the peer must show: with it no CA is asked, and no name or date is looked at.
    pub fn pin(&self) -> Option<Fingerprint> {
        self.pin
    }

    /// Host and port in the form that tokio and the standard library resolve.
    pub fn address(&self) -> (&str, u16) {
        (self.host(), self.port())
    }

    /// Whether the place is on this machine, as far as its text says: a Unix socket, a loopback address or `localhost`.
    pub fn is_local(&self) -> bool {
        match &self.place {
            Place::Socket(_) => true,
            Place::Net { host, .. } => {
                host.parse::<IpAddr>().map_or(host == "localhost", |address| address.to_canonical().is_loopback())
            }
        }
    }

    /// The same scheme at the address that was bound.
    #[must_use]
    pub fn with_address(mut self, address: SocketAddr) -> Self {
        self.place = Place::Net { host: address.ip().to_string(), port: address.port() };
        self
    }

    /// The same place with the certificate that is shown there; `None` takes the pin away.
    #[must_use]
    pub fn with_pin(mut self, pin: Option<Fingerprint>) -> Self {
        self.pin = pin.filter(|_| self.scheme.is_encrypted());
        self
    }

    /// The place alone, without a path.
    #[must_use]
    pub fn without_path(mut self) -> Self {
        self.path = None;
        self
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, path) = (self.scheme.name(), self.path.as_deref().unwrap_or_default());
        match &self.place {
            Place::Net { host, port } if host.contains(':') => write!(f, "{scheme}://[{host}]:{port}{path}")?,
            Place::Net { host, port } => write!(f, "{scheme}://{host}:{port}{path}")?,
            Place::Socket(socket) if path.is_empty() => write!(f, "{scheme}://{socket}")?,
            Place::Socket(socket) => write!(f, "{scheme}://{socket}:{path}")?,
        }
        match &self.pin {
            Some(pin) => write!(f, "#sha256={pin}"),
            None => Ok(()),
        }
    }
}

/// Why a text is no [`Endpoint`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EndpointError {
    /// There is no `scheme://` in front.
    #[error("`{text}` has no scheme: write {}://host:port", Scheme::Tcp.name())]
    MissingScheme {
        /// The whole text.
        text: String,
    },
    /// The scheme is none of [`Scheme::SUPPORTED`].
    #[error("the scheme `{scheme}` is not supported; supported: {}", Scheme::supported_names())]
    UnsupportedScheme {
        /// The scheme as written.
        scheme: String,
    },
    /// The scheme exists, and this build has it not.
    #[error("this build has no {scheme}://: build it with the feature `{feature}`")]
    NotBuilt {
        /// The scheme.
        scheme: &'static str,
        /// What is missing.
        feature: &'static str,
    },
    /// There is no host.
    #[error("`{text}` has no host")]
    MissingHost {
        /// The whole text.
        text: String,
    },
    /// The host is neither a name nor an address.
    #[error(
        "`{host}` is not a host: use a name, an IPv4 address, or an IPv6 address in brackets, without user or query"
    )]
    InvalidHost {
        /// The host as written.
        host: String,
    },
    /// There is no port, and none that everyone would expect.
    #[error("`{text}` has no port: add one, such as :4100")]
    MissingPort {
        /// The whole text.
        text: String,
    },
    /// The port is not a number up to 65535.
    #[error("`{port}` is not a port: use a number from 0 to 65535")]
    InvalidPort {
        /// The port as written.
        port: String,
    },
    /// The path has white space, control characters, a query or a fragment.
    #[error("`{path}` is not a path: no white space, `?` or `#` may stand in it")]
    InvalidPath {
        /// The path as written.
        path: String,
    },
    /// The path of a Unix socket is relative, or names no file.
    #[error("`{text}` names no socket: write unix:///path/of/the/socket, with three slashes")]
    InvalidSocket {
        /// The whole text.
        text: String,
    },
    /// What stands behind `#` is not a SHA-256.
    #[error("`{pin}` is not a pin: write #sha256= and 64 hex digits, as the listener prints it")]
    InvalidPin {
        /// The pin as written.
        pin: String,
    },
    /// There is a pin, and no certificate that could have it.
    #[error("{scheme}:// has no certificate that could be pinned: use tls:// or quic://, or leave `#…` away")]
    PinWithoutTls {
        /// The scheme.
        scheme: &'static str,
    },
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let (scheme, rest) =
            text.split_once("://").ok_or_else(|| EndpointError::MissingScheme { text: text.to_owned() })?;
        let scheme = parse_scheme(scheme)?;
        let (rest, pin) = match rest.split_once('#') {
            Some((rest, pin)) => (rest, Some(parse_pin(scheme, pin)?)),
            None => (rest, None),
        };
        if scheme == Scheme::Unix {
            let (socket, path) = match rest.split_once(":/") {
                Some((socket, path)) => (socket, rest.get(rest.len() - path.len() - 1..).unwrap_or_default()),
                None => (rest, ""),
            };
            let is_file = socket.starts_with('/') && !socket.ends_with('/') && !socket.contains('\0');
            if !is_file {
                return Err(EndpointError::InvalidSocket { text: text.to_owned() });
            }
            return Ok(Self { scheme, place: Place::Socket(socket.to_owned()), path: parse_path(path)?, pin });
        }
        let (authority, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        let (host, port) = split_authority(authority, text)?;
        let place = Place::Net { host: parse_host(host, text)?, port: parse_port(port, text)? };
        Ok(Self { scheme, place, path: parse_path(path)?, pin })
    }
}

fn parse_scheme(text: &str) -> Result<Scheme, EndpointError> {
    let known = Scheme::ALL.into_iter().find(|known| known.name().eq_ignore_ascii_case(text));
    let scheme = known.ok_or_else(|| EndpointError::UnsupportedScheme { scheme: text.to_owned() })?;
    if Scheme::SUPPORTED.contains(&scheme) {
        return Ok(scheme);
    }
    let feature = match scheme {
        Scheme::Tls => "tls",
        Scheme::Quic => "quic",
        Scheme::Ws => "ws",
        Scheme::Wss if cfg!(feature = "ws") => "tls",
        Scheme::Wss => "ws",
        // Not on this system.
        Scheme::Tcp | Scheme::Unix => return Err(EndpointError::UnsupportedScheme { scheme: text.to_owned() }),
    };
    Err(EndpointError::NotBuilt { scheme: scheme.name(), feature })
}

fn parse_pin(scheme: Scheme, text: &str) -> Result<Fingerprint, EndpointError> {
    if !scheme.is_encrypted() {
        return Err(EndpointError::PinWithoutTls { scheme: scheme.name() });
    }
    let pin = text.strip_prefix("sha256=").ok_or_else(|| EndpointError::InvalidPin { pin: text.to_owned() })?;
    pin.parse()
}

/// Host, still in its brackets, and port.
fn split_authority<'a>(authority: &'a str, text: &str) -> Result<(&'a str, &'a str), EndpointError> {
    let after_host = if authority.starts_with('[') {
        let end = authority.find(']').ok_or_else(|| EndpointError::InvalidHost { host: authority.to_owned() })?;
        end + 1
    } else {
        // An IPv6 address without brackets has colons too: the last one might be part of it, so it is refused as a host.
        authority.rfind(':').unwrap_or(authority.len())
    };
    let (host, port) = authority.split_at(after_host);
    if host.is_empty() {
        return Err(EndpointError::MissingHost { text: text.to_owned() });
    }
    match port.strip_prefix(':') {
        Some(port) => Ok((host, port)),
        None if port.is_empty() => Err(EndpointError::MissingPort { text: text.to_owned() }),
        None => Err(EndpointError::InvalidHost { host: authority.to_owned() }),
    }
}

fn parse_host(host: &str, text: &str) -> Result<String, EndpointError> {
    if host == "[]" {
        return Err(EndpointError::MissingHost { text: text.to_owned() });
    }
    let invalid = || EndpointError::InvalidHost { host: host.to_owned() };
    if let Some(inner) = host.strip_prefix('[') {
        let address: Ipv6Addr = inner.strip_suffix(']').and_then(|inner| inner.parse().ok()).ok_or_else(invalid)?;
        return Ok(address.to_string());
    }
    if let Ok(address) = host.parse::<Ipv4Addr>() {
        return Ok(address.to_string());
    }
    // Wide enough for every name that a resolver takes, underscores too; narrow enough to catch slips of the pen.
    let is_name = host.len() <= 253 && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte));
    // A name whose last label is a number can only be a malformed IPv4 address.
    let last = host.trim_end_matches('.').rsplit('.').next().unwrap_or_default();
    if !is_name || last.is_empty() || last.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(invalid());
    }
    Ok(host.to_ascii_lowercase())
}

fn parse_port(port: &str, text: &str) -> Result<u16, EndpointError> {
    if port.is_empty() {
        return Err(EndpointError::MissingPort { text: text.to_owned() });
    }
    // `u16::from_str` would take a leading plus sign.
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| port.parse().ok()).flatten().ok_or_else(|| EndpointError::InvalidPort { port: port.to_owned() })
}

fn parse_path(path: &str) -> Result<Option<String>, EndpointError> {
    if path.chars().any(|char| char.is_whitespace() || char.is_control() || matches!(char, '?' | '#')) {
        return Err(EndpointError::InvalidPath { path: path.to_owned() });
    }
    Ok(Some(path).filter(|path| path.len() > 1).map(str::to_owned))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_parsed_and_shown_in_one_form() {
        for (text, host, port, path, shown) in [
            ("tcp://localhost:4100", "localhost", 4100, None, "tcp://localhost:4100"),
            ("TCP://Api.Example:1/", "api.example", 1, None, "tcp://api.example:1"),
            ("tcp://10.0.0.1:65535/a/b", "10.0.0.1", 65535, Some("/a/b"), "tcp://10.0.0.1:65535/a/b"),
            ("tcp://[0:0::1]:0", "::1", 0, None, "tcp://[::1]:0"),
            ("tcp://my_service-1:80/x:y", "my_service-1", 80, Some("/x:y"), "tcp://my_service-1:80/x:y"),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!((endpoint.host(), endpoint.port(), endpoint.path()), (host, port, path), "{text}");
            assert_eq!(endpoint.to_string(), shown);
            assert_eq!(shown.parse::<Endpoint>().unwrap(), endpoint);
        }
    }

    #[test]
    fn each_mistake_has_its_own_error() {
        use EndpointError as E;
        type Kind = fn(&EndpointError) -> bool;
        let cases: [(&str, Kind); 22] = [
            ("localhost:4100", |error| matches!(error, E::MissingScheme { .. })),
            ("", |error| matches!(error, E::MissingScheme { .. })),
            ("http://localhost:80", |error| matches!(error, E::UnsupportedScheme { .. })),
            ("://localhost:80", |error| matches!(error, E::UnsupportedScheme { .. })),
            ("tcp://", |error| matches!(error, E::MissingHost { .. })),
            ("tcp://:80", |error| matches!(error, E::MissingHost { .. })),
            ("tcp://[]:80", |error| matches!(error, E::MissingHost { .. })),
            ("tcp://localhost", |error| matches!(error, E::MissingPort { .. })),
            ("tcp://localhost:", |error| matches!(error, E::MissingPort { .. })),
            ("tcp://[::1]", |error| matches!(error, E::MissingPort { .. })),
            ("tcp://localhost:65536", |error| matches!(error, E::InvalidPort { .. })),
            ("tcp://localhost:+1", |error| matches!(error, E::InvalidPort { .. })),
            ("tcp://::1:80", |error| matches!(error, E::InvalidHost { .. })),
            ("tcp://[::1:80", |error| matches!(error, E::InvalidHost { .. })),
            ("tcp://[::1]x:80", |error| matches!(error, E::InvalidHost { .. })),
            ("tcp://user@host:80", |error| matches!(error, E::InvalidHost { .. })),
            ("tcp://10.0.0.256:80", |error| matches!(error, E::InvalidHost { .. })),
            ("tcp://host:80/a?b", |error| matches!(error, E::InvalidPath { .. })),
            ("tcp://host:80#sha256=00", |error| matches!(error, E::PinWithoutTls { .. })),
            ("unix://run/t.sock", |error| matches!(error, E::InvalidSocket { .. })),
            ("unix:///run/", |error| matches!(error, E::InvalidSocket { .. })),
            ("unix://", |error| matches!(error, E::InvalidSocket { .. })),
        ];
        for (text, is_expected) in cases {
            let error = text.parse::<Endpoint>().unwrap_err();
            assert!(is_expected(&error), "{text}: {error:?}");
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_socket_has_a_file_and_perhaps_a_path() {
        for (text, socket, path) in [
            ("unix:///run/t.sock", "/run/t.sock", None),
            ("unix:///run/a b.sock:/x/y", "/run/a b.sock", Some("/x/y")),
            ("unix:///run/t.sock:/", "/run/t.sock", None),
        ] {
            let endpoint: Endpoint = text.parse().unwrap();
            assert_eq!((endpoint.socket(), endpoint.path()), (Some(Path::new(socket)), path), "{text}");
            assert_eq!(endpoint.to_string().parse::<Endpoint>().unwrap(), endpoint);
            assert!(endpoint.is_local());
        }
    }

    #[cfg(feature = "tls")]
    #[test]
    fn a_pin_is_kept_behind_the_path_and_must_be_a_hash() {
        let pin = "0123456789abcdef".repeat(4);
        let endpoint: Endpoint = format!("tls://host:1/name#sha256={pin}").parse().unwrap();
        assert_eq!((endpoint.path(), endpoint.pin().unwrap().to_string()), (Some("/name"), pin.clone()));
        assert_eq!(endpoint.to_string().parse::<Endpoint>().unwrap(), endpoint);
        let colons = pin.to_uppercase().replace("0123", "01:23");
        let colons: Endpoint = format!("tls://host:1/name#sha256={colons}").parse().unwrap();
        assert_eq!(colons, endpoint);
        for bad in ["", "sha256=", "sha256=00", &pin, &format!("sha256={pin}0"), &format!("sha512={pin}")] {
            let error = format!("tls://host:1#{bad}").parse::<Endpoint>().unwrap_err();
            assert!(matches!(error, EndpointError::InvalidPin { .. }), "{bad}: {error:?}");
        }
    }

    #[test]
    fn what_is_on_this_machine_is_told_from_the_rest() {
        for (text, local) in [
            ("tcp://127.0.0.1:1", true),
            ("tcp://127.9.9.9:1", true),
            ("tcp://[::1]:1", true),
            ("tcp://[::ffff:127.0.0.1]:1", true),
            ("tcp://localhost:1", true),
            ("tcp://0.0.0.0:1", false),
            ("tcp://10.0.0.1:1", false),
            ("tcp://localhost.example:1", false),
        ] {
            assert_eq!(text.parse::<Endpoint>().unwrap().is_local(), local, "{text}");
        }
    }

    #[test]
    fn an_unsupported_scheme_is_told_which_ones_are_supported() {
        let error = "gopher://host:1".parse::<Endpoint>().unwrap_err().to_string();
        assert!(error.starts_with("the scheme `gopher` is not supported; supported: tcp://"), "{error}");
        let error = "host:1".parse::<Endpoint>().unwrap_err();
        assert_eq!(error.to_string(), "`host:1` has no scheme: write tcp://host:port");
    }

    #[test]
    fn a_scheme_that_is_not_built_names_its_feature() {
        for scheme in Scheme::ALL.into_iter().filter(|scheme| !Scheme::SUPPORTED.contains(scheme)) {
            let error = format!("{}://host:1", scheme.name()).parse::<Endpoint>().unwrap_err();
            let named = matches!(error, EndpointError::NotBuilt { .. }) || scheme == Scheme::Unix;
            assert!(named, "{error:?}");
        }
    }
}
