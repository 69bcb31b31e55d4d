"""kernel_model.ptdump against ptdump_walk() and ptdump_check_wx() of the compiled kernels: texts byte for byte.

A rule of the model that is broken on purpose must be noticed by the same trees (`BREAKS`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest

from emu.checks import ptdump as check
from emu.checks.ptdump import ENDLESS, Bench, Dump, Prediction, Reach, compare, compare_markers, run, trees
from emu.checks.ptdump_trees import Case
from kernel_model import contpte, ptdump, ptdump_text
from kernel_model.compare import RUNAWAY
from kernel_model.names import Bits
from kernel_model.ptdump_text import Line
from tests.kernel_model.test_ptdump import MARKERS, L, expected, measured, run_of
from tests.kernels import KERNELS, MORE, kernel_image

pytestmark = pytest.mark.kernels

SEED = 3
CASES = 6  # random ones, besides those made on purpose
OLD, TABLED = "debian:6.1", ("debian:6.12", "debian:7.3", *MORE)


class Judged(NamedTuple):
    """A case that was run for real: its tree, and what the kernel wrote."""

    case: Case
    root: int
    used: tuple[int, int]
    tree: bytes
    predicted: Prediction
    real: Dump
    differences: list[str]


@functools.cache
def bench(name: str) -> Bench:
    return Bench(kernel_image(name))


@functools.cache
def judged(name: str) -> list[Judged]:
    return [judge(bench(name), *made) for made in trees(bench(name), CASES, SEED)]


def judge(on: Bench, case: Case, made: tuple[int, tuple[int, int]]) -> Judged:
    root, used = made
    tree = on.memory.read(*used)
    predicted = on.predict(case, root, used)
    real = on.real(case, root, used, blocks=predicted.blocks)
    return Judged(case, root, used, tree, predicted, real, compare(case.name, predicted.dump, real))


def one(name: str, case: Case) -> Judged:
    return judge(bench(name), case, bench(name).tree(case))


@pytest.mark.parametrize("name", [*KERNELS, *MORE])
def test_the_kernel_writes_what_the_model_says(name: str) -> None:
    assert [line for each in judged(name) for line in each.differences] == []
    assert all(each.real.text for each in judged(name))


@pytest.mark.parametrize("name", [*KERNELS, "debian:6.12.95"])
def test_the_measured_table_gives_the_measured_text_for_real(name: str) -> None:
    row = {"debian:6.1": "6.1", "debian:7.3": "7.x"}.get(name, "6.12")
    found = one(name, Case("5.4", L, measured, MARKERS))
    assert found.real.text.split("\n") == expected(row)
    assert found.differences == []


@pytest.mark.parametrize("name", TABLED)
def test_the_markers_are_those_of_the_kernel(name: str) -> None:
    assert compare_markers(bench(name)) == []
    assert len(bench(name).own_markers) == 13


@pytest.mark.parametrize("name", TABLED)
def test_the_rows_are_those_of_the_kernel(name: str) -> None:
    on, btf = bench(name), bench(name).image.btf
    at, rows = on.machine.symbol("pte_bits"), ptdump_text.pte_bits(on.bits)
    for i, row in enumerate(rows):
        va = at + i * btf.size("ptdump_prot_bits")
        mask, val, word, clear = (
            on.machine.word_at(va + btf.offset("ptdump_prot_bits", member), 8) for member in row._fields
        )
        assert (mask, val) == (row.mask, row.val)
        assert check.string(on.machine, word) == row.set
        assert (check.string(on.machine, clear) if clear else None) == row.clear
    assert on.machine.symbol("kernel_pg_levels")
    num = on.machine.word_at(on.machine.symbol("kernel_pg_levels") + btf.offset("ptdump_pg_level", "num"))
    assert num == len(rows)


TORN = Case("torn", L, run_of(1 << 53), MARKERS)  # one page of a contiguous run is executable


@pytest.mark.parametrize("name", ["debian:6.12", "debian:6.12.95"])
def test_6_12_reads_a_run_that_does_not_fit_for_ever(name: str) -> None:
    found = one(name, TORN)
    assert (found.real.stop, found.real.text, found.differences) == (RUNAWAY, "", [])


@pytest.mark.parametrize("name", ["debian:6.1", "debian:7.3"])
def test_others_print_a_run_that_does_not_fit(name: str) -> None:
    found = one(name, TORN)
    assert "          20K PTE       RW NX" in found.real.text
    assert found.differences == []


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_that_counts_nothing_passes(name: str) -> None:
    found = one(name, Case("empty", L, lambda tables: None, MARKERS))
    assert found.real.wx == (0, 0, ())


@pytest.mark.parametrize("name", ["debian:7.3", "debian:7.2-16k"])
def test_52_bit_addresses_of_lpa2(name: str) -> None:
    report = run(kernel_image(name), 2, SEED, va_bits=52)
    assert (report.cases, report.differences, report.unreached) == (7, [], [])


@pytest.mark.parametrize("name", [*KERNELS, *MORE])
def test_the_trees_hold_every_word_of_the_kernel(name: str) -> None:
    on = bench(name)
    reach = Reach(on.kernel(on.cold_root))
    for each in judged(name):
        reach.add(each.predicted)
    assert reach.wanted(on.markers) - reach.seen == set()


def test_a_campaign_says_what_it_has_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "directed_cases", lambda *_: ())
    report = run(kernel_image("debian:6.12"), 0, SEED)
    assert (report.cases, report.differences) == (1, [])
    assert {"PUD 'BLK'", "PTE 'GP'", ENDLESS} <= set(report.unreached)
    assert "PTE 'AF'" not in report.unreached


def test_a_text_that_differs_does_not_count_as_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ptdump_text, "size", _half_a_size)
    report = run(kernel_image("debian:6.1"), 0, SEED)
    assert len(report.differences) == 5
    assert report.differences[0].startswith("the cold tables: line 3: predicted '0xffff000040000000-")
    assert "523264M PUD', real" in report.differences[0]
    assert "PTE 'AF'" in report.unreached


# Rules broken on purpose: each must be noticed by the trees that were run above.

Break = Callable[[pytest.MonkeyPatch, Bench], None]


def flip(column: str) -> Break:
    """The kernel's own row with a column the other way round."""

    def breaking(patch: pytest.MonkeyPatch, on: Bench) -> None:
        row = on.bits.variant
        other: dict[str, Any] = {column: not getattr(row, column)}
        patch.setattr(on, "bits", replace(on.bits, variant=replace(row, **other)))

    return breaking


def put(target: str, value: Any) -> Break:
    """Another function, or table, in the place of one."""

    def breaking(patch: pytest.MonkeyPatch, on: Bench) -> None:
        patch.setattr(target, value)

    return breaking


def without_row(i: int) -> Break:
    """pte_bits[] without one row."""
    rows = ptdump_text.pte_bits

    def breaking(patch: pytest.MonkeyPatch, on: Bench) -> None:
        for module in (ptdump, ptdump_text):
            patch.setattr(module, "pte_bits", lambda bits: tuple(r for k, r in enumerate(rows(bits)) if k != i))

    return breaking


def _pass_all_markers(st: ptdump.PtdumpPgState, addr: int) -> None:
    while addr >= st.markers[st.marker + 1].start_address:
        st.marker += 1
        st.notes.append(st.markers[st.marker])


def _no_marker_inside(st: ptdump.PtdumpPgState, addr: int) -> None:
    st.notes.append(Line(st.start_address, addr, st.level, st.current_prot))


def _end_without_check(st: ptdump.PtdumpPgState, addr: int) -> None:
    st.notes.append(Line(st.start_address, addr, st.level, st.current_prot))
    ptdump._pass_marker(st, addr)


def _valid_only(st: ptdump.PtdumpPgState, addr: int) -> None:
    bits = st.kernel.bits
    if st.check_wx and st.current_prot & bits.VALID and not st.current_prot & (bits.RDONLY | bits.PXN):
        ptdump._warn_once(st, "note_prot_wx")
        st.wx_pages += ptdump._pages(st, addr)


def _half_a_size(nbytes: int) -> str:
    return f"{nbytes >> 20:9d}M" if nbytes >> 20 else f"{nbytes >> 10:9d}K"


def _no_flush(st: ptdump.PtdumpPgState) -> None:
    return


def _only_af(bits: Bits, pte: int, each: int) -> int:
    return pte | each & bits.AF


def _only_dirty(bits: Bits, pte: int, each: int) -> int:
    return contpte.pte_mkdirty(bits, pte) if contpte.pte_dirty(bits, each) else pte


def _warn_twice(st: ptdump.PtdumpPgState, function: str) -> None:
    st.first.append(ptdump.Insecure(function, st.start_address))


HERE, TEXT = "kernel_model.ptdump.", "kernel_model.ptdump_text."
SWAPPED = {4: "DEVICE/nGnRnE", 3: "DEVICE/nGnRE", 2: "MEM/NORMAL-NC", 0: "MEM/NORMAL", 1: "MEM/NORMAL-TAGGED"}
BREAKS: dict[str, Break] = {
    **{f"column {c}": flip(c) for c in ("ptdump_folds", "ptdump_ends", "ptdump_block_type", "contpte")},
    **{f"no row {i}": without_row(i) for i in range(16)},
    "all markers at once": put(HERE + "_pass_marker", _pass_all_markers),
    "one marker a group": put(HERE + "_end_group", _no_marker_inside),
    "no check of groups": put(HERE + "_end_group", _end_without_check),
    "an invalid page is not insecure": put(HERE + "note_prot_wx", _valid_only),
    "sizes of K and M": put(TEXT + "size", _half_a_size),
    "no flush": put(HERE + "note_page_flush", _no_flush),
    "holes in no note": put(HERE + "ptdump_hole", lambda addr, next, depth, walk: 0),
    "a dirty page of a run does not count": put("kernel_model.contpte._gather", _only_af),
    "a young page of a run does not count": put("kernel_model.contpte._gather", _only_dirty),
    "device types swapped": put(TEXT + "MEMORY_TYPES", SWAPPED),
    "warned of each": put(HERE + "_warn_once", _warn_twice),
}
NOT_OF_6_1 = {f"column {c}" for c in ("ptdump_folds", "contpte")} | {name for name in BREAKS if "of a run" in name}


def noticed(name: str) -> bool:
    """Whether any of the cases tells the model from what the kernel wrote."""
    return any(told(bench(name), each) for each in judged(name)[1:])  # the first are the cold tables, which are large


def told(on: Bench, each: Judged) -> bool:
    """Whether the model, as it is now, says something else than the kernel wrote."""
    on.memory.write(each.used[0], each.tree)
    return bool(compare(each.case.name, on.predict(each.case, each.root, each.used).dump, each.real))


@pytest.mark.parametrize(
    ("name", "broken"),
    [(name, broken) for name in (OLD, "debian:7.3") for broken in BREAKS if name != OLD or broken not in NOT_OF_6_1],
)
def test_a_broken_rule_is_noticed(name: str, broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKS[broken](monkeypatch, bench(name))
    assert noticed(name)


def test_a_model_that_does_not_wait_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    on = bench("debian:6.12")
    found = one("debian:6.12", TORN)
    flip("ptdump_lockless")(monkeypatch, on)
    assert told(on, found)
