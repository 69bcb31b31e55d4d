"""Targets that read kernels: containers, images, symbols, types, packages."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import tarfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import numpy as np

from tests.emu import synthetic
from tests.fuzz.files import file
from tests.fuzz.harness import Target

FEW = [synthetic.Sym("_text", "T", 0), synthetic.Sym("_stext", "T", 0x10000)]
ORDERS = ("offsets behind tokens", "offsets first", "offsets first, seqs before tokens")


@cache
def made(order: str = ORDERS[0], form: str = "base", relocation: str = "relr") -> synthetic.Made:
    """A small whole Image."""
    return synthetic.make(
        order=order, form=form, relocation=relocation, btf=synthetic.kernel_btf(4), data=exported(), bugs=5
    )


def exported() -> bytes:
    """A table of exported symbols, and the names that it points at."""
    names = [b"memstart_addr", *(b"exported_%d" % k for k in range(12))]
    rows, text = b"", b"\0"
    room = 12 * len(names)
    for k, name in enumerate(names):
        rows += struct.pack("<iii", 0x100 + 8 * k - 12 * k, room + len(text) - 12 * k - 4, 0)
        text += name + b"\0"
    return rows + text


def images() -> list[bytes]:
    """Images of every order of tables, form of addresses and relocation."""
    rows = [(ORDERS[0], "base", "relr"), (ORDERS[1], "base", "rela"), (ORDERS[2], "self", "relr")]
    return [bytes(made(*row).content) for row in rows]


def read_image(data: bytes) -> None:
    """All that is read from an Image, and asked of it later."""
    from emu import bugtable, container, imagecache, reading
    from emu.image import KernelImage

    flat = container.read("a", data)
    found = reading.read("a", flat)
    image = KernelImage("a", found, imagecache.directory("0"))
    reading.recall(*reading.memorise(found))
    for place, line in enumerate(bugtable.find(found.data)[:50, 0].tolist()):
        bugtable.BugTable(found.data, found.base, bugtable.find(found.data)).get(found.base + line + place)
    for name in list(image.symbols)[:40]:
        image.symbols.at(image.symbols[name])
        image.symbols.size_of(name)
    image.displaced(2 << 20)
    ask_types(found.btf())


BY_KIND = {3: "array", 6: "enumerators", 19: "enumerators"}


def ask_types(types: object) -> None:
    """Everything that may be asked of BTF."""
    from emu.btf import Btf, BtfError

    if not isinstance(types, Btf):
        return
    for number in range(1, min(len(types), 60) + 1):
        for question in (types.name_of, types.size_of, types.members_of, types.encoding):
            with suppress(BtfError):
                question(number)
        with suppress(BtfError):
            kind = types.kind(number)
            if kind in BY_KIND:
                getattr(types, BY_KIND[kind])(number)
    for name in ("mm_struct", "task_struct", "pgd_t", "long unsigned int", "e"):
        for call in (types.size, types.members, types.enum, types.returns, types.has):
            with suppress(BtfError):
                call(name)
    with suppress(BtfError):
        types.offset("mm_struct", "pgd")


def btf(data: bytes) -> None:
    """The types alone; the section is found as in an image."""
    from emu import btf as reader

    image = np.frombuffer(b"\0" * 8 + data, np.uint8)
    span = reader.find(image)
    ask_types(reader.Btf(image[slice(*span)]) if span else None)


def btfs() -> list[bytes]:
    """Types of every kind."""
    writer = synthetic.BtfWriter()
    number = writer.integer("int", 4)
    writer.array(number, number, 7)
    writer.bitfields("bits", 8, [("a", number, 0, 3), ("b", number, 3, 5)])
    writer.enum("e", {"A": 0, "B": -1}, signed=True)
    writer.enum("w", {"C": 1 << 40}, wide=True)
    writer.const(writer.typedef("t", number))
    writer.record("u", 8, [("x", number, 0)], union=True)
    return [synthetic.kernel_btf(4), synthetic.kernel_btf(3), writer.bytes()]


def kallsyms(data: bytes) -> None:
    """The symbol tables alone."""
    from emu import kallsyms as reader

    reader.read(np.frombuffer(data, np.uint8))


def kallsyms_seeds() -> list[bytes]:
    """The tables without the text before them."""
    symbols = synthetic.default_symbols(601)[:300]
    found = []
    for order, form in ((ORDERS[0], "base"), (ORDERS[1], "self"), (ORDERS[2], "base")):
        writer = synthetic.Writer()
        synthetic.add_kallsyms(writer, symbols, order=order, align=8, form=form, relative_base=0xFFFF800080000000)
        found.append(bytes(writer.content))
    return found


PACKERS: tuple[tuple[str, Callable[[bytes], bytes]], ...] = (
    ("gzip", lambda data: gzip.compress(data, 1, mtime=0)),
    ("xz", lambda data: lzma.compress(data, preset=0)),
    ("lzma", lambda data: lzma.compress(data, lzma.FORMAT_ALONE, preset=0)),
    ("zstd", lambda data: zstd(data)),
)


def zstd(data: bytes) -> bytes:
    """Packed with zstd."""
    try:
        from compression.zstd import compress
    except ImportError:
        from backports.zstd import compress
    return bytes(compress(data, 1))


def zboot(packed: bytes, method: bytes) -> bytes:
    """An EFI zboot image."""
    head = struct.pack("<4s4sII8x32s", b"MZ\0\0", b"zimg", 64, len(packed), method)
    return head.ljust(64, b"\0") + packed


def tiny_image(size: int = 0x2000) -> bytes:
    """Only what makes an Image an Image."""
    data = bytearray(size)
    struct.pack_into("<QQ", data, 0x10, 2 * size, 2)
    data[0x38:0x3C] = b"ARMd"
    data[0x800 : 0x800 + len(synthetic.BANNER)] = synthetic.BANNER
    return bytes(data)


def package(packed: str = "gz", name: str = "./boot/vmlinuz-9", content: bytes | None = None) -> bytes:
    """A Debian package with one file."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = len(content := tiny_image() if content is None else content)
        tar.addfile(entry, io.BytesIO(content))
    pack = {"": bytes, "gz": PACKERS[0][1], "xz": PACKERS[1][1], "zst": zstd}[packed]
    return deb(f"data.tar.{packed}".rstrip("."), pack(out.getvalue()))


def deb(name: str, content: bytes) -> bytes:
    """An ar archive with that member."""

    def member(name: str, content: bytes) -> bytes:
        head = f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        return head + content + b"\n" * (len(content) & 1)

    return b"!<arch>\n" + member("debian-binary", b"2.0\n") + member(name, content)


def contained(data: bytes) -> None:
    """A kernel file of any kind, as far as the bytes of its Image."""
    from emu import container

    container.read(file(data))


def containers() -> list[bytes]:
    """A small Image in every wrapping."""
    tiny = tiny_image()
    packed = {name: pack(tiny) for name, pack in PACKERS}
    zboots = [zboot(packed["gzip"], b"gzip"), zboot(packed["zstd"], b"zstd22"), zboot(packed["xz"], b"xzkern")]
    debs = [package(kind) for kind in ("", "gz", "xz", "zst")]
    return [tiny, synthetic.with_pe(tiny), *packed.values(), *zboots, *debs, *elfs()]


def repacked(data: bytes) -> None:
    """Bytes that are packed well before they are read: the first says how, the rest are what is inside."""
    if not data:
        return
    name, pack = PACKERS[data[0] % len(PACKERS)]
    inner = data[1:]
    match data[0] // 4 % 3:
        case 0:
            contained(pack(inner))
        case 1:
            contained(zboot(pack(inner), {"zstd": b"zstd22", "xz": b"xzkern"}.get(name, name.encode())))
        case _:
            contained(deb(f"data.tar.{('', 'gz', 'xz', 'zst')[data[0] % 4]}".rstrip("."), _outer(data[0], inner)))


def _outer(choice: int, inner: bytes) -> bytes:
    return (bytes, PACKERS[0][1], PACKERS[1][1], zstd)[choice % 4](inner)


def repackable() -> list[bytes]:
    """A choice, and something to pack."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name in ("./usr/", "./boot/vmlinuz-9"):
            entry = tarfile.TarInfo(name)
            entry.size = 0x400
            tar.addfile(entry, io.BytesIO(tiny_image(0x400)))
    return [b"\0" + tiny_image(), b"\3" + PACKERS[3][1](tiny_image()), b"\4" + elfs()[0], b"\x09" + out.getvalue()]


def elfs() -> list[bytes]:
    """ELF kernels with symbols and relocations, and one without sections."""
    base = 0xFFFF_8000_8000_0000
    symbols = [("_text", base), ("init_mm", base + 0x900), ("$x", base)]
    tiny = tiny_image()
    whole = synthetic.elf([(base, tiny), (base + 0x4000, b"data" * 16)], symbols, rela={base + 0x4000: base + 8})
    return [whole, synthetic.elf([(base, tiny)], symbols, sections=False)]


def vmlinux(data: bytes) -> None:
    """An ELF kernel: its segments, relocations and symbols."""
    from emu import elf

    elf.load(data)


def symbol_file(data: bytes) -> None:
    """Symbols from a file beside the image."""
    from emu import symbolfile

    entries = symbolfile.parse("a", data)
    image = np.frombuffer(made().content, np.uint8)
    symbolfile.at_link_address(entries, symbolfile.link_base(entries, image, len(image)), len(image), None)


def symbol_files() -> list[bytes]:
    """System.map text and ELF."""
    rows = sorted(made().rows(), key=lambda row: row[2])[:200]
    text = "".join(f"{address:016x} {letter} {name}\n" for name, letter, address in rows)
    return [text.encode(), text.replace("\n", "\t[module]\n").encode(), elfs()[0]]


IMAGE_ERRORS = ("ImageError",)
TARGETS = (
    Target("image", "an Image: kallsyms, relocations, BTF, exported symbols, WARN sites, layout", read_image, images,
           (*IMAGE_ERRORS, "BtfError"), ("emu/reading.py", "emu/relocate.py", "emu/recover.py", "emu/bugtable.py",
           "emu/layout.py", "emu/symbols.py"), 1 << 18),
    Target("kallsyms", "the kernel's own symbol tables", kallsyms, kallsyms_seeds, ("KallsymsError",),
           ("emu/kallsyms.py",)),
    Target("btf", "the kernel's types", btf, btfs, ("BtfError",), ("emu/btf.py",), 1 << 14),
    Target("container", "kernel files: gzip, xz, lzma, zstd, zboot, ELF, PE, Debian packages", contained, containers,
           IMAGE_ERRORS, ("emu/container.py", "emu/deb.py"), 1 << 15),
    Target("packed", "the same with what is inside changed, and packed well", repacked, repackable, IMAGE_ERRORS,
           ("emu/container.py", "emu/deb.py"), 1 << 15),
    Target("vmlinux", "ELF kernels: segments, symbols, relocations", vmlinux, elfs, ("ElfError",), ("emu/elf.py",),
           1 << 15),
    Target("symbols", "symbols beside an image: System.map, /proc/kallsyms, ELF", symbol_file, symbol_files,
           ("ImageError", "SymbolFileError"), ("emu/symbolfile.py",), 1 << 15),
)  # fmt: skip
