"""A booted kernel's own ptdump text against ours of its RAM file, and what one changed bit does to both."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import jsonschema  # type: ignore[import-untyped]  # its types are a package of their own
import pytest
from click.testing import CliRunner

from emu.checks.ptdump_booted import Ours, Theirs, flips, run
from emu.cli import cli
from kernel_model import ptdump_text
from kernel_model.ptdump_text import PtdumpProtBits
from pgtable import translate
from pgtable.bits import Words
from tests.conftest import SEED
from tests.snapshots import FAST, WARM, booted

pytestmark = [pytest.mark.kernels, pytest.mark.qemu]
SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schema"

KERNELS = [pytest.param(name, marks=[] if name == FAST else pytest.mark.full) for name in WARM]


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_kernel_s_own_text_is_ours_also_with_bits_changed(kernel: str) -> None:
    report = run(booted(kernel), 6, SEED)
    assert not report.differences
    assert report.lines > 150
    assert report.wx is not None
    assert report.wx.passed


@pytest.mark.full
@pytest.mark.timeout(600)
def test_200_changed_bits_change_the_same_lines() -> None:
    report = run(booted(FAST), 200, 7)
    assert not report.differences
    assert report.flips == 200
    assert report.seen > 100
    assert {"AP", "PXN", "AttrIndx", "VALID", "Contiguous", "SH"} <= set(report.fields)


def test_the_cpu_walks_a_copy_so_that_its_own_text_may_be_invalid() -> None:
    """The flipped entry is only looked at: even ptdump_walk()'s own page, made invalid, stays executable."""
    snapshot = booted(FAST)
    ours = Ours(snapshot)
    theirs = Theirs(snapshot, ours.markers)
    slot = translate(ours.memory, snapshot.registers, snapshot.image.symbols["ptdump_walk"]).steps[-1].pa
    word = ours.memory.fetch(slot) & ~1
    real = theirs.dump(slot, word)
    assert real.stop == ""
    ours.memory.store(slot, word)
    assert real.text == ours.dump()[0].text != run(snapshot, 0, 1).text


def test_a_word_less_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = ptdump_text.pte_bits

    def without_shared(bits: object) -> tuple[PtdumpProtBits, ...]:
        return tuple(row for row in rows(bits) if row.set != "SHD")  # type: ignore[arg-type]

    monkeypatch.setattr(ptdump_text, "pte_bits", without_shared)
    assert any("the tables as they were: line" in text for text in run(booted(FAST), 0, 1).differences)


def test_flips_are_of_any_field_but_the_address() -> None:
    ours = Ours(booted(FAST))
    found = list(flips(Random(SEED), ours, 300))
    assert {flip.field for flip in found} >= {"AP", "PXN", "UXN", "AF", "SH", "AttrIndx", "VALID", "nG", "Contiguous"}
    oa: Words | int = ours.params.fmt.leaf(3)["OA"].mask
    assert all(not flip.mask & oa and flip.mask.bit_count() == 1 for flip in found)


def test_the_command_prints_the_lines_and_the_verdict() -> None:
    path = str(booted(FAST).path)
    text = CliRunner().invoke(cli, ["check", "ptdump", "--snapshot", path, "--cases", "2"])
    assert text.exit_code == 0, text.output
    assert "lines, identical" in text.stdout
    assert "verdict     0 differences in 3 dumps" in text.stdout
    found = json.loads(
        CliRunner().invoke(cli, ["check", "ptdump", "--snapshot", path, "--cases", "1", "--json"]).stdout
    )
    jsonschema.Draft202012Validator(json.loads((SCHEMAS / "check-ptdump.json").read_text())).validate(found)
    assert found["text"].count("\n") == found["lines"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ptdump"], "give --kernel KERNEL, or with ptdump --snapshot FILE"),
        (["all", "--snapshot", "x"], "give --kernel KERNEL, or with ptdump --snapshot FILE"),
        (["ptdump", "--snapshot", "/nowhere"], "/nowhere cannot be read"),
    ],
)
def test_bad_input_is_one_sentence(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(cli, ["check", *arguments])
    assert result.exit_code == 2
    assert message in result.output
    assert result.output.count("\n") == 1
