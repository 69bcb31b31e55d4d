"""emu.check: the compiled set_memory_valid against the model's prediction, and the check itself seen failing."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from emu.check import Case, KernelSubject, Report, SnippetSubject, linear_pages, main_job, run_case, stub_allocator
from emu.machine import Machine
from emu.scenarios import all_cases
from kernel_model import apply, mm, pageattr
from kernel_model.compare import RUNAWAY
from kernel_model.mm import Kernel
from kernel_model.pageattr import Masks
from kernel_model.pagewalk import MmWalk
from kernel_model.variants import UnknownVariant, by_name, detect
from tests.kernels import KERNELS, kernel_image

ALL = [pytest.param(name, marks=pytest.mark.kernels, id=name) for name in KERNELS]
CASES = {case.name: case for case in all_cases()}
ENTRIES_16K = 2048


def said(report: Report) -> list[str]:
    return [str(difference) for difference in report.differences]


def subject(name: str) -> KernelSubject:
    return KernelSubject(kernel_image(name))


# the model is right


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", ALL)
def test_the_compiled_function_does_what_the_model_predicted(name: str, case: Case) -> None:
    assert said(run_case(subject(name), case)) == []


@pytest.mark.full
@pytest.mark.kernels
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_6_12_95_does_what_the_model_predicted(case: Case) -> None:
    assert said(run_case(subject("debian:6.12.95"), case)) == []


CASES_16K = {case.name: case for case in all_cases(ENTRIES_16K)}


@pytest.mark.full
@pytest.mark.kernels
@pytest.mark.parametrize("case", CASES_16K.values(), ids=CASES_16K)
def test_7_2_with_16k_pages_does_what_the_model_predicted(case: Case) -> None:
    assert said(run_case(subject("debian:7.2-16k"), case)) == []


@pytest.mark.parametrize("pages", [1, 4, 511, 512, 513, 1500])
@pytest.mark.parametrize("name", ALL)
def test_the_main_job_on_the_linear_map_has_no_differences(name: str, pages: int) -> None:
    off, on = main_job(subject(name), pages)
    assert said(off) + said(on) == []
    assert len(off.result.changes) == len(on.result.changes) == pages
    assert off.result.changes.new.tolist() == on.result.changes.old.tolist()
    assert all(c.fields["VALID"] == (1, 0) for c in off.result.changes[:3])
    assert len(off.walk) == pages + (pages - 1) // 512 + 4  # PTEs, PMDs, and one entry of each level above


@pytest.mark.parametrize("pages", [1, 4, 511, 512, 513, 1000])
def test_the_snippet_does_what_the_model_of_6_1_predicts(pages: int) -> None:
    for report in main_job(SnippetSubject(), pages):
        assert said(report) == []


# the model is wrong


@pytest.mark.kernels
def test_the_model_of_7_on_6_1_is_told_the_bit_and_the_flush() -> None:
    off, on = main_job(subject("debian:6.1"), 4, variant=by_name("7.x"))
    fields = {(d.field, d.bits) for d in (*off.differences, *on.differences) if d.what == "descriptor"}
    assert fields == {("nG", "11")}
    assert "TLB maintenance" in {d.what for d in on.differences}
    assert "descriptor at 0xffff000008000000 level 3: nG (bit 11) predicted 0x1, real 0x0" in said(off)
    assert "TLB maintenance: event 0 predicted nothing more (of 0), real tlbi vaale1is" in "\n".join(said(on))


@pytest.mark.parametrize(
    ("name", "wrong"),
    [(a, b) for a in KERNELS for b in ("6.1", "6.12", "7.x") if not a.endswith(b.replace(".x", ".3"))],
)
@pytest.mark.kernels
def test_some_scenario_tells_every_variant_from_every_other(name: str, wrong: str) -> None:
    assert any(run_case(subject(name), case, by_name(wrong)).differences for case in CASES.values())


def _flip(*names: str) -> Callable[[pytest.MonkeyPatch], None]:
    """The kernel's own row with some columns the other way round."""

    def breaking(patch: pytest.MonkeyPatch) -> None:
        def wrong(*found: Any) -> Any:
            row = detect(*found)
            return replace(row, **{name: not getattr(row, name) for name in names})

        patch.setattr("emu.check.detect", wrong)

    return breaking


def _set(target: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def breaking(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(target, value)

    return breaking


def _set_before_clear(value: int, masks: Masks) -> int:
    return (value | masks.set) & ~masks.clear


def _barrier_per_pte(pte: int, addr: int, next: int, walk: MmWalk) -> int:
    pageattr.change_page_range(walk.kernel, pte, walk.private)
    walk.kernel.barrier("dsb ishst", "isb")
    return 0


def _no_barrier(kernel: Kernel, pte: int, value: int) -> None:
    kernel.write(pte, value)


def _threshold_off_by_one(kernel: Kernel, start: int, end: int) -> None:
    _FLUSH(kernel, start, end - kernel.levels.page_size if end - start == 513 * 4096 else end)


def _flush_late_barrier(kernel: Kernel, start: int, end: int) -> None:
    before = len(kernel.events)
    _FLUSH(kernel, start, end)
    kernel.events[before:-1] = reversed(kernel.events[before:-1])


def _blocks_are_walked_over(entry: int, addr: int, next: int, walk: MmWalk) -> int:
    return 0


def _holes_are_errors(kernel: Kernel, *rest: Any) -> bool:
    return _NONE(kernel, *rest) and False


def _no_table_is_made(kernel: Kernel, below: str, entry: int) -> bool:
    return kernel.read(entry) != 0


def _other_mask(bits: Any, enable: int) -> Masks:
    right = _MASKS(bits, enable)
    return Masks(right.set | bits.RDONLY, right.clear)


_FLUSH, _NONE, _MASKS = pageattr.flush_tlb_kernel_range, apply._none, pageattr.valid_masks

# Rule broken: how, the kernel that sees it, and in which scenario.
BROKEN: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str, str]] = {
    "masks": (_set("kernel_model.pageattr.valid_masks", _other_mask), "debian:6.12", "four pages, invalid"),
    "present-invalid is kept": (_flip("invalid_keeps_present"), "debian:7.3", "four pages, invalid"),
    "clear before set": (
        _set("kernel_model.pageattr.masked", _set_before_clear),
        "debian:7.3",
        "nG mappings on, none PTE, valid",
    ),
    "no flush when made valid": (_flip("flush_always"), "debian:7.3", "four pages, valid"),
    "flush on every error": (_flip("flush_always"), "debian:6.1", "size 0, valid"),
    "512 pages flush all": (_flip("flush_limit_inclusive"), "debian:7.3", "512 pages, invalid"),
    "512 pages do not": (_flip("flush_limit_inclusive"), "debian:6.12", "512 pages, invalid"),
    "513 pages flush all": (
        _set("kernel_model.pageattr.flush_tlb_kernel_range", _threshold_off_by_one),
        "debian:6.12",
        "513 pages, invalid",
    ),
    "flush rounds": (_flip("flush_rounds"), "debian:7.3", "unaligned inside a table, invalid"),
    "one barrier for all": (
        _set("kernel_model.pageattr.pageattr_pte_entry", _barrier_per_pte),
        "debian:7.3",
        "four pages, valid",
    ),
    "a barrier per PTE": (_set("kernel_model.pageattr.set_pte", _no_barrier), "debian:6.1", "four pages, valid"),
    "barriers around the TLBI": (
        _set("kernel_model.pageattr.flush_tlb_kernel_range", _flush_late_barrier),
        "debian:6.1",
        "four pages, invalid",
    ),
    "whole blocks change": (
        _set("kernel_model.pageattr.pageattr_pmd_entry", _blocks_are_walked_over),
        "debian:7.3",
        "a whole block, invalid",
    ),
    "part of a block is refused": (
        _set("kernel_model.pageattr.pageattr_pmd_entry", _blocks_are_walked_over),
        "debian:7.3",
        "part of a block, invalid",
    ),
    "blocks are refused": (_set("kernel_model.apply._leaf", lambda *_: False), "debian:6.12", "a whole block, invalid"),
    "holes get tables": (
        _set("kernel_model.apply._make_table", _no_table_is_made),
        "debian:6.1",
        "hole at level 1, valid",
    ),
    "holes are skipped": (_flip("walks"), "debian:7.3", "hole at level 2, valid"),
    "EINVAL": (_set("kernel_model.apply.EINVAL", 14), "debian:6.1", "size 0, invalid"),
    "WARN": (_set("kernel_model.mm.Kernel.warn", lambda *_: None), "debian:6.12", "part of a block, invalid"),
    "6.1 knows no present-invalid": (
        _flip("present_invalid"),
        "debian:6.1",
        "part of a block marked present-invalid, invalid",
    ),
}


@pytest.mark.kernels
@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_of_the_model_is_seen(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    breaking, name, case = BROKEN[rule]
    assert said(run_case(subject(name), CASES[case])) == []
    breaking(monkeypatch)
    assert said(run_case(subject(name), CASES[case])) != []


def test_an_image_without_the_functions_has_no_variant() -> None:
    with pytest.raises(UnknownVariant, match="no apply_to_page_range"):
        detect({}, lambda struct, member: False)
    with pytest.raises(UnknownVariant, match=r"model 5\.10: there is none, only 6\.1, 6\.12-novma, 6\.12, 7\.x, "):
        by_name("5.10")


# the prediction comes first

PREDICT = """
import sys
from emu import coldboot
from emu.check import KernelSubject, kernel_of, linear_pages, predict
from emu.image import KernelImage

subject = KernelSubject(KernelImage.load(sys.argv[1]))
made = subject.thaw(ng=False)
call = linear_pages(4, 0).prepare(made.tables, made.plan)
outcome = predict(kernel_of(subject.levels(made.plan), made, subject.variant()), made, call)
print(outcome.value, len(outcome.words), len(outcome.maintenance), sorted({"unicorn", "capstone"} & set(sys.modules)))
"""


@pytest.mark.parametrize("name", ALL)
def test_the_model_predicts_in_a_process_without_unicorn(name: str) -> None:
    kernel_image(name)
    done = subprocess.run([sys.executable, "-c", PREDICT, name], capture_output=True, text=True, check=True)
    assert done.stdout == "0 4 4 []\n"


# a call without an end


@pytest.mark.kernels
@pytest.mark.parametrize("name", ["debian:6.1", "debian:6.12"])
def test_the_runaway_of_an_unaligned_range_ends_and_leaves_nothing(name: str) -> None:
    image = kernel_image(name)
    report = run_case(subject(name), CASES["unaligned across a table, invalid"])
    assert report.predicted.stop == report.real.stop == RUNAWAY
    assert report.result.stop

    m = Machine.boot(image)
    stub_allocator(m)
    call = CASES["unaligned across a table, invalid"].prepare(m.tables, m.plan)
    before, state = _ram(m), m.save()
    result = m.call(call.function, call.addr, call.numpages, call.enable, blocks=2000)
    assert result.stop
    assert (result.stop.kind, result.stop.message) == ("budget", "2000 basic blocks ran without an end")
    assert len(result.changes) > 100  # far more than the 4 pages asked for
    assert (_ram(m) != before).any()

    m.restore(state)
    assert (_ram(m) == before).all()
    page = m.plan.page_size
    after = m.call(call.function, call.addr & -page, call.numpages, call.enable).ok()
    assert (after.value, len(after.changes)) == (0, 4)


@pytest.mark.kernels
def test_7_x_has_no_runaway() -> None:
    report = run_case(subject("debian:7.3"), CASES["unaligned across a table, invalid"])
    assert report.predicted.stop == report.real.stop == ""


def _ram(m: Machine) -> np.ndarray:
    return m.memory.words(m.plan.ram[0], m.plan.ram[1] // 8).copy()


# what a report says


@pytest.mark.kernels
def test_a_report_has_both_sides_and_what_the_walk_saw() -> None:
    report = run_case(subject("debian:6.12"), linear_pages(2, 0))
    assert report.variant == "6.12"
    assert str(report.call) == "set_memory_valid(0xffff000008000000, 2, 0)"
    assert report.predicted.value == report.real.value == 0
    assert [line.split()[0] for line in report.walk] == ["pgd", "p4d", "pud", "pmd", "pte", "pte"]
    assert report.predicted.words == report.real.words
    assert report.predicted.order == report.real.order
    assert not any(isinstance(e, mm.Warn) for e in report.real.events)


@pytest.fixture(autouse=True)
def _nothing_stays_broken() -> Iterator[None]:
    yield
    assert pageattr.flush_tlb_kernel_range is _FLUSH
