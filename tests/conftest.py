"""What every test may use: machines of the three kernels, a seeded generator, and a last word on what was skipped."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.kernels import KERNELS, kernel_image

if TYPE_CHECKING:
    from emu.machine import Machine

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell: tests send it to processes
    signal.signal(signal.SIGINT, signal.default_int_handler)

SEED = int(os.environ.get("PGTABLE_SEED", "1"))


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.kernels, id=name) for name in KERNELS])
def machine(request: pytest.FixtureRequest) -> Machine:
    """A cold machine of each kernel, the test's own."""
    from emu.machine import Machine

    return Machine.boot(kernel_image(request.param))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> Iterator[random.Random]:
    """The generator of the run's seed: the same in every test, printed where one fails."""
    request.node.add_report_section("setup", "seed", f"PGTABLE_SEED={SEED}")
    return random.Random(SEED)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """One line for each reason that tests were skipped for, and for what a marker left out."""
    write = terminalreporter.write_line
    write(f"seed: PGTABLE_SEED={SEED}")
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(r.longrepr[2].removeprefix("Skipped: ") for r in skipped if isinstance(r.longrepr, tuple))
    for reason, count in sorted(reasons.items()):
        write(f"skipped: {count} x {reason}")
    if config.getoption("numprocesses", None):  # a worker's own output is lost: tables come as properties
        for report in terminalreporter.stats.get("passed", []):
            for name, text in report.user_properties:
                write(f"{name}\n{text}")
    if config.option.markexpr:
        write(f"left out: tests that are not -m '{config.option.markexpr}' (make test PYTEST_MARK='full or not full')")
