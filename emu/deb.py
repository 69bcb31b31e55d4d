"""Files inside a Debian package, read in pure Python: the ar container, then the tar file `data.tar.*` in it.

Rules of this file:
- The package is read as a stream, front to back; nothing is written, and reading stops at the member asked for.
- A damaged or foreign file ends in one sentence (DebError); a file that cannot be opened is the OSError it is.

Source: deb(5), ar(5).
"""

from __future__ import annotations

import gzip
import io
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, NamedTuple, cast

AR_MAGIC = b"!<arch>\n"
_HEADER = 60  # bytes of an ar member's header: name 16, date 12, uid 6, gid 6, mode 8, size 10, end mark 2
LARGEST = 4 << 30  # bytes of the files together, and a kernel may have debug information
_DAMAGED = (tarfile.TarError, EOFError, lzma.LZMAError, zlib.error, gzip.BadGzipFile, ValueError, MemoryError)


class DebError(ValueError):
    """A file is not a readable Debian package, or lacks the member asked for; the message is one sentence."""


class Member(NamedTuple):
    """A regular file of the package: its name (no leading `./`), size in bytes, and content until the next member."""

    name: str
    size: int
    content: IO[bytes]


def members(path: str | os.PathLike[str]) -> Generator[Member]:
    """The regular files that the package installs, in their order. Raises DebError, OSError."""
    name = os.fspath(path)
    with Path(path).open("rb") as file:
        suffix, start, size = _find_data(name, file)
        packed = cast(IO[bytes], io.BufferedReader(_Slice(file, start, size)))
        try:
            with _decompress(name, suffix, packed) as tar_file, tarfile.open(fileobj=tar_file, mode="r|") as tar:
                yield from _regular(name, tar)
        except DebError:
            raise
        except (*_DAMAGED, _zstd_error()) as error:
            raise DebError(f"{name} is a damaged Debian package ({error})") from None


def read_member(path: str | os.PathLike[str], wanted: Callable[[str], bool]) -> tuple[str, bytes]:
    """Name and content of the first regular file whose name is `wanted`. Raises DebError, OSError."""
    with closing(members(path)) as files:
        for member in files:
            if wanted(member.name):
                return member.name, _content(os.fspath(path), member)
    raise DebError(f"{os.fspath(path)} holds no such file")


def _content(name: str, member: Member) -> bytes:
    try:
        return member.content.read()
    except (*_DAMAGED, _zstd_error()) as error:
        raise DebError(f"{name} is damaged in {member.name} ({error})") from None


def _regular(name: str, tar: tarfile.TarFile) -> Iterator[Member]:
    for entry in tar:
        if entry.offset_data + entry.size > LARGEST:
            raise DebError(f"{name} is a Debian package of more than {LARGEST >> 30} GiB")
        content = tar.extractfile(entry) if entry.isreg() else None
        if content:
            yield Member(entry.name.removeprefix("./").removeprefix("/"), entry.size, content)


def _find_data(name: str, file: IO[bytes]) -> tuple[str, int, int]:
    """Suffix, offset and size of data.tar in the ar container."""
    if file.read(len(AR_MAGIC)) != AR_MAGIC:
        raise DebError(f"{name} is not a Debian package")
    end = os.fstat(file.fileno()).st_size
    at = len(AR_MAGIC)
    while at < end:
        member, size = _header(name, file.read(_HEADER))
        if at + _HEADER + size > end:
            raise DebError(f"{name} is a truncated Debian package: {end} of {at + _HEADER + size} bytes")
        if member.startswith("data.tar"):
            return member.removeprefix("data.tar"), at + _HEADER, size
        at += _HEADER + size + (size & 1)  # members start at even offsets
        file.seek(at)
    raise DebError(f"{name} is an ar archive without data.tar, not a Debian package")


def _header(name: str, header: bytes) -> tuple[str, int]:
    size = header[48:58].strip()
    if len(header) != _HEADER or header[58:] != b"`\n" or not size.isdigit():
        raise DebError(f"{name} is a damaged Debian package: no ar member header where one must be")
    return header[:16].decode("ascii", "replace").rstrip(" /"), int(size)


class _Slice(io.RawIOBase):
    """Bytes [start, start + size) of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._left = file, size
        file.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # BufferedReader gives a memoryview
        chunk = self._file.read(min(len(buffer), self._left))
        buffer[: len(chunk)] = chunk
        self._left -= len(chunk)
        return len(chunk)


def _decompress(name: str, suffix: str, packed: IO[bytes]) -> IO[bytes]:
    opener = _OPENERS.get(suffix)
    if not opener:
        raise DebError(f"{name} is packed with {suffix}, which is not supported ({', '.join(filter(None, _OPENERS))})")
    return opener(packed)


def _open_zstd(packed: IO[bytes]) -> IO[bytes]:
    try:
        from compression import zstd  # Python 3.14
    except ImportError:
        from backports import zstd
    opened: IO[bytes] = zstd.open(packed)
    return opened


def _zstd_error() -> type[Exception]:
    try:
        from compression.zstd import ZstdError  # Python 3.14
    except ImportError:
        from backports.zstd import ZstdError
    error: type[Exception] = ZstdError
    return error


_OPENERS: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    "": lambda packed: packed,
    ".xz": lzma.LZMAFile,
    ".zst": _open_zstd,
    ".gz": lambda packed: cast(IO[bytes], gzip.GzipFile(fileobj=packed)),
}
