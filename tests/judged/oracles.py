"""The QEMUs that tests ask: the one on PATH, and those that PGTABLE_QEMU names (paths, like PATH itself)."""

from __future__ import annotations

import os

from emu.judge.qemu import Oracle, OracleError
from tests.kernels import lack

QEMUS = ("qemu-system-aarch64", *filter(None, os.environ.get("PGTABLE_QEMU", "").split(os.pathsep)))


def open_oracle(qemu: str = QEMUS[0], cpu: str = "max", timeout: float = 30.0) -> Oracle:
    """An oracle; without its QEMU the test is skipped, or fails where qemu is required."""
    try:
        return Oracle(qemu, cpu, timeout=timeout)
    except OracleError as error:
        return lack("qemu", str(error))
