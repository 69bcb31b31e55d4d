"""A kernel in QEMU: started with seeds that we know, listened to, and held by the gdb stub; QEMU is always ended.

How: QEMU's `virt` machine with one CPU, our own initial RAM file system (emu.initramfs), the console on a pipe. The
files are in a folder of /tmp. Both are gone when `started` is left: on any error, on Ctrl-C and on SIGTERM.

What varies between two boots: `seed` decides the two seeds of the device tree, and so KASLR; time and interrupts stay.
Sources: QEMU's manual (virt machine, gdb stub), Linux Documentation/devicetree chosen.
"""

from __future__ import annotations

import os
import random
import re
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from emu import container, dtb, initramfs
from emu.gdbstub import GdbError, GdbStub
from emu.image import KernelImage
from emu.judge.guest import OracleError, find_qemu

TIMEOUT = 120.0  # seconds until a boot counts as failed
CONSOLE = "console=ttyAMA0 panic=-1"  # a panic ends QEMU at once
SYSTEM_CALL = "__arm64_sys_ppoll"  # where the first process is met
STEP = 1 << 16  # KASLR moves a kernel by multiples of this, at least
SLICE = 0.01  # seconds that the kernel runs between two looks at it
LAST_LINES = 12
CPUS = {12: "cortex-a57", 14: "cortex-a76", 16: "cortex-a57"}  # by page shift: the oldest that has that granule

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


@contextmanager
def started(options: Options, image: KernelImage) -> Iterator[Guest]:
    """A QEMU that has just been started and stands still; it and its files are gone afterwards.

    Raises BootFailed.
    """
    try:
        program = find_qemu(options.qemu)
    except OracleError as error:
        raise BootFailed(str(error)) from None
    with _undone_on_sigterm(), tempfile.TemporaryDirectory(prefix="pgtable-boot-") as folder:
        place = Path(folder)
        (place / "Image").write_bytes(_flat(options.kernel))
        (place / "initramfs").write_bytes(initramfs.archive())
        guest = Guest(program, options, image.layout.page_shift, place)
        try:
            guest.start()
            yield guest
        finally:
            guest.close()


@contextmanager
def _undone_on_sigterm() -> Iterator[None]:
    """SIGTERM, where nobody else has a use for it, is an exception meanwhile: what has been made is removed."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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

    @property
    def marked(self) -> bool:
        """Whether the first process has printed its mark."""
        return initramfs.MARK in self.console

    def show(self, progress: Progress) -> None:
        """Tells the last whole line of the console."""
        lines = [line for line in self.console[-2000:].decode(errors="replace").split("\n")[:-1] if line.strip()]
        if lines:
            progress(f"console: {lines[-1].strip()}")

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise BootFailed(self._complaint(f"it was not at {self.options.at} after {self.options.timeout:g} s"))

    def _complaint(self, what: str) -> str:
        said = (self.folder / "stderr").read_text(errors="replace").strip()
        lines = self.console.decode(errors="replace").splitlines()[-LAST_LINES:]
        text = f"{what}{': ' + _first_line(said) if said else ''}"
        shown = ["  " + line.rstrip() for line in lines if line.strip()]
        return "\n".join([f"{text}; the console's last lines:", *shown]) if shown else text

    # the debugger

    @contextmanager
    def debugger(self) -> Iterator[GdbStub]:
        """The gdb stub; while it is connected the guest runs only when told to. Raises BootFailed when QEMU is gone."""
        with self._connect() as stub:
            try:
                yield stub
            except GdbError as error:
                self.listen(0)
                raise BootFailed(self._complaint(f"QEMU is gone ({error})")) from None

    @contextmanager
    def _twin(self) -> Iterator[Guest]:
        """Another QEMU with the same kernel, device tree and all."""
        folder = self.folder / "twin"
        folder.mkdir()
        twin = Guest(self.program, self.options, self.page_shift, folder)
        for name in ("Image", "initramfs", "tree"):
            (folder / name).symlink_to(self.folder / name)
        try:
            twin.launch(folder / "tree")
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

    def expected_offset(self, image: KernelImage) -> int:
        """The KASLR offset before the guest has run.

        Another run of a moment tells it, as the same seed gives the same again; on a CPU with random numbers of its
        own it may be another.
        """
        if not self.options.kaslr:
            return 0
        with self._twin() as twin, twin.debugger() as scout:
            return twin.offset(scout, image)

    def offset(self, stub: GdbStub, image: KernelImage, stops: Collection[int] = (), expected: int = 0) -> int:
        """The KASLR offset, once the kernel runs in its own map at EL1: the guest stands still then.

        A breakpoint at one of the addresses `stops` that is met before proves that it is the `expected` one.
        """
        while True:
            found = _offset_now(stub, image)
            if found is not None:
                return found
            if stub.read("pc") in stops:
                return expected
            stub.go()
            if not stub.wait(SLICE):
                stub.interrupt()
            self.listen(0.0)

    def run_to(self, stub: GdbStub, va: int, progress: Progress) -> None:
        """Runs until `va` is to be executed."""
        stub.set_breakpoint(va)
        stub.go()
        while not stub.wait(0.1):
            self.listen(0.0)
            self.show(progress)
        stub.clear_breakpoint(va)


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


def _tied() -> list[str]:
    """What makes QEMU end when this process does, however it ends."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or ["without a word"])[0]
