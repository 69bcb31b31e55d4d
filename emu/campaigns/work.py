"""What a worker does: the cases of a chunk, one after another, on whatever it keeps from chunk to chunk.

Rules of this file:
- A worker writes nothing. It gives back plain data, or raises CampaignError where it cannot work at all (no QEMU, no
  kernel).
- Any other exception in a case is a finding like a disagreement: something of ours did not expect that case.
- One chunk at a time in a process, also where a cluster's worker has several threads: cases share their memory.
"""

from __future__ import annotations

import importlib
import threading
import traceback
from pathlib import Path
from types import ModuleType

from emu.campaigns.plan import (
    COMPARISON,
    RACE,
    REPLAY_HERE,
    TRANSLATION,
    CampaignError,
    Chunk,
    Found,
    Result,
    Row,
    Unit,
    case_seed,
)

MODULES = {TRANSLATION: "translations", COMPARISON: "comparisons", RACE: "schedules"}
_one_at_a_time = threading.Lock()


def run_chunk(chunk: Chunk) -> Result:
    """All cases of a chunk."""
    with _one_at_a_time:
        result = Result([], [])
        for case_id in chunk.ids:
            row, found = run_case(chunk.unit, case_id, case_seed(chunk.seed, case_id))
            result.rows.append(row)
            result.found.extend(found)
        return result


def module(work: str) -> ModuleType:
    """Where a sort of work is done."""
    return importlib.import_module(f"emu.campaigns.{MODULES[work]}")


def run_case(unit: Unit, case_id: str, seed: int) -> tuple[Row, list[Found]]:
    """One case: what came of it, and what was found."""
    from emu.coldboot import BootError
    from emu.image import ImageError
    from emu.judge.guest import OracleError
    from emu.kernels import KernelError

    try:
        row, found = module(unit.work).run(unit, case_id, seed)
    except (CampaignError, OracleError, KernelError, ImageError, BootError, OSError, MemoryError) as error:
        raise CampaignError(f"{case_id}: {error}") from None
    except Exception as error:
        return Row(case_id, 1, 0, 0, 1, {}), [_crash(unit, case_id, error)]
    return row, found


def _crash(unit: Unit, case_id: str, error: Exception) -> Found:
    """The finding that an exception is; what the worker kept may be in any state, and is dropped."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{type(error).__name__} in {Path(last.filename).name}, {last.name}"
    module(unit.work).forget()
    return Found(where, case_id, f"{where}, line {last.lineno}: {error}", REPLAY_HERE)
