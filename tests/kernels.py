"""The Debian kernels that tests run on, fetched once and kept by emu.kernels."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import NoReturn

import pytest

from emu.image import KernelImage
from emu.kernels import KernelError, fetch

KERNELS = ("debian:6.1", "debian:6.12", "debian:7.3")
MORE = ("debian:7.2-16k", "debian:6.12.95")


def required(what: str) -> bool:
    """Whether PGTABLE_REQUIRE says that a test must not be skipped for want of `what`."""
    return what in os.environ.get("PGTABLE_REQUIRE", "").split(",")


def lack(what: str, reason: str) -> NoReturn:
    """Skip the running test, or fail it where `what` is required."""
    if required(what):
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def _fetched(name: str) -> Path | str:
    """The kernel's file, or why there is none: asked once, also where the answer is no."""
    try:
        return Path(fetch(name))
    except (KernelError, OSError) as error:
        return f"no kernel {name}: `pgtable kernel fetch {name}` says: {error}"


def kernel_path(name: str) -> Path:
    """The image file of `name`; without it the test is skipped, or fails where kernels are required."""
    found = _fetched(name)
    return lack("kernels", found) if isinstance(found, str) else found


@functools.cache
def _loaded(path: Path) -> KernelImage:
    return KernelImage.load(path)


def kernel_image(name: str) -> KernelImage:
    """The kernel `name`, read once a test run; without it the test is skipped, or fails where required."""
    return _loaded(kernel_path(name))
