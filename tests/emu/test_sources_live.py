"""Live sources, on made-up QEMUs: what is read, and above all that the guest always runs afterwards."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from emu.sources import Source, SourceError, found_registers, open_source
from emu.sources.live import LiveMemory, ram_ranges
from emu.sources.qmp import Qmp
from pgtable import NoMemory, translate
from pgtable.leaves import leaves
from tests.emu.dumps import RAM, SIZE, Guest, guest, registers_of, same
from tests.emu.fakes import FakeQmp, FakeStub, FakeVm

GIVEN = ["TTBR1_EL1=0x40100000"]


@pytest.fixture
def made() -> Guest:
    return guest()


@pytest.fixture
def qmp(tmp_path: Path, made: Guest) -> Iterator[FakeQmp]:
    fake = FakeQmp(made.memory, tmp_path / "qmp", chardevs=("gdb",))
    yield fake
    fake.close()


@pytest.fixture
def stub(made: Guest) -> Iterator[FakeStub]:
    values = registers_of(made).as_dict()
    names = {"SCTLR": "SCTLR_EL1", **{n: n for n in ("TCR_EL1", "TTBR0_EL1", "TTBR1_EL1", "MAIR_EL1")}}
    fake = FakeStub(made.memory, {name: values[full] for name, full in names.items()})
    yield fake
    fake.close()


@pytest.fixture(params=["qmp", "gdb"])
def live(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, FakeVm]:
    """Each kind of live source: its word, its fake."""
    fake = request.getfixturevalue("qmp" if request.param == "qmp" else "stub")
    return (f"qmp:{tmp_path}/qmp" if request.param == "qmp" else f"gdb:127.0.0.1:{fake.port}"), fake


def runs(fake: FakeVm) -> bool:
    """Whether the guest runs, or does within a moment."""
    for _ in range(500):
        if fake.running:
            return True
        time.sleep(0.01)
    return False


def test_a_live_guest_lists_as_its_memory_and_stands_still_only_meanwhile(
    live: tuple[str, FakeVm], made: Guest
) -> None:
    word, fake = live
    regs = registers_of(made)
    with open_source(word, given=GIVEN) as source:
        assert fake.running
        fake.log.clear()
        with source.reading():
            assert not fake.running
            assert same(leaves(source.memory, regs), leaves(made.memory, regs))
            with source.reading():
                assert translate(source.memory, regs, made.linear + 8).pa == RAM + 8
            assert not fake.running
        assert fake.running
        assert fake.log == ["stop", "cont"]
        with pytest.raises(NoMemory):
            source.memory.fetch(0x900_0000)  # a device: never read
    assert fake.running


def test_reads_outside_a_session_are_each_of_their_own_moment(live: tuple[str, FakeVm], made: Guest) -> None:
    word, fake = live
    with open_source(word, given=GIVEN) as source:
        for value in (5, 6):
            made.memory.store(RAM + 0x8000, value)
            fake.log.clear()
            assert source.memory.fetch(RAM + 0x8000) == value
            assert fake.log == ["stop", "cont"]
        with source.reading():
            assert source.memory.fetch(RAM + 0x8000) == 6
            made.memory.store(RAM + 0x8000, 7)
            assert source.memory.words(RAM + 0x8000, 1)[0] == 6  # of one moment
        pas = np.array([RAM + 0x8000, RAM + SIZE], np.uint64)
        assert source.memory.gather(pas)[0].tolist() == [7, 0]


def stop_with(error: type[BaseException], source: Source, fake: FakeVm) -> None:
    source.memory.fetch(RAM)
    assert not fake.running
    raise error


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_guest_runs_again_after_an_error(live: tuple[str, FakeVm], error: type[BaseException]) -> None:
    word, fake = live
    with open_source(word, given=GIVEN) as source:
        with pytest.raises(error), source.reading():
            stop_with(error, source, fake)
        assert fake.running
        assert source.memory.fetch(RAM) == 0


def test_an_interruption_in_the_middle_of_an_answer_leaves_the_connection_usable(
    live: tuple[str, FakeVm], monkeypatch: pytest.MonkeyPatch
) -> None:
    word, fake = live
    with open_source(word, given=GIVEN) as source:
        assert isinstance(source.memory, LiveMemory)
        vm = source.memory.vm
        sent = []

        def interrupted(pa: int, n: int) -> bytes:
            sent.append(pa)
            link = getattr(vm, "qmp", None) or vm._stub  # type: ignore[attr-defined]
            request = b'{"execute": "query-status", "id": 0}\n' if "qmp" in word else b"$m40000000,8#00"
            link._socket.sendall(request)  # its answer is never waited for
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(vm, "read", interrupted)
            with pytest.raises(KeyboardInterrupt):
                source.memory.fetch(RAM)
        assert sent
        assert runs(fake)
        assert source.memory.fetch(RAM) == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_guest_runs_again_when_its_reader_is_killed(live: tuple[str, FakeVm], how: signal.Signals) -> None:
    word, fake = live
    code = f"""
from emu.sources import open_source
import time
with open_source({word!r}, given={GIVEN!r}) as source, source.reading():
    source.memory.fetch({RAM:#x})
    print("reading", flush=True)
    time.sleep(60)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout
    assert child.stdout.readline() == "reading\n"
    assert not fake.running
    child.send_signal(how)
    child.wait(20)
    child.stdout.close()
    assert runs(fake)


def test_a_guest_that_stood_still_is_left_so(qmp: FakeQmp, tmp_path: Path) -> None:
    qmp.running = False
    with open_source(f"qmp:{tmp_path}/qmp", given=GIVEN) as source, source.reading():
        assert source.memory.fetch(RAM) == 0
    assert not qmp.running
    assert qmp.log == []


def test_ram_is_printed_where_qemu_cannot_write_a_file(qmp: FakeQmp, tmp_path: Path, made: Guest) -> None:
    qmp.files = False
    regs = registers_of(made)
    with open_source(f"qmp:{tmp_path}/qmp", given=GIVEN) as source, source.reading():
        assert same(leaves(source.memory, regs), leaves(made.memory, regs))


def test_pages_come_together_over_qmp(qmp: FakeQmp, tmp_path: Path) -> None:
    with open_source(f"qmp:{tmp_path}/qmp", given=GIVEN) as source, source.reading():
        for pa in range(RAM, RAM + 16 * 4096, 4096):
            source.memory.fetch(pa)
    assert qmp.reads == 1


def test_registers_come_from_the_stub(stub: FakeStub, made: Guest) -> None:
    with open_source(f"gdb::{stub.port}") as source:
        assert source.registers == registers_of(made)
        assert source.origin == "the guest's first CPU"
    with open_source(f"gdb:localhost:{stub.port}", given=["TTBR1_EL1=0"]) as source:
        assert source.registers == registers_of(made).replace(TTBR1_EL1=0)


def test_without_registers_they_are_found_in_ram(qmp: FakeQmp, tmp_path: Path, made: Guest) -> None:
    with open_source(f"qmp:{tmp_path}/qmp") as source:
        assert source.registers is None
        assert found_registers(source) == registers_of(made)
        assert source.origin.startswith("VMCOREINFO found in RAM")
    made.memory.store(RAM + SIZE - 2 * 4096, 0)
    with open_source(f"qmp:{tmp_path}/qmp") as source:
        assert made.root == found_registers(source).TTBR1_EL1
    assert qmp.running


def refused(word: str, says: str) -> None:
    with pytest.raises(SourceError, match=says) as error:
        open_source(word)
    assert "\n" not in str(error.value)


def test_live_words_that_cannot_be(tmp_path: Path, made: Guest) -> None:
    refused(f"qmp:{tmp_path}/none", "no QMP socket")
    (tmp_path / "file").write_text("")
    refused(f"qmp:{tmp_path}/file", "no QMP socket")
    refused("gdb:1234", "is not gdb:HOST:PORT")
    refused("gdb:127.0.0.1:http", "is not gdb:HOST:PORT")
    refused("gdb:10.0.0.1:1234", "another machine")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        refused(f"gdb:127.0.0.1:{unused.getsockname()[1]}", "no gdb stub can be used")


def test_a_stub_that_is_not_qemus(made: Guest) -> None:
    for fake, says in (
        (FakeStub(made.memory, {"TCR_EL1": 0}, physical=False), "does not read physical memory"),
        (FakeStub(made.memory, {"x1": 0}), "no system registers"),
    ):
        refused(f"gdb:127.0.0.1:{fake.port}", says)
        assert runs(fake)
        fake.close()


def test_a_qmp_server_with_another_client_says_nothing(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "busy"))
        server.listen(1)
        with pytest.raises(SourceError, match="another program is its one QMP client"):
            Qmp(str(tmp_path / "busy"), timeout=0.1)


def test_ranges_of_ram_are_joined_and_devices_left_out() -> None:
    text = """FlatView #0
 AS "gpu", root: x
  0000000000000000-00000000ffffffff (prio 0, ram): vram

FlatView #1
 AS "memory", root: system
 AS "cpu-memory-0", root: system
 Root memory region: system
  0000000000000000-0000000003ffffff (prio 0, romd): virt.flash0
  0000000009000000-0000000009000fff (prio 0, i/o): pl011
  0000000040000000-0000000047ffffff (prio 0, ram): ram KVM
  0000000048000000-000000004fffffff (prio 0, ram): ram @0000000008000000 KVM
  0000000100000000-00000001000017ff (prio 0, rom): odd
"""
    assert ram_ranges(text) == [(0x4000_0000, 0x1000_0000), (0x1_0000_0000, 0x1000)]
    with pytest.raises(SourceError, match="does not say where the guest has RAM"):
        ram_ranges("unknown command: 'info mtree -f'")


def test_a_source_of_a_file_needs_no_session(tmp_path: Path, made: Guest) -> None:
    (tmp_path / "ram").write_bytes(made.content)
    source: Source = open_source(f"raw:{tmp_path}/ram@{RAM}")
    with source.reading():
        assert source.memory.fetch(RAM) == 0
    source.close()
