"""Files for targets that read by path: in one folder, which goes with the process's cache."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path


@cache
def _folder(cache_place: str) -> Path:
    return Path(tempfile.mkdtemp(prefix="fuzz-", dir=cache_place))


def file(data: bytes, name: str = "input") -> str:
    """The path of a file with this content."""
    place = os.environ.get("PGTABLE_CACHE") or tempfile.gettempdir()
    path = _folder(place) / name
    path.write_bytes(data)
    return str(path)
