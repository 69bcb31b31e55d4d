"""Basic blocks by hand-made words, and what runs of real functions cover."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from emu.branches import Flow, flow
from emu.check import KernelSubject, run_case, stub_allocator
from emu.checks.blocks import Alternative, Block, Label, Patches, blocks, parts, patches, predecessors
from emu.checks.coverage import BEHIND, LEADS_TO, STACK_CHECK, Coverage, Run, addresses, reasons
from emu.image import KernelImage, SymbolError
from emu.machine import Machine
from emu.scenarios import all_cases
from emu.symbols import Entries, Symbols
from tests.kernels import kernel_image

BASE = 0xFFFF_8000_8000_0000
NOP, RET, BRK, UDF, ADD, BR = 0xD503201F, 0xD65F03C0, 0xD4210000, 0, 0x91001020, 0xD61F0000


def b(ahead: int) -> int:
    return 0x14000000 | ahead & 0x3FFFFFF


def bl(ahead: int) -> int:
    return b(ahead) | 1 << 31


def cond(ahead: int) -> int:
    return 0x54000000 | (ahead & 0x7FFFF) << 5


def cbz(ahead: int) -> int:
    return 0xB4000000 | (ahead & 0x7FFFF) << 5


def tbnz(ahead: int) -> int:
    return 0x37000000 | (ahead & 0x3FFF) << 5


@dataclass
class Image:
    """As much of a KernelImage as blocks.py looks at: words, symbols, WARN sites."""

    words: list[int]
    names: dict[str, int] = field(default_factory=lambda: {"f": 0})
    bugs: dict[int, Any] = field(default_factory=dict)
    base: int = BASE

    @property
    def data(self) -> np.ndarray:
        return np.array(self.words, "<u4").view(np.uint8)

    @property
    def symbols(self) -> Symbols:
        entries = Entries.of({name: BASE + 4 * i for name, i in self.names.items()}, "t")
        return Symbols.of({"file": entries}, BASE + 4 * len(self.words))

    @property
    def btf(self) -> Any:
        return SimpleNamespace(size=lambda _: 64, offset=lambda *_: 8)

    def word(self, va: int, size: int = 8) -> int:
        return int.from_bytes(self.data[va - BASE : va - BASE + size].tobytes(), "little")


def cut(image: Image, patched: Patches | None = None, function: str = "f") -> list[Block]:
    kernel = cast(KernelImage, image)
    return blocks(kernel, parts(kernel, function), patched or Patches())


def shape(found: list[Block]) -> list[tuple[int, int, tuple[int, ...]]]:
    """(first word, word behind, successors as words)."""
    return [((x.start - BASE) // 4, (x.end - BASE) // 4, tuple((s - BASE) // 4 for s in x.successors)) for x in found]


SHAPES = {
    "straight": ([ADD, ADD, RET], [(0, 3, ())]),
    "a call ends no block": ([bl(100), ADD, RET], [(0, 3, ())]),
    "blr and svc end none": ([0xD63F0200, 0xD4000001, RET], [(0, 3, ())]),
    "b.cond forward": ([cond(2), ADD, RET], [(0, 1, (1, 2)), (1, 2, (2,)), (2, 3, ())]),
    "cbz backward": ([ADD, ADD, cbz(-1), RET], [(0, 1, (1,)), (1, 3, (3, 1)), (3, 4, ())]),
    "tbnz to itself": ([ADD, tbnz(0), RET], [(0, 1, (1,)), (1, 2, (2, 1)), (2, 3, ())]),
    "b": ([b(2), ADD, RET], [(0, 1, (2,)), (1, 2, (2,)), (2, 3, ())]),
    "tail call": ([cond(2), b(100), RET], [(0, 1, (1, 2)), (1, 2, ()), (2, 3, ())]),
    "br": ([0xD61F0200, ADD, RET], [(0, 1, ()), (1, 3, ())]),
    "eret": ([0xD69F03E0, ADD, RET], [(0, 1, ()), (1, 3, ())]),
    "a brk that is no WARN": ([cond(2), BRK, RET], [(0, 1, (1, 2)), (1, 2, ()), (2, 3, ())]),
    "padding behind": ([RET, NOP, NOP, UDF], [(0, 1, ())]),
    "a NOP that is led to": ([cond(2), RET, NOP, RET], [(0, 1, (1, 2)), (1, 2, ()), (2, 4, ())]),
    "data behind": ([RET, 0xFFFFFFFF, 0x12345678], [(0, 1, ())]),
    "a loop": ([ADD, cond(-1), b(-2)], [(0, 2, (2, 0)), (2, 3, (0,))]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_blocks_of_words(name: str) -> None:
    words, expected = SHAPES[name]
    assert shape(cut(Image(words))) == expected


def test_a_warn_goes_on_and_a_bug_does_not() -> None:
    words = [cond(2), BRK, RET]
    for warn, behind in ((True, (2,)), (False, ())):
        bug = SimpleNamespace(warn=warn, file="mm/x.c", line=7)
        image = Image(words, bugs={BASE + 4: bug})
        assert shape(cut(image))[1] == (1, 2, behind)
        why = reasons(cast(KernelImage, image), cut(image), {BASE + 4}, Patches())
        assert why == {BASE + 4: f"{'WARN' if warn else 'BUG'} at mm/x.c:7"}


def test_a_function_is_all_that_the_compiler_made_of_it() -> None:
    #        f                  g    f.cold       f.part.0  h
    words = [cond(4), RET, NOP, RET, ADD, b(-4), RET, RET]
    image = Image(words, {"f": 0, "g": 3, "f.cold": 4, "f.part.0": 6, "h": 7})
    assert [part.name for part in parts(cast(KernelImage, image), "f")] == ["f", "f.cold", "f.part.0"]
    assert shape(cut(image)) == [(0, 1, (1, 4)), (1, 2, ()), (4, 6, (1,)), (6, 7, ())]
    with pytest.raises(SymbolError, match="no symbol k"):
        parts(cast(KernelImage, image), "k")


def test_a_jump_label_may_go_either_way_and_explains_the_way_it_does_not_go() -> None:
    image = Image([NOP, RET, ADD, RET])
    patched = Patches(labels={BASE: Label(BASE, BASE + 8, "__tracepoint_x+0x8")})
    assert shape(cut(image, patched)) == [(0, 1, (1, 2)), (1, 2, ()), (2, 4, ())]
    why = reasons(cast(KernelImage, image), cut(image, patched), {BASE + 4, BASE + 8}, patched)
    assert why == {BASE + 4: "", BASE + 8: "tracepoint off: __tracepoint_x+0x8"}
    on = Image([b(2), RET, ADD, RET])
    why = reasons(cast(KernelImage, on), cut(on, patched), {BASE + 4, BASE + 8}, patched)
    assert why == {BASE + 4: "tracepoint off: __tracepoint_x+0x8", BASE + 8: ""}


def test_an_alternative_explains_what_it_would_lead_to_and_its_replacement_is_no_code() -> None:
    image = Image([NOP, RET, ADD, RET, b(-2)])
    patched = Patches(
        alternatives={BASE: Alternative(BASE, BASE + 4, BASE + 16, "LSE")}, replacements=frozenset({BASE + 16})
    )
    assert shape(cut(image, patched)) == [(0, 1, (1, 2)), (1, 2, ()), (2, 4, ())]
    why = reasons(cast(KernelImage, image), cut(image, patched), {BASE + 8}, patched)
    assert why == {BASE + 8: "alternative: LSE"}
    callback = Image([b(2), RET, ADD, RET])  # patched to a NOP by a function
    patched = Patches(alternatives={BASE: Alternative(BASE, BASE + 4, 0, "alt_cb_patch_nops")})
    why = reasons(cast(KernelImage, callback), cut(callback, patched), {BASE + 4, BASE + 8}, patched)
    assert why == {BASE + 4: "alternative: alt_cb_patch_nops", BASE + 8: ""}


def test_the_stack_protector_and_what_only_leads_there() -> None:
    #        0: taken?  1     2: to 4  3    4: bl          5: ret
    words = [cond(2), RET, b(2), NOP, bl(2), RET, RET]
    image = Image(words, {"f": 0, "__stack_chk_fail": 6})
    found = cut(image)
    why = reasons(cast(KernelImage, image), found, {BASE + 8, BASE + 16}, Patches())
    assert why == {BASE + 8: LEADS_TO + STACK_CHECK, BASE + 16: STACK_CHECK}


def test_what_comes_only_after_an_explained_block_is_explained() -> None:
    image = Image([cond(2), RET, BRK, ADD, RET], bugs={BASE + 8: SimpleNamespace(warn=True, file="a.c", line=1)})
    why = reasons(cast(KernelImage, image), cut(image), {BASE + 8, BASE + 12}, Patches())
    assert why == {BASE + 8: "WARN at a.c:1", BASE + 12: BEHIND + "WARN at a.c:1"}
    both_ways = Image([cond(3), RET, BRK, ADD, RET], bugs=image.bugs)
    why = reasons(cast(KernelImage, both_ways), cut(both_ways), {BASE + 8, BASE + 12}, Patches())
    assert why == {BASE + 8: "WARN at a.c:1", BASE + 12: ""}


# real functions

FUNCTIONS = {
    "debian:6.12": ("set_memory_valid", "__change_memory_common", "__apply_to_page_range", "change_page_range"),
    "debian:7.3": (
        *("set_memory_valid", "update_range_prot", "walk_pgd_range", "pageattr_pte_entry", "pageattr_pmd_entry"),
        *("pageattr_pud_entry", "split_kernel_leaf_mapping", "walk_kernel_page_table_range_lockless"),
    ),
}

SOME = {
    *("four pages, invalid", "four pages, valid", "a whole block, invalid", "hole at level 1, valid"),
    *("513 pages, invalid", "size 0, invalid", "nG mappings on, invalid", "nG mappings on, valid"),
}


class Covered(KernelSubject):
    """A kernel all of whose machines record into one place."""

    def __init__(self, image: KernelImage, functions: tuple[str, ...]) -> None:
        super().__init__(image)
        self.functions = functions
        self.executed: set[Run] = set()
        self.seen: Coverage | None = None

    def machine(self, *, ng: bool) -> Machine:
        machine = super().machine(ng=ng)
        self.seen = Coverage(machine, self.functions, self.executed)
        self.seen.start()
        return machine


@pytest.mark.kernels
@pytest.mark.parametrize("name", FUNCTIONS)
def test_scenarios_reach_the_blocks_that_they_are_about(name: str) -> None:
    subject = Covered(kernel_image(name), FUNCTIONS[name])
    for case in all_cases():
        if case.name in SOME:
            run_case(subject, case)
    assert subject.seen
    rows = {row.name: row for row in subject.seen.report()}
    assert list(rows) == list(FUNCTIONS[name])
    for row in rows.values():
        assert 0 < row.reached == row.blocks - len(row.unreached)
    assert rows["set_memory_valid"].unreached == ()
    middle = rows["__change_memory_common" if "6.12" in name else "update_range_prot"]
    assert middle.unexplained == ()
    assert STACK_CHECK in {block.reason for block in middle.unreached}
    known = {at for part in _parts(subject) for block in part for at in range(block.start, block.end, 4)}
    assert addresses(subject.executed) <= known


def _parts(subject: Covered) -> list[list[Block]]:
    image = subject.image
    found = [parts(image, name) for name in subject.functions]
    patched = patches(image, [part for each in found for part in each])
    return [blocks(image, each, patched) for each in found]


@pytest.mark.kernels
@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_blocks_of_real_functions_are_closed_and_whole(name: str) -> None:
    image = kernel_image(name)
    more = ("kfence_guarded_free", "vmalloc_to_page", "do_one_initcall", "__kfence_alloc", "vfs_read")
    for function in (*FUNCTIONS[name], *more):
        where = parts(image, function)
        found = blocks(image, where, patches(image, where))
        starts = {block.start for block in found}
        ways = predecessors(found)
        for block in found:
            assert block.start < block.end
            assert set(block.successors) <= starts, function
            words = [image.word(at, 4) for at in range(block.start, block.end - 4, 4)]
            assert all(flow(word) in (Flow.ON, Flow.CALL) for word in words), function
        assert {part.start for part in where} <= starts
        assert all(first.end <= second.start for first, second in pairwise(found))
        # A switch goes to its cases by a register; nothing else is without a way in.
        jumps = any(word & 0xFFFFFC1F == BR for block in found for word in [image.word(block.end - 4, 4)])
        assert jumps or [x for x in found if x.start not in ways and x.start != x.part.start] == [], function


@pytest.mark.kernels
def test_recording_ends_and_leaves_no_hook() -> None:
    machine = Machine.boot(kernel_image("debian:6.12"))
    stub_allocator(machine)
    va = machine.plan.linear_va(machine.plan.ram[0] + machine.plan.ram[1] // 2)
    with Coverage(machine, ["set_memory_valid"]) as seen:
        machine.call("set_memory_valid", va, 1, 0).ok()
    (row,) = seen.report()
    assert (row.reached, [str(block) for block in row.unexplained]) == (2, [str(row.unreached[0])])
    assert str(row) == "set_memory_valid: 2 of 3 blocks, 1 missed without a reason"
    before = set(seen.executed)
    machine.call("set_memory_valid", va, 1, 1).ok()
    assert seen.executed == before
    seen.start()
    machine.call("set_memory_valid", va, 1, 1).ok()
    seen.stop()
    assert seen.report()[0].unreached == ()


@pytest.mark.kernels
def test_what_was_recorded_is_what_a_trace_of_every_instruction_sees() -> None:
    machine = Machine.boot(kernel_image("debian:7.3"))
    va = machine.plan.linear_va(machine.plan.ram[0] + machine.plan.ram[1] // 2)
    function = "walk_pgd_range"
    (part,) = parts(machine.image, function)  # type: ignore[arg-type]
    pcs: set[int] = set()

    def step(pc: int) -> bool:
        pcs.add(pc)
        return True

    machine.cpu.on_code(step, part.start, part.end - 4)
    with Coverage(machine, [function]) as seen:
        machine.call("set_memory_valid", va, 600, 0).ok()
    assert addresses(seen.executed) == pcs


def test_a_machine_without_a_kernel_has_nothing_to_cover() -> None:
    with pytest.raises(ValueError, match="without a kernel has no functions"):
        Coverage(Machine.bare(), ["f"])
