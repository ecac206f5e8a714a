//! `benches/counts.sh`: counts what each call and each item costs, and compares it with what was recorded.
//!
//! Instructions are those of both sides in user space, by valgrind's callgrind: they don't move with the load of the
//! machine. Allocations are those of both sides, growing buffers included. The record, `benches/counts/record.json`, is
//! part of the repository: who changes a count changes the record in the same commit.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod callgrind;
mod programs;
mod record;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use tollway_counts::Workload;

use callgrind::Profile;
use programs::{Failure, Programs};
use record::{Counts, Record, Table};

/// Counts instructions and allocations for each call and each item, and compares them with the record.
#[derive(Parser)]
#[command(name = "benches/counts.sh", after_help = HELP)]
struct Arguments {
    /// What to count; everything if nothing is named.
    workloads: Vec<Workload>,
    /// Record what was counted.
    #[arg(long, conflicts_with = "profile")]
    record: bool,
    /// Show where the instructions go, by function, and compare nothing.
    #[arg(long)]
    profile: bool,
    /// Where the record is.
    #[arg(long, value_name = "FILE", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/record.json"))]
    file: PathBuf,
}

const HELP: &str = "\
Examples:
  benches/counts.sh                    the table; fails if a count grew by more than 10 %
  benches/counts.sh --record           the same, and record the counts
  benches/counts.sh --profile unary    where the instructions of a call go

Exit codes: 0 no count grew by more than 10 %, 1 one did, 2 nothing could be counted.";

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(failure) => {
            eprintln!("counts: {failure}");
            ExitCode::from(2)
        }
    }
}

/// Returns whether all is within what was recorded.
fn run(arguments: &Arguments) -> Result<bool, Failure> {
    let programs = Programs::beside_this_one()?;
    let all = arguments.workloads.is_empty();
    let workloads = if all { Workload::ALL.to_vec() } else { arguments.workloads.clone() };
    if arguments.profile {
        for workload in workloads {
            println!("{}", Profile::take(&programs, workload)?);
        }
        return Ok(true);
    }
    let mut counted = Vec::new();
    for workload in workloads {
        let instructions = callgrind::count(&programs, workload)?;
        let allocations = programs.allocations(workload)?;
        counted.push((workload.name(), Counts::new(workload.units(), instructions, allocations)));
    }
    let before = Record::read(&arguments.file)?;
    let table = Table::new(&counted, &before);
    println!("{table}");
    if arguments.record {
        // Of what was not counted now, the record stands.
        let kept = if all { Record::default() } else { before };
        kept.with(&counted, programs.compiler()?).write(&arguments.file)?;
        println!("\nrecorded in {}", arguments.file.display());
        return Ok(true);
    }
    if let Some(complaint) = table.complaint(&before) {
        eprintln!("\n{complaint}");
        return Ok(false);
    }
    Ok(true)
}
