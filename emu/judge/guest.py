"""The machine behind the oracle: a QEMU process that runs `guest.S`, and its RAM shared with Python.

- The RAM is anonymous shared memory (memfd) that QEMU opens through /proc/self/fd: no file is left behind, whatever
  ends first. It outlives the process, so a guest that died is started again on the same tables.
- The islands of RAM are pc-dimm devices; QEMU plugs those in at boot only for a guest with firmware, hence a
  firmware of three instructions that jumps to the program.
- A list of operations is put in RAM, one byte on QEMU's stdin (semihosting) starts it, one on its stdout ends it.
- Only processes started here are ended, by their own handle; `setpriv` ties QEMU's life to ours where it is present
  (to the thread that started it: keep an oracle in the thread that made it).
"""

import functools
import mmap
import os
import re
import select
import shutil
import struct
import subprocess
import weakref
from collections.abc import Iterable, Mapping
from importlib import resources

import numpy as np
import numpy.typing as npt

from emu.judge.corpus import PROGRAM_PAGE, TABLES, islands

__all__ = ["Guest", "GuestDied", "OracleError", "QemuMissing", "find_qemu", "image", "qemu_version"]

Words = npt.NDArray[np.uint64]

PROGRAM = PROGRAM_PAGE  # the first MiB of RAM holds QEMU's device tree
MAILBOX = 0x4024_0000
OPERATIONS = 0x4030_0000
OUTCOMES = 0x4080_0000
CAPACITY = (TABLES - OUTCOMES) // 64
"""How many operations fit in one run."""
START_TIMEOUT = 30.0  # seconds; it takes a tenth of one
FIRMWARE = struct.pack("<3I", 0xD2A8_0400, 0xD61F_0000, 0xD503_201F)  # movz x0, #PROGRAM >> 16, lsl 16; br x0; nop

RETURNED, EXCEPTION, FROM_LOWER = 0, 1, 2
"""How an operation ended: column 0 of its outcome. Anything else is another vector."""
HOW, X0, ESR_EL3, ESR_EL1, FAR_EL1, ESR_EL2, FAR_EL2, HPFAR_EL2 = range(8)
"""The columns of an outcome."""


class OracleError(RuntimeError):
    """QEMU did something that is no answer; the message is one sentence."""


class QemuMissing(OracleError):  # noqa: N818 - named in the interface
    """There is no QEMU to ask."""


class GuestDied(OracleError):  # noqa: N818 - named in the interface
    """QEMU ended or hung in the middle of a list; `at` is the index of the operation it died of."""

    def __init__(self, message: str, at: int) -> None:
        super().__init__(message)
        self.at = at


def find_qemu(qemu: str | None = None) -> str:
    """The path of `qemu`, or of the qemu-system-aarch64 on PATH."""
    found = shutil.which(qemu or "qemu-system-aarch64")
    if found is None:
        raise QemuMissing(
            f"{qemu or 'qemu-system-aarch64'} is not there or not on PATH: install the Debian package "
            "qemu-system-arm, or name a qemu-system-aarch64"
        )
    return found


@functools.cache
def qemu_version(path: str) -> str:
    """The version of a QEMU as major.minor: "7.2"."""
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    version = re.search(r"QEMU emulator version (\d+\.\d+)", said)
    if version is None:
        raise OracleError(f"{path} --version does not say that it is QEMU: {said.strip()[:80]!r}")
    return version[1]


def image() -> bytes:
    """`guest.S`, assembled."""
    return bytes.fromhex(resources.files(__package__).joinpath("guest.hex").read_text(encoding="ascii"))


def directory(program: bytes) -> dict[str, int]:
    """Every thunk that the program names ("MSR TCR_EL1", "AT S1E1R", "TRY LD1") and its address."""
    _, _, start, end = struct.unpack_from("<4I", program)
    lines = struct.iter_unpack("<I28s", program[start:end])
    return {name.rstrip(b"\0").decode(): PROGRAM + offset for offset, name in lines}


class Guest:
    """One machine: `ram` to write and read, `run` to do operations, `start` after a death, `close`."""

    def __init__(self, qemu: str, cpu: str, timeout: float) -> None:
        self.qemu, self.cpu, self.timeout = qemu, cpu, timeout
        self.islands = islands(cpu)
        program = image()
        self.thunks = directory(program)
        page, end = struct.unpack_from("<2I", program, 4)
        self.page = np.frombuffer(program[page:end], np.uint64)
        self._program = np.frombuffer(program, np.uint64)
        self._files = [_memory(size) for _, size in self.islands]
        self._maps = [mmap.mmap(fd, 0) for fd in self._files]
        self._ram = [np.frombuffer(m, np.uint64) for m in self._maps]
        self._stderr = os.memfd_create("qemu-stderr")
        self._close_files = weakref.finalize(self, _close, [*self._files, self._stderr])
        self.start()

    # ---- RAM

    def store(self, words: Mapping[int, int]) -> None:
        """Write words; the ones without RAM do not exist and are left out."""
        at, values = np.fromiter(words, np.uint64), np.fromiter(words.values(), np.uint64)
        for ram, here, index in self._by_island(at):
            ram[index] = values[here]

    def fetch(self, addresses: Iterable[int]) -> dict[int, int]:
        """The words at these addresses, as far as there is RAM."""
        at = np.fromiter(addresses, np.uint64)
        result: dict[int, int] = {}
        for ram, here, index in self._by_island(at):
            result.update(zip(at[here].tolist(), ram[index].tolist(), strict=True))
        return result

    def view(self, pa: int, count: int) -> Words:
        """`count` words of RAM, in place."""
        for ram, (base, size) in zip(self._ram, self.islands, strict=True):
            if base <= pa and pa + 8 * count <= base + size:
                return ram[(pa - base) // 8 : (pa - base) // 8 + count]
        raise OracleError(f"the guest has no RAM at {pa:#x}")

    def _by_island(self, at: Words) -> Iterable[tuple[Words, npt.NDArray[np.bool_], Words]]:
        for ram, (base, size) in zip(self._ram, self.islands, strict=True):
            here = (at >= base) & (at < base + size)
            if here.any():
                yield ram, here, (at[here] - np.uint64(base)) >> np.uint64(3)

    # ---- the process

    def start(self) -> None:
        """Start QEMU, on the RAM as it is."""
        self.view(PROGRAM, len(self._program))[:] = self._program
        os.ftruncate(self._stderr, 0)
        os.lseek(self._stderr, 0, os.SEEK_SET)  # QEMU writes where the one before it stopped
        firmware = _memory(len(FIRMWARE), FIRMWARE)
        try:
            self._process = subprocess.Popen(
                [*_guard(), self.qemu, *self._arguments(firmware)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                bufsize=0,
                pass_fds=[*self._files, firmware],
            )
            self._end_process = weakref.finalize(self, _end, self._process)
            self.run(np.zeros((0, 2), np.uint64), max(self.timeout, START_TIMEOUT))
        except GuestDied as e:
            raise OracleError(f"{self.qemu} did not start: {e}") from None
        finally:
            os.close(firmware)

    @property
    def pid(self) -> int:
        """The process number of QEMU."""
        return self._process.pid

    def _arguments(self, firmware: int) -> list[str]:
        (_, ram_size), *dimms = self.islands
        memory = f"size={ram_size >> 20}M,slots={len(dimms)},maxmem={(max(self.islands)[0] >> 30) + 16}G"
        arguments = [
            "-M", "virt,secure=on,virtualization=on,gic-version=3,memory-backend=ram", "-cpu", self.cpu, "-smp", "1",
            "-accel", "tcg,tb-size=32", "-m", memory,
            "-nodefaults", "-no-user-config", "-display", "none", "-serial", "none", "-monitor", "none",
            "-bios", f"/proc/self/fd/{firmware}", "-chardev", "stdio,id=ask,signal=off",
            "-semihosting-config", "enable=on,target=native,chardev=ask",
            "-object", _backend("ram", self._files[0], ram_size),
        ]  # fmt: skip
        for i, ((base, size), fd) in enumerate(zip(dimms, self._files[1:], strict=True)):
            arguments += ["-object", _backend(f"d{i}", fd, size), "-device", f"pc-dimm,memdev=d{i},addr={base}"]
        return arguments

    def run(self, operations: Words, timeout: float | None = None) -> Words:
        """Do operations, rows of (thunk, X1), and give their outcomes, rows of 8 (see HOW)."""
        count = len(operations)
        if count > CAPACITY:
            raise OracleError(f"{count} operations in one run, the guest has room for {CAPACITY}")
        self.view(OPERATIONS, 2 * count)[:] = operations.ravel()
        self.view(MAILBOX, 3)[:] = (count, OPERATIONS, OUTCOMES)
        if not self._answered(timeout or self.timeout):
            left = int(self.view(MAILBOX, 1)[0])
            raise GuestDied(self._last_words(), count - left)
        return self.view(OUTCOMES, 8 * count).reshape(count, 8).copy()

    def _answered(self, timeout: float) -> bool:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            stdin.write(b"?")
        except BrokenPipeError:
            return False
        waiting = select.poll()
        waiting.register(stdout, select.POLLIN)
        return bool(waiting.poll(timeout * 1000)) and bool(stdout.read(1))

    def _last_words(self) -> str:
        hung = self._process.poll() is None and not self._gone()
        self._end_process()
        said = os.pread(self._stderr, 1 << 16, 0).decode(errors="replace").strip()
        if hung:
            return f"the guest did not answer in {self.timeout:g} seconds"
        return "QEMU ended: " + (" ".join(said.splitlines()[-2:])[-300:] or f"exit code {self._process.returncode}")

    def _gone(self) -> bool:
        try:
            self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            return False
        return True

    def close(self) -> None:
        """End QEMU and give the memory back."""
        self._end_process()
        self._close_files()


def _memory(size: int, content: bytes = b"") -> int:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, size)
    os.pwrite(fd, content, 0)
    return fd


def _backend(name: str, fd: int, size: int) -> str:
    return f"memory-backend-file,id={name},mem-path=/proc/self/fd/{fd},size={size},share=on"


def _guard() -> list[str]:
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def _close(files: list[int]) -> None:
    for fd in files:
        os.close(fd)
