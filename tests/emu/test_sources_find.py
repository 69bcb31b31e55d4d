"""The search for root tables, on trees made here among noise: every granule, both halves, decoys."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from emu.sources.find import Root, find_roots, survey
from emu.sources.ram import FileMemory, Segment
from pgtable import Format, Granule, PhysicalMemory
from pgtable.build import TableBuilder
from pgtable.leaves import leaves
from tests.emu.dumps import same

RAM = 0x8000_0000
SIZE = 16 << 20
POOL = 2 << 20

FORMATS = [
    (Granule.K4, 48),
    (Granule.K4, 39),
    (Granule.K4, 52),
    (Granule.K16, 47),
    (Granule.K16, 48),
    (Granule.K16, 36),
    (Granule.K64, 48),
    (Granule.K64, 42),
]

Seek = Callable[[], list[Root]]


class Machine:
    """RAM filled with noise, trees in it, and the file that a dump of it is."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.path = path
        self.rng = rng
        self.memory = PhysicalMemory((RAM, SIZE))
        self.next_pool = RAM
        self._noise()

    def _noise(self) -> None:
        """Random pages, text, small numbers, pointers, zeros."""
        for pa in range(RAM, RAM + SIZE, 4096):
            words = self.memory.words(pa, 512)
            kind = self.rng.randrange(5)
            seed = np.random.default_rng(self.rng.getrandbits(32))
            if kind == 0:
                words[:] = seed.integers(0, 1 << 63, 512, np.uint64)
            elif kind == 1:
                words[:] = np.frombuffer(b"GNU is not Unix, page tables are not lists. " * 94, np.uint64)[:512]
            elif kind == 2:
                words[:] = seed.integers(0, 1000, 512, np.uint64)
            elif kind == 3:
                words[:] = np.uint64(0xFFFF_8000_0000_0000) + seed.integers(0, SIZE, 512, np.uint64)
            else:
                words[:] = 0

    def tree(self, granule: Granule, va_bits: int, *, upper: bool) -> TableBuilder:
        fmt = Format(granule, ds=va_bits > 48 and granule is not Granule.K64)
        pool = (self.next_pool, POOL)
        self.next_pool += POOL
        return TableBuilder(self.memory, pool, fmt=fmt, va_bits=va_bits, upper=upper)

    def kernel(self, granule: Granule, va_bits: int) -> TableBuilder:
        """A kernel's tree: a linear map of all RAM, a little else."""
        tree = self.tree(granule, va_bits, upper=True)
        page = granule.page_size
        tree.map(tree.base + RAM % (1 << va_bits - 1), RAM, SIZE, level=3, template=attributes(tree, UXN=1, PXN=1))
        high = tree.base + (1 << va_bits - 1) + 0x800_0000
        tree.map(high, RAM + 8 * page, 8 * page, level=3, template=attributes(tree, UXN=1))
        tree.map(high + (1 << 30), RAM, page, level=3, template=attributes(tree, UXN=1))
        tree.unmap(high + (1 << 30), page)  # a table that holds nothing stays
        return tree

    def process(self, granule: Granule, va_bits: int, pages: int) -> TableBuilder:
        """A process: pages anywhere, for EL0; a device page too."""
        tree = self.tree(granule, va_bits, upper=False)
        page = granule.page_size
        for i in range(pages):
            pa = RAM + page * self.rng.randrange(SIZE // page)
            tree.map(0x40_0000 + i * page, pa, page, level=3, template=attributes(tree, AP=1, nG=1, PXN=1))
        tree.map(0x7000_0000, 0x900_0000, page, level=3, template=attributes(tree, AP=1, nG=1, UXN=1, PXN=1))
        return tree

    def roots(self) -> list[Root]:
        self.path.write_bytes(self.memory.read(RAM, SIZE))
        dump = FileMemory([Segment(RAM, SIZE, 0)], [os.open(self.path, os.O_RDONLY)], "dump")
        found = find_roots(dump)
        for root in found[:1]:
            assert same(leaves(dump, root.registers), leaves(self.memory, root.registers))
        dump.close()
        return found


def attributes(tree: TableBuilder, **fields: int) -> int:
    shared = {} if tree.fmt.lpa2 else {"SH": 3}
    return tree.fmt.leaf(3).pack(AF=1, **shared, **fields)


@pytest.fixture
def noisy(tmp_path: Path, rng: random.Random) -> Machine:
    return Machine(tmp_path / "dump", rng)


@pytest.mark.parametrize(("granule", "va_bits"), FORMATS)
def test_the_kernels_root_is_first_in_every_format(noisy: Machine, granule: Granule, va_bits: int) -> None:
    tree = noisy.kernel(granule, va_bits)
    first = noisy.roots()[0]
    assert (first.pa, first.granule, first.upper) == (tree.root, granule, True)
    assert first.start_level == tree.start_level
    assert first.linear == 1
    assert first.own == 1
    assert first.in_ram == 1
    assert first.user == 0
    assert first.leaves == SIZE // granule.page_size + 8


def test_processes_come_behind_the_kernel_and_are_told_apart(noisy: Machine) -> None:
    kernel = noisy.kernel(Granule.K4, 48)
    processes = [noisy.process(Granule.K4, 48, pages) for pages in (300, 40)]
    found = noisy.roots()
    assert found[0].pa == kernel.root
    by_pa = {root.pa: root for root in found}
    for tree, pages in zip(processes, (300, 40), strict=True):
        root = by_pa[tree.root]
        assert not root.upper
        assert root.user == 1
        assert root.leaves == pages + 1
        assert 0.9 < root.in_ram < 1
        assert tree.root == root.registers.TTBR0_EL1
    assert [root.pa for root in found if not root.upper][:2] == [tree.root for tree in processes]


def test_a_stale_root_ranks_behind_the_one_in_use(noisy: Machine) -> None:
    """Two kernels' trees, one of which has lost its linear map; a self reference; an identity map."""
    stale = noisy.kernel(Granule.K4, 48)
    noisy.memory.words(stale.root, 256)[:] = 0
    kernel = noisy.kernel(Granule.K4, 48)
    identity = noisy.tree(Granule.K4, 48, upper=False)
    identity.map(RAM, RAM, 4 << 20, level=2, template=attributes(identity))
    circle = noisy.tree(Granule.K4, 48, upper=False)
    noisy.memory.words(circle.root, 512)[:] = circle.root | 3
    found = noisy.roots()
    assert found[0].pa == kernel.root
    by_pa = {root.pa: root for root in found}
    assert by_pa[stale.root].score < found[0].score / 2
    assert not by_pa[identity.root].upper
    assert by_pa[identity.root].distance == 0
    assert circle.root not in by_pa


def test_noise_alone_has_no_believable_root(noisy: Machine) -> None:
    assert all(root.score < 1 for root in noisy.roots())


def test_a_table_with_one_bad_descriptor_is_none(noisy: Machine) -> None:
    tree = noisy.kernel(Granule.K4, 48)
    noisy.memory.store(tree.root + 8, 3 | 1 << 48)  # a reserved address bit
    assert tree.root not in {root.pa for root in noisy.roots()}


def test_a_table_that_leads_to_data_is_none(noisy: Machine) -> None:
    """A 16K page whose first quarter is zeros is no empty table."""
    tree = noisy.kernel(Granule.K16, 47)
    data = RAM + SIZE - 16384
    noisy.memory.words(data, 2048)[:] = 0
    slot = tree.root + 8 * 700
    noisy.memory.store(slot, data | 3)
    whole = (tree.root, Granule.K16, tree.start_level)
    assert whole in {(root.pa, root.granule, root.start_level) for root in noisy.roots()}
    noisy.memory.words(data + 8192, 512)[:] = 0xFFFF_FFFF_FFFF_FFFF
    assert whole not in {(root.pa, root.granule, root.start_level) for root in noisy.roots()}


def test_leaves_that_nobody_used_are_no_tree(noisy: Machine) -> None:
    tree = noisy.kernel(Granule.K4, 48)
    tree.protect(tree.base + RAM, SIZE, AF=0)
    assert noisy.roots()[0].leaves < SIZE // 4096


def test_the_survey_keeps_tables_and_drops_noise(noisy: Machine) -> None:
    tree = noisy.kernel(Granule.K4, 48)
    noisy.path.write_bytes(noisy.memory.read(RAM, SIZE))
    dump = FileMemory([Segment(RAM, SIZE, 0)], [os.open(noisy.path, os.O_RDONLY)], "dump")
    kept = set(survey(dump).pages.tolist())
    start, size = tree.used
    full = {pa for pa in range(start, start + size, 4096) if noisy.memory.words(pa, 512).any()}
    assert full <= kept
    assert len(full) == size // 4096 - 1  # one table is empty
    assert len(kept) < SIZE // 4096 // 4
    dump.close()


def test_a_root_says_its_evidence() -> None:
    root = Root(0x4000_0000, Granule.K4, 0, 48, True, 9, 700, 1.0, 0.5, 0, 0.25, 0.0)
    assert str(root) == (
        "PA 0x40000000: 4K, 48 VA bits, upper half (TTBR1); 9 tables, 700 leaves, 25% of them in RAM, 0% for EL0; "
        "maps 50% of RAM at one distance and 100% of its own tables"
    )
