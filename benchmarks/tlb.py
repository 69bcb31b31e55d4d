"""What the checkers of TLB maintenance cost: `python -m benchmarks.tlb`, with `--kernel KERNEL` a trace too.

Events: random breaks, TLBIs, DSBs, makes and accesses on the pages of one table; microseconds of CPU time, medians.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

from pgtable import Access
from pgtable.bbm import Checker
from pgtable.tlb import Policy, TlbModel
from pgtable.tlb_events import Dsb, Event, Isb, Tlbi, Use, Write
from pgtable.tlb_program import parse_program
from pgtable.tlbi import decode, operand_for

ROUNDS, EVENTS, PAGES = 9, 3000, 64
SCENE = "cpus 2\n" + "".join(
    f"word {0x40003000 + 8 * i:#x} = {0x60000040005703 + (i << 12):#x}\n" for i in range(PAGES)
)


def events(seed: int, *, used: bool) -> list[Event]:
    """A stream in which every third page is taken away, cleaned and made again; `used`: with accesses between."""
    rng, found = random.Random(seed), list[Event]()
    while len(found) < EVENTS:
        i = rng.randrange(PAGES)
        va, pa, word = 0xFFFF_0000_0000_0000 + (i << 12), 0x40003000 + 8 * i, 0x60000040005703 + (i << 12)
        op = decode("vaae1is", operand_for("vaae1is", va))
        found += [Write(0, 1, pa, 3, va, word, 0), Dsb(0, "ishst"), Tlbi(0, op), Dsb(0, "ish"), Isb(0)]
        found += [Write(0, 2, pa, 3, va, 0, word), Dsb(0, "ishst")]
        found += [Use(rng.randrange(2), va, Access.read(el=1)) for _ in range(4 * used)]
    return found


def per_event(make: Callable[[], Callable[[Event], None]], stream: list[Event]) -> float:
    """Median microseconds of CPU time for an event."""
    times = []
    for _ in range(ROUNDS):
        feed = make()
        began = time.process_time()
        for event in stream:
            feed(event)
        times.append((time.process_time() - began) / len(stream) * 1e6)
    return statistics.median(times)


def main() -> None:
    """Prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel")
    given = parser.parse_args()
    program = parse_program(SCENE)
    stream, used = events(1, used=False), events(1, used=True)

    def model(policy: Policy) -> Callable[[Event], None]:
        memory = program.memory()
        made = TlbModel(memory, program.registers, policy=policy)

        def feed(event: Event) -> None:
            made.feed(event)
            if isinstance(event, Write):
                memory.store(event.pa, event.new)

        return feed

    checker = per_event(lambda: Checker(program.params, memory=program.memory()).feed, stream)
    print(f"checker                     {checker:6.1f} us an event")
    for name, policy in (("speculative", Policy()), ("only what was accessed", Policy(speculative=False))):
        print(f"model, {name:22} {per_event(lambda policy=policy: model(policy), used):5.1f} us an event")  # type: ignore[misc]
    if given.kernel:
        traced(given.kernel)


def traced(kernel: str) -> None:
    """set_memory_valid of 16 pages: as it is, with the order recorded, and traced."""
    from emu import Machine
    from emu.tracing import Trace

    for name, trace, record in (
        ("call", None, "changes"),
        ("call, order", None, "order"),
        ("call, traced", Trace(), "changes"),
    ):
        machine = Machine.boot(kernel, trace=trace)
        va, times = machine.plan.linear + 0x200_0000, []
        for i in range(2 * ROUNDS):
            began = time.process_time()
            machine.call("set_memory_valid", va, 16, i & 1, record=record).ok()
            times.append(1000 * (time.process_time() - began))
        events = f", {len(trace.events) // (2 * ROUNDS)} events" if trace else ""
        print(f"{name:26} {statistics.median(times):7.2f} ms{events}")


if __name__ == "__main__":
    main()
