"""Fuzzes what reads other people's bytes: targets in turn, each in a process of its own.

    python -m tests.fuzz --seconds 60 --jobs 2          every target for a minute
    python -m tests.fuzz core kdump --seed 7            two of them
    python -m tests.fuzz --list                         what there is
    python -m tests.fuzz --cover                        what the kept inputs cover, in statements

Inputs that reached something new stay in .fuzz/TARGET/corpus and are begun with next time; failures, made smaller, are
in .fuzz/TARGET/failures. Exit code 1 if there is a failure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.fuzz.harness import ROOT

PROGRESS = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)/")
GRACE = 180.0  # seconds that a worker may take beyond its time


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each target [60]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / ".fuzz")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--cover", action="store_true")
    given = parser.parse_args()
    from tests.fuzz.targets import TARGETS

    if given.list:
        print("\n".join(f"{t.name:12}{t.about}" for t in TARGETS.values()))
        return 0
    unknown = [name for name in given.targets if name not in TARGETS]
    if unknown:
        parser.error(f"no target {unknown[0]}: there are {', '.join(TARGETS)}")
    missing = [name for name in ("atheris", "coverage") if find_spec(name) is None]
    if missing:
        parser.error(f"{missing[0]} is not installed: pip install 'pgtable[fuzz]'")
    return _run(given.targets or list(TARGETS), given)


def _run(names: list[str], given: argparse.Namespace) -> int:
    job = partial(cover, given.folder) if given.cover else partial(fuzz, given.folder, given.seconds, given.seed)
    failed = False
    with ThreadPoolExecutor(given.jobs) as pool:
        for text, wrong in pool.map(job, names):
            print(text, flush=True)
            failed |= wrong
    return int(failed)


def fuzz(folder: Path, seconds: float, seed: int, name: str) -> tuple[str, bool]:
    """A line for one target, and whether it failed."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    for old in [*place.glob("failures/*"), *place.glob("stats.json")]:
        old.unlink()
    start = time.monotonic()
    code, log = _worker(["fuzz", name, str(seconds), str(seed), str(place)], seconds + GRACE)
    spent = time.monotonic() - start
    (place / "log").write_text(log)
    stats: dict[str, Any] = {"cases": 0, "slowest": 0.0, "failures": {}}
    if (place / "stats.json").exists():
        stats = json.loads((place / "stats.json").read_text())
    if code:
        stats["failures"][f"the process ended with {code}, see {place}/log"] = 1
    edges, features, inputs = (PROGRESS.findall(log) or [("-", "-", "-")])[-1]
    stats |= {"seconds": round(spent, 1), "edges": edges, "features": features, "inputs": inputs}
    (place / "stats.json").write_text(json.dumps(stats))
    line = f"{name:12}{stats['cases']:>9} cases {stats['cases'] / spent:>7.0f}/s  {edges:>6} edges {inputs:>5} inputs"
    line += f"  slowest {stats['slowest']:.2f} s  {len(stats['failures'])} failures"
    lines = [line, *(f"    {key} ({n} times)" for key, n in stats["failures"].items())]
    return "\n".join(lines), bool(stats["failures"])


def cover(folder: Path, name: str) -> tuple[str, bool]:
    """What the kept inputs of a target cover."""
    code, log = _worker(["cover", name, str(folder / name)], 3600.0)
    if code:
        return f"{name}: {log}", True
    found = json.loads(log.splitlines()[-1])
    (folder / name / "cover.json").write_text(json.dumps(found))
    parts = [f"{module} {100 * done // total} %" for module, (done, total) in found["modules"].items()]
    return f"{name:12}{found['inputs']:>5} inputs  {', '.join(parts)}", False


def _worker(arguments: list[str], seconds: float) -> tuple[int, str]:
    """Exit code and output of a worker, which has a cache of its own."""
    cache = tempfile.mkdtemp(prefix="pgtable-fuzz-")
    environment = {**os.environ, "PGTABLE_CACHE": cache, "PYTHONHASHSEED": "0"}
    command = [sys.executable, "-m", "tests.fuzz.worker", *arguments]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=seconds, check=False)
        return done.returncode, (done.stdout + done.stderr).decode("utf-8", "replace")
    except subprocess.TimeoutExpired as error:
        return -1, (error.stderr or b"").decode("utf-8", "replace")
    finally:
        shutil.rmtree(cache, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
