"""Random cases: the same for a seed, safe to ask, aimed at every fault; and a failing one made small."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from random import Random

import pytest

from emu.judge.cases import KINDS, TRAPS, granule_names, kinds, random_case
from emu.judge.corpus import DEFAULTS, DONE, EXC, HANDLER, HANDLER_VA, Case, dump, has_ram, is_safe, loads
from emu.judge.model import memory_of, registers_of
from emu.judge.qemu import Oracle
from emu.judge.shrink import shrink
from emu.judge.trees import Grower, Space, Style, harmless
from pgtable import Access, Fault, Stage2Params, stage2_walk
from tests.judged.oracles import open_oracle

CPUS = ("max", "max,lpa2=off", "neoverse-n1", "neoverse-v1", "cortex-a57", "cortex-a76", "cortex-a710")
EVERYTHING = frozenset().union(*TRAPS.values())


def some(
    kind: str, count: int = 6, seed: int = 1, cpu: str | None = None, avoid: frozenset[str] = frozenset()
) -> list[Case]:
    rng = Random(seed)
    return [random_case(rng, kind, cpu=cpu, avoid=avoid) for _ in range(count)]


def digest() -> str:
    """Of one case of every kind."""
    text = "".join(dump(case) for kind in KINDS for case in some(kind, count=1))
    return hashlib.sha256(text.encode()).hexdigest()


# ---- the same for a seed


def test_a_seed_gives_the_same_cases_in_another_process() -> None:
    code = "from tests.judged.test_cases import digest; print(digest())"
    run = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == digest()


def test_another_seed_gives_other_cases() -> None:
    assert some("s1-4k", 1, seed=1) != some("s1-4k", 1, seed=2)


# ---- what every case holds


@pytest.mark.parametrize("avoid", [frozenset(), EVERYTHING], ids=["nothing avoided", "everything avoided"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_case_is_whole_and_safe_to_ask(kind: str, avoid: frozenset[str]) -> None:
    for case in some(kind, avoid=avoid):
        assert len(case.queries) >= 100
        assert case.kind == kind
        assert case.is_access == KINDS[kind].access
        assert (case.answers, case.after, case.ref) == ({}, {}, None)
        assert all(has_ram(pa, case.cpu) and is_safe(pa, case.cpu) for pa in case.mem)
        assert all(0 <= va < 1 << 64 for va, _ in case.queries)
        assert all(0 <= word < 1 << 64 for word in [*case.mem.values(), *case.regs.values()])
        assert next(loads([dump(case)])) == case


@pytest.mark.parametrize("kind", [kind for kind, row in KINDS.items() if row.access and row.stage2])
def test_an_access_case_of_stage_2_maps_the_asking_program(kind: str) -> None:
    for case in some(kind):
        assert (case.half, case.regs["VBAR_EL1"], case.regs["VBAR_EL2"]) == (0, case.code_ipa, HANDLER + 0x8000)
        assert case.code_ipa is not None
        p = Stage2Params.of(registers_of(case))
        with memory_of(case) as memory:
            for offset in (0, 0x1000):
                for el in (0, 1):
                    found = stage2_walk(memory.fetch, p, case.code_ipa + offset, Access.fetch(el)).result
                    assert not isinstance(found, Fault)
                    assert found.pa == HANDLER + 0x4000 + offset


@pytest.mark.parametrize("kind", [kind for kind, row in KINDS.items() if row.access and not row.stage2])
def test_an_access_case_leaves_the_other_half_to_the_asking_program(kind: str) -> None:
    for case in some(kind):
        assert case.half is not None
        el = "EL2" if KINDS[kind].regime == "EL20" else "EL1"
        assert {va >> 55 & 1 for va, _ in case.queries} == {case.half}
        assert case.regs[f"TTBR{1 - case.half}_{el}"] == HANDLER
        assert case.regs[f"VBAR_{el}"] == HANDLER_VA[1 - case.half]
        assert case.regs[f"TCR_{el}"] >> (16 * (1 - case.half)) & 63 == 25


def test_no_format_reads_a_tampered_case_where_a_device_is() -> None:
    for case in some("s1-wild", 40):
        for word in case.mem.values():
            big = case.regs["SCTLR_EL1"] >> 25 & 1
            assert harmless(int.from_bytes(word.to_bytes(8, "little"), "big") if big else word, case.cpu)


def test_a_word_that_points_at_a_device_in_any_format_is_not_harmless() -> None:
    assert harmless(0x0900_0001, "max")  # a block
    assert not harmless(0x0900_0003, "max")  # the UART
    assert not harmless(0x4020_0003, "max")  # the program
    assert not harmless(0x4200_0203, "max")  # bits [9:8] as PA[51:50]: devices above the last island
    assert harmless(0x9000_0003, "max")  # a hole
    assert harmless(0x4200_0003, "max")


def test_a_kind_may_need_what_an_oracle_lacks() -> None:
    none = kinds(())
    assert "s1-4k" in none
    assert {"s1-pie", "acc-pie", "s1-ats1a", "el20", "acc-swp"}.isdisjoint(none)
    assert "s1-pie" in kinds({"PIR_EL1"})
    assert "s1-off" in none
    assert "s1-off" not in kinds((), TRAPS["7.2"])
    assert "s1-16k" not in kinds((), cpu="cortex-a57")


def test_a_cpu_without_the_granule_is_named() -> None:
    with pytest.raises(ValueError, match="cortex-a57 has none of the granules of s1-16k"):
        random_case(Random(1), "s1-16k", cpu="cortex-a57")


@pytest.mark.parametrize("cpu", CPUS)
def test_every_cpu_has_cases(cpu: str) -> None:
    for kind in kinds({"PIR_EL1", "TTBR1_EL2", "SWP1", "S1E1A"}, cpu=cpu):
        for case in some(kind, 2, cpu=cpu):
            assert case.cpu == cpu
            assert all(has_ram(pa, cpu) for pa in case.mem)


@pytest.mark.parametrize(
    ("shift", "txsz", "ds", "start", "entries"),
    [
        (12, 16, False, 0, 512),
        (12, 25, False, 1, 512),
        (12, 12, True, -1, 16),
        (12, 48, False, 3, 16),
        (14, 16, False, 0, 2),
        (14, 17, False, 1, 2048),
        (16, 12, False, 1, 1024),
        (16, 47, False, 3, 2),
    ],
)
def test_a_space_starts_where_the_architecture_says(shift: int, txsz: int, ds: bool, start: int, entries: int) -> None:
    space = Space(False, shift, txsz, 5, 48, ds, "max")
    assert (space.start, space.entries(start)) == (start, entries)


def test_a_tree_leads_its_targets_to_where_their_paths_end() -> None:
    grower = Grower(Random(5), "max", Style())
    space = Space(True, 12, 16, 5, 48, False, "max")
    root = grower.table(space, 4096)
    grower.grow(space, root, 40)
    assert len(grower.targets) == 40
    for target in grower.targets:
        at = root
        for level in range(4):
            entry = at + 8 * space.index(target.va, level)
            assert entry in grower.mem
            if space.low(level) == target.low:
                break
            at = grower.mem[entry] & 0xFFFF_FFFF_F000


# ---- judged: every fault at every level


def name_of(fault: int) -> str:
    """What a fault status code says, as in "permission 3"."""
    special = {0x29: "size -1", 0x2B: "translation -1", 0x13: "no table -1", 0x10: "no memory"}
    sorts = ("size", "translation", "access flag", "permission", "no memory", "no table")
    return special.get(fault) or f"{sorts[fault >> 2]} {fault & 3}"


def outcomes(oracle: Oracle, names: list[str], count: int) -> Counter[str]:
    found: Counter[str] = Counter()
    for name in names:
        for case in some(name, count, avoid=TRAPS[oracle.version]):
            for answer in oracle.ask(case).answers:
                if isinstance(answer, tuple):
                    found[name_of(answer[0] & 63)] += 1
                elif answer is None or answer == DONE or (not answer & EXC and not answer & 1):
                    found["none" if answer is None else "done"] += 1
                else:
                    found[name_of(answer & 63 if answer & EXC else answer >> 1 & 63)] += 1
    return found


@pytest.mark.qemu
def test_cases_reach_every_fault_at_every_level() -> None:
    with open_oracle() as oracle:
        avoid = TRAPS[oracle.version]
        found = outcomes(oracle, kinds(oracle.registers | oracle.operations, avoid), 12)
        found += outcomes(oracle, ["s1-lpa2"], 60)  # only these have a level -1
    wanted = [f"{sort} {level}" for sort in ("size", "translation", "no table") for level in range(-1, 4)]
    wanted += [f"{sort} {level}" for sort in ("access flag", "permission") for level in range(4)]
    assert [cell for cell in wanted if found[cell] < 5] == []
    assert found["done"] > 0.1 * found.total()
    assert max(found.values()) < 0.5 * found.total()


# ---- shrinking


def queried(*ops: str) -> Callable[[Case], bool]:
    return lambda case: set(ops) <= {op for _, op in case.queries}


def test_a_case_shrinks_to_what_makes_it_fail() -> None:
    case = some("s1-4k", 1)[0]
    pa = max(case.mem)
    bit = 1 << (case.mem[pa].bit_length() - 1)
    tg1 = case.regs["TCR_EL1"] & 3 << 30
    seen: list[int] = []

    def fails(case: Case) -> bool:
        seen.append(len(case.queries))
        return bool(queried("S1E0W")(case) and case.mem.get(pa, 0) & bit and case.regs["TCR_EL1"] & 3 << 30 == tg1)

    small = shrink(case, fails)
    assert small.queries == ((small.queries[0][0] & 0, "S1E0W"),)
    assert small.mem == {pa: bit}
    assert {n: v for n, v in small.regs.items() if v != DEFAULTS[n] and not n.startswith("TTBR")} == {"TCR_EL1": tg1}
    assert len(seen) < 1000
    assert shrink(case, fails) == small


def test_queries_that_only_fail_together_stay_together() -> None:
    case = some("s1-4k", 1)[0]
    small = shrink(case, queried("S1E0W", "S1E1R"))
    assert sorted(op for _, op in small.queries) == ["S1E0W", "S1E1R"]


def test_a_case_that_does_not_fail_comes_back() -> None:
    case = some("s1-4k", 1)[0]
    assert shrink(case.answered("7.2", [None] * len(case.queries), {}), lambda _: False) == case


def test_shrinking_stops_after_so_many_tries() -> None:
    calls: list[Case] = []

    def fails(case: Case) -> bool:
        calls.append(case)
        return True

    shrink(some("s1-4k", 1)[0], fails, tries=10)
    assert len(calls) == 10


def test_big_endian_tables_become_little_endian() -> None:
    case = next(c for c in some("s1-4k", 60) if c.regs["SCTLR_EL1"] >> 25 & 1)
    pa, word = min(case.mem.items())
    swapped = int.from_bytes(word.to_bytes(8, "little"), "big")

    def fails(case: Case) -> bool:
        return case.mem.get(pa) == (word if case.regs["SCTLR_EL1"] >> 25 & 1 else swapped)

    small = shrink(case, fails)
    assert small.mem == {pa: swapped}
    assert not small.regs["SCTLR_EL1"] >> 25 & 1


def test_the_asking_program_keeps_its_registers() -> None:
    case = some("acc-4k", 1)[0]
    small = shrink(case, lambda _: True)
    half = 1 - (case.half or 0)
    assert small.regs[f"TTBR{half}_EL1"] == HANDLER
    assert small.regs["VBAR_EL1"] == case.regs["VBAR_EL1"]
    assert small.regs["TCR_EL1"] >> 16 * half & 63 == 25
    assert small.regs["SCTLR_EL1"] & 1


def test_the_asking_program_keeps_its_tables_in_the_el3_regime() -> None:
    case = some("el3", 1)[0]
    small = shrink(case, lambda _: True)
    assert len(small.mem) < len(case.mem)
    assert any(word & 0xFFFF_FFFF_F000 == 0x4020_0000 for word in small.mem.values())
    assert small.regs["TCR_EL3"] & 63 == case.regs["TCR_EL3"] & 63


@pytest.mark.qemu
@pytest.mark.parametrize("kind", ["s1-4k", "s1-mixed", "acc-4k", "acc-hahd", "el3", "acc-el20"])
def test_a_case_judged_by_qemu_shrinks_to_one_query(kind: str) -> None:
    with open_oracle() as oracle:
        avoid = TRAPS[oracle.version]

        def permission_fault(case: Case) -> bool:
            answers = oracle.ask(case, survive=True).answers
            faults = {a[0] & 63 if isinstance(a, tuple) else a >> 1 & 63 if a and a & 1 else 0 for a in answers}
            return 0x0F in faults

        case = next(c for c in some(kind, 30, avoid=avoid) if permission_fault(c))
        small = shrink(case, permission_fault)
        assert permission_fault(small)
    assert len(small.queries) == 1
    assert len(small.mem) <= 8
    assert replace(small, queries=(), mem={}, regs={}) == replace(case, queries=(), mem={}, regs={}, pan=small.pan)


@pytest.mark.parametrize("kind", [name for name, kind in KINDS.items() if len(kind.granules) > 1])
def test_granules_can_be_chosen_for_kinds_that_draw_them(kind: str) -> None:
    """Both halves have it, but for the half of the asking program, and stage 2 has it too."""
    for name in granule_names(kind):
        for seed in range(4):
            case = random_case(Random(seed), kind, granules=(name,))
            assert granules_in(case) == {name}, (seed, case.id)
    with pytest.raises(ValueError, match="has none of the granules"):
        random_case(Random(1), kind, granules=("8K",))


def granules_in(case: Case) -> set[str]:
    """The granules of a case's halves under test, and of its stage 2, by its registers."""
    el, one = KINDS[case.kind].regime, not KINDS[case.kind].upper
    tcr = case.regs["TCR_EL1" if el == "EL10" else "TCR_EL3" if el == "EL3" else "TCR_EL2"]
    lower, upper = ("4K", "64K", "16K", "")[tcr >> 14 & 3], ("", "16K", "4K", "64K")[tcr >> 30 & 3]
    stage1 = {lower} if one else {lower, upper} if case.half is None else {(lower, upper)[case.half]}
    if case.regs["HCR_EL2"] & 1:
        stage2 = {("4K", "64K", "16K", "")[case.regs["VTCR_EL2"] >> 14 & 3]}
        return stage2 if KINDS[case.kind].off else stage1 | stage2
    return stage1
