"""Dumps of booted kernels and live guests: QEMU's own registers, `gva2gpa` and dump formats as judges."""

from __future__ import annotations

import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from emu.cli import cli
from emu.judge.guest import QemuMissing, find_qemu
from emu.sources import found_registers, open_source
from emu.sources.find import find_roots
from emu.sources.live import LiveMemory, QmpVm
from emu.sources.qmp import Qmp
from pgtable import Registers, translate, translate_many
from pgtable.leaves import Leaves, leaves
from pgtable.params import Regime, WalkParams
from tests.emu.dumps import same
from tests.kernels import kernel_path, lack

RAM, SIZE = 0x4000_0000, 256 << 20
U64 = (1 << 64) - 1
# What is booted: the kernel, the CPU. With `max` a kernel built for 52-bit addresses uses them (LPA2).
FAST = [("debian:6.12", "cortex-a57")]
FULL = [
    ("debian:6.1", "cortex-a57"),
    ("debian:7.3", "cortex-a57"),
    ("debian:7.2-16k", "cortex-a76"),
    ("debian:6.12", "max"),
    ("debian:7.2-16k", "max"),
]
GUESTS = [
    *(pytest.param(row, id="-".join(row)) for row in FAST),
    *(pytest.param(row, id="-".join(row), marks=pytest.mark.full) for row in FULL),
]
pytestmark = [pytest.mark.qemu, pytest.mark.kernels]


@dataclass
class Booted:
    """A guest that panicked for want of a root file system: nothing changes in it any more, much."""

    folder: Path
    port: int
    watch: Qmp  # a second QMP connection, beside the one under test

    @property
    def words(self) -> tuple[str, str]:
        return f"qmp:{self.folder}/qmp", f"gdb:127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        return bool(self.watch.ask("query-status")["running"])

    @cached_property
    def registers(self) -> Registers:
        """The guest's, by its gdb stub."""
        with open_source(self.words[1]) as source:
            assert source.registers is not None
            return source.registers

    @cached_property
    def root(self) -> int:
        return WalkParams.of(self.registers, Regime.EL10, 1 << 55).base

    @cached_property
    def dumps(self) -> dict[str, str]:
        """A raw dump, an ELF core and a kdump file of one moment."""
        names = {kind: str(self.folder / kind) for kind in ("raw", "elf", "kdump")}
        self.watch.ask("stop")
        self.watch.ask("pmemsave", val=RAM, size=SIZE, filename=names["raw"])
        self.watch.ask("dump-guest-memory", paging=False, protocol=f"file:{names['elf']}")
        protocol = f"file:{names['kdump']}"
        self.watch.ask("dump-guest-memory", paging=False, protocol=protocol, format="kdump-zlib")
        self.watch.ask("cont")
        return {"raw": f"raw:{names['raw']}@{RAM:#x}", "elf": names["elf"], "kdump": names["kdump"]}


@contextmanager
def booted(name: str, cpu: str) -> Iterator[Booted]:
    try:
        qemu = find_qemu(None)
    except QemuMissing as error:
        lack("qemu", str(error))
    kernel = kernel_path(name)
    with tempfile.TemporaryDirectory() as text, socket.socket() as free:
        folder = Path(text)
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        command = [qemu, "-M", "virt", "-cpu", cpu, "-m", str(SIZE >> 20), "-display", "none", "-monitor", "none"]
        command += ["-nic", "none", "-kernel", str(kernel), "-append", "console=ttyAMA0 panic=0"]
        command += ["-serial", f"file:{folder}/log", "-gdb", f"tcp:127.0.0.1:{port}"]
        for socket_name in ("qmp", "watch"):
            command += ["-qmp", f"unix:{folder}/{socket_name},server=on,wait=off"]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            wait_for(folder / "log", b"end Kernel panic")
            watch = Qmp(str(folder / "watch"))
            yield Booted(folder, port, watch)
            watch.close()
        finally:
            process.terminate()
            process.wait()


def wait_for(log: Path, text: bytes, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not log.exists() or text not in log.read_bytes():
        assert time.monotonic() < end, log.read_bytes()[-1000:] if log.exists() else "no console"
        time.sleep(0.1)


@pytest.fixture(scope="module", params=[*GUESTS])
def vm(request: pytest.FixtureRequest) -> Iterator[Booted]:
    with booted(*request.param) as one:
        yield one


@pytest.fixture(scope="module")
def truth(vm: Booted) -> Leaves:
    """The listing of the raw dump with the guest's own registers."""
    with open_source(vm.dumps["raw"]) as source:
        return leaves(source.memory, vm.registers)


def test_every_kind_of_dump_gives_the_same_leaves(vm: Booted, truth: Leaves) -> None:
    assert len(truth.va) > SIZE // 16384
    for kind in ("elf", "kdump"):
        with open_source(vm.dumps[kind]) as source:
            assert same(leaves(source.memory, vm.registers), truth), kind
    with open_source(vm.dumps["elf"]) as source:
        assert source.cpus[0]["PC"] >> 48 == 0xFFFF


def test_the_command_lists_every_kind_of_dump_alike(vm: Booted, tmp_path: Path) -> None:
    (tmp_path / "regs").write_text("".join(f"{n}={v:#x}\n" for n, v in vm.registers.as_dict().items()))
    texts = set()
    for kind in ("raw", "elf", "kdump"):
        result = CliRunner().invoke(cli, ["dump", vm.dumps[kind], "--regs", str(tmp_path / "regs")])
        assert result.exit_code == 0, result.output
        texts.add(result.stdout)
    assert len(texts) == 1
    assert texts.pop().count("\n") > 50


def test_live_sources_give_the_same_leaves(vm: Booted, truth: Leaves) -> None:
    kernel = truth.va >> np.uint64(55) != 0
    for word in vm.words:
        with open_source(word) as source, source.reading():
            assert not vm.running
            now = leaves(source.memory, vm.registers)
            assert same([column[now.va >> np.uint64(55) != 0] for column in now], [column[kernel] for column in truth])
        assert vm.running


def test_vmcoreinfo_tells_what_the_registers_say(vm: Booted, truth: Leaves) -> None:
    """Judge: the gdb stub's TTBR1_EL1 and TCR_EL1."""
    with open_source(vm.dumps["raw"]) as source:
        regs = found_registers(source)
        assert source.origin.startswith("VMCOREINFO found in RAM")
        ours, real = (WalkParams.of(r, Regime.EL10, 1 << 55) for r in (regs, vm.registers))
        assert (ours.base, ours.fmt, ours.txsz) == (real.base, real.fmt, real.txsz)
        assert ours.mair == real.mair
        upper = truth.va >> np.uint64(55) != 0
        assert same(leaves(source.memory, regs), [column[upper] for column in truth])


def test_the_true_root_is_found_first(vm: Booted, record_property: pytest.RecordProperty) -> None:
    with open_source(vm.dumps["raw"]) as source:
        start = time.perf_counter()
        found = find_roots(source.memory)
        seconds = time.perf_counter() - start
    record_property("roots", "\n".join(f"{root.score:7.3f} {root}" for root in found[:4]) + f"\n{seconds:.2f} s")
    real = WalkParams.of(vm.registers, Regime.EL10, 1 << 55)
    first = found[0]
    assert (first.pa, first.granule, first.upper) == (vm.root, real.fmt.granule, True)
    assert first.start_level == real.start_level
    assert first.linear > 0.9
    assert first.own > 0.9
    assert found[1].score < first.score / 1.5


def some_vas(rng: random.Random, found: Leaves, n: int) -> list[int]:
    """Mapped ones, others near them, others anywhere; whole words."""
    vas = []
    for _ in range(n):
        va = int(found.va[rng.randrange(len(found.va))])
        kind = rng.randrange(4)
        if kind < 2:
            va += rng.randrange(4096)
        elif kind == 2:
            va += rng.choice((-1, 1)) * rng.getrandbits(rng.randrange(12, 44))
        else:
            va = rng.getrandbits(64) | (U64 << 47 if rng.random() < 0.8 else 0)
        vas.append(va & U64 & -8)
    return vas


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.full)])
def test_gva2gpa_agrees_with_our_walk(vm: Booted, truth: Leaves, rng: random.Random, count: int) -> None:
    """Judge: QEMU's own walk for its monitor, of the stopped guest."""
    vas = some_vas(rng, truth, count)
    seen: Counter[str] = Counter()
    for word in vm.words:
        with open_source(word) as source, source.reading():
            assert isinstance(source.memory, LiveMemory)
            regs = source.registers or vm.registers
            many = translate_many(source.memory, regs, vas)
            for i, va in enumerate(vas[:: 1 if word.startswith("qmp") else 10]):
                text = source.memory.vm.monitor(f"gva2gpa {va:#x}")
                match = re.search("gpa: (0x[0-9a-f]+)", text)
                walk = translate(source.memory, regs, va)
                ours = walk.pa if walk.ok else None
                assert ours == (int(match[1], 0) if match else None), (hex(va), text, str(walk))
                seen["mapped" if match else "unmapped"] += 1
                if word.startswith("qmp"):
                    assert (int(many.pa[i]) if many.ok[i] else None) == ours
    assert seen["mapped"] > 0.4 * count
    assert seen["unmapped"] > 0.15 * count


def test_registers_over_qmp_alone(vm: Booted) -> None:
    """A guest without a gdb stub gets one for the moment; here it has one already, which is left alone."""
    with open_source(vm.words[0]) as source:
        assert source.registers is None
        assert vm.root == found_registers(source).TTBR1_EL1 & ~1
    assert vm.running


@pytest.mark.parametrize(
    "how", [signal.SIGKILL, *(pytest.param(s, marks=pytest.mark.full) for s in (signal.SIGTERM, signal.SIGINT))]
)
@pytest.mark.parametrize("number", [0, 1], ids=["qmp", "gdb"])
def test_a_guest_runs_again_when_its_reader_is_killed(vm: Booted, how: signal.Signals, number: int) -> None:
    code = f"""
from emu.sources import open_source
with open_source({vm.words[number]!r}, given=["TTBR1_EL1=0"]) as source, source.reading():
    while True:
        source.memory.words({RAM:#x}, 512)
        source.memory.forget()
        print("reading", flush=True)
"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert child.stdout
    assert child.stdout.readline() == "reading\n"
    time.sleep(0.05)
    assert not vm.running
    child.send_signal(how)
    child.communicate(timeout=20)
    end = time.monotonic() + 20
    while not vm.running:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_guest_without_a_stub_gives_its_registers_over_qmp(tmp_path: Path) -> None:
    """Judge: the registers of a machine that has run nothing are those of its reset."""
    try:
        qemu = find_qemu(None)
    except QemuMissing as error:
        lack("qemu", str(error))
    command = [qemu, "-M", "virt", "-cpu", "cortex-a57", "-m", "16", "-display", "none", "-nic", "none", "-S"]
    process = subprocess.Popen([*command, "-monitor", "none", "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"])
    try:
        for _ in range(200):
            if (tmp_path / "qmp").exists():
                break
            time.sleep(0.02)
        with open_source(f"qmp:{tmp_path}/qmp") as source:
            assert source.registers is not None
            assert source.registers.TTBR1_EL1 == 0
            assert source.registers.SCTLR_EL1 & 1 == 0
            assert isinstance(source.memory, LiveMemory)
            assert isinstance(source.memory.vm, QmpVm)
            assert not source.memory.vm.qmp.ask("query-status")["running"]  # as it was
            assert source.memory.fetch(RAM) == int.from_bytes(source.memory.vm.read(RAM, 8), "little")
        with open_source(f"qmp:{tmp_path}/qmp") as source:  # twice: the stub of the first time is gone
            assert source.registers is not None
    finally:
        process.terminate()
        process.wait()
