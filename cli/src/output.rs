//! What people and programs read: results on standard output, progress and questions on standard error.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use tollway_protocol::payment::{Amount, Price, Terms};

/// How often the figures beside the bar change.
const REFRESH: Duration = Duration::from_millis(100);

/// Prints one JSON object on a line of its own.
///
/// # Errors
/// When nobody takes the output.
pub(crate) fn json(value: &impl Serialize) -> io::Result<()> {
    let mut text = serde_json::to_string(value)?;
    text.push('\n');
    print(&text)
}

/// Prints a line.
///
/// # Errors
/// When nobody takes the output.
pub(crate) fn line(text: &str) -> io::Result<()> {
    print(&format!("{text}\n"))
}

/// Prints in one piece and at once: somebody may be waiting for the line.
fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Tells people something beside the result.
pub(crate) fn note(text: &str) {
    // Nobody reads it, then: that must not fail what is being done.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Asks a question that takes yes or no. `None` when there is no terminal, so that nobody can answer.
///
/// It blocks. The answer is read by a thread of its own in [`crate::fetch`].
pub(crate) fn ask(question: &str) -> Option<io::Result<bool>> {
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        return None;
    }
    let answer = || {
        let mut out = io::stderr().lock();
        write!(out, "{question} [y/N] ")?;
        out.flush()?;
        drop(out);
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
    };
    Some(answer())
}

/// Digits in groups of three, for people.
pub(crate) fn grouped(number: u128) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3 + 1);
    for (at, digit) in digits.char_indices() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// An amount in groups of three digits, for people.
pub(crate) fn amount(amount: Amount) -> String {
    grouped(amount.units())
}

/// Bytes as `sha256sum` shows them.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Milliseconds with their thousandths.
pub(crate) fn millis(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

/// A price, for people.
pub(crate) fn price(price: &Price) -> String {
    let mut parts = Vec::new();
    if !price.call.is_zero() {
        parts.push(format!("{} a call", price.call));
    }
    parts.extend(price.max.map(|max| format!("up to {max} a call, as it says")));
    if !price.item.is_zero() {
        parts.push(format!("{} an item", price.item));
    }
    parts.extend(price.bytes_out.map(|rate| format!("{rate} received")));
    parts.extend(price.bytes_in.map(|rate| format!("{rate} sent")));
    if parts.is_empty() { "free".to_owned() } else { parts.join(" + ") }
}

/// Terms, for people to decide on.
pub(crate) fn terms(terms: &Terms) -> String {
    let mut rows = vec![("payee", terms.payee.to_string()), ("service", terms.service.clone())];
    for method in &terms.methods {
        rows.push(("price", format!("{}: {}", method.name, price(&method.price))));
    }
    rows.push(("deposit", format!("at least {}, {} suggested", terms.minimum_deposit, terms.suggested_deposit)));
    rows.push(("token", terms.token.to_string()));
    rows.push(("escrow", format!("{} on chain {}", terms.escrow, terms.chain_id)));
    if let Some(url) = &terms.ledger_url {
        rows.push(("ledger", url.clone()));
    }
    table(&rows)
}

/// Rows of a label and a text. Nothing of a peer's can move the cursor of the terminal.
pub(crate) fn table(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(label, _)| label.len()).max().unwrap_or_default();
    let clean = |text: &str| text.chars().map(|char| if char.is_control() { '?' } else { char }).collect::<String>();
    let rows: Vec<String> = rows.iter().map(|(label, text)| format!("  {label:width$}  {}", clean(text))).collect();
    rows.join("\n")
}

/// Rows of cells under each other, the first of them the header. Nothing of a peer's can move the cursor of the terminal.
pub(crate) fn columns(rows: &[Vec<String>]) -> String {
    let clean = |text: &str| text.chars().map(|char| if char.is_control() { '?' } else { char }).collect::<String>();
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let widths: Vec<usize> = (0..columns)
        .map(|at| rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count()).max().unwrap_or_default())
        .collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{:width$}", clean(cell)));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// A bar with what is done and at what rate; nothing where nobody looks.
#[derive(Debug)]
pub(crate) struct Progress {
    bar: ProgressBar,
    refreshed: Option<Instant>,
}

impl Progress {
    /// A bar for so many bytes on standard error, if that is a terminal.
    pub(crate) fn new(bytes: u64, shown: bool) -> Self {
        if !shown {
            return Progress { bar: ProgressBar::hidden(), refreshed: None };
        }
        let bar = ProgressBar::new(bytes);
        let style = ProgressStyle::with_template("{bar:24} {bytes}/{total_bytes} {bytes_per_sec} {eta} {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Progress { bar, refreshed: None }
    }

    /// A bar for so long a time on standard error, if that is a terminal.
    pub(crate) fn over(time: Duration) -> Self {
        let bar = ProgressBar::new(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        let style = ProgressStyle::with_template("{bar:24} {percent:>3} % {msg}");
        bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
        Progress { bar, refreshed: None }
    }

    /// So much of the time has passed.
    pub(crate) fn reach(&mut self, passed: Duration, message: impl FnOnce() -> String) {
        let passed = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX);
        self.advance(passed.saturating_sub(self.bar.position()), message);
    }

    /// So many more bytes; `message` is asked now and then.
    pub(crate) fn advance(&mut self, bytes: u64, message: impl FnOnce() -> String) {
        self.bar.inc(bytes);
        if !self.bar.is_hidden() && self.refreshed.is_none_or(|at| at.elapsed() >= REFRESH) {
            self.refreshed = Some(Instant::now());
            self.bar.set_message(message());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digits_are_grouped_by_three() {
        let shown = [0, 12, 123, 1_234, 123_456, 1_234_567].map(grouped);
        assert_eq!(shown, ["0", "12", "123", "1,234", "123,456", "1,234,567"]);
    }

    #[test]
    fn columns_stand_under_each_other() {
        let rows = [["a", "long", "x"], ["wide", "b", "\x07"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(columns(&rows), "a     long  x\nwide  b     ?");
    }

    #[test]
    fn a_table_carries_no_control_characters() {
        let table = table(&[("a", "x\x1b[2J\ny".to_owned()), ("label", "z".to_owned())]);
        assert_eq!(table, "  a      x?[2J?y\n  label  z");
    }
}
