"""The code blocks of README.md and docs/**/*.md, and how each is run.

Rules of this file:
- Every block is fenced and says its language. `python` is executed, all blocks of a page in one namespace; the `text`
  block right below one is what it prints. `console` has commands after `$ ` (going on after `> `), and what they print
  on stdout; one that shows nothing must exit with 0. A line `...` stands for any lines.
- A block with `title="NAME"` is a file of that name, written before the page's first block runs.
- `text` is not run: a synopsis, a picture, output. Of a synopsis the options are looked up in the command.
- Before a fence, `<!-- not run: REASON -->` leaves a block out; `<!-- setup` + Python + `-->` is run unseen.
- A page runs in a folder of its own. Files that it names (FILES) are put there; what it names decides what it needs.
- Not compared: what an update of a kernel moves (MOVING); where a booted kernel is looked at, any number.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RUN = ("python", "console")
LARGE = 32 << 20  # bytes of a dump or snapshot

_PIECE = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|(?:^<!-- not run: (?P<reason>[^\n]*) -->\n+)?^(?P<dent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=dent)```$",
    re.M | re.S,
)

# What an update of Debian's kernels, of the random cases or of the machine moves.
MOVING = (
    (r"\d+\.\d+\.\d+\S*-(?:cloud-)?arm64\S*", "RELEASE"),
    (r"0xffff80[0-9a-f]{10}", "IMAGE"),
    (r"\+0x[0-9a-f]+\b", "+OFFSET"),
    (r"\.(?:isra|part|constprop)\.\d+", ""),
    (r"(?<=\.[ch]):\d+", ":LINE"),
    (r"\b[1-9]\d*(?= of \d+ cases| cases| events compared)", "N"),
    (r"(?m)^(\w+) +\d+ +\d+ +(\d+ +\d+) +[\d.]+$", r"\1 N N \2 SECONDS"),
    (r"\bin [\d.]+s$", "in SECONDS"),
    (r"[ \t]+", " "),
)
ANY_NUMBER = ((r"\b(?:0x)?(?=[0-9a-f]*\d)[0-9a-f]+[KMGTB]?\b", "N"), ("IMAGE", "N"))


@dataclass
class Block:
    """One fenced block, or a hidden `setup`, of a page. `output`: the text block below, of a python block."""

    page: Path
    line: int
    language: str
    body: str
    title: str = ""
    reason: str = ""
    output: str | None = None

    @property
    def where(self) -> str:
        """`docs/tables.md:12`."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The page's blocks, in order."""
    text = page.read_text()
    found: list[Block] = []
    end = -1
    for match in _PIECE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        if match["setup"] is not None:
            found.append(Block(page, line, "setup", match["setup"]))
            continue
        language, _, more = match["info"].strip().partition(" ")
        title = re.search(r'title="([^"]+)"', more)
        body = re.sub(rf"^{match['dent']}", "", match["body"], flags=re.M)
        block = Block(page, line, language, body, title[1] if title else "", match["reason"] or "")
        above = found[-1] if found and not text[end : match.start()].strip() else None
        if language == "text" and above and above.language == "python" and not block.title:
            above.output = block.body
        found.append(block)
        end = match.end()
    return found


def indented(page: Path) -> list[int]:
    """Lines where an indented block begins: it has no language, and nobody would run it."""
    text = _PIECE.sub(lambda match: "\n" * match[0].count("\n"), page.read_text())
    lines = ["", *text.split("\n")]
    listed = [i for i, line in enumerate(lines) if re.match(r" {4,}\S", line) and not lines[i - 1].strip()]
    return [i for i in listed if not re.match(r" *([-*+]|\d+\.|:::|[a-z_]+:) ?", lines[i])]


def sessions(block: Block) -> Iterator[tuple[str, str]]:
    """The commands of a console block, each with the output shown."""
    for part in re.split(r"^\$ ", block.body, flags=re.M)[1:]:
        command, more, output = re.fullmatch(r"(.*?(?:\n|\Z))((?:> .*?(?:\n|\Z))*)(.*)", part, re.S).groups()  # type: ignore[union-attr]
        yield (command + re.sub(r"^> ?", "", more, flags=re.M)).rstrip("\n"), output


# ---- what a page needs


@functools.cache
def run_text(page: Path) -> str:
    """What of the page is run."""
    ran = [b for b in blocks(page) if (b.language in RUN and not b.reason) or b.language == "setup"]
    return "\n".join(block.body for block in ran)


def kernels(page: Path) -> list[str]:
    """The Debian kernels that the page's blocks name."""
    return sorted(set(re.findall(r"debian:\d[\w.-]*", run_text(page))))


def needs_qemu(page: Path) -> bool:
    """The page boots or asks a QEMU itself."""
    return bool(re.search(r"qemu-system|snapshot boot|pgtable census|judge --qemu", run_text(page)))


def snapshot(kernel: str) -> Callable[[Path], None]:
    """Puts a booted kernel's snapshot at a path."""

    def put(path: Path) -> None:
        from tests.snapshots import booted

        booted(kernel)
        path.symlink_to(booted(kernel).path)

    return put


def vmcore(path: Path) -> None:
    """An ELF core of the RAM of a booted kernel, without notes: what QEMU's dump-guest-memory writes is like it."""
    from tests.emu.dumps import Load, elf_core
    from tests.snapshots import booted

    memory = booted("debian:7.3").memory
    path.write_bytes(elf_core([Load(region.base, memory.read(region.base, region.size)) for region in memory.regions]))


def corpus(path: Path) -> None:
    """QEMU's stored answers, where they are in a checkout."""
    path.parent.mkdir(parents=True)
    path.symlink_to(ROOT / "tests" / "judged" / "corpus")


FILES: dict[str, Callable[[Path], None]] = {
    "k61.snap": snapshot("debian:6.1"),
    "k612.snap": snapshot("debian:6.12"),
    "k73.snap": snapshot("debian:7.3"),
    "vmcore": vmcore,
    "tests/judged/corpus": corpus,
}


def needs_snapshot(page: Path) -> bool:
    """The page looks at a kernel that has booted: numbers are not compared."""
    return any(name in run_text(page) for name in (*FILES, "qmp:") if name != "tests/judged/corpus")


# ---- running


def normalised(text: str, *, booted: bool = False) -> list[str]:
    """Lines without what moves; `booted`: without any number."""
    for pattern, replacement in (*MOVING, *(ANY_NUMBER if booted else ())):
        text = re.sub(pattern, replacement, text)
    return [line.strip() for line in text.strip().splitlines()]


def matches(shown: list[str], printed: list[str]) -> bool:
    """Whether what is printed is what is shown, where a line `...` stands for any lines."""
    if "..." not in shown:
        return shown == printed
    pattern = "".join("(?:.*\n)*" if line == "..." else re.escape(line) + "\n" for line in shown)
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in printed)) is not None


@dataclass
class Page:
    """A page that is being run, in `folder`. `wrong`: one entry for each block or command that is not as shown.
    `booted`: it looks at a kernel that has booted, so that numbers are not compared."""

    path: Path
    folder: Path
    wrong: list[str] = field(default_factory=list)
    booted: bool = False
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__docs__"})
    printed: dict[str, tuple[str, int, str]] = field(default_factory=dict)

    def run(self) -> None:
        """Writes the page's files, then runs its blocks in order."""
        try:
            self._run(blocks(self.path))
        finally:
            for file in self.folder.glob("*.pid"):  # of a QEMU that a block would have ended
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(file.read_text()), signal.SIGTERM)
            for file in self.folder.iterdir():  # pytest keeps folders of three runs
                if file.is_file() and not file.is_symlink() and file.stat().st_size > LARGE:
                    file.unlink()

    def _run(self, everything: list[Block]) -> None:
        for block in everything:
            if block.title:
                (self.folder / block.title).write_text(block.body)
        for name, put in FILES.items():
            if name in run_text(self.path):
                put(self.folder / name)
        for block in everything:
            if block.reason or block.title:
                continue
            if block.language in ("python", "setup"):
                self.python(block)
            elif block.language == "console":
                self.console(block)

    def python(self, block: Block) -> None:
        """Executes a block; compares what it printed with the text block below, if there is one."""
        out = io.StringIO()
        code = "\n" * block.line + block.body  # so that a traceback has the page's line
        try:
            with contextlib.redirect_stdout(out):
                exec(compile(code, block.where, "exec"), self.names)
        except Exception as error:
            self.wrong.append(f"{block.where}: {type(error).__name__}: {error}")
            return
        if block.output is not None:
            self.compare(block.where, block.output, out.getvalue())

    def console(self, block: Block) -> None:
        """Runs each command of a block."""
        for command, shown in sessions(block):
            out, code, err = self.command(command)
            where = f"{block.where}: $ {command}"
            if code and (not shown or (code != 1 and "2>&1" not in command)):
                self.wrong.append(f"{where}\nexit code {code}\n{out[-2000:]}{err[-2000:]}")
            elif shown:
                self.compare(where, shown, out)

    def command(self, line: str) -> tuple[str, int, str]:
        """stdout, exit code and stderr. Commands before a `|` that come again with other filters are run once."""
        first, _, rest = line.partition(" | ")
        if not rest or not first.startswith("pgtable") or "$(" in first:
            return self.shell(line)
        if first not in self.printed:
            self.printed[first] = self.shell(first)
        out, code, err = self.printed[first]
        return self.shell(rest, out) if code in (0, 1) else (out, code, err)

    def shell(self, line: str, given: str = "") -> tuple[str, int, str]:
        """The same for one line, without memory."""
        cache = os.environ.get("PGTABLE_CACHE") or str(Path.home() / ".cache" / "pgtable")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, "PATH": path, "PYTHONPATH": str(self.folder), "HOME": str(self.folder)}
        env |= {"PGTABLE_CACHE": cache, "NO_COLOR": "1"}
        env.pop("COLUMNS", None)
        done = subprocess.run(
            ["bash", "-c", line], input=given, capture_output=True, text=True, check=False, cwd=self.folder, env=env
        )
        return done.stdout, done.returncode, done.stderr

    def compare(self, where: str, shown: str, printed: str) -> None:
        """Notes a difference."""
        want, got = (normalised(text, booted=self.booted) for text in (shown, printed))
        if not matches(want, got):
            self.wrong.append("\n".join([where, "--- shown", *want, "--- printed", *got]))


def need(page: Path) -> None:
    """Skips, or fails where it is required, if what the page needs is not here."""
    from tests.examples.test_examples import need_qemu
    from tests.kernels import kernel_path, lack

    for name in kernels(page):
        kernel_path(name)
    if needs_qemu(page):
        need_qemu()
    for program in ("gdb-multiarch",):
        if program in run_text(page) and not shutil.which(program):
            lack("gdb", f"no {program}: apt install {program}")


def marks(page: Path) -> list[pytest.MarkDecorator]:
    """A page that needs a kernel or more is of the full tier; README.md is always run."""
    found = [pytest.mark.kernels] if kernels(page) or needs_snapshot(page) else []
    found += [pytest.mark.qemu] if needs_qemu(page) else []
    return [*found, pytest.mark.full, pytest.mark.timeout(900)] if found and page.name != "README.md" else found
