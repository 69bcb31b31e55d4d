"""The commands for gdb: with a made-up gdb, whose answers are told, and with a real one that holds a booted kernel."""

from __future__ import annotations

import ast
import json
import re
import shlex
import shutil
import socket
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from emu.cli import cli
from emu.cli_gdb import script
from emu.sources import SourceError, open_source
from emu.sources.parent import AT_ONCE, VARIABLE, Parent, ParentMemory
from pgtable import NoMemory, PhysicalMemory
from pgtable.leaves import leaves
from pgtable.memory import PAGE
from tests.emu.dumps import RAM, Guest, guest, registers_of
from tests.emu.fakes import mtree
from tests.judged.test_sources import Booted, booted, some_vas
from tests.kernels import lack

COMMANDS = ("audit", "diff", "dump", "explain", "find", "map", "walk")


class Value(int):
    """gdb.Value of a number, or of nothing."""

    def __new__(cls, number: int | None) -> Value:
        made = super().__new__(cls, number or 0)
        made.type = types.SimpleNamespace(code="void" if number is None else "int")
        return made

    type: types.SimpleNamespace


class FakeGdb(types.ModuleType):
    """As much of the module gdb as the script uses. `packets`: all that were sent; `out`, `err`: what was written."""

    STDERR, COMMAND_DATA, COMPLETE_SYMBOL, COMPLETE_COMMAND, TYPE_CODE_VOID = 1, 0, 1, 2, "void"

    class error(RuntimeError):  # noqa: N801, N818 - gdb's names
        pass

    class MemoryError(error):
        pass

    class GdbError(Exception):
        pass

    def __init__(self, memory: PhysicalMemory, registers: dict[str, int]) -> None:
        super().__init__("gdb")
        self.memory = memory
        self.values = {f"${name}": value for name, value in registers.items()}
        self.commands: dict[str, Any] = {}
        self.packets: list[str] = []
        self.mode, self.modes = "0", True
        self.out, self.err = "", ""
        self.code: int | None = None
        self.running: bool | None = False
        self.fails: Callable[[int], None] = lambda pa: None
        self.batches: list[int] = []
        fake = self

        class Command:
            def __init__(self, name: str, *_: Any) -> None:
                fake.commands[name] = self

        self.Command = Command
        self.string_to_argv = shlex.split

    def execute(self, line: str, to_string: bool = False) -> str:
        if line == "monitor info mtree -f":
            return mtree(self.memory)
        if line.startswith("info symbol "):
            return "banner + 16 in section .rodata\n" if int(line[12:], 0) & 0xFFF == 16 else "No symbol matches.\n"
        packet = line.removeprefix("maintenance packet ")
        assert packet != line, line
        self.packets.append(packet)
        answer = self.mode
        if packet.startswith("Qqemu"):
            self.mode, answer = (packet[-1], "OK") if self.modes else (self.mode, "")
            self.batches.append(0)
        return f'sending: {packet}\nreceived: "{answer}"\n'

    def parse_and_eval(self, text: str) -> Value:
        if text == "&'banner'":
            return Value(guest().linear)
        if text.startswith("$"):
            return Value(self.values.get(text))
        raise self.error(f"No symbol {text}\nin current context.")

    def selected_thread(self) -> Any:
        return None if self.running is None else types.SimpleNamespace(is_running=lambda: self.running)

    def selected_inferior(self) -> FakeGdb:
        return self

    def read_memory(self, pa: int, n: int) -> memoryview:
        assert self.mode == "1"
        self.batches[-1] += 1
        self.fails(pa)
        return memoryview(self.memory.read(pa, n))

    def parameter(self, name: str) -> Any:
        return {"width": 100, "style enabled": True}[name]

    def write(self, text: str, stream: int = 0) -> None:
        if stream == self.STDERR:
            self.err += text
        else:
            self.out += text

    def set_convenience_variable(self, name: str, value: int) -> None:
        assert name == "_pgtable"
        self.code = value

    def run(self, command: str, words: str) -> str:
        """What a command prints."""
        self.out, self.err, self.code, self.batches = "", "", None, []
        self.commands[f"pgtable {command}"].invoke(words, False)
        return self.out


@pytest.fixture
def made() -> Guest:
    return guest()


@pytest.fixture
def gdb(made: Guest, monkeypatch: pytest.MonkeyPatch) -> FakeGdb:
    """With the script; SCTLR_EL1 has the name that older QEMUs give it."""
    values = dict(registers_of(made).as_dict())
    names = {"SCTLR": "SCTLR_EL1", **{n: n for n in ("TCR_EL1", "TTBR0_EL1", "TTBR1_EL1", "MAIR_EL1")}}
    fake = FakeGdb(made.memory, {name: values[full] for name, full in names.items()})
    monkeypatch.setitem(sys.modules, "gdb", fake)
    exec(compile(script(), "pgtable.py", "exec"), {})
    return fake


@pytest.fixture
def file(tmp_path: Path, made: Guest) -> list[str]:
    """The same guest for the command line."""
    (tmp_path / "ram").write_bytes(made.content)
    values = registers_of(made).as_dict()
    (tmp_path / "regs").write_text(json.dumps({name: hex(value) for name, value in values.items()}))
    return [f"raw:{tmp_path}/ram@{RAM}", "--regs", f"{tmp_path}/regs"]


def line(*args: str) -> str:
    return CliRunner().invoke(cli, list(args)).stdout


def test_the_script_is_plain_python_of_any_gdb() -> None:
    """Python 3.6 syntax, the standard library only, nothing left in gdb's namespace."""
    outer = ast.parse(script(), feature_version=(3, 6))
    text = next(node.value for node in ast.walk(outer) if isinstance(node, ast.Constant) and len(str(node.value)) > 999)
    tree = ast.parse(str(text), feature_version=(3, 6))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in modules} - sys.stdlib_module_names == {"gdb"}
    assert f"\nPYTHON = {sys.executable!r}  #" in script()
    assert [type(node) for node in outer.body] == [ast.Expr]


@pytest.mark.parametrize("words", [["walk", "{va}"], ["dump"], ["dump", "--totals"], ["find", "--pa", "{pa}"]])
def test_in_gdb_a_command_prints_what_it_prints_for_a_dump(
    gdb: FakeGdb, made: Guest, file: list[str], words: list[str]
) -> None:
    """Judge: the command line on a file with the same RAM."""
    name, *rest = [word.format(va=hex(made.linear + 0x2008), pa=hex(RAM + 0x3000)) for word in words]
    assert gdb.run(name, shlex.join(rest)) == line(name, *file, *rest) != ""
    assert (gdb.code, gdb.err, gdb.mode) == (0, "", "0")
    assert max(gdb.batches) <= AT_ONCE
    assert sum(1 for n in gdb.batches if n) < sum(gdb.batches) or name == "walk"  # pages come together


def test_words_are_explained_and_verdicts_kept(gdb: FakeGdb) -> None:
    assert gdb.run("explain", "TCR_EL1=$TCR_EL1") == line("explain", f"TCR_EL1={int(gdb.values['$TCR_EL1']):#x}")
    assert gdb.packets == []
    assert "verdict" in gdb.run("audit", "")
    assert gdb.code == 1


def test_symbols_and_expressions_are_gdbs(gdb: FakeGdb, made: Guest) -> None:
    gdb.values["$pc"] = made.linear + 0x2008
    assert gdb.run("walk", "$pc").startswith(f"VA {made.linear + 0x2008:#018x}: ")
    text = gdb.run("walk", "banner+0x1010")
    assert text.startswith(f"VA {made.linear + 0x1010:#018x}: ")
    assert text.splitlines()[0].endswith("(banner+0x10)")
    assert gdb.run("dump", "--totals --reg TTBR1_EL1=$SCTLR --json").count('"no memory"') == 1
    gdb.values["$SCTLR"] = 0
    assert "= PA 0x1000 " in gdb.run("walk", "0x1000")  # off: no translation


def refused(gdb: FakeGdb, command: str, words: str) -> str:
    with pytest.raises(gdb.GdbError) as error:
        gdb.run(command, words)
    assert str(error.value).count("pgtable: error: ") == 1
    assert "\n" not in str(error.value)
    assert "Traceback" not in gdb.err
    assert gdb.mode == "0"
    return str(error.value).removeprefix("pgtable: error: ")


def test_errors_are_one_sentence(gdb: FakeGdb, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused(gdb, "walk", "nowhere") == "VA nowhere: neither a number nor a symbol"
    assert gdb.code == 2
    assert refused(gdb, "walk", "&nowhere") == "&nowhere: No symbol &nowhere in current context."
    assert refused(gdb, "walk", "0 --bad").startswith("No such option")
    gdb.modes = False
    assert refused(gdb, "walk", "0xffff000000000000") == "the stub does not read physical memory, as QEMU's does"
    gdb.running = True
    assert refused(gdb, "dump", "") == "the guest is running: interrupt it first"
    gdb.running = None
    assert refused(gdb, "dump", "") == "gdb holds no guest: use `target remote HOST:PORT` first"
    gdb.running = False
    del gdb.values["$TCR_EL1"]
    assert refused(gdb, "dump", "").startswith("the debugger gives no system registers")


def test_an_installation_that_has_gone_is_told(made: Guest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, message in (("PYTHON", "cannot be run"), ("MODULES", "is not in")):
        fake = FakeGdb(made.memory, {})
        monkeypatch.setitem(sys.modules, "gdb", fake)
        text = re.sub(rf"(?m)^{name} = '.*?'", f"{name} = '{tmp_path}/none'", script())
        exec(compile(text, "pgtable.py", "exec"), {})
        assert message in refused(fake, "explain", "0x1")


def test_the_mode_is_put_back_after_an_interruption_and_memory_that_is_missing(gdb: FakeGdb, made: Guest) -> None:
    def interrupted(pa: int) -> None:
        raise KeyboardInterrupt

    def missing(pa: int) -> None:
        raise gdb.MemoryError("Cannot access memory")

    gdb.fails = interrupted
    with pytest.raises(KeyboardInterrupt):
        gdb.run("dump", "")
    assert gdb.packets[-2:] == ["Qqemu.PhyMemMode:1", "Qqemu.PhyMemMode:0"]
    gdb.fails = missing
    assert "external abort" in gdb.run("walk", hex(made.linear))
    gdb.fails = lambda pa: None
    assert "= PA 0x40000000" in gdb.run("walk", hex(made.linear))
    gdb.mode = "1"  # the user's own choice
    gdb.run("walk", hex(made.linear))
    assert gdb.mode == "1"


class FakeParent(Parent):
    """Has every second page of 512, each full of its own number."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def ask(self, *words: str) -> bytes:
        if words == ("ranges",):
            return mtree(PhysicalMemory((RAM, 512 * PAGE))).replace("\r", "").encode()
        self.asked.append(len(words) - 1)
        numbers = [(int(pa, 16) - RAM) // PAGE for pa in words[1:]]
        return b"".join(b"\0" if n % 2 else b"\1" + n.to_bytes(8, "little") * (PAGE // 8) for n in numbers)


def test_pages_come_together_and_missing_ones_are_missing() -> None:
    parent = FakeParent()
    memory = ParentMemory(parent)
    pas = np.arange(RAM - PAGE, RAM + 300 * PAGE, PAGE, dtype=np.uint64)
    words, there = memory.gather(pas)
    assert there.tolist() == [False, *(n % 2 == 0 for n in range(300))]
    assert words[there].tolist() == list(range(0, 300, 2))
    assert parent.asked == [AT_ONCE] * (300 // AT_ONCE) + [300 % AT_ONCE]
    assert memory.gather(pas)[1].tolist() == there.tolist()
    assert sum(parent.asked) == 300  # each once
    with pytest.raises(NoMemory):
        memory.fetch(RAM + 501 * PAGE)


def test_the_source_of_the_child_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("", "x", "99"):
        monkeypatch.setenv(VARIABLE, value)
        with pytest.raises(SourceError, match="parent:gdb is for the script of `pgtable gdb-script` only"):
            open_source("parent:gdb")
    ours, theirs = socket.socketpair()
    ours.close()
    monkeypatch.setenv(VARIABLE, str(theirs.detach()))
    with pytest.raises(SourceError, match="the debugger that started this command is gone"):
        open_source("parent:gdb")


def test_the_command_writes_where_it_is_told(tmp_path: Path) -> None:
    assert line("gdb-script") == script()
    assert CliRunner().invoke(cli, ["gdb-script", "-o", f"{tmp_path}/p.py"]).exit_code == 0
    assert (tmp_path / "p.py").read_text() == script()
    for name, message in (("p", "must end in .py"), ("none/p.py", "No such file")):
        wrong = CliRunner().invoke(cli, ["gdb-script", "-o", f"{tmp_path}/{name}"])
        assert (wrong.exit_code, wrong.stdout) == (2, "")
        assert message in wrong.stderr


# a real gdb


def in_gdb(vm: Booted, folder: Path, *commands: str) -> list[str]:
    """What a real gdb prints for each of the commands, and for what was written on its stderr."""
    program = shutil.which("gdb-multiarch") or lack("gdb", "gdb-multiarch is missing: install that Debian package")
    (folder / "pgtable.py").write_text(script())
    lines = ["set confirm off", f"target remote 127.0.0.1:{vm.port}", f"source {folder}/pgtable.py", *commands]
    args = [arg for each in lines for arg in ("-ex", f"echo @@{each.split()[0]}\\n", "-ex", each)]
    done = subprocess.run([program, "-nx", "-batch", *args], capture_output=True, text=True, check=False, timeout=200)
    assert "Traceback" not in done.stderr
    parts = re.split(r"@@\w+\n", done.stdout)[4:]
    assert len(parts) == len(commands), done.stdout + done.stderr
    parts[-1] = re.sub(r"\[Inferior .* detached\]\n", "", parts[-1])
    return [*parts, done.stderr]


@pytest.fixture(scope="module")
def vm() -> Any:
    with booted("debian:6.12", "cortex-a57") as one:
        one.watch.ask("stop")
        yield one


@pytest.mark.full
@pytest.mark.qemu
@pytest.mark.kernels
def test_a_real_gdb_answers_as_the_command_line_and_qemu(vm: Booted, tmp_path: Path, rng: Any) -> None:
    """Judges: `pgtable walk gdb:HOST:PORT`, and QEMU's gva2gpa, of the same guest."""
    regs = vm.registers
    with open_source(vm.words[1]) as source, source.reading():
        truth = leaves(source.memory, regs)
    vas = [hex(va) for va in some_vas(rng, truth, 200)]
    dump = ["dump", "--half", "upper"]
    walked, listed, mode, _ = in_gdb(
        vm,
        tmp_path,
        f"pgtable walk {' '.join(vas)}",
        f"pgtable {' '.join(dump)}",
        "maintenance packet qqemu.PhyMemMode",
    )
    assert walked == line("walk", vm.words[1], *vas)
    assert listed == line(dump[0], vm.words[1], *dump[1:])
    assert 'received: "0"' in mode
    vm.watch.ask("stop")
    mapped = 0
    for va, text in zip(vas, walked.split("\n\n"), strict=True):
        ours = re.search(r"= PA (0x[0-9a-f]+)", text)
        theirs = re.search("gpa: (0x[0-9a-f]+)", vm.watch.monitor(f"gva2gpa {va}"))
        assert (ours and int(ours[1], 0)) == (theirs and int(theirs[1], 0)), text
        mapped += bool(ours)
    assert 50 < mapped < 190


@pytest.mark.full
@pytest.mark.qemu
@pytest.mark.kernels
def test_symbols_errors_and_pipes_of_a_real_gdb(vm: Booted, tmp_path: Path) -> None:
    assembler, linker = (shutil.which(f"aarch64-linux-gnu-{name}") for name in ("as", "ld"))
    if not assembler or not linker:
        pytest.skip("aarch64-linux-gnu-as is not installed")
    regs = vm.registers
    with open_source(vm.words[1]) as source, source.reading():
        found = leaves(source.memory, regs)
        va = int(found.va[-1])
    (tmp_path / "s.s").write_text('.section .rodata,"a"\n.globl linux_banner\nlinux_banner: .skip 256\n')
    subprocess.run([assembler, "s.s", "-o", "s.o"], cwd=tmp_path, check=True)
    subprocess.run([linker, f"--section-start=.rodata={va:#x}", "-e0", "s.o", "-o", "s"], cwd=tmp_path, check=True)
    symbol, register, piped, tcr, names, code, helped, errors = in_gdb(
        vm,
        tmp_path,
        f"python gdb.execute('symbol-file {tmp_path}/s'); gdb.execute('pgtable walk linux_banner+0x10')",
        "pgtable walk $pc --fetch",
        "pipe pgtable dump | wc -l",
        "pgtable explain TCR_EL1=$TCR_EL1",
        "python print(sorted({n for n in dir() if 'pgtable' in n or n == 'COMMANDS'}))",
        "p $_pgtable",
        "help pgtable",
    )
    assert f"VA {va + 16:#018x}: " in symbol
    assert "(linux_banner+0x10)\n" in symbol
    assert "= PA 0x4" in register
    assert int(piped) > 20
    assert tcr.startswith(f"TCR_EL1 = {vm.registers.TCR_EL1:#018x}")
    assert names == "[]\n"  # gdb's namespace has none of ours
    assert code == "$1 = 0\n"
    assert re.findall(r"(?m)^pgtable (\w+) --", helped) == list(COMMANDS)
    assert "error" not in errors
    assert "neither a number nor a symbol" in in_gdb(vm, tmp_path, "pgtable walk nowhere", "p $_pgtable")[-1]
