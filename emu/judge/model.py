"""The model's answers to a corpus case: by the scalar walk, and by the array walk.

Rules of this file: an answer has the form that the corpus has (PAR_EL1, EXC | ESR, or (ESR, FAR, HPFAR)), so that it
can be compared word by word; a query that the judge did not try is not tried; memory is put back after every case.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from emu.judge.corpus import DONE, EXC, TO_EL2, TO_EL3, Answer, Case, islands
from pgtable import (
    CPUS,
    Access,
    Fault,
    NestedMany,
    NestedWalk,
    PhysicalMemory,
    Registers,
    Walk,
    at_many,
    at_walk,
    translate,
    translate_many,
)
from pgtable.at import OPERATIONS, external_abort, takes_exception
from pgtable.bits import Words
from pgtable.bulk import Many
from pgtable.gpc import abort_el, gpc_esr, is_gpc_exception, mfar
from pgtable.mmu import branch_target
from pgtable.registers import NAMES
from pgtable.walk import Swap

# The accesses that an access corpus makes: op, the access.
ACCESSES: dict[str, Access] = {
    "LD1": Access.read(1),
    "ST1": Access.write(1),
    "LDT": Access.read(1, unprivileged=True),
    "STT": Access.write(1, unprivileged=True),
    "LD0": Access.read(0),
    "ST0": Access.write(0),
    "EX1": Access.fetch(1),
    "EX0": Access.fetch(0),
    "SWP1": Access.atomic(1),
    "SWP0": Access.atomic(0),
    "LD2": Access.read(2),
    "ST2": Access.write(2),
    "LDT2": Access.read(2, unprivileged=True),
    "STT2": Access.write(2, unprivileged=True),
    "EX2": Access.fetch(2),
}
INSTRUCTION = 4  # a fetch is of an aligned word


@dataclass(frozen=True)
class Answered:
    """Answers to a case's queries (None: not in the model), the walks behind them, and the words changed."""

    answers: tuple[Answer, ...]
    walks: tuple[Walk | None, ...]
    after: dict[int, int]


@cache
def ram(cpu: str) -> PhysicalMemory:
    """RAM as the corpora's CPU model has it; shared between cases, zero between them."""
    return PhysicalMemory(*islands(cpu))


@contextmanager
def memory_of(case: Case) -> Iterator[PhysicalMemory]:
    """RAM with a case's words in it."""
    memory = ram(case.cpu)
    try:
        for pa, word in case.words.items():
            memory.store(pa, word)
        yield memory
    finally:
        for pa in case.words:
            memory.store(pa, 0)


def registers_of(case: Case) -> Registers:
    """The case's registers; PSTATE.PAN of an access case is its own field."""
    values = {name: value for name, value in case.regs.items() if name in NAMES}
    if case.is_access:
        values["PAN"] = case.pan
    return Registers(CPUS[case.cpu], **values)


def tried(case: Case) -> list[bool]:
    """Which queries the judge tried; all, where nobody has answered yet."""
    answers = case.answers.get(case.reference or "")
    return [True] * len(case.queries) if answers is None else [answer is not None for answer in answers]


def in_model(case: Case, op: str, regs: Registers) -> bool:
    """Whether the model answers a query."""
    return op in (ACCESSES if case.is_access else OPERATIONS)


def by_walk(case: Case) -> Answered:
    """One scalar walk a query, hardware updates made in between."""
    regs = registers_of(case)
    answers: list[Answer] = []
    walks: list[Walk | None] = []
    with memory_of(case) as memory:
        touched: dict[int, int] = {}

        def swap(pa: int, old: int, new: int) -> bool:
            if memory.fetch(pa) != old:
                return False
            memory.store(pa, new)
            touched[pa] = new
            return True

        for (va, op), wanted in zip(case.queries, tried(case), strict=True):
            if not wanted or not in_model(case, op, regs):
                walks.append(None)
                answers.append(None)
                continue
            walk = _walk(case, memory, regs, va, op, swap)
            walks.append(walk)
            answers.append(_syndrome(walk, regs) if case.is_access else _par(walk))
    return Answered(tuple(answers), tuple(walks), touched)


def _walk(case: Case, memory: PhysicalMemory, regs: Registers, va: int, op: str, swap: Swap) -> Walk:
    if not case.is_access:
        return at_walk(memory, regs, op, va, swap)
    access = ACCESSES[op]
    if op.startswith("EX"):
        va = branch_target(regs, va & -INSTRUCTION, access.el)
    return translate(memory, regs, va, access, swap=swap)


def _par(walk: Walk) -> int:
    if not isinstance(walk.result, Fault):
        return walk.result.par()
    if takes_exception(walk):
        return EXC | external_abort(walk)
    return walk.result.par()


def _syndrome(walk: Walk, regs: Registers) -> Answer:
    fault, el = walk.fault, walk.access.el
    if fault is None:
        return DONE
    if is_gpc_exception(fault, regs, el):
        return TO_EL3 | gpc_esr(fault, walk.access), walk.va, mfar(fault)
    if abort_el(fault, regs, el) == 2 and el < 2:
        hpfar = walk.hpfar if isinstance(walk, NestedWalk) else 0
        return TO_EL2 | fault.esr(walk.access, target_el=2), walk.va, hpfar
    return fault.esr(walk.access), walk.va, 0


def by_array(case: Case) -> Answered:
    """All queries of one operation at once."""
    regs = registers_of(case)
    answers: list[Answer] = [None] * len(case.queries)
    touched: dict[int, int] = {}
    wanted = tried(case)
    with memory_of(case) as memory:
        for op in dict.fromkeys(op for _, op in case.queries):
            where = [i for i, (_, o) in enumerate(case.queries) if o == op and wanted[i]]
            if not where or not in_model(case, op, regs):
                continue
            vas = [case.queries[i][0] for i in where]
            found, changed = _many(case, memory, regs, op, vas)
            touched |= changed
            for i, answer in zip(where, found, strict=True):
                answers[i] = answer
    return Answered(tuple(answers), (None,) * len(answers), touched)


def _many(
    case: Case, memory: PhysicalMemory, regs: Registers, op: str, vas: Sequence[int]
) -> tuple[list[Answer], dict[int, int]]:
    if not case.is_access:
        many = at_many(memory, regs, op, np.array(vas, np.uint64), swap=True)
        words = zip(many.par().tolist(), many.esr().tolist(), many.aborts.tolist(), strict=True)
        return [EXC | esr if aborted else par for par, esr, aborted in words], _updates(many)
    access = ACCESSES[op]
    if op.startswith("EX"):
        vas = [branch_target(regs, va & -INSTRUCTION, access.el) for va in vas]
    many = translate_many(memory, regs, np.array(vas, np.uint64), access, swap=True)
    to_el2: Words = many.stage2 * np.uint64(TO_EL2)
    hpfar = many.hpfar if isinstance(many, NestedMany) else np.zeros_like(to_el2)
    rows = zip(many.ok.tolist(), (many.esr() | to_el2).tolist(), vas, hpfar.tolist(), strict=True)
    return [DONE if ok else (esr, va, ipa) for ok, esr, va, ipa in rows], _updates(many)


def _updates(many: Many) -> dict[int, int]:
    updates = many.updates
    return dict(zip(updates.pa.tolist(), updates.new.tolist(), strict=True))


def only(case: Case, index: int) -> Case:
    """The case with one query."""
    return replace(
        case,
        queries=(case.queries[index],),
        answers={version: (found[index],) for version, found in case.answers.items()},
    )
