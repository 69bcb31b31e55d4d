"""Every example prints what is recorded beside it. `python tests/examples/test_examples.py` records again."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("[0-9]*.py"))


def printed(script: Path) -> str:
    """The script's output, run as a user would run it."""
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    return normalised(done.stdout)


def normalised(text: str) -> str:
    """Debian's updates move kernel releases and image addresses: neither is compared."""
    text = re.sub(r"\d+\.\d+\.\d+\S*-(cloud-)?arm64\S*", "RELEASE", text)
    return re.sub(r"0xffff8000[89]\w{7}", "IMAGE", text)


def kernels_of(script: Path) -> list[str]:
    """The Debian kernels that a script names."""
    return re.findall(r"debian:[\w.-]+", script.read_text())


def need_qemu() -> None:
    """Skips, or fails where QEMU is required."""
    from emu.judge.guest import OracleError, find_qemu
    from tests.kernels import lack

    try:
        find_qemu(None)
    except OracleError as error:
        lack("qemu", str(error))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_example_prints_what_is_recorded(script: Path) -> None:
    for name in kernels_of(script):
        from tests.kernels import kernel_path

        kernel_path(name)  # skips, or fails where kernels are required
    if "emu.boot" in script.read_text():
        need_qemu()
    assert printed(script) == script.with_suffix(".out").read_text()


def test_every_example_has_a_recording() -> None:
    assert len(SCRIPTS) >= 4
    assert {s.with_suffix(".out").name for s in SCRIPTS} == {p.name for p in EXAMPLES.glob("*.out")}


if __name__ == "__main__":
    for each in SCRIPTS:
        each.with_suffix(".out").write_text(printed(each))
        print(f"recorded {each.stem}")
