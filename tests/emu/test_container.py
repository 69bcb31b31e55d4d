"""What emu.container makes of files: right ones in every wrapping, wrong ones in one sentence."""

from __future__ import annotations

import functools
import gzip
import io
import lzma
import os
import struct
import tarfile
from pathlib import Path

import pytest

from emu import container
from emu.container import ImageError
from tests.emu import synthetic
from tests.kernels import KERNELS, kernel_path

try:
    from compression import zstd
except ImportError:
    from backports import zstd

IMAGE = synthetic.with_pe(bytes(synthetic.make().content))


def zboot(method: bytes, payload: bytes) -> bytes:
    head = struct.pack("<2sH4sII8x32s", b"MZ", 0, b"zimg", 512, len(payload), method)
    return head.ljust(512, b"\0") + payload + b"\0" * 100


def deb(members: dict[str, bytes], packed: str = "xz") -> bytes:
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode=f"w:{packed}") as files:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            files.addfile(entry, io.BytesIO(content))
    out = b"!<arch>\n"
    for name, content in (("debian-binary", b"2.0\n"), (f"data.tar.{packed}", tar.getvalue())):
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content
        out += b"\n" * (len(content) & 1)
    return out


BASE = 0xFFFF800080000000
GOOD = {
    "Image": IMAGE,
    "gzip": gzip.compress(IMAGE, 1),
    "zstd": zstd.compress(IMAGE),
    "xz": lzma.compress(IMAGE, preset=0),
    "lzma": lzma.compress(IMAGE, lzma.FORMAT_ALONE, preset=0),
    "zboot gzip": zboot(b"gzip", gzip.compress(IMAGE, 1)),
    # The kernel's build appends the unpacked size to some payloads.
    "zboot zstd with size": zboot(b"zstd", zstd.compress(IMAGE) + struct.pack("<I", len(IMAGE))),
    "zboot zstd22": zboot(b"zstd22", zstd.compress(IMAGE)),
    "zboot lzma": zboot(b"lzma", lzma.compress(IMAGE, lzma.FORMAT_ALONE, preset=0)),
    "zboot xzkern": zboot(b"xzkern", lzma.compress(IMAGE, preset=0)),
    "deb, before 7.x": deb({"./boot/System.map-6.1": b"no", "./boot/vmlinuz-6.1": IMAGE}),
    "deb, 7.x": deb({"./usr/lib/modules/7.3/config": b"no", "./usr/lib/modules/7.3/vmlinuz": IMAGE}),
    "gzip in deb": deb({"./boot/vmlinuz-6.1": gzip.compress(IMAGE, 1)}),
    "ELF": synthetic.elf([(BASE, IMAGE[:0x20000]), (BASE + 0x20000, IMAGE[0x20000:])]),
    "gzip of ELF": gzip.compress(synthetic.elf([(BASE, IMAGE)], kind=2), 1),
}


@pytest.mark.parametrize("content", GOOD.values(), ids=GOOD)
def test_every_wrapping_gives_the_same_bytes_and_the_file_name_plays_no_part(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "holiday.jpg"
    path.write_bytes(content)
    flat = container.read(path)
    assert flat.data.tobytes() == IMAGE
    assert (flat.image_size, flat.page_shift) == (struct.unpack_from("<Q", IMAGE, 0x10)[0], 12)


def test_an_elf_keeps_its_link_address_and_symbols_but_no_mapping_symbols(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    path.write_bytes(synthetic.elf([(BASE, IMAGE)], [("_text", BASE), ("$x", BASE), ("init_mm", BASE + 0x20000)]))
    flat = container.read(path)
    assert flat.base == BASE
    assert list(zip(flat.entries.names, flat.entries.addresses.tolist(), strict=True)) == [
        ("_text", BASE),
        ("init_mm", BASE + 0x20000),
    ]


def test_segments_of_an_elf_lie_at_their_link_addresses_whatever_their_order(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    head, hole = IMAGE[:0x1000], 0x3000
    path.write_bytes(synthetic.elf([(BASE + hole, b"later"), (BASE, head)]))
    data = container.read(path).data.tobytes()
    assert data == head + bytes(hole - len(head)) + b"later"


def patched(at: int, form: str, value: int) -> bytes:
    out = bytearray(IMAGE)
    struct.pack_into(form, out, at, value)
    return bytes(out)


X86 = bytes(0x202) + b"HdrS" + bytes(4096)
BAD = {
    "garbage": (bytes(range(1, 256)) * 99, "no kernel image of a known kind"),
    "text": (b"hello\n", "no kernel image of a known kind"),
    "empty": (b"", "is empty"),
    "x86 kernel": (X86, "x86 Linux kernel"),
    "x86 ELF": (synthetic.elf([(BASE, IMAGE)], machine=62), "an ELF file for X86_64"),
    "RISC-V ELF": (synthetic.elf([(BASE, IMAGE)], machine=243), "an ELF file for RISCV"),
    "big-endian ELF": (synthetic.elf([(BASE, IMAGE)], big=True), "big-endian ELF"),
    "object file": (synthetic.elf([(BASE, IMAGE)], kind=1), "an object file or module"),
    "core dump": (synthetic.elf([(BASE, IMAGE)], kind=4), "a core dump"),
    "ELF without segments": (synthetic.elf([]), "without loadable segments"),
    "ELF of something else": (synthetic.elf([(BASE, bytes(4096))]), "no kernel starts in its first segment"),
    "ELF header only": (GOOD["ELF"][:64], "ELF file"),
    "ELF cut in its headers": (GOOD["ELF"][:100], "ELF file"),
    "ELF cut in a segment": (GOOD["ELF"][:0x8000], "ELF file"),
    "ELF without sections, cut": (synthetic.elf([(BASE, IMAGE)], sections=False)[:0x8000], "truncated ELF file"),
    "ELF that spans too much": (synthetic.elf([(0, IMAGE), (BASE, IMAGE)]), "segments span"),
    "big-endian Image": (patched(0x18, "<Q", 3), "big-endian arm64 Image"),
    "image_size below the file's": (patched(0x10, "<Q", 0x1000), "damaged arm64 Image"),
    "image_size 0": (patched(0x10, "<Q", 0), "damaged arm64 Image"),
    "image_size absurd": (patched(0x10, "<Q", 1 << 60), "damaged arm64 Image"),
    "gzip cut": (GOOD["gzip"][:-100], "packed with gzip but truncated"),
    "gzip cut at its header": (GOOD["gzip"][:5], "packed with gzip but truncated"),
    "gzip damaged": (GOOD["gzip"][:300] + b"\xff" * 64 + GOOD["gzip"][364:], "packed with gzip but"),
    "gzip of text": (gzip.compress(b"hello"), "no kernel image"),
    "zstd cut": (GOOD["zstd"][:-100], "packed with zstd but truncated"),
    "zstd damaged": (GOOD["zstd"][:4] + b"\xff" * 64, "packed with zstd but damaged"),
    "xz cut": (GOOD["xz"][:-100], "packed with xz but truncated"),
    "lz4": (b"\x04\x22\x4d\x18" + bytes(64), "packed with lz4, which is not supported"),
    "zboot cut": (GOOD["zboot gzip"][:1000], "truncated EFI zboot image"),
    "zboot header cut": (GOOD["zboot gzip"][:30], "truncated EFI zboot image"),
    "zboot with lz4": (zboot(b"lz4", bytes(64)), "packed with lz4, which is not supported"),
    "zboot of text": (zboot(b"gzip", gzip.compress(b"hello")), "no kernel image"),
    "gzip seven times over": (
        functools.reduce(lambda c, _: gzip.compress(c, 1), range(7), IMAGE),
        "more than 4 times",
    ),
    "deb without a kernel": (deb({"./usr/share/doc/vmlinuz": IMAGE, "./etc/vmlinuz-6.1": IMAGE}), "needed"),
    "deb cut": (GOOD["deb, 7.x"][:-1000], "needed"),
    "deb of x86": (deb({"./boot/vmlinuz-6.1": X86}), r"\(boot/vmlinuz-6.1\) is an x86 Linux kernel"),
}


@pytest.mark.parametrize(("content", "what"), BAD.values(), ids=BAD)
def test_a_wrong_file_is_named_and_described_in_one_sentence(tmp_path: Path, content: bytes, what: str) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=what) as caught:
        container.read(path)
    said = str(caught.value)
    assert said.startswith(str(path))
    assert "needed" in said or "not supported" in said
    assert "\n" not in said
    assert len(said) < 400


CUTS = (1, 59, 60, 63, 64, 80, 88, 200, 300, 0x1000, 0x10000, len(IMAGE) // 2, len(IMAGE) - 1)


@pytest.mark.parametrize("length", CUTS)
def test_an_image_cut_to_any_length_is_seen_by_its_section_table(tmp_path: Path, length: int) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(IMAGE[:length])
    with pytest.raises(ImageError, match="truncated arm64 Image" if length >= 60 else "an arm64 kernel is needed"):
        container.read(path)


def test_a_directory_and_a_missing_file_are_said_to_be_that(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="is a directory; an arm64 kernel is needed"):
        container.read(tmp_path)
    with pytest.raises(ImageError, match="does not exist; an arm64 kernel is needed"):
        container.read(tmp_path / "vmlinuz")


def test_a_device_is_not_read() -> None:
    with pytest.raises(ImageError, match="/dev/null is a device"):
        container.read("/dev/null")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_says_so(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(IMAGE)
    path.chmod(0)
    with pytest.raises(ImageError, match="Permission denied"):
        container.read(path)


def test_a_32_bit_elf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vmlinux"
    arm = struct.pack("<HHIIIIIHHHHHH", 2, 40, 1, 0, 52, 0, 0, 52, 32, 0, 40, 0, 0)
    path.write_bytes(b"\x7fELF\x01\x01\x01" + bytes(9) + arm)
    with pytest.raises(ImageError, match="ELF file for ARM"):
        container.read(path)


@pytest.mark.kernels
@pytest.mark.parametrize("name", KERNELS)
def test_a_real_kernel_cut_anywhere_is_seen(tmp_path: Path, name: str) -> None:
    content = kernel_path(name).read_bytes()
    path = tmp_path / "vmlinuz"
    for length in (100, 4096, len(content) // 3, len(content) * 9 // 10):
        path.write_bytes(content[:length])
        with pytest.raises(ImageError, match="truncated arm64 Image"):
            container.read(path)
