"""docs/thread.md has a verdict for each claim. That its commands print what is shown: tests/examples/test_docs.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.examples.blocks import blocks, sessions

THREAD = Path(__file__).resolve().parents[1] / "docs" / "thread.md"


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
    assert sum(len(list(sessions(block))) for block in blocks(THREAD) if block.language == "console") >= 12
