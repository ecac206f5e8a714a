//! What is measured: the workloads by name, and what each is made of.

use clap::ValueEnum;

/// A workload, by the name on the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Workload {
    /// Unary echo of 64 bytes, one after the other
    #[value(name = "unary-seq-64")]
    UnarySeq64,
    /// Unary echo of 1 KiB, one after the other
    #[value(name = "unary-seq-1k")]
    UnarySeq1k,
    /// Unary echo of 64 KiB, one after the other
    #[value(name = "unary-seq-64k")]
    UnarySeq64k,
    /// Unary echo of 64 bytes, 64 in flight on one session
    #[value(name = "unary-64x64")]
    Unary64x64,
    /// Unary echo of 64 bytes, 512 in flight on one session
    #[value(name = "unary-512x64")]
    Unary512x64,
    /// Unary echo of 1 KiB, 512 in flight on one session
    #[value(name = "unary-512x1k")]
    Unary512x1k,
    /// One call that streams items of 64 bytes
    #[value(name = "stream-64")]
    Stream64,
    /// One call that streams items of 4 KiB
    #[value(name = "stream-4k")]
    Stream4k,
    /// One call that streams items of 64 KiB
    #[value(name = "stream-64k")]
    Stream64k,
    /// 10,000 streams or virtual connections, opened by 64 tasks and left idle
    #[value(name = "open-10k")]
    Open10k,
    /// An echo beside no, one and eight streams that nobody reads
    #[value(name = "isolation")]
    Isolation,
}

/// What a workload is made of; sizes in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Sequential { bytes: usize },
    InFlight { callers: usize, bytes: usize },
    Items { bytes: usize },
    Open { streams: usize, openers: usize },
    Isolation,
}

impl Workload {
    pub(crate) fn all() -> &'static [Workload] {
        Self::value_variants()
    }

    pub(crate) fn name(self) -> String {
        let value = self.to_possible_value().expect("every workload has a name");
        value.get_name().to_owned()
    }

    /// The headline of its section.
    pub(crate) fn title(self) -> String {
        let value = self.to_possible_value().expect("every workload has a name");
        value.get_help().map(ToString::to_string).unwrap_or_default()
    }

    pub(crate) fn kind(self) -> Kind {
        match self {
            Workload::UnarySeq64 => Kind::Sequential { bytes: 64 },
            Workload::UnarySeq1k => Kind::Sequential { bytes: 1 << 10 },
            Workload::UnarySeq64k => Kind::Sequential { bytes: 64 << 10 },
            Workload::Unary64x64 => Kind::InFlight { callers: 64, bytes: 64 },
            Workload::Unary512x64 => Kind::InFlight { callers: 512, bytes: 64 },
            Workload::Unary512x1k => Kind::InFlight { callers: 512, bytes: 1 << 10 },
            Workload::Stream64 => Kind::Items { bytes: 64 },
            Workload::Stream4k => Kind::Items { bytes: 4 << 10 },
            Workload::Stream64k => Kind::Items { bytes: 64 << 10 },
            Workload::Open10k => Kind::Open { streams: 10_000, openers: 64 },
            Workload::Isolation => Kind::Isolation,
        }
    }
}

/// A figure of one contender in one round.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Reading {
    pub(crate) metric: String,
    pub(crate) unit: String,
    pub(crate) value: f64,
}

impl Reading {
    pub(crate) fn new(metric: impl Into<String>, unit: &str, value: f64) -> Self {
        Reading { metric: metric.into(), unit: unit.to_owned(), value }
    }
}

/// The metric that tells whether an echo came at all beside so many unread streams: 1 or 0.
pub(crate) fn answers(unread: usize) -> String {
    format!("answers-{unread}")
}

/// Median and tail of the echo beside so many unread streams.
pub(crate) fn beside(unread: usize) -> [String; 2] {
    [format!("p50-{unread}"), format!("p99-{unread}")]
}
