"""The one error of this folder: a source that cannot be used."""

from __future__ import annotations


class SourceError(ValueError):
    """A file, a live machine or a register text that is not usable; the message is one sentence for its owner."""
