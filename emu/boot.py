"""Boots a kernel in QEMU and keeps what it has made of its memory: the only file that starts QEMU for that.

How: QEMU's `virt` machine with one CPU, our own initial RAM file system (emu.initramfs), the console on a pipe. At the
point that was asked for, the gdb stub gives the registers and QMP the RAM; QEMU is then ended, as it is on any error
and on Ctrl-C.

Points (`at`): "mark" (the first process sleeps; stopped where it enters its system call, so that a task runs, holds no
lock and has nearly all of its stack), "panic", a symbol (when it is first called), or seconds after the start.
What varies between two boots: `seed` decides the two seeds of the device tree, and so KASLR; time and interrupts stay.
Sources: QEMU's manual (virt machine, gdb stub, QMP reference), Linux Documentation/devicetree chosen.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from emu import container, dtb, initramfs, snapshot
from emu.gdbstub import GdbError, GdbStub
from emu.image import KernelImage
from emu.judge.guest import OracleError, find_qemu
from emu.kernels import is_name
from emu.snapshot import Origin, Snapshot

RAM_BASE = 0x4000_0000  # of QEMU's virt machine
TIMEOUT = 120.0  # seconds until a boot counts as failed
CONSOLE = "console=ttyAMA0 panic=-1"  # a panic ends QEMU at once
SYSTEM_CALL = "__arm64_sys_ppoll"  # where the first process is met
STEP = 1 << 16  # KASLR moves a kernel by multiples of this, at least
SLICE = 0.01  # seconds that the kernel runs between two looks at it
LAST_LINES = 12
CPUS = {12: "cortex-a57", 14: "cortex-a76", 16: "cortex-a57"}  # by page shift: the oldest that has that granule

_GENERAL = (*(f"x{i}" for i in range(31)), "sp", "pc", "cpsr")
_EL = 0b1100  # of PSTATE

Progress = Callable[[str], None]


class BootFailed(RuntimeError):  # noqa: N818 - what happened
    """The kernel did not get where it was to be met, or QEMU cannot be used; the message says why."""


@dataclass(frozen=True)
class Options:
    """What to boot. `memory` in bytes; `cpu`: None for the oldest that has the kernel's pages; `command_line` comes
    after our own; `at`: "mark", "panic", a symbol, or seconds; `qemu`: a program, None for the one on PATH."""

    kernel: str
    cpu: str | None = None
    memory: int = 256 << 20
    command_line: str = ""
    kaslr: bool = True
    seed: int = 1
    at: str = "mark"
    timeout: float = TIMEOUT
    qemu: str | None = None

    @property
    def seconds(self) -> float | None:
        """`at` as a time."""
        return float(self.at) if re.fullmatch(r"\d+(\.\d*)?", self.at) else None


def boot(options: Options, output: str | os.PathLike[str], progress: Progress = lambda _: None) -> Snapshot:
    """Boots, stops, and writes the snapshot `output`.

    Raises BootFailed, ImageError for a kernel that cannot be read, SymbolError for an `at` that is none of its names.
    """
    image = KernelImage.load(options.kernel)
    if options.at not in ("mark", "panic") and options.seconds is None:
        image.symbols[options.at]
    _need_qmp()
    with tempfile.TemporaryDirectory(prefix="pgtable-boot-") as folder, _run(options, image, Path(folder)) as guest:
        progress(f"booting {image.release} in QEMU {guest.version} ({guest.cpu})")
        offset, stub = guest.meet(image, progress)
        with stub:
            progress(f"stopped at {options.at}, KASLR offset {offset:#x}")
            general, system = _registers(stub)
            progress("saving memory")
            ram = guest.save_memory()
        origin = Origin(
            kernel=options.kernel if is_name(options.kernel) else os.path.abspath(options.kernel),
            release=image.release,
            sha256=snapshot.content_hash(image),
            kaslr_offset=offset,
            base=image.base + offset,
            command_line=guest.command_line,
            cpu=guest.cpu,
            seed=options.seed,
            at=options.at,
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            qemu=guest.version,
        )
        return snapshot.save(output, origin, general, system, [(RAM_BASE, ram)])


def _need_qmp() -> None:
    try:
        import qemu.qmp  # noqa: F401
    except ImportError:
        raise BootFailed("the Python package qemu.qmp is missing: pip install 'pgtable[live]'") from None


# the process


@contextmanager
def _run(options: Options, image: KernelImage, folder: Path) -> Iterator[Guest]:
    """A QEMU that has just been started, and is ended."""
    try:
        program = find_qemu(options.qemu)
    except OracleError as error:
        raise BootFailed(str(error)) from None
    (folder / "Image").write_bytes(_flat(options.kernel))
    (folder / "initramfs").write_bytes(initramfs.archive())
    guest = Guest(program, options, image.layout.page_shift, folder)
    guest.start()
    try:
        yield guest
    finally:
        guest.close()


def _flat(kernel: str) -> bytes:
    """The kernel's own bytes, unpacked: not every QEMU unpacks every kind of kernel file."""
    from emu.image import resolve

    path = resolve(kernel)
    return bytes(container.read(path, container.read_bytes(path)).data)


@dataclass
class Guest:
    """One QEMU and its console."""

    program: str
    options: Options
    page_shift: int
    folder: Path
    console: bytes = b""
    process: subprocess.Popen[bytes] | None = None
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        self.deadline = time.monotonic() + self.options.timeout
        said = subprocess.run([self.program, "--version"], capture_output=True, text=True, check=False).stdout
        found = re.search(r"version (\d+(\.\d+)+)", said)
        if not found:
            raise BootFailed(f"{self.program} --version does not say that it is QEMU")
        self.version = found[1]

    @property
    def cpu(self) -> str:
        """The CPU model."""
        return self.options.cpu or CPUS[self.page_shift]

    @property
    def command_line(self) -> str:
        """The kernel's command line."""
        parts = (CONSOLE, "" if self.options.kaslr else "nokaslr", self.options.command_line)
        return " ".join(part for part in parts if part)

    def arguments(self, machine: str = "") -> list[str]:
        """QEMU's, without sockets."""
        o = self.options
        initrd = [] if o.at == "panic" else ["-initrd", str(self.folder / "initramfs")]
        return [
            *(self.program, "-M", "virt" + machine, "-cpu", self.cpu, "-smp", "1", "-m", f"size={o.memory}B"),
            *("-kernel", str(self.folder / "Image"), *initrd, "-append", self.command_line),
            *("-nodefaults", "-no-user-config", "-nic", "none", "-display", "none", "-no-reboot"),
        ]

    def start(self) -> None:
        """Starts it, with our seeds in its device tree; it runs when `meet` lets it."""
        self.launch(self._tree())

    def launch(self, tree: Path) -> None:
        """Starts it with the device tree `tree`."""
        sockets = [
            *("-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"),
            *("-chardev", f"socket,id=gdb,path={self.folder}/gdb,server=on,wait=off", "-gdb", "chardev:gdb"),
            *("-qmp", f"unix:{self.folder}/qmp,server=on,wait=off", "-S"),
        ]
        with open(self.folder / "stderr", "wb") as stderr:
            self.process = subprocess.Popen(
                [*_tied(), *self.arguments(), *("-dtb", str(tree)), *sockets],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                process_group=0,  # Ctrl-C is ours: it must not die before we know
            )

    def _tree(self) -> Path:
        """The device tree that this QEMU makes, with seeds that we know."""
        path = self.folder / "tree"
        done = subprocess.run(self.arguments(f",dumpdtb={path}"), capture_output=True, text=True, check=False)
        if not path.exists():
            raise BootFailed(f"QEMU does not start: {_first_line(done.stderr)}")
        rng = random.Random(self.options.seed)
        seeds = {"/chosen/kaslr-seed": rng.randbytes(8), "/chosen/rng-seed": rng.randbytes(64)}
        blob, _ = dtb.replace(path.read_bytes(), seeds)
        path.write_bytes(dtb.packed(blob))
        return path

    def close(self) -> None:
        """Ends QEMU."""
        if self.process is not None:
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
            if self.process.stdout:
                self.process.stdout.close()

    # the console

    def listen(self, seconds: float) -> None:
        """Reads the console for so long, or until something comes."""
        assert self.process
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            self._check_time()
            return
        more = os.read(self.process.stdout.fileno(), 1 << 16)
        self.console += more
        if not more:
            self.process.wait()
            raise BootFailed(self._complaint("QEMU ended"))
        self._check_time()

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise BootFailed(self._complaint(f"it was not at {self.options.at} after {self.options.timeout:g} s"))

    def _complaint(self, what: str) -> str:
        said = (self.folder / "stderr").read_text(errors="replace").strip()
        lines = self.console.decode(errors="replace").splitlines()[-LAST_LINES:]
        text = f"{what}{': ' + _first_line(said) if said else ''}"
        shown = ["  " + line.rstrip() for line in lines if line.strip()]
        return "\n".join([f"{text}; the console's last lines:", *shown]) if shown else text

    # where it is to be met

    def meet(self, image: KernelImage, progress: Progress) -> tuple[int, GdbStub]:
        """Runs to the point asked for; the KASLR offset, and the stub that holds the guest there."""
        stub = self._connect()
        try:
            return self._meet(stub, image, progress), stub
        except GdbError as error:
            stub.close()
            self.listen(0)
            raise BootFailed(self._complaint(f"QEMU is gone ({error})")) from None
        except BaseException:
            stub.close()
            raise

    def _meet(self, stub: GdbStub, image: KernelImage, progress: Progress) -> int:
        at = self.options.at
        if at == "mark":
            stub.go()
            self._until(initramfs.MARK, progress)
            stub.interrupt()
            offset = self._offset(stub, image)
            self._break(stub, image.symbols[SYSTEM_CALL] + offset, progress)
        elif self.options.seconds is not None:
            self._for(stub, self.options.seconds, progress)
            offset = self._offset(stub, image)
        else:
            offset = self._first_call(stub, image, progress)
        return offset

    def _first_call(self, stub: GdbStub, image: KernelImage, progress: Progress) -> int:
        """To the symbol, which may run before the kernel's place is known.

        A first run tells the place, as the same seed gives the same again; should it not (a CPU with random numbers of
        its own), calls from when it is known count.
        """
        expected = 0
        if self.options.kaslr:
            with self._twin() as twin, twin._connect() as scout:
                expected = twin._offset(scout, image)
        va = image.symbols[self.options.at] + expected
        stub.set_breakpoint(va)
        offset = self._offset(stub, image, until=va)
        if offset != expected:
            stub.clear_breakpoint(va)
            va += offset - expected
        if stub.read("pc") != va:
            self._break(stub, va, progress)
        return offset

    @contextmanager
    def _twin(self) -> Iterator[Guest]:
        """Another QEMU with the same kernel, device tree and all."""
        folder = self.folder / "twin"
        folder.mkdir()
        twin = Guest(self.program, self.options, self.page_shift, folder)
        for name in ("Image", "initramfs", "tree"):
            (folder / name).symlink_to(self.folder / name)
        twin.launch(folder / "tree")
        try:
            yield twin
        finally:
            twin.close()

    def _connect(self) -> GdbStub:
        assert self.process
        while True:
            try:
                return GdbStub(str(self.folder / "gdb"))
            except (FileNotFoundError, ConnectionRefusedError):
                if self.process.poll() is not None:
                    raise BootFailed(self._complaint("QEMU ended")) from None
                self._check_time()
                time.sleep(SLICE)

    def _until(self, mark: bytes, progress: Progress) -> None:
        while mark not in self.console:
            self.listen(1.0)
            self._show(progress)

    def _for(self, stub: GdbStub, seconds: float, progress: Progress) -> None:
        end = time.monotonic() + seconds
        stub.go()
        while time.monotonic() < end:
            self.listen(min(0.2, max(0.0, end - time.monotonic())))
            self._show(progress)
        stub.interrupt()

    def _break(self, stub: GdbStub, va: int, progress: Progress) -> None:
        """Runs until `va` is to be executed."""
        stub.set_breakpoint(va)
        stub.go()
        while not stub.wait(0.1):
            self.listen(0.0)
            self._show(progress)
        stub.clear_breakpoint(va)

    def _show(self, progress: Progress) -> None:
        lines = [line for line in self.console[-2000:].decode(errors="replace").split("\n")[:-1] if line.strip()]
        if lines:
            progress(f"console: {lines[-1].strip()}")

    def _offset(self, stub: GdbStub, image: KernelImage, until: int | None = None) -> int:
        """The KASLR offset, once the kernel runs in its own map at EL1; it stops at a breakpoint at `until`."""
        while True:
            found = _offset_now(stub, image)
            if found is not None:
                return found
            if stub.read("pc") == until:
                return until - image.symbols[self.options.at]
            stub.go()
            if not stub.wait(SLICE):
                stub.interrupt()
            self.listen(0.0)

    # what is kept

    def save_memory(self) -> Path:
        """RAM, in a file of the folder; QEMU is told to end."""
        path = self.folder / "ram"
        asyncio.run(_dump(self.folder / "qmp", path, self.options.memory))
        return path


def _offset_now(stub: GdbStub, image: KernelImage) -> int | None:
    """By VBAR_EL1, and only if the kernel's code is there."""
    if not stub.read("cpsr") & _EL:
        return None
    # Mitigations have vectors of their own, a little behind; the kernel only moves by multiples of STEP.
    offset = (stub.read("VBAR_EL1") - image.symbols["vectors"]) & -STEP
    if offset < 0:
        return None
    start, size = image.symbols["schedule"], 256
    try:
        there = np.frombuffer(stub.memory(start + offset, size), np.uint32)
    except GdbError:
        return None
    same = there == np.frombuffer(image.bytes_at(start, size), np.uint32)
    return offset if same.mean() > 0.5 else None  # some words are patched at boot


async def _dump(socket: Path, path: Path, size: int) -> None:
    from qemu.qmp import QMPClient

    client = QMPClient("boot")
    await client.connect(str(socket))
    try:
        await client.execute("pmemsave", {"val": RAM_BASE, "size": size, "filename": str(path)})
    finally:
        await client.disconnect()


def _registers(stub: GdbStub) -> tuple[dict[str, int], dict[str, int]]:
    """General registers, and all system registers of 64 bits at most."""
    general = {name: stub.read(name) for name in _GENERAL}
    system = {
        name: stub.read(name)
        for name, row in stub.registers.items()
        if name not in _GENERAL and row.bits <= 64 and name.isupper()
    }
    return general, system


def _tied() -> list[str]:
    """What makes QEMU end when this process does, however it ends."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["without a word"])[0]
