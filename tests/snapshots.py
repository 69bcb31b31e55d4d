"""Snapshots that tests run on: booted once and kept in the user's cache, by what was booted, how, and this code."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import inspect
import os
from dataclasses import astuple
from pathlib import Path
from typing import Any

from platformdirs import user_cache_dir

from emu import boot, guest, initramfs, snapshot
from emu.boot import BootFailed, Options
from emu.snapshot import Snapshot, SnapshotError
from tests.kernels import kernel_image, lack

FAST = "debian:7.3"  # the kernel that the fast tier boots
WARM = ("debian:6.1", "debian:6.12", "debian:7.3", "debian:7.2-16k")


def _place(options: Options, content: str) -> Path:
    """Where the snapshot is kept: another kernel, other options or other code to boot it make another one."""
    code = "".join(inspect.getsource(module) for module in (boot, guest, initramfs, snapshot))
    key = hashlib.sha256(repr((astuple(options), content, code)).encode()).hexdigest()[:16]
    root = os.environ.get("PGTABLE_CACHE") or user_cache_dir("pgtable")
    return Path(root) / "tests" / f"{options.kernel.replace(':', '-')}-{key}.snap"


@functools.cache
def booted(kernel: str = FAST, **options: Any) -> Snapshot:
    """The snapshot of `kernel`; without QEMU or the kernel the test is skipped, or fails where they are required."""
    image = kernel_image(kernel)
    wanted = Options(kernel, **options)
    place = _place(wanted, snapshot.content_hash(image))
    place.parent.mkdir(parents=True, exist_ok=True)
    with open(place.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            return Snapshot.load(place)
        except SnapshotError:
            pass
        for old in place.parent.glob(f"{kernel.replace(':', '-')}-*.snap"):
            if old != place and not options:
                old.unlink()
        try:
            return boot.boot(wanted, place)
        except BootFailed as error:
            if "is missing" in str(error) or "not on PATH" in str(error):
                lack("qemu", str(error))
            raise
