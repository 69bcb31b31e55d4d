"""emu.snapshot and emu.boot, and what they are made of: initial RAM file system, device trees, the gdb protocol."""

from __future__ import annotations

import io
import os
import re
import socket
import struct
import subprocess
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

from emu import boot, dtb, gdbstub, initramfs, snapshot, snippets
from emu.boot import BootFailed, Options
from emu.gdbstub import GdbError, GdbStub
from emu.image import KernelImage
from emu.snapshot import ALIGN, MAGIC, Origin, Snapshot, SnapshotError
from pgtable.memory import PAGE
from tests.kernels import KERNELS, kernel_image
from tests.snapshots import FAST, booted

BASE = 0x4000_0000
ORIGIN = Origin("k", "6.0", "00", 0x200000, 0xFFFF800080200000, "quiet", "cortex-a57", 3, "mark", "now", "7.2")
GENERAL = {f"x{i}": i for i in range(31)} | {"sp": 0x1000, "pc": 0x2000, "cpsr": 5}
SYSTEM = {"TCR_EL1": 0x4500074B5503510, "TTBR1_EL1": 0x42001000, "VBAR_EL1": 0x800}


def ram(path: Path, pages: int = 64) -> np.ndarray:
    """A file of zeros with two pages of content, and its words."""
    words = np.zeros(pages * PAGE // 8, np.uint64)
    words[512 * 3 : 512 * 5] = np.arange(1024)
    path.write_bytes(words.tobytes())
    return words


@pytest.fixture
def made(tmp_path: Path) -> Snapshot:
    ram(tmp_path / "ram")
    return snapshot.save(tmp_path / "s.snap", ORIGIN, GENERAL, SYSTEM, [(BASE, tmp_path / "ram")])


# the file


def test_what_was_saved_is_loaded(made: Snapshot, tmp_path: Path) -> None:
    assert (made.origin, made.general, made.system) == (ORIGIN, GENERAL, SYSTEM)
    assert made.parts == ((BASE, 64 * PAGE, ALIGN),)
    words = np.frombuffer((tmp_path / "ram").read_bytes(), np.uint64)
    assert np.array_equal(made.memory.words(BASE, len(words)), words)
    regs = made.registers
    assert (SYSTEM["TCR_EL1"], SYSTEM["TTBR1_EL1"]) == (regs.TCR_EL1, regs.TTBR1_EL1)
    assert made.registers.features.name == "cortex-a57"


def test_two_regions_keep_their_places(tmp_path: Path) -> None:
    ram(tmp_path / "a", 5)
    (tmp_path / "b").write_bytes(b"\7" * 2 * PAGE)
    s = snapshot.save(tmp_path / "s", ORIGIN, GENERAL, SYSTEM, [(BASE, tmp_path / "a"), (1 << 40, tmp_path / "b")])
    assert [part.offset % ALIGN for part in s.parts] == [0, 0]
    assert s.memory.fetch(1 << 40) == 0x0707070707070707


def test_pages_of_zeros_take_no_room(tmp_path: Path) -> None:
    ram(tmp_path / "ram", 4096)
    s = snapshot.save(tmp_path / "s", ORIGIN, GENERAL, SYSTEM, [(BASE, tmp_path / "ram")])
    assert s.path.stat().st_size > 4096 * PAGE
    assert s.path.stat().st_blocks * 512 < 64 * PAGE


def test_memory_is_private_and_each_machine_has_its_own(made: Snapshot) -> None:
    before = made.path.read_bytes()
    other = made.fresh_memory()
    made.memory.store(BASE, 77)
    assert other.fetch(BASE) == 0
    assert made.path.read_bytes() == before
    made.memory.rewind()
    assert made.memory.fetch(BASE) == 0


def version(data: bytes) -> bytes:
    return data[:16] + struct.pack("<I", 9) + data[20:]


def damaged(data: bytes) -> bytes:
    return data[:40] + b"?" + data[41:]


def without_ram(data: bytes) -> bytes:
    text = b'{"origin": {}}'
    return MAGIC + struct.pack("<III", 1, len(text), zlib.crc32(text)) + text


WRONG: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "is not a snapshot of pgtable .*"),
    "foreign": (lambda d: b"\x7fELF" + d[4:], "is not a snapshot of pgtable .*"),
    "other version": (version, "has version 9 of the format, and this pgtable reads 1: boot again"),
    "header cut": (lambda d: d[:100], r"is cut short: its header ends after \d+ of \d+ bytes"),
    "header damaged": (damaged, "has a damaged header: its checksum is wrong"),
    "header incomplete": (without_ram, "has a damaged header: KeyError.*"),
    "RAM cut": (lambda d: d[:-PAGE], r"is cut short: \d+ of \d+ bytes are there"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_is_none_is_refused_in_one_sentence(case: str, made: Snapshot) -> None:
    change, sentence = WRONG[case]
    made.path.write_bytes(change(made.path.read_bytes()))
    with pytest.raises(SnapshotError, match=f"^{re.escape(str(made.path))} {sentence}$"):
        Snapshot.load(made.path)


def test_no_file_and_no_kernel_are_said(made: Snapshot, tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="nothing cannot be read: No such file or directory"):
        Snapshot.load(tmp_path / "nothing")
    with pytest.raises(SnapshotError, match=r"s\.snap needs its kernel k: "):
        _ = made.image


def test_a_failure_leaves_what_was_there_and_no_litter(made: Snapshot, tmp_path: Path) -> None:
    before = made.path.read_bytes()
    with pytest.raises(FileNotFoundError):
        snapshot.save(made.path, ORIGIN, GENERAL, SYSTEM, [(BASE, tmp_path / "missing")])
    (tmp_path / "odd").write_bytes(b"\1" * 100)
    with pytest.raises(ValueError, match="buffer size must be a multiple"):
        snapshot.save(made.path, ORIGIN, GENERAL, SYSTEM, [(BASE, tmp_path / "odd")])
    assert made.path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["odd", "ram", "s.snap"]


# a kernel that runs elsewhere


@pytest.mark.kernels
@pytest.mark.parametrize("name", KERNELS)
def test_a_moved_image_has_its_symbols_pointers_and_warnings_there(name: str) -> None:
    image, by = kernel_image(name), 0x5BF61B600000
    moved = image.moved(by)
    assert moved.base == image.base + by
    assert moved.symbols["vectors"] == image.symbols["vectors"] + by
    assert moved.symbols.describe(moved.symbols["vmap"] + 4) == "vmap+0x4"
    assert moved.symbols.all("gic_handle_irq") == [a + by for a in image.symbols.all("gic_handle_irq")]
    assert np.array_equal(moved.data, image.displaced(by))
    brk = image.base + int(image.bugs.rows[0, 0])
    there, here = moved.bugs.get(brk + by), image.bugs.get(brk)
    assert there
    assert here
    assert (there.file, there.line) == (here.file, here.line)
    assert image.moved(0) is image


# the initial RAM file system


def test_the_archive_is_small_and_has_a_console_and_init() -> None:
    data = initramfs.archive()
    assert len(data) < 1024
    found, at = {}, 0
    while b"TRAILER!!!" not in found:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = data[at + 110 : at + 110 + fields[11]].rstrip(b"\0")
        start = at + (110 + fields[11] + 3) // 4 * 4
        found[name] = (fields, data[start : start + fields[6]])
        at = start + (fields[6] + 3) // 4 * 4
    assert list(found) == [b"dev", b"dev/console", b"init", b"TRAILER!!!"]
    assert found[b"dev/console"][0][1] == 0o020600
    assert found[b"dev/console"][0][9:11] == [5, 1]
    assert found[b"init"][0][1] == 0o100755
    assert found[b"init"][1] == initramfs.elf(bytes(snippets.load("sleeper")))


def test_init_is_an_elf_program_that_starts_at_its_first_instruction() -> None:
    code = bytes(snippets.load("sleeper"))
    elf = ELFFile(io.BytesIO(initramfs.elf(code)))
    assert (elf["e_machine"], elf["e_type"], elf.num_segments()) == ("EM_AARCH64", "ET_EXEC", 1)
    segment = elf.get_segment(0)
    assert (segment["p_type"], segment["p_flags"]) == ("PT_LOAD", 5)
    assert segment["p_vaddr"] % 0x10000 == segment["p_offset"] == 0
    assert segment.data()[elf["e_entry"] - segment["p_vaddr"] :] == code
    assert initramfs.MARK in code


# device trees


def tree(*tokens: int | bytes) -> bytes:
    strings = b"one\0two\0"
    block = b"".join(t + bytes(-len(t) % 4) if isinstance(t, bytes) else struct.pack(">I", t) for t in tokens)
    end = 40 + len(block)
    head = struct.pack(">10I", dtb.MAGIC, 4096, 40, end, 40, 17, 16, 0, len(strings), len(block))
    return (head + block + strings).ljust(4096, b"\0")


TREE = tree(1, b"\0", 4, 3, 4, 0, b"AAAA", 1, b"chosen\0", 3, 6, 4, b"BBBBBB", 2, 1, b"x\0", 3, 4, 4, b"CCCC", 2, 2, 9)


def test_properties_are_found_and_replaced_by_path() -> None:
    assert [(p.node, p.name, p.size) for p in dtb.properties(TREE)] == [
        ("/", "one", 4),
        ("/chosen", "two", 6),
        ("/x", "two", 4),
    ]
    changed, done = dtb.replace(TREE, {"/chosen/two": b"123456789", "/y/one": b"...."})
    assert done == {"/chosen/two"}
    assert changed == TREE.replace(b"BBBBBB", b"123456")


def test_a_packed_tree_says_its_own_size_and_has_all_properties() -> None:
    packed = dtb.packed(TREE)
    assert len(packed) == struct.unpack_from(">I", packed, 4)[0] < 200
    assert list(dtb.properties(packed)) == list(dtb.properties(TREE))


def test_what_is_no_tree_is_refused() -> None:
    with pytest.raises(ValueError, match="no flattened device tree"):
        list(dtb.properties(bytes(64)))
    with pytest.raises(ValueError, match="device tree token 7 at 0x28"):
        list(dtb.properties(tree(7)))
    with pytest.raises(ValueError, match="/chosen/two has 6 bytes, not 2"):
        dtb.replace(TREE, {"/chosen/two": b"12"})


# the gdb protocol


class Stub(threading.Thread):
    """Answers like QEMU's stub, from a table."""

    ANSWERS = {  # noqa: RUF012
        "qSupported:qXfer:features:read+": ["T05thread:01;", "PacketSize=1000"],
        "qXfer:features:read:target.xml:0,800": ['m<t><xi:include href="s.xml"/>'],
        "qXfer:features:read:target.xml:1d,800": ["l</t>"],
        "qXfer:features:read:s.xml:0,800": ['l<reg name="x0" bitsize="64"/><reg name="VBAR" bitsize="64" regnum="9"/>'],
        "p0": ["0* 42"],
        "p9": ["0008000000000000"],
        "m1000,2": ["}\x03}\x03"],  # "##", escaped
        "m2000,2": ["E14"],
        "c": [],
    }

    def __init__(self, path: str) -> None:
        super().__init__(daemon=True)
        self.server = socket.socket(socket.AF_UNIX)
        self.server.bind(path)
        self.server.listen()
        self.seen: list[str] = []
        self.start()

    def run(self) -> None:
        connection, _ = self.server.accept()
        with self.server, connection:
            while data := connection.recv(4096):
                for packet in re.findall(rb"\$([^#]*)#(..)|(\x03)", data):
                    self.answer(connection, packet)

    def answer(self, connection: socket.socket, packet: tuple[bytes, bytes, bytes]) -> None:
        text, check, interrupt = packet
        if interrupt:
            connection.sendall(b"$T02#b6")
            return
        assert int(check, 16) == sum(text) & 0xFF
        self.seen.append(text.decode())
        for answer in self.ANSWERS[text.decode()]:
            data = answer.encode("latin-1")
            connection.sendall(b"+$%s#%02x" % (data, sum(data) & 0xFF))


@pytest.fixture
def stub(tmp_path: Path) -> Iterator[GdbStub]:
    server = Stub(str(tmp_path / "gdb"))
    with GdbStub(str(tmp_path / "gdb")) as client:
        yield client
    server.join(5)


def test_registers_have_the_manuals_names_and_their_numbers(stub: GdbStub) -> None:
    assert stub.registers == {"x0": gdbstub.Register(0, 64), "VBAR_EL1": gdbstub.Register(9, 64)}
    assert stub.read("VBAR_EL1") == 0x800
    assert stub.read("x0") == int.from_bytes(bytes.fromhex("000042"), "little")  # 0 and two more of it: 0* followed by


def test_an_error_names_the_request_and_a_running_guest_is_stopped(stub: GdbStub) -> None:
    with pytest.raises(GdbError, match="the gdb stub answers E14 to m2000,2"):
        stub.memory(0x2000, 2)
    stub.go()
    assert not stub.wait(0.05)
    stub.interrupt()


def test_a_stub_that_goes_away_is_an_error(tmp_path: Path) -> None:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "gdb"))
    server.listen()
    threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()
    with pytest.raises((GdbError, OSError)):
        GdbStub(str(tmp_path / "gdb"))
    server.close()


# booting


@pytest.mark.kernels
def test_without_qemu_it_names_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_image("debian:6.12")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BootFailed, match=r"qemu-system-aarch64 is not .* on PATH: install .* qemu-system-arm"):
        boot.boot(Options("debian:6.12"), tmp_path / "s")


@pytest.mark.kernels
def test_without_qmp_it_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel_image("debian:6.12")
    monkeypatch.setitem(__import__("sys").modules, "qemu.qmp", None)
    with pytest.raises(BootFailed, match=r"package qemu.qmp is missing: pip install 'pgtable\[live\]'"):
        boot.boot(Options("debian:6.12"), tmp_path / "s")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """Every long-lived process that a test starts."""
    booted()  # skips without QEMU
    found: list[subprocess.Popen[bytes]] = []
    real = subprocess.Popen

    def popen(*args: object, **kwargs: object) -> subprocess.Popen[bytes]:
        found.append(real(*args, **kwargs))  # type: ignore[call-overload]
        return found[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    return found


@pytest.mark.kernels
@pytest.mark.qemu
def test_a_boot_that_does_not_get_there_is_ended_with_what_it_said(
    tmp_path: Path, started: list[subprocess.Popen[bytes]]
) -> None:
    with pytest.raises(BootFailed, match=r"it was not at mark after 0.1 s"):
        boot.boot(Options(FAST, timeout=0.1), tmp_path / "s")
    assert started[-1].returncode is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.kernels
@pytest.mark.qemu
def test_ctrl_c_ends_qemu_and_writes_nothing(tmp_path: Path, started: list[subprocess.Popen[bytes]]) -> None:
    def interrupt(message: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        boot.boot(Options(FAST), tmp_path / "s", interrupt)
    assert started[-1].returncode is not None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.kernels
@pytest.mark.qemu
def test_a_cpu_that_qemu_has_not_is_said_in_its_words(tmp_path: Path) -> None:
    booted()
    with pytest.raises(BootFailed, match=r"QEMU does not start: .*z80"):
        boot.boot(Options(FAST, cpu="z80"), tmp_path / "s")


@pytest.mark.kernels
@pytest.mark.qemu
def test_the_snapshot_of_a_boot_is_at_the_system_call_in_the_kernels_map() -> None:
    s = booted()
    image = s.image
    assert s.general["pc"] == image.symbols[boot.SYSTEM_CALL]
    assert s.system["VBAR_EL1"] == image.symbols["vectors"]
    assert s.origin.base == image.base == kernel_image(FAST).base + s.origin.kaslr_offset
    assert s.origin.kaslr_offset
    assert s.system["SP_EL0"] >> 48 == 0xFFFF
    assert s.general["cpsr"] & 0b1111 == 0b0101  # EL1h
    assert (s.origin.cpu, s.origin.seed, s.origin.at) == ("cortex-a57", 1, "mark")
    assert isinstance(KernelImage.load(FAST), KernelImage)
    assert os.path.getsize(s.path) > 256 << 20 > s.path.stat().st_blocks * 512


@pytest.mark.full
@pytest.mark.kernels
@pytest.mark.qemu
def test_the_seed_decides_where_the_kernel_is(tmp_path: Path) -> None:
    same = boot.boot(Options(FAST), tmp_path / "a").origin.kaslr_offset
    assert same == booted().origin.kaslr_offset
    assert boot.boot(Options(FAST, seed=2), tmp_path / "b").origin.kaslr_offset != same
    assert boot.boot(Options(FAST, kaslr=False), tmp_path / "c").origin.kaslr_offset == 0


@pytest.mark.full
@pytest.mark.kernels
@pytest.mark.qemu
def test_a_kernel_with_the_vectors_of_a_mitigation_is_found(tmp_path: Path) -> None:
    booted()
    s = boot.boot(Options("debian:7.2-16k", kaslr=False), tmp_path / "s")  # no KASLR, no KPTI: the Spectre-BHB vectors
    assert s.origin.kaslr_offset == 0
    assert 0 < s.system["VBAR_EL1"] - s.image.symbols["vectors"] < boot.STEP


@pytest.mark.full
@pytest.mark.kernels
@pytest.mark.qemu
@pytest.mark.parametrize("at", ["panic", "start_kernel", "set_memory_ro", "1.5"])
@pytest.mark.parametrize("name", KERNELS)
def test_it_stops_where_it_is_told_to(name: str, at: str, tmp_path: Path) -> None:
    booted()
    s = boot.boot(Options(name, at=at), tmp_path / "s")
    assert s.system["VBAR_EL1"] == s.image.symbols["vectors"]
    if not at[0].isdigit():
        assert s.general["pc"] == s.image.symbols[at]
