"""Campaign work: the translations of a random case, by the model and by a QEMU.

A case is what `pgtable judge --qemu` draws for one seed, and has some 250 translations.
"""

from __future__ import annotations

import shlex
import threading
from collections import defaultdict
from collections.abc import Collection, Sequence
from random import Random

from emu.campaigns.plan import TRANSLATION, CampaignError, Found, Row, Unit
from emu.judge.cases import TRAPS, granule_names, kinds, random_case
from emu.judge.corpus import EXC, Answer, Case
from emu.judge.qemu import Oracle
from emu.judge.verdict import Disagreement, Tally, cell_of, judge_case
from pgtable.registers import ESR, PAR_FAULT, PAR_OK

MIXED = "mixed"  # the granule of each half is drawn
_WORD = (1 << 64) - 1
_here = threading.local()  # a QEMU ends with the thread that started it


def units(qemu: str, only_kinds: Collection[str], only_granules: Collection[str]) -> list[Unit]:
    """Every kind that this QEMU can be asked, with each granule that it is about; `only_*`: () for all.

    Raises OracleError for a QEMU that is not there, CampaignError where nothing is left.
    """
    with Oracle(qemu) as oracle:
        names = kinds(oracle.registers | oracle.operations, TRAPS.get(oracle.version, frozenset()))
    found = [
        Unit(TRANSLATION, qemu, oracle.version, name, granule)
        for name in names
        if not only_kinds or name in only_kinds
        for granule in _granules(name)
        if not only_granules or granule in only_granules
    ]
    if not found:
        wanted = ", ".join([*only_kinds, *only_granules])
        raise CampaignError(f"QEMU {oracle.version} can be asked nothing of: {wanted}")
    return found


def _granules(kind: str) -> list[str]:
    names = granule_names(kind)
    return names if len(names) == 1 else [*names, MIXED]


def run(unit: Unit, case_id: str, seed: int) -> tuple[Row, list[Found]]:
    """Draws, asks and judges one case."""
    oracle = _oracle(unit)
    avoid = TRAPS.get(oracle.version, frozenset())
    granules = () if unit.granule == MIXED else (unit.granule,)
    case = random_case(Random(seed), unit.part, avoid=avoid, granules=granules)
    tally = Tally(unit.part)
    wrong = [d for d in judge_case(oracle.answered(case), tally) if not d.rule]
    differ = len({d.query for d in wrong if d.query >= 0})
    detail = {"skipped": tally.skipped + tally.unanswered, "rules": dict(tally.known), "outcomes": dict(tally.filled)}
    known = tally.queries - tally.agree - differ
    return Row(case_id, tally.queries, tally.agree, known, differ, detail), _found(unit, case, case_id, seed, wrong)


def _found(unit: Unit, case: Case, case_id: str, seed: int, wrong: Sequence[Disagreement]) -> list[Found]:
    """One finding for each signature, with its first disagreement."""
    by_query: dict[tuple[int, int], list[Disagreement]] = defaultdict(list)
    for d in wrong:
        by_query[d.query, d.va].append(d)
    first: dict[str, str] = {}
    for same in by_query.values():
        first.setdefault(_signature(unit, case, same), str(same[0]))
    return [Found(signature, case_id, text, replay(unit, seed)) for signature, text in first.items()]


def _signature(unit: Unit, case: Case, same: Sequence[Disagreement]) -> str:
    """What two disagreements of one cause have alike; `same`: those of one query, a path each."""
    d = same[0]
    asked = "table word" if d.query < 0 else d.op if case.is_access else "AT"
    head = f"QEMU {unit.release}, {asked}, {' and '.join(d.path for d in same)} walk: "
    return head + ("differs" if d.query < 0 else _outcomes(case, d.judge, d.model))


def _outcomes(case: Case, judge: Answer, model: Answer) -> str:
    theirs, ours = cell_of(case, judge), cell_of(case, model)
    if theirs != ours:
        return f"{theirs}, the model says {ours}"
    return f"{theirs}, but for {', '.join(_fields(case, judge, model))}"


def _fields(case: Case, judge: Answer, model: Answer) -> list[str]:
    """The fields in which two answers of one outcome differ."""
    if isinstance(judge, tuple) and isinstance(model, tuple):
        registers = zip(("ESR", "FAR", "HPFAR"), judge, model, strict=True)
        return [name for name, a, b in registers if a != b]
    if not isinstance(judge, int) or not isinstance(model, int):
        return ["the form"]
    layout = ESR if judge & EXC else PAR_FAULT if judge & 1 else PAR_OK
    return list(layout.changed(judge & _WORD, model & _WORD))


def replay(unit: Unit, seed: int) -> str:
    """The command that draws, asks and judges one case alone."""
    granule = [] if unit.granule == MIXED else ["--granule", unit.granule]
    words = ["pgtable", "judge", "--qemu", unit.subject, "--kind", unit.part, *granule]
    return shlex.join([*words, "--seed", str(seed), "--cases", "1"])


def _oracle(unit: Unit) -> Oracle:
    oracles: dict[str, Oracle] = _here.__dict__.setdefault("oracles", {})
    if unit.subject not in oracles:
        oracles[unit.subject] = Oracle(unit.subject)
    oracle = oracles[unit.subject]
    if oracle.version != unit.release:
        raise CampaignError(f"{unit.subject} is QEMU {oracle.version} on a worker, the campaign is of {unit.release}")
    return oracle


def forget() -> None:
    """Ends the QEMUs of this thread."""
    for oracle in _here.__dict__.pop("oracles", {}).values():
        oracle.close()
