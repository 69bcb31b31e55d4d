"""A process that fuzzes one target with Atheris (coverage-guided), or says what a corpus covers.

    python -m tests.fuzz.worker fuzz TARGET SECONDS SEED FOLDER      python -m tests.fuzz.worker cover TARGET FOLDER

Rules of this file:
- Nothing of ours is imported before Atheris can instrument it. A failure does not end the run: it is made smaller
  and stored, once for each key. A crash of the interpreter itself is left by libFuzzer as `crash-...`.
- FOLDER has corpus/ (what is worth keeping), failures/, and stats.json at the end.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.fuzz.harness import Failure, Target

BACKSTOP = 120  # seconds after which libFuzzer itself ends a case: one that hangs in C code
FAIRLY_OURS = 0.6  # of mutations are ours, the others libFuzzer's


class Run:
    """One run: what was tried and found."""

    def __init__(self, target: Target, seconds: float, folder: Path) -> None:
        self.target, self.folder = target, folder
        self.end = time.monotonic() + seconds
        self.cases = self.failing = 0
        self.slowest = 0.0
        self.found: dict[str, int] = {}
        self.seeds = target.seeds()

    def one(self, data: bytes) -> None:
        """One case; the last one ends the process."""
        from tests.fuzz.harness import failure

        start = time.process_time()
        wrong = failure(self.target, data)
        self.slowest = max(self.slowest, time.process_time() - start)
        self.cases += 1
        if wrong:
            self.failing += 1
            self.keep(wrong, data)
        if time.monotonic() > self.end:
            self.write_stats()
            os._exit(0)

    def keep(self, wrong: Failure, data: bytes) -> None:
        """Stores a failure that is new, smaller."""
        from tests.fuzz.harness import minimised

        self.found[wrong.key] = self.found.get(wrong.key, 0) + 1
        if self.found[wrong.key] > 1:
            return
        name = hashlib.sha256(wrong.key.encode()).hexdigest()[:12]
        place = self.folder / "failures"
        place.mkdir(exist_ok=True)
        (place / f"{name}.txt").write_text(f"{wrong.key}\n\n{wrong.text}")
        (place / f"{name}.bin").write_bytes(minimised(self.target, data, wrong.key))

    def write_stats(self) -> None:
        """The figures of the run."""
        row = {"cases": self.cases, "failing": self.failing, "slowest": round(self.slowest, 3), "failures": self.found}
        (self.folder / "stats.json").write_text(json.dumps(row))

    def mutate(self, data: bytes, longest: int, seed: int) -> bytes:
        """A mutation for libFuzzer."""
        import atheris

        from tests.fuzz.mutate import mutated

        if seed % 100 < 100 * FAIRLY_OURS:
            return mutated(data, longest, seed, self.seeds)
        changed: bytes = atheris.Mutate(data, longest)
        return changed


def fuzz(name: str, seconds: float, seed: int, folder: Path) -> None:
    """Runs until the time is over; does not return."""
    import atheris

    with atheris.instrument_imports(include=["emu", "pgtable", "kernel_model"], enable_loader_override=False):
        from tests.fuzz.targets import TARGETS

        target = TARGETS[name]
        run = Run(target, seconds, folder)
        corpus = folder / "corpus"
        corpus.mkdir(parents=True, exist_ok=True)
        for data in run.seeds:
            (corpus / hashlib.sha1(data).hexdigest()).write_bytes(data)
        for data in run.seeds:  # imports what is imported on use
            run.one(data)
        options = [f"-seed={seed}", f"-max_len={target.longest}", f"-timeout={BACKSTOP}", "-rss_limit_mb=0"]
        options += ["-malloc_limit_mb=0", f"-artifact_prefix={folder}/", "-print_final_stats=0", str(corpus)]
        atheris.Setup([sys.argv[0], *options], run.one, custom_mutator=run.mutate)
        atheris.Fuzz()


def cover(name: str, folder: Path) -> dict[str, Any]:
    """Statements of the target's modules, and how many of them its corpus runs."""
    import coverage

    from tests.fuzz.harness import ROOT

    measured = coverage.Coverage(data_file=None, source=[str(ROOT / package) for package in ("emu", "pgtable")])
    measured.start()
    from tests.fuzz.harness import failure
    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    inputs = sorted((folder / "corpus").iterdir())
    for path in inputs:
        failure(target, path.read_bytes(), 60.0)
    measured.stop()
    counts = {}
    for module in target.modules:
        _, statements, _, missing, _ = measured.analysis2(str(ROOT / module))
        counts[module] = (len(statements) - len(missing), len(statements))
    return {"inputs": len(inputs), "modules": counts}


def main() -> None:
    """One job."""
    mode, name, *rest = sys.argv[1:]
    if mode == "fuzz":
        fuzz(name, float(rest[0]), int(rest[1]), Path(rest[2]))
    else:
        print(json.dumps(cover(name, Path(rest[0]))))


if __name__ == "__main__":
    main()
