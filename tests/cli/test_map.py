"""`pgtable map`: the files that it writes, what it refuses, and that a file survives an error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result

from emu.cli import cli
from emu.map.page import map_page
from tests.pgtable.hand import ROOT, TABLE_STEP, leaf, tree
from tests.pgtable.test_thirteen_tables import physical

HALVES = 8 * TABLE_STEP


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, ["map", *map(str, args)])


def raw(folder: Path, name: str = "ram", **fields: int) -> list[str]:
    """SOURCE and the registers' option of a dump with one page mapped."""
    made = tree(leaf(UXN=1, PXN=1, **fields))
    (folder / f"{name}.bin").write_bytes(physical(made).read(ROOT, HALVES))
    (folder / "regs.json").write_text(json.dumps({name: hex(value) for name, value in made.regs.as_dict().items()}))
    return [f"raw:{folder}/{name}.bin@{ROOT:#x}", "--regs", f"{folder}/regs.json"]


def embedded(path: Path) -> dict[str, Any]:
    """The JSON object in a page."""
    text = path.read_text().partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_page_and_a_drawing_of_a_dump(tmp_path: Path) -> None:
    page, svg = tmp_path / "m.html", tmp_path / "m.SVG"
    for out in (page, svg):
        result = run(*raw(tmp_path), "-o", out, "--title", "one <page>")
        assert (result.exit_code, result.stdout) == (0, ""), result.stderr
        assert result.stderr.endswith("KiB\n")
    assert "<title>one &lt;page&gt;</title>" in page.read_text()
    found = embedded(page)
    assert (found["title"], len(found["rows"]), found["old"]) == ("one <page>", 1, None)
    assert ElementTree.parse(svg).getroot().attrib["width"] == "1400"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.SVG", "m.html", "ram.bin", "regs.json"]


def test_two_dumps_are_compared_by_field(tmp_path: Path) -> None:
    before, *regs = raw(tmp_path, "before")
    after, *_ = raw(tmp_path, "after", AP=2)
    result = run(before, "--diff", after, *regs, "-o", tmp_path / "d.html")
    assert result.exit_code == 0, result.stderr
    found = embedded(tmp_path / "d.html")
    (row,) = found["rows"]
    assert (found["texts"][row[11]], row[12]) == ("changed", [["AP", "0", "2"]])
    assert found["old"] == before
    assert [found["steps"][walk[1][-1]][3] for walk in row[13]] == [f"{leaf(UXN=1, PXN=1, AP=ap):x}" for ap in (2, 0)]


def test_the_explorer_alone(tmp_path: Path) -> None:
    assert run("--explorer", "-o", tmp_path / "x.html").exit_code == 0
    assert "rows" not in embedded(tmp_path / "x.html")


WRONG: dict[str, tuple[list[str], str]] = {
    "suffix": (["SOURCE", "-o", "map.pdf"], "-o map.pdf: must end in .html or .svg"),
    "no source": (["-o", "map.html"], "SOURCE is missing: a snapshot, a dump, a kernel; or --explorer"),
    "explorer as svg": (["--explorer", "-o", "x.svg"], "--explorer: takes no SOURCE and makes .html only"),
    "explorer of a source": (["a.snap", "--explorer", "-o", "x.html"], "--explorer: takes no SOURCE"),
    "missing source": (["/nonexistent", "-o", "x.html"], "/nonexistent"),
    "missing folder": (["SOURCE", "-o", "/nonexistent/x.html"], "/nonexistent/x.html: No such file or directory"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_mistake_is_one_sentence(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    args, sentence = WRONG[name]
    words = [word for arg in args for word in (raw(tmp_path) if arg == "SOURCE" else [arg])]
    result = run(*words)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr
    assert result.stderr.splitlines()[-1].startswith("pgtable: error: ")


def test_a_file_survives_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "m.html"
    out.write_text("as it was")
    source = raw(tmp_path)

    def fails(*_: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", fails)
    result = run(*source, "-o", out)
    assert (result.exit_code, out.read_text()) == (2, "as it was")
    assert "m.html: No space left on device" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.html", "ram.bin", "regs.json"]
    monkeypatch.undo()
    monkeypatch.setattr("emu.map.page.map_page", lambda data: map_page(data)[: 1 // 0])
    assert run(*source, "-o", out).exception
    assert out.read_text() == "as it was"


def test_a_page_has_the_permissions_that_the_user_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run("--explorer", "-o", tmp_path / "x.html")
    finally:
        os.umask(before)
    assert (tmp_path / "x.html").stat().st_mode & 0o777 == 0o640
