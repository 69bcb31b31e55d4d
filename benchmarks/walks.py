"""How many walks of the real code, compared with the model event by event, run in a second on one core.

    python benchmarks/walks.py [KERNEL] [FUNCTION]

A small range: two pages, all callbacks, seven events. The parts are timed in the same run.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

from emu.checks.harness import differences
from emu.checks.walks import KernelWalk, WalkCase, simple
from emu.checks.world import World
from emu.image import KernelImage

ROUNDS, CALLS = 7, 500


def rate(run: Callable[[], object]) -> float:
    """Runs a second: the median of rounds."""
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            run()
        times.append((time.perf_counter() - start) / CALLS)
    return 1 / statistics.median(times)


def main(kernel: str = "debian:7.3", function: str = "walk_kernel_page_table_range_lockless") -> None:
    """Prints the rates."""
    world = World(KernelImage.load(kernel))
    harness = KernelWalk(function)
    tree, va = simple(world)
    case = WalkCase(tree, va, va + 2 * world.plan.page_size)
    checked = harness.run(world, case)
    assert not differences(checked)
    print(f"{kernel} {function}: {len(checked.real.events)} events a walk, one core, medians of {ROUNDS} rounds")
    print(f"compared walks   {rate(lambda: differences(harness.run(world, case))):8.0f} a second")
    print(f"real walks       {rate(lambda: harness.real(world, case)):8.0f} a second")
    print(f"predicted walks  {rate(lambda: harness.predicted(world, case)):8.0f} a second")


if __name__ == "__main__":
    main(*sys.argv[1:])
