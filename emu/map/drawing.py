"""The static drawing: the whole address space as one SVG, 1400 pixels wide, in the colours of the page on white.

Rules of this file: plain attributes and no style sheet, so that every viewer draws it; a text is cut to its column,
and every piece is at least a line high, so that nothing overlaps.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from emu.map.areas import Area
from emu.map.data import KINDS, MapData, Row
from emu.map.page import about
from emu.map.scale import GAP, ITEM, Placed, least, pieces, place

WIDTH = 1400
LEAST_ROOM, MOST_ROOM = 500.0, 1300.0  # pixels of the drawing without title and legend
MARGIN, HALF, AREA, ADDRESS, BOX = 20, 24, 150, 150, 300  # widths of the columns
X_AREA = MARGIN + HALF
X_ADDRESS = X_AREA + AREA
X_BOX = X_ADDRESS + ADDRESS
X_TEXT = X_BOX + BOX + 14
CHARACTER = 7.25  # pixels of a letter of the 12-pixel fixed font
TEXT, QUIET, SOFT = "#1b1e23", "#5d6470", "#eceff3"
STATUS = {"added": "#2a9558", "removed": "#cf3d3d", "changed": "#d08a12", "same": "#b9bfc8"}
PATTERNS = (
    '<defs><pattern id="device" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="2.4" height="6" fill="#fff" fill-opacity="0.6"/></pattern>'
    '<pattern id="uncached" width="5" height="5" patternUnits="userSpaceOnUse">'
    '<rect width="2" height="2" fill="#fff" fill-opacity="0.6"/></pattern></defs>'
)


def drawing(data: MapData) -> str:
    """The SVG of one or two sources."""
    ranges = [(row.va, row.va + row.size) for row in data.rows]
    areas = data.areas
    room = min(max(least(pieces(0, 1 << 64, ranges, areas, MOST_ROOM)) * 1.25, LEAST_ROOM), MOST_ROOM)
    placed = place(pieces(0, 1 << 64, ranges, areas, room), room)
    lines = about(data)
    top = 52 + 18 * len(lines)
    bottom = top + (placed[-1].top + placed[-1].height if placed else 0)
    legend, height = _legend(data, bottom + 26)
    body = [*_head(data.title, lines), *_bands(data, areas, placed, top), *_pieces(data, placed, top), *legend]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" '
        f'viewBox="0 0 {WIDTH} {height:.0f}">\n<title>{escape(data.title)}</title>\n{PATTERNS}\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, width: float, *, colour: str = TEXT, size: int = 12, more: str = "") -> str:
    """A line of text, cut to `width` pixels."""
    most = int(width / (CHARACTER * size / 12))
    shown = text if len(text) <= most else text[: most - 1] + "…"
    family = "ui-monospace, DejaVu Sans Mono, monospace"
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-family="{family}" font-size="{size}" fill="{colour}"'
        f' xml:space="preserve" {more}>{escape(shown)}</text>'
    )


def _box(x: float, y: float, width: float, height: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}"/>'


def _head(title: str, lines: list[str]) -> Iterator[str]:
    yield _text(MARGIN, 30, title, WIDTH - 2 * MARGIN, size=18)
    for i, line in enumerate(lines):
        yield _text(MARGIN, 52 + 18 * i, line, WIDTH - 2 * MARGIN, colour=QUIET)


def _y_of(va: int, placed: list[Placed]) -> float:
    """Pixels from the top of the drawing to `va`."""
    for piece, top, height, _ in placed:
        if va < piece.end:
            return top + height * max(va - piece.start, 0) / (piece.end - piece.start)
    return placed[-1].top + placed[-1].height


def _bands(data: MapData, areas: list[Area], placed: list[Placed], top: float) -> Iterator[str]:
    """The halves and the areas."""
    for half in data.halves:
        y, end = top + _y_of(half.start, placed), top + _y_of(half.end, placed)
        name = f"{half.name}: {half.off}" if half.off else half.name
        name = name if len(name) * 6.7 <= end - y else half.name.split()[0]
        yield _box(MARGIN, y + 0.5, HALF - 3, end - y - 1, SOFT)
        middle = (y + end) / 2
        turned = f'text-anchor="middle" transform="rotate(-90 {MARGIN + 14} {middle:.1f})"'
        yield _text(MARGIN + 14, middle, name, end - y, size=11, more=turned) if end - y > 36 else ""
    for area in areas:
        y, end = top + _y_of(area.start, placed), top + _y_of(area.end, placed)
        if area.name and end - y >= 1:
            yield _box(X_AREA, y + 0.5, AREA - 8, max(end - y - 1, 1), SOFT)
            yield _text(X_AREA + 8, y + 14, area.name, AREA - 20) if end - y >= 15 else ""


def _pieces(data: MapData, placed: list[Placed], top: float) -> Iterator[str]:
    for piece, offset, height, cut in placed:
        y = top + offset
        size = size_text(piece.end - piece.start)
        if piece.ranges:
            inside = data.rows[piece.first : piece.first + piece.ranges]
            yield _text(X_ADDRESS, y + 13.5, f"{piece.start:#018x}", ADDRESS)
            yield from _boxes(inside, y, height, bool(data.old))
            yield _text(X_TEXT, y + 13.5, _line(inside, piece.end - piece.start), WIDTH - MARGIN - X_TEXT)
            continue
        if cut or piece.empty:
            zigzag = "l8 -5 l16 10 l8 -5 " * (BOX // 32)
            yield f'<path d="M{X_BOX} {y + height / 2:.1f} {zigzag}" fill="none" stroke="{QUIET}" stroke-width="1"/>'
        if piece.empty:
            yield _text(X_ADDRESS, y + 13.5, f"{piece.start:#018x}", ADDRESS, colour=QUIET)
        if height >= 13:
            said = f"{size}, nothing mapped" if piece.empty else f"{size} not mapped"
            yield _text(X_TEXT, y + height / 2 + 4, said, WIDTH - MARGIN - X_TEXT, colour=QUIET)


def _colour(row: Row, compared: bool) -> str:
    return STATUS[row.status] if compared else KINDS[row.kind].light


def _boxes(inside: list[Row], y: float, height: float, compared: bool) -> Iterator[str]:
    """One box, or of a cluster a share of the width for each class of ranges."""
    shares: dict[tuple[str, str], int] = {}
    for row in inside:
        look = _colour(row, compared), row.pattern
        shares[look] = shares.get(look, 0) + row.size
    room, x = BOX - 4.0 * len(shares), float(X_BOX)
    for (fill, pattern), size in shares.items():
        width = 4 + room * size / sum(shares.values())
        yield _box(x, y + 1, width, height - 2, fill)
        yield _box(x, y + 1, width, height - 2, f"url(#{pattern})") if pattern else ""
        x += width


def _line(inside: list[Row], extent: int) -> str:
    """What is said of a range or a cluster."""
    if len(inside) > 1:
        rights = ", ".join(dict.fromkeys(row.rights for row in inside))
        return f"{len(inside)} ranges, {size_text(sum(row.size for row in inside))} of {size_text(extent)}: {rights}"
    row = inside[0]
    status = [row.status, *(name for name, _, _ in row.fields)] if row.status != "same" else []
    said = [f"{size_text(row.size):<9}", row.rights, f"PA {row.pa:#x}", *status, row.name, row.memory]
    return "  ".join(part for part in said if part)


def _legend(data: MapData, y: float) -> tuple[list[str], float]:
    """The legend from `y` on, and where it ends."""
    if data.old:
        entries = [
            (status, colour, "", [r for r in data.rows if r.status == status]) for status, colour in STATUS.items()
        ]
    else:
        entries = [(k.name, k.light, "", [r for r in data.rows if r.kind == i]) for i, k in enumerate(KINDS)]
    for pattern, name in (("device", "Device memory"), ("uncached", "Normal non-cacheable")):
        entries.append((name, "#8a919c", f"url(#{pattern})", [r for r in data.rows if r.pattern == pattern]))
    x, lines = float(MARGIN), []
    for name, colour, pattern, rows in entries:
        if not rows:
            continue
        said = f"{name}, {size_text(sum(row.size for row in rows))}"
        width = 40 + CHARACTER * len(said)
        if x + width > WIDTH - MARGIN:
            x, y = float(MARGIN), y + 22
        lines += [_box(x, y - 11, 18, 13, colour), *([_box(x, y - 11, 18, 13, pattern)] if pattern else [])]
        lines.append(_text(x + 24, y, said, width))
        x += width
    note = f"drawn to scale, but no range is less than {ITEM:.0f} pixels high and no gap more than {GAP:.0f}: zigzags"
    return [*lines, _text(MARGIN, y + 24, note, WIDTH - 2 * MARGIN, colour=QUIET)], y + 44


def size_text(size: int) -> str:
    """`4 KiB`, `32.4 MiB`."""
    unit = 0
    value = float(size)
    while value >= 1024 and unit < 6:
        value, unit = value / 1024, unit + 1
    number = f"{value:.0f}" if value >= 100 else f"{value:.1f}".removesuffix(".0")
    return f"{number} {('bytes', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[unit]}"
