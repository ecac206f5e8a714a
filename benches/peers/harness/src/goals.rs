//! What Tollway is to reach, as ratios of cells of one run.

use crate::output::{OURS, Results, ratio};
use crate::workload::{Workload, answers, beside};

/// One goal for one of our cells.
pub(crate) struct Goal {
    workload: Workload,
    metric: String,
    bound: Bound,
}

enum Bound {
    /// At least so often the peer's cell.
    AtLeast(f64, &'static str),
    /// At most so often the peer's cell.
    AtMost(f64, &'static str),
    /// At most so often another cell of ours.
    AtMostOwn(f64, String),
    /// The cell is 1 in every round.
    Always,
}

/// All goals, in the order of the workloads.
pub(crate) fn all() -> Vec<Goal> {
    use Bound::{Always, AtLeast, AtMost, AtMostOwn};
    let goal = |workload, metric: &str, bound| Goal { workload, metric: metric.to_owned(), bound };
    let mut goals = vec![
        goal(Workload::UnarySeq64, "p50", AtMost(1.2, "floor-pipe")),
        goal(Workload::Unary64x64, "rate", AtLeast(2.0, "tarpc")),
        goal(Workload::Unary64x64, "rate", AtLeast(1.0, "floor-pipe")),
        goal(Workload::Unary512x64, "rate", AtLeast(2.0, "tarpc")),
        goal(Workload::Unary512x1k, "rate", AtLeast(2.0, "tarpc")),
        goal(Workload::Stream64, "rate", AtLeast(1.2, "tonic")),
        goal(Workload::Stream4k, "rate", AtLeast(1.5, "tonic")),
        goal(Workload::Stream64k, "rate", AtLeast(1.0, "h2")),
        goal(Workload::Open10k, "rate", AtLeast(1.0, "h2")),
        goal(Workload::Open10k, "memory", AtMost(0.5, "h2")),
    ];
    for unread in [1, 8] {
        let [_p50, alone] = beside(0);
        let [_p50, p99] = beside(unread);
        goals.push(goal(Workload::Isolation, &answers(unread), Always));
        goals.push(goal(Workload::Isolation, &p99, AtMostOwn(2.0, alone)));
    }
    goals
}

impl Goal {
    /// The goal and whether it was reached, if the run has what it compares.
    pub(crate) fn evaluate(&self, results: &Results) -> Option<String> {
        let Goal { workload, metric, bound } = self;
        let median = |peer: &str, metric: &str| results.cell(*workload, peer, metric).map(|cell| cell.median);
        let ours = median(OURS, metric);
        let (wanted, reached) = match bound {
            Bound::AtLeast(times, peer) => {
                let (ours, theirs) = (ours?, median(peer, metric)?);
                (format!("≥ {times}x {peer}"), Some((ratio(ours, theirs), ours >= times * theirs)))
            }
            Bound::AtMost(times, peer) => {
                let (ours, theirs) = (ours?, median(peer, metric)?);
                (format!("≤ {times}x {peer}"), Some((ratio(ours, theirs), ours <= times * theirs)))
            }
            Bound::AtMostOwn(times, other) => {
                let alone = median(OURS, other)?;
                (format!("≤ {times}x {other}"), ours.map(|ours| (ratio(ours, alone), ours <= times * alone)))
            }
            Bound::Always => {
                let answers = results.cell(*workload, OURS, metric)?;
                let reached = answers.min >= 1.0;
                ("every echo".to_owned(), Some((if reached { "yes" } else { "no" }.to_owned(), reached)))
            }
        };
        // The echo beside no unread stream came, the other one did not.
        let (found, reached) = reached.unwrap_or(("no figure".to_owned(), false));
        let verdict = if reached { "reached" } else { "not reached" };
        Some(format!("{} {metric}: goal {wanted}: {found} {verdict}", workload.name()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::tests::results;

    fn told(results: &Results) -> Vec<String> {
        all().iter().filter_map(|goal| goal.evaluate(results)).collect()
    }

    #[test]
    fn goals_are_told_for_what_was_measured_only() {
        let flight = Workload::Unary64x64;
        let measured = results(&[(flight, "tollway", "rate", 690.0), (flight, "tarpc", "rate", 300.0)]);
        assert_eq!(told(&measured), ["unary-64x64 rate: goal ≥ 2x tarpc: 2.30x reached"]);
        assert!(told(&results(&[(flight, "tollway", "rate", 690.0)])).is_empty());
    }

    #[test]
    fn a_goal_that_is_missed_is_told_as_well() {
        let open = Workload::Open10k;
        let measured = results(&[
            (open, "tollway", "rate", 99.0),
            (open, "h2", "rate", 100.0),
            (open, "tollway", "memory", 51.0),
            (open, "h2", "memory", 100.0),
        ]);
        assert_eq!(
            told(&measured),
            ["open-10k rate: goal ≥ 1x h2: 0.99x not reached", "open-10k memory: goal ≤ 0.5x h2: 0.51x not reached"]
        );
    }

    #[test]
    fn an_echo_that_does_not_come_in_one_round_misses_the_goal() {
        let isolation = Workload::Isolation;
        let mut cells = vec![
            (isolation, "tollway", "p99-0", 10.0),
            (isolation, "tollway", "p99-1", 20.0),
            (isolation, "tollway", "answers-1", 1.0),
        ];
        assert_eq!(
            told(&results(&cells)),
            [
                "isolation answers-1: goal every echo: yes reached",
                "isolation p99-1: goal ≤ 2x p99-0: 2.00x reached",
                "isolation p99-8: goal ≤ 2x p99-0: no figure not reached"
            ]
        );
        cells.push((isolation, "tollway", "answers-1", 0.0));
        assert!(told(&results(&cells)).contains(&"isolation answers-1: goal every echo: no not reached".to_owned()));
    }
}
