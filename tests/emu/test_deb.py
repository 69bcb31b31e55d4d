"""emu.deb: packages made here byte by byte and by dpkg-deb, whole and damaged."""

from __future__ import annotations

import gzip
import io
import lzma
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from emu.deb import DebError, members, read_member

try:
    from compression import zstd  # Python 3.14
except ImportError:
    from backports import zstd

PACKERS = {
    "": lambda content: content,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".zst": zstd.compress,
}
FILES = {
    "./usr/share/doc/readme": b"read me",
    "./boot/vmlinuz-6.1.0-1-arm64": bytes(range(256)) * 999,
    "./empty": b"",
}


def ar_member(name: str, content: bytes) -> bytes:
    header = f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
    return header + content + b"\n" * (len(content) & 1)


def tar_of(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        folder = tarfile.TarInfo("./boot")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("./boot/vmlinuz")
        link.type, link.linkname = tarfile.SYMTYPE, "vmlinuz-6.1.0-1-arm64"
        tar.addfile(link)
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def make_deb(path: Path, files: Mapping[str, bytes] = FILES, suffix: str = ".xz") -> Path:
    data = PACKERS[suffix](tar_of(files))
    parts = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar{suffix}": data}
    path.write_bytes(b"!<arch>\n" + b"".join(ar_member(name, content) for name, content in parts.items()))
    return path


def is_kernel(name: str) -> bool:
    return name.startswith("boot/vmlinuz")


@pytest.mark.parametrize("suffix", PACKERS, ids=lambda s: s or "plain")
def test_every_packing_gives_the_files_and_nothing_else(tmp_path: Path, suffix: str) -> None:
    deb = make_deb(tmp_path / "a.deb", suffix=suffix)
    found = {m.name: (m.size, m.content.read()) for m in members(deb)}
    assert found == {name[2:]: (len(content), content) for name, content in FILES.items()}


def test_content_need_not_be_read(tmp_path: Path) -> None:
    assert [m.name for m in members(make_deb(tmp_path / "a.deb"))] == [name[2:] for name in FILES]


def test_read_member_gives_the_first_regular_file_wanted(tmp_path: Path) -> None:
    # boot/vmlinuz, a symbolic link, comes before it
    name, content = read_member(make_deb(tmp_path / "a.deb"), is_kernel)
    assert name == "boot/vmlinuz-6.1.0-1-arm64"
    assert content == FILES["./" + name]


def test_reading_stops_at_the_member_asked_for(tmp_path: Path) -> None:
    deb = make_deb(tmp_path / "a.deb", {"./boot/vmlinuz": b"k" * 4096, "./rest": b"r" * (1 << 20)}, suffix="")
    with deb.open("r+b") as file:
        file.seek(-(1 << 19), 2)
        file.write(b"\xff" * (1 << 19))  # damage behind it
    assert read_member(deb, is_kernel)[1] == b"k" * 4096


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb is the judge: apt-get install dpkg")
@pytest.mark.parametrize("packing", ["none", "gzip", "xz", "zstd"])
def test_a_package_built_by_dpkg_deb_reads_as_dpkg_deb_reads_it(tmp_path: Path, packing: str) -> None:
    tree = tmp_path / "tree"
    for name, content in FILES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(content)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN/control").write_text(
        "Package: a\nVersion: 1\nArchitecture: all\nMaintainer: A <a@b>\nDescription: a\n"
    )
    deb = tmp_path / "a.deb"
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", f"-Z{packing}", "--build", tree, deb], check=True, capture_output=True
    )
    tar_file = subprocess.run(["dpkg-deb", "--fsys-tarfile", deb], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(tar_file)) as tar:
        theirs = {e.name.removeprefix("./"): tar.extractfile(e).read() for e in tar if e.isreg()}  # type: ignore[union-attr]
    assert {m.name: m.content.read() for m in members(deb)} == theirs
    assert len(theirs) == len(FILES)


# what is no package, or not a whole one


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def foreign(content: bytes) -> bytes:
    return b"\x7fELF" + content


def without_data(content: bytes) -> bytes:
    return content[: content.index(b"data.tar")]


def renamed(content: bytes) -> bytes:
    return content.replace(b"data.tar.xz ", b"data.tar.lz ")


def bad_header(content: bytes) -> bytes:
    return content.replace(b"`\n", b"`x")


def scrambled(content: bytes) -> bytes:
    return content[:-400] + b"\xff" * 400


DAMAGE = [
    (cut, "truncated"),
    (foreign, "is not a Debian package"),
    (without_data, "without data.tar"),
    (renamed, r"packed with \.lz, which is not supported \(\.xz, \.zst, \.gz\)"),
    (bad_header, "no ar member header"),
    (scrambled, "damaged"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[d.__name__ for d, _ in DAMAGE])
def test_damage_is_one_sentence_that_names_the_file(tmp_path: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]
    deb = make_deb(tmp_path / "a.deb")
    deb.write_bytes(damage(deb.read_bytes()))
    with pytest.raises(DebError, match=message) as caught:
        read_member(deb, lambda name: False)
    assert str(deb) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", PACKERS, ids=lambda s: s or "plain")
def test_a_data_part_cut_short_never_gives_short_content(tmp_path: Path, suffix: str) -> None:
    deb = tmp_path / "a.deb"
    data = PACKERS[suffix](tar_of({"./boot/vmlinuz": bytes(range(256)) * 4096}))
    parts = {"debian-binary": b"2.0\n", f"data.tar{suffix}": data[: len(data) // 2]}  # the ar container is in order
    deb.write_bytes(b"!<arch>\n" + b"".join(ar_member(name, content) for name, content in parts.items()))
    with pytest.raises(DebError, match="damaged"):
        read_member(deb, is_kernel)


def test_a_missing_member_and_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DebError, match="holds no such file"):
        read_member(make_deb(tmp_path / "a.deb"), lambda name: name == "boot")
    with pytest.raises(FileNotFoundError):
        read_member(tmp_path / "b.deb", is_kernel)
