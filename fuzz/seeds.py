#!/usr/bin/env python3
"""Writes corpora to begin with, made of the golden frames: seeds.py FRAMES.json INTO

One directory for each target, in the form that the target reads; see the top of each target's file.
"""

import json
import pathlib
import sys

PREFACE = b"TOLLWAY\x01"


def step(body, kind=0):
    """A step with a frame, as `handshake` and `session_ops` read it."""
    return bytes([kind, len(body)]) + body


def main():
    vectors = json.loads(pathlib.Path(sys.argv[1]).read_text())
    into = pathlib.Path(sys.argv[2])
    frames = [bytes.fromhex(frame["hex"]) for frame in vectors["frames"]]
    bodies = [frame[4:] for frame in frames]
    small = [body for body in bodies if len(body) < 256]
    hello = next(body for body in bodies if body[0] == 0)
    ack = next(body for body in bodies if body[0] == 1)

    seeds = {
        # A limit, the size of reads, and a stream of bytes.
        "frame": [bytes([3, 7]) + frame for frame in frames]
        + [bytes([4, 60]) + b"".join(frames), bytes([3, 0]) + PREFACE],
        # As a responder and as an initiator, answered at once and with a challenge: hello, then each frame.
        "handshake": [bytes([how]) + step(first) + step(body)
                      for how, first in [(0, hello), (4, hello), (1, ack), (2, hello)] for body in small],
        # Each frame to a machine of either role, and random commands between two.
        "session_ops": [bytes([how]) + step(body) for how in [0, 2] for body in small]
        + [bytes([0]) + b"".join(map(step, small))]
        + [bytes([1]) + bytes((7 * n * n + seed) % 256 for n in range(1500)) for seed in range(4)],
    }
    for target, contents in seeds.items():
        folder = into / target
        folder.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(contents):
            (folder / f"golden-{number:03}").write_bytes(content)


main()
