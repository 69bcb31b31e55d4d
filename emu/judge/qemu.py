"""QEMU as a judge: the questions of a `Case` put to a `qemu-system-aarch64` now.

    with Oracle() as oracle:                     # the qemu-system-aarch64 on PATH; any QEMU from 7.2 on
        answers = oracle.ask(case).answers       # the same form as in a corpus

- A register that a case does not name gets the default of corpora, or 0; one that this QEMU does not have may only
  have its default. `UnsupportedError` is a case that this QEMU cannot be asked.
- AT cases: one TLB invalidation, then the AT instructions in order.
- Access cases: AT first tells, on a copy of the tables, where every access would go. An access that could write to a
  device, a table or the asking program is not tried (None); a page that is fetched from is filled with SMC. Stores
  write zero, so that RAM elsewhere stays zero. SWP is not tried where there is no RAM: QEMU reports the external
  abort of its read before the permission fault of its write.
- EL3's own regime (S1E3*) translates the asking program too: those cases map the page at PROGRAM_PAGE to itself,
  executable.
- QEMU's own mistakes are answers like any other here: see the table of known judge faults beside the tests.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np

from emu.judge import guest as g
from emu.judge.corpus import DEFAULTS, DONE, EXC, HANDLER, HANDLER_VA, TO_EL2, TO_EL3, Answer, Case, has_ram, is_safe
from emu.judge.guest import Guest, GuestDied, OracleError, QemuMissing, find_qemu, qemu_version

__all__ = ["ACCESSES", "Answers", "GuestDied", "Oracle", "OracleError", "QemuMissing", "UnsupportedError"]

ACCESSES = (
    "LD1", "ST1", "LDT", "STT", "SWP1", "EX1", "LD0", "ST0", "SWP0", "EX0", "LD2", "ST2", "LDT2", "STT2", "EX2",
)  # fmt: skip
"""Access queries: load, store, LDTR, STTR, SWP (atomic) and instruction fetch, of one byte, at EL1, EL0 and EL2."""

VECTORS, INSTRUCTIONS, EL2_VECTORS = HANDLER + 0x4000, HANDLER + 0x5000, HANDLER + 0x8000
PAGE = 0x1000
SMC_WORD = 0xD400_0003_D400_0003  # two SMC #0: the way back to EL3
HANDLER_LEAF = 0x4C3  # a page, AF, read-only for both ELs; no SH: those are address bits with DS=1
HCR_E2H, SCTLR_EE, PAN_BIT, ATOMIC = 34, 25, 22, 20
PA_OF_PAR = 0xF_FFFF_FFFF_F000
PERMISSION = 3  # a fault code without its level, bits [5:2]
EC_SMC, EC_GPC = 0x17, 0x1E
GPCCR = "GPCCR_EL3"
DONE_CLASSES = (0x00, 0x15)  # at EL0 an SVC, or an SMC that is undefined there, is how the access ends
UNKNOWN = -1  # a target: somewhere, but only a fetch could tell where
LOADS = frozenset(a for a in ACCESSES if a.startswith("LD"))
SWAPS = frozenset(a for a in ACCESSES if a.startswith("SWP"))
FETCHES = frozenset(a for a in ACCESSES if a.startswith("EX"))
ALL_READ_WRITE = 0x5555_5555_5555_5555  # every PIE encoding 0b0101
DIED = 99  # instead of how an operation ended


class UnsupportedError(OracleError):
    """This QEMU or CPU cannot be asked that: the message names the register or the operation."""


@dataclass(frozen=True)
class Answers:
    """What QEMU said: an answer per query, the words of `mem` that changed, and the queries that it died of."""

    answers: tuple[Answer, ...]
    after: Mapping[int, int]
    deaths: tuple[int, ...] = ()


class Oracle:
    """One QEMU that answers cases of one CPU model.

    `version` is "7.2"; `registers` and `operations` are what this QEMU has and cases may use; `identity` is what the
    ID registers say at EL3.
    """

    def __init__(self, qemu: str | None = None, cpu: str = "max", *, timeout: float = 30.0) -> None:
        path = find_qemu(qemu)
        self.cpu = cpu
        self.version = qemu_version(path)
        self._guest = Guest(path, cpu, timeout)
        self.registers = self._implemented("MSR ", DEFAULTS)
        self.identity = self._identity()
        accesses = frozenset(ACCESSES) - (frozenset() if self.identity["ID_AA64ISAR0_EL1"] >> ATOMIC & 15 else SWAPS)
        self.operations = self._implemented("AT ", {}) | accesses

    def __enter__(self) -> "Oracle":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process number of QEMU."""
        return self._guest.pid

    def close(self) -> None:
        """End QEMU."""
        self._guest.close()

    def ask(self, case: Case, *, survive: bool = False) -> Answers:
        """Put the queries of a case to QEMU.

        Raises UnsupportedError if this QEMU cannot be asked it, GuestDied if QEMU ends or hangs (the oracle starts it
        again and can be used on). With `survive` a query that QEMU dies of has the answer None, and its index is in
        `deaths`; the following queries see the tables as they were then.
        """
        self._refuse(case)
        try:
            self._guest.store(case.mem)
            return self._ask_accesses(case, survive) if case.is_access else self._ask_ats(case, survive)
        finally:
            self._guest.store(dict.fromkeys(case.mem, 0))

    def answered(self, case: Case) -> Case:
        """The case with this QEMU's answers; a query that QEMU dies of is not answered."""
        found = self.ask(case, survive=True)
        return case.answered(self.version, found.answers, found.after)

    def _refuse(self, case: Case) -> None:
        me = f"QEMU {self.version} -cpu {self.cpu}"
        if case.cpu != self.cpu:
            raise UnsupportedError(f"case {case.id} is for -cpu {case.cpu}, this is {me}")
        for name, value in case.regs.items():
            if name not in self.registers and value != DEFAULTS.get(name, 0):
                raise UnsupportedError(f"case {case.id} sets {name} to {value:#x}, which {me} cannot")
        for op in {op for _, op in case.queries} - self.operations:
            raise UnsupportedError(f"case {case.id} asks {op}, which {me} cannot")

    # ---- lists of operations

    def _rows(self, operations: Iterable[tuple[str, int]]) -> g.Words:
        thunks = self._guest.thunks
        return np.array([(thunks[name], value) for name, value in operations], np.uint64).reshape(-1, 2)

    def _implemented(self, prefix: str, values: Mapping[str, int]) -> frozenset[str]:
        names = [n.removeprefix(prefix) for n in self._guest.thunks if n.startswith(prefix)]
        outcomes = self._guest.run(self._rows((prefix + n, values.get(n, 0)) for n in names))
        return frozenset(n for n, how in zip(names, outcomes[:, g.HOW].tolist(), strict=True) if how == g.RETURNED)

    def _identity(self) -> dict[str, int]:
        names = [n for n in self._guest.thunks if n.startswith("MRS ")]
        outcomes = self._guest.run(self._rows((n, 0) for n in names))
        return dict(zip((n.removeprefix("MRS ") for n in names), outcomes[:, g.X0].tolist(), strict=True))

    def _setup(self, case: Case) -> g.Words:
        names = sorted(self.registers - {GPCCR})
        values = [(f"MSR {name}", case.regs.get(name, 0)) for name in names]
        return self._rows([*self._unprotected(), *values, ("TLBI", 0), *self._protected(case)])

    def _unprotected(self) -> list[tuple[str, int]]:
        """Granule protection off: the tables of a case are there only while it is asked."""
        return [(f"MSR {GPCCR}", 0), ("TLBI PAALL", 0)] if GPCCR in self.registers else []

    def _protected(self, case: Case) -> list[tuple[str, int]]:
        if GPCCR not in self.registers:
            return []
        return [(f"MSR {GPCCR}", case.regs.get(GPCCR, 0)), ("TLBI PAALL", 0)]

    def _run(self, case: Case, rows: g.Words, of: Sequence[int], survive: bool) -> tuple[g.Words, tuple[int, ...]]:
        """The outcome of every row after the case's registers are set, and the rows that the guest died of.

        `of`: the query that a row is for.
        """
        setup, end = self._setup(case), self._rows(self._unprotected())
        parts: list[g.Words] = []
        deaths: list[int] = []
        while (start := sum(map(len, parts))) < len(rows) or not parts:
            try:
                outcomes = self._guest.run(np.concatenate([setup, rows[start:], end]))
                parts.append(outcomes[len(setup) : len(outcomes) - len(end)])
            except GuestDied as death:
                before = death.at - len(setup)
                parts.append(self._guest.view(g.OUTCOMES, 8 * death.at).reshape(-1, 8)[len(setup) :].copy())
                parts.append(np.full((1, 8), DIED, np.uint64))
                deaths.append(start + before)
                self._guest.start()
                if before < 0 or not survive:
                    raise self._death(case, of[start + before] if start + before >= 0 else -1, death) from None
        return np.concatenate(parts), tuple(deaths)

    def _death(self, case: Case, at: int, death: GuestDied) -> GuestDied:
        va, op = case.queries[at] if at >= 0 else (0, "the registers")
        return GuestDied(f"QEMU {self.version} died of query {at} of {case.id} ({op} {va:#x}): {death}", at)

    # ---- AT instructions

    def _ask_ats(self, case: Case, survive: bool) -> Answers:
        rows = self._rows((f"AT {op}", va) for va, op in case.queries)
        outcomes, deaths = self._run(case, rows, range(len(case.queries)), survive)
        answers = tuple(map(self._par, *outcomes[:, [g.HOW, g.X0, g.ESR_EL3]].T.tolist()))
        return Answers(answers, self._changes(case), deaths)

    def _par(self, how: int, par: int, esr: int) -> int | None:
        if how == g.EXCEPTION:
            return EXC | esr
        if how not in (g.RETURNED, DIED):
            raise OracleError(f"an AT came back through vector {how} with ESR_EL3 {esr:#x}")
        return par if how == g.RETURNED else None

    def _changes(self, case: Case) -> dict[int, int]:
        now = self._guest.fetch(case.mem)
        return {a: word for a, word in now.items() if word != case.mem[a]}

    # ---- real accesses

    def _ask_accesses(self, case: Case, survive: bool) -> Answers:
        tried, filled = self._plan(case)
        self._guest.store(case.mem)  # again: the ATs of the plan may have changed it
        tables = _handler_tables(case)
        pages = [VECTORS, INSTRUCTIONS, EL2_VECTORS, *filled]
        try:
            self._fill(pages, SMC_WORD)
            self._guest.store(tables)
            self._guest.view(INSTRUCTIONS, len(self._guest.page))[:] = self._guest.page
            self._guest.view(g.MAILBOX + 32, 2)[:] = (_handler_va(case) + PAGE, case.pan << PAN_BIT)
            found, deaths = self._try(case, tried, survive)
            answers = tuple(found.get(i) for i in range(len(case.queries)))
            return Answers(answers, self._changes(case), deaths)
        finally:
            self._fill(pages, 0)
            self._guest.store(dict.fromkeys(tables, 0))

    def _try(self, case: Case, tried: list[int], survive: bool) -> tuple[dict[int, Answer], tuple[int, ...]]:
        """The answers to the queries `tried`, and which of them the guest died of."""
        if not tried:
            return {}, ()
        after = [("READ FAR_EL3", 0), ("READ MFAR_EL3", 0)] if GPCCR in self.registers else []
        each = 1 + len(after)
        queries = (case.queries[i] for i in tried)
        rows = self._rows(row for va, op in queries for row in ((f"TRY {op}", va), *after))
        of = [i for i in tried for _ in range(each)]
        outcomes, deaths = self._run(case, rows, of, survive)
        groups = outcomes.reshape(len(tried), each, -1).tolist()
        found = {i: _outcome(row, *(x[g.X0] for x in rest)) for i, (row, *rest) in zip(tried, groups, strict=True)}
        return found, tuple(of[i] for i in deaths)

    def _fill(self, pages: Iterable[int], word: int) -> None:
        for pa in pages:
            self._guest.view(pa, PAGE // 8)[:] = word

    def _plan(self, case: Case) -> tuple[list[int], set[int]]:
        """The queries that may be tried, and the pages of RAM that will be fetched from."""
        tables = {pa & -PAGE for pa in case.mem}
        tried, filled = [], set()
        for i, ((_, op), pa) in enumerate(zip(case.queries, self._targets(case), strict=True)):
            if pa == UNKNOWN and op not in FETCHES:
                pa = None  # neither readable nor writable: it will fault
            if pa is None:
                tried.append(i)
            elif is_safe(pa, case.cpu) and (op in LOADS or pa not in tables):
                if has_ram(pa, case.cpu) or op not in SWAPS:
                    tried.append(i)
                if has_ram(pa, case.cpu) and op in FETCHES:
                    filled.add(pa)
        return tried, filled

    def _targets(self, case: Case) -> list[int | None]:
        """The page that every query goes to; None if it has none, UNKNOWN if only a fetch could tell."""
        if case.code_ipa is not None:
            probes = ["S12E1R", "S12E1W"]
        else:
            probes = ["S1E2R"] if case.regs["HCR_EL2"] >> HCR_E2H & 1 else ["S1E1R"]
        readable = {name: ALL_READ_WRITE for name in self.registers if name.startswith("PIR")}
        queries = [(va, op) for op in probes for va, _ in case.queries]
        answers = self._ask_ats(replace(case, regs={**case.regs, **readable}, queries=queries), survive=True).answers
        return [_target(answers[i :: len(case.queries)]) for i in range(len(case.queries))]


def _handler_va(case: Case) -> int:
    return case.code_ipa if case.code_ipa is not None else HANDLER_VA[1 - (case.half or 0)]


def _handler_tables(case: Case) -> dict[int, int]:
    """The tables of the half that is not under test: two pages, by a root table for TxSZ=25."""
    va = _handler_va(case)
    leaf = HANDLER + 0x2000 + 8 * (va >> 12 & 511)
    words = {
        HANDLER + 8 * (va >> 30 & 511): HANDLER + 0x1003,
        HANDLER + 0x1000 + 8 * (va >> 21 & 511): HANDLER + 0x2003,
        leaf: VECTORS | HANDLER_LEAF,
        leaf + 8: INSTRUCTIONS | HANDLER_LEAF,
    }
    sctlr = case.regs["SCTLR_EL2" if case.regs["HCR_EL2"] >> HCR_E2H & 1 else "SCTLR_EL1"]
    if sctlr >> SCTLR_EE & 1:
        return {pa: int.from_bytes(word.to_bytes(8, "little"), "big") for pa, word in words.items()}
    return words


def _target(pars: Iterable[Answer]) -> int | None:
    """Where the probes of one address say that it goes."""
    unknown = False
    for par in pars:
        if isinstance(par, int) and not par & (EXC | 1):
            return par & PA_OF_PAR
        unknown |= not isinstance(par, int) or (not par & EXC and par >> 3 & 15 == PERMISSION)
    return UNKNOWN if unknown else None


def _outcome(row: list[int], far_el3: int = 0, mfar: int = 0) -> Answer:
    """The answer that one access gave: what EL1, EL2 or EL3 was told, and how the program came back."""
    how, _, esr_el3, esr_el1, far_el1, esr_el2, far_el2, hpfar_el2 = row
    if how == DIED:
        return None
    if how == g.FROM_LOWER and esr_el3 >> 26 & 63 == EC_GPC:
        return esr_el3 | TO_EL3, far_el3, mfar
    if how != g.FROM_LOWER or esr_el3 >> 26 != EC_SMC:
        raise OracleError(f"an access came back through vector {how} with ESR_EL3 {esr_el3:#x}, ESR_EL1 {esr_el1:#x}")
    if esr_el2 and esr_el2 >> 26 not in DONE_CLASSES:
        return esr_el2 | TO_EL2, far_el2, hpfar_el2
    if esr_el1 and esr_el1 >> 26 not in DONE_CLASSES:
        return esr_el1, far_el1, 0
    return DONE
