"""The HTML page: the template with the scripts and one JSON object in it, and nothing from outside.

Rules of this file: the object is written so that no text in it can end the script element; a title is escaped.
"""

from __future__ import annotations

import html
import json
import re
from importlib import resources
from typing import Any

from emu.map.data import KINDS, MapData, Row
from emu.map.layouts import key, layouts
from pgtable import Walk
from pgtable.attributes import MemoryAttributes
from pgtable.describe import LINUX_MAIR
from pgtable.params import Regime, WalkParams
from pgtable.registers import MAIR
from pgtable.tree import all_halves
from pgtable.walk import Step

FINDINGS = 50  # that the page lists; stderr has as many
SCRIPTS = ("words.js", "explorer.js", "scale.js", "map.js")


def map_page(data: MapData) -> str:
    """The page of one or two sources."""
    return _filled(data.title, map_json(data))


def explorer_page(title: str = "AArch64 descriptors") -> str:
    """The page with the descriptor explorer only."""
    return _filled(title, {"title": title} | _explorer(None))


def _filled(title: str, data: dict[str, Any]) -> str:
    here = resources.files("emu.map")
    page = here.joinpath("template.html").read_text()
    script = "\n".join(here.joinpath(name).read_text() for name in SCRIPTS)
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")
    values = {"title": html.escape(title), "script": script, "data": text}
    return re.sub(r"\{\{(title|script|data)\}\}", lambda mark: values[mark[1]], page)


def _explorer(params: WalkParams | None) -> dict[str, Any]:
    """The formats, what MAIR's attributes mean, and the format that the explorer begins with."""
    mair = params.mair if params else tuple(row.get(LINUX_MAIR) for row in sorted(MAIR, key=lambda row: row.mask))
    return {
        **layouts(),
        "mair": [str(MemoryAttributes.of(byte)) for byte in mair],
        "mair_of": f"MAIR_EL{params.regime.el}" if params else "MAIR_EL1 as Linux sets it",
        "format": key(params.fmt) if params else "4K",
        "secure": bool(params and params.secure),
        "el2": bool(params and params.regime is Regime.EL20),
    }


class _Texts(dict[str, int]):
    """Texts, each with its number."""

    def __missing__(self, text: str) -> int:
        self[text] = len(self)
        return self[text]


class _Walks:
    """Descriptors that walks read, each kept once: a walk is a format and the numbers of its steps."""

    def __init__(self) -> None:
        self.steps: dict[Step, int] = {}

    def json(self, walk: Walk | None) -> Any:
        if walk is None:
            return None
        return [key(walk.params.fmt), [self.steps.setdefault(step, len(self.steps)) for step in walk.steps]]


def map_json(data: MapData) -> dict[str, Any]:
    """Everything that the page shows. A row is the list that `_row` makes."""
    texts, walks = _Texts(), _Walks()
    rows = [_row(row, texts, walks) for row in data.rows]
    listing = data.now.listing
    params = all_halves(listing.regs, listing.regime)[-1]
    return {
        "title": data.title,
        "about": about(data),
        "old": data.old.source.word if data.old else None,
        "kinds": [kind._asdict() for kind in KINDS],
        "halves": [[f"{half.start:x}", f"{half.end:x}", half.name, half.off] for half in data.halves],
        "areas": [[f"{area.start:x}", f"{area.end:x}", area.name] for area in data.areas],
        "findings": [str(finding) for finding in listing.findings if finding.kind != "off"][:FINDINGS],
        "texts": list(texts),
        "steps": [[s.level, f"{s.pa - 8 * s.entry:x}", s.entry, f"{s.word:x}"] for s in walks.steps],
        "rows": rows,
        **_explorer(params),
    }


def about(data: MapData) -> list[str]:
    """What the map is of: the sources, where registers come from, the regime's halves."""
    lines = []
    for mapped in (data.now, *([data.old] if data.old else [])):
        source = mapped.source
        release = f", {source.image.release}" if source.image else ""
        lines.append(f"{source.word}: {source.kind}{release}; registers: {source.origin}")
    if data.old:
        lines = [f"now {lines[0]}", f"before {lines[1]}"]
    listing = data.now.listing
    for p in all_halves(listing.regs, listing.regime):
        half = "upper" if p.upper else "lower"
        lines.append(
            f"{listing.regime.value} {half} half: {p.ia_bits}-bit VA, {p.fmt.granule.label} granule, root {p.base:#x}"
        )
    return lines


def _row(row: Row, texts: _Texts, walks: _Walks) -> list[Any]:
    return [
        f"{row.va:x}",
        f"{row.size:x}",
        f"{row.pa:x}",
        row.level,
        row.leaves,
        row.kind,
        texts[row.rights],
        texts[row.memory],
        texts[row.pattern],
        texts[row.name],
        texts[row.fault],
        texts[row.status],
        [[name, f"{old:x}", f"{new:x}"] for name, old, new in row.fields],
        [walks.json(walk) for walk in row.walks],
    ]
