//! What people and programs read: tables, goals and JSON lines on standard output.

use std::io::{self, Write};

use serde::{Deserialize, Serialize};

use crate::goals;
use crate::workload::{Reading, Workload, answers, beside};

/// Whom the others are compared with.
pub(crate) const OURS: &str = "tollway";

/// One metric of one contender in one workload, over all rounds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Cell {
    pub(crate) workload: String,
    pub(crate) peer: String,
    pub(crate) metric: String,
    pub(crate) unit: String,
    pub(crate) median: f64,
    pub(crate) min: f64,
    pub(crate) max: f64,
    /// Rounds in which it was measured.
    pub(crate) rounds: usize,
}

impl Cell {
    /// The figure of a cell of one round.
    pub(crate) fn into_reading(self) -> Reading {
        Reading { metric: self.metric, unit: self.unit, value: self.median }
    }
}

/// All figures so far, in the order in which they came.
#[derive(Debug, Default)]
pub(crate) struct Results {
    series: Vec<Series>,
}

#[derive(Debug)]
struct Series {
    workload: Workload,
    peer: &'static str,
    metric: String,
    unit: String,
    values: Vec<f64>,
}

impl Results {
    pub(crate) fn len(&self) -> usize {
        self.series.len()
    }

    pub(crate) fn add(&mut self, workload: Workload, peer: &'static str, readings: Vec<Reading>) {
        for Reading { metric, unit, value } in readings {
            match self.series.iter_mut().find(|one| one.is(workload, peer, &metric)) {
                Some(series) => series.values.push(value),
                None => self.series.push(Series { workload, peer, metric, unit, values: vec![value] }),
            }
        }
    }

    /// The cells from the `first` one on.
    pub(crate) fn cells(&self, first: usize) -> impl Iterator<Item = Cell> {
        self.series.iter().skip(first).map(Series::cell)
    }

    pub(crate) fn cell(&self, workload: Workload, peer: &str, metric: &str) -> Option<Cell> {
        self.series.iter().find(|one| one.is(workload, peer, metric)).map(Series::cell)
    }

    /// Different ones of a workload, in their order.
    fn distinct<'a>(&'a self, workload: Workload, of: impl Fn(&'a Series) -> &'a str) -> Vec<&'a str> {
        let mut all = Vec::new();
        for one in self.series.iter().filter(|one| one.workload == workload) {
            if !all.contains(&of(one)) {
                all.push(of(one));
            }
        }
        all
    }
}

impl Series {
    fn is(&self, workload: Workload, peer: &str, metric: &str) -> bool {
        (self.workload, self.peer, self.metric.as_str()) == (workload, peer, metric)
    }

    fn cell(&self) -> Cell {
        let mut sorted = self.values.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let upper = sorted.len() / 2;
        let lower = sorted.len().saturating_sub(1) / 2;
        Cell {
            workload: self.workload.name(),
            peer: self.peer.to_owned(),
            metric: self.metric.clone(),
            unit: self.unit.clone(),
            median: f64::midpoint(sorted[lower], sorted[upper]),
            min: sorted[0],
            max: sorted[sorted.len() - 1],
            rounds: sorted.len(),
        }
    }
}

/// Prints each cell on a line of its own.
pub(crate) fn json(cells: impl Iterator<Item = Cell>) -> io::Result<()> {
    let mut text = String::new();
    for cell in cells {
        text += &serde_json::to_string(&cell)?;
        text.push('\n');
    }
    print(&text)
}

/// Prints the table of a workload.
pub(crate) fn section(results: &Results, workload: Workload) -> io::Result<()> {
    print(&render(results, workload))
}

/// Prints which goals the run has reached.
pub(crate) fn goals(results: &Results) -> io::Result<()> {
    let lines: Vec<String> = goals::all().iter().filter_map(|goal| goal.evaluate(results)).collect();
    if lines.is_empty() { Ok(()) } else { print(&format!("goals\n  {}\n", lines.join("\n  "))) }
}

/// Prints in one piece and at once: somebody may be waiting for the line.
fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

fn render(results: &Results, workload: Workload) -> String {
    let mut text = format!("{}: {}\n", workload.name(), workload.title());
    let peers = results.distinct(workload, |one| one.peer);
    let metrics = results.distinct(workload, |one| &one.metric);
    let shown: Vec<_> = metrics.into_iter().filter(|metric| !metric.starts_with("answers")).collect();
    // Side by side, three at most; beside each number of unread streams there are two.
    for metrics in shown.chunks(if workload == Workload::Isolation { 2 } else { 3 }) {
        text += &aligned(&block(results, workload, &peers, metrics));
    }
    for unread in [0, 1, 8] {
        for peer in &peers {
            let Some(answered) = results.cell(workload, peer, &answers(unread)) else { continue };
            let echoes = results.cell(workload, peer, &beside(unread)[0]).map_or(0, |cell| cell.rounds);
            if echoes < answered.rounds {
                let rounds = answered.rounds;
                text += &format!("  {peer}: an answer beside {unread} unread in {echoes} of {rounds} rounds\n");
            }
        }
    }
    text.push('\n');
    text
}

/// Rows of cells: a headline for each metric, what its columns are, and the peers.
fn block(results: &Results, workload: Workload, peers: &[&str], metrics: &[&str]) -> Vec<Vec<String>> {
    let (mut head, mut columns) = (vec![String::new()], vec![String::new()]);
    for metric in metrics {
        let unit = peers.iter().find_map(|peer| results.cell(workload, peer, metric)).map(|cell| cell.unit);
        head.extend([format!("{metric}, {}", unit.unwrap_or_default()), String::new(), String::new()]);
        columns.extend(["median", "min–max", "tollway/it"].map(str::to_owned));
    }
    let mut rows = vec![head, columns];
    for peer in peers {
        let mut row = vec![(*peer).to_owned()];
        for metric in metrics {
            let ours = results.cell(workload, OURS, metric);
            row.extend(match (results.cell(workload, peer, metric), ours) {
                (None, _) => ["–".to_owned(), String::new(), String::new()],
                (Some(cell), ours) => {
                    let range = format!("{}–{}", figure(cell.min), figure(cell.max));
                    let ratio = ours.filter(|_| *peer != OURS).map(|ours| ratio(ours.median, cell.median));
                    [figure(cell.median), range, ratio.unwrap_or_default()]
                }
            });
        }
        rows.push(row);
    }
    rows
}

/// Lines with columns flushed right, but for the first.
fn aligned(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |text: &str| text.chars().count();
    let widths: Vec<usize> = (0..columns)
        .map(|at| rows.iter().filter_map(|row| row.get(at)).map(|cell| width(cell)).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::from(" ");
        for (at, (cell, room)) in row.iter().zip(&widths).enumerate() {
            let gap = " ".repeat(room - width(cell));
            line += &if at == 0 { format!(" {cell}{gap}") } else { format!("  {gap}{cell}") };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

/// Three significant digits or more, thousands apart.
pub(crate) fn figure(value: f64) -> String {
    match value.abs() {
        size if size < 10.0 => format!("{value:.2}"),
        size if size < 100.0 => format!("{value:.1}"),
        size if size < 1000.0 => format!("{value:.0}"),
        size => {
            let digits = format!("{size:.0}");
            let mut text = String::from(if value < 0.0 { "-" } else { "" });
            for (at, digit) in digits.chars().enumerate() {
                if at > 0 && (digits.len() - at).is_multiple_of(3) {
                    text.push(',');
                }
                text.push(digit);
            }
            text
        }
    }
}

/// How often the second is in the first.
pub(crate) fn ratio(first: f64, second: f64) -> String {
    format!("{:.2}x", first / second)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Results with one value for each of these.
    pub(crate) fn results(cells: &[(Workload, &'static str, &str, f64)]) -> Results {
        let mut results = Results::default();
        for (workload, peer, metric, value) in cells {
            results.add(*workload, peer, vec![Reading::new(*metric, "µs", *value)]);
        }
        results
    }

    #[test]
    fn a_cell_is_the_median_with_its_spread() {
        let seq = Workload::UnarySeq64;
        let mut results = results(&[(seq, "h2", "p50", 9.0), (seq, "h2", "p50", 1.0), (seq, "h2", "p50", 4.0)]);
        let cell = results.cell(seq, "h2", "p50").expect("it was measured");
        assert_eq!((cell.min, cell.median, cell.max, cell.rounds), (1.0, 4.0, 9.0, 3));
        results.add(seq, "h2", vec![Reading::new("p50", "µs", 5.0)]);
        assert_eq!(results.cell(seq, "h2", "p50").map(|cell| cell.median), Some(4.5));
        assert_eq!(results.cell(seq, "h2", "p99"), None);
    }

    #[test]
    fn a_cell_is_a_line_of_json_with_the_documented_names() {
        let results = results(&[(Workload::Stream4k, "tonic", "rate", 1.5)]);
        let cell = results.cells(0).next().expect("one cell");
        let text = serde_json::to_string(&cell).expect("plain values");
        let expected = r#"{"workload":"stream-4k","peer":"tonic","metric":"rate","unit":"µs","median":1.5,"min":1.5,"max":1.5,"rounds":1}"#;
        assert_eq!(text, expected);
    }

    #[test]
    fn figures_are_short_and_grouped() {
        let shown = [0.0, 4.126, 12.34, 123.4, 1234.4, -1_234_567.0].map(figure);
        assert_eq!(shown, ["0.00", "4.13", "12.3", "123", "1,234", "-1,234,567"]);
    }

    #[test]
    fn a_table_compares_each_peer_with_ours() {
        let flight = Workload::Unary64x64;
        let results = results(&[(flight, "tollway", "rate", 800.0), (flight, "tarpc", "rate", 400.0)]);
        let expected = "unary-64x64: Unary echo of 64 bytes, 64 in flight on one session\n           rate, µs\n             median  \
                        min–max  tollway/it\n  tollway       800  800–800\n  tarpc         400  400–400       2.00x\n\n";
        assert_eq!(render(&results, flight), expected);
    }

    #[test]
    fn an_echo_that_never_came_is_told() {
        let isolation = Workload::Isolation;
        let results = results(&[
            (isolation, "h2", "p50-1", 9.0),
            (isolation, "h2", "answers-1", 1.0),
            (isolation, "h2", "answers-8", 0.0),
        ]);
        let text = render(&results, isolation);
        assert!(text.contains("h2: an answer beside 8 unread in 0 of 1 rounds"), "{text}");
        assert!(!text.contains("beside 1 unread"), "{text}");
    }
}
