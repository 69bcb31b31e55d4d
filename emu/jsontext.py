"""JSON that somebody else wrote: what is nested without end is refused as what is no JSON is."""

from __future__ import annotations

import json
from typing import Any


def loads(text: str | bytes) -> Any:
    """What `text` holds. Raises ValueError for what is no JSON, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
