"""Whole campaigns: workers and coordinators killed in the middle, on a process pool and on a Dask cluster.

Judge: the same cases run one after another in this process. Whatever was killed, the tables must be equal.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # its types are a package of their own
import pytest
from click.testing import CliRunner, Result

from emu.campaigns import comparisons, translations
from emu.campaigns.plan import Plan
from emu.campaigns.store import Store
from emu.campaigns.work import run_chunk
from emu.checks.campaign import Worlds
from emu.cli import cli
from emu.cli_fuzz import make_plan
from kernel_model.variants import by_name
from tests.judged.oracles import open_oracle
from tests.kernels import kernel_image, kernel_path

KERNEL = "debian:6.12"
SCHEMA = Path(__file__).resolve().parents[2] / "docs" / "schema" / "fuzz.json"
COMMAND = (sys.executable, "-c", "from emu.cli import main; main()", "fuzz")
TABLES = ("campaign", "cases", "findings")

pytestmark = [pytest.mark.kernels, pytest.mark.qemu]


@pytest.fixture(autouse=True)
def _judges() -> None:
    kernel_path(KERNEL)
    open_oracle().close()


FUNCTIONS = ("set_memory_valid", "walk_page_range")


def options(cases: int, checks: int) -> list[str]:
    given = ["--cases", str(cases), "--checks", str(checks), "--kernel", KERNEL, "--seed", "5"]
    return [*given, *(word for name in FUNCTIONS for word in ("--function", name))]


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, args)


def content(path: Path) -> list[list[tuple[Any, ...]]]:
    """Everything in a store."""
    database = sqlite3.connect(path)
    try:
        return [database.execute(f"SELECT * FROM {name}").fetchall() for name in TABLES]
    finally:
        database.close()


def stored(path: Path) -> int:
    """Cases that are in; 0 where there is no store yet."""
    try:
        return len(content(path)[1])
    except sqlite3.OperationalError:
        return 0


def alone(path: Path, plan: Plan) -> list[list[tuple[Any, ...]]]:
    """What the campaign gives, one chunk after another."""
    store = Store.open(str(path), plan)
    for chunk in plan.chunks():
        store.add(chunk.unit, run_chunk(chunk))
    store.close()
    return content(path)


def plan_of(cases: int, checks: int) -> Plan:
    return make_plan(5, cases=cases, checks=checks, kernels=(KERNEL,), functions=FUNCTIONS)


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def workers_of(pid: int) -> list[int]:
    """The processes that work for a coordinator or a cluster."""
    return [p for p in children(pid) if b"spawn_main" in Path(f"/proc/{p}/cmdline").read_bytes()]


def begun(path: Path, *args: str, more: int = 1) -> subprocess.Popen[str]:
    """A campaign in a process of its own, which has stored `more` cases since."""
    before = stored(path)
    process = subprocess.Popen([*COMMAND, str(path), *args], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until = time.monotonic() + 120
    while stored(path) < before + more:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.02)
    return process


def test_a_worker_killed_in_the_middle_loses_nothing_and_counts_nothing_twice(tmp_path: Path) -> None:
    process = begun(tmp_path / "a.db", *options(30, 75), "--jobs", "2")
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "30 cases" in out
    assert "75 comparisons: 75 agree, 0 known, 0 differ" in out
    assert content(tmp_path / "a.db") == alone(tmp_path / "b.db", plan_of(30, 75))


@pytest.mark.full
def test_a_coordinator_killed_or_interrupted_leaves_a_store_that_is_gone_on_with(tmp_path: Path) -> None:
    path, args = tmp_path / "a.db", (*options(150, 500), "--jobs", "2")
    for end, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        process = begun(path, *args)
        pids = workers_of(process.pid)
        process.send_signal(end)
        _, err = process.communicate(timeout=60)
        assert process.returncode == code
        assert end == signal.SIGKILL or err.strip() == "pgtable: interrupted"
        assert 0 < stored(path) < 650
        until = time.monotonic() + 30
        while any(Path(f"/proc/{pid}").exists() for pid in pids):
            assert time.monotonic() < until, "a worker is still there"
            time.sleep(0.1)
    done = subprocess.run([*COMMAND, str(path), *args], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert content(path) == alone(tmp_path / "b.db", plan_of(150, 500))


@pytest.fixture
def cluster() -> Iterator[tuple[str, Callable[[], list[int]]]]:
    """The address of a Dask cluster of two processes of this machine, and what gives the pids of its workers."""
    distributed = pytest.importorskip("distributed")
    code = (
        "import sys; from distributed import LocalCluster\n"
        "if __name__ == '__main__':\n"
        "    c = LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None)\n"
        "    print(c.scheduler_address, flush=True); sys.stdin.read(); c.close()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin
    assert process.stdout
    address = process.stdout.readline().strip()
    assert address.startswith("tcp://"), distributed.__version__
    yield address, lambda: workers_of(process.pid)
    process.stdin.close()
    process.wait(60)
    process.stdout.close()


@pytest.mark.full
def test_a_dask_cluster_gives_the_same_with_a_worker_killed(
    tmp_path: Path, cluster: tuple[str, Callable[[], list[int]]]
) -> None:
    address, workers = cluster
    process = begun(tmp_path / "a.db", *options(150, 500), "--scheduler", address)
    pids = workers()
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGKILL)
    out, err = process.communicate(timeout=240)  # Dask says there what it lost
    assert process.returncode == 0, err
    assert "500 comparisons: 500 agree" in out
    assert content(tmp_path / "a.db") == alone(tmp_path / "b.db", plan_of(150, 500))


def test_a_scheduler_that_is_not_there_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = ("fuzz", str(tmp_path / "a.db"), "--cases", "1", "--scheduler")
    bad = run(*args, "nonsense://x")
    assert (bad.exit_code, bad.stderr.count("\n")) == (2, 1)
    assert "--scheduler nonsense://x: " in bad.stderr
    monkeypatch.setitem(sys.modules, "distributed", None)
    missing = run(*args, "tcp://127.0.0.1:1")
    assert missing.stderr == "pgtable: error: --scheduler needs Dask: pip install 'pgtable[cluster]'\n"


def finding_of(path: Path) -> dict[str, Any]:
    """The first finding of a store, of which the report is valid."""
    result = run("fuzz", str(path), "--report", "--json")
    report: dict[str, Any] = json.loads(result.stdout)
    jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text())).validate(report)
    assert result.exit_code == 1
    first: dict[str, Any] = report["findings"][0]
    return first


def again(finding: dict[str, Any], *more: str) -> Result:
    """The replay command of a finding."""
    command, *args = shlex.split(finding["replay"])
    assert command == "pgtable"
    return run(*args, *more)


def test_a_disagreement_is_found_again_by_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of the known faults is taken away: what it explained is found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("emu.cli_judge.STORED", 0)  # shrinking takes its time
    plan = make_plan(5, cases=2, kinds=("s1s2-4k",))
    with monkeypatch.context() as patched:
        patched.setattr("emu.judge.verdict.explain", lambda *_: "")
        assert sum(row[10] for row in alone(tmp_path / "a.db", plan)[1]) > 0
        finding = finding_of(tmp_path / "a.db")
        result = again(finding)
        assert (result.exit_code, finding["text"] in result.stdout) == (1, True)
        assert " 1     " in result.stdout.splitlines()[1]  # one case
    assert again(finding).exit_code == 0


def test_a_difference_is_found_again_by_its_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model of another kernel is asked."""
    worlds = Worlds(kernel_image(KERNEL), by_name("7.x"))
    monkeypatch.setattr(comparisons, "_worlds", lambda _: worlds)
    plan = make_plan(5, checks=30, kernels=(KERNEL,), functions=("kernel_page_present",))
    alone(tmp_path / "a.db", plan)
    finding = finding_of(tmp_path / "a.db")
    result = again(finding, "--model", "7.x", "--json")
    (report,) = json.loads(result.stdout)["functions"]
    assert (result.exit_code, report["cases"], report["failed"]) == (1, 1, 1)
    assert again(finding).exit_code == 0


def test_a_race_is_found_again_by_its_command(tmp_path: Path) -> None:
    path = str(tmp_path / "a.db")
    args = ("race", "lost-update", "--campaign", path, "--kernel", KERNEL, "--random", "60", "--seed", "5")
    result = run(*args, "--jobs", "1")
    assert result.exit_code == 1
    finding = finding_of(tmp_path / "a.db")
    assert "--replay" in finding["replay"]
    replayed = again(finding, "--json")
    assert replayed.exit_code == 1
    assert [f["kind"] for f in json.loads(replayed.stdout)["findings"]] == ["lost-update"]
    assert run(*args, "--jobs", "1").stdout == result.stdout


def test_an_exception_of_ours_is_a_finding_that_can_be_had_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(5, cases=2, kinds=("s1-4k",))
    with monkeypatch.context() as patched:
        patched.setattr(translations, "judge_case", lambda *_: {}["x"])
        alone(tmp_path / "a.db", plan)
        finding = finding_of(tmp_path / "a.db")
        assert (finding["cases"], finding["signature"].split()[0]) == (2, "KeyError")
        result = again(finding)
        assert (result.exit_code, "KeyError in" in result.stdout) == (1, True)
    assert again(finding).exit_code == 0


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("--cases", "0"), "fuzz: nothing to do: give --cases, or --checks with --kernel"),
        (("--kind", "s1-5k"), "--kind s1-5k: must be one of s1-4k, "),
        (("--granule", "8K"), "--granule 8K: must be one of 4K, 16K, 64K, mixed"),
        (("--kind", "s1-4k", "--granule", "64K"), "can be asked nothing of: s1-4k, 64K"),
        (("--qemu", "/nonexistent/qemu"), "/nonexistent/qemu is not there or not on PATH"),
        (("--cases", "0", "--kernel", KERNEL, "--function", "strlen"), f"{KERNEL} has no strlen: it has "),
        (("--report",), "no such store"),
        (("--case", "x"), "no such store"),
    ],
)
def test_bad_input_is_one_sentence_and_makes_no_store(tmp_path: Path, args: tuple[str, ...], sentence: str) -> None:
    result = run("fuzz", str(tmp_path / "a.db"), *args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_two_seeds_do_not_share_a_store(tmp_path: Path) -> None:
    plan = make_plan(5, cases=1, kinds=("s1-4k",))
    before = alone(tmp_path / "a.db", plan)
    args = ("fuzz", str(tmp_path / "a.db"), "--cases", "1", "--kind", "s1-4k", "--jobs", "1")
    other = run(*args, "--seed", "6")
    assert (other.exit_code, other.stdout) == (2, "")
    assert other.stderr.endswith("a.db: holds a campaign with seed 5, not 6: name another file\n")
    assert (run(*args, "--seed", "5").exit_code, content(tmp_path / "a.db")) == (0, before)
    unknown = run("fuzz", str(tmp_path / "a.db"), "--case", "x")
    assert unknown.stderr.endswith("a.db: has no case 'x'\n")
