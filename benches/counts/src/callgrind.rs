//! Instructions, by valgrind's callgrind: all of them, and by function.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;
use std::process::Command;

use tempfile::NamedTempFile;
use tollway_counts::Workload;

use crate::programs::{Failure, Programs, output};

/// Counts are of what this function of `tollway-counts-work` does.
const SECTION: &str = "--toggle-collect=tollway_counts_work::counted_section*";
/// Attempts to count: one fails if the machine stood still while a handler ran.
const ATTEMPTS: u32 = 3;
/// Functions of a profile that are shown.
const SHOWN: usize = 40;
/// A share of all instructions from which a function only leads to the others, as `main` does.
const FRAME: f64 = 0.999;

/// Instructions of all units of a workload.
pub(crate) fn count(programs: &Programs, workload: Workload) -> Result<u64, Failure> {
    let file = collect(programs, workload)?;
    let path = file.path();
    let text = std::fs::read_to_string(path).map_err(|source| Failure::File { path: path.to_owned(), source })?;
    let totals = text.lines().rev().find_map(|line| line.strip_prefix("totals: "));
    // Zero: the section was not found.
    let total = totals.and_then(|total| total.trim().parse().ok()).filter(|total| *total > 0);
    total.ok_or_else(|| Failure::NotUnderstood {
        program: "callgrind".to_owned(),
        output: totals.unwrap_or("").to_owned(),
    })
}

/// Runs the workload below callgrind. What it collected is in the file.
fn collect(programs: &Programs, workload: Workload) -> Result<NamedTempFile, Failure> {
    let made = NamedTempFile::new();
    let file = made.map_err(|source| Failure::File { path: std::env::temp_dir(), source })?;
    let mut out = std::ffi::OsString::from("--callgrind-out-file=");
    out.push(file.path());
    let mut attempt = 1;
    loop {
        let mut command = Command::new("valgrind");
        command.args(["--tool=callgrind", "--collect-atstart=no", SECTION]).arg(&out);
        command.arg(programs.work()).args([workload.name(), &workload.units().to_string()]);
        match output(&mut command) {
            Ok(_) => return Ok(file),
            Err(Failure::Failed { .. }) if attempt < ATTEMPTS => attempt += 1,
            Err(failure) => return Err(failure),
        }
    }
}

/// Where the instructions of a workload go.
pub(crate) struct Profile {
    workload: Workload,
    own: Vec<(String, u64)>,
    inclusive: Vec<(String, u64)>,
}

impl Profile {
    pub(crate) fn take(programs: &Programs, workload: Workload) -> Result<Self, Failure> {
        let file = collect(programs, workload)?;
        // A function that others were inlined into has a line for each of their files: these are parts of its own
        // instructions, while each of the inclusive ones may be nearly all of it.
        let own = by_function(&annotate(file.path(), "no")?, |sum, part| sum + part);
        let mut inclusive = by_function(&annotate(file.path(), "yes")?, u64::max);
        let all: u64 = own.iter().map(|(_, instructions)| instructions).sum();
        inclusive.retain(|(_, instructions)| (*instructions as f64) < all as f64 * FRAME);
        Ok(Profile { workload, own, inclusive })
    }
}

fn annotate(file: &Path, inclusive: &str) -> Result<String, Failure> {
    let inclusive = format!("--inclusive={inclusive}");
    output(Command::new("callgrind_annotate").args(["--threshold=100", "--auto=no", &inclusive]).arg(file))
}

/// The functions in what callgrind_annotate printed, with the most instructions first.
fn by_function(annotated: &str, join: impl Fn(u64, u64) -> u64) -> Vec<(String, u64)> {
    let mut functions: HashMap<&str, u64> = HashMap::new();
    for (instructions, function) in annotated.lines().filter_map(parse) {
        let sum = functions.entry(function).or_default();
        *sum = join(*sum, instructions);
    }
    let mut functions: Vec<_> = functions.into_iter().map(|(name, sum)| (name.to_owned(), sum)).collect();
    functions.sort_by(|(left, more), (right, less)| less.cmp(more).then_with(|| left.cmp(right)));
    functions
}

/// A line such as `1,918,000 ( 3.59%)  src/driver.rs:tollway::driver::poll [/target/release/tollway-counts-work]`.
fn parse(line: &str) -> Option<(u64, &str)> {
    let (count, rest) = line.split_once('(')?;
    let count = count.trim().replace(',', "").parse().ok()?;
    let (_share, rest) = rest.split_once(')')?;
    let (_file, function) = rest.trim().split_once(':')?;
    let end = function.rfind(" [/").unwrap_or(function.len());
    Some((count, function.get(..end)?))
}

impl fmt::Display for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = self.workload.units() as f64;
        let all: u64 = self.own.iter().map(|(_, own)| own).sum();
        for (title, functions) in [("its own", &self.own), ("with what it calls", &self.inclusive)] {
            writeln!(f, "{}: instructions of each function, {title}, for each unit", self.workload.name())?;
            for (name, instructions) in functions.iter().take(SHOWN) {
                let share = 100.0 * *instructions as f64 / all.max(1) as f64;
                writeln!(f, "{:10.1} {share:6.2} %  {name}", *instructions as f64 / units)?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_a_function_are_joined_and_sorted() {
        let annotated = "\
--------------------------------------------------------------------------------
53,408,487 (100.0%)  PROGRAM TOTALS
1,918,000 ( 3.59%)  src/driver.rs:<tollway::Driver<R,W> as Future>::poll [/release/work]
2,000,000 ( 3.74%)  ./malloc/malloc.c:malloc [/usr/lib/libc.so.6]
  306,018 ( 2.45%)  /rust/deps/vec.rs:<tollway::Driver<R,W> as Future>::poll
";
        let (driver, malloc) = ("<tollway::Driver<R,W> as Future>::poll".to_owned(), "malloc".to_owned());
        let own = by_function(annotated, |sum, part| sum + part);
        assert_eq!(own, [(driver.clone(), 2_224_018), (malloc.clone(), 2_000_000)]);
        assert_eq!(by_function(annotated, u64::max), [(malloc, 2_000_000), (driver, 1_918_000)]);
    }
}
