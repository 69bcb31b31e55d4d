"""`pgtable walk`, `dump`, `find`, `diff`: the thirteen tables of three disagreeing tools, and a booted kernel."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # its types are a package of their own
import numpy as np
import pytest
from click.testing import CliRunner, Result

from emu.cli import cli
from emu.cli_diff import change_text
from emu.rowtext import rights_text
from emu.sources import open_source
from pgtable.diff import diff
from pgtable.find import aliases
from pgtable.listing import listing
from tests.pgtable.hand import PAGE_SHIFT, ROOT, TABLE_STEP, Tree, leaf, table, tree
from tests.pgtable.test_thirteen_tables import CASES, physical
from tests.snapshots import FAST, booted

SCHEMAS = Path(__file__).resolve().parents[2] / "docs" / "schema"


def run(*args: object) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def answer(*args: object, code: int = 0) -> dict[str, Any]:
    """The JSON object of a command, valid for its schema."""
    result = run(*args, "--json")
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    schema = json.loads((SCHEMAS / f"{args[0]}.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(found)
    return found


def raw(folder: Path, made: Tree) -> list[str]:
    """The words of SOURCE and its registers for a table written to files."""
    memory = physical(made)
    (folder / "ram.bin").write_bytes(memory.read(ROOT, 8 * TABLE_STEP))
    (folder / "regs.json").write_text(json.dumps({name: hex(value) for name, value in made.regs.as_dict().items()}))
    return [f"raw:{folder}/ram.bin@{ROOT:#x}", "--regs", f"{folder}/regs.json"]


# What gdb-pt-dump (9df79f3) answered to the same words through its own Machine class, run once: of its listing the PA
# of the address and the rights of EL1 and EL0, "" where it lists nothing; and what its -walk says.
GDB_PT_DUMP = {
    "the page itself": ("0x80000ab8 rwx --x", "ok"),
    "1 PXNTable at level 0": ("0x80000ab8 rwx --x", "ok"),
    "2 PXNTable at level 2": ("0x80000ab8 rw- --x", "ok"),
    "3 APTable 0b10 at level 0": ("0x80000ab8 rwx --x", "ok"),
    "4 AP 0b01: EL1 cannot execute": ("0x80000ab8 rwx rwx", "ok"),
    "5 SCTLR.WXN on a writable page": ("0x80000ab8 rwx --x", "ok"),
    "6 level 3, type 0b01": ("0x80000ab8 rwx --x", "ok"),
    "7 level 3, type 0b10": ("", "ok"),
    "8 block at level 0 without LPA2": ("0xb456789ab8 rwx --x", "ok"),
    "9 AF 0 without hardware update": ("0x80000ab8 rwx --x", "ok"),
    "10 EPD0: no walks": ("0x80000ab8 rwx --x", "ok"),
    "11 64K granule, LPA, PA[51:48] = 0xa": ("0x80009ab8 rwx --x", "fault"),
    "12 4K LPA2, 52-bit VA, PA[51:50] = 3": ("0x80000ab8 rwx --x", "fault"),
    "13 DS 0 on a CPU with 52-bit PAs: SH is no address": ("0x80000ab8 rwx --x", "ok"),
}
# Where gef (bata24, 2eeb16f, in gdb-multiarch) was wrong; its text is not recorded.
GEF = {
    "6 level 3, type 0b01": "RuntimeError, the whole dump is lost",
    "8 block at level 0 without LPA2": "RuntimeError, the whole dump is lost",
    "10 EPD0: no walks": "ignored",
    "12 4K LPA2, 52-bit VA, PA[51:50] = 3": "PA 0x4000, a table",
    "13 DS 0 on a CPU with 52-bit PAs: SH is no address": "PA 0xc000080000000",
}


@pytest.mark.parametrize("name", CASES)
def test_walk_and_dump_of_the_thirteen_tables(name: str, tmp_path: Path) -> None:
    made, answers, pa, perms, _ = CASES[name]
    source = raw(tmp_path, made)
    for access, expected in answers.items():
        flags = [f"--{access.type.value}"] if access.type.value != "read" else []
        found = answer("walk", *source, hex(made.va), *flags, *(["--el0"] if access.el == 0 else []))["walks"][0]
        if expected is True:
            page = 1 << PAGE_SHIFT["64K" if "64K" in name else "4K"]
            assert int(found["result"]["pa"], 16) & -page == pa
        else:
            assert (found["fault"]["type"], found["fault"]["level"]) == expected
            assert found["fault"]["because"]
    dumped = answer("dump", *source)
    rows = [row for row in dumped["rows"] if int(row["va"], 16) <= made.va < int(row["va"], 16) + row["size"]]
    if perms is None:
        assert not rows
        assert dumped["findings"] or "type 0b10" in name
    else:
        assert [(int(row["pa"], 16), row["permissions"]) for row in rows] == [(pa, rights_text(perms, el0=True))]
    if name.startswith("9"):
        assert rows[0]["fault"] == "access flag fault, level 3"


def test_the_architecture_s_answer_is_not_what_gdb_pt_dump_gives_for_eleven_of_them(tmp_path: Path) -> None:
    """Ours, by the commands, in the form of the recorded answers: equal where that tool is right, and only there."""
    right = set()
    for name, (listed, walked) in GDB_PT_DUMP.items():
        made = CASES[name].made
        source = raw(tmp_path, made)
        rows = answer("dump", *source, "--va", f"{made.va:#x}+1")["rows"]
        ours = "".join(f"{int(row['pa'], 16):#x} {row['permissions']}" for row in rows if row["fault"] is None)
        translates = answer("walk", *source, hex(made.va), "--at", "S1E1A")["walks"][0]["fault"] is None
        if (ours, translates) == (listed, walked == "ok"):
            right.add(name.split()[0])
    assert right == {"the", "2", "13"}
    assert set(GDB_PT_DUMP) == set(CASES)
    assert set(GEF) < set(CASES)


# Words of the command line.


@pytest.fixture
def source(tmp_path: Path) -> list[str]:
    return raw(tmp_path, tree(leaf(0x8000_0000), va=0x4000))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["walk", "SOURCE", "nothing"], "VA nothing: neither a number nor a symbol, and raw:"),
        (["walk", "SOURCE", "0x10000000000000000"], "VA 0x10000000000000000: must be 64 bits"),
        (["walk", "SOURCE", "0", "--at", "S9E1R"], "--at S9E1R: AT S9E1R: must be one of"),
        (["walk", "SOURCE", "0", "--at", "S1E1R", "--write"], "--at S1E1R: says itself what is accessed"),
        (["walk", "SOURCE", "0", "--el0", "--regime", "EL2"], "--el0: the regime EL2 has no EL0"),
        (["walk", "/nowhere/at/all", "0"], "/nowhere/at/all"),
        (["dump", "SOURCE", "--where", "W and"], "condition 'W and': a name is expected"),
        (["dump", "SOURCE", "--where", "W X"], "condition 'W X': 'X' is not expected"),
        (["dump", "SOURCE", "--where", "size>=2Q"], "2Q is no number"),
        (["dump", "SOURCE", "--where", "blue"], "condition 'blue': blue is none of R W X"),
        (["dump", "SOURCE", "--where", "attr<device"], "attr <: it is == or !="),
        (["dump", "SOURCE", "--va", "0x1000"], "--va 0x1000: must be FROM-TO or FROM+SIZE"),
        (["dump", "SOURCE", "--va", "0x2000-0x1000"], "--va 0x2000-0x1000: must have a first address below its end"),
        (["dump", "SOURCE", "--style", "linux", "--totals"], "--style linux: is the kernel's whole dump"),
        (["dump", "SOURCE", "--style", "linux", "--variant", "5.0"], "5.0"),
        (["find", "SOURCE"], "find: give one of --pa, --table, --word and --roots"),
        (["find", "SOURCE", "--word", "xyz"], "--word xyz: must be 0x... or 16 hex digits"),
        (["diff", "SOURCE", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_bad_input_is_one_sentence(args: list[str], message: str, source: list[str]) -> None:
    words = [source[0] if word == "SOURCE" else word for word in args]
    result = run(*words, *(source[1:] if "SOURCE" in args else []))
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert result.output.count("\n") == 1
    assert "Traceback" not in result.output


def test_a_walk_shows_steps_and_what_decided(source: list[str]) -> None:
    text = run("walk", *source, "0x4008", "--write", "--el0").stdout
    assert text.startswith("VA 0x0000000000004008: EL0 write, EL10 lower half, 48-bit, 4K granule\n  L0 ")
    assert "= permission fault, level 3\n    because AP = 0x0" in text
    par = run("walk", *source, "0x4008", "--at", "S1E1R").stdout
    assert par.rstrip().splitlines()[-1].strip().startswith("PAR_EL1 0x")
    both = answer("walk", *source, "0x4008", "0x9000000")["walks"]
    assert [walk["fault"] is None for walk in both] == [True, False]


def test_ranges_of_addresses_cut_rows(source: list[str], tmp_path: Path) -> None:
    made = tree(leaf(0x8000_0000), va=0)
    memory = physical(made)
    for i in range(16):
        memory.store(made.slots[3] + 8 * i, leaf(0x8000_0000 + 0x1000 * i))
    (tmp_path / "ram.bin").write_bytes(memory.read(ROOT, 8 * TABLE_STEP))
    whole = answer("dump", *source)["rows"]
    assert [(row["va"], row["size"], row["leaves"]) for row in whole] == [("0x0000000000000000", 0x10000, 16)]
    part = answer("dump", *source, "--va", "0x2800-0x5000")["rows"][0]
    assert (part["va"], part["pa"], part["size"]) == ("0x0000000000002800", "0x0000000080002800", 0x2800)
    by_pa = answer("dump", *source, "--pa", "0x80003000+8K")["rows"][0]
    assert (by_pa["va"], by_pa["size"]) == ("0x0000000000003000", 0x2000)
    assert [row["va"][-5:] for row in answer("dump", *source, "--style", "leaves", "--va", "0x1000+3K")["rows"]] == [
        "01000"
    ]
    assert len(answer("dump", *source, "--style", "leaves")["rows"]) == 16


@pytest.mark.parametrize(
    ("condition", "rows"),
    [
        ("W and X", 1),
        ("not W", 1),
        ("user", 1),
        ("UX and not UW", 1),
        ("X or user", 2),
        ("level==3", 3),
        ("size>4K", 0),
        ("attr==device", 1),
        ("attr!=device and W", 1),
        ("not (attr==device or R and not W)", 1),
        ("AttrIndx==4 and page", 1),
        ("contiguous or DBM", 0),
        ("nG", 1),
        ("global", 2),
        ("sh==inner", 2),
        ("va>=0x2000 and pa!=0x80000000", 1),
        ("fault or not AF", 0),
    ],
)
def test_conditions(condition: str, rows: int, tmp_path: Path) -> None:
    made = tree(leaf(0x8000_0000, SH=3, UXN=1), va=0)
    memory = physical(made)
    memory.store(made.slots[3] + 8, leaf(0x9000_0000, AttrIndx=4, PXN=1, UXN=1))
    memory.store(made.slots[3] + 16, leaf(0x8000_5000, SH=3, AP=3, nG=1, PXN=1))
    values = dict(made.regs.as_dict())
    values["MAIR_EL1"] = 0x0000_0004_FFFF_FFFF
    (tmp_path / "ram.bin").write_bytes(memory.read(ROOT, 8 * TABLE_STEP))
    (tmp_path / "regs.json").write_text(json.dumps({name: hex(value) for name, value in values.items()}))
    source = [f"raw:{tmp_path}/ram.bin@{ROOT:#x}", "--regs", f"{tmp_path}/regs.json"]
    assert len(answer("dump", *source, "--where", condition)["rows"]) == rows


def test_corrupt_tables_are_findings(tmp_path: Path) -> None:
    made = tree(leaf(0x8000_0000), va=0)
    memory = physical(made)
    memory.store(ROOT + 8, table(ROOT))
    memory.store(ROOT + 16, table(0x7_0000_0000))
    memory.store(made.slots[3] + 8, leaf() & ~2)
    (tmp_path / "ram.bin").write_bytes(memory.read(ROOT, 8 * TABLE_STEP))
    (tmp_path / "regs.json").write_text(json.dumps({name: hex(value) for name, value in made.regs.as_dict().items()}))
    source = [f"raw:{tmp_path}/ram.bin@{ROOT:#x}", "--regs", f"{tmp_path}/regs.json"]
    found = answer("dump", *source)
    assert {"loop", "no memory", "reserved"} <= {finding["kind"] for finding in found["findings"]}
    text = run("dump", *source).stdout
    assert "finding: loop: VA 0x0000008000000000" in text
    assert run("dump", *source, "--style", "linux").exit_code == 2


# A booted kernel.


@pytest.mark.kernels
@pytest.mark.qemu
def test_a_booted_kernel_is_dumped_as_linux_dumps_it() -> None:
    """Judge of the same text: the kernel's own ptdump_walk (tests/emu/test_ptdump_booted.py)."""
    from emu.checks.ptdump_booted import Ours, Theirs

    snapshot = booted(FAST)
    text = run("dump", snapshot.path, "--style", "linux")
    assert text.exit_code == 0, text.output
    assert text.stdout == Theirs(snapshot, Ours(snapshot).markers).dump().text


@pytest.mark.kernels
@pytest.mark.qemu
def test_find_gives_both_addresses_of_a_vmalloc_page_and_diff_both_ranges() -> None:
    snapshot = booted(FAST)
    machine = snapshot.machine()
    va = machine.call("vmalloc", 8192).ok().value
    before = listing(machine.memory, machine.registers())
    assert machine.call("set_memory_ro", va, 2).ok().value == 0
    after = listing(machine.memory, machine.registers())
    changes = diff(before, after)
    linear = machine.plan.linear_va(int(before.runs.pa[before.at(va)]))
    assert len(changes) == 2, [change_text(before, change) for change in changes]
    assert {change.va for change in changes} == {va, linear} or len({change.size for change in changes}) == 1
    assert all(change.kind == "changed" and change.fields[0][0] in ("AP", "DBM") for change in changes)
    assert {alias.va for alias in aliases(before, int(before.runs.pa[before.at(va)]))} == {va, linear}


@pytest.mark.kernels
@pytest.mark.qemu
def test_the_rows_of_a_booted_kernel_are_its_leaves() -> None:
    snapshot = booted(FAST)
    rows = answer("dump", snapshot.path)["rows"]
    with open_source(str(snapshot.path)) as source:
        assert source.registers
        found = listing(source.memory, source.registers)
    assert [int(row["va"], 16) for row in rows] == found.runs.va.tolist()
    assert sum(row["leaves"] for row in rows) == int(found.runs.leaves.sum()) > 60_000
    assert np.all(np.diff(found.runs.va.astype(object)) > 0)
    totals = answer("dump", snapshot.path, "--totals")["totals"]
    assert totals["leaves"] == sum(kind["leaves"] for kind in totals["kinds"])
    assert totals["table_bytes"] == totals["tables"] * 4096
    assert not answer("dump", snapshot.path, "--where", "W and X")["rows"]
    roots = answer("find", snapshot.path, "--roots")["found"]
    assert int(roots[0]["pa"], 0) == snapshot.registers.TTBR1_EL1 & 0xFFFF_FFFF_F000
    assert [root["score"] for root in roots] == sorted((root["score"] for root in roots), reverse=True)
    word = answer("find", snapshot.path, "--table", f"{snapshot.registers.TTBR1_EL1 & 0xFFFF_FFFF_F000:#x}")["found"]
    assert [entry["kind"] for entry in word] == ["root"]
