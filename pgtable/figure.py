"""Words as figures: the map of a word's bits, and explanations as text.

Rules of this file:
- The bit map is drawn from the layout: each bit's digit once, each field between bars, each name at its highest bit.
- Text is plain; `paint(style, text)` may colour a piece of it and must not change its width.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from pgtable.bits import Field, Layout, hex_word

if TYPE_CHECKING:
    from pgtable.describe import Explanation

Paint = Callable[[str, str], str]  # style: "head", "one", "changed", "fault", "wrong", "suspicious", "note"
INDENT = 2
MARGIN = 9  # columns right of the last bit, for its name
LABEL = 10  # columns of the labels of facts


def plain(style: str, text: str) -> str:
    """No colour."""
    return text


class Box(NamedTuple):
    """The characters that a figure is drawn with."""

    line: str
    bar: str
    leader: str
    top: str  # left corner, joint, right corner
    bottom: str
    hook: str


LINES = Box("─", "│", "│", "┌┬┐", "└┴┘", "┬")
ASCII = Box("-", "|", "|", "+++", "+++", "|")


class Cell(NamedTuple):
    """Bits [hi:lo] of the word, a field's or a part of it."""

    hi: int
    lo: int
    name: str


def field_name(field: Field) -> str:
    """A field's name as people say it: reserved rows by what they are."""
    return {"": field.name, "IGNORED": "ignored"}.get(field.reserved, field.reserved)


def cells(layout: Layout) -> list[Cell]:
    """The spans of all fields, highest bits first; a part of a field says which bits of its value it holds."""
    found = []
    for field in layout:
        for span in field.spans:
            whole = len(field.spans) == 1 and not span.at
            part = "" if whole else _range(span.at + span.width - 1, span.at)
            found.append(Cell(span.lo + span.width - 1, span.lo, field_name(field) + part))
    return sorted(found, reverse=True)


def _range(hi: int, lo: int) -> str:
    return f"[{hi}]" if hi == lo else f"[{hi}:{lo}]"


def bit_map(layout: Layout, word: int, width: int = 80, box: Box = LINES, paint: Paint = plain) -> list[str]:
    """The figure of a word: rows of 64, 32, 16 or 8 bits, as many as `width` columns hold."""
    per_row = next((n for n in (64, 32, 16) if 2 * n + INDENT + MARGIN <= width), 8)
    lines: list[str] = []
    for hi in range(layout.width - 1, -1, -per_row):
        row = [_cut(cell, hi, hi - per_row + 1) for cell in cells(layout) if cell.lo <= hi and cell.hi > hi - per_row]
        lines += _row(row, hi, word, box, paint)
    return [" " * INDENT + line for line in lines]


def _cut(cell: Cell, hi: int, lo: int) -> Cell:
    """The part of a cell that is in the row [hi:lo], named by the bits of the value that it holds."""
    if lo <= cell.lo and cell.hi <= hi:
        return cell
    name, _, first = cell.name.rstrip("]").partition("[")
    at = int(first.partition(":")[2] or first) if first else 0
    top, bottom = min(hi, cell.hi), max(lo, cell.lo)
    numbered = name not in ("RES0", "RES1", "ignored")
    return Cell(top, bottom, name + (_range(top - cell.lo + at, bottom - cell.lo + at) if numbered else ""))


def _row(row: list[Cell], hi: int, word: int, box: Box, paint: Paint) -> list[str]:
    end = 2 * (hi - row[-1].lo) + 2
    bars = {2 * (hi - cell.hi) for cell in row}
    hooks = {column + 1 for column in bars}
    ruler = "".join(f"{bit:<8}" for bit in range(hi, row[-1].lo - 1, -4))
    top, bottom, digits = [""] * (end + 1), [""] * (end + 1), [""] * (end + 1)
    for x in range(end + 1):
        side = 0 if x == 0 else 2 if x == end else 1
        edge = x in bars or x == end
        digit = f"{word >> hi - x // 2 & 1}" if x % 2 else ""
        top[x] = box.top[side] if edge else box.line
        bottom[x] = box.bottom[side] if edge else box.hook if x in hooks else box.line
        digits[x] = box.bar if edge else paint("one", digit) if digit == "1" else digit or " "
    lines = [" " + ruler.rstrip(), "".join(top), "".join(digits), "".join(bottom)]
    return lines + _labels([(2 * (hi - cell.hi) + 1, cell.name) for cell in row], box)


def _labels(pending: list[tuple[int, str]], box: Box) -> list[str]:
    """The names under their columns, from the right; what does not fit beside the last one waits a line."""
    lines = []
    while pending:
        line, limit, count = "", 1 << 16, len(pending)
        while count and pending[count - 1][0] + len(pending[count - 1][1]) <= limit:
            column, name = pending[count - 1]
            line = name + " " * (limit - column - len(name) if line else 0) + line
            limit, count = column - 1, count - 1
            line = " " + line
        left = [" "] * (limit + 1)
        for column, _ in pending[:count]:
            left[column] = box.leader
        lines.append("".join(left)[:limit] + line)
        pending = pending[:count]
    return lines


def text(found: Explanation, width: int = 80, box: Box = LINES, paint: Paint = plain) -> str:
    """An explanation: title, bit map, facts, fields, findings, assumptions."""
    head = f"{found.name + ' = ' if found.name else ''}{hex_word(found.word, found.layout.width)}"
    first, *rest = _hanging(head + "  ", found.title, len(head) + 2, width)
    lines = [paint("head", head) + first[len(head) :], *rest, ""]
    lines += [*bit_map(found.layout, found.word, width, box, paint), ""]
    lines += [line for label, fact in found.facts.items() for line in _hanging(label, fact, LABEL, width)]
    lines += [""] if found.facts else []
    lines += _fields(found, width, paint)
    if found.findings:
        lines += ["", *(line for f in found.findings for line in _finding(f.kind, f.text, width, paint))]
    if found.assumptions:
        lines += ["", *_hanging("assumed", "; ".join(found.assumptions), LABEL, width)]
    return "\n".join(lines)


def _hanging(label: str, said: str, column: int, width: int) -> list[str]:
    """`label` and a text that is wrapped beside it."""
    wrapped = textwrap.wrap(said, max(width - column, 20), break_long_words=False, break_on_hyphens=False) or [""]
    return [f"{label:<{column}}{wrapped[0]}".rstrip(), *(" " * column + line for line in wrapped[1:])]


def _finding(kind: str, said: str, width: int, paint: Paint) -> list[str]:
    first, *rest = _hanging(kind, said, 12, width)
    return [paint(kind, first[:12]) + first[12:], *rest]


def value_text(field: Field, value: int) -> str:
    """A value in hexadecimal; of one bit or an empty field, a digit."""
    return f"{value:#x}" if value > 1 or field.value_mask > 1 else f"{value}"


def _fields(found: Explanation, width: int, paint: Paint) -> list[str]:
    """A line for each field; of an empty reserved one, nothing is said that the map does not say."""
    rows = [row for row in found.fields if row.value or not row.field.reserved or row.field.reserved == "RES1"]
    shown = [(row.field.bits, field_name(row.field), value_text(row.field, row.value)) for row in rows]
    columns = [max((len(cell[i]) for cell in shown), default=0) + 2 for i in range(3)]
    lines = []
    for row, cell in zip(rows, shown, strict=True):
        label = "".join(f"{part:<{size}}" for part, size in zip(cell, columns, strict=True))
        said = row.meaning + (f"  [{', '.join(row.linux)}]" if row.linux else "")
        lines += _hanging(label, said, sum(columns), width)
    return lines


def side_by_side(found: Sequence[Explanation], width: int = 80, paint: Paint = plain) -> str:
    """Several words, field by field; a row where they differ is marked, and what differs is said below."""
    keys = list(dict.fromkeys((row.field.bits, field_name(row.field)) for one in found for row in one.fields))
    keys.sort(key=lambda key: -int(key[0].partition(",")[0].partition(":")[2] or key[0].partition(",")[0]))
    by_key = [{(row.field.bits, field_name(row.field)): row for row in one.fields} for one in found]
    widths = [max(len(key[i]) for key in keys) + 2 for i in range(2)]
    head = " " * (2 + sum(widths)) + "  ".join(f"{hex_word(one.word, one.layout.width)}" for one in found)
    lines = [f"{chr(97 + i)}: {hex_word(one.word, one.layout.width)}  {one.title}" for i, one in enumerate(found)] + [
        "",
        head,
    ]
    below = []
    for key in keys:
        rows = [rows.get(key) for rows in by_key]
        values = [value_text(row.field, row.value) if row else "-" for row in rows]
        differ = len(set(values)) > 1
        if not differ and not any(row and (row.value or not row.field.reserved) for row in rows):
            continue
        label = f"{'* ' if differ else '  '}{key[0]:<{widths[0]}}{key[1]:<{widths[1]}}"
        line = (label + "  ".join(f"{value:<18}" for value in values)).rstrip()
        lines.append(paint("changed", line) if differ else line)
        if differ:
            said = [f"{chr(97 + i)}: {row.meaning if row else 'no such field'}" for i, row in enumerate(rows)]
            below += _hanging(key[1], "; ".join(said), max(LABEL, widths[1]), width)
    labels = dict.fromkeys(label for one in found for label in one.facts if label != "level")
    for label in labels:
        facts = [one.facts.get(label, "-") for one in found]
        if len(set(facts)) > 1:
            below += _hanging(label, "; ".join(f"{chr(97 + i)}: {f}" for i, f in enumerate(facts)), LABEL, width)
    return "\n".join([*lines, "", *(below or ["no field differs"])])
