"""The merged listing against the walk: every entry of random trees, and what is said of those that are corrupt."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from pgtable import Access, AccessType, Kind, PhysicalMemory, Registers, translate
from pgtable import tree as tree_module
from pgtable.leaves import leaves, runs
from pgtable.listing import Listing, listing
from pgtable.params import Regime
from tests.pgtable.hand import ROOT, STRIDE, TABLE_STEP, leaf, table, tree
from tests.pgtable.test_leaves import SHAPES, Random, every_entry, is_leaf, random_tree

U64 = (1 << 64) - 1


def physical(words: dict[int, int]) -> PhysicalMemory:
    memory = PhysicalMemory((ROOT, 16 * TABLE_STEP))
    for pa, word in words.items():
        memory.store(pa, word)
    return memory


def agrees(memory: PhysicalMemory, regs: Registers, found: Listing, va: int) -> bool:
    """The listing says of `va` what a walk does that no permission refuses."""
    access = Access(AccessType.AT_ANY, found.regime.el)
    walked = translate(memory, regs, va, access, regime=found.regime)
    row = found.at(va)
    if row is None:
        return walked.fault is not None and walked.steps[-1].kind not in (Kind.BLOCK, Kind.PAGE)
    rows = found.runs
    if rows.fault[row]:
        return walked.fault is not None and walked.fault.code == int(rows.fault[row])
    return walked.ok and walked.pa == int(rows.pa[row]) + va - int(rows.va[row])


@pytest.fixture(params=SHAPES, ids=lambda s: f"{s[0]} {s[1]} {s[2]}")
def made(request: pytest.FixtureRequest, rng: random.Random) -> Random:
    return random_tree(rng, *request.param)


def test_every_entry_of_a_random_tree_is_as_the_walk_says(made: Random, rng: random.Random) -> None:
    found = listing(made.memory, made.regs, regime=Regime(made.regime))
    walks = every_entry(made)
    assert sum(map(is_leaf, walks)) == int(found.runs.leaves.sum()) > 20
    for walked in rng.sample(walks, min(len(walks), 1000)):
        assert agrees(made.memory, made.regs, found, walked.va), walked
    for i in rng.sample(range(len(found.runs.va)), min(len(found.runs.va), 500)):
        inside = int(found.runs.va[i]) + rng.randrange(int(found.runs.size[i]))
        assert agrees(made.memory, made.regs, found, inside)


def test_rows_are_the_runs_of_the_leaves(made: Random) -> None:
    """The other listing, which reads each leaf: where nothing faults, the rows are the same."""
    regime = Regime(made.regime)
    rows = listing(made.memory, made.regs, regime=regime).runs
    single = leaves(made.memory, made.regs, regime=regime)
    assert int(rows.leaves.sum()) == len(single.va)
    first = np.searchsorted(single.va, rows.va)
    for name in ("va", "level", "word", "slot", "inherited", "perms"):
        assert getattr(rows, name).tolist() == getattr(single, name)[first].tolist(), name
    assert len(rows.va) <= len(runs(single, made.regs, regime=regime)) + int((rows.fault != 0).sum())


def test_big_endian_tables(rng: random.Random) -> None:
    made = random_tree(rng, "4K", 39, "EL10", big_endian=True)
    found = listing(made.memory, made.regs)
    walks = rng.sample(every_entry(made), 1000)
    assert all(agrees(made.memory, made.regs, found, walked.va) for walked in walks)


@pytest.mark.parametrize("granule", ["4K", "16K", "64K"])
def test_a_table_that_is_nothing_but_itself_is_listed_in_part_and_says_so(granule: str) -> None:
    made = tree(granule=granule, ia=48 if granule != "16K" else 47, va=0)
    memory = physical({})
    memory.words(ROOT, 1 << STRIDE[granule])[:] = table(ROOT)
    start = time.process_time()
    found = listing(memory, made.regs)
    assert time.process_time() - start < 2
    kinds = {finding.kind for finding in found.findings}
    assert {"loop", "not listed"} <= kinds
    assert not found.complete
    for i in range(0, len(found.runs.va), 997):
        assert agrees(memory, made.regs, found, int(found.runs.va[i]))
    listed = int(found.runs.size.sum())
    missing = sum(finding.size for finding in found.findings if finding.kind == "not listed")
    assert listed + missing == 1 << found.trees[0].params.ia_bits


def test_a_page_used_twice_is_visited_twice_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tree(leaf(), va=0)
    memory = physical(made.memory)
    root = made.memory[ROOT]
    memory.store(ROOT + 8, root)
    found = listing(memory, made.regs)
    assert found.runs.va.tolist() == [0, 1 << 39]
    shared = [finding for finding in found.findings if finding.kind == "shared table"]
    assert "2 descriptors refer to the level 1 table" in shared[0].text
    monkeypatch.setattr(tree_module, "MAX_REPEATED", 0)
    part = listing(memory, made.regs)
    assert part.runs.va.tolist() == [0]
    left = [finding for finding in part.findings if finding.kind == "not listed"]
    assert [(finding.va, finding.size) for finding in left] == [(1 << 39, 1 << 39)]


def test_tables_outside_ram_and_beyond_the_output_size_are_findings() -> None:
    made = tree(leaf(), va=0)
    memory = physical(made.memory)
    memory.store(ROOT + 16, table(0x7_0000_0000))
    memory.store(ROOT + 24, table(0xFFFF_0000_0000))
    small = made.with_regs(TCR_EL1=made.regs.TCR_EL1 & ~(7 << 32) | 2 << 32)  # 40 bits
    found = listing(memory, small.regs)
    said = {finding.kind: finding for finding in found.findings if finding.slot != tree_module.ROOT}
    assert said["no memory"].va == 2 << 39
    assert "PA 0x700000000 is outside RAM" in said["no memory"].text
    assert said["no memory"].slot == ROOT + 16
    assert said["address size"].va == 3 << 39
    assert said["address size"].size == 1 << 39


def test_reserved_descriptors_are_findings_and_no_rows() -> None:
    made = tree(leaf(), va=0)
    last = made.slots[3]
    memory = physical(made.memory)
    memory.store(last + 8, leaf() & ~2)
    found = listing(memory, made.regs)
    assert int(found.runs.leaves.sum()) == 1
    said = [(f.kind, f.va, f.size) for f in found.findings if f.slot < tree_module.ROOT]
    assert said == [("reserved", 0x1000, 0x1000)]


def test_a_run_ends_where_its_address_wraps() -> None:
    """The next word is one page further, with a carry into a bit that is no address: not the same run."""
    made = tree(leaf(), va=0)
    last = made.slots[3]
    memory = physical(made.memory)
    top = 0x0000_FFFF_FFFF_F000
    word = leaf() & ~top
    memory.store(last, word | top)
    memory.store(last + 8, word + (1 << 48))
    memory.store(last + 16, word + (1 << 48) + 0x1000)
    found = listing(memory, made.regs).runs
    assert found.pa.tolist() == [top, 0]
    assert found.leaves.tolist() == [1, 2]


def test_a_contiguous_run_that_is_not_aligned_gives_what_hardware_gives() -> None:
    """Hardware takes the low address bits of a run from the VA (pseudocode StageOA): such rows are read one by one."""
    made = tree(leaf(), va=0)
    last = made.slots[3]
    memory = physical(made.memory)
    oa = 0x0000_FFFF_FFFF_F000
    for i in range(16):
        memory.store(last + 8 * i, leaf() & ~oa | 1 << 52 | 0x8000_3000 + 0x1000 * i)
    found = listing(memory, made.regs)
    for va in range(0, 0x10000, 0x800):
        assert agrees(memory, made.regs, found, va)


def test_halves_that_are_off_say_why() -> None:
    made = tree(leaf(), va=0)
    off = made.with_regs(TCR_EL1=made.regs.TCR_EL1 | 1 << 7)
    found = listing(physical(made.memory), off.regs)
    assert not len(found.runs.va)
    assert any("TCR.EPD is set" in finding.text for finding in found.findings if finding.kind == "off")
