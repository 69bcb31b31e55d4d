"""How often a second a booted kernel is put back and called: `python -m benchmarks.restore SNAPSHOT [--seconds N]`.

One round is `restore` of the saved state and set_memory_valid() of one page of a vmalloc area, nothing recorded.
CPU time beside wall time: on a shared machine only the former says what a round costs.
"""

from __future__ import annotations

import argparse
import statistics
import time

from emu import Snapshot

ROUNDS = 200


def main() -> None:
    """Prints rounds a second: the median of blocks of ROUNDS, and the fastest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("snapshot")
    parser.add_argument("--seconds", type=float, default=5.0)
    given = parser.parse_args()
    machine = Snapshot.load(given.snapshot).machine()
    va = machine.call("vmalloc", 8192).ok().value
    state = machine.save()
    wall, cpu = [], []
    end = time.perf_counter() + given.seconds
    while time.perf_counter() < end:
        start, used = time.perf_counter(), time.process_time()
        for _ in range(ROUNDS):
            machine.restore(state)
            machine.call("set_memory_valid", va, 1, 0, record="nothing")
        wall.append(ROUNDS / (time.perf_counter() - start))
        cpu.append(ROUNDS / (time.process_time() - used))
    print(f"wall clock   median {statistics.median(wall):,.0f} a second, fastest {max(wall):,.0f}")
    print(f"CPU time     median {statistics.median(cpu):,.0f} a second, fastest {max(cpu):,.0f}")


if __name__ == "__main__":
    main()
