"""A64 branches by their encodings: where each one goes, and which words go to one place.

Rules of this file: words are a uint32 array, places are indexes into it, so nothing here knows an address. A row of
FORMS is one encoding; both directions are derived from it.
Source: Arm ARM C4.1, "Branches, Exception Generating and System instructions".
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

U32 = NDArray[np.uint32]
I64 = NDArray[np.int64]


class Form(NamedTuple):
    """A branch with a displacement: `word & mask == value`, and `bits` bits from bit `low` on, in words, signed."""

    name: str
    mask: int
    value: int
    low: int
    bits: int

    @property
    def field(self) -> int:
        """The mask of the displacement."""
        return (1 << self.bits) - 1 << self.low

    @property
    def reach(self) -> int:
        """How many words it reaches in either direction."""
        return 1 << self.bits - 1


B = Form("b, bl", 0x7C00_0000, 0x1400_0000, 0, 26)
FORMS = (
    B,
    Form("b.cond", 0xFF00_0000, 0x5400_0000, 5, 19),  # bit 4: BC.cond
    Form("cbz, cbnz", 0x7E00_0000, 0x3400_0000, 5, 19),
    Form("tbz, tbnz", 0x7E00_0000, 0x3600_0000, 5, 14),
)
LINK = 1 << 31  # of B: BL


class Flow(Enum):
    """What a word does to the flow of control."""

    ON = "goes on"
    CALL = "goes elsewhere and comes back"  # BL, BLR, SVC, HVC, SMC
    CONDITIONAL = "goes there, or on"
    JUMP = "goes there"
    AWAY = "goes where a register says"  # BR, RET, ERET
    TRAP = "stops"  # BRK, HLT, UDF


# Words without a displacement: mask, value, what they do; the first that matches counts.
_OTHERS = (
    (0xFEE0_0000, 0xD620_0000, Flow.CALL),  # BLR and its kin
    (0xFE00_0000, 0xD600_0000, Flow.AWAY),
    (0xFFE0_0000, 0xD400_0000, Flow.CALL),
    (0xFF00_0000, 0xD400_0000, Flow.TRAP),
    (0xFFFF_0000, 0, Flow.TRAP),
)


def flow(word: int) -> Flow:
    """What `word` does."""
    form = _form(word)
    if form is B:
        return Flow.CALL if word & LINK else Flow.JUMP
    if form:
        return Flow.CONDITIONAL
    return next((does for mask, value, does in _OTHERS if word & mask == value), Flow.ON)


def displacement(word: int) -> int | None:
    """How many words ahead the branch `word` goes; None for what is no branch, or goes where a register says."""
    form = _form(word)
    if form is None:
        return None
    field = (word & form.field) >> form.low
    return field - (field >> form.bits - 1 << form.bits)


def _form(word: int) -> Form | None:
    return next((form for form in FORMS if word & form.mask == form.value), None)


def sites(words: U32, form: Form, target: int) -> I64:
    """The indexes of the words of `form` that go to index `target`, which need not be in `words`; ascending."""
    first, last = max(0, target - form.reach + 1), min(len(words), target + form.reach + 1)
    if first >= last:
        return np.empty(0, np.int64)
    here = np.arange(first, last, dtype=np.int64).astype(np.uint32)
    wanted = (np.uint32(target & 0xFFFF_FFFF) - here << np.uint32(form.low)) & np.uint32(form.field)
    wanted |= np.uint32(form.value)
    return first + np.flatnonzero((words[first:last] & np.uint32(form.mask | form.field)) == wanted)
