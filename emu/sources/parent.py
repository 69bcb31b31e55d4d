"""The guest of the program that started this one: `parent:NAME`, for the script of `pgtable gdb-script` only.

A debugger's stub has one client, the debugger. So the script that runs in it (emu/gdb_script.py) starts this process
with one end of a socket, whose number is in PGTABLE_PARENT, and answers here. NAME is what messages call it.
A line of words asks; the answer is a line `ok N` or `no N`, then N bytes: what was asked for, or why there is none.

| question | answer |
|---|---|
| `ranges` | QEMU's `info mtree -f` |
| `registers NAME...` | lines NAME=VALUE of those that there are |
| `pages PA...` (hex) | for each, a byte 1 and 4096 bytes, or a byte 0 |
| `symbol NAME` | its address, or nothing |
| `place VA` | NAME or NAME+0xOFFSET, or nothing |

Rules: only RAM is asked for; pages are kept, as the guest stands still while a command runs.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping

import numpy as np

from emu.sources.errors import SourceError
from emu.sources.live import ram_ranges
from emu.sources.ram import PagedMemory
from emu.sources.registers import SHORT, parse_registers
from pgtable.bits import Flags, Words
from pgtable.memory import PAGE
from pgtable.registers import NAMES, Registers

VARIABLE = "PGTABLE_PARENT"
AT_ONCE = 64  # pages that are asked for together
LARGEST = 1 << 24  # bytes of an answer


class Parent:
    """The program at the other end of the socket `number`."""

    def __init__(self, number: int) -> None:
        self._socket = socket.socket(fileno=number)
        self._answers = self._socket.makefile("rb")

    def ask(self, *words: str) -> bytes:
        """The answer. Raises SourceError where there is none."""
        try:
            self._socket.sendall(" ".join(words).encode() + b"\n")
            kind, _, size = self._answers.readline().decode().partition(" ")
            content = self._answers.read(min(int(size or 0), LARGEST))
        except (OSError, ValueError):
            kind = ""
        if kind == "no":
            raise SourceError(content.decode("utf-8", "replace") or "the debugger does not say why")
        if kind != "ok" or len(content) != int(size or 0):
            raise SourceError("the debugger that started this command is gone")
        return content

    def text(self, *words: str) -> str:
        """The answer as text."""
        return self.ask(*words).decode("utf-8", "replace")

    def close(self) -> None:
        """Ends the connection."""
        self._answers.close()
        self._socket.close()


class ParentMemory(PagedMemory):
    """The guest's RAM."""

    def __init__(self, parent: Parent) -> None:
        super().__init__(self._one, ram_ranges(parent.text("ranges")))
        self.parent = parent

    def close(self) -> None:
        """Forgets the pages and ends the connection."""
        super().close()
        self.parent.close()

    def _one(self, pa: int) -> bytes | None:
        return self._pages([pa])[0]

    def _pages(self, pas: list[int]) -> list[bytes | None]:
        content, at = self.parent.ask("pages", *(f"{pa:x}" for pa in pas)), 0
        found: list[bytes | None] = []
        for _ in pas:
            there = content[at : at + 1] == b"\1"
            found.append(content[at + 1 : at + 1 + PAGE] if there else None)
            at += 1 + PAGE * there
        if at != len(content):
            raise SourceError("the debugger that started this command gives no whole pages")
        return found

    def gather(self, pas: Words) -> tuple[Words, Flags]:
        """As PagedMemory.gather; the pages come together."""
        wanted = [pa for pa in (np.unique(pas // np.uint64(PAGE)) * np.uint64(PAGE)).tolist() if self._new(pa)]
        for i in range(0, len(wanted), AT_ONCE):
            some = wanted[i : i + AT_ONCE]
            for pa, data in zip(some, self._pages(some), strict=True):
                self.kept[pa] = None if data is None else np.frombuffer(data, np.uint64)
        return super().gather(pas)

    def _new(self, pa: int) -> bool:
        return pa not in self.kept and any(base <= pa < base + size for base, size in self.ranges)


class ParentSymbols(Mapping[str, int]):
    """The debugger's symbols, each asked for when it is wanted: they cannot be listed."""

    def __init__(self, parent: Parent) -> None:
        self.parent = parent

    def __getitem__(self, name: str) -> int:
        answer = self.parent.text("symbol", name)
        try:
            return int(answer, 0)
        except ValueError:  # it has none
            raise KeyError(name) from None

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0

    def __bool__(self) -> bool:
        return True

    def at(self, va: int) -> str:
        """Where `va` is, NAME or NAME+0xOFFSET; "" where no symbol says."""
        return self.parent.text("place", f"{va:#x}")


def open_parent(word: str) -> tuple[ParentMemory, Registers, ParentSymbols]:
    """Memory, registers of the CPU that the debugger has selected, symbols. Raises SourceError."""
    number = os.environ.get(VARIABLE, "")
    try:
        parent = Parent(int(number))
    except (OSError, ValueError):
        raise SourceError(f"{word} is for the script of `pgtable gdb-script` only") from None
    try:
        values = parse_registers(parent.text("registers", *SHORT, *NAMES))
        if "TCR_EL1" not in values:
            raise SourceError("the debugger gives no system registers (with QEMU's stub, for AArch64 guests, it does)")
        return ParentMemory(parent), Registers(None, **values), ParentSymbols(parent)
    except BaseException:
        parent.close()
        raise
