"""The model against a judge's answers: agreement, known faults of the judge, and what nobody can explain.

Rules of this file:
- What the architecture leaves UNKNOWN or to the implementation is masked (`_COMPARED`), nothing else.
- A cell is an outcome, at a level: a translation, or a fault. A cell that the judge fills and in which no answer
  agrees is a failure, however few its queries.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from emu.judge import model
from emu.judge.corpus import DONE, EXC, TO_EL2, TO_EL3, Answer, Case
from emu.judge.known import NOT_ON_WALK, explain, explain_update
from pgtable import CPUS, Walk
from pgtable.at import OPERATIONS
from pgtable.registers import ESR, FSC, HCR_EL2, PAR_FAULT, PAR_OK, SCR_EL3
from pgtable.spaces import PASpace, state_space
from pgtable.syndromes import EC_GPC

Answerer = Callable[[Case], model.Answered]
PATHS: dict[str, Answerer] = {"scalar": model.by_walk, "array": model.by_array}
UPDATES_OF = "11.1"  # the QEMU whose hardware updates are the architecture's (T1, T3)

_U64 = (1 << 64) - 1
_PAR_OK = _U64 & ~PAR_OK.mask("IMPDEF", "NS")
_PAR_OK_SECURE = _U64 & ~PAR_OK.mask("IMPDEF")
_PAR_FAULT = _U64 & ~PAR_FAULT.mask("IGNORED_63_48")
_OF_INSTRUCTION = ESR.mask("ISV", "SAS", "SSE", "SRT", "SF", "AR")  # what tells of the instruction is not the walk's
_ABORT_ON_AT = ESR.mask("FSC", "WnR", "CM", "S1PTW")


class Disagreement(NamedTuple):
    """One query where the model and the judge differ. `rule`: why, if known ("T8"), else ""."""

    case: str
    kind: str
    query: int
    va: int
    op: str
    judge: Answer
    model: Answer
    path: str
    rule: str
    walk: Walk | None

    def __str__(self) -> str:
        rule = f" [{self.rule}]" if self.rule else ""
        return (
            f"{self.case} query {self.query} ({self.path}): {self.op} {self.va:#x}: "
            f"judge {shown(self.judge)}, model {shown(self.model)}{rule}"
        )


def shown(answer: Answer) -> str:
    """An answer as text."""
    if isinstance(answer, tuple):
        return "(" + ", ".join(f"{part:#x}" for part in answer) + ")"
    if answer is None:
        return "nothing"
    return f"exception, ESR {answer & _U64:#x}" if answer & EXC else f"{answer:#018x}"


@dataclass
class Tally:
    """The count for one kind of cases."""

    kind: str
    cases: int = 0
    queries: int = 0
    agree: int = 0
    disagree: int = 0
    skipped: int = 0
    unanswered: int = 0
    known: Counter[str] = field(default_factory=Counter)
    filled: Counter[str] = field(default_factory=Counter)  # by cell: the judge's answers
    agreed: Counter[str] = field(default_factory=Counter)  # by cell: those that agree, in every path

    @property
    def empty_cells(self) -> list[str]:
        """Cells that the judge fills and where nothing agrees."""
        return sorted(cell for cell in self.filled if not self.agreed[cell])

    @property
    def failed(self) -> bool:
        """Something is unexplained, or nothing was judged that should have been."""
        return bool(self.disagree or self.empty_cells or not (self.agree + sum(self.known.values()) + self.skipped))


def judge_case(case: Case, tally: Tally, paths: Iterable[str] = ("scalar", "array")) -> list[Disagreement]:
    """Compares one case in every path and adds it up; the disagreements, known ones too."""
    tally.cases += 1
    if case.reference is None:
        tally.skipped += len(case.queries)
        return []
    found: list[Disagreement] = []
    wanted = case.answers[case.reference]
    paths = ("scalar",) if CPUS[case.cpu].rme else paths  # arrays do not tell spaces
    answered = {path: PATHS[path](case) for path in paths}
    first = next(iter(answered.values()))
    for i, want in enumerate(wanted):
        if want is None or first.answers[i] is None:
            tally.unanswered += want is None
            tally.skipped += want is not None
            continue
        tally.queries += 1
        cell = cell_of(case, want)
        tally.filled[cell] += 1
        wrong = [path for path, a in answered.items() if not same(case, a.answers[i], want, case.queries[i][1])]
        found += [_disagreement(case, i, want, path, answered) for path in wrong]
        _count(tally, cell, found[len(found) - len(wrong) :])
    found += _updates(case, answered, tally)
    return found


def _count(tally: Tally, cell: str, wrong: list[Disagreement]) -> None:
    if not wrong:
        tally.agree += 1
        tally.agreed[cell] += 1
        return
    unexplained = any(not d.rule for d in wrong)
    tally.disagree += unexplained
    if not unexplained:
        tally.known[wrong[0].rule] += 1
        tally.agreed[cell] += 1  # the cell is covered: what differs is known to be the judge's


def _disagreement(case: Case, i: int, want: Answer, path: str, answered: dict[str, model.Answered]) -> Disagreement:
    walks = next((a.walks for a in answered.values() if a.walks[i] is not None), (None,) * len(case.queries))
    va, op = case.queries[i]
    mine = answered[path].answers[i]
    return Disagreement(case.id, case.kind, i, va, op, want, mine, path, explain(case, walks[i], want, mine), walks[i])


def _updates(case: Case, answered: dict[str, model.Answered], tally: Tally) -> list[Disagreement]:
    """The words that hardware changed in the whole case; a judge that updates by other rules is not asked."""
    if UPDATES_OF not in case.answers:
        return []
    want = dict(case.changed(UPDATES_OF))
    walks = next(iter(answered.values())).walks
    found = []
    for path, mine in answered.items():
        for pa in sorted(want.keys() | mine.after.keys()):
            judge, model_ = want.get(pa), mine.after.get(pa)
            if judge != model_:
                rule = explain_update(walks, pa, judge, model_)
                found.append(Disagreement(case.id, case.kind, -1, pa, "table word", judge, model_, path, rule, None))
    if want or any(mine.after for mine in answered.values()):
        _count(tally, "table words updated", found)
        tally.filled["table words updated"] += 1
        tally.agree -= not found  # no query of its own
    return found


def same(case: Case, mine: Answer, want: Answer, op: str) -> bool:
    """Equal in everything that the architecture says of the answer to `op`."""
    if case.is_access:
        return _same_access(mine, want)
    assert isinstance(mine, int)
    assert isinstance(want, int)
    if mine & EXC or want & EXC:
        gpc = ESR["EC"].get(want & _U64) == EC_GPC
        return bool(mine & want & EXC) and not (mine ^ want) & (_U64 if gpc else _ABORT_ON_AT)
    if (mine ^ want) & 1:
        return False
    return not (mine ^ want) & (_PAR_FAULT if want & 1 else _par_ok(case, op))


def _par_ok(case: Case, op: str) -> int:
    """What a PAR_EL1 without a fault says of the space: NS in Secure state; with FEAT_RME by state (EncodePARAttrs)."""
    if not CPUS[case.cpu].rme:
        return _PAR_OK if SCR_EL3["NS"].get(case.regs["SCR_EL3"]) else _PAR_OK_SECURE
    state = state_space(CPUS[case.cpu], case.regs["SCR_EL3"], OPERATIONS[op][1])
    if state is PASpace.ROOT:
        return _PAR_OK_SECURE
    of_el1 = op.startswith("S1E") and OPERATIONS[op][1] < 2 and not _is_host(case)
    if state is PASpace.SECURE or (state is PASpace.REALM and not of_el1):
        return _PAR_OK_SECURE & ~PAR_OK.mask("NSE")
    return _PAR_OK & ~PAR_OK.mask("NSE")


def _is_host(case: Case) -> bool:
    """HCR_EL2.{E2H, TGE} are {1, 1}: AT S1E1* and S1E0* ask EL2&0."""
    hcr = HCR_EL2.view(case.regs["HCR_EL2"])
    return bool(hcr.E2H and hcr.TGE)


def _same_access(mine: Answer, want: Answer) -> bool:
    if isinstance(want, tuple) and ESR["FSC"].get(want[0] & ~TO_EL2) == NOT_ON_WALK:
        want = DONE
    if not isinstance(want, tuple) or not isinstance(mine, tuple):
        return mine == want
    if (want[0] | mine[0]) & TO_EL3:
        return mine == want
    if (
        want[0] & mine[0] & TO_EL2
    ):  # HPFAR_EL2 is UNKNOWN for a permission fault and an external abort: the model's is 0
        esr, hpfar = want[0] & ~_OF_INSTRUCTION, want[2] if mine[2] else 0
        return (esr, want[1], hpfar) == mine
    return want[0] & ~TO_EL2 == mine[0] and want[1] == mine[1]


def cell_of(case: Case, want: Answer) -> str:
    """The cell of a judge's answer: `translated`, or a fault with its level."""
    if isinstance(want, tuple):
        code = ESR["FSC"].get(want[0] & ~(TO_EL2 | TO_EL3))
        return "translated" if code == NOT_ON_WALK else FSC.get(code, f"FSC {code:#x}")
    assert want is not None
    if case.is_access:
        return "translated"
    if want & EXC:
        return FSC.get(ESR["FSC"].get(want & _U64), "exception")
    if not want & 1:
        return "translated"
    stage = "stage 2 " if PAR_FAULT["S"].get(want) else ""
    return stage + FSC.get(PAR_FAULT["FST"].get(want), "reserved FST")
