"""Files that are written whole or not at all: beside their place, to the disk, then renamed.

Rules: whoever writes a file for somebody else to read does it here. An error, Ctrl-C or a full disk leaves what was
there before and nothing beside it. A symbolic link stays one; a device or a pipe is written as it is.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

FileName = str | os.PathLike[str]


@contextmanager
def replacing(path: FileName, *, new: bool = False) -> Iterator[IO[bytes]]:
    """A file that takes the place of `path` when the block ends without an error.

    `new`: no file may be there (FileExistsError). Raises OSError.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file():
        with open(place, "wb") as file:
            yield file
        return
    beside = place.with_name(f".{place.name[:64]}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if new:
            os.link(beside, place)
        else:
            os.replace(beside, place)
    finally:
        beside.unlink(missing_ok=True)


def write(path: FileName, content: str | bytes | memoryview, *, new: bool = False) -> None:
    """Puts `content` (text as UTF-8) into the file `path`, as `replacing` does. Raises OSError."""
    with replacing(path, new=new) as file:
        file.write(content.encode() if isinstance(content, str) else content)
