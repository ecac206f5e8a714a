//! Options as people write them: sizes, URLs. Prices are [`Price`](tollway_protocol::payment::Price)s, as in programs.

use std::fmt;
use std::str::FromStr;

use tollway::conduit::endpoint::{Endpoint, EndpointError};
use tollway_protocol::payment::parse_bytes;

/// A number of bytes: `64MiB`, `1GiB`, `4096`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size(pub(crate) u64);

/// A text that is not a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a size is a whole number with B, KiB, MiB, GiB or nothing behind it, such as 64MiB")]
pub(crate) struct ParseSizeError;

impl FromStr for Size {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, ParseSizeError> {
        // A unit alone is one of it behind the slash of a rate, and here more likely a slip.
        let has_number = text.starts_with(|first: char| first.is_ascii_digit());
        parse_bytes(text).filter(|_| has_number).map(Size).ok_or(ParseSizeError)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")];
        match units.into_iter().find(|(scale, _)| self.0 >= *scale && self.0.is_multiple_of(*scale)) {
            Some((scale, unit)) => write!(f, "{}{unit}", self.0 / scale),
            None => write!(f, "{}B", self.0),
        }
    }
}

/// An endpoint without a path: where something listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place(pub(crate) Endpoint);

/// Why a text is no [`Place`] or no [`FileUrl`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UrlError {
    /// It is no endpoint.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// There is a path where none belongs.
    #[error("the path {0} does not belong here: write tcp://host:port alone")]
    HasPath(String),
    /// There is no path.
    #[error("the URL names no file: write tcp://host:port/NAME, or unix:///SOCKET:/NAME")]
    NoName,
    /// A `%` without two hex digits, or bytes that are not UTF-8.
    #[error("{0} is not well encoded: behind a % stand two hex digits; write %25 for a % and %20 for a space")]
    Encoding(String),
}

impl FromStr for Place {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let endpoint: Endpoint = text.parse()?;
        match endpoint.path() {
            Some(path) => Err(UrlError::HasPath(path.to_owned())),
            None => Ok(Place(endpoint)),
        }
    }
}

/// A file at a payee: `tcp://host:port/NAME`, the name percent-encoded where it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileUrl {
    /// The payee.
    pub(crate) endpoint: Endpoint,
    /// The file's name there.
    pub(crate) name: String,
}

impl FromStr for FileUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let endpoint: Endpoint = text.parse()?;
        let path = endpoint.path().ok_or(UrlError::NoName)?;
        let encoded = path.strip_prefix('/').unwrap_or(path);
        let name = percent_decoded(encoded).ok_or_else(|| UrlError::Encoding(encoded.to_owned()))?;
        Ok(FileUrl { endpoint, name })
    }
}

fn percent_decoded(text: &str) -> Option<String> {
    let nibble = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
    let mut decoded = Vec::with_capacity(text.len());
    let mut bytes = text.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => nibble(bytes.next()?)? << 4 | nibble(bytes.next()?)?,
            byte => byte,
        });
    }
    String::from_utf8(decoded).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// The URL of a file, with the name encoded where it must be.
    fn file_url(endpoint: &Endpoint, name: &str) -> String {
        let mut url = format!("{endpoint}/");
        for byte in name.bytes() {
            match byte {
                b'%' | b'?' | b'#' | 0..=b' ' | 0x7f.. => url.push_str(&format!("%{byte:02X}")),
                byte => url.push(char::from(byte)),
            }
        }
        url
    }

    #[test]
    fn sizes_have_binary_units() {
        for (text, bytes) in [("0", 0), ("7B", 7), ("64MiB", 64 << 20), ("1GiB", 1 << 30), ("4096", 4096)] {
            assert_eq!(text.parse::<Size>().unwrap(), Size(bytes), "{text}");
        }
        for text in ["", "MiB", "1MB", "1.5MiB", "-1", "99999999999GiB"] {
            assert!(text.parse::<Size>().is_err(), "{text}");
        }
        assert_eq!([Size(64 << 20), Size(1000), Size(0)].map(|size| size.to_string()), ["64MiB", "1000B", "0B"]);
    }

    #[test]
    fn a_file_url_carries_any_name() {
        for name in ["a", "dir/b c", "100%", "../x", "/etc/passwd", "é#?", "a\0b"] {
            let place: Place = "tcp://127.0.0.1:7400".parse().unwrap();
            let url: FileUrl = file_url(&place.0, name).parse().unwrap();
            assert_eq!(url.name, name);
        }
        assert_eq!("tcp://h:1".parse::<FileUrl>(), Err(UrlError::NoName));
        assert!(matches!("tcp://h:1/%zz".parse::<FileUrl>(), Err(UrlError::Encoding(_))));
        assert!(matches!("tcp://h:1/a".parse::<Place>(), Err(UrlError::HasPath(_))));
        let pinned = format!("tls://h:1/a%20b#sha256={}", "0a".repeat(32)).parse::<FileUrl>().unwrap();
        assert_eq!((pinned.name.as_str(), pinned.endpoint.pin().is_some()), ("a b", true));
        #[cfg(unix)]
        assert_eq!("unix:///run/t.sock:/a/b".parse::<FileUrl>().unwrap().name, "a/b");
    }
}
