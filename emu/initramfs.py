"""An initial RAM file system of our own, less than 1 KiB: its /init prints a mark and sleeps.

A kernel that has it stays alive in its first process instead of ending in the panic of a missing root.
Sources: Linux Documentation/driver-api/early-userspace/buffer-format.rst (newc), the ELF gABI.
"""

from __future__ import annotations

import struct

from emu import snippets

MARK = b"[pgtable: user space]"  # what /init prints, in a line of its own
PROGRAM = "sleeper"

_ORIGIN = 0x400000
_EXEC, _AARCH64, _LOAD, _READ_EXECUTE = 2, 183, 1, 5
_ALIGN = 0x10000  # of the largest pages
_DIRECTORY, _DEVICE, _FILE = 0o040755, 0o020600, 0o100755
_CONSOLE = (5, 1)  # major, minor
_HEADERS = 64 + 56


def elf(code: bytes) -> bytes:
    """A static AArch64 program: `code` starts at its first byte and is mapped read-only and executable."""
    size = _HEADERS + len(code)
    ident = b"\x7fELF" + bytes((2, 1, 1)) + bytes(9)  # 64 bits, little-endian, version 1
    header = struct.pack("<HHIQQQIHHHHHH", _EXEC, _AARCH64, 1, _ORIGIN + _HEADERS, 64, 0, 0, 64, 56, 1, 64, 0, 0)
    segment = struct.pack("<IIQQQQQQ", _LOAD, _READ_EXECUTE, 0, _ORIGIN, _ORIGIN, size, size, _ALIGN)
    return ident + header + segment + code


def archive() -> bytes:
    """The file system, in the format that the kernel unpacks: /init and the console that it prints to."""
    program = elf(bytes(snippets.load(PROGRAM)))
    entries = (
        _entry("dev", _DIRECTORY),
        _entry("dev/console", _DEVICE, device=_CONSOLE),
        _entry("init", _FILE, program),
        _entry("TRAILER!!!", 0),
    )
    return b"".join(entries)


def _entry(name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> bytes:
    fields = (0, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
    header = b"070701" + b"".join(b"%08X" % value for value in fields)
    return _padded(header + name.encode() + b"\0") + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
