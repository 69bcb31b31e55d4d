"""The documentation site: built strictly, every page and layout in it, nothing fetched when it is looked at."""

from __future__ import annotations

import html
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from emu.map.layouts import formats, lowest_level
from pgtable.bits import Layout
from pgtable.descriptors import LAST_LEVEL
from pgtable.figure import field_name
from pgtable.registers import LAYOUTS
from pgtable.syndromes import EC, esr_layout
from tests.emu.map_browser import Browser
from tests.kernels import lack

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md"))

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site as `make docs` builds it; a warning (a dead link, a page that nothing leads to) is a failure."""
    try:
        import mkdocs  # noqa: F401
    except ImportError:
        lack("docs", "no mkdocs: pip install -e '.[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return out


def text_of(page: Path) -> str:
    """What a reader sees, without markup."""
    return html.unescape(re.sub(r"<[^>]+>", " ", page.read_text()))


def test_every_page_is_in_the_navigation(site: Path) -> None:
    linked = set(
        re.findall(r'class="md-nav__link"[^>]*href="([^"#]+)"|href="([^"#]+)" class="md-nav__link', index(site))
    )
    names = {name for pair in linked for name in pair} | {"index.html"}
    assert {str(page.with_suffix(".html")) for page in PAGES} <= names


def index(site: Path) -> str:
    return (site / "index.html").read_text()


def test_nothing_is_fetched_when_a_page_is_looked_at(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe|source)[^>]+src="([^"]+)"', page.read_text())
        loaded += re.findall(
            r'<link[^>]+rel="(?:stylesheet|preload|icon|preconnect)"[^>]+href="([^"]+)"', page.read_text()
        )
        assert not [url for url in loaded if re.match(r"(https?:)?//", url)], page
    for style in site.rglob("*.css"):
        assert not re.findall(r"(?:url|@import)\s*\(?\s*['\"]?(?:https?:)?//", style.read_text()), style


def test_no_marker_of_what_is_made_is_left(site: Path) -> None:
    assert not [page for page in site.rglob("*.html") if "<!-- made:" in page.read_text()]


def of_descriptors() -> Iterator[Layout]:
    for fmt in formats():
        yield fmt.table(0)
        yield from (fmt.leaf(level) for level in range(lowest_level(fmt), LAST_LEVEL + 1) if level in fmt.block_levels)
        yield fmt.leaf(LAST_LEVEL)


def missing(page: Path, layouts: Iterator[Layout]) -> set[tuple[str, str]]:
    """(bits, name) of fields that no row of the page has; a meaning that is not there counts too."""
    rows = re.findall(r"<tr>\s*<td>(.*?)</tr>", page.read_text(), re.S)
    cells = {tuple(html.unescape(re.sub(r"<[^>]+>", "", c)).strip() for c in row.split("<td>")[:2]) for row in rows}
    said = " ".join(text_of(page).split())
    found = set()
    for layout in layouts:
        for field in layout:
            if field.name not in ("OA", "TA", "nT") and not field.name.startswith("RES0_"):
                there = (field.bits, field_name(field)) in cells and " ".join(field.doc.split()) in said
                if not there or not all(" ".join(text.split()) in said for text in field.values.values()):
                    found.add((field.bits, field_name(field)))
    return found


def test_the_reference_has_every_field_of_every_descriptor(site: Path) -> None:
    assert not missing(site / "reference" / "descriptors.html", of_descriptors())


def test_the_reference_has_every_field_of_every_register(site: Path) -> None:
    assert not missing(site / "reference" / "registers.html", iter(LAYOUTS.values()))
    assert not missing(site / "reference" / "syndromes.html", map(esr_layout, EC))


def test_the_reference_has_every_command_and_public_name(site: Path) -> None:
    import pgtable
    from emu.cli import COMMANDS

    commands = (site / "reference" / "commands.html").read_text()
    assert all(f"pgtable {name}" in commands for name in COMMANDS)
    names = (site / "reference" / "pgtable.html").read_text()
    missing = [name for name in pgtable.__all__ if f'id="pgtable.{name}"' not in names]
    assert missing == ["at"]  # the function of a module of its name: the page of the module has it
    assert 'id="pgtable.at.at"' in (site / "reference" / "python" / "pgtable.at.html").read_text()


WIDER = "document.documentElement.scrollWidth > window.innerWidth"
CUT = """[...document.querySelectorAll('.bits span')].filter(name => name.scrollHeight > name.parentElement.clientHeight
    || name.getBoundingClientRect().width > name.parentElement.clientWidth + 1)
    .map(name => name.textContent).join(' ')"""


@pytest.mark.chromium
@pytest.mark.parametrize(("width", "dark"), [(420, False), (800, True), (1500, False)])
def test_no_page_is_wider_than_its_window_and_no_name_in_a_figure_is_cut(
    width: int, dark: bool, site: Path, tmp_path: Path
) -> None:
    with Browser(tmp_path, width, 1000, dark=dark) as browser:
        wrong = []
        for page in (site / name.with_suffix(".html") for name in PAGES):
            browser.open(page)
            if browser.value(WIDER) or browser.value(CUT):
                wrong.append(f"{page.relative_to(site)}: {browser.value(CUT)}")
        assert not wrong
        assert not browser.errors
