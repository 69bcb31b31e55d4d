"""A booted kernel's memory and registers in one file: made by emu.boot, used without QEMU from then on.

    s = Snapshot.load("k612.snap")
    m = s.machine()                     # a Machine on which any function of the kernel can be called

The file: 16 bytes of magic; version, length and CRC-32 of the header (three u32, little-endian); the header, one JSON
object; then each RAM region at the offset that the header names, a multiple of ALIGN. Pages of zeros are holes. RAM is
mapped and not read, and never written back.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import operator
import os
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

import numpy as np

from emu import jsontext, writing
from emu.image import ImageError, KernelImage
from pgtable import CPUS, PhysicalMemory, Registers
from pgtable.bits import Words
from pgtable.memory import PAGE
from pgtable.registers import NAMES, TCR_EL1

if TYPE_CHECKING:
    from emu.warm import WarmMachine

MAGIC = b"pgtable snapshot"
VERSION = 1
ALIGN = 1 << 16  # of RAM in the file: the largest page that a host maps
RAM_END = 1 << 52
_HEAD = struct.Struct("<16sIII")
_CHUNK = 16 << 20
_ADDRESSES = ("kaslr_offset", "base")  # of Origin: strings in the header


class SnapshotError(ValueError):
    """A file that is no snapshot or cannot be used; the message is one sentence."""


class Part(NamedTuple):
    """A RAM region: PAs [base, base + size), from `offset` in the file on."""

    base: int
    size: int
    offset: int


@dataclass(frozen=True)
class Origin:
    """Where a snapshot comes from. `sha256` is of the kernel's bytes at its link address; `kaslr_offset` is how far
    above that it runs, and `base` where `_text` then is; `at` is what was waited for; `when` is UTC, ISO 8601."""

    kernel: str
    release: str
    sha256: str
    kaslr_offset: int
    base: int
    command_line: str
    cpu: str
    seed: int
    at: str
    when: str
    qemu: str


@dataclass(frozen=True)
class Snapshot:
    """A booted kernel. `general`: x0 to x30, sp, pc, cpsr; `system`: system registers by the Arm ARM's names."""

    path: Path
    origin: Origin
    parts: tuple[Part, ...]
    general: Mapping[str, int]
    system: Mapping[str, int]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Snapshot:
        """The snapshot in a file. Raises SnapshotError for one that is foreign, of another version or cut short."""
        place = Path(path)
        try:
            with open(place, "rb") as file:
                head = _header(place, file)
                size = os.fstat(file.fileno()).st_size
            parts = _parts(place, head["ram"], size)
            origin = Origin(**{**head["origin"], **_numbers({name: head["origin"][name] for name in _ADDRESSES})})
            return cls(place, origin, parts, _numbers(head["general"]), _numbers(head["system"]))
        except OSError as error:
            raise SnapshotError(f"{place} cannot be read: {error.strerror}") from None
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, SnapshotError):
                raise
            raise SnapshotError(f"{place} has a damaged header: {type(error).__name__} {str(error)[:200]}") from None

    @cached_property
    def memory(self) -> PhysicalMemory:
        """Its RAM, copy on write: the file stays as it is."""
        return self.fresh_memory()

    def fresh_memory(self) -> PhysicalMemory:
        """Its RAM once more, for a machine of its own."""
        return PhysicalMemory.of_file(self.path, self.parts)

    @cached_property
    def registers(self) -> Registers:
        """The registers that a translation reads, on the features of its CPU (of `max` for a CPU not in CPUS)."""
        values = {name: value for name, value in self.system.items() if name in NAMES and "EL1" in name}
        return Registers(CPUS.get(self.origin.cpu, CPUS["max"]), **values)

    @property
    def lpa2(self) -> bool:
        """Its tables have 52-bit addresses, for which a machine needs mmu="model"."""
        return bool(TCR_EL1["DS"].get(self.registers.TCR_EL1))

    @cached_property
    def image(self) -> KernelImage:
        """The kernel as it runs: symbols at run-time addresses.

        Raises SnapshotError where the kernel is not to be had, or is not the one that was booted.
        """
        try:
            image = KernelImage.load(self.origin.kernel)
        except (ImageError, ValueError, OSError) as error:
            raise SnapshotError(f"{self.path} needs its kernel {self.origin.kernel}: {error}") from None
        if content_hash(image) != self.origin.sha256:
            raise SnapshotError(
                f"{self.path} was made of another {self.origin.kernel} ({self.origin.release}, now {image.release})"
            )
        return image.moved(self.origin.kaslr_offset)

    def machine(self, *, mmu: str = "cpu", vectors: bool = False) -> WarmMachine:
        """A machine that goes on from here, on memory of its own.

        `mmu`: "cpu" is Unicorn's own; "model" is pgtable's walk, with the features of the snapshot's CPU; `vectors`
        then sends exceptions to the kernel's handlers instead of ending the call.
        """
        from emu.warm import WarmMachine

        return WarmMachine(self, mmu=mmu, vectors=vectors)


def content_hash(image: KernelImage) -> str:
    """SHA-256 of a kernel's bytes at its link address."""
    return hashlib.sha256(image.data.data).hexdigest()


def _header(path: Path, file: IO[bytes]) -> dict[str, Any]:
    raw = file.read(_HEAD.size)
    if len(raw) < _HEAD.size or not raw.startswith(MAGIC):
        raise SnapshotError(f"{path} is not a snapshot of pgtable (`pgtable snapshot boot` makes one)")
    _, version, length, crc = _HEAD.unpack(raw)
    if version != VERSION:
        raise SnapshotError(f"{path} has version {version} of the format, and this pgtable reads {VERSION}: boot again")
    text = file.read(min(length, ALIGN))
    if len(text) < length:
        raise SnapshotError(f"{path} is cut short: its header ends after {len(text)} of {length} bytes")
    if zlib.crc32(text) != crc:
        raise SnapshotError(f"{path} has a damaged header: its checksum is wrong")
    found: dict[str, Any] = jsontext.loads(text)
    return found


def _parts(path: Path, rows: Sequence[Sequence[int]], size: int) -> tuple[Part, ...]:
    """The RAM regions, which a file of `size` bytes has."""
    parts = tuple(Part(*(operator.index(number) for number in row)) for row in rows)
    needed = max(part.offset + part.size for part in parts)
    if size < needed:
        raise SnapshotError(f"{path} is cut short: {size} of {needed} bytes are there")
    for part in parts:
        if (
            part.offset < ALIGN
            or part.offset % ALIGN
            or part.size <= 0
            or part.size % PAGE
            or part.base % PAGE
            or not 0 <= part.base < RAM_END - part.size
        ):
            raise SnapshotError(f"{path} has a damaged header: RAM of {part.size} bytes at {part.base:#x}")
    for part, above in pairwise(sorted(parts)):
        if part.base + part.size > above.base:
            raise SnapshotError(f"{path} has a damaged header: two RAMs at {above.base:#x}")
    return parts


def _numbers(words: Mapping[str, str]) -> dict[str, int]:
    return {name: int(word, 0) for name, word in words.items()}


def _words(numbers: Mapping[str, int]) -> dict[str, str]:
    return {name: f"{value:#x}" for name, value in numbers.items()}


def save(
    path: str | os.PathLike[str],
    origin: Origin,
    general: Mapping[str, int],
    system: Mapping[str, int],
    ram: Sequence[tuple[int, Path | Words]],
) -> Snapshot:
    """Writes a snapshot, all of it or nothing; `ram`: the PA of each region, and its content, a file or words.

    Raises OSError.
    """
    sizes = [(base, part.stat().st_size if isinstance(part, Path) else part.nbytes) for base, part in ram]
    start, parts = ALIGN, []
    for base, size in sizes:
        parts.append(Part(base, size, start))
        start = -(-(start + size) // ALIGN) * ALIGN
    kept = {**asdict(origin), **_words({name: getattr(origin, name) for name in _ADDRESSES})}
    head = {"origin": kept, "ram": parts, "general": _words(general), "system": _words(system)}
    text = json.dumps(head).encode()
    if _HEAD.size + len(text) > ALIGN:
        raise ValueError(f"a header of {len(text)} bytes does not fit {ALIGN}")
    with writing.replacing(path) as out:
        out.write(_HEAD.pack(MAGIC, VERSION, len(text), zlib.crc32(text)) + text)
        for part, (_, source) in zip(parts, ram, strict=True):
            _copy(source, out, part.offset)
        out.truncate(start)
    return Snapshot.load(path)


def _copy(source: Path | Words, out: IO[bytes], offset: int) -> None:
    """Copies a file, or words, to `offset`; pages of zeros are left out."""
    if not isinstance(source, Path):
        _copy_words(source, out, offset)
        return
    with open(source, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for start in range(0, len(content), _CHUNK):
            _copy_words(np.frombuffer(content[start : start + _CHUNK], np.uint64), out, offset + start)


def _copy_words(words: Words, out: IO[bytes], offset: int) -> None:
    pages = words.reshape(-1, PAGE // 8)
    used = np.flatnonzero(pages.any(axis=1))
    for run in np.split(used, np.flatnonzero(np.diff(used) != 1) + 1) if len(used) else []:
        out.seek(offset + int(run[0]) * PAGE)
        out.write(pages[run[0] : run[-1] + 1].tobytes())
