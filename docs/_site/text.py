"""Pieces of Markdown and HTML that the made pages have in common."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; what is in a cell is Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("\n", " ") for cell in line) + " |" for line in lines) + "\n"


def plain(text: str) -> str:
    """Text in which nothing is markup."""
    return re.sub(r"([|\[\]_*`\\])", r"\\\1", html.escape(text, quote=False))


def code(text: str) -> str:
    """Text as code in a cell."""
    return f"<code>{html.escape(text).replace('|', '&#124;')}</code>"
