//! Does the work of a workload and prints how often it allocated: `tollway-counts-allocations WORKLOAD UNITS`.
#![allow(clippy::print_stdout)]

use std::alloc::System;
use std::error::Error;

use clap::Parser;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use tollway_counts::{Workload, run};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Counts the allocations of a workload.
#[derive(Parser)]
struct Arguments {
    workload: Workload,
    units: u64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let Arguments { workload, units } = Arguments::parse();
    let counted = run(workload, units, |work| {
        let region = Region::new(ALLOCATOR);
        work();
        region.change()
    })?;
    // A buffer that grows asks the allocator anew, whether or not it is moved.
    println!("{}", counted.allocations + counted.reallocations);
    Ok(())
}
