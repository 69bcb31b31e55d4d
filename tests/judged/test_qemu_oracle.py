"""The oracle: that it asks QEMU what the corpora were asked, and what happens when QEMU dies, hangs or is missing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path
from random import Random

import numpy as np
import pytest

from emu.judge import guest
from emu.judge.cases import TRAPS, kinds, random_case
from emu.judge.corpus import DEFAULTS, DONE, EXC, HANDLER, HANDLER_VA, PROGRAM_PAGE, TABLES, Answer, Case, load
from emu.judge.qemu import GuestDied, Oracle, OracleError, QemuMissing, UnsupportedError
from tests.judged.oracles import QEMUS, open_oracle
from tests.kernels import lack

CORPUS = Path(__file__).parent / "corpus"
needs_qemu = pytest.mark.qemu


@pytest.fixture(scope="module", params=QEMUS, ids=lambda path: Path(path).name)
def oracle(request: pytest.FixtureRequest) -> Iterator[Oracle]:
    with open_oracle(request.param) as one:
        yield one


@pytest.fixture(scope="module")
def every() -> list[Case]:
    return [case for name in ("at_clean", "access", "at_edge") for case in load(CORPUS / f"{name}.jsonl.xz")]


# ---- the same questions, the same answers


def fault_of(answer: Answer) -> int | None:
    """The fault status code of an answer, None if there was no fault."""
    if isinstance(answer, tuple):
        return answer[0] & 0x3F
    if answer is None or answer == DONE or answer & EXC:
        return None
    return answer >> 1 & 0x3F if answer & 1 else None


def why_older(case: Case, op: str, recorded: Answer, now: Answer) -> str:
    """Which known difference of QEMU 7.2 from 10.0 and 11.1 this is: the names are those of cases.TRAPS."""
    fault = fault_of(recorded)
    if fault in (0x04, 0x05, 0x2B):
        return "block level"  # what has no blocks is a translation fault; 7.2 goes on with the block
    epan = (case.regs["SCTLR_EL1"] | case.regs["SCTLR_EL2"]) >> 57 & 1
    if fault is not None and fault >> 2 == 3 and epan and (op.endswith("P") or case.pan):
        return "PAN3"
    ints = isinstance(recorded, int) and isinstance(now, int)
    if ints and not recorded & 1 and recorded ^ now in (0x80, 0x100, 0x180) and recorded >> 7 & 3 == 2:  # type: ignore[operator]
        return "sharing"
    return f"unexplained: {case.id} {op}: {recorded} recorded, {now} now"


def compare(case: Case, recorded: tuple[Answer, ...], now: tuple[Answer, ...], older: bool) -> Counter[str]:
    found: Counter[str] = Counter()
    for (_, op), a, b in zip(case.queries, recorded, now, strict=True):
        if a is None or (b is None and not older):
            found["not asked"] += 1
        elif a == b:
            found["same"] += 1
        else:
            found[why_older(case, op, a, b) if older else f"differs: {case.id} {op} {a} {b}"] += 1
    return found


def ask_again(oracle: Oracle, cases: list[Case]) -> Counter[str]:
    found: Counter[str] = Counter()
    for case in cases:
        older = oracle.version not in case.answers
        version = "10.0" if older else oracle.version
        answers = oracle.ask(case, survive=True)
        found += compare(case, tuple(case.answers[version]), answers.answers, older)
        if not older:
            assert answers.after == case.changed(version), case.id
    return found


def sample(every: list[Case], oracle: Oracle, step: int) -> list[Case]:
    """Every `step`-th case of a kind that this QEMU can be asked and be compared in."""
    chosen: list[Case] = []
    seen: Counter[tuple[str, bool]] = Counter()
    for case in every:
        if case.cpu != "max" or case.kind in ("s2-only", "s1s2"):
            continue
        if oracle.version in case.answers or (oracle.version == "7.2" and "10.0" in case.answers):
            seen[case.kind, case.is_access] += 1
            if seen[case.kind, case.is_access] % step == 1 or step == 1:
                chosen.append(case)
    return chosen


@needs_qemu
def test_qemu_answers_a_sample_of_the_corpora_as_recorded(oracle: Oracle, every: list[Case]) -> None:
    cases = sample(every, oracle, 15)
    found = ask_again(oracle, cases)
    assert [name for name in found if name.startswith(("differs", "unexplained"))] == []
    assert len(cases) >= 100
    assert found["same"] > 0.8 * found.total()


@needs_qemu
@pytest.mark.full
def test_qemu_answers_all_of_stage_1_as_recorded(oracle: Oracle, every: list[Case]) -> None:
    found = ask_again(oracle, sample(every, oracle, 1))
    print(oracle.version, found.most_common())
    assert [name for name in found if name.startswith(("differs", "unexplained"))] == []


@needs_qemu
def test_qemu_answers_stage_2_as_recorded(oracle: Oracle, every: list[Case]) -> None:
    chosen = [c for c in every if c.kind in ("s2", "s2-only", "s1s2") and oracle.version in c.answers][::25]
    if not chosen:
        pytest.skip(f"no stage 2 case was put to QEMU {oracle.version}")
    found = ask_again(oracle, chosen)
    assert [name for name in found if name.startswith("differs")] == []


@needs_qemu
@pytest.mark.parametrize("cpu", ["max,lpa2=off", "neoverse-n1", "cortex-a57", "cortex-a76"])
def test_smaller_cpus_answer_as_recorded(cpu: str, every: list[Case]) -> None:
    with open_oracle(cpu=cpu) as oracle:
        version = "10.0" if oracle.version == "7.2" else oracle.version
        chosen = [c for c in every if c.cpu == cpu and version in c.answers][::4]
        found: Counter[str] = Counter()
        for case in chosen:
            answers = oracle.ask(case, survive=True).answers
            found += compare(case, tuple(case.answers[version]), answers, oracle.version == "7.2")
    assert [name for name in found if name.startswith(("differs", "unexplained"))] == []
    assert found["same"] > 800


# ---- cases by hand

ROOT = TABLES
LEAF = 1 << 10 | 3 << 8 | 3  # AF, inner shareable, a page that only EL1 reaches


def by_hand(*queries: tuple[int, str], leaf: int = 0x1_2345_6000 | LEAF, **regs: int) -> Case:
    """4K, 39 bits, one page at 0x5000."""
    return Case(
        id="by hand",
        kind="s1-4k",
        cpu="max",
        regs={**DEFAULTS, "TCR_EL1": 25 | 25 << 16 | 2 << 30 | 5 << 32, "TTBR0_EL1": ROOT, "SCTLR_EL1": 0x30D0_0801}
        | regs,
        mem={ROOT: ROOT + 0x1003, ROOT + 0x1000: ROOT + 0x2003, ROOT + 0x2028: leaf},
        queries=queries,
    )


def access_by_hand(*queries: tuple[int, str], leaf: int) -> Case:
    case = by_hand(*queries, leaf=leaf, TTBR1_EL1=HANDLER, VBAR_EL1=HANDLER_VA[1])
    return replace(case, half=0)


@needs_qemu
def test_at_gives_par(oracle: Oracle) -> None:
    answers = oracle.ask(by_hand((0x5123, "S1E1R"), (0x5123, "S1E0R"), (0x6000, "S1E1W"), (1 << 40, "S1E1R")))
    assert answers.answers == (0xFF00_0001_2345_6B80, 0x81F, 0x80F, 0x809)
    assert answers.after == {}


@needs_qemu
def test_a_table_without_ram_takes_an_exception(oracle: Oracle) -> None:
    [answer] = oracle.ask(by_hand((0x5000, "S1E1R"), TTBR0_EL1=0x9000_0000)).answers
    assert isinstance(answer, int)
    assert answer & EXC
    assert answer & 0x3F == 0x15  # external abort on a walk, level 1


@needs_qemu
def test_hardware_sets_the_access_flag(oracle: Oracle) -> None:
    ha = by_hand().regs["TCR_EL1"] | 1 << 39
    case = replace(access_by_hand((0x5000, "LD1"), leaf=0xC000_0000 | LEAF & ~(1 << 10)), pan=0)
    answers = oracle.ask(replace(case, regs={**case.regs, "TCR_EL1": ha}))
    assert answers.answers == (DONE,)
    assert answers.after == {ROOT + 0x2028: 0xC000_0000 | LEAF}


ALL = ("LD1", "ST1", "LDT", "STT", "LD0", "ST0", "EX1", "EX0", "SWP1", "SWP0")


@needs_qemu
@pytest.mark.parametrize(
    ("bits", "done"),
    [
        (0, "LD1 ST1 EX1 EX0 SWP1"),
        (1 << 6, "LD1 ST1 LDT STT LD0 ST0 EX0 SWP1 SWP0"),  # EL0 writes, so EL1 does not fetch
        (1 << 7, "LD1 EX1 EX0"),
        (3 << 6, "LD1 LDT LD0 EX1 EX0"),
        (3 << 6 | 1 << 53, "LD1 LDT LD0 EX0"),
        (3 << 6 | 1 << 54, "LD1 LDT LD0 EX1"),
    ],
)
def test_real_accesses_see_the_permissions(oracle: Oracle, bits: int, done: str) -> None:
    case = access_by_hand(*((0x5008, op) for op in ALL), leaf=0xC000_0000 | LEAF | bits)
    answers = dict(zip(ALL, oracle.ask(case).answers, strict=True))
    assert {op for op, answer in answers.items() if answer == DONE} == set(done.split())
    assert {a[0] & 0x3F for a in answers.values() if isinstance(a, tuple)} <= {0x0F}


@needs_qemu
def test_el2_accesses_report_to_el2(oracle: Oracle) -> None:
    case = random_case(Random(1), "acc-el20")
    esrs = [a[0] for a in oracle.ask(case).answers if isinstance(a, tuple)]
    assert esrs
    assert all(esr >> 63 for esr in esrs)


@needs_qemu
def test_an_access_that_could_hurt_is_not_tried(oracle: Oracle) -> None:
    for target in (0x0900_0000, PROGRAM_PAGE, HANDLER, ROOT):  # a device, the program twice, a table
        case = access_by_hand((0x5000, "ST1"), (0x5000, "EX1"), leaf=target | LEAF)
        assert oracle.ask(case).answers == (None, None)
    swap = access_by_hand((0x5000, "SWP1"), (0x5000, "LD1"), leaf=0x9000_0000 | LEAF)  # a hole
    assert [a if a is None else fault_of(a) for a in oracle.ask(swap).answers] == [None, 0x10]


@needs_qemu
def test_nothing_of_a_case_is_left_in_ram(oracle: Oracle) -> None:
    rng = Random(3)
    for kind in ("s1-ha", "acc-hahd", "acc-64k", "acc-el20"):
        oracle.ask(random_case(rng, kind, avoid=TRAPS["7.2"]))
    for base, size in oracle._guest.islands:
        low = TABLES if base < TABLES else base
        assert not np.any(oracle._guest.view(low, (base + size - low) // 8))


@needs_qemu
def test_the_same_case_has_the_same_answers(oracle: Oracle) -> None:
    avoid = TRAPS[oracle.version]
    for kind in kinds(oracle.registers | oracle.operations, avoid):
        case = random_case(Random(2), kind, avoid=avoid)
        first = oracle.ask(case, survive=True)
        assert oracle.ask(case, survive=True) == first


# ---- what goes wrong


@needs_qemu
def test_what_this_qemu_lacks_is_named(oracle: Oracle) -> None:
    with pytest.raises(UnsupportedError, match=r"case by hand asks S1E9R, which QEMU \d+\.\d+ -cpu max cannot"):
        oracle.ask(by_hand((0, "S1E9R")))
    with pytest.raises(UnsupportedError, match=r"sets TTBR9_EL1 to 0x7, which QEMU .* cannot"):
        oracle.ask(by_hand((0, "S1E1R"), TTBR9_EL1=7))
    with pytest.raises(UnsupportedError, match="is for -cpu cortex-a57, this is QEMU"):
        oracle.ask(replace(by_hand(), cpu="cortex-a57"))


@needs_qemu
def test_a_guest_that_hangs_is_reported_and_started_again() -> None:
    with open_oracle(timeout=0.3) as oracle:
        lost = replace(by_hand((0x5000, "S1E1R"), (0x5000, "S1E3R"), (0x5000, "S1E1R")), kind="el3")
        lost = replace(lost, regs={**lost.regs, "SCTLR_EL3": 0x30C5_0831, "TCR_EL3": 25, "TTBR0_EL3": ROOT})
        with pytest.raises(GuestDied, match=r"died of query 1 of by hand \(S1E3R 0x5000\): the guest did not answer"):
            oracle.ask(lost)
        answers = oracle.ask(lost, survive=True)
        assert answers.answers == (0xFF00_0001_2345_6B80, None, 0xFF00_0001_2345_6B80)
        assert answers.deaths == (1,)


@needs_qemu
def test_a_qemu_that_is_killed_is_reported_and_started_again() -> None:
    with open_oracle() as oracle:
        before = oracle.pid
        os.kill(before, signal.SIGKILL)
        with pytest.raises(GuestDied, match="QEMU ended"):
            oracle.ask(by_hand((0x5123, "S1E1R")))
        assert oracle.pid != before
        assert oracle.ask(by_hand((0x5123, "S1E1R"))).answers == (0xFF00_0001_2345_6B80,)


@needs_qemu
def test_qemu_7_2_dies_of_a_block_at_level_minus_1(oracle: Oracle) -> None:
    """Arm: a translation fault of level -1, which has no blocks; 7.2 takes the block, and has no code for its fault."""
    case = by_hand((0x5000, "S1E1R"), (1 << 51, "S1E1R"), (0x5000, "S1E1W"), TCR_EL1=12 | 5 << 32 | 1 << 59)
    case = replace(case, mem={ROOT: 1})
    if oracle.version != "7.2":
        assert oracle.ask(case).answers == (0x857, 0x857, 0x857)
        return
    with pytest.raises(GuestDied, match=r"died of query 0 .*level >= 0"):
        oracle.ask(case)
    assert oracle.ask(case, survive=True).deaths == (0, 2)


def is_gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


@needs_qemu
def test_closing_ends_qemu() -> None:
    with open_oracle() as oracle:
        pid = oracle.pid
        assert not is_gone(pid)
    assert is_gone(pid)
    oracle.close()  # twice is fine


@needs_qemu
@pytest.mark.parametrize("end", ["pass", "import os; os._exit(1)", "import os; os.kill(os.getpid(), 9)"])
def test_qemu_ends_with_the_process_that_started_it(end: str) -> None:
    open_oracle().close()
    if not shutil.which("setpriv") and end != "pass":
        lack("qemu", "setpriv (Debian package util-linux) is not there")
    code = f"from emu.judge.qemu import Oracle; o = Oracle(); print(o.pid, flush=True); {end}"
    pid = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout)
    for _ in range(100):
        if is_gone(pid):
            return
        time.sleep(0.05)
    pytest.fail(f"QEMU {pid} is still there")


def test_a_missing_qemu_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(
        QemuMissing, match="qemu-system-aarch64 is not there or not on PATH: install the Debian package"
    ):
        Oracle()
    with pytest.raises(QemuMissing, match="/no/such/qemu is not there"):
        Oracle("/no/such/qemu")


def test_what_is_no_qemu_is_named() -> None:
    with pytest.raises(OracleError, match="--version does not say that it is QEMU"):
        Oracle(shutil.which("true"))


def test_the_program_is_its_source_assembled(tmp_path: Path) -> None:
    tools = [shutil.which(f"aarch64-linux-gnu-{tool}") for tool in ("as", "objcopy")]
    if not all(tools):
        lack("qemu", "aarch64-linux-gnu-as is not there (Debian package binutils-aarch64-linux-gnu)")
    assembler, objcopy = map(str, tools)
    source = resources.files("emu.judge") / "guest.S"
    (tmp_path / "guest.S").write_text(source.read_text())
    subprocess.run([assembler, "-march=armv8.5-a", "-o", "guest.o", "guest.S"], cwd=tmp_path, check=True)
    subprocess.run([objcopy, "-O", "binary", "guest.o", "guest.bin"], cwd=tmp_path, check=True)
    assert (tmp_path / "guest.bin").read_bytes() == guest.image()


def test_every_recorded_operation_has_a_thunk(every: list[Case]) -> None:
    thunks = guest.directory(guest.image())
    for case in every:
        assert {f"{'TRY' if case.is_access else 'AT'} {op}" for _, op in case.queries} <= set(thunks)
        assert {f"MSR {name}" for name in case.regs} <= set(thunks)
