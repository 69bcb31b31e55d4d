"""Listings against the walk: every leaf, table and run of random trees. Judge: `translate`, entry by entry."""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import pytest

from pgtable import Access, Kind, PhysicalMemory, Registers, translate
from pgtable.leaves import leaves, runs, tables
from pgtable.params import Regime
from pgtable.walk import Walk
from tests.pgtable.hand import (
    PAGE_SHIFT,
    REGIME_EL,
    ROOT,
    STRIDE,
    TABLE_STEP,
    U64,
    hcr,
    leaf,
    sctlr,
    start_level,
    table,
    tcr,
    tcr2,
    tree,
)

AF = 1 << 10
POOL = 6  # table pages, that refer to one another at random
OA_MASK = {"4K": 0x0000_FFFF_FFFF_F000, "16K": 0x0000_FFFF_FFFF_C000, "64K": 0x0000_FFFF_FFFF_F000}


class Random(NamedTuple):
    """A random tree: its memory, its registers, and what they say."""

    memory: PhysicalMemory
    regs: Registers
    granule: str
    ia: int
    regime: str
    uppers: tuple[bool, ...]


def random_words(rng: random.Random, granule: str, level: int, pages: list[int], n: int) -> np.ndarray:
    """A table of `n` entries: some leaves alone and in runs, a few tables, junk with bit 0 clear, the rest empty."""
    words = np.zeros(n, np.uint64)

    def junk() -> int:
        return rng.getrandbits(64) & ~(OA_MASK[granule] | 3)

    for _ in range(20):
        oa = rng.getrandbits(rng.choice((40, 40, 47))) & OA_MASK[granule] & ~0xFFFF
        words[rng.randrange(n)] = junk() | oa | rng.choice((0, AF, AF)) | rng.choice((0, 1, 2, 3))
    size = 1 << PAGE_SHIFT[granule] + (3 - level) * STRIDE[granule]
    for _ in range(4):
        at, attributes = rng.randrange(n), junk() & ~(0xFF << 55) | rng.choice((0, AF, AF))
        length = min(n - at, rng.randrange(1, 40))
        first = rng.getrandbits(43) & -size & OA_MASK[granule] & ~0xFFFF
        for i in range(length):
            words[at + i] = attributes | (first + i * size) & ((1 << 48) - 1) | (3 if level == 3 else 1)
    if level < 3:  # what looks like a table leads to one of ours, or to where there is no RAM
        for i in np.flatnonzero((words & np.uint64(3)) == 3):
            words[i] = int(words[i]) & ~(OA_MASK[granule] | 3)
        for entry, page in zip(rng.sample(range(n), 2), (pages[0], rng.choice([*pages, 0x7_0000_0000])), strict=True):
            words[entry] = page | 3 | rng.choice((0, 0, rng.getrandbits(4))) << 59
    return words


def random_tree(rng: random.Random, granule: str, ia: int, regime: str = "EL10", *, big_endian: bool = False) -> Random:
    start = start_level(granule, ia)
    memory = PhysicalMemory((ROOT, POOL * TABLE_STEP))
    pages = [ROOT + i * TABLE_STEP for i in range(POOL)]
    for i, page in enumerate(pages):
        level = min(start + i // 2, 3)
        n = 1 << min(ia - PAGE_SHIFT[granule] - (3 - start) * STRIDE[granule] if i < 2 else 99, STRIDE[granule])
        words = random_words(rng, granule, level, pages[i // 2 * 2 + 2 :] or [page], n)
        memory.words(page, len(words))[:] = words.byteswap() if big_endian else words
    one = regime in ("EL2", "EL3")
    el = REGIME_EL[regime]
    extra = {"HPD": rng.getrandbits(1)} if one else {f"HPD{n}": rng.getrandbits(1) for n in (0, 1)}
    code = tcr(granule, ia, ps=4, one=one, **extra)
    if not one:  # the same shape for the upper half
        upper = tcr(granule, ia, ps=4, upper=True)
        code = code & ~(0xFFFF << 16) | upper & 0xFFFF << 16
    values = {f"TCR_EL{el}": code, f"TTBR0_EL{el}": pages[0], f"SCTLR_EL{el}": sctlr(EE=int(big_endian), WXN=1)}
    if not one:
        values[f"TTBR1_EL{el}"] = pages[1]
    regs = Registers(HCR_EL2=hcr(E2H=int(regime == "EL20")), **values)
    return Random(memory, regs, granule, ia, regime, (False,) if one else (False, True))


def every_entry(made: Random) -> list[Walk]:
    """A walk into every entry of the tree: from the bottom of each half up, by the size of the entry it ended in."""
    found = []
    access = Access.read(REGIME_EL[made.regime])
    for upper in made.uppers:
        base = U64 ^ (1 << made.ia) - 1 if upper else 0
        va = 0
        while va < 1 << made.ia:
            walk = translate(made.memory, made.regs, base + va, access, regime=Regime(made.regime))
            found.append(walk)
            level = walk.raw[-1][0]
            va += 1 << PAGE_SHIFT[made.granule] + (3 - level) * STRIDE[made.granule]
    return found


def is_leaf(walk: Walk) -> bool:
    return walk.steps[-1].kind in (Kind.BLOCK, Kind.PAGE)


SHAPES = [
    ("4K", 48, "EL10"),
    ("4K", 39, "EL20"),
    ("4K", 25, "EL2"),
    ("16K", 47, "EL10"),
    ("16K", 36, "EL3"),
    ("64K", 42, "EL10"),
    ("64K", 48, "EL2"),
]


@pytest.fixture(params=SHAPES, ids=lambda s: f"{s[0]} {s[1]} {s[2]}")
def made(request: pytest.FixtureRequest, rng: random.Random) -> Random:
    return random_tree(rng, *request.param)


def test_leaves_tables_and_runs_are_those_that_the_walk_meets(made: Random) -> None:
    walks = every_entry(made)
    regime = Regime(made.regime)
    hpd = made.regs[f"TCR_EL{REGIME_EL[made.regime]}"]

    def limits(walk: Walk) -> int:
        """The table attributes above a leaf; bit 59 is ignored where there is no EL0."""
        inherited = 0
        for step in walk.steps[:-1]:
            inherited |= step.word
        bit, mask = (24, 0b111 << 60) if len(made.uppers) == 1 else (41 + walk.params.upper, 0b1111 << 59)
        return 0 if hpd >> bit & 1 else inherited & mask

    found = leaves(made.memory, made.regs, regime=regime)
    met = [w for w in walks if is_leaf(w)]
    assert len(met) > 20
    assert found.va.tolist() == [w.va for w in met]
    assert found.level.tolist() == [w.steps[-1].level for w in met]
    assert found.word.tolist() == [w.steps[-1].word for w in met]
    assert found.slot.tolist() == [w.steps[-1].pa for w in met]
    assert found.inherited.tolist() == [limits(w) for w in met]
    passing = [(i, w.result) for i, w in enumerate(met) if w.ok]
    assert passing
    assert [int(found.pa[i]) for i, _ in passing] == [r.pa for _, r in passing]
    assert [int(found.perms[i]) for i, _ in passing] == [r.perms for _, r in passing]

    listed = tables(made.memory, made.regs, regime=regime)
    pages = {}
    for walk in walks:
        steps, whole = walk.steps, (1 << made.ia) - 1
        for i, step in enumerate(steps):
            size = whole + 1 if i == 0 else 1 << PAGE_SHIFT[made.granule] + (4 - step.level) * STRIDE[made.granule]
            pages[step.level, walk.va & -size & U64] = (step.pa - 8 * step.entry, True)
        if walk.fault and walk.fault.type.value.startswith("external"):
            below = steps[-1].level + 1
            size = 1 << PAGE_SHIFT[made.granule] + (4 - below) * STRIDE[made.granule]
            pages[below, walk.va & -size & U64] = (steps[-1].word & OA_MASK[made.granule], False)
    got = dict(
        zip(
            zip(listed.level.tolist(), listed.va.tolist(), strict=True),
            zip(listed.pa.tolist(), listed.there.tolist(), strict=True),
            strict=True,
        )
    )
    assert got == pages

    merged = []
    for i, walk in enumerate(met):
        level = walk.steps[-1].level
        size = 1 << PAGE_SHIFT[made.granule] + (3 - level) * STRIDE[made.granule]
        address = walk.params.output_address(level, walk.steps[-1].word)
        attributes = walk.steps[-1].word ^ walk.params.fmt.leaf(level)["OA"].put(0, address)
        key = (level, attributes, int(found.perms[i]), limits(walk))
        if merged and merged[-1][0] == key and merged[-1][1:3] == [walk.va, address]:
            merged[-1][1:] = [walk.va + size, address + size, merged[-1][3] + 1, *merged[-1][4:]]
        else:
            merged.append([key, walk.va + size, address + size, 1, walk.va, address])
    assert [(r.va, r.pa, r.leaves, r.level, r.perms, r.inherited) for r in runs(found, made.regs, regime=regime)] == [
        (va, pa, n, key[0], key[2], key[3]) for key, _, _, n, va, pa in merged
    ]
    assert sum(r.size for r in runs(found, made.regs, regime=regime)) == sum(
        1 << PAGE_SHIFT[made.granule] + (3 - level) * STRIDE[made.granule] for level in found.level.tolist()
    )


def test_a_big_endian_tree_is_listed_like_its_little_endian_twin(rng: random.Random) -> None:
    state = rng.getstate()
    little = random_tree(rng, "4K", 39)
    rng.setstate(state)
    big = random_tree(rng, "4K", 39, big_endian=True)
    for a, b in zip(leaves(little.memory, little.regs), leaves(big.memory, big.regs), strict=True):
        assert a.tolist() == b.tolist()


def test_types_of_the_columns() -> None:
    made = tree()
    found = leaves(_physical(made), made.regs)
    assert [a.dtype.name for a in found] == ["uint64", "int8", "uint64", "uint64", "uint64", "uint64", "uint16"]
    assert {len(a) for a in found} == {1}


def _physical(made, *more: tuple[int, int]) -> PhysicalMemory:
    memory = PhysicalMemory((ROOT, 8 * TABLE_STEP), *more)
    for pa, word in made.memory.items():
        memory.store(pa, word)
    return memory


# What is listed, and what is not.


@pytest.mark.parametrize(
    "change",
    [{"TCR_EL1": 1 << 7}, {"SCTLR_EL1": 1}, {"TCR_EL1": 0x2F}],
    ids=["EPD0", "MMU off", "TxSZ out of range"],
)
def test_a_half_that_is_off_has_no_leaves(change: dict[str, int]) -> None:
    made = tree()
    assert len(leaves(_physical(made), made.regs).va) == 1
    off = made.regs.replace(**{name: made.regs[name] ^ mask for name, mask in change.items()})
    assert len(leaves(_physical(made), off).va) == 0
    assert len(tables(_physical(made), off).va) <= 1, "the other half's root"
    assert runs(leaves(_physical(made), off), off) == []


def test_the_default_regime_is_that_of_el1() -> None:
    made = tree(regime="EL2")
    assert len(leaves(_physical(made), made.regs).va) == 0
    assert leaves(_physical(made), made.regs, regime=Regime.EL2).va.tolist() == [made.va & ~0xFFF]


def test_a_table_outside_ram_ends_its_branch() -> None:
    made = tree()
    missing = made.with_word(1, table(0x7_0000_0000))
    memory = _physical(missing)
    assert len(leaves(memory, missing.regs).va) == 0
    found = tables(memory, missing.regs)
    last = [(int(found.level[i]), int(found.pa[i])) for i in np.flatnonzero(~found.there)]
    assert (2, 0x7_0000_0000) in last


def test_a_table_that_ends_beyond_ram_is_listed_as_far_as_it_goes() -> None:
    page = leaf(0x8000_0000)
    made = tree(page, granule="64K")
    memory = PhysicalMemory((ROOT, 3 * TABLE_STEP - 0x4000))  # the last quarter of the level 3 table is missing
    for pa, word in made.memory.items():
        memory.store(pa, word)
    first = made.slots[3]
    assert first < ROOT + 3 * TABLE_STEP - 0x4000
    found = leaves(memory, made.regs)
    assert found.va.tolist() == [made.va & ~0xFFFF]
    assert translate(memory, made.regs, made.va).ok


def test_a_root_beyond_the_output_size_maps_nothing() -> None:
    made = tree(leaf(low=1), ia=30, level=2, root=1 << 44, ps=4)
    memory = PhysicalMemory((1 << 44, 8 * TABLE_STEP))
    for pa, word in made.memory.items():
        memory.store(pa, word)
    fault = translate(memory, made.regs, made.va).fault
    assert fault is not None
    assert fault.cause == "TTBR"
    assert len(leaves(memory, made.regs).va) == 0


def test_a_table_beyond_the_output_size_ends_its_branch() -> None:
    made = tree(ps=4).with_flipped(1, 1 << 45)
    assert len(leaves(_physical(made), made.regs).va) == 0


def test_entries_beyond_the_input_range_are_not_listed() -> None:
    made = tree(leaf(), ia=25, va=0x1000)
    memory = _physical(made)
    memory.words(ROOT, 512)[16:] = table(ROOT + TABLE_STEP)  # 4 bits of index: 16 entries
    assert leaves(memory, made.regs).va.tolist() == [0x1000]


def test_a_recursive_entry_is_followed_like_any_other() -> None:
    made = tree(leaf(), va=0)
    memory = _physical(made)
    memory.store(ROOT + 8 * 511, table(ROOT))
    found = leaves(memory, made.regs)
    for i, va in enumerate(found.va.tolist()):
        walk = translate(memory, made.regs, va)
        assert walk.raw[-1][1] == int(found.slot[i])
    # Entry 511 of the root not at all, once, twice, three and four times, then entry 0.
    tops = [511 << 39, 511 << 30, 511 << 21, 511 << 12]
    assert found.va.tolist() == [sum(tops[:n]) for n in range(5)]


@pytest.mark.parametrize(("granule", "ia"), [("4K", 48), ("4K", 39), ("64K", 48)])
def test_a_tree_of_nothing_but_itself_is_refused_with_a_sentence(granule: str, ia: int) -> None:
    made = tree(granule=granule, ia=ia, va=0)
    memory = _physical(made)
    memory.words(ROOT, 1 << STRIDE[granule])[:] = table(ROOT)
    for call in (leaves, tables):
        with pytest.raises(ValueError, match=r"^the tree at PA 0x40000000 refers to itself more often than"):
            call(memory, made.regs)


def test_indirect_permissions_and_overlays_are_listed_as_the_walk_gives_them() -> None:
    made = tree(leaf(POIndex=2), TCR2_EL1=tcr2(PIE=1, POE=1), PIR_EL1=5, POR_EL1=1 << 8)
    found = leaves(_physical(made), made.regs)
    walk = translate(_physical(made), made.regs, made.va)
    assert found.perms.tolist() == [walk.result.perms]


# Runs.


def _pages(words: dict[int, int], **more: int) -> tuple[PhysicalMemory, Registers]:
    """Level 3 words by VA."""
    made = tree(0, va=0x1000, **more)
    memory = _physical(made)
    for va, word in words.items():
        memory.store((made.slots[3] & -0x1000) + 8 * (va >> 12), word)
    return memory, made.regs


@pytest.mark.parametrize(
    ("words", "sizes"),
    [
        ([leaf(0x8000_0000), leaf(0x8000_1000), leaf(0x8000_2000)], [0x3000]),
        ([leaf(0x8000_0000), leaf(0x8000_2000), leaf(0x8000_3000)], [0x1000, 0x2000]),
        ([leaf(0x8000_0000), leaf(0x8000_1000, AP=2), leaf(0x8000_2000)], [0x1000] * 3),
        ([leaf(0x8000_0000), leaf(0x8000_1000, AF=0), leaf(0x8000_2000, AF=0)], [0x1000, 0x2000]),
        ([leaf(0x8000_0000), 0, leaf(0x8000_2000)], [0x1000] * 2),
        ([leaf(0x8000_0000) | 1 << 55, leaf(0x8000_1000)], [0x1000] * 2),
    ],
    ids=["one run", "PA jumps", "AP", "AF", "hole", "software bit"],
)
def test_a_run_ends_where_anything_but_the_address_changes(words: list[int], sizes: list[int]) -> None:
    memory, regs = _pages({0x1000 * i: word for i, word in enumerate(words)})
    found = runs(leaves(memory, regs), regs)
    assert [r.size for r in found] == sizes
    assert [r.leaves for r in found] == [size >> 12 for size in sizes]
    assert found[0].word == words[0]


def test_leaves_of_two_levels_are_two_runs() -> None:
    made = tree(leaf(0x8020_0000), va=0x20_0000)
    memory = _physical(made)
    memory.store(made.slots[2] - 8, leaf(0x8000_0000, low=1))
    assert [(r.va, r.size, r.level) for r in runs(leaves(memory, made.regs), made.regs)] == [
        (0, 0x20_0000, 2),
        (0x20_0000, 0x1000, 3),
    ]
