"""The command itself: help, exit codes, bad kernels, what it imports, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from emu.cli import COMMANDS, cli
from tests.emu import synthetic
from tests.kernels import kernel_path

COMMAND = Path(sys.executable).with_name("pgtable")
NEEDED = "an arm64 kernel is needed"


def pgtable(*args: str) -> subprocess.CompletedProcess[str]:
    """The console script, in a process of its own."""
    return subprocess.run([COMMAND, *args], capture_output=True, text=True, check=False, timeout=120)


def paths() -> Iterator[tuple[str, ...]]:
    """Every command, by the words that call it."""
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        yield (name,)
        if isinstance(command, click.Group):
            yield from ((name, sub) for sub in command.commands)


# help


@pytest.mark.parametrize("path", list(paths()), ids=" ".join)
def test_every_command_has_help_that_describes_each_option(path: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli, [*path, "--help"], prog_name="pgtable")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Usage: pgtable {' '.join(path)} ")
    command: click.Command | None = cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.get_command(click.Context(command), name)
    assert command
    assert command.help
    assert isinstance(command, click.Group) or f"  pgtable {' '.join(path)}" in result.stdout.split("Example")[-1]
    assert all(option.help for option in command.params if isinstance(option, click.Option))
    assert CliRunner().invoke(cli, [*path, "-h"]).exit_code == 0


def test_the_list_of_commands_says_what_each_does() -> None:
    result = CliRunner().invoke(cli, ["--help"])
    assert result.exit_code == 0
    for name in COMMANDS:
        assert f"\n  {name} " in result.stdout


def test_the_version_is_the_packages() -> None:
    result = pgtable("--version")
    assert (result.returncode, result.stdout) == (0, f"pgtable, version {version('pgtable')}\n")


# exit code 2

WRONG = {
    "unknown command": (("exlpain",), "No such command 'exlpain'."),
    "unknown option": (("--colour",), "No such option '--colour'."),
    "unknown option of a command": (("check", "set_memory_valid", "--kernle", "x"), "No such option '--kernle'."),
    "no kernel": (("check", "set_memory_valid"), "check: give --kernel KERNEL"),
    "no function": (("call", "--kernel", "x"), "Missing argument 'FUNCTION'."),
    "not a number": (
        ("check", "set_memory_valid", "--kernel", "x", "--pages", "four"),
        "Invalid value for '--pages': 'four'",
    ),
    "out of range": (
        ("check", "set_memory_valid", "--kernel", "x", "--enable", "2"),
        "Invalid value for '--enable': 2 is not in the range",
    ),
    "unknown subcommand": (("kernel", "fecth"), "No such command 'fecth'."),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_command_line_is_one_sentence_and_exit_code_2(case: str) -> None:
    args, sentence = WRONG[case]
    result = pgtable(*args)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith(f"pgtable: error: {sentence}")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("args", [(), ("kernel",)])
def test_a_group_without_a_command_shows_its_help_on_stderr(args: tuple[str, ...]) -> None:
    result = pgtable(*args)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("Usage: pgtable")


@pytest.fixture
def bad_kernel(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A file, or none, that is not a kernel to run."""
    path = tmp_path / "vmlinuz"
    match request.param:
        case "garbage":
            path.write_bytes(bytes(range(7, 256)) * 400)
        case "empty":
            path.write_bytes(b"")
        case "truncated":
            path.write_bytes(kernel_path("debian:6.1").read_bytes()[:3_000_000])
        case "x86":
            path.write_bytes(synthetic.elf([(0x400000, bytes(4096))], machine=62))
        case "directory":
            path.mkdir()
        case "unknown name":
            return "debian:six"
    return str(path)


BAD = {
    "garbage": f"vmlinuz is no kernel image of a known kind; {NEEDED}",
    "empty": f"vmlinuz is empty; {NEEDED}",
    "truncated": "vmlinuz is a truncated arm64 Image: 3000000 of ",
    "x86": f"vmlinuz is an ELF file for X86_64; {NEEDED}",
    "directory": f"vmlinuz is a directory; {NEEDED}",
    "missing": f"vmlinuz does not exist; {NEEDED}",
    "unknown name": "'debian:six' is not of the form debian:VERSION[-FLAVOUR]",
}
COMMANDS_WITH_KERNEL = {
    "check": ("check", "set_memory_valid", "--kernel"),
    "call": ("call", "strlen", "0", "--kernel"),
    "info": ("kernel", "info"),
}


@pytest.mark.parametrize("command", COMMANDS_WITH_KERNEL)
@pytest.mark.parametrize(
    ("bad_kernel", "sentence"),
    [pytest.param(k, v, marks=pytest.mark.kernels if k == "truncated" else (), id=k) for k, v in BAD.items()],
    indirect=["bad_kernel"],
)
def test_what_is_no_kernel_is_one_sentence_and_exit_code_2(bad_kernel: str, sentence: str, command: str) -> None:
    result = pgtable(*COMMANDS_WITH_KERNEL[command], bad_kernel)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("pgtable: error: ")
    assert sentence in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


# a real one


@pytest.mark.kernels
def test_the_installed_command_checks_a_kernel() -> None:
    kernel_path("debian:6.12")
    right = pgtable("check", "set_memory_valid", "--kernel", "debian:6.12", "--json")
    assert (right.returncode, right.stderr) == (0, "")
    assert json.loads(right.stdout)["differences"] == []
    wrong = pgtable("check", "set_memory_valid", "--kernel", "debian:6.12", "--model", "7.x")
    assert (wrong.returncode, wrong.stderr) == (1, "")
    stopped = pgtable("call", "strlen", "0x10", "--kernel", "debian:6.12")
    assert (stopped.returncode, stopped.stderr) == (1, "")


@pytest.mark.kernels
def test_a_reader_that_goes_away_is_no_error() -> None:
    path = kernel_path("debian:6.1")
    line = f"'{COMMAND}' check set_memory_valid --kernel '{path}' --pages 3000 --json | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, timeout=120)
    assert (done.stdout, done.stderr) == ("{\n", "")


@pytest.mark.kernels
def test_ctrl_c_ends_with_130_and_one_line() -> None:
    path = kernel_path("debian:6.1")
    args = [COMMAND, "check", "set_memory_valid", "--kernel", str(path), "--pages", "28000"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while "libunicorn" not in Path(f"/proc/{process.pid}/maps").read_text():
            time.sleep(0.01)  # by the clock, a fast machine would have printed and a slow one not begun
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.strip() == "pgtable: interrupted"


# imports

LOADED = """
import sys
from emu import cli
try:
    cli.main()
finally:
    print(sorted({"unicorn", "capstone", "numpy", "elftools", "rich"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("args", [("--help",), ("--version",), ()], ids=["--help", "--version", "nothing"])
def test_help_loads_no_engine_no_disassembler_no_numpy(args: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", LOADED, *args], capture_output=True, text=True, check=False)
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("args", [("kernel", "list"), ("check", "--help"), ("call", "--help"), ("kernel", "--help")])
def test_commands_that_run_nothing_load_no_engine(args: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", LOADED, *args], capture_output=True, text=True, check=True)
    assert "unicorn" not in done.stderr.splitlines()[-1]
    assert "capstone" not in done.stderr.splitlines()[-1]
    assert "numpy" not in done.stderr.splitlines()[-1]
