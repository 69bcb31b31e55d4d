"""The page of `pgtable map` in headless Chromium: clicked, typed into and read, against the model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from emu.map import scale
from emu.map.data import MapData, Mapped
from emu.map.layouts import formats, key, lowest_level
from emu.map.page import explorer_page, map_page
from emu.sources import open_source
from pgtable import explain, translate
from pgtable.describe import meaning
from pgtable.descriptors import Format, Kind
from pgtable.find import aliases
from tests.emu.map_browser import Browser
from tests.snapshots import booted

pytestmark = [pytest.mark.full, pytest.mark.chromium, pytest.mark.kernels, pytest.mark.qemu]

WHOLE = 1 << 64


@pytest.fixture(scope="module")
def data() -> Iterator[MapData]:
    """A booted kernel's map."""
    with open_source(str(booted().path)) as source:
        yield MapData.of("a booted kernel", Mapped.of(source, None))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture
def page(browser: Browser, data: MapData, tmp_path: Path) -> Iterator[Browser]:
    """The map, freshly opened; at the end nothing was loaded and the console has no errors."""
    path = tmp_path / "map.html"
    path.write_text(map_page(data))
    browser.open(path)
    yield browser
    assert browser.errors == []
    assert browser.value("performance.getEntriesByType('resource').length") == 0


COUNTS = "[...document.querySelectorAll('#canvas .range')].map(r => +r.dataset.count)"


def row_of(data: MapData, va: int) -> int:
    return next(i for i, row in enumerate(data.rows) if row.va <= va < row.va + row.size)


def words_shown(page: Browser) -> list[int]:
    """The descriptors of the walk that the panel shows."""
    shown = page.value("[...document.querySelectorAll('#walk details')].map(d => d.dataset.word)")
    return [int(word, 16) for word in shown]


def walked(data: MapData, va: int) -> list[int]:
    return [step.word for step in translate(data.now.source.memory, data.now.listing.regs, va).steps]


# ranges and walks


def test_a_click_on_a_range_shows_the_walk_of_its_first_address(page: Browser, data: MapData) -> None:
    number = max(range(len(data.rows)), key=lambda i: data.rows[i].size)  # large enough to be drawn by itself
    page.click(f"#canvas [data-first='{number}'][data-count='1']")
    row = data.rows[number]
    assert words_shown(page) == walked(data, row.va)
    panel = page.text("#walk")
    assert f"= PA {row.pa:#018x}, {row.rights}, {row.memory}" in panel
    leaf = translate(data.now.source.memory, data.now.listing.regs, row.va).steps[-1]
    layout = data.now.listing.params(row.va).fmt.leaf(leaf.level)
    for name in ("AttrIndx", "AF", "UXN"):
        assert f"{layout[name].bits}\t{name}\t" in panel
    assert page.value("document.querySelector('.item.selected').dataset.first") == str(number)


def test_a_click_on_any_row_of_the_table_shows_its_walk_and_draws_it_by_itself(page: Browser, data: MapData) -> None:
    for number, row in enumerate(data.rows):
        page.click(f"[data-row='{number}']")
        assert words_shown(page) == walked(data, row.va)
        assert page.value("document.querySelector('.item.selected').dataset.count") == "1"


def test_a_box_of_several_ranges_opens_and_back_closes_it(page: Browser) -> None:
    before = page.value("document.querySelector('#canvas svg').outerHTML")
    most = max(page.value(COUNTS))
    page.click(f"#canvas [data-count='{most}']")
    assert sum(page.value(COUNTS)) == most
    assert len(page.value(COUNTS)) > 1
    page.click("#back")
    assert page.value("document.querySelector('#canvas svg').outerHTML") == before


def test_the_wheel_and_the_buttons_zoom(page: Browser) -> None:
    window = "[String(shown().start), String(shown().end)].join()"
    whole = page.value(window)
    page.wheel("#canvas", -100)
    page.wait(f"{window} !== '{whole}'")
    start, end = (int(text) for text in page.value(window).split(","))
    assert 0 <= start < end <= WHOLE
    assert end - start < WHOLE
    page.click("#in")
    low, high = (int(text) for text in page.value(window).split(","))
    assert start <= low < high <= end
    assert high - low < end - start
    for _ in range(60):
        if page.value("document.querySelector('#out').disabled"):
            break
        page.click("#out")
    assert page.value(window) == whole


def test_the_keyboard_moves_and_chooses(page: Browser, data: MapData) -> None:
    page.value("document.querySelector('#canvas .range').focus()")
    page.key("ArrowDown", 40)
    focused = page.value("[document.activeElement.dataset.first, document.activeElement.dataset.count].map(Number)")
    assert focused[0] > 0
    page.key("Enter", 13, "\r")
    if focused[1] == 1:
        assert words_shown(page) == walked(data, data.rows[focused[0]].va)
    page.click(f"#canvas [data-count='{max(page.value(COUNTS))}']")
    page.key("Escape", 27)
    assert page.value("shown() === WHOLE")


# search


def search(page: Browser, address: int) -> None:
    page.type("#address", f"{address:#x}")
    page.key("Enter", 13, "\r")


def test_a_search_for_a_pa_lists_every_va_that_reaches_it(page: Browser, data: MapData) -> None:
    text = data.now.source.symbols["_text"] + 0x3000
    pa = translate(data.now.source.memory, data.now.listing.regs, text).pa
    expected = [alias.va for alias in aliases(data.now.listing, pa)]
    assert text in expected
    assert len(expected) >= 2
    search(page, pa)
    shown = page.value("[...document.querySelectorAll('#walk .found button')].map(b => b.dataset.va)")
    assert [int(va, 16) for va in shown] == expected
    rows = page.value("[...document.querySelectorAll('#table tbody tr')].map(r => +r.dataset.row)")
    assert rows == [row_of(data, va) for va in expected]
    hits = page.value("[...document.querySelectorAll('.range.hit')].map(r => [+r.dataset.first, +r.dataset.count])")
    assert all(any(first <= row < first + count for first, count in hits) for row in rows)
    page.click("#walk .found button")
    assert words_shown(page) == walked(data, data.rows[rows[0]].va)
    page.click("#clear")
    assert page.text("#count") == f"{len(data.rows)} of {len(data.rows)}"


def test_a_search_for_a_va_says_which_pa_it_reaches(page: Browser, data: MapData) -> None:
    va = data.now.source.symbols["_text"] + 0x1234
    search(page, va)
    pa = translate(data.now.source.memory, data.now.listing.regs, va).pa
    assert f"reaches PA {pa:#018x}" in page.text("#walk")
    search(page, 0x1234)
    assert "No range maps this VA" in page.text("#walk")
    page.type("#address", "linear")
    page.key("Enter", 13, "\r")
    assert page.value("document.querySelector('#address').getAttribute('aria-invalid')") == "true"


def test_filter_sort_and_legend_choose_rows(page: Browser, data: MapData) -> None:
    page.type("#filter", "device")
    count = sum("Device" in row.memory for row in data.rows)
    assert page.text("#count") == f"{count} of {len(data.rows)}"
    page.type("#filter", " ")
    page.value("byId('filter').value = ''; byId('filter').dispatchEvent(new Event('input'))")
    page.click("#table th:nth-child(2) button")
    page.click("#table th:nth-child(2) button")
    first = page.value("+document.querySelector('#table tbody tr').dataset.row")
    assert data.rows[first].size == max(row.size for row in data.rows)
    page.click("#legend .chip")
    rows = page.value("[...document.querySelectorAll('#table tbody tr')].map(r => +r.dataset.row)")
    kinds = {data.rows[number].kind for number in rows}
    assert len(kinds) == 1
    assert len(rows) == sum(row.kind in kinds for row in data.rows)


# the same rule in Python and in JavaScript


def test_the_page_and_the_drawing_place_ranges_alike(page: Browser, data: MapData, rng: random.Random) -> None:
    ranges = [(row.va, row.va + row.size) for row in data.rows]
    edges = [0, WHOLE, *(edge for pair in ranges for edge in pair)]
    for _ in range(60):
        start, end = sorted(rng.sample(edges, 2))
        if start == end:
            continue
        room = rng.randrange(200, 1200)
        expected = scale.place(scale.pieces(start, end, ranges, data.areas, room), room)
        shown = page.value(
            f"(() => {{ const p = piecesOf({start}n, {end}n, rows, {room}); place(p, {room});"
            " return p.map(x => [String(x.start), String(x.end), x.count, x.top, x.height, x.cut]); })()"
        )
        assert [(int(p[0]), int(p[1]), p[2], p[5]) for p in shown] == [
            (p.piece.start, p.piece.end, p.piece.ranges, p.cut) for p in expected
        ]
        tops = [(p.top, p.height) for p in expected]
        assert [(p[3], p[4]) for p in shown] == [pytest.approx(pair, abs=0.01) for pair in tops]


def random_word(rng: random.Random, fmt: Format, level: int) -> int:
    """A word of a kind that is legal at the level, three times of four."""
    word = rng.getrandbits(64) & rng.getrandbits(64)
    low = rng.choice((3, 1 if level in fmt.block_levels else 3, 0))
    return word & ~3 | low if rng.random() < 0.75 else word


def test_words_are_decoded_as_pgtable_does(page: Browser, rng: random.Random) -> None:
    cases = []
    for fmt in formats():
        level = rng.randrange(lowest_level(fmt), 4)
        cases += [(fmt, level, random_word(rng, fmt, level)) for _ in range(6)]
    asked = json.dumps([[key(fmt), level, f"{word:x}"] for fmt, level, word in cases])
    shown = page.value(
        f"{asked}.map(([f, l, w]) => {{ const d = decode(f, l, big(w));"
        " const leaf = ['page', 'block'].includes(d.kind);"
        " return [d.kind, d.fields.map(r => [r.field.name, r.value.toString(16), r.meaning, r.wrong]),"
        " leaf ? rightsOf(d.format, d.layout, big(w)) : '']; })"
    )
    for (fmt, level, word), found in zip(cases, shown, strict=True):
        assert found == decoded(fmt, level, word, found), f"{word:#018x} {fmt} level {level}"


def decoded(fmt: Format, level: int, word: int, found: list[Any]) -> list[Any]:
    """What the page must show, by the layouts and by `explain`; `found` has what registers add, which is not asked."""
    layout, kind = fmt.layout(word, level), fmt.kind(word, level)
    wrong = layout.misuse(word) if word & 1 else []
    texts = {"AttrIndx": found[1], "NS": found[1]}
    fields = []
    for i, row in enumerate(layout):
        said = meaning(row, row.get(word)) if row.name not in texts or fmt.stage2 else found[1][i][2]
        fields.append([row.name, f"{row.get(word):x}", said, row in wrong])
    rights = found[2]
    if kind in (Kind.PAGE, Kind.BLOCK) and not fmt.pie and not fmt.poe:
        regime = "EL10" if fmt.el0 else "EL2"
        options = {"granule": fmt.granule, "ds": fmt.ds, "stage": 2 if fmt.stage2 else 1, "regime": regime}
        place = explain(word, level, **options).place
        assert place
        label = {"EL2": "EL2 or EL3"} if regime == "EL2" else {}
        rights = " ".join(f"{label.get(el, el)} {granted}" for el, granted in place.rights.items())
    return [kind.name.lower(), fields, rights]


# the explorer


def test_the_explorer_takes_a_word_and_its_bits_can_be_clicked(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "x.html"
    path.write_text(explorer_page())
    browser.open(path)
    browser.type("#x-word", "0x00e0000041200f83")
    assert "EL1 r-- EL0 ---" in browser.text("#x-facts")
    assert "PA 0x0000000041200000" in browser.text("#x-facts")
    browser.click("[data-bit='53']")
    assert browser.value("document.querySelector('#x-word').value") == "0x00c0000041200f83"
    assert "EL1 r-x EL0 ---" in browser.text("#x-facts")
    browser.click("[data-bit='0']")
    assert "translation fault, level 3" in browser.text("#x-facts")
    browser.click("[data-bit='0']")
    browser.value("byId('x-level').value = 1; byId('x-level').dispatchEvent(new Event('change'))")
    assert "table" in browser.text("#x-facts")
    browser.click("[data-bit='1']")
    assert "block, level 1" in browser.text("#x-facts")
    assert "1 GiB" in browser.text("#x-facts")
    browser.click("#x-wide")
    assert "OA\t" in browser.text("#x-fields")
    assert "49:30" in browser.text("#x-fields")
    browser.value("byId('x-stage').value = 'stage2'; byId('x-stage').dispatchEvent(new Event('change'))")
    assert "S2AP" in browser.text("#x-fields")
    browser.type("#x-word", "nonsense")
    assert browser.value("document.querySelector('#x-word').getAttribute('aria-invalid')") == "true"
    assert browser.errors == []


def test_every_choice_of_the_explorer_is_a_format(browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "x.html"
    path.write_text(explorer_page())
    browser.open(path)
    known = {key(fmt) for fmt in formats()}
    shown = browser.value(
        "Object.keys(data.formats).map(name => { setControls(name); return [name, chosenFormat()]; })"
    )
    assert {name for name, _ in shown} == known
    assert all(name == chosen for name, chosen in shown)


def test_a_descriptor_of_a_walk_opens_in_the_explorer(page: Browser, data: MapData) -> None:
    page.click("[data-row='0']")
    page.click("#walk details:last-of-type .link")
    word = walked(data, data.rows[0].va)[-1]
    assert page.value("document.querySelector('#x-word').value") == f"{word:#018x}"
    assert not page.value("document.querySelector('#explorer').hidden")
    page.click("#tab-map")
    assert page.value("document.querySelector('#explorer').hidden")


# two sources


def test_a_comparison_shows_what_changed_by_name(browser: Browser, tmp_path: Path) -> None:
    snapshot = booted()
    with open_source(str(snapshot.path)) as old, open_source(str(snapshot.path)) as new:
        before = Mapped.of(old, None)
        words = snapshot.fresh_memory()
        row = max(MapData.of("", before).rows, key=lambda row: row.size)
        step = translate(new.memory, before.listing.regs, row.va).steps[-1]
        leaf = before.listing.params(row.va).fmt.leaf(step.level)
        words.store(step.pa, leaf["AP"].put(step.word, 2))
        words.store(step.pa + 8, leaf["VALID"].put(words.fetch(step.pa + 8), 0))
        new.memory = words
        data = MapData.of("changed", Mapped.of(new, None), before)
        path = tmp_path / "d.html"
        path.write_text(map_page(data))
    browser.open(path)
    assert {row.status for row in data.rows} == {"same", "changed", "removed"}
    number = next(i for i, row in enumerate(data.rows) if row.status == "changed")
    browser.click(f"[data-row='{number}']")
    panel = browser.text("#walk")
    assert "AP 0x0 → 0x2" in panel
    assert "now: walk of" in panel
    assert "before: walk of" in panel
    assert words_shown(browser)[-1] == step.word
    browser.click(f"[data-row='{number + 1}']")
    assert "now: not mapped" in browser.text("#walk")
    assert browser.errors == []


# looks


OVERLAP = """(() => {
  const texts = [...document.querySelectorAll('#canvas text')].filter(t => !t.hasAttribute('transform'));
  const boxes = texts.map(t => [t.getBoundingClientRect(), t.textContent]);
  const over = (a, b) => a.left < b.right && b.left < a.right && a.top + 2 < b.bottom - 2 && b.top + 2 < a.bottom - 2;
  return boxes.flatMap(([a, x], i) => boxes.slice(i + 1).filter(([b]) => over(a, b)).map(([, y]) => [x, y]));
})()"""


@pytest.mark.parametrize(("width", "height", "dark"), [(1000, 700, True), (1400, 900, False), (1920, 1080, True)])
def test_nothing_overlaps_at_any_width(width: int, height: int, dark: bool, data: MapData, tmp_path: Path) -> None:
    path = tmp_path / "map.html"
    path.write_text(map_page(data))
    with Browser(tmp_path / "profile", width, height, dark=dark) as browser:
        browser.open(path)
        for action in ("0", "activate(view.placed.find(p => p.count > 3))", "select(rows[3], true)"):
            browser.value(f"{action}; 0")
            assert browser.value(OVERLAP) == []
            assert browser.value("document.documentElement.scrollWidth - innerWidth") <= 0
            assert browser.value("document.documentElement.scrollHeight - innerHeight") <= 0
        colour = browser.value("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, colour[4:-1].split(","))) < 300) == dark
        assert browser.errors == []
