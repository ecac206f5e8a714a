//! Two honest peers do random things over conduits that stall, cut frames up, reorder lanes and break, directly and through
//! a relay, in virtual time.
//!
//! Whatever happens: nobody violates the protocol, a referee at each conduit included; nothing is lost or reordered on a
//! stream; nothing waits that could go; credit is neither made nor lost; memory is bounded; the payee never spends beyond
//! its lease and the payer never counts more than that; both books agree once it is quiet; and in the end nothing is left
//! in any table.
//!
//! `TOLLWAY_SEEDS=100000` runs more seeds, `TOLLWAY_SEED=42` replays one.
#![allow(clippy::unwrap_used)]

mod check;
mod choices;
mod net;
#[path = "../machine/pair.rs"]
mod pair;
mod referee;
mod relay;
mod world;

use choices::Choices;
use pair::{A, Pair, Rng};
use tollway_protocol::limits::{ConnectionLimits, ITEM_OVERHEAD};
use tollway_protocol::message::Flow;
use world::{MAX_ITEM, STREAM_WINDOW, World};

const STEPS: usize = 250;

fn run(seed: u64) {
    let mut world = World::new(Choices::Seed(Rng(seed)));
    world.play(STEPS);
}

#[test]
fn honest_peers_agree_whatever_they_do() {
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().expect(name));
    if let Some(seed) = number("TOLLWAY_SEED") {
        return run(seed);
    }
    let seeds = number("TOLLWAY_SEEDS").unwrap_or(2_000);
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get() as u64);
    let failed = std::thread::scope(|scope| {
        let share = |first| move || (first..seeds).step_by(threads as usize).find_map(fails);
        let threads: Vec<_> = (0..threads).map(|first| scope.spawn(share(first))).collect();
        threads.into_iter().filter_map(|thread| thread.join().unwrap()).min()
    });
    if let Some((seed, text)) = failed {
        panic!(
            "seed {seed} failed: {text}\nreplay: TOLLWAY_SEED={seed} cargo test -p tollway-protocol --test simulation"
        );
    }
}

/// How a seed fails, if it does.
fn fails(seed: u64) -> Option<(u64, String)> {
    let panic = std::panic::catch_unwind(|| run(seed)).err()?;
    let text = panic.downcast_ref::<String>().cloned();
    Some((seed, text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string)).unwrap_or_default()))
}

/// The bound on memory that the simulation's parameters give: an inbox holds its window and one largest item.
#[test]
fn an_inbox_holds_its_window_and_one_largest_item() {
    let mut pair = Pair::one_lane();
    let limits = ConnectionLimits { stream_window: STREAM_WINDOW, max_item: MAX_ITEM as u32, ..Default::default() };
    let id = pair.connect_with(A, limits, limits);
    let (_, keys) = pair.call_with(A, id, 0, b"", &[Flow::ToPeer]);
    (0..100).for_each(|_| pair.peers[A].push(keys[0], &[0; MAX_ITEM]).unwrap());
    pair.run();
    let total = 100 * (MAX_ITEM as u64 + ITEM_OVERHEAD);
    let inbox = total - pair.peers[A].buffered(keys[0]).unwrap();
    assert!(inbox <= u64::from(STREAM_WINDOW) + MAX_ITEM as u64 + ITEM_OVERHEAD, "{inbox}");
}
