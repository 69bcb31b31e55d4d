"""A kernel image, ready to be put into memory: relocated bytes, symbols, types, WARN sites, layout.

`KernelImage.load` takes what people have (any file that emu.container knows, or `debian:NAME`) and either reads it
or finds what an earlier reading of the same bytes left in the cache. Nothing depends on a version number: all of
it comes from the image, see kallsyms, relocate, btf, layout and recover beside this file.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emu import bugtable, container, imagecache, relocate, symbolfile
from emu.btf import Btf, BtfError
from emu.bugtable import BugTable
from emu.container import ImageError
from emu.layout import KernelLayout
from emu.reading import Reading, memorise, read, recall, relocations
from emu.symbols import SymbolError, Symbols

__all__ = ["BtfError", "ImageError", "KernelImage", "KernelLayout", "SymbolError", "Symbols"]

U8 = NDArray[np.uint8]
FileName = str | os.PathLike[str]

FETCHED = "debian:"


class KernelImage:
    """One kernel as it is linked, before it runs.

    `name` is what the user called it, `release` and `banner` what it calls itself. `base` is the link-time address
    of `_text`, `data` the bytes from there on (uint8, read-only, relocated to `base`), `size` the memory they take
    with bss.
    """

    def __init__(self, name: str, reading: Reading, place: Path) -> None:
        self.name = name
        self.release = reading.release
        self.banner = reading.banner
        self.base = reading.base
        self.size = reading.size
        self.data = reading.data
        self.layout = reading.layout
        self.symbols = reading.symbols
        self._reading = reading
        self._place = place

    @classmethod
    def load(cls, source: FileName, *, symbols: FileName | None = None) -> KernelImage:
        """Read the kernel that `source` names: a file, or `debian:VERSION[-FLAVOUR]`, which may be fetched.

        `symbols` names a file with its symbols (ELF, System.map or /proc/kallsyms text), used in place of the
        image's own. Raises ImageError.
        """
        name = os.fspath(source)
        path = resolve(name)
        content = container.read_bytes(path)
        extra = b"" if symbols is None else container.read_bytes(symbols, symbolfile.NEEDED)
        place = imagecache.directory(_content_hash(content, extra))
        kept = imagecache.load(place)
        reading = recall(*kept) if kept else None
        if reading is None:
            listed = None if symbols is None else symbolfile.parse(os.fspath(symbols), extra)
            reading = read(name, container.read(path, content), listed)
            imagecache.store(place, *memorise(reading))
        return cls(name, reading, place)

    def __repr__(self) -> str:
        return f"<KernelImage {self.release} at {self.base:#x}, {len(self.symbols.entries)} symbols>"

    # parts that not everybody needs

    @cached_property
    def btf(self) -> Btf:
        """Structure offsets and enums. Raises BtfError for an image without BTF."""
        types = self._reading.btf()
        if types is None:
            raise BtfError(f"{self.name} has no BTF (CONFIG_DEBUG_INFO_BTF)")
        return types

    @cached_property
    def bugs(self) -> BugTable:
        """Source lines of WARN and BUG instructions, by address."""
        rows = imagecache.load_part(self._place, "bugs")
        if rows is None:
            rows = bugtable.find(self.data)
            imagecache.store_part(self._place, "bugs", rows)
        return BugTable(self.data, self.base, rows)

    # bytes

    def bytes_at(self, va: int, n: int) -> bytes:
        """`n` bytes at the link-time address `va`; bss reads as zeros. Raises ImageError outside the image."""
        at = va - self.base
        if at < 0 or n < 0 or at + n > self.size:
            raise ImageError(f"{self.name} has no bytes {va:#x} to {va + n:#x}")
        return self.data[at : at + n].tobytes().ljust(n, b"\0")

    def word(self, va: int, size: int = 8) -> int:
        """The little-endian word of `size` bytes at the link-time address `va`. Raises ImageError."""
        return int.from_bytes(self.bytes_at(va, size), "little")

    def displaced(self, by: int) -> U8:
        """A copy of `data` (uint8) as it reads when the kernel runs `by` bytes above its link address (KASLR).

        Raises ImageError where the image does not say which words change.
        """
        try:
            return relocations(self.data, self.base, self.symbols).move(self.data, by)
        except relocate.RelocationError as error:
            raise ImageError(f"{self.name} cannot be moved: {error}") from None

    def moved(self, by: int) -> KernelImage:
        """The same kernel as it reads and is named when it runs `by` bytes above its link address (KASLR).

        Raises ImageError where the image does not say which words change.
        """
        if not by:
            return self
        old, base = self._reading, self.base + by
        entries = old.symbols.entries.shifted(by)
        symbols = Symbols.sorted(entries, old.symbols.sources, old.symbols.repeated, base + self.size)
        layout = replace(old.layout, kimage_vaddr=base)
        data = self.displaced(by)
        data.flags.writeable = False
        reading = replace(old, base=base, data=data, symbols=symbols, layout=layout)
        return KernelImage(self.name, reading, self._place)


def resolve(name: str) -> Path:
    if name.startswith(FETCHED):
        from emu.kernels import fetch

        return Path(fetch(name))
    return Path(name)


def _content_hash(content: bytes, extra: bytes) -> str:
    h = hashlib.sha256(content)
    if extra:
        h.update(hashlib.sha256(extra).digest())
    return h.hexdigest()
