"""What reading a kernel has found out, kept by the content of its file.

One directory per content, a few plain files in it, each written beside its place and then renamed, so that a
reader sees a whole file or none. `meta.json` comes last and holds the length and CRC of the others: anything that
does not match counts as absent and is written again. A cache that cannot be written is no error.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emu import jsontext, writing

FORMAT = 2  # a new number whenever a reader would now find something else
META = "meta.json"
ABANDONED = 3600.0  # seconds that no writer takes


def directory(key: str) -> Path:
    """Where the files for the content hash `key` are; PGTABLE_CACHE moves all of the cache."""
    root = os.environ.get("PGTABLE_CACHE")
    if not root:
        from platformdirs import user_cache_dir

        root = user_cache_dir("pgtable")
    return Path(root) / "images" / f"{key[:32]}-{FORMAT}"


def load(place: Path) -> tuple[dict[str, Any], dict[str, NDArray[Any]]] | None:
    """The facts and arrays that `store` wrote, arrays mapped read-only; None where they are not whole."""
    try:
        meta = jsontext.loads((place / META).read_bytes())
        arrays = {name: _checked(place / name, *want) for name, want in meta["files"].items()}
        return meta["facts"], arrays
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def store(place: Path, facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Keep `facts` (anything JSON) and `arrays`."""
    with contextlib.suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
        _tidy(place)
        files = {name: _write_array(place / name, array) for name, array in arrays.items()}
        writing.write(place / META, json.dumps({"facts": facts, "files": files}).encode())


def load_part(place: Path | None, name: str) -> NDArray[Any] | None:
    """An array of its own, from `store_part`."""
    if place is None:
        return None
    try:
        size, crc, dtype, shape = jsontext.loads((place / f"{name}.json").read_bytes())
        return _checked(place / name, size, crc, dtype, shape)
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def store_part(place: Path | None, name: str, array: NDArray[Any]) -> None:
    """Keep one more array, which not everybody needs."""
    if place is not None:
        with contextlib.suppress(OSError):
            place.mkdir(parents=True, exist_ok=True)
            writing.write(place / f"{name}.json", json.dumps(_write_array(place / name, array)).encode())


def _checked(path: Path, size: int, crc: int, dtype: str, shape: list[int]) -> NDArray[Any]:
    raw = np.memmap(path, np.uint8, "r").data if size else memoryview(b"")
    if zlib.crc32(raw) != crc:
        raise ValueError(f"{path} is damaged")
    return np.frombuffer(raw, np.dtype(dtype)).reshape(shape)


def _write_array(path: Path, array: NDArray[Any]) -> tuple[int, int, str, list[int]]:
    whole = np.ascontiguousarray(array)
    raw = whole.data.cast("B") if whole.size else memoryview(b"")
    writing.write(path, raw)
    return len(raw), zlib.crc32(raw), whole.dtype.str, list(whole.shape)


def _tidy(place: Path) -> None:
    """Removes what writers that were killed have left."""
    for left in place.glob(".*"):
        if time.time() - left.stat().st_mtime > ABANDONED:
            left.unlink()
