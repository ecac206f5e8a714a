//! What comes out: a table for people, a JSON object for programs.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::gauge::{Tally, WARM_UP};
use super::{Plan, Workload};
use crate::failure::Failure;
use crate::output::{self, grouped, millis};

/// What was measured, and what came out. Rates are of the time that was measured, `elapsed_ms`.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    ok: bool,
    /// Why it ended early.
    error: Option<String>,
    workload: Workload,
    /// The server, if it was not in this process.
    to: Option<String>,
    size: u32,
    in_flight: u16,
    seconds: u64,
    warm_up_ms: f64,
    #[serde(flatten)]
    results: Results,
}

/// What came out, by workload.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(super) enum Results {
    Unary(Calls),
    Stream(Items),
    Open(Opens),
    Isolation(Box<Isolation>),
}

#[derive(Debug, Default, Serialize)]
pub(super) struct Calls {
    elapsed_ms: f64,
    calls: u64,
    /// Calls whose handler failed or whose answer was not the argument.
    errors: u64,
    calls_per_second: f64,
    latency_us: Option<Latency>,
}

#[derive(Debug, Default, Serialize)]
pub(super) struct Items {
    elapsed_ms: f64,
    items: u64,
    bytes: u64,
    /// Items of another size than they should have.
    errors: u64,
    items_per_second: f64,
    /// In millions of bytes.
    megabytes_per_second: f64,
}

#[derive(Debug, Default, Serialize)]
pub(super) struct Opens {
    elapsed_ms: f64,
    opens: u64,
    /// As many as `opens`, but for those that were still open some seconds after the end.
    closes: u64,
    opens_per_second: f64,
    latency_us: Option<Latency>,
}

/// Calls one by one, in three surroundings. What was not come to is absent.
#[derive(Debug, Default, Serialize)]
pub(super) struct Isolation {
    pub(super) alone: Calls,
    pub(super) beside_unread: Option<Beside>,
    pub(super) beside_bulk: Option<Beside>,
}

/// Calls beside streams.
#[derive(Debug, Serialize)]
pub(super) struct Beside {
    pub(super) streams: u16,
    /// What came on the streams, if they were read.
    pub(super) received: Option<Items>,
    #[serde(flatten)]
    pub(super) calls: Calls,
}

/// Times in microseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Latency {
    p50: f64,
    p90: f64,
    p99: f64,
    p99_9: f64,
    max: f64,
}

impl Latency {
    /// Of all that were counted, if any was.
    fn of(tally: &Tally) -> Option<Self> {
        let times_ns = tally.times_ns();
        let micros = |ns: u64| (ns as f64 / 10.0).round() / 100.0;
        let at = |quantile| micros(times_ns.value_at_quantile(quantile));
        let latency =
            Latency { p50: at(0.5), p90: at(0.9), p99: at(0.99), p99_9: at(0.999), max: micros(times_ns.max()) };
        (!times_ns.is_empty()).then_some(latency)
    }
}

impl Calls {
    pub(super) fn new(tally: &Tally, elapsed: Duration) -> Self {
        let calls = tally.units();
        Calls {
            elapsed_ms: millis(elapsed),
            calls,
            errors: tally.errors(),
            calls_per_second: per_second(calls, elapsed),
            latency_us: Latency::of(tally),
        }
    }
}

impl Items {
    pub(super) fn new(tally: &Tally, size: u32, elapsed: Duration) -> Self {
        let items = tally.units();
        let bytes = items.saturating_mul(u64::from(size));
        Items {
            elapsed_ms: millis(elapsed),
            items,
            bytes,
            errors: tally.errors(),
            items_per_second: per_second(items, elapsed),
            megabytes_per_second: per_second(bytes, elapsed) / 1e6,
        }
    }
}

impl Opens {
    pub(super) fn new(tally: &Tally, left_open: usize, elapsed: Duration) -> Self {
        let opens = tally.units();
        Opens {
            elapsed_ms: millis(elapsed),
            opens,
            closes: opens.saturating_sub(left_open as u64),
            opens_per_second: per_second(opens, elapsed),
            latency_us: Latency::of(tally),
        }
    }
}

/// A rate; zero if no time has passed.
pub(super) fn per_second(units: u64, elapsed: Duration) -> f64 {
    if elapsed.is_zero() { 0.0 } else { units as f64 / elapsed.as_secs_f64() }
}

impl Report {
    pub(super) fn new(plan: &Plan, to: Option<String>, results: Results, failure: Option<&Failure>) -> Self {
        Report {
            ok: failure.is_none(),
            error: failure.map(ToString::to_string),
            workload: plan.workload,
            to,
            size: plan.size,
            in_flight: plan.in_flight,
            seconds: plan.measured.as_secs(),
            warm_up_ms: millis(WARM_UP),
            results,
        }
    }

    /// Whether anything was counted.
    pub(super) fn has_results(&self) -> bool {
        let counted = match &self.results {
            Results::Unary(calls) => calls.calls,
            Results::Isolation(isolation) => isolation.alone.calls,
            Results::Stream(items) => items.items,
            Results::Open(opens) => opens.opens,
        };
        counted > 0
    }

    fn rows(&self) -> Vec<(&'static str, String)> {
        match &self.results {
            Results::Unary(calls) => {
                let mut rows = vec![("calls", counted(calls.calls, calls.calls_per_second))];
                rows.push(("latency", latency(calls.latency_us)));
                rows.extend(wrong(calls.errors));
                rows
            }
            Results::Stream(items) => {
                let mut rows = vec![("items", counted(items.items, items.items_per_second))];
                rows.push(("bytes", format!("{}, {:.1} MB/s", number(items.bytes), items.megabytes_per_second)));
                rows.extend(wrong(items.errors));
                rows
            }
            Results::Open(opens) => vec![
                ("opens", counted(opens.opens, opens.opens_per_second)),
                ("closes", number(opens.closes)),
                ("latency", latency(opens.latency_us)),
            ],
            Results::Isolation(isolation) => {
                let Isolation { alone, beside_unread, beside_bulk } = &**isolation;
                let mut rows = vec![("alone", latency(alone.latency_us))];
                if let Some(beside) = beside_unread {
                    rows.push(("beside unread streams", latency(beside.calls.latency_us)));
                }
                if let Some(beside) = beside_bulk {
                    rows.push(("beside a stream", latency(beside.calls.latency_us)));
                    let rate = beside.received.as_ref().map_or(0.0, |items| items.megabytes_per_second);
                    rows.push(("the stream meanwhile", format!("{rate:.1} MB/s")));
                }
                let beside = [beside_unread, beside_bulk].into_iter().flatten();
                rows.extend(wrong(alone.errors + beside.map(|beside| beside.calls.errors).sum::<u64>()));
                rows
            }
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (size, at_once) = (self.size, self.in_flight);
        match self.workload {
            Workload::Unary => write!(f, "calls of {size} bytes, {at_once} in flight")?,
            Workload::Stream if at_once == 1 => write!(f, "items of {size} bytes, on one stream")?,
            Workload::Stream => write!(f, "items of {size} bytes, on {at_once} streams")?,
            Workload::Open => write!(f, "opening and closing connections, {at_once} at once")?,
            Workload::Isolation => {
                write!(
                    f,
                    "calls of {size} bytes one by one, beside {at_once} unread streams and beside one that is read"
                )?;
            }
        }
        match &self.to {
            Some(url) => write!(f, ", at {url}")?,
            None => f.write_str(", over loopback in this process")?,
        }
        let measured = match &self.results {
            Results::Unary(calls) => calls.elapsed_ms,
            Results::Isolation(isolation) => isolation.alone.elapsed_ms,
            Results::Stream(items) => items.elapsed_ms,
            Results::Open(opens) => opens.elapsed_ms,
        };
        writeln!(f, ", for {:.1} s after {:.1} s of warm-up:", measured / 1e3, self.warm_up_ms / 1e3)?;
        f.write_str(&output::table(&self.rows()))
    }
}

fn number(number: u64) -> String {
    grouped(u128::from(number))
}

fn counted(units: u64, per_second: f64) -> String {
    format!("{}, {}/s", number(units), grouped(per_second.round() as u128))
}

fn wrong(errors: u64) -> Option<(&'static str, String)> {
    (errors > 0).then(|| ("errors", number(errors)))
}

fn latency(latency: Option<Latency>) -> String {
    let Some(Latency { p50, p90, p99, p99_9, max }) = latency else { return "nothing was measured".to_owned() };
    format!("p50 {p50:.1} µs, p90 {p90:.1}, p99 {p99:.1}, p99.9 {p99_9:.1}, max {max:.1}")
}
