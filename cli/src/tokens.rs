//! Files with bearer tokens: whom a server lets in, and what a client shows.

use std::path::{Path, PathBuf};

use tollway::auth::{BearerToken, Identity, InvalidToken, TokenAuthenticator};
use tollway_protocol::metadata::Entry;

/// Marks the identity of somebody who may look at the server.
#[derive(Debug)]
pub(crate) struct Operator;

/// A file that is of no use as one of tokens. No message shows what is in it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TokenFileError {
    #[error("cannot read the tokens in {}: {source}", .path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: line {line}: {source}", .path.display())]
    Token { path: PathBuf, line: usize, source: InvalidToken },
    #[error("{}: line {line} is not `NAME TOKEN` or `NAME TOKEN operator`", .path.display())]
    Line { path: PathBuf, line: usize },
    #[error("there is no token in {}", .path.display())]
    Empty { path: PathBuf },
}

/// Reads whom a server lets in: a line each with a name and a token, and `operator` behind it for who may look at the
/// server. Empty lines and those that begin with # count for nothing.
///
/// # Errors
/// When the file cannot be read, or a line is none of these.
pub(crate) fn server(path: &Path) -> Result<TokenAuthenticator, TokenFileError> {
    let mut tokens = TokenAuthenticator::new();
    for (line, words) in words(path)? {
        let (name, token, is_operator) = match words.iter().map(String::as_str).collect::<Vec<_>>()[..] {
            [name, token] => (name, token, false),
            [name, token, "operator"] => (name, token, true),
            _ => return Err(TokenFileError::Line { path: path.to_owned(), line }),
        };
        let token = parse(path, line, token)?;
        let identity = Identity::new(name, "token");
        tokens = tokens.with_identity(if is_operator { identity.with_data(Operator) } else { identity }, &token);
    }
    match tokens.is_empty() {
        true => Err(TokenFileError::Empty { path: path.to_owned() }),
        false => Ok(tokens),
    }
}

/// Reads what a client shows: the token on the first line, alone or behind a name.
///
/// # Errors
/// When the file cannot be read, or there is no token in it.
pub(crate) fn client(path: &Path) -> Result<Entry, TokenFileError> {
    let (line, words) =
        words(path)?.into_iter().next().ok_or_else(|| TokenFileError::Empty { path: path.to_owned() })?;
    let token = match &words[..] {
        [token] | [_, token, ..] => token,
        [] => return Err(TokenFileError::Empty { path: path.to_owned() }),
    };
    Ok(parse(path, line, token)?.entry())
}

fn parse(path: &Path, line: usize, token: &str) -> Result<BearerToken, TokenFileError> {
    BearerToken::new(token).map_err(|source| TokenFileError::Token { path: path.to_owned(), line, source })
}

/// The words of each line that counts, with the line's number.
fn words(path: &Path) -> Result<Vec<(usize, Vec<String>)>, TokenFileError> {
    let text =
        std::fs::read_to_string(path).map_err(|source| TokenFileError::Read { path: path.to_owned(), source })?;
    let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty() && !line.starts_with('#'));
    Ok(lines.map(|(number, line)| (number, line.split_whitespace().map(str::to_owned).collect())).collect())
}
