"""The README's session is what the commands print."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.examples.test_examples import kernels_of, normalised

README = Path(__file__).resolve().parents[2] / "README.md"


def sessions() -> Iterator[tuple[str, str]]:
    """Commands of the console blocks that run pgtable, with the output shown."""
    for block in re.findall(r"```console\n(.*?)```", README.read_text(), re.S):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            if command.startswith("pgtable"):
                yield command, output


@pytest.mark.kernels
@pytest.mark.parametrize(("command", "shown"), list(sessions()), ids=lambda text: text.split("\n")[0][:40])
def test_readme_shows_what_the_command_prints(command: str, shown: str) -> None:
    from tests.kernels import kernel_path

    for name in kernels_of(README):
        kernel_path(name)
    program = Path(sys.executable).with_name("pgtable")
    line = command.replace("pgtable", str(program), 1)
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False, timeout=240)
    assert normalised(done.stdout).rstrip() == normalised(shown).rstrip()


def test_readme_has_a_session() -> None:
    assert len(list(sessions())) >= 2
