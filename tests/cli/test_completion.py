"""`pgtable completion`: the words by click's own interface, and what a real bash and fish make of the scripts."""

from __future__ import annotations

import ast
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.shell_completion import get_completion_class
from click.testing import CliRunner

from emu.cli import COMMANDS, cli
from emu.cli_completion import Bash, register
from emu.cli_explain import explain

BIN = Path(sys.executable).parent
TAB, SHOW, CLEAR = b"\t", b"\x18s", b"\x15"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with three kernels, and a folder to work in with files."""
    kernels = tmp_path / "cache" / "kernels"
    names = ("debian:6.12", "debian:7.3", "debian:7.3-rt")
    for i in range(len(names)):
        folder = kernels / f"k{i}"
        folder.mkdir(parents=True)
        (folder / "vmlinuz").write_bytes(b"")
        facts = dict.fromkeys(("package", "upstream", "flavour", "suite", "sha256"), "x")
        (folder / "kernel.json").write_text(json.dumps({**facts, "version": f"{i}-1", "size": 0}))
    (kernels / "names.json").write_text(json.dumps({name: f"k{i}" for i, name in enumerate(names)}))
    monkeypatch.setenv("PGTABLE_CACHE", str(tmp_path / "cache"))
    work = tmp_path / "work"
    (work / "dumps").mkdir(parents=True)
    for file in ("dumps/ram.bin", "k73.snap", "deb.core", "my file", ".hidden"):
        (work / file).write_bytes(b"")
    monkeypatch.chdir(work)
    return work


def words(*args: str) -> list[str]:
    """What the last of the words can become."""
    shell = Bash(cli, {}, "pgtable", "_PGTABLE_COMPLETE")
    return [str(item.value) for item in shell.get_completions(list(args[:-1]), args[-1]) if item.type == "plain"]


def test_commands_subcommands_options_and_choices() -> None:
    assert words("") == sorted(COMMANDS)
    assert words("wa") == ["walk"]
    assert words("kernel", "f") == ["fetch"]
    assert words("walk", "x.snap", "--a") == ["--atomic", "--at"]
    assert words("dump", "--style", "l") == ["linux", "leaves"]
    assert words("dump", "--style=li") == ["linux"]
    assert words("completion", "") == ["bash", "zsh", "fish"]
    assert set(words("explain", "-")) == {o for p in explain.params for o in p.opts if o[0] == "-"} | {"-h", "--help"}


def test_the_names_come_without_loading_the_commands() -> None:
    code = (
        "import sys; from emu.cli_completion import *; from emu.cli import cli; Bash(cli, {}, '', '').get_completions"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"{code}([], ''); print([m for m in sys.modules if m.startswith('emu.cli_')])"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert ast.literal_eval(done.stdout) == ["emu.cli_completion"]


@pytest.mark.parametrize("command", ["walk", "dump", "find", "audit", "map", "diff"])
def test_a_source_is_a_kernel_a_scheme_or_a_file(command: str) -> None:
    assert words(command, "") == ["debian:6.12", "debian:7.3", "debian:7.3-rt", "raw:", "qmp:", "gdb:"]
    assert words(command, "debian:7") == ["debian:7.3", "debian:7.3-rt"]
    assert words(command, "raw:") == ["raw:deb.core", "raw:dumps/", "raw:k73.snap", "raw:my file"]
    assert words(command, "raw:a@0x4000,d") == ["raw:a@0x4000,deb.core", "raw:a@0x4000,dumps/"]
    assert words(command, "qmp:dumps/") == ["qmp:dumps/ram.bin"]
    assert words(command, "qmp:none/") == []
    assert words(command, "gdb:") == ["gdb:127.0.0.1:1234"]
    assert words(command, "k7") == []
    shell = Bash(cli, {}, "pgtable", "_PGTABLE_COMPLETE")
    assert [item.type for item in shell.get_completions([command], "k7")] == ["file"]
    assert words("diff", "k73.snap", "q") == ["qmp:"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell_is_one_that_the_shell_reads(shell: str) -> None:
    script = CliRunner().invoke(cli, ["completion", shell])
    assert script.exit_code == 0
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    done = subprocess.run([program, "-n"], input=script.stdout, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_other_shells_are_refused() -> None:
    assert CliRunner().invoke(cli, ["completion", "tcsh"]).exit_code == 2
    register()
    assert str(get_completion_class("bash")) == str(Bash)


class Shell:
    """An interactive bash in a terminal, with the script."""

    def __init__(self) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ.update(PATH=f"{BIN}:{os.environ['PATH']}", TERM="dumb", INPUTRC="/dev/null", PS1="$ ")
            os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
        os.write(self.fd, b'bind -x \'"\\C-xs": printf "<%s>" "$READLINE_LINE"\'\n')
        os.write(self.fd, b"source <(pgtable completion bash); printf 'rea%s' dy\n")
        self.read("(?s)ready.*[#$] $")  # the prompt

    def read(self, pattern: str) -> str:
        """What matches the pattern in what is printed next."""
        text, last = "", time.monotonic() + 20
        while not (found := re.search(pattern, text)):
            assert time.monotonic() < last, text
            if select.select([self.fd], [], [], 0.1)[0]:
                text += os.read(self.fd, 1 << 16).decode()
        return found[0]

    def completed(self, line: str) -> str:
        """The line that Tab makes of this one."""
        os.write(self.fd, line.encode() + TAB + SHOW + CLEAR)
        return self.read("<.*>")[1:-1]

    def close(self) -> None:
        os.write(self.fd, b"exit\n")
        os.close(self.fd)
        os.waitpid(self.pid, 0)


def test_a_real_bash_completes() -> None:
    """Judge: bash, whose words end at : and =."""
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed")
    shell = Shell()
    try:
        for line, expected in {
            "pgtable wa": "pgtable walk ",
            "pgtable dump --sty": "pgtable dump --style ",
            "pgtable dump --style=li": "pgtable dump --style=linux ",
            "pgtable dump --style li": "pgtable dump --style linux ",
            "pgtable walk debian:6": "pgtable walk debian:6.12 ",
            "pgtable walk debian:7": "pgtable walk debian:7.3",
            "pgtable map --diff=debian:6": "pgtable map --diff=debian:6.12 ",
            "pgtable walk debi": "pgtable walk debian:",
            "pgtable walk ra": "pgtable walk raw:",
            "pgtable walk raw:dum": "pgtable walk raw:dumps/",
            "pgtable walk raw:dumps/r": "pgtable walk raw:dumps/ram.bin ",
            "pgtable walk k7": "pgtable walk k73.snap ",
            "pgtable walk deb": "pgtable walk deb",  # debian: or deb.core
            "pgtable walk my": "pgtable walk my\\ file ",
            "pgtable walk k73.snap --regs deb": "pgtable walk k73.snap --regs deb.core ",
            "true; pgtable kernel in": "true; pgtable kernel info ",
        }.items():
            assert shell.completed(line) == expected
    finally:
        shell.close()


def test_a_real_fish_completes() -> None:
    """Judge: fish, by its own `complete -C`."""
    fish = shutil.which("fish") or pytest.skip("fish is not installed")
    path = f"{BIN}:{os.environ['PATH']}"
    code = "pgtable completion fish | source; complete -C 'pgtable wa'; complete -C 'pgtable walk debian:7'"
    env = {**os.environ, "PATH": path}
    done = subprocess.run([fish, "--no-config", "-c", code], capture_output=True, text=True, check=False, env=env)
    found = [line.partition("\t")[0] for line in done.stdout.splitlines()]  # behind it: what it does
    assert found == ["walk", "debian:7.3", "debian:7.3-rt"], done.stderr
