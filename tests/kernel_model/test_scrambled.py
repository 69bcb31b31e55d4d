"""The model on a descriptor layout whose 64 bits are shuffled: it may know fields by name only, no bit by number.

The same trees are walked and changed twice, once in Arm's layout and once with every bit of every word elsewhere; what
happens must be the same when the words are put back in order.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest

from emu.checks.script import Recorder
from emu.checks.trees import Space, Tree, random_tree
from emu.checks.walks import ALL
from emu.checks.world import Reaction
from kernel_model import pageattr
from kernel_model.levels import Levels
from kernel_model.mm import Bug, Callback, Event, Kernel, Runaway, Write
from kernel_model.names import Bits
from kernel_model.pagewalk import MmWalk, walk_pgd_range
from kernel_model.variants import VARIANTS
from pgtable import NoMemory
from pgtable.bits import Field, Layout, Span
from pgtable.descriptors import Format
from pgtable.memory import PhysicalMemory

ARENA = (0x4000_0000, 1 << 20)
LEVELS = {name: Levels(12, 4, 48, 48) if name == "6.1" else Levels(12, 5, 52, 48) for name in VARIANTS}
LINEAR = 0xFFFF_0000_0000_0000


class Shuffle:
    """A permutation of the bits of a word."""

    def __init__(self, rng: random.Random) -> None:
        self.to = list(range(64))
        rng.shuffle(self.to)

    def word(self, word: int) -> int:
        return sum((word >> i & 1) << at for i, at in enumerate(self.to))

    def back(self, word: int) -> int:
        return sum((word >> at & 1) << i for i, at in enumerate(self.to))

    def layout(self, layout: Layout) -> Layout:
        return Layout(layout.name, tuple(self._field(field) for field in layout))

    def _field(self, field: Field) -> Field:
        bits = [(span.lo + i, span.at + i) for span in field.spans for i in range(span.width)]
        return replace(field, spans=tuple(Span(self.to[lo], 1, at) for lo, at in bits))

    def bits(self, bits: Bits) -> Bits:
        leaf, block, table = (self.layout(layout) for layout in (bits.leaf, bits.block, bits.table))
        return replace(bits, leaf=leaf, block=block, table=table)


def kernel_of(name: str, tree: Tree, shuffle: Shuffle | None) -> Kernel:
    memory = PhysicalMemory(ARENA, (ARENA[0] + (1 << 24), 1 << 20))
    for pa, word in tree.words.items():
        memory.store(pa, shuffle.word(word) if shuffle else word)
    bits = Bits.of(Format(), VARIANTS[name])
    pages = iter(range(ARENA[0] + (1 << 24), ARENA[0] + (1 << 24) + (1 << 20), 4096))
    flags = {"UXNTable": 1}
    made = shuffle.bits(bits) if shuffle else bits
    return Kernel(
        memory,
        tree.root,
        LEVELS[name],
        made,
        allocate=lambda: next(pages, None),
        table_flags=made.table.pack(**flags),
        step_limit=20_000,
        linear_offset=LINEAR - ARENA[0],
    )


def in_order(event: Event, shuffle: Shuffle) -> Event:
    if isinstance(event, Write):
        return Write(event.pa, shuffle.back(event.value))
    if isinstance(event, Callback) and event.value is not None:
        return event._replace(value=shuffle.back(event.value))
    return event


def told(kernel: Kernel, run: Callable[[Kernel], int], shuffle: Shuffle | None) -> tuple[str, list[Event]]:
    try:
        ended = str(run(kernel))
    except (Runaway, Bug, NoMemory) as stop:
        ended = type(stop).__name__
    events = [in_order(event, shuffle) for event in kernel.events] if shuffle else kernel.events
    return ended, events


def trees(name: str, seed: int) -> tuple[Tree, int, random.Random]:
    rng = random.Random(seed)
    space = Space(LEVELS[name], Format(), ARENA)
    va = 0xFFFF_8000_0000_0000 + rng.randrange(64) * (1 << 21) + rng.randrange(8) * 4096
    tree = random_tree(space, rng, [va])
    # A garbage table may lead outside of this small memory, to another place in each layout.
    known = {
        pa: w for pa, w in tree.words.items() if not w & 2 or ARENA[0] <= w & 0xFFFF_FFFF_F000 < sum(ARENA) or w & 1
    }
    return replace(tree, words=known), va, rng


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("name", list(VARIANTS))
def test_pagewalk_knows_no_bit_by_its_number(name: str, seed: int) -> None:
    tree, va, rng = trees(name, seed)
    script = {i: Reaction(action=rng.choice((0, 1, 2))) for i in range(8) if rng.random() < 0.3}
    end = va + rng.randrange(1, 40) * 4096

    def walk(kernel: Kernel) -> int:
        return walk_pgd_range(va, end, MmWalk(kernel, Recorder(kernel, script, ARENA).ops(ALL)))

    shuffle = Shuffle(rng)
    plain = told(kernel_of(name, tree, None), walk, None)
    assert told(kernel_of(name, tree, shuffle), walk, shuffle) == plain


@pytest.mark.parametrize("seed", range(60))
@pytest.mark.parametrize("name", list(VARIANTS))
def test_pageattr_knows_no_bit_by_its_number(name: str, seed: int) -> None:
    tree, va, rng = trees(name, 1000 + seed)
    pages, enable = rng.randrange(1, 40), rng.randrange(2)

    def change(kernel: Kernel) -> int:
        kernel.settings = replace(kernel.settings, requires_bbml=bool(seed % 2), caps_finalized=False)
        masks = pageattr.valid_masks(kernel.bits, enable)
        if seed % 3 == 2:
            masks = pageattr.Masks(kernel.bits.RDONLY, kernel.bits.WRITE)
        common = vars(pageattr)["__change_memory_common"]
        return int(common(kernel, va, pages * 4096, masks))

    shuffle = Shuffle(rng)
    plain = told(kernel_of(name, tree, None), change, None)
    assert told(kernel_of(name, tree, shuffle), change, shuffle) == plain
