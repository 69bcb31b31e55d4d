"""What fuzzing has found stays found: every input of tests/fuzz_corpus, and every seed, is returned or refused as it
should be, in bounded time and memory. The fuzzing itself is `python -m tests.fuzz` (docs/fuzzing.md).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import SEED
from tests.fuzz import files
from tests.fuzz.harness import ROOT, Target, failure, minimised
from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS

CORPUS = ROOT / "tests" / "fuzz_corpus"
KEPT = sorted(CORPUS.glob("*/*.bin"))
LARGEST = 20_000  # bytes of a kept input


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("PGTABLE_CACHE", str(tmp_path))
    yield
    files._folder.cache_clear()


@pytest.mark.parametrize("path", KEPT, ids=[f"{path.parent.name}/{path.stem}" for path in KEPT])
def test_what_was_found_once(path: Path) -> None:
    wrong = failure(TARGETS[path.parent.name], path.read_bytes())
    assert wrong is None, wrong.text


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_some_seeds_and_a_few_mutations(target: Target) -> None:
    seeds, rng = target.seeds(), random.Random(SEED)
    more = [mutated(rng.choice(seeds), target.longest, rng.getrandbits(32), seeds) for _ in range(5)]
    for data in [*rng.sample(seeds, min(len(seeds), 8)), *more]:
        wrong = failure(target, data)
        assert wrong is None, (data[:200], wrong.text)


def test_the_corpus_is_small_and_belongs_to_targets() -> None:
    assert len(KEPT) >= 30
    for path in KEPT:
        assert path.parent.name in TARGETS
        assert path.stat().st_size <= LARGEST


def test_a_target_names_its_modules() -> None:
    for target in TARGETS.values():
        for module in target.modules:
            assert (ROOT / module).is_file(), module


# the harness itself


def target(run: object, *errors: str) -> Target:
    return Target("t", "a test", run, lambda: [b""], errors, ())  # type: ignore[arg-type]


def test_what_counts_as_a_failure() -> None:
    def refuse(data: bytes) -> None:
        raise LookupError(data.decode())

    def loop(data: bytes) -> None:
        while True:
            pass

    assert failure(target(len), b"") is None
    assert failure(target(refuse, "LookupError"), b"no such thing") is None
    assert failure(target(refuse), b"no such thing").key == "LookupError outside"  # type: ignore[union-attr]
    assert failure(target(refuse, "LookupError"), b"").key.startswith("LookupError is no sentence")  # type: ignore[union-attr]
    assert failure(target(loop), b"", seconds=0.1).key.startswith("slow")  # type: ignore[union-attr]
    assert failure(target(lambda data: bytearray(1 << 40)), b"").key == "MemoryError outside"  # type: ignore[union-attr]


def test_a_failure_is_made_smaller() -> None:
    def run(data: bytes) -> None:
        assert b"bad" not in data

    data = bytes(range(1, 97)) * 3 + b"bad" + b"z" * 200
    found = failure(target(run), data)
    assert found
    assert minimised(target(run), data, found.key) == b"bad"


@pytest.mark.full
@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed (pip install 'pgtable[fuzz]')")
def test_the_command_finds_what_is_wrong(tmp_path: Path) -> None:
    """A second of every kind of target, with Atheris."""
    from tests.fuzz.__main__ import cover, fuzz

    for name in ("registers", "gdb"):
        line, failed = fuzz(tmp_path, 1.0, SEED, name)
        assert not failed, line
        assert " cases " in line
        text, _ = cover(tmp_path, name)
        assert " %" in text
