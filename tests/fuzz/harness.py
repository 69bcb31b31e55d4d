"""One case of one target: what may come of it, and for how long.

Rules of this file:
- A target is a function of bytes. It may return, or raise one of the classes that its documentation names, with one
  sentence. Anything else is a failure: another exception, a traceback's worth of text, too much time or memory.
- Time is CPU time of the process; the alarm interrupts Python code, and what one call into C takes is seen afterwards.
- A failure's key is what and where: the same key is the same failure.
"""

from __future__ import annotations

import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
OURS = ("emu", "pgtable", "kernel_model")
SECONDS = 5.0  # CPU time of a case; what a coverage tool costs is in it
MEMORY = 5 << 29  # bytes of address space that a case may add: an Image may say that it takes a gigabyte
SHOWN, LONGEST = ("CommandError",), 1100  # what is printed as it is, and its characters


@dataclass(frozen=True)
class Target:
    """`run` reads bytes; `seeds` makes valid inputs; `errors` names the classes that may end it, by their names.

    `modules`: the files whose coverage counts. `longest`: bytes of an input. `about`: what is read, in a line.
    """

    name: str
    about: str
    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    errors: tuple[str, ...]
    modules: tuple[str, ...]
    longest: int = 1 << 16


class Failure(NamedTuple):
    """What went wrong (`key`: in short, with its place), and the whole story."""

    key: str
    text: str


class TooSlow(BaseException):
    """The alarm of a case: no code under test catches it."""


def failure(target: Target, data: bytes, seconds: float = SECONDS, memory: int = MEMORY) -> Failure | None:
    """What is wrong with how the target takes `data`; None where it returns or refuses as it should."""
    start = time.process_time()
    try:
        with _room(memory), _alarm(seconds):
            target.run(data)
    except TooSlow as error:
        return Failure(f"slow {_place(error)}", f"more than {seconds:g} s of CPU time\n{traceback.format_exc()}")
    except Exception as error:
        if (wrong := _wrong(target, error)) is not None:
            return Failure(f"{wrong} {_place(error)}", traceback.format_exc())
    spent = time.process_time() - start
    return Failure("slow, in one call", f"{spent:.1f} s of CPU time") if spent > seconds else None


def _wrong(target: Target, error: Exception) -> str | None:
    """What is wrong with an exception, in a word."""
    name = type(error).__name__
    if name not in target.errors:
        return name
    text = str(error)
    whole = text and (name not in SHOWN or (text.isprintable() and len(text) <= LONGEST))
    return None if whole else f"{name} is no sentence"


def _place(error: BaseException) -> str:
    """The last line of ours that the exception went through."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_ours(frame.filename)]
    return f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].name}" if frames else "outside"


def _is_ours(name: str) -> bool:
    return any(name.startswith(f"{ROOT}/{package}/") for package in OURS)


@contextmanager
def _room(extra: int) -> Iterator[None]:
    """This process may have `extra` bytes of address space more than now."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def minimised(target: Target, data: bytes, key: str, seconds: float = 20.0) -> bytes:
    """A smaller input with the same failure: pieces are left out, then bytes become zeros, as long as it lasts."""
    end = time.monotonic() + seconds

    def fails(smaller: bytes) -> bool:
        found = failure(target, smaller)
        return found is not None and found.key == key

    for change in (_without, _zeroed):
        size = max(len(data) // 2, 1)
        while size and time.monotonic() < end:
            at = 0
            while at < len(data) and time.monotonic() < end:
                smaller = change(data, at, size)
                if smaller != data and fails(smaller):
                    data = smaller
                    at += size if len(smaller) == len(data) and change is _zeroed else 0
                else:
                    at += size
            size //= 2
    return data


def _without(data: bytes, at: int, size: int) -> bytes:
    return data[:at] + data[at + size :]


def _zeroed(data: bytes, at: int, size: int) -> bytes:
    return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]
