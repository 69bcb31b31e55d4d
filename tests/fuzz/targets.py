"""Every target by its name, in the order in which they are fuzzed."""

from __future__ import annotations

from tests.fuzz import dumps, images, tables, texts
from tests.fuzz.harness import Target

TARGETS: dict[str, Target] = {target.name: target for part in (images, dumps, tables, texts) for target in part.TARGETS}
