//! [`Endpoint`]: where a peer is reached, as people write it: `tcp://host:port/path`.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// A kind of conduit that an [`Endpoint`] can name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scheme {
    /// Plain TCP.
    Tcp,
}

impl Scheme {
    /// All schemes of this build.
    pub const SUPPORTED: &[Self] = &[Self::Tcp];

    /// The scheme's name, as it stands before `://`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
        }
    }

    fn supported_names() -> String {
        Self::SUPPORTED.iter().map(|scheme| format!("{}://", scheme.name())).collect::<Vec<_>>().join(", ")
    }
}

/// Where a peer is reached: scheme, host, port and an optional path that names a service there.
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
    host: String,
    port: u16,
    path: Option<String>,
}

impl Endpoint {
    /// The kind of conduit.
    pub fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// The host: a name, an IPv4 address, or an IPv6 address without its brackets.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The port. 0 makes sense for listening alone: the system chooses one.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The path with its leading `/`, if there is one. A lone `/` is none.
    pub fn path(&self) -> Option<&str> {
        self.path.as_deref()
    }

    /// Host and port in the form that tokio and the standard library resolve.
    pub fn address(&self) -> (&str, u16) {
        (&self.host, self.port)
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, path) = (self.scheme.name(), self.path.as_deref().unwrap_or_default());
        if self.host.contains(':') {
            write!(f, "{scheme}://[{}]:{}{path}", self.host, self.port)
        } else {
            write!(f, "{scheme}://{}:{}{path}", self.host, self.port)
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
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        let (scheme, rest) =
            text.split_once("://").ok_or_else(|| EndpointError::MissingScheme { text: text.to_owned() })?;
        let scheme = Scheme::SUPPORTED
            .iter()
            .find(|known| known.name().eq_ignore_ascii_case(scheme))
            .copied()
            .ok_or_else(|| EndpointError::UnsupportedScheme { scheme: scheme.to_owned() })?;
        let (authority, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, ""),
        };
        let (host, port) = split_authority(authority, text)?;
        Ok(Self { scheme, host: parse_host(host, text)?, port: parse_port(port, text)?, path: parse_path(path)? })
    }
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
        let cases: [(&str, Kind); 18] = [
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
        ];
        for (text, is_expected) in cases {
            let error = text.parse::<Endpoint>().unwrap_err();
            assert!(is_expected(&error), "{text}: {error:?}");
        }
    }

    #[test]
    fn an_unsupported_scheme_is_told_which_ones_are_supported() {
        let error = "quic://host:1".parse::<Endpoint>().unwrap_err();
        assert_eq!(error.to_string(), "the scheme `quic` is not supported; supported: tcp://");
        let error = "host:1".parse::<Endpoint>().unwrap_err();
        assert_eq!(error.to_string(), "`host:1` has no scheme: write tcp://host:port");
    }
}
