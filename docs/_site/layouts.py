"""The reference of descriptors and registers, made from the layouts of pgtable: no bit is written here.

Rules of this file:
- A field is shown once, with the condition under which a descriptor has it; the condition is derived from the formats
  that have it and those that do not (CONDITIONS says in which words).
- What depends on granule, level and address size only (address bits, nT, reserved bits) has a table of its own.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from docs._site.text import plain, table
from emu.map.layouts import formats
from pgtable import controls, describe_registers, registers, registers128, syndromes, tlbi
from pgtable.bits import Field, Layout
from pgtable.d128 import Format128
from pgtable.descriptors import LAST_LEVEL, Format, Granule
from pgtable.figure import cells, field_name
from pgtable.syndromes import EC, esr_layout

ROW = 32  # bits in a row of a figure


class Place(NamedTuple):
    """A descriptor that there can be: a format, and a level."""

    fmt: Format
    level: int


CONDITIONS: tuple[tuple[str, str, Callable[[Place], bool]], ...] = (
    ("pages", "blocks", lambda p: p.level == LAST_LEVEL),
    ("regimes with EL0", "EL2 (without E2H), EL3", lambda p: p.fmt.el0),
    ("PIE", "without PIE", lambda p: p.fmt.pie),
    ("POE", "without POE", lambda p: p.fmt.poe),
    ("AIE", "without AIE", lambda p: p.fmt.aie),
    ("FWB", "without FWB", lambda p: p.fmt.fwb),
    ("DS = 1 (4K, 16K)", "not with DS = 1 (4K, 16K)", lambda p: p.fmt.lpa2),
)


# ---- figures and fields of one layout


def figure(layout: Layout) -> str:
    """The bits of a word as boxes, highest first, in rows of 32."""
    boxes = []
    for cell in cells(layout):
        hi = cell.hi
        while hi >= cell.lo:  # a field over the end of a row is two boxes
            lo = max(cell.lo, hi // ROW * ROW)
            boxes.append((hi, lo, cell.name if hi == cell.hi or hi - lo > 3 else ""))
            hi = lo - 1
    return f'<div class="bits">{"".join(_box(*box) for box in boxes)}</div>\n'


def _box(hi: int, lo: int, name: str) -> str:
    width = hi - lo + 1
    where = f"{hi}" if hi == lo else f"{hi}:{lo}"
    kind = "reserved" if name in ("RES0", "RES1", "ignored") else "field"
    upright = " upright" if len(name) > 2.2 * width else ""
    return (
        f'<div class="{kind}{upright}" style="grid-column: span {width}" title="{html.escape(name)} [{where}]">'
        f"<small>{where}</small><span>{html.escape(name)}</span></div>"
    )


def meaning(field: Field) -> str:
    """What a field means, with its values."""
    said = plain(field.doc or field.reserved)
    values = "".join(f"<br><code>{value:#x}</code> {plain(text)}" for value, text in sorted(field.values.items()))
    return said + values


def fields(layout: Layout) -> str:
    """The table of a layout's fields, highest bits first."""
    rows = ((field.bits, f"**{plain(field_name(field))}**", meaning(field)) for field in layout)
    return table(("Bits", "Field", "Meaning"), rows)


# ---- descriptors


def _is_geometry(field: Field) -> bool:
    return field.name in ("OA", "TA", "nT") or field.name.startswith("RES0_")


def condition(here: Iterable[Place], everywhere: Iterable[Place]) -> str:
    """In words, what the places in `here` have in common and not all in `everywhere` have; "" for all."""
    some, every = list(here), list(everywhere)
    parts = []
    for yes, no, test in CONDITIONS:
        found = {test(place) for place in some}
        if len(found) == 1 and len({test(place) for place in every}) == 2:
            parts.append(yes if found == {True} else no)
    return ", ".join(parts)


def attributes(places: list[Place], layout: Callable[[Place], Layout]) -> str:
    """The fields that are no geometry, of all `places`, each with its condition."""
    found: dict[tuple[str, str, str, str], list[Place]] = {}
    for place in places:
        for field in layout(place):
            if not _is_geometry(field):
                found.setdefault((field.bits, field_name(field), meaning(field), field.reserved), []).append(place)
    rows = sorted(found.items(), key=lambda row: -_top(row[0][0]))
    return table(
        ("Bits", "Field", "Where", "Meaning"),
        ((bits, f"**{plain(name)}**", plain(condition(here, places)), said) for (bits, name, said, _), here in rows),
    )


def _top(bits: str) -> int:
    return max(int(part.partition(":")[0]) for part in bits.split(","))


def _bits_of(layout: Layout, prefix: str) -> str:
    return ",".join(f.bits for f in layout if f.name == prefix or f.name.startswith(f"{prefix}_")) or "-"


def _sizes(fmt: Format) -> str:
    return f"{fmt.granule.label}{', 52-bit addresses' if fmt.wide else ''}"


def leaf_geometry(some: Iterable[Format]) -> str:
    """Where the address of a block or page is, by granule and level."""
    rows = []
    for fmt in some:
        for level in sorted({*fmt.block_levels, LAST_LEVEL}):
            layout = fmt.leaf(level)
            size = _size(1 << fmt.granule.level_shift(level))
            row = (f"{level}", "page" if level == LAST_LEVEL else "block", size, _bits_of(layout, "OA"))
            rows.append((_sizes(fmt), *row, _bits_of(layout, "nT"), _bits_of(layout, "RES0")))
    return table(("Granule", "Level", "Kind", "Size", "OA", "nT", "RES0"), rows)


def table_geometry(some: Iterable[Format]) -> str:
    """Where the address of the next table is, by granule."""
    rows = [(_sizes(fmt), _bits_of(fmt.table(0), "TA"), _bits_of(fmt.table(0), "RES0")) for fmt in some]
    return table(("Granule", "TA", "RES0"), rows)


def _size(n: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if n < 1024:
            return f"{n} {unit}"
        n >>= 10
    return f"{n} PiB"


def _plain_formats(*, stage2: bool) -> list[Format]:
    """One format for each granule and address size."""
    return [
        Format(granule, stage2=stage2, **({"lpa": wide} if granule is Granule.K64 else {"ds": wide}))
        for granule, wide in product(Granule, (False, True))
    ]


def _everything(*, stage2: bool) -> list[Format]:
    """Every format of a stage; of stage 2 with PIE and POE too."""
    if not stage2:
        return [fmt for fmt in formats() if not fmt.stage2]
    return [
        replace(fmt, pie=pie, poe=poe, fwb=fwb)
        for fmt in _plain_formats(stage2=True)
        for pie, poe, fwb in product((False, True), repeat=3)
    ]


def stage(*, stage2: bool) -> str:
    """The descriptors of stage 1 or 2: leaves, then tables."""
    every, base = _everything(stage2=stage2), _plain_formats(stage2=stage2)
    leaves = [Place(fmt, level) for fmt in every for level in sorted({*fmt.block_levels, LAST_LEVEL})]
    first = base[0]
    parts = [f"A page, {first.granule.label} granule, 48-bit addresses:\n", figure(first.leaf(LAST_LEVEL))]
    parts += [attributes(leaves, lambda p: p.fmt.leaf(p.level)), "Addresses and reserved bits:\n", leaf_geometry(base)]
    parts += ["### Tables\n", figure(first.table(0))]
    parts += [attributes([Place(fmt, 0) for fmt in every], lambda p: p.fmt.table(0)), table_geometry(base)]
    return "\n".join(parts)


def wide_descriptors() -> str:
    """The 128-bit descriptors of both stages."""
    parts = []
    for stage2 in (False, True):
        every = [
            Format128(granule, el0=el0, poe=poe, stage2=stage2, pie=True)
            for granule, el0, poe in product(Granule, (True,) if stage2 else (True, False), (False, True))
        ]
        leaves = [Place(fmt, level) for fmt in every for level in (2, LAST_LEVEL)]
        parts += [f"### Stage {1 + stage2}\n", figure(every[0].leaf(LAST_LEVEL))]
        parts.append(attributes(leaves, lambda p: p.fmt.leaf(p.level)))
        parts += ["A table:\n", attributes([Place(fmt, 0) for fmt in every], lambda p: p.fmt.table(0))]
        parts.append(_wide_addresses(every))
    return "\n".join(parts)


def _wide_addresses(every: list[Format128]) -> str:
    seen = {fmt.granule: fmt for fmt in every}
    rows = [
        (granule.label, f"{level}", _bits_of(fmt.leaf(level), "OA"), _bits_of(fmt.table(level), "TA"))
        for granule, fmt in seen.items()
        for level in range(LAST_LEVEL + 1)
    ]
    return table(("Granule", "Level", "OA", "TA"), rows)


# ---- registers


def _layouts_of(module: object) -> Iterator[Layout]:
    yield from (value for value in vars(module).values() if isinstance(value, Layout))


def _named() -> Mapping[Layout, list[str]]:
    """Every register's layout, with the names that have it."""
    found: dict[Layout, list[str]] = {}
    for name, layout in (registers.LAYOUTS | describe_registers.PSTATE).items():
        found.setdefault(layout, []).append(name)
    for module in (registers, controls, syndromes, describe_registers, registers128):
        for layout in _layouts_of(module):
            found.setdefault(layout, [layout.name])
    return found


def all_registers() -> str:
    """Every register that a translation reads or that tells of a fault."""
    parts = []
    for layout, names in sorted(_named().items(), key=lambda item: item[1][0]):
        head = names[0] if len(names) == 1 else layout.name
        more = f"{', '.join(map(plain, sorted(set(names) - {head})))}\n" if len(names) > 1 else ""
        parts += [f"## {plain(head)}\n", more, figure(layout), fields(layout)]
    return "\n".join(parts)


def all_syndromes() -> str:
    """ESR_ELx by exception class; classes with the same fields are together."""
    found: dict[tuple[Field, ...], tuple[Layout, list[int]]] = {}
    for number in sorted(EC):
        layout = esr_layout(number)
        found.setdefault(layout.fields, (layout, []))[1].append(number)
    parts = ["## Exception classes\n", table(("EC", ""), ((f"`{n:#04x}`", plain(EC[n])) for n in sorted(EC)))]
    for layout, classes in found.values():
        names = "; ".join(f"{number:#04x} {plain(EC[number])}" for number in classes)
        head = plain(EC[classes[0]]) if len(classes) == 1 else f"{plain(EC[classes[0]])}, and {len(classes) - 1} more"
        parts += [f"## ESR_ELx: {head}\n", f"EC: {names}\n", figure(layout), fields(_without_classes(layout))]
    return "\n".join(parts)


def _without_classes(layout: Layout) -> Layout:
    """The layout with a field EC that does not list every class again."""
    rows = (replace(f, values={}) if f.name == "EC" else f for f in layout)
    return Layout(layout.name, tuple(rows), layout.width)


def tlbi_operands() -> str:
    """The operands of TLBI, and which operation takes which."""
    parts = [f"### {plain(layout.name)}\n\n{figure(layout)}\n{fields(layout)}" for layout in _layouts_of(tlbi)]
    return "\n".join(parts)
