#!/usr/bin/env bash
# Instructions and allocations for each call and each item, beside what was recorded in benches/counts/record.json.
#
#   benches/counts.sh                    the table; fails if a count has grown by more than 10 %
#   benches/counts.sh --record           the same, and records the counts: for the commit that changes them
#   benches/counts.sh --profile unary    the 40 functions with the most instructions, their own and with what they call
#   benches/counts.sh unary stream       only these; --help has the rest
#
# Instructions are counted by valgrind's callgrind (needed, and nothing else), in user space, for client and server
# together: one thread, loopback TCP. They don't depend on the machine's load and repeat to a fraction of a percent.
# For callgrind_annotate's own reports, by line for instance, or for a viewer:
#
#   valgrind --tool=callgrind --collect-atstart=no --toggle-collect='tollway_counts_work::counted_section*' \
#       --dump-instr=yes --callgrind-out-file=calls.out target/release/tollway-counts-work unary 2000
#   callgrind_annotate --auto=yes calls.out        # or: kcachegrind calls.out
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --quiet --release --package tollway-counts
exec "${CARGO_TARGET_DIR:-target}/release/tollway-counts" "$@"
