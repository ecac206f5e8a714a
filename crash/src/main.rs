//! `tollway-crash`: kills payee, payer and ledger at their worst instants, and compares all books after each kill.
//!
//! Three processes trade through the harness, which reads what passes between payer and payee. One is killed, by SIGKILL
//! at a random instant or by itself at a named point of the code, half of the time with the power of its disk; the others
//! stand still while all books are compared with each other and with what was seen on the wire; then it is started again,
//! and the trade has to go on. `--prove` takes one guard away at a time and expects to be told.
//!
//! A seed fixes who is killed, how and in what workload; what three processes do within a millisecond it cannot fix.
//! So a campaign that found something keeps the files and logs, and the same seed comes close to it again.

mod audit;
mod books;
mod broken;
mod campaign;
mod payer;
mod power;
mod processes;
mod prove;
mod proxy;

mod roles;
mod scene;
mod wire;

use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use indicatif::{ProgressBar, ProgressStyle};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use campaign::{Campaign, Plan, Report};
use roles::{Failure, RoleArguments};

/// Kills payee, payer and ledger at their worst instants, and compares all books after each kill.
#[derive(Debug, Parser)]
#[command(args_conflicts_with_subcommands = true)]
struct Command {
    #[command(flatten)]
    arguments: Arguments,
    #[command(subcommand)]
    role: Option<Hidden>,
}

#[derive(Debug, Subcommand)]
enum Hidden {
    /// One of the processes that are killed.
    #[command(hide = true)]
    Role(RoleArguments),
}

#[derive(Debug, Args)]
struct Arguments {
    /// How often.
    #[arg(long, default_value_t = 200)]
    kills: u64,
    /// What the campaign follows from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print the result as one JSON object.
    #[arg(long)]
    json: bool,
    /// Take this guard away, and expect to find out within the kills.
    #[arg(long = "break", value_name = "GUARD")]
    without: Option<String>,
    /// Take each guard away in turn, and print by what it was found out.
    #[arg(long, conflicts_with = "without")]
    prove: bool,
}

fn main() -> ExitCode {
    let command = Command::parse();
    let run = || -> Result<bool, Failure> {
        let runtime = Runtime::new()?;
        if let Some(Hidden::Role(arguments)) = command.role {
            return runtime.block_on(roles::run(arguments)).map(|()| true);
        }
        if command.arguments.prove {
            return prove::run(&command.arguments, &runtime);
        }
        run_campaign(&command.arguments, &runtime)
    };
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            say(&format!("tollway-crash: {error}"));
            ExitCode::from(2)
        }
    }
}

#[allow(clippy::print_stderr)]
fn say(line: &str) {
    eprintln!("{line}");
}

#[allow(clippy::print_stdout)]
fn print(line: &str) {
    println!("{line}");
}

/// One campaign. Returns whether it is as it should be: nothing found, or the missing guard found out.
fn run_campaign(arguments: &Arguments, runtime: &Runtime) -> Result<bool, Failure> {
    if let Some(guard) = arguments.without.as_deref().filter(|guard| !prove::is_guard(guard)) {
        return Err(format!("there is no guard '{guard}'; there are {}", prove::names().join(", ")).into());
    }
    let plan = Plan { kills: arguments.kills, seed: arguments.seed, without: arguments.without.clone() };
    let directory = TempDir::with_prefix("tollway-crash-")?;
    let report = campaign(&plan, runtime, directory.path())?;
    for found in &report.findings {
        say(&format!("kill {}, {}: {}: {}", found.kill, found.how, found.finding.check, found.finding.what));
    }
    if !report.findings.is_empty() && plan.without.is_none() {
        let kept = directory.keep();
        say(&format!("again: tollway-crash --seed {} --kills {}", plan.seed, report.kills.max(1)));
        say(&format!("the files and logs are in {}", kept.display()));
    }
    print_report(&report, arguments.json)?;
    Ok(report.findings.is_empty() != plan.without.is_some())
}

fn campaign(plan: &Plan, runtime: &Runtime, directory: &Path) -> Result<Report, Failure> {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::new(plan.kills) } else { ProgressBar::hidden() };
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} kills, {msg}")?);
    let report = Campaign::start(plan, runtime, directory)?.run(|report| {
        bar.set_message(format!("{} resumed, {} findings", report.resumed, report.findings.len()));
        bar.set_position(report.kills);
    })?;
    bar.finish_and_clear();
    Ok(report)
}

fn print_report(report: &Report, json: bool) -> Result<(), Failure> {
    if json {
        print(&serde_json::to_string(report)?);
        return Ok(());
    }
    let [ledger, payee, payer] = report.kills_by_role;
    print(&format!("{} kills (ledger {ledger}, payee {payee}, payer {payer})", report.kills));
    print(&format!("  {} at named points, {} with the power of the disk", report.at_failpoints, report.power_losses));
    print(&format!("  {} resumed", report.resumed));
    let (channels, openings, vouchers) = (report.channels, report.openings, report.vouchers);
    print(&format!("{channels} channels, {openings} openings, {vouchers} vouchers, {} delivered", report.delivered));
    print(&format!("vouchers lost      {}", report.vouchers_lost));
    print(&format!("overdelivered      {}", report.overdelivered));
    print(&format!("oversigned         {}", report.oversigned));
    print(&format!("double paid        {}", report.double_paid));
    print(&format!("lost in flight     {} at most, the cap is {}", report.lost_in_flight, report.lost_in_flight_cap));
    print(&format!("conserved          {}", if report.conserved { "yes" } else { "NO" }));
    Ok(())
}
