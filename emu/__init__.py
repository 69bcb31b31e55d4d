"""Runs machine code on pgtable's tables: Unicorn, kernel images, calls, checks, the command line.

    from emu import Machine, KernelImage

Names are imported when they are first used (PEP 562): `import emu` loads neither Unicorn nor capstone.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emu.image import KernelImage
    from emu.machine import CallResult, Machine
    from emu.snapshot import Snapshot

_HOME = {
    "CallResult": "emu.machine",
    "KernelImage": "emu.image",
    "Machine": "emu.machine",
    "Snapshot": "emu.snapshot",
}

__all__ = ["CallResult", "KernelImage", "Machine", "Snapshot"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'emu' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
