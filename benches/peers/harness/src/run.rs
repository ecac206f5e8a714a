//! The command line, and the rounds.

use std::io::{self, IsTerminal, Write};
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use clap::error::ErrorKind;
use clap::{CommandFactory, FromArgMatches, Parser};

use crate::measure::{Contender, Setting};
use crate::output::{self, Cell, Results};
use crate::peer::{Result, ensure};
use crate::workload::{Reading, Workload};

/// Measures Tollway beside its peers: one session each, both ends in this process, over loopback.
///
/// Every round measures all contenders in turn, each in a runtime of its own with two workers for client and server
/// together. A figure is the median of the rounds, with the lowest and the highest. Absolute figures move from machine to machine
/// and with its load: compare within a run.
#[derive(Debug, Parser)]
#[command(
    version,
    after_help = "Examples:\n  tollway-peers                        everything, as a table, and the goals\n  \
                  tollway-peers unary-64x64 stream-64  two workloads\n  \
                  tollway-peers isolation --peer tollway --peer quinn --json"
)]
struct Arguments {
    /// What to measure; everything if none is named
    #[arg(value_enum, value_name = "WORKLOAD")]
    workloads: Vec<Workload>,
    /// Only this contender; may be given several times
    #[arg(long = "peer", value_name = "NAME")]
    peers: Vec<String>,
    /// One JSON object on a line for each figure, and no table
    #[arg(long)]
    json: bool,
    /// Rounds, of which the median is taken
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Milliseconds to measure, for each contender and round; warming up comes on top
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=60_000))]
    millis: u64,
    /// Client and server on a runtime each, with one worker; the goals are for one runtime and not told
    #[arg(long)]
    split: bool,
    /// Takes roam along: the binary of benches/peers-roam, which cannot be linked into this one
    #[arg(long, value_name = "PATH")]
    roam: Option<PathBuf>,
}

/// A contender here, or in a binary that measures it in the same way.
enum Source {
    Here(Contender),
    There(&'static str, PathBuf),
}

impl Source {
    fn name(&self) -> &'static str {
        match self {
            Source::Here(contender) => contender.name,
            Source::There(name, _) => name,
        }
    }

    /// One round, or `None` if it doesn't take part.
    fn round(&self, workload: Workload, setting: Setting) -> Result<Option<Vec<Reading>>> {
        match self {
            Source::Here(contender) => {
                contender.part(workload.kind()).map(|part| part(setting, workload.kind())).transpose()
            }
            Source::There(_, path) => round_there(path, workload, setting).map(Some),
        }
    }
}

/// Has another binary measure one round.
fn round_there(path: &PathBuf, workload: Workload, setting: Setting) -> Result<Vec<Reading>> {
    let millis = setting.time.as_millis().to_string();
    let mut command = Command::new(path);
    command.args([workload.name().as_str(), "--json", "--rounds", "1", "--millis", &millis]);
    command.args(setting.split.then_some("--split"));
    let output = command.output().map_err(|error| format!("cannot run {}: {error}", path.display()))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure(output.status.success(), || format!("{} failed: {}", path.display(), said.trim()))?;
    String::from_utf8(output.stdout)?
        .lines()
        .map(|line| Ok(serde_json::from_str::<Cell>(line)?.into_reading()))
        .collect()
}

/// The `main` of the binary of this name, with these contenders in the order of the table.
pub fn run(binary: &'static str, contenders: Vec<Contender>) -> ExitCode {
    let command = Arguments::command().name(binary);
    let arguments = match Arguments::from_arg_matches(&command.clone().get_matches()) {
        Ok(arguments) => arguments,
        Err(error) => error.exit(),
    };
    let mut sources: Vec<Source> = contenders.into_iter().map(Source::Here).collect();
    sources.extend(arguments.roam.clone().map(|path| Source::There("roam", path)));
    let names: Vec<_> = sources.iter().map(Source::name).collect();
    if let Some(unknown) = arguments.peers.iter().find(|peer| !names.contains(&peer.as_str())) {
        let text = format!("no peer is called '{unknown}'; there are {}", names.join(", "));
        command.clone().error(ErrorKind::InvalidValue, text).exit();
    }
    if !arguments.peers.is_empty() {
        sources.retain(|source| arguments.peers.iter().any(|peer| peer == source.name()));
    }
    match measure(&arguments, &sources) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_failed) => ExitCode::FAILURE,
        // Who closed the output wants no more of it.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(error) => {
            note(&format!("error: {error}"));
            ExitCode::FAILURE
        }
    }
}

/// Measures and prints; how many rounds failed.
fn measure(arguments: &Arguments, sources: &[Source]) -> io::Result<usize> {
    let setting = Setting { time: Duration::from_millis(arguments.millis), split: arguments.split };
    let named = |workload: &&Workload| arguments.workloads.is_empty() || arguments.workloads.contains(workload);
    let workloads: Vec<_> = Workload::all().iter().filter(named).copied().collect();
    let (mut results, mut failed) = (Results::default(), 0);
    let began = Instant::now();
    for (at, &workload) in workloads.iter().enumerate() {
        let first = results.len();
        for round in 1..=arguments.rounds {
            for source in sources {
                let so_far = format!("{:4} s  {} of {}", began.elapsed().as_secs(), at + 1, workloads.len());
                let (name, peer, rounds) = (workload.name(), source.name(), arguments.rounds);
                progress(&format!("{so_far}: {name}, round {round} of {rounds}, {peer}"));
                match source.round(workload, setting) {
                    Ok(readings) => results.add(workload, peer, readings.unwrap_or_default()),
                    Err(error) => {
                        failed += 1;
                        progress("");
                        note(&format!("{peer} failed in {name}, round {round}: {error}"));
                    }
                }
            }
        }
        progress("");
        if arguments.json {
            output::json(results.cells(first))?;
        } else {
            output::section(&results, workload)?;
        }
    }
    if !arguments.json && !arguments.split {
        output::goals(&results)?;
    }
    Ok(failed)
}

/// A line on standard error that the next one takes the place of. Nothing where nobody looks.
fn progress(text: &str) {
    let mut out = io::stderr().lock();
    if out.is_terminal() {
        // Nobody reads it, then: that must not fail what is being measured.
        let _ = write!(out, "\r\x1b[K{text}").and_then(|()| out.flush());
    }
}

/// Tells people something beside the result.
fn note(text: &str) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}
