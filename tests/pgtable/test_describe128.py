"""128-bit descriptors explained. Judges: nobody; positions are typed from Arm ARM M.a.a D8.3.2."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from emu.cli_explain import explain
from pgtable.d128 import NOT_JUDGED, Format128
from pgtable.describe128 import explain128
from pgtable.descriptors import Granule
from pgtable.registers128 import PAR_FAULT_128, PAR_OK_128, TTBR0_EL3_D128, TTBR_128
from tests.pgtable.hand128 import SHIFTS, leaf, table
from tests.pgtable.test_d128_mutants import MUTANTS

DOCS = Path(__file__).parents[2] / "docs"
BLOCK = "00002000000000000000008000000701"


def mask(*ranges: tuple[int, int]) -> int:
    return sum((1 << hi + 1) - (1 << lo) for hi, lo in ranges)


EVERYWHERE = ((1, 1), (90, 56), (107, 101), (120, 119), (126, 125))


def test_reserved_bits_are_those_of_the_field_tables() -> None:
    """4K; a page has nT reserved, a block the address bits below its size."""
    for stage2, level, is_table, more in (
        (False, 3, False, ((6, 6), (124, 121))),
        (False, 2, False, ((19, 12), (124, 121))),
        (False, 1, True, ((108, 108),)),
        (True, 3, False, ((6, 6), (124, 121), (113, 112))),
        (True, 1, True, ((108, 108), (113, 112))),
    ):
        fmt = Format128(stage2=stage2, pie=True)
        layout = fmt.table(level) if is_table else fmt.leaf(level)
        reserved = sum(f.mask for f in layout if f.reserved == "RES0")
        assert reserved == mask(*EVERYWHERE, *more), (stage2, level, is_table)


def test_every_named_field_is_where_the_tables_have_it() -> None:
    stage1, stage2 = Format128(poe=True, aie=True), Format128(stage2=True, poe=True)
    layouts = [fmt.leaf(2) for fmt in (stage1, stage2)] + [fmt.table(1) for fmt in (stage1, stage2)]
    found: dict[str, set[str]] = {}
    for layout in layouts:
        assert layout.width == 128
        for field in layout:
            if not field.reserved and field.name not in ("OA", "TA", "VALID"):
                found.setdefault(field.name, set()).add(field.bits)
    assert {name: {int(bits.rpartition(":")[2]) for bits in places} for name, places in found.items()} == {
        name: {shift} for name, shift in SHIFTS.items()
    }
    for layout in (TTBR_128, PAR_OK_128, PAR_FAULT_128):
        assert layout.width == 128
    assert TTBR0_EL3_D128["BADDR"].bits == "55:5"
    assert TTBR_128["BADDR"].bits == "47:5,87:80"


def test_words_explained() -> None:
    for word, level, keywords, title, label, fact in (
        (leaf(), None, {}, "page, level 3 (guessed)", "maps", "4K at PA 0x0000008000000000"),
        (leaf(skl=3), None, {}, "block, level 0 (guessed)", "maps", "64G at PA 0x0000008000000000"),
        (leaf(skl=1, Contiguous=1), 2, {}, "block, level 2, 4K", "run", "16 entries, 16M"),
        (table(1 << 50, 3), -2, {}, "table, level -2", "points to", "level 2: 4294967296 entries of 1M, 64G itself"),
        (leaf(skl=2), 1, {"granule": "64K", "stage": 2}, "block, level 1, 64K", "maps", "1T at"),
        (leaf(skl=1), 3, {}, "invalid, level 3", "access", "none: translation fault, level 3"),
    ):
        found = explain128(word, level, **keywords)
        assert title in found.title
        assert "not judged" in found.title
        assert fact in found.facts[label], (title, found.facts)
        assert NOT_JUDGED in str(found)


def test_what_looks_wrong() -> None:
    for word, level, granule, text in (
        (0, 3, "4K", "VALID is 0"),
        (leaf(skl=3), 0, "64K", "skips two levels at most"),
        (leaf(skl=1), 3, "4K", "level 3 + SKL 1 is more than 3"),
        (leaf() | 2, 3, "4K", "bits 1 are reserved and must be 0"),
        (table(0x1000, 1), 0, "4K", "the table has 1M"),
    ):
        assert any(text in finding.text for finding in explain128(word, level, granule=granule).findings), text
    assert not explain128(leaf()).findings


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"word": 1 << 128}, "must be 128 bits"),
        ({"word": 1, "stage": 3}, "stage 3: must be 1 or 2"),
        ({"word": 1, "level": -3}, "level -3: 128-bit 4K has -2 to 3"),
        ({"word": 1, "level": -1, "granule": Granule.K64}, "level -1: 128-bit 64K has 0 to 3"),
        ({"word": 1, "regime": "EL2"}, "regime EL2: never has 128-bit descriptors"),
    ],
)
def test_what_cannot_be(keywords: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        explain128(**keywords)


def test_on_the_command_line() -> None:
    ran = CliRunner().invoke(explain, ["--d128", BLOCK])
    assert ran.exit_code == 0
    assert ran.output.startswith(f"0x{BLOCK}  block, level 2 (guessed), 4K granule,")
    assert "not judged" in ran.output
    two = CliRunner().invoke(explain, ["--d128", BLOCK, "0x1"])
    assert "not judged" in two.output
    as_json = json.loads(CliRunner().invoke(explain, ["--d128", "--json", BLOCK]).output)
    assert as_json["words"][0]["word"] == f"0x{BLOCK}"
    for arguments, said in (
        ((BLOCK, "--va", "0x1000"), "not --va"),
        ((BLOCK, "TCR_EL1=0"), "--d128 goes with words"),
        (("0" * 16,), "not a number (0x..., or 32 hex digits)"),
        (("0x1" + "0" * 32,), "has 129 bits, and there are 128"),
    ):
        ran = CliRunner().invoke(explain, ["--d128", *arguments])
        assert ran.exit_code
        assert said in ran.output + str(ran.exception)


def test_the_session_of_the_docs() -> None:
    blocks = (DOCS / "d128.md").read_text().split("```")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(blocks[1].removeprefix("python\n"), {})
    assert printed.getvalue() == blocks[3].removeprefix("text\n")
    assert f"{len(MUTANTS)} rules are broken on purpose" in blocks[0]
