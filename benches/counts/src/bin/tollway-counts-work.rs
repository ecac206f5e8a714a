//! Does the work of a workload, to be run below valgrind: `tollway-counts-work WORKLOAD UNITS`.

use std::error::Error;
use std::hint::black_box;

use clap::Parser;
use tollway_counts::{Workload, run};

/// Does the work of a workload.
#[derive(Parser)]
struct Arguments {
    workload: Workload,
    units: u64,
}

/// Valgrind counts from where it enters this function to where it leaves it, and knows it by its name.
#[inline(never)]
fn counted_section(work: &mut dyn FnMut()) {
    work();
    // No tail call: the function is left when the work is done.
    black_box(());
}

fn main() -> Result<(), Box<dyn Error>> {
    let Arguments { workload, units } = Arguments::parse();
    Ok(run(workload, units, counted_section)?)
}
