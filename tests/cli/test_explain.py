"""`pgtable explain`: what it prints, as text and as JSON, what it refuses, how fast it is, what it loads.

The examples of docs/explain.md are run and compared.
"""

from __future__ import annotations

import json
import random
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # its types are a package of their own
import pytest
from click.testing import CliRunner, Result

from emu.cli import cli, main
from pgtable.describe_registers import KNOWN
from tests.pgtable.hand import SEED

DOCS = Path(__file__).resolve().parents[2] / "docs"
COMMAND = Path(sys.executable).with_name("pgtable")
HEAVY = {"unicorn", "capstone", "elftools", "rich", "drgn", "qemu", "emu.machine", "emu.image"}
LIMIT = 0.5  # seconds of CPU for an answer, the start of Python included: others may use the machine


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["explain", *args])


def lines(*args: str) -> list[str]:
    result = run(*args)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout.splitlines()


def joined(*args: str) -> str:
    """The text with every run of white space as one space."""
    return " ".join(" ".join(lines(*args)).split())


def parsed(*args: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*args, "--json").stdout)
    schema = json.loads((DOCS / "schema" / "explain.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(found)
    assert next(iter(found)) == "schema"
    return found


# What it prints.


def test_the_examples_of_the_docs_are_what_it_prints() -> None:
    blocks = re.findall(r"```console\n\$ pgtable explain ([^\n]*)\n(.*?)```", (DOCS / "explain.md").read_text(), re.S)
    assert len(blocks) == 3
    for arguments, shown in blocks:
        assert run(*arguments.split()).stdout == shown


def test_the_docs_and_the_help_name_every_option() -> None:
    text, shown = (DOCS / "explain.md").read_text(), run("--help").stdout
    options = set(re.findall(r"--[a-z0-9]+", shown)) - {"--help"}
    assert len(options) == 13
    assert {option for option in options if f"`{option}" not in text} == set()
    assert "pgtable explain ESR_EL1=0x96000047 FAR_EL1=" in shown


def test_a_bare_word_of_16_digits_is_the_same_as_one_with_0x() -> None:
    assert lines("00e8000040000f03") == lines("0x00e8000040000f03") == lines("0xE8000040000F03")


def test_options_reach_the_explanation() -> None:
    title = lines("0x00e8000040000703", "--level", "2", "--granule", "16k", "--ds", "--regime", "EL20")[0]
    assert title.endswith("table, level 2, 16K granule, DS=1, stage 1 of EL2&0")
    stage2 = lines("0x400007d3", "--level", "3", "--stage", "2", "--fwb")
    said = joined("0x400007d7", "--level", "3", "--stage", "2", "--fwb")
    assert "memory Normal non-cacheable, or stage 1's Device type" in said
    assert "stage 2 of EL1&0" in stage2[0]
    assert any("Device-nGnRE" in line for line in lines("0x00e8000040000703", "--mair", "0x04"))
    assert any(line.startswith("access    EL1 rw-  EL0 ---") for line in lines("00e8000040000783", "--tcr", HA_HD))
    assert "VA 0xffff800000001234 to PA 0x0000000040000234" in joined(PAGE, "--va", VA)
    assert any(line.startswith("access    EL1 r--") for line in lines(PAGE, "--table", "0x4000000041000003"))
    assert lines("0x3", "--ds", "--level", "-1")[0].endswith("table, level -1, 4K granule, DS=1, stage 1 of EL1&0")


PAGE, VA = "00e8000040000703", "0xffff800000001234"
HA_HD = f"{1 << 39 | 1 << 40 | 2 << 30 | 5 << 32 | 16 << 16 | 16:#x}"


def test_registers_beside_words_count_and_are_not_explained() -> None:
    shown = lines("00c8000040000703", "SCTLR_EL1=0x81005")
    assert any(line.startswith("access    EL1 rw-") for line in shown)
    assert not [line for line in shown if line.startswith("SCTLR")]
    assert any(line.startswith("access    EL1 rwx") for line in lines("00c8000040000703"))
    both = lines(PAGE, "ESR_EL1=0x96000047", "FAR_EL1=0x1000")
    assert [line[:7] for line in both if line.startswith("ESR_EL1 =")] == ["ESR_EL1"]
    assert "whatever stage 1 says" in joined("0x400007db", "--stage", "2", "HCR_EL2=0x400080000000")


def test_words_are_compared_and_so_are_two_values_of_a_register() -> None:
    shown = lines(PAGE, "00e8000040000783", "00e8000040000f03")
    assert [line.split()[2] for line in shown if line.startswith("* ")] == ["nG", "AP"]
    assert lines("PAN=1")[0] == "PAN = 0x0000000000000001  privileged access never (PSTATE)"
    shown = lines("tcr_el1=0x10", "TCR_EL1=25")
    assert [line.split()[2] for line in shown if line.startswith("* ")] == ["T0SZ"]
    found = parsed(PAGE, "00e8000040000783")
    assert found["differences"] == {"AP": ["0x0", "0x2"]}
    assert parsed(PAGE, "0000000041000003")["differences"]["AP"] == ["0x0", None]


OOPS = "[ffff800080a0b000] pgd=0000000000000000, p4d=10000000432a1003, pud=18000000432a2003, pmd=10000000432a3003, {}"


def test_the_line_of_an_oops_is_taken_as_it_is() -> None:
    shown = lines(OOPS.format("pte=00c800004321b703"))
    assert [line.split()[0] for line in shown[:3]] == ["L0", "L1", "L2"]
    assert "at most EL1 rw- EL0 rw-" in shown[1]
    assert any(line.startswith("access    EL1 rw-  EL0 ---") for line in shown), "PXNTable of the pud counts"
    found = parsed(*OOPS.format("pte=0000000000000000").split())
    assert [place["descriptor"]["level"] for place in found["tables"]] == [0, 1, 2]
    assert found["words"][0]["descriptor"]["kind"] == "invalid"
    wide = parsed(OOPS.format("pte=0").replace("pte=0", "pte=0000000000000000"), "--ds")
    assert [place["descriptor"]["level"] for place in wide["tables"]] == [-1, 0, 1, 2]
    assert parsed("pgd=0000000000000000")["words"][0]["descriptor"]["level"] == 0
    block = parsed("[ffff000040000000] pgd=1000000043a01003, p4d=1000000043a01003, pud=00e8000040000701")
    assert (block["words"][0]["descriptor"]["kind"], block["words"][0]["descriptor"]["level"]) == ("block", 1)
    big = parsed(
        "[ffff000040000000] pgd=1000000043a01003 p4d=1000000043a01003 pud=1000000043a01003 pmd=0000000000000000",
        "--granule",
        "64k",
    )
    assert [place["descriptor"]["level"] for place in big["tables"]] == [1]


def test_linux_names_are_there_with_a_kernel_only() -> None:
    assert "[PTE_DIRTY]" in joined(PAGE, "--kernel", "6.12")
    assert "PTE_" not in joined(PAGE)
    assert "swap entry, level 3" in lines("0x40000700", "--level", "3", "--kernel", "6.12")[0]


# JSON.


def test_any_word_and_any_register_is_valid_json() -> None:
    rng = random.Random(f"{SEED} json")
    for _ in range(60):
        word = rng.getrandbits(64) & rng.choice((~0, rng.getrandbits(64)))
        level = [] if rng.getrandbits(1) else ["--level", str(rng.randrange(1, 4))]
        asked = [*level, "--granule", rng.choice(("4k", "16K", "64k")), "--stage", rng.choice("12")]
        found = parsed(f"{word:016x}", *asked)["words"][0]
        assert found["word"] == f"{word:#018x}"
        total = sum(1 for field in found["fields"] for _ in field["bits"].split(","))
        assert total >= 10
        parsed(f"{word:#x}", "--kernel", rng.choice(("6.1", "6.12", "7.x")))
    for name in KNOWN:
        value = rng.getrandbits(64)
        found = parsed(f"{name}={value:#x}")["words"][0]
        assert (found["register"], found["word"], found["descriptor"]) == (name, f"{value:#018x}", None)


# What it refuses.


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("zz",), "word zz: not a number (0x..., or 16 hex digits)"),
        (("123",), "word 123: not a number (0x..., or 16 hex digits)"),
        (("0x",), "word 0x: not a number (0x..., or 16 hex digits)"),
        (("0x_",), "word 0x_: not a number (0x..., or 16 hex digits)"),
        (("00e8000040000f0",), "word 00e8000040000f0: not a number"),
        (("0x1_0000_0000_0000_0000",), "word 0x1_0000_0000_0000_0000: has 65 bits, and there are 64"),
        (("00e8000040000f0300",), "word 00e8000040000f0300: not a number"),
        (("-5",), "No such option '-5'."),
        (("--", "-0x5"), "word -0x5: not a number"),
        ((PAGE, "--level", "4"), "level 4: the 4K granule has levels 0 to 3"),
        ((PAGE, "--level", "-1"), "level -1: the 4K granule has levels 0 to 3"),
        ((PAGE, "--level", "0", "--granule", "64k"), "level 0: the 64K granule has levels 1 to 3"),
        ((PAGE, "--level", "x"), "Invalid value for '--level': 'x' is not a valid integer."),
        ((PAGE, "--granule", "8k"), "granule 8k: must be 4K, 16K or 64K"),
        (("TCR_EL1=0", "--granule", "8k"), "granule 8k: must be 4K, 16K or 64K"),
        ((PAGE, "--stage", "3"), "stage 3: must be 1 or 2"),
        ((PAGE, "--regime", "EL9"), "regime EL9: must be EL10, EL20, EL2, EL3"),
        ((PAGE, "--kernel", "5.4"), "model 5.4: there is none, only 6.1, "),
        ((PAGE, "--kernel", "6.1", "--stage", "2"), "Linux names the descriptors of its own tables only"),
        ((PAGE, "--mair", "q"), "MAIR_EL1 q: not a number"),
        ((PAGE, "--va", "-1"), "VA -1: not a number"),
        ((PAGE, "--table", "q"), "table q: not a number"),
        (("FOO=1",), "register FOO: there is none, only CONTEXTIDR_EL1, "),
        (("=1",), "register : there is none, only "),
        (("TCR_EL1=",), "TCR_EL1 : not a number"),
        (("TCR_EL1=-1",), "TCR_EL1 -1: not a number"),
        (("TCR_EL1=0x10000000000000000",), "TCR_EL1 0x10000000000000000: has 65 bits, and there are 64"),
        (
            ("0x3", "pte=0000000000000003"),
            "word 0x0000000000000003: cannot be given beside pgd=, p4d=, pud=, pmd=, pte=",
        ),
        (("pte=0",), "pte 0: not a number"),
        ((), "Missing argument 'WORD|REGISTER=VALUE...'."),
        ((" ",), "there is nothing to explain"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_input_is_one_sentence_and_2(
    args: tuple[str, ...], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pgtable", "explain", *args])
    with pytest.raises(SystemExit) as stopped:
        main()
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.out) == (2, "")
    assert printed.err.startswith(f"pgtable: error: {sentence}")
    assert printed.err.count("\n") == 1


# Speed, and what is loaded.


def test_an_answer_takes_half_a_second_at_most() -> None:
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([COMMAND, "explain", PAGE, "--kernel", "7.x"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < LIMIT, seconds


@pytest.mark.parametrize("args", [[PAGE], [PAGE, "--kernel", "7.x"], ["ESR_EL1=0x96000047"]])
def test_nothing_heavy_is_loaded(args: list[str]) -> None:
    code = f"import sys; from emu.cli import cli; cli(['explain', *{args}], standalone_mode=False); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.splitlines()[-1].split()) & HEAVY == set()


def test_a_terminal_without_unicode_gets_a_plain_figure() -> None:
    done = subprocess.run(
        [COMMAND, "explain", PAGE], capture_output=True, check=True, env={"PYTHONIOENCODING": "ascii", "PATH": "/bin"}
    )
    assert done.stdout.isascii()
    assert b"|0|0 0 0|0|" in done.stdout
