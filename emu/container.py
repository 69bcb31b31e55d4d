"""What a kernel file is, by content, and the flat arm64 `Image` bytes inside it.

A raw Image, one packed with gzip, zstd, xz or lzma, an EFI zboot image, an ELF vmlinux, or a Debian package that
holds one of these. Whatever is not that, or is cut short, ends in one sentence (ImageError) that names the file,
says what it is and what is needed. File names play no part.

Source: Documentation/arch/arm64/booting.rst (header), drivers/firmware/efi/libstub/zboot-header.S ("zimg"),
PE/COFF section table of the EFI stub (how long an Image must be).
"""

from __future__ import annotations

import lzma
import os
import stat
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from emu import elf
from emu.symbols import Entries

U8 = NDArray[np.uint8]

NEEDED = "an arm64 kernel is needed (Image, vmlinuz, vmlinux or a Debian package of one)"
IMAGE_MAGIC = b"ARMd"
IMAGE_MAGIC_AT = 0x38
DEEPEST = 4  # wrappings inside each other
LARGEST_FILE = 4 << 30  # a vmlinux with debug information may be a gigabyte
LARGEST = 1 << 30  # no arm64 Image comes near; a size beyond it is a damaged header
HEADER = 64  # bytes of an Image's header
PEEK = 1024  # bytes unpacked to see what is there
COFF = 24  # bytes of a PE signature and COFF header
SECTION = struct.Struct("<16xII16x")  # SizeOfRawData, PointerToRawData
ZBOOT = struct.Struct("<4x4sII8x32s")


class ImageError(ValueError):
    """A file is not the kernel it should be; the message is one sentence for the person who named the file."""


@dataclass(frozen=True, eq=False)
class Flat:
    """The bytes of an Image (uint8, offset 0 is `_text`, not relocated) and what its file said about them.

    `image_size` is the memory it takes with bss, `page_shift` is None where the header leaves it open. An ELF
    gives `base`, its link address, and `entries`, its symbols if it was not stripped.
    """

    data: U8
    kind: str
    image_size: int
    page_shift: int | None
    base: int | None = None
    entries: Entries = field(default_factory=Entries.empty)


def read(path: str | os.PathLike[str], content: bytes | None = None) -> Flat:
    """The flat Image in the file `path`, whose bytes may be given as `content`. Raises ImageError."""
    name = os.fspath(path)
    return _unpack(name, read_bytes(path) if content is None else content, Path(name))


def read_bytes(path: str | os.PathLike[str], needed: str = NEEDED) -> bytes:
    """All bytes of a file that should be what `needed` says. Raises ImageError."""
    name = os.fspath(path)
    try:
        status = os.stat(name)
        if status.st_size > LARGEST_FILE or stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode):
            raise ImageError(f"{name} is a device or too large ({status.st_size >> 20} MiB); {needed}")
        content = Path(name).read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{name} does not exist; {needed}") from None
    except IsADirectoryError:
        raise ImageError(f"{name} is a directory; {needed}") from None
    except OSError as error:
        raise ImageError(f"{name} cannot be read ({error.strerror}); {needed}") from None
    if not content:
        raise ImageError(f"{name} is empty; {needed}")
    return content


def _unpack(name: str, content: bytes, deb: Path | None = None, depth: int = 0) -> Flat:
    if depth > DEEPEST:
        raise ImageError(f"{name} is packed more than {DEEPEST} times over; {NEEDED}")
    if content.startswith(b"!<arch>\n") and deb:
        return _from_deb(name, deb, depth)
    if content.startswith(elf.MAGIC):
        return _from_elf(name, content)
    if content[IMAGE_MAGIC_AT : IMAGE_MAGIC_AT + 4] == IMAGE_MAGIC:
        return _from_image(name, content)
    if content[4:8] == b"zimg":
        return _from_zboot(name, content, depth)
    for magic, method in _PACKED.items():
        if content.startswith(magic):
            return _unpack(name, _decompress(name, method, content), depth=depth + 1)
    raise ImageError(f"{name} is {_guess(content)}; {NEEDED}")


# the containers


def _from_deb(name: str, deb: Path, depth: int) -> Flat:
    from emu.deb import DebError, read_member  # only a package needs it

    try:
        member, content = read_member(deb, _is_kernel_member)
    except (DebError, OSError) as error:
        raise ImageError(f"{error}; {NEEDED}") from None
    return _unpack(f"{name} ({member.removeprefix('./')})", content, depth=depth + 1)


def _is_kernel_member(member: str) -> bool:
    """boot/vmlinuz-VERSION, and since 7.x usr/lib/modules/VERSION/vmlinuz."""
    parts = member.removeprefix("./").removeprefix("/").split("/")
    in_boot = len(parts) == 2 and parts[0] == "boot" and parts[1].startswith("vmlinu")
    return in_boot or (parts[-1] == "vmlinuz" and parts[:3] == ["usr", "lib", "modules"])


def _from_elf(name: str, content: bytes) -> Flat:
    try:
        loaded = elf.load(content)
    except elf.ElfError as error:
        raise ImageError(f"{name} {error}; {NEEDED}") from None
    data = loaded.data
    if data[IMAGE_MAGIC_AT : IMAGE_MAGIC_AT + 4].tobytes() != IMAGE_MAGIC:
        raise ImageError(f"{name} is an arm64 ELF file, but no kernel starts in its first segment; {NEEDED}")
    size, page_shift = _header(name, data[:HEADER].tobytes())
    if not len(data) <= size <= LARGEST:
        size = max(loaded.memory_size, len(data))
    return Flat(data, "ELF vmlinux", size, page_shift, loaded.base, loaded.entries)


def _from_image(name: str, content: bytes) -> Flat:
    size, page_shift = _header(name, content[:HEADER])
    needed = _length_by_sections(content)
    if len(content) < needed:
        raise ImageError(f"{name} is a truncated arm64 Image: {len(content)} of {needed} bytes; {NEEDED}")
    if not len(content) <= size <= LARGEST:
        raise ImageError(
            f"{name} is a damaged arm64 Image: its header says {size:#x} bytes of memory, "
            f"the file has {len(content):#x}; {NEEDED}"
        )
    return Flat(np.frombuffer(content, np.uint8), "Image", size, page_shift)


def _header(name: str, head: bytes) -> tuple[int, int | None]:
    """image_size and page shift. Flags: bit 0 big-endian, bits 2:1 page size."""
    if len(head) < HEADER:
        raise ImageError(f"{name} is a truncated arm64 Image: not even its header is there; {NEEDED}")
    size, flags = struct.unpack_from("<QQ", head, 0x10)
    if flags & 1:
        raise ImageError(f"{name} is a big-endian arm64 Image, a little-endian one is needed")
    return int(size), (None, 12, 14, 16)[flags >> 1 & 3]


def _length_by_sections(content: bytes) -> int:
    """How long the file must be, by the section table of its EFI stub; 64 (the header) where it has none."""
    pe = int.from_bytes(content[0x3C:0x40], "little")
    if content[:2] != b"MZ" or not pe:
        return HEADER
    if len(content) < pe + COFF:
        return pe + COFF
    if content[pe : pe + 4] != b"PE\0\0":
        return HEADER
    sections, optional = struct.unpack_from("<H12xH", content, pe + 6)
    table = pe + COFF + optional
    needed = int(table + SECTION.size * sections)
    if len(content) < needed:
        return needed
    return max([needed] + [int(start + size) for size, start in SECTION.iter_unpack(content[table:needed])])


def _from_zboot(name: str, content: bytes, depth: int) -> Flat:
    if len(content) < ZBOOT.size:
        raise ImageError(f"{name} is a truncated EFI zboot image; {NEEDED}")
    _, start, size, method = ZBOOT.unpack_from(content)
    if start + size > len(content):
        raise ImageError(f"{name} is a truncated EFI zboot image: {len(content)} of {start + size} bytes; {NEEDED}")
    text = method.split(b"\0")[0].decode("ascii", "replace")
    packed = content[start : start + size]
    return _unpack(name, _decompress(name, _ZBOOT_NAMES.get(text, text), packed), depth=depth + 1)


# compression


def _gunzip(packed: bytes, most: int) -> tuple[bytes, bool]:
    d = zlib.decompressobj(wbits=31)
    return d.decompress(packed, most), d.eof


def _unlzma(packed: bytes, most: int) -> tuple[bytes, bool]:
    d = lzma.LZMADecompressor(memlimit=LARGEST)
    return d.decompress(packed, most), d.eof


def _unzstd(packed: bytes, most: int) -> tuple[bytes, bool]:
    try:
        from compression.zstd import ZstdDecompressor  # Python 3.14
    except ImportError:
        from backports.zstd import ZstdDecompressor
    d = ZstdDecompressor()
    return d.decompress(packed, most), d.eof


_METHODS: dict[str, Callable[[bytes, int], tuple[bytes, bool]]] = {
    "gzip": _gunzip,
    "xz": _unlzma,
    "lzma": _unlzma,
    "zstd": _unzstd,
}
_ZBOOT_NAMES = {"xzkern": "xz", "zstd22": "zstd"}
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"\x5d\0\0": "lzma",
    b"\x02\x21\x4c\x18": "lz4",
    b"\x04\x22\x4d\x18": "lz4",
    b"\x89LZO": "lzo",
    b"BZh": "bzip2",
}


def _decompress(name: str, method: str, packed: bytes) -> bytes:
    unpack = _METHODS.get(method)
    if not unpack:
        known = ", ".join(_METHODS)
        raise ImageError(f"{name} is packed with {method}, which is not supported; unpack it first, or use {known}")
    try:
        head, _ = unpack(packed, PEEK)  # a few bytes can unpack to anything: what is no kernel is not unpacked
        most = _most(name, method, head)
        content, complete = unpack(packed, most)
    except ImageError:
        raise
    except Exception as error:  # each library has its own class for damaged data
        raise ImageError(f"{name} is packed with {method} but damaged ({error}); {NEEDED}") from None
    if not complete and len(content) < most:
        raise ImageError(f"{name} is packed with {method} but truncated; {NEEDED}")
    if not complete:
        raise ImageError(f"{name} is packed with {method} and larger inside than it says ({most} bytes); {NEEDED}")
    return content


def _most(name: str, method: str, head: bytes) -> int:
    """How many bytes there may be in what begins with `head`."""
    if head[IMAGE_MAGIC_AT : IMAGE_MAGIC_AT + 4] == IMAGE_MAGIC and len(head) >= HEADER:
        size, _ = _header(name, head)
        return min(size, LARGEST) + 1  # an Image takes more memory than its file has bytes
    if head and not head.startswith((elf.MAGIC, *_PACKED)) and head[4:8] != b"zimg":
        raise ImageError(f"{name} is packed with {method}, and inside is {_guess(head)}; {NEEDED}")
    return LARGEST


# what else people have at hand, so that the sentence can say so

_OTHERS = (
    (0x202, b"HdrS", "an x86 Linux kernel"),
    (0x24, b"\x18\x28\x6f\x01", "a 32-bit Arm zImage"),
    (0x38, b"RSC\x05", "a RISC-V Linux Image"),
    (0, b"KDUMP   ", "a kdump memory dump"),
    (0, b"\x27\x05\x19\x56", "a U-Boot uImage"),
    (0, b"\xd0\x0d\xfe\xed", "a device tree or FIT image"),
    (0, b"ANDROID!", "an Android boot image"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"MZ", "a PE file without an arm64 kernel header"),
)


def _guess(content: bytes) -> str:
    for at, magic, what in _OTHERS:
        if content[at : at + len(magic)] == magic:
            return what
    return "no kernel image of a known kind"
