"""docs/thread.md shows what its commands print, and has a verdict for each claim.

Not compared: kernel releases, addresses and offsets in the image, line numbers of the kernel's sources, names that a
compiler gave to parts of functions, how many cases and events there were (but none stays none), seconds, blanks.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

THREAD = Path(__file__).resolve().parents[1] / "docs" / "thread.md"
KERNELS = ("debian:6.1", "debian:6.12.95", "debian:6.12", "debian:7.3")

MOVING = (
    (r"\d+\.\d+\.\d+\S*-(?:cloud-)?arm64\S*", "RELEASE"),
    (r"0xffff80[0-9a-f]{10}", "IMAGE"),
    (r"\+0x[0-9a-f]+", "+OFFSET"),
    (r"\.(?:isra|part|constprop)\.\d+", ""),
    (r"(?<=\.[ch]):\d+", ":LINE"),
    (r"\b[1-9]\d*(?= of \d+ cases| cases| events compared)", "N"),
    (r"(?m)^(\w+) +\d+ +\d+ +(\d+ +\d+) +[\d.]+$", r"\1 N N \2 SECONDS"),
    (r"[ \t]+", " "),
)


def normalised(text: str) -> list[str]:
    """Lines without what an update of a kernel or of the random cases moves."""
    for pattern, replacement in MOVING:
        text = re.sub(pattern, replacement, text)
    return [line.rstrip() for line in text.strip().splitlines()]


def sessions() -> Iterator[tuple[str, str]]:
    """Commands of the console blocks, those that go on after `> ` in one piece, with the output shown."""
    for block in re.findall(r"```console\n(.*?)```", THREAD.read_text(), re.S):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, more, output = re.fullmatch(r"(.*?\n)((?:> .*?\n)*)(.*)", part, re.S).groups()  # type: ignore[union-attr]
            yield (command + re.sub(r"^> ", "", more, flags=re.M)).rstrip("\n"), output


@functools.cache
def printed(command: str, folder: Path) -> str:
    """What the installed commands print; stderr is not shown on the page. Run once, whatever is made of it after."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(folder)}
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, check=False, timeout=240, cwd=folder, env=env
    )
    return done.stdout


def filtered(command: str, folder: Path) -> str:
    """The same for a pipeline, whose first command may be another's too."""
    first, _, rest = command.partition(" | ")
    if not rest or not command.startswith("pgtable"):
        return printed(command, folder)
    text = printed(first, folder)
    return subprocess.run(rest, shell=True, input=text, capture_output=True, text=True, check=False).stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where lab.py of the page is."""
    made = tmp_path_factory.mktemp("thread")
    (lab,) = re.findall(r"```python\n(.*?)```", THREAD.read_text(), re.S)
    (made / "lab.py").write_text(lab)
    return made


@pytest.mark.kernels
@pytest.mark.parametrize(("command", "shown"), list(sessions()), ids=[command[:70] for command, _ in sessions()])
def test_thread_shows_what_the_command_prints(command: str, shown: str, folder: Path) -> None:
    from tests.kernels import kernel_path

    for name in KERNELS:
        kernel_path(name)
    assert normalised(filtered(command, folder)) == normalised(shown)


def claims() -> dict[str, str]:
    """Number of each claim, and the text under its heading."""
    parts = re.split(r"^### (\d[a-z])\. .*\n", THREAD.read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("number", claims())
def test_a_claim_begins_with_its_verdict_and_has_a_command(number: str) -> None:
    text = claims()[number]
    assert re.match(r"\n\*\*(holds|holds if|fails)\*\*", text)
    assert "```console\n$ " in text


def test_the_table_has_the_verdict_of_every_claim() -> None:
    rows = dict(re.findall(r"^\| (\d[a-z]) .*\| \*\*(.*?)\*\*", THREAD.read_text(), re.M))
    found = {number: re.search(r"\*\*(.*?)\*\*", text) for number, text in claims().items()}
    assert rows == {number: verdict and verdict[1] for number, verdict in found.items()}


def test_the_claims_are_those_of_the_mail() -> None:
    assert {number[0] for number in claims()} == set("12345678")
    assert len(list(sessions())) >= 12
