"""Headers that claim 2^60 bytes, files that unpack to a gigabyte: refused in a sentence, in two seconds, in 256 MiB."""

from __future__ import annotations

import io
import json
import lzma
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.emu import dumps as made
from tests.fuzz import dumps, images
from tests.fuzz.harness import Target, failure
from tests.fuzz.targets import TARGETS

SECONDS, MEMORY = 2.0, 256 << 20
HUGE = 1 << 60
DEEP = b"[" * 1_000_000


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGTABLE_CACHE", str(tmp_path))


def changed(data: bytes, at: int, form: str, *values: int) -> bytes:
    """With other numbers at one place."""
    out = bytearray(data)
    struct.pack_into(form, out, at, *values)
    return bytes(out)


def bomb(method: str, head: bytes = b"", size: int = 1 << 30) -> bytes:
    """`size` zeros behind `head`, packed."""
    if method == "zstd":
        try:
            from compression.zstd import ZstdCompressor
        except ImportError:
            from backports.zstd import ZstdCompressor
        packer = ZstdCompressor(1)
    else:
        packer = zlib.compressobj(9, wbits=31) if method == "gzip" else lzma.LZMACompressor(preset=0)
    parts = [packer.compress(head)]
    parts += [packer.compress(bytes(1 << 20)) for _ in range(size >> 20)]
    return b"".join([*parts, packer.flush()])


def claims(size: int) -> bytes:
    """The header of an Image that takes `size` bytes."""
    return changed(images.tiny_image(64), 0x10, "<Q", size)


def core(**row: int) -> bytes:
    """A core whose one PT_LOAD says something else (offset, vaddr, paddr, filesz, memsz)."""
    names = ("offset", "vaddr", "paddr", "filesz", "memsz")
    data = made.elf_core([made.Load(dumps.SLOTS, dumps.ram())])
    for name, value in row.items():
        data = changed(data, 64 + 56 + 8 + 8 * names.index(name), "<Q", value)
    return data


def kdump(at: int, form: str, value: int) -> bytes:
    return changed(dumps.kdumps()[0], at, form, value)


def elf(rows: int, size: int) -> bytes:
    """A vmlinux with `rows` segments over each other."""
    data = images.elfs()[1]
    head = changed(data[:64], 56, "<H", rows)
    row = struct.pack("<IIQQQQQQ", 1, 7, 0, 1 << 40, 0, min(size, 1 << 20), size, 16)
    return (changed(head, 32, "<Q", len(data)) + data[64:] + row * rows).ljust(1 << 20, b"\0")


def package(size: int) -> bytes:
    """A package whose kernel says that it has `size` bytes."""
    out = io.BytesIO()
    entry = tarfile.TarInfo("./boot/vmlinuz-9")
    entry.size = size
    out.write(entry.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 16))
    return images.deb("data.tar", out.getvalue())


def snapshot(**head: object) -> bytes:
    text, _, ram = dumps.snapshot_parts()[0].partition(b"\n")
    return json.dumps({**json.loads(text), **head}).encode() + b"\n" + ram


CASES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "zstd bomb": ("container", lambda: bomb("zstd")),
    "zstd bomb in a zboot image": ("container", lambda: images.zboot(bomb("zstd"), b"zstd22")),
    "zstd bomb that begins like a small Image": ("container", lambda: bomb("zstd", claims(1 << 20))),
    "Image of 2^60 bytes": ("container", lambda: changed(images.tiny_image(), 0x10, "<Q", HUGE)),
    "lzma with a dictionary of 4 GiB": ("container", lambda: b"\x5d" + struct.pack("<Iq", 0xFFFF_FFFF, HUGE)),
    "package with a file of 2^60 bytes": ("container", lambda: package(HUGE)),
    "package with a member of 10 GB": ("container", lambda: images.package().replace(b"100644", b"100644", 1)[:-400]),
    "vmlinux of 2^60 bytes": ("vmlinux", lambda: elf(1, HUGE)),
    "vmlinux of segments over each other": ("vmlinux", lambda: elf(6000, 1 << 20)),
    "BTF with strings of 4 GiB": ("image", lambda: bytes(images.made().content).replace(
        images.made().content[images.made().places["btf"] + 20 :][:4], b"\xff\xff\xff\xff")),
    "core with 2^32 segments": ("core", lambda: changed(changed(dumps.cores()[0], 56, "<H", 0xFFFF), 40, "<Q", 64)),
    "core with 2^60 bytes in the file": ("core", lambda: core(filesz=HUGE, memsz=HUGE)),
    "core with a segment at 2^60 of the file": ("core", lambda: core(offset=HUGE)),
    "core with notes of 4 GiB": ("core", lambda: changed(dumps.cores()[0], 64 + 32, "<Q", 1 << 32)),
    "core with a note that is longer": ("core", lambda: changed(dumps.cores()[0], 64 + 2 * 56 + 4, "<I", 0xFFFF_FFFF)),
    "kdump with bitmaps of 2^31 blocks": ("kdump", lambda: kdump(8 + 4 + 390 + 6 + 16 + 12, "<I", 0x7FFF_FFFF)),
    "flattened kdump, a piece at 2^60": ("kdump", lambda: made.flattened(b"")[:4096] + struct.pack(">qq", HUGE, HUGE)),
    "snapshot with RAM of 2^60 bytes": ("header", lambda: snapshot(ram=[[dumps.SLOTS, HUGE, 1 << 16]])),
    "snapshot with RAM at 2^60": ("header", lambda: snapshot(ram=[[HUGE, 4096, 1 << 16]])),
    "snapshot with two RAMs over each other": ("header", lambda: snapshot(ram=[[dumps.SLOTS, 8192, 1 << 16]] * 2)),
    "snapshot with a header of 4 GiB": ("snapshot", lambda: changed(dumps.snapshots()[0], 20, "<I", 0xFFFF_FFFF)),
    "raw dump at 2^60": ("raw", lambda: b"FILE@0x1000000000000000\n" + dumps.ram()),
    "trace that sets 2^60 bytes": ("casemate", lambda: b"(mem-set 1 0 0 1000000000000000 ff)"),
    "trace that frees 2^60 bytes": ("casemate", lambda: b"(mem-free 1 0 0 1000000000000000)"),
    "trace of 2^60 CPUs": ("casemate", lambda: b"(barrier 1 1152921504606846976 isb)"),
    "VMCOREINFO with 2^60 VA bits": ("vmcoreinfo", lambda: b"NUMBER(VA_BITS)=1152921504606846976\n"),
    "device tree of 4 GiB": ("dtb", lambda: changed(dumps.dtbs()[0], 36, ">I", 0xFFFF_FFFF)),
    "JSON a million deep, registers": ("registers", lambda: b'{"TCR_EL1": ' + DEEP),
    "JSON a million deep, corpus": ("corpus", lambda: DEEP),
    "JSON a million deep, stored case": ("stored", lambda: b'{"function": "set_memory_ro", "case": ' + DEEP),
    "JSON a million deep, snapshot": ("header", lambda: DEEP[:65000]),
    "condition a million deep": ("where", lambda: b"(" * 1_000_000),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_at_once(name: str) -> None:
    target, make = CASES[name]
    wrong = failure(TARGETS[target], data := make(), SECONDS, MEMORY)
    assert wrong is None, wrong.text
    if target != "image":  # which is read without types
        assert refused(TARGETS[target], data)


def refused(target: Target, data: bytes) -> bool:
    try:
        target.run(data)
    except Exception as error:
        return type(error).__name__ in target.errors
    return False


@pytest.mark.full
@pytest.mark.parametrize("method", ["gzip", "xz"])
def test_other_bombs(method: str) -> None:
    data = bomb(method)
    assert failure(TARGETS["container"], data, SECONDS, MEMORY) is None
    assert refused(TARGETS["container"], data)


@pytest.mark.full
@pytest.mark.parametrize("method", ["gzip", "zstd"])
def test_a_bomb_that_says_it_is_a_kernel_of_a_gigabyte_is_bounded(method: str) -> None:
    data = bomb(method, claims(1 << 50), size=3 << 30)
    assert failure(TARGETS["container"], data, 60.0) is None
    assert refused(TARGETS["container"], data)


def test_a_core_with_a_terabyte_of_zeros_is_read_where_it_is_asked(tmp_path: Path) -> None:
    """What the file does not hold costs nothing: p_memsz, and a sparse file."""
    data = core(memsz=1 << 40)
    (tmp_path / "core").write_bytes(data)
    wrong = failure(TARGETS["core"], data, SECONDS, MEMORY)
    assert wrong is None, wrong.text
