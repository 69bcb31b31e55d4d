"""Every descriptor format as JSON: fields, meanings, block levels and rights, for the page to decode words with.

Rules of this file: it copies the rows of pgtable/descriptors.py and what `explain` says of them, and knows no bit
itself. Equal fields and layouts are written once and referred to by number.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import product
from typing import Any

from pgtable import explain
from pgtable.bits import Field, Layout
from pgtable.describe import meaning
from pgtable.descriptors import LAST_LEVEL, Format, Granule
from pgtable.findings import LOWEST_LEVEL


def lowest_level(fmt: Format) -> int:
    """The level of the largest root table."""
    return LOWEST_LEVEL[fmt.granule] - (fmt.granule is Granule.K4 and fmt.ds)


def formats() -> Iterator[Format]:
    """Every format that a tree can have: stage 1 with and without EL0, PIE, POE and AIE; stage 2 with FWB or not."""
    for granule, wide in product(Granule, (False, True)):
        size = {"lpa": wide} if granule is Granule.K64 else {"ds": wide}
        for el0, pie, poe, aie in product((True, False), (False, True), (False, True), (False, True)):
            yield Format(granule, el0=el0, pie=pie, poe=poe, aie=aie, **size)
        for fwb in (False, True):
            yield Format(granule, stage2=True, fwb=fwb, **size)


def key(fmt: Format) -> str:
    """A format's name in the page: `4K`, `16K-wide-pie`, `4K-stage2-fwb`; `wide`: 52-bit addresses."""
    flags = {
        "wide": fmt.wide,
        "stage2": fmt.stage2,
        "fwb": fmt.stage2 and fmt.fwb,
        "alone": not fmt.stage2 and not fmt.el0,
        "pie": fmt.pie,
        "poe": fmt.poe,
        "aie": fmt.aie,
    }
    return "-".join([fmt.granule.label, *(name for name, there in flags.items() if there)])


class _Numbered:
    """JSON values, each kept once."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self._numbers: dict[str, int] = {}

    def number(self, row: Any) -> int:
        at = self._numbers.setdefault(repr(row), len(self.rows))
        if at == len(self.rows):
            self.rows.append(row)
        return at


@cache
def layouts() -> dict[str, Any]:
    """`fields`, `layouts` (numbers of fields), `rights` (texts by the values of some fields), `formats` by `key`."""
    fields, made, rights = _Numbered(), _Numbered(), _Numbered()

    def number(layout: Layout) -> int:
        return made.number([fields.number(_field(row)) for row in layout])

    found = {
        key(fmt): {
            "table": number(fmt.table(LAST_LEVEL - 1)),
            "leaf": {str(level): number(fmt.leaf(level)) for level in range(lowest_level(fmt), LAST_LEVEL + 1)},
            "blocks": sorted(fmt.block_levels),
            "lowest": lowest_level(fmt),
            "page_shift": fmt.granule.page_shift,
            "rights": None if fmt.pie else rights.number(_rights(fmt)),
        }
        for fmt in formats()
    }
    return {"fields": fields.rows, "layouts": made.rows, "rights": rights.rows, "formats": found}


def _field(row: Field) -> dict[str, Any]:
    """A row; the two meanings of a single bit are spelt out."""
    values = {value: meaning(row, value) for value in (0, 1)} if row.value_mask == 1 else row.values
    return {
        "name": row.name,
        "bits": row.bits,
        "spans": [list(span) for span in row.spans],
        "doc": row.doc,
        "reserved": row.reserved,
        "values": {f"{value:x}": text for value, text in values.items()},
    }


def _rights(fmt: Format) -> dict[str, Any]:
    """What a page's permission fields grant, with no limits above: `fields`, and `text` by their values in hex."""
    leaf = fmt.leaf(LAST_LEVEL)
    names = [name for name in ("S2AP", "AP", "UXN", "PXN", "XN") if name in leaf and not leaf[name].reserved]
    text = {}
    for values in product(*(range(leaf[name].value_mask + 1) for name in names)):
        word = leaf.pack(VALID=1, TYPE=1, AF=1, **dict(zip(names, values, strict=True)))
        regime = "EL10" if fmt.el0 else "EL2"
        place = explain(word, LAST_LEVEL, granule=fmt.granule, stage=2 if fmt.stage2 else 1, regime=regime).place
        assert place
        label = {"EL2": "EL2 or EL3"} if regime == "EL2" else {}
        text[",".join(f"{value:x}" for value in values)] = " ".join(
            f"{label.get(level, level)} {granted}" for level, granted in place.rights.items()
        )
    return {"fields": names, "text": text}
