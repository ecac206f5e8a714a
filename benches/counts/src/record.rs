//! What was recorded, and how what was counted now compares with it.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::programs::Failure;

/// Growth of a count, as a factor, above which the comparison fails.
const TOLERANCE: f64 = 1.1;
/// Allocations for each unit that may come without being a growth: for items, of which hundreds share one, a tenth of
/// the count is next to nothing.
const ALLOCATION_SLACK: f64 = 0.02;

/// What one unit of a workload costs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub(crate) struct Counts {
    pub(crate) instructions: f64,
    pub(crate) allocations: f64,
}

impl Counts {
    /// Of the counts of so many units, with no more digits than they repeat.
    pub(crate) fn new(units: u64, instructions: u64, allocations: u64) -> Self {
        let of_one = |count: u64, digits: f64| (count as f64 / units as f64 * digits).round() / digits;
        Counts { instructions: of_one(instructions, 1.0), allocations: of_one(allocations, 1e3) }
    }
}

/// The counts that were recorded, and what they depend on beside the code.
#[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    arch: String,
    compiler: String,
    counts: BTreeMap<String, Counts>,
}

impl Record {
    /// Reads the record; one that does not exist is empty.
    pub(crate) fn read(path: &Path) -> Result<Self, Failure> {
        match std::fs::read(path) {
            Ok(text) => {
                serde_json::from_slice(&text).map_err(|source| Failure::Record { path: path.to_owned(), source })
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Record::default()),
            Err(source) => Err(Failure::File { path: path.to_owned(), source }),
        }
    }

    pub(crate) fn with(mut self, counted: &[(&str, Counts)], compiler: String) -> Self {
        (self.arch, self.compiler) = (std::env::consts::ARCH.to_owned(), compiler);
        self.counts.extend(counted.iter().map(|(name, counts)| ((*name).to_owned(), *counts)));
        self
    }

    pub(crate) fn write(&self, path: &Path) -> Result<(), Failure> {
        let text = serde_json::to_string_pretty(self);
        let text = text.map_err(|source| Failure::Record { path: path.to_owned(), source })? + "\n";
        std::fs::write(path, text).map_err(|source| Failure::File { path: path.to_owned(), source })
    }

    /// What was recorded of a workload, on a machine of this kind: others have other instructions.
    fn of(&self, name: &str) -> Option<Counts> {
        self.counts.get(name).copied().filter(|_| self.arch == std::env::consts::ARCH)
    }
}

/// What was counted, beside what was recorded.
pub(crate) struct Table<'a> {
    rows: Vec<(&'a str, Counts, Option<Counts>)>,
}

impl<'a> Table<'a> {
    pub(crate) fn new(counted: &[(&'a str, Counts)], record: &Record) -> Self {
        Table { rows: counted.iter().map(|(name, counts)| (*name, *counts, record.of(name))).collect() }
    }

    /// What has grown by more than is tolerated, or was never recorded.
    pub(crate) fn complaint(&self, record: &Record) -> Option<String> {
        if !record.arch.is_empty() && record.arch != std::env::consts::ARCH {
            // There is nothing to compare with, and this is no fault of the change.
            return None;
        }
        let wrong: Vec<String> = self.rows.iter().filter_map(complain).collect();
        if wrong.is_empty() {
            return None;
        }
        Some(format!(
            "{}\n\nIf that is meant, run benches/counts.sh --record and put benches/counts/record.json into the same \
             commit, with the reason in its message. If it is not, benches/counts.sh --profile WORKLOAD shows where the \
             instructions go. The record was made with {}.",
            wrong.join("\n"),
            if record.compiler.is_empty() { "nothing yet" } else { &record.compiler }
        ))
    }
}

fn complain((name, now, recorded): &(&str, Counts, Option<Counts>)) -> Option<String> {
    let Some(recorded) = recorded else { return Some(format!("{name}: it is not in the record")) };
    if now.instructions > recorded.instructions * TOLERANCE {
        let (now, recorded) = (now.instructions, recorded.instructions);
        return Some(format!("{name}: {now} instructions, more than 10 % above the recorded {recorded}"));
    }
    if now.allocations > recorded.allocations * TOLERANCE + ALLOCATION_SLACK {
        let (now, recorded) = (now.allocations, recorded.allocations);
        return Some(format!("{name}: {now} allocations, more than 10 % above the recorded {recorded}"));
    }
    None
}

impl fmt::Display for Table<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = ["instructions", "recorded", "change", "allocations", "recorded", "change"];
        write!(f, "{:16}", "for each")?;
        columns.iter().try_for_each(|column| write!(f, " {column:>12}"))?;
        for (name, now, recorded) in &self.rows {
            write!(f, "\n{name:16}")?;
            cells(f, 0, now.instructions, recorded.map(|recorded| recorded.instructions))?;
            cells(f, 3, now.allocations, recorded.map(|recorded| recorded.allocations))?;
        }
        Ok(())
    }
}

fn cells(f: &mut fmt::Formatter<'_>, digits: usize, now: f64, recorded: Option<f64>) -> fmt::Result {
    write!(f, " {now:>12.digits$}")?;
    match recorded {
        None => write!(f, " {:>12} {:>12}", "-", "-"),
        Some(recorded) => {
            let change = if recorded > 0.0 { 100.0 * (now / recorded - 1.0) } else { 0.0 };
            write!(f, " {recorded:>12.digits$} {:>12}", format!("{change:+.1} %"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(instructions: f64, allocations: f64) -> Record {
        Record::default().with(&[("unary", Counts { instructions, allocations })], "rustc".to_owned())
    }

    fn complaint(instructions: f64, allocations: f64, record: &Record) -> Option<String> {
        Table::new(&[("unary", Counts { instructions, allocations })], record).complaint(record)
    }

    #[test]
    fn a_tenth_more_is_tolerated_and_no_more() {
        let record = recorded(1000.0, 10.0);
        assert_eq!(complaint(1100.0, 11.0, &record), None);
        let instructions = complaint(1101.0, 10.0, &record).expect("they grew");
        assert!(instructions.contains("1101 instructions") && instructions.contains("--record"), "{instructions}");
        assert!(complaint(1000.0, 11.1, &record).expect("they grew").contains("11.1 allocations"));
        assert_eq!(complaint(500.0, 5.0, &record), None);
    }

    #[test]
    fn items_that_share_an_allocation_may_share_it_with_a_few_less() {
        let record = recorded(1000.0, 0.01);
        assert_eq!(complaint(1000.0, 0.02, &record), None);
        assert!(complaint(1000.0, 1.0, &record).is_some());
    }

    #[test]
    fn what_was_never_recorded_fails_and_another_machine_is_not_compared() {
        assert!(complaint(1.0, 1.0, &Record::default()).expect("no record").contains("unary"));
        let elsewhere = Record { arch: "another".to_owned(), ..recorded(1.0, 1.0) };
        assert_eq!(complaint(1000.0, 10.0, &elsewhere), None);
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let record = recorded(1234.0, 0.125);
        record.write(file.path()).expect("it is written");
        assert_eq!(Record::read(file.path()).expect("it is read"), record);
        let missing = file.path().with_extension("none");
        assert_eq!(Record::read(&missing).expect("nothing is recorded"), Record::default());
        std::fs::write(file.path(), "{}").expect("it is written");
        assert!(matches!(Record::read(file.path()), Err(Failure::Record { .. })));
    }
}
