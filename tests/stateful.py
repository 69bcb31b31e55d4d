"""How long the stateful tests search: the same short search in every run, or a long one by PGTABLE_HYPOTHESIS=long."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

LONG = os.environ.get("PGTABLE_HYPOTHESIS") == "long"


def settings_of(examples: int, steps: int) -> settings:
    """Settings for `examples` runs of `steps` steps, always the same ones; long: fifty times as many, random ones."""
    return settings(
        max_examples=examples * (50 if LONG else 1),
        stateful_step_count=steps * (2 if LONG else 1),
        derandomize=not LONG,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
