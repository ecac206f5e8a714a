//! A campaign: kill after kill, the books compared at each, and what went on after it.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Serialize;
use tokio::runtime::Runtime;

use crate::audit::{Auditor, Check, Finding, check_end};
use crate::books::{Books, Unreadable};
use crate::processes::{Process, Start};
use crate::proxy::Proxy;
use crate::roles::{Failure, Role};
use crate::scene::{IN_FLIGHT_CAP, Random};
use crate::wire::Witness;

/// How long a process that is to die at a point is waited for: it may not pass there in what its workload does now.
const POINT_TIMEOUT: Duration = Duration::from_millis(400);
/// A random instant lies within so many microseconds after the traffic has begun again.
const RANDOM_US: u64 = 30_000;
/// How long it may take until something is delivered after a restart, and until every channel is closed in the end.
/// Only what hangs takes so long.
const RESUME_TIMEOUT: Duration = Duration::from_secs(60);
/// The same with a guard taken away, which may well be why.
const BROKEN_RESUME_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the witness may take to read what is in the sockets of processes that stand still.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);
/// How often something is looked at that takes milliseconds.
const LOOK: Duration = Duration::from_micros(500);

/// What a campaign is.
#[derive(Debug, Clone)]
pub(crate) struct Plan {
    pub(crate) kills: u64,
    pub(crate) seed: u64,
    /// The guard that is taken away: then the first finding ends the campaign.
    pub(crate) without: Option<String>,
}

/// What a campaign found. Amounts are base units.
#[derive(Debug, Clone, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) kills: u64,
    pub(crate) resumed: u64,
    pub(crate) vouchers_lost: u64,
    pub(crate) overdelivered: u128,
    pub(crate) oversigned: u128,
    pub(crate) double_paid: u128,
    pub(crate) lost_in_flight: u128,
    pub(crate) lost_in_flight_cap: u128,
    pub(crate) conserved: bool,
    /// What it was made of.
    pub(crate) seed: u64,
    pub(crate) kills_by_role: [u64; 3],
    pub(crate) at_failpoints: u64,
    pub(crate) power_losses: u64,
    pub(crate) channels: usize,
    pub(crate) openings: u64,
    pub(crate) vouchers: usize,
    pub(crate) delivered: u128,
    pub(crate) seconds: f64,
    /// What else there is to say, and all of the above in words.
    pub(crate) findings: Vec<Found>,
}

/// A finding, and when it was made.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Found {
    pub(crate) kill: u64,
    pub(crate) how: String,
    #[serde(flatten)]
    pub(crate) finding: Finding,
}

/// One death.
#[derive(Debug, Clone)]
struct Death {
    role: Role,
    point: Option<(&'static str, u64)>,
    after: Duration,
}

impl Death {
    fn plan(random: &mut Random) -> Death {
        let role = *random.pick(&[Role::Ledger, Role::Payee, Role::Payee, Role::Payer, Role::Payer]);
        let point = random.percent(50).then(|| {
            let (name, most) = *random.pick(role.failpoints());
            (name, 1 + random.below(most))
        });
        Death { role, point, after: Duration::from_micros(random.below(RANDOM_US)) }
    }
}

/// The running processes, and what stays while they come and go.
pub(crate) struct Campaign<'a> {
    plan: &'a Plan,
    runtime: &'a Runtime,
    directory: &'a Path,
    /// Audits so far.
    audits: u64,
    random: Random,
    witness: Arc<Mutex<Witness>>,
    to_ledger: Proxy,
    to_payee: Proxy,
    /// In the order of [`Role::ALL`].
    processes: Vec<Process>,
    /// Whether each process that runs would lose its power with its life.
    on_power: [bool; 3],
    auditor: Auditor,
    report: Report,
    /// What the processes had to say lately.
    said: Vec<String>,
}

impl<'a> Campaign<'a> {
    /// Starts the three.
    pub(crate) fn start(plan: &'a Plan, runtime: &'a Runtime, directory: &'a Path) -> Result<Self, Failure> {
        let witness = Arc::new(Mutex::new(Witness::default()));
        let mut campaign = Campaign {
            plan,
            runtime,
            directory,
            audits: 0,
            random: Random::new(plan.seed),
            to_ledger: runtime.block_on(Proxy::start(None))?,
            to_payee: runtime.block_on(Proxy::start(Some(witness.clone())))?,
            witness,
            processes: Vec::new(),
            on_power: [false; 3],
            auditor: Auditor::default(),
            report: Report { seed: plan.seed, conserved: true, lost_in_flight_cap: IN_FLIGHT_CAP, ..Report::default() },
            said: Vec::new(),
        };
        for role in Role::ALL {
            // Their files are made on a disk that is there.
            let process = campaign.start_process(role, None)?;
            campaign.processes.push(process);
        }
        Ok(campaign)
    }

    fn start_process(&mut self, role: Role, power: Option<u64>) -> Result<Process, Failure> {
        let start = Start {
            role,
            directory: self.directory,
            ledger: self.to_ledger.address,
            payee: self.to_payee.address,
            seed: self.random.draw(),
            power,
            without: self.plan.without.as_deref(),
        };
        let process = Process::start(&start)?;
        self.on_power[role as usize] = power.is_some();
        match role {
            Role::Ledger => self.to_ledger.aim(process.address),
            Role::Payee => self.to_payee.aim(process.address),
            Role::Payer => {}
        }
        Ok(process)
    }

    /// Kills as often as was planned, or until the first finding if a guard is taken away.
    pub(crate) fn run(mut self, mut progress: impl FnMut(&Report)) -> Result<Report, Failure> {
        let begun = Instant::now();
        while self.report.kills < self.plan.kills {
            let death = Death::plan(&mut self.random);
            let stopped = self.kill_once(&death)?;
            progress(&self.report);
            if stopped || (self.plan.without.is_some() && !self.report.findings.is_empty()) {
                return Ok(self.finish(begun));
            }
        }
        self.close_all()?;
        Ok(self.finish(begun))
    }

    fn finish(mut self, begun: Instant) -> Report {
        let witness = self.witness.lock();
        if !self.report.findings.is_empty() {
            // For who looks into it; the findings are told in any case.
            let _written = std::fs::write(self.directory.join("tape.log"), witness.tape());
        }
        self.report.channels = witness.channels.len();
        self.report.openings = witness.openings();
        self.report.vouchers = witness.vouchers();
        self.report.delivered = witness.delivered();
        self.report.lost_in_flight = self.auditor.most_lost;
        self.report.seconds = begun.elapsed().as_secs_f64();
        self.report
    }

    /// Waits for traffic, kills one, compares all books, and starts it again. Returns whether nothing goes on.
    fn kill_once(&mut self, death: &Death) -> Result<bool, Failure> {
        let how = self.describe(death);
        if !self.wait_for_traffic() {
            self.find(&how, Check::Stopped, "nothing is delivered any more".to_owned());
            return Ok(true);
        }
        if self.report.kills > 0 {
            self.report.resumed += 1;
        }
        let at = death.role as usize;
        let died = match death.point {
            Some((name, passes)) => {
                self.processes[at].order(&format!("arm {name} {passes}"));
                self.processes[at].wait_for_death(POINT_TIMEOUT)?.is_some()
            }
            None => {
                std::thread::sleep(death.after);
                false
            }
        };
        self.report.at_failpoints += u64::from(died);
        self.processes[at].kill()?;
        self.witness.lock().remark(&how);
        match death.role {
            Role::Ledger => self.to_ledger.aim(None),
            Role::Payee => self.to_payee.aim(None),
            Role::Payer => {}
        }
        self.report.kills += 1;
        self.report.kills_by_role[at] += 1;
        self.report.power_losses += u64::from(self.on_power[at]);
        self.audit(&how, Some(death.role), false)?;
        if self.plan.without.is_some() && !self.report.findings.is_empty() {
            return Ok(true);
        }
        let power = self.random.percent(50).then(|| self.random.draw());
        match self.start_process(death.role, power) {
            Ok(process) => {
                self.processes[at] = process;
                Ok(false)
            }
            Err(error) => {
                self.find(&how, Check::Stopped, error.to_string());
                Ok(true)
            }
        }
    }

    fn describe(&self, death: &Death) -> String {
        let power = if self.on_power[death.role as usize] { " with its power" } else { "" };
        match death.point {
            Some((name, passes)) => format!("the {} died{power} at pass {passes} of {name}", death.role.name()),
            None => format!("the {} died{power} {:?} after the traffic began", death.role.name(), death.after),
        }
    }

    /// Whether something is delivered on a connection that was opened after the last restart.
    fn wait_for_traffic(&mut self) -> bool {
        let timeout = if self.plan.without.is_some() { BROKEN_RESUME_TIMEOUT } else { RESUME_TIMEOUT };
        let (until, before) = (Instant::now() + timeout, self.delivered());
        while self.delivered() == before {
            self.listen();
            if Instant::now() >= until {
                return false;
            }
            std::thread::sleep(LOOK);
        }
        true
    }

    fn delivered(&self) -> u128 {
        self.witness.lock().delivered()
    }

    /// Takes in what the processes say of themselves.
    fn listen(&mut self) {
        let said: Vec<_> = self.processes.iter().flat_map(Process::said).collect();
        said.into_iter().for_each(|line| self.hear(line));
    }

    fn hear(&mut self, line: String) {
        if let Some(fault) = line.strip_prefix("fault ") {
            let (fault, how) = (fault.to_owned(), "the payer said".to_owned());
            self.find(&how, Check::Stopped, fault);
        }
        self.said.push(line);
        let excess = self.said.len().saturating_sub(5);
        self.said.drain(..excess);
    }

    fn find(&mut self, how: &str, check: Check, what: String) {
        let what = if self.said.is_empty() { what } else { format!("{what} (last heard: {})", self.said.join("; ")) };
        self.book(how, vec![Finding { check, amount: 1, what }]);
    }

    /// Has the others stand still, reads all that was written, compares all books, and lets them go on.
    fn audit(&mut self, how: &str, dead: Option<Role>, is_end: bool) -> Result<(), Failure> {
        self.listen();
        let alive = |process: &&Process| Some(process.role) != dead;
        self.processes.iter().filter(alive).try_for_each(Process::freeze)?;
        let until = Instant::now() + DRAIN_TIMEOUT;
        while !self.to_payee.is_drained() && Instant::now() < until {
            std::thread::sleep(LOOK);
        }
        // A new place for each audit: a copy that was read may still be closing, and writes when it does.
        self.audits += 1;
        let images = self.directory.join(format!("audit-{}", self.audits));
        std::fs::create_dir_all(&images)?;
        let books = Books::read(self.directory, &images, self.runtime.handle());
        let findings = match books {
            Ok(books) => {
                let mut findings = self.auditor.audit(&books, &self.witness.lock());
                findings.extend(is_end.then(|| check_end(&books)).into_iter().flatten());
                findings
            }
            Err(Unreadable { role, why }) => {
                let check = if role == Role::Ledger { Check::Conserved } else { Check::Books };
                vec![Finding { check, amount: 1, what: Unreadable { role, why }.to_string() }]
            }
        };
        // Not before: from here on the wire is ahead of the copies.
        self.processes.iter().filter(alive).try_for_each(Process::thaw)?;
        if findings.is_empty() {
            std::fs::remove_dir_all(&images)?;
        } else {
            // They stay for who looks into it, with what was said before.
            std::fs::write(images.join("tape.log"), self.witness.lock().tape())?;
        }
        self.book(how, findings);
        Ok(())
    }

    fn book(&mut self, how: &str, findings: Vec<Finding>) {
        let report = &mut self.report;
        for finding in findings {
            match finding.check {
                Check::VouchersLost => report.vouchers_lost += 1,
                Check::Overdelivered => report.overdelivered += finding.amount,
                Check::Oversigned => report.oversigned += finding.amount,
                Check::DoublePaid => report.double_paid += finding.amount,
                Check::Conserved => report.conserved = false,
                Check::LostInFlight | Check::Books | Check::Stopped => {}
            }
            report.findings.push(Found { kill: report.kills, how: how.to_owned(), finding });
        }
    }

    /// Has the payer close every channel; then the books must be even.
    fn close_all(&mut self) -> Result<(), Failure> {
        if self.wait_for_traffic() {
            self.report.resumed += 1;
        } else {
            self.find("after the last kill", Check::Stopped, "nothing is delivered any more".to_owned());
        }
        let payer = Role::Payer as usize;
        self.processes[payer].order("finish");
        let mut heard = Vec::new();
        let finished = self.processes[payer].wait_for("finished", RESUME_TIMEOUT, |line| heard.push(line));
        heard.into_iter().for_each(|line| self.hear(line));
        if !finished {
            self.find("in the end", Check::Stopped, "the payer could not close all of its channels".to_owned());
        }
        self.audit("in the end", None, finished)
    }
}
