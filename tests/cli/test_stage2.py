"""walk, dump, find, audit and diff with stage 2: the same memory asked by commands."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jsonschema
import pytest
from click.testing import CliRunner

from emu.cli import cli
from emu.map.data import MapData, Mapped
from emu.sources import open_source
from pgtable import PhysicalMemory
from pgtable.build import TableBuilder
from pgtable.registers import HCR_EL2, VTCR_EL2

RAM, SIZE, MOVED = 0x4000_0000, 1 << 20, 0x8_0000
SCHEMAS = Path(__file__).parents[2] / "docs" / "schema"


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A source: a guest whose IPAs are 512 KiB below their PAs, one page of it read-only at stage 2."""
    memory = PhysicalMemory((RAM, SIZE))
    second = TableBuilder(memory, (RAM, 1 << 16), va_bits=40, stage=2)
    second.map(RAM, RAM + MOVED, 1 << 16)
    second.protect(RAM + 0xF000, 0x1000, S2AP=1)
    first = TableBuilder(memory, (RAM + MOVED, 1 << 15), va_bits=39)
    first.map(0x1000, RAM + 0xE000, 0x4000, AP=1)
    for table in (0, 0x1000):
        words = memory.words(RAM + MOVED + table, 512)
        words[words != 0] -= MOVED
    folder = tmp_path_factory.mktemp("stage2")
    (folder / "ram.bin").write_bytes(memory.words(RAM, SIZE // 8).tobytes())
    registers = {
        "HCR_EL2": HCR_EL2.pack(VM=1, RW=1),
        "VTCR_EL2": VTCR_EL2.pack(PS=2, SH0=3, **second.vtcr),
        "VTTBR_EL2": second.root,
        "TTBR0_EL1": first.root - MOVED,
        "TCR_EL1": 25 | 3 << 12 | 1 << 23,
        "MAIR_EL1": 0xFF,
    }
    (folder / "regs.txt").write_text("".join(f"{name}={value:#x}\n" for name, value in registers.items()))
    return [f"raw:{folder / 'ram.bin'}@{RAM:#x}", "--regs", str(folder / "regs.txt")]


def run(command: str, source: Sequence[str], *words: str, code: int = 0) -> str:
    done = CliRunner().invoke(cli, [command, *source, *words])
    assert done.exit_code == code, done.output
    return done.stdout


def run_json(command: str, source: Sequence[str], *words: str, code: int = 0) -> dict[str, object]:
    found: dict[str, object] = json.loads(run(command, source, *words, "--json", code=code))
    jsonschema.validate(found, json.loads((SCHEMAS / f"{command}.json").read_text()))
    return found


def test_walk_goes_through_both_stages(guest: list[str]) -> None:
    text = run("walk", guest, "0x1008")
    assert "result, IPA 0x4000e008" in text
    assert "= PA 0x4008e008" in text
    (walk,) = run_json("walk", guest, "0x2008", "--write")["walks"]  # type: ignore[misc]
    assert (walk["ipa"], walk["fault"]["code"]) == ("0x000000004000f008", "0x0f")  # type: ignore[index]
    assert walk["fault"]["because"][0]["text"].startswith("stage 2: S2AP = 0x1")  # type: ignore[index]
    assert len(walk["stage2"]) == 4, "three tables and the result"  # type: ignore[index]


def test_walk_of_one_stage(guest: list[str]) -> None:
    assert "PA 0x4008e000" in run("walk", guest, "0x4000e000", "--stage", "2")
    (walk,) = run_json("walk", guest, "0x50000000", "--stage", "2")["walks"]  # type: ignore[misc]
    assert walk["because"] == ["stage 2: VALID (bit 0) is 0"]  # type: ignore[index]
    assert "both stages" not in run("walk", guest, "0x1008", "--stage", "1")


def test_at_gives_what_both_stages_give(guest: list[str]) -> None:
    assert "PAR_EL1 0xff0000004008e" in run("walk", guest, "0x1008", "--at", "S12E1R")
    assert "PAR_EL1 0xff0000004000e" in run("walk", guest, "0x1008", "--at", "S1E1R")


def test_dump_of_both_stages_of_one_and_of_the_other(guest: list[str]) -> None:
    rows = run_json("dump", guest)["rows"]
    assert [(r["va"][-4:], r["ipa"][-8:], r["pa"][-8:], r["permissions"]) for r in rows] == [  # type: ignore[attr-defined]
        ("1000", "4000e000", "4008e000", "rw- rw-"),
        ("2000", "4000f000", "4008f000", "r-- r--"),
    ]
    text = run("dump", guest)
    assert "0x00004000e000 0x00004008e000" in text
    assert "stage 2 does not map IPA 0x40010000-0x40012000" in text
    second = run_json("dump", guest, "--stage", "2")
    assert second["stage"] == "2"
    assert [(r["va"][-8:], r["pa"][-8:]) for r in second["rows"]] == [  # type: ignore[attr-defined]
        ("40000000", "40080000"),
        ("4000f000", "4008f000"),
    ]
    assert len(run_json("dump", guest, "--where", "W")["rows"]) == 1  # type: ignore[arg-type]


def test_find_says_which_vas_and_which_ipas_reach_a_pa(guest: list[str]) -> None:
    assert "0x0000000000001000" in run("find", guest, "--pa", "0x4008e000")
    assert "0x000000004000e000" in run("find", guest, "--pa", "0x4008e000", "--stage", "2")
    assert run("find", guest, "--pa", "0x4000e000") == "", "that is an IPA"


def test_audit_judges_both_stages(guest: list[str]) -> None:
    found = run_json("audit", guest, code=0)
    rules = {verdict["rule"]: verdict["status"] for verdict in found["rules"]}  # type: ignore[attr-defined]
    assert rules["s2-tables-writable"] == rules["structure"] == "pass"
    alone = run_json("audit", guest, "--stage", "2")
    assert {verdict["rule"][:3] for verdict in alone["rules"]} == {"s2-"}  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", ["dump", "audit"])
def test_stage_2_that_is_off_is_one_sentence(command: str, guest: list[str]) -> None:
    done = CliRunner().invoke(cli, [command, *guest, "--reg", "HCR_EL2=0x80000000", "--stage", "2"])
    assert done.exit_code == 2
    assert "HCR_EL2 has stage 2 off" in done.output
    assert "Traceback" not in done.output


def test_the_map_leads_through_both_stages(guest: list[str]) -> None:
    with open_source(guest[0], registers=guest[2]) as source:
        data = MapData.of("guest", Mapped.of(source, None))
        assert [(row.va, row.pa) for row in data.rows] == [(0x1000, 0x4008_E000), (0x2000, 0x4008_F000)]
        assert "both stages of EL1" in str(data.now.walk(0x1000))
