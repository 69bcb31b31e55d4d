"""The data of `pgtable map` against the walk, and what the page and the drawing are made of; no browser."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from functools import reduce
from itertools import pairwise
from operator import or_
from typing import Any
from xml.etree import ElementTree

import pytest

from emu.map import scale
from emu.map.areas import Area
from emu.map.data import KINDS, MapData, Mapped, kind_of
from emu.map.drawing import CHARACTER, WIDTH, drawing
from emu.map.layouts import formats, key, layouts
from emu.map.page import explorer_page, map_json, map_page
from emu.sources import Source, open_source
from pgtable import Access, AccessType, Walk, translate
from pgtable.params import Regime
from pgtable.permissions import PR, PW, PX, UR, UW, UX
from tests.pgtable.test_leaves import SHAPES, Random, every_entry, is_leaf, random_tree
from tests.snapshots import FAST, WARM, booted

END = 1 << 64


def source(made: Random, word: str = "made") -> Source:
    return Source(word, "random tree", made.memory, made.regs, "a test")


def mapped(made: Random, word: str = "made") -> Mapped:
    return Mapped.of(source(made, word), Regime(made.regime))


@pytest.fixture(params=SHAPES, ids=lambda s: f"{s[0]} {s[1]} {s[2]}")
def made(request: pytest.FixtureRequest, rng: random.Random) -> Random:
    return random_tree(rng, *request.param)


def of_json(found: dict[str, Any], number: int) -> tuple[int, int, int, int, int]:
    """VA, size, PA, level and descriptors of a row."""
    va, size, pa = (int(text, 16) for text in found["rows"][number][:3])
    return va, size, pa, *found["rows"][number][3:5]


def steps_of_json(found: dict[str, Any], walk: list[Any]) -> list[tuple[int, int, int, int]]:
    """Level, table, entry and word of each step."""
    steps = (found["steps"][number] for number in walk[1])
    return [(level, int(table, 16), entry, int(word, 16)) for level, table, entry, word in steps]


# rows and walks


def test_every_row_of_the_listing_is_in_the_page_with_the_walk_of_its_first_address(made: Random) -> None:
    data = MapData.of("t", mapped(made))
    found = json.loads(json.dumps(map_json(data)))
    runs = data.now.listing.runs
    assert len(found["rows"]) == len(runs.va) > 5
    assert int(sum(row[4] for row in found["rows"])) == sum(map(is_leaf, every_entry(made)))
    for i in range(len(runs.va)):
        expected = tuple(int(column[i]) for column in (runs.va, runs.size, runs.pa, runs.level, runs.leaves))
        assert of_json(found, i) == expected
        walk = translate(
            made.memory,
            made.regs,
            expected[0],
            Access(AccessType.AT_ANY, data.now.listing.regime.el),
            regime=Regime(made.regime),
        )
        (only,) = found["rows"][i][13]
        assert only[0] == key(walk.params.fmt) in found["formats"]
        assert steps_of_json(found, only) == [(s.level, s.pa - 8 * s.entry, s.entry, s.word) for s in walk.steps]
        assert bool(found["texts"][found["rows"][i][10]]) == (walk.fault is not None)


def differ(a: Walk, b: Walk) -> bool:
    """Two walks that end in a leaf do not do the same."""
    mask = a.params.inherited_mask
    inherited = [reduce(or_, (step.word & mask for step in walk.steps[:-1]), 0) for walk in (a, b)]
    return a.steps[-1].word != b.steps[-1].word or inherited[0] != inherited[1]


def test_a_comparison_says_of_every_entry_what_the_two_walks_say(rng: random.Random) -> None:
    seed = rng.random()
    old, now = (random_tree(random.Random(seed), "4K", 39) for _ in range(2))
    slots = sorted({walk.steps[-1].pa for walk in every_entry(old) if is_leaf(walk)})
    for pa in rng.sample(slots, 60):
        changed = rng.choice((old, now)).memory
        changed.store(pa, changed.fetch(pa) ^ 1 << rng.choice((0, 0, 0, *range(64))))
    data = MapData.of("t", mapped(now), mapped(old))
    rows = [(row.va, row.va + row.size, row.status, row) for row in data.rows]
    assert all(a[1] <= b[0] for a, b in pairwise(rows))
    assert {status for _, _, status, _ in rows} == {"same", "added", "removed", "changed"}
    for a in every_entry(old):
        b = translate(now.memory, now.regs, a.va, Access.read())
        status = next((status for start, end, status, _ in rows if start <= a.va < end), None)
        if not is_leaf(a) or not is_leaf(b):
            expected = {(True, False): "removed", (False, True): "added"}.get((is_leaf(a), is_leaf(b)))
        else:
            same_level = a.steps[-1].level == b.steps[-1].level
            expected = "same" if same_level and not differ(a, b) else "changed"
        assert status == expected, f"{a}\n{b}"
    assert all(row.fields for row in data.rows if row.status == "changed")


@pytest.mark.parametrize(
    ("perms", "name"),
    [
        (PR | PX, "executable"),
        (PR | PW, "read/write"),
        (PR, "read-only"),
        (PR | PW | PX, "writable and executable"),
        (PR | PW | UX, "writable and executable"),
        (PR | UR | UX, "EL0 may execute"),
        (PR | PW | UR | UW, "EL0 may write"),
        (PR | UR, "EL0 may read"),
        (0, "no access"),
    ],
)
def test_a_kind_is_named_by_the_strongest_right(perms: int, name: str) -> None:
    assert KINDS[kind_of(perms)].name == name


# layouts


def test_every_format_has_a_name_of_its_own_and_every_bit_a_field() -> None:
    found = layouts()
    assert len(found["formats"]) == len(list(formats())) == len({key(fmt) for fmt in formats()})
    for layout in found["layouts"]:
        spans = [span for number in layout for span in found["fields"][number]["spans"]]
        assert sum(((1 << width) - 1) << lo for lo, width, _ in spans) == END - 1


# where things are drawn


def random_ranges(rng: random.Random, count: int) -> tuple[list[tuple[int, int]], list[Area]]:
    """Ranges of very different sizes and distances, in VA order, and areas."""
    points = sorted({rng.getrandbits(64) >> rng.randrange(52) & -4096 for _ in range(2 * count)})
    ranges = [(a, b) for a, b in zip(points[::2], points[1::2], strict=False) if rng.random() < 0.9]
    borders = sorted({0, *(rng.choice([4096, *points]) for _ in range(6)), END})
    return ranges, [Area(a, b, rng.choice(("", "area"))) for a, b in pairwise(borders)]


@pytest.mark.parametrize("count", [0, 1, 12, 400])
def test_pieces_are_in_order_fill_the_window_and_are_to_scale(rng: random.Random, count: int) -> None:
    for _ in range(20):
        ranges, areas = random_ranges(rng, count)
        start, end = sorted(rng.sample([0, END, *(rng.getrandbits(64) & -4096 for _ in range(4))], 2))
        room = rng.uniform(300, 900)
        found = scale.pieces(start, end, ranges, areas, room)
        assert (found[0].start, found[-1].end) == (start, end)
        assert all(a.end == b.start for a, b in pairwise(found))
        drawn = [number for piece in found for number in range(piece.first, piece.first + piece.ranges)]
        assert drawn == [i for i, (a, b) in enumerate(ranges) if a < end and start < b]
        placed = scale.place(found, room)
        assert all(abs(a.top + a.height - b.top) < 1e-6 for a, b in pairwise(placed))
        total = sum(p.height for p in placed)
        assert total <= max(room, scale.least(found)) + 1e-6
        scales = {round((p.piece.end - p.piece.start) / p.height) for p in placed if p.height > scale.ITEM + 1}
        assert not scales or max(scales) <= min(scales) * 1.01


# the page and the drawing


HOSTILE = "</script><script>alert(1)</script>{{data}}<!-- &amp; \u2028"


def test_nothing_from_outside_becomes_markup(rng: random.Random) -> None:
    data = MapData.of(HOSTILE, Mapped.of(source(random_tree(rng, "4K", 39), HOSTILE), None))
    page = map_page(data)
    assert page.count("<script") == page.count("</script>") == 2
    assert "alert(1)<" not in page
    text = page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    assert json.loads(text)["title"] == HOSTILE
    root = ElementTree.fromstring(drawing(data))
    assert root[0].text == HOSTILE.replace("\u2028", "\u2028")
    assert not [node for node in root.iter() if node.tag.endswith("script")]


@pytest.mark.parametrize(
    "make", [explorer_page, lambda: map_page(MapData.of("t", mapped(random_tree(random.Random(1), "16K", 36))))]
)
def test_a_page_names_nothing_to_load(make: Callable[[], str]) -> None:
    page = make()
    assert not re.search(r"(src|href)\s*=|@import|url\((?!#)|fetch\(|XMLHttpRequest|innerHTML|document\.write", page)
    assert [link for link in re.findall(r"https?://[^\"' )]+", page) if link != "http://www.w3.org/2000/svg"] == []


def texts(svg: str) -> list[tuple[float, float, float, float, str]]:
    """x0, y0, x1, y1 of every text that is not turned, and the text."""
    found = []
    for node in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        if "transform" not in node.attrib:
            x, y, size = (float(node.attrib[name]) for name in ("x", "y", "font-size"))
            found.append(
                (x, y - size * 0.8, x + len(node.text or "") * CHARACTER * size / 12, y + size * 0.2, node.text)
            )
    return found


def overlapping(boxes: list[tuple[float, float, float, float, str]]) -> list[tuple[str, str]]:
    boxes = sorted(boxes, key=lambda box: box[1])
    return [
        (a[4], b[4])
        for i, a in enumerate(boxes)
        for b in boxes[i + 1 :]
        if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
    ]


def test_in_the_drawing_no_text_is_over_another_or_outside(made: Random) -> None:
    boxes = texts(drawing(MapData.of("a title", mapped(made))))
    assert len(boxes) > 10
    assert overlapping(boxes) == []
    assert max(box[2] for box in boxes) <= WIDTH


# a booted kernel


@pytest.mark.kernels
@pytest.mark.qemu
@pytest.mark.parametrize("name", [FAST, *(pytest.param(name, marks=pytest.mark.full) for name in WARM if name != FAST)])
def test_a_booted_kernel_is_small_and_everything_it_maps_is_in_a_named_area(name: str) -> None:
    snapshot = booted(name)
    with open_source(str(snapshot.path)) as opened:
        data = MapData.of("k", Mapped.of(opened, None))
        assert len(map_page(data)) < 2 << 20
        areas = data.areas
        assert [a.end for a in areas[:-1]] == [b.start for b in areas[1:]]
        named = [area for area in areas if area.name]
        lost = [row for row in data.rows if not any(area.start <= row.va < area.end for area in named)]
        assert not lost
        text = next(area for area in areas if area.name == "kernel text")
        assert text.start == snapshot.image.symbols["_text"] < snapshot.image.symbols["_etext"] == text.end
        inside = [row for row in data.rows if text.start <= row.va < text.end]
        assert any(KINDS[row.kind].key == "x" for row in inside)
        assert not any(KINDS[row.kind].key in ("w", "wx") for row in inside)
        assert overlapping(texts(drawing(data))) == []
