"""Many cases of many functions: counts, differences, rows that no case reached, and blocks of code that none ran.

Rules of this file:
- A function is run in each of its worlds (`FLAVOURS`): the plain one, one with nG mappings, one with 52-bit tables.
- Cases are the harness's prepared ones, then random ones; the seed alone decides them.
- A case that fails is shrunk before it is shown.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import active_children, get_context
from signal import SIG_IGN, SIGINT, signal
from typing import Any

from emu.checks.coverage import Coverage, FunctionCoverage, Run
from emu.checks.harness import Harness, differences
from emu.checks.world import World
from emu.image import KernelImage
from kernel_model.compare import Difference
from kernel_model.variants import Variant

FLAVOURS: dict[str, dict[str, Any]] = {"plain": {}, "ng": {"ng": True}, "wide": {"wide": True}}
SHRINK_TRIES = 300
SHOWN = 5  # failing cases that are shrunk and kept, for each function

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Failure:
    """A case that the model got wrong, shrunk."""

    flavour: str
    case: Any
    differences: tuple[Difference, ...]


@dataclass
class FunctionReport:
    """What came of one function's cases."""

    function: str
    cases: int = 0
    events: int = 0
    failed: int = 0
    failures: list[Failure] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    seconds: float = 0.0
    coverage: list[FunctionCoverage] = field(default_factory=list)  # of what is checked as a whole

    @property
    def ok(self) -> bool:
        """Nothing differs and every row was reached."""
        return not self.failed and not self.unreached


class Worlds:
    """The worlds of one image, made when asked for. `variant`: the model to use in place of the image's own."""

    def __init__(self, image: KernelImage, variant: Variant | None = None) -> None:
        self.image, self.variant = image, variant
        self._made: dict[tuple[str, str], World] = {}

    def __getitem__(self, flavour: str) -> World:
        return self._world(flavour, "")

    def of(self, harness: Harness, flavour: str) -> World:
        """The world that a harness runs in: harnesses whose stubs would get in each other's way have their own."""
        return self._world(flavour, getattr(harness, "stubs", ""))

    def _world(self, flavour: str, stubs: str) -> World:
        key = flavour, stubs
        if key not in self._made:
            self._made[key] = World(self.image, variant=self.variant, **FLAVOURS[flavour])
        return self._made[key]

    def flavours(self, harness: Harness) -> list[str]:
        """Those of a harness that this image can run."""
        layout = self.image.layout
        wanted = getattr(harness, "worlds", ("plain",))
        return [name for name in wanted if name != "wide" or layout.va_bits > layout.va_bits_min]


def run_function(
    worlds: Worlds,
    harness: Harness,
    cases: int,
    seed: int,
    *,
    progress: Progress = lambda _: None,
    cover: Sequence[str] = (),
    executed: set[Run] | None = None,
    stop_at_first: bool = False,
) -> FunctionReport:
    """All prepared cases and `cases` random ones of one function; `executed` collects code of `cover` that ran.

    `stop_at_first`: the first case that differs is enough, and is not shrunk.
    """
    report = FunctionReport(harness.function)
    start = time.monotonic()
    flavours = worlds.flavours(harness)
    share = cases // (2 * len(flavours)) if len(flavours) > 1 else 0
    for flavour in flavours:
        count = cases - share * (len(flavours) - 1) if flavour == flavours[0] else share
        world = worlds.of(harness, flavour)
        coverage = Coverage(world.machine, cover, executed) if cover else None
        if coverage:
            coverage.start()
        try:
            made = cases_of(world, harness, flavour, count, seed)
            _run_world(report, world, harness, flavour, made, progress, stop_at_first)
        finally:
            if coverage:
                coverage.stop()
        if stop_at_first and report.failed:
            break
    report.seconds = time.monotonic() - start
    return report


def cases_of(world: World, harness: Harness, flavour: str, count: int, seed: int) -> Iterator[Any]:
    """The prepared cases, then `count` random ones."""
    yield from harness.prepared(world)
    rng = random.Random(f"{seed}:{harness.function}:{flavour}")
    for _ in range(count):
        yield harness.random(world, rng)


def _run_world(
    report: FunctionReport,
    world: World,
    harness: Harness,
    flavour: str,
    cases: Iterable[Any],
    progress: Progress,
    stop_at_first: bool,
) -> None:
    reached: set[str] = set()
    for i, case in enumerate(cases):
        if i % 50 == 0:
            progress(f"{harness.function} ({flavour}): case {i}")
        checked = harness.run(world, case)
        report.cases += 1
        report.events += len(checked.real.events) + len(checked.real.words) + 1
        reached |= checked.rows
        found = tuple(differences(checked))
        if found and stop_at_first:
            report.failed, report.failures = 1, [Failure(flavour, case, found)]
            return
        if found:
            report.failed += 1
            _keep(report, world, harness, flavour, case, found)
    where = "" if flavour == "plain" else f" ({flavour})"
    report.unreached += [row + where for row in sorted(harness.rows(world) - reached)]


def _keep(
    report: FunctionReport, world: World, harness: Harness, flavour: str, case: Any, found: tuple[Difference, ...]
) -> None:
    """Shrinks a failing case and keeps it, if there are not enough yet."""
    if len(report.failures) < SHOWN:
        smallest = shrink(world, harness, case)
        report.failures.append(Failure(flavour, smallest, _of(world, harness, smallest) or found))


def _of(world: World, harness: Harness, case: Any) -> tuple[Difference, ...]:
    return tuple(differences(harness.run(world, case)))


def shrink(world: World, harness: Harness, case: Any) -> Any:
    """A simpler case that fails too; greedy, at most SHRINK_TRIES runs."""
    tries = SHRINK_TRIES
    while tries > 0:
        for smaller in islice(harness.smaller(case), tries):
            tries -= 1
            if _of(world, harness, smaller):
                case = smaller
                break
        else:
            return case
    return case


@dataclass
class Campaign:
    """Reports of all functions, and the coverage of the compiled code."""

    kernel: str
    release: str
    variant: str
    seed: int
    reports: list[FunctionReport] = field(default_factory=list)
    coverage: list[FunctionCoverage] = field(default_factory=list)

    @property
    def events(self) -> int:
        """Events compared, in all."""
        return sum(report.events for report in self.reports)

    @property
    def ok(self) -> bool:
        """Nothing differs, and every row of every function was reached."""
        return all(report.ok for report in self.reports)


def run_all(
    image: KernelImage,
    names: Sequence[str],
    cases: int,
    seed: int,
    *,
    variant: Variant | None = None,
    progress: Progress = lambda _: None,
    coverage: bool = True,
    jobs: int = 1,
) -> Campaign:
    """Every function of `names` (registry.names), and the coverage of the compiled code by all of them together.

    `jobs`: processes that share the functions; what comes out is the same.
    """
    from emu.checks import registry

    scope = "all" if len(names) > 1 else names[0]
    cover = tuple(registry.covered(image, scope)) if coverage else ()
    work = _Work(image, variant, cases, seed, cover)
    found: dict[str, FunctionReport] = {}
    executed: set[Run] = set()
    for name, report, ran in _results(work, names, min(jobs, len(names)), progress):
        found[name] = report
        executed |= ran
    world = work.worlds["plain"]
    model = variant or world.variant
    campaign = Campaign(image.name, image.release, model.name, seed, [found[name] for name in names])
    campaign.coverage = [cover for report in campaign.reports for cover in report.coverage]
    campaign.coverage += Coverage(world.machine, cover, executed).report() if cover else []
    return campaign


Result = tuple[str, FunctionReport, set[Run]]


class _Work:
    """What a process needs to check functions, one after another, in worlds of its own."""

    def __init__(
        self, image: KernelImage, variant: Variant | None, cases: int, seed: int, cover: tuple[str, ...]
    ) -> None:
        self.worlds = Worlds(image, variant)
        self.cases, self.seed, self.cover = cases, seed, cover

    def run(self, name: str, progress: Progress = lambda _: None) -> Result:
        """One function: its report, and the code that ran."""
        from emu.checks import registry

        executed: set[Run] = set()
        if name in registry.WHOLES:
            return name, run_whole(self.worlds.image, name, self.cases, self.seed, progress), executed
        report = run_function(
            self.worlds,
            registry.harness(name),
            self.cases,
            self.seed,
            progress=progress,
            cover=self.cover,
            executed=executed,
        )
        return name, report, executed


_work: _Work | None = None  # of a process that shares the work: inherited by fork, before any engine is there


def _share(name: str) -> Result:
    assert _work
    return _work.run(name)


def _results(work: _Work, names: Sequence[str], jobs: int, progress: Progress) -> Iterator[Result]:
    """The functions' results as they come."""
    global _work
    if jobs < 2:
        yield from (work.run(name, progress) for name in names)
        return
    _work, others = work, active_children()
    with ProcessPoolExecutor(jobs, get_context("fork"), _ignore_interrupts) as pool:
        running = [pool.submit(_share, name) for name in names]
        try:
            for done, future in enumerate(as_completed(running)):
                progress(f"{done} of {len(names)} functions checked")
                yield future.result()
        except BaseException:
            for process in set(active_children()) - set(others):
                process.terminate()
            raise


def _ignore_interrupts() -> None:
    """A Ctrl-C is also sent to the processes that share the work: the first one ends them, and says so."""
    signal(SIGINT, SIG_IGN)


def run_stored(worlds: Worlds, harness: Harness, flavour: str, case: Any) -> FunctionReport:
    """One case as it is."""
    world = worlds.of(harness, flavour)
    checked = harness.run(world, case)
    report = FunctionReport(harness.function, 1, len(checked.real.events) + len(checked.real.words) + 1)
    found = tuple(differences(checked))
    if found:
        report.failed, report.failures = 1, [Failure(flavour, case, found)]
    return report


def run_whole(
    image: KernelImage, name: str, cases: int, seed: int, progress: Progress = lambda _: None
) -> FunctionReport:
    """A check that has its own run(); its differences are sentences."""
    from emu.checks import registry

    progress(name)
    start = time.monotonic()
    made = registry.whole(name)(image, cases, seed)
    report = FunctionReport(name, made.cases, made.events, len(made.differences), unreached=list(made.unreached))
    report.coverage = list(getattr(made, "coverage", []))
    for text in made.differences[:SHOWN]:
        report.failures.append(Failure("plain", text, (Difference(name, "text", "as the model", text),)))
    report.seconds = time.monotonic() - start
    return report
