"""What the tables of either stage say by their format alone: where a walk reads, and which bits are addresses.

Sources: pseudocode S1Walk and S2Walk, NextTableBase, LeafBase, StageOA, ContiguousBitFaults; Arm ARM D8.2, D8.3.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from pgtable.bits import Field, Layout, W
from pgtable.descriptors import CONTIGUOUS_RUN, LAST_LEVEL, Format, Granule, Kind
from pgtable.features import Features

if TYPE_CHECKING:
    from pgtable.params import Regime


class TableParams:
    """A tree of tables: its format and root. What depends on nothing else is here, for WalkParams and Stage2Params."""

    regime: Regime
    features: Features
    fmt: Format
    ps_bits: int  # output address size in bits
    big_endian: bool
    haft: bool  # hardware sets the access flag of tables

    upper: bool  # the upper half of a VA space
    secure: bool

    @property
    def inherited_mask(self) -> int:
        """The table attributes that limit permissions below."""
        return 0

    @property
    def ns_table(self) -> int:
        """A table's NSTable bit."""
        return 0

    @property
    def half_base(self) -> int:
        """The lowest input address."""
        return 0

    @property
    def not_dirty(self) -> int:
        """The bit of a leaf by which hardware tells dirty from clean."""
        raise NotImplementedError

    @property
    def ia_bits(self) -> int:
        """Bits of the input address that are translated."""
        raise NotImplementedError

    @property
    def start_level(self) -> int:
        """The level of the root table."""
        raise NotImplementedError

    @property
    def base(self) -> int:
        """The root table's PA."""
        raise NotImplementedError

    @property
    def root(self) -> int:
        """The register that says where the root is: TTBR or VTTBR."""
        raise NotImplementedError

    @property
    def why_off(self) -> str:
        """Why these tables translate nothing, "" if they do."""
        raise NotImplementedError

    @cached_property
    def levels(self) -> tuple[tuple[int, int, int], ...]:
        """(level, shift, index mask) from the root down; the root's mask covers the VA bits that are left."""
        return level_rows(self.fmt.granule, self.start_level, self.ia_bits)

    @cached_property
    def root_entries(self) -> int:
        """Descriptors in the root table."""
        return self.levels[0][2] + 1

    @cached_property
    def over(self) -> int:
        """The address bits that an output address must not have."""
        return (1 << 64) - (1 << self.ps_bits)

    @cached_property
    def page(self) -> Layout:
        """The layout of a page: every leaf's attribute and permission fields are where a page has them."""
        return self.fmt.leaf(LAST_LEVEL)

    @cached_property
    def kinds(self) -> dict[int, tuple[Kind, ...]]:
        """What a descriptor is, by level and bits [1:0]."""
        return {level: tuple(self.fmt.kind(low, level) for low in range(4)) for level in range(-1, LAST_LEVEL + 1)}

    @cached_property
    def rows(self) -> tuple[tuple[int, int, int, tuple[Kind, ...]], ...]:
        """`levels` with what each level's descriptors are, by bits [1:0]."""
        return tuple((level, shift, mask, self.kinds[level]) for level, shift, mask in self.levels)

    @cached_property
    def table_mask(self) -> int:
        """The address bits of a table descriptor where they are in place; 0 for a split address."""
        return _in_place(self.fmt.table(LAST_LEVEL - 1)["TA"])

    @cached_property
    def leaf_address(self) -> dict[int, tuple[int, int]]:
        """By level: the output address bits of a leaf where they are in place (0: split), and the entry's size."""
        size = self.fmt.granule.level_size
        return {level: (_in_place(self.fmt.leaf(level)["OA"]), size(level)) for level, _, _ in self.levels}

    def table_address(self, word: W) -> W:
        """The next-level table's PA in a table descriptor (pseudocode NextTableBase)."""
        return self.fmt.table(LAST_LEVEL - 1)["TA"].get(word)

    def output_address(self, level: int, word: W) -> W:
        """The output address of a leaf at `level` (pseudocode LeafBase)."""
        return self.fmt.leaf(level)["OA"].get(word)

    def offset_mask(self, level: int, word: int) -> int:
        """The PA bits that come from the VA: the entry's size, or the whole contiguous run's (pseudocode StageOA)."""
        size = self.fmt.granule.level_size(level)
        run = self.features.contiguous_output and word & self.contiguous
        return size * (self.run_length(level) if run else 1) - 1

    def run_length(self, level: int) -> int:
        """Entries in a contiguous run at `level`; 1 where there is none."""
        return CONTIGUOUS_RUN[self.fmt.granule].get(level, 1)

    def run_too_large(self, level: int) -> bool:
        """A contiguous run at `level` is larger than the input range (pseudocode ContiguousBitFaults)."""
        return self.fmt.granule.level_size(level) * self.run_length(level) > 1 << self.ia_bits

    @cached_property
    def af(self) -> int:
        """The leaf's AF bit."""
        return self.page["AF"].mask

    @cached_property
    def contiguous(self) -> int:
        """The leaf's Contiguous bit."""
        return self.page["Contiguous"].mask

    @cached_property
    def nt(self) -> int:
        """The nT bit of a block."""
        return self.fmt.leaf(LAST_LEVEL - 1)["nT"].mask

    @cached_property
    def table_af(self) -> int:
        """A table's AF bit (FEAT_HAFT)."""
        return self.fmt.table(LAST_LEVEL - 1)["AF"].mask


def _in_place(field: Field) -> int:
    """The mask of an address that is read by one AND; 0 if a part of it has moved."""
    return field.mask if len(field.spans) == 1 else 0


def level_rows(granule: Granule, start_level: int, ia_bits: int) -> tuple[tuple[int, int, int], ...]:
    """(level, shift, index mask) from `start_level` down; the first index has all address bits that are left."""
    rows = []
    for level in range(start_level, LAST_LEVEL + 1):
        shift = granule.level_shift(level)
        width = ia_bits - shift if level == start_level else granule.stride
        rows.append((level, shift, (1 << width) - 1))
    return tuple(rows)
