"""The tables of docs/evidence.md, counted in the judges' own tables and in what the tests store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from docs._site.text import code, plain, table
from emu.checks.registry import HARNESSES, WHOLES
from emu.judge.cases import KINDS, TRAPS
from emu.judge.corpus import load
from emu.judge.known import KNOWN, KNOWN_NESTED
from tests.cli.test_tables import GDB_PT_DUMP, GEF
from tests.judged import mutants as hardware
from tests.judged import test_stage2 as stage2
from tests.kernel_model import mutants as kernel
from tests.kernel_model import traps
from tests.pgtable import programs, test_casemate, test_d128_mutants, test_tlb_mutants
from tests.pgtable.test_thirteen_tables import CASES, NOT_ASKED

JUDGED = Path(__file__).resolve().parents[2] / "tests" / "judged"


def corpora() -> str:
    """What is stored: cases, queries, answers of each QEMU."""
    rows, total = [], Counter[str]()
    for path in sorted((JUDGED / "corpus").glob("*.jsonl.xz")):
        cases = tuple(load(path))
        queries = sum(len(case.queries) for case in cases)
        answers = Counter[str]()
        for case in cases:
            answers.update({name: sum(a is not None for a in given) for name, given in case.answers.items()})
        total.update(cases=len(cases), queries=queries, **answers)
        rows.append((code(path.name.partition(".")[0]), *_numbers(len(cases), queries), _answers(answers)))
    both = {name: n for name, n in total.items() if name not in ("cases", "queries")}
    rows.append(("together", *_numbers(total["cases"], total["queries"]), _answers(both)))
    return table(("Corpus", "Cases", "Queries", "Answers"), rows)


def _numbers(*numbers: int) -> Iterable[str]:
    return (f"{n:,}" for n in numbers)


def _answers(found: dict[str, int]) -> str:
    return ", ".join(f"QEMU {name}: {n:,}" for name, n in sorted(found.items()))


def known() -> str:
    """The rows by which a disagreement may be explained, with how many queries are kept that show each."""
    rows = []
    for stages, some in (("stage 1", KNOWN), ("both stages, stage 2", KNOWN_NESTED)):
        for row in some:
            kept = JUDGED / "fixtures" / f"{row.name.replace(' ', '-')}.jsonl"
            number = sum(1 for _ in kept.open()) if stages == "stage 1" and kept.exists() else 0
            rows.append((plain(row.name), stages, plain(row.judge), plain(row.rule), f"{number or ''}"))
    return table(("Row", "Where", "Judge", "What the architecture says, and what the judge does", "Kept"), rows)


def avoided() -> str:
    """What random cases keep clear of, by QEMU version."""
    return table(
        ("QEMU", "Random cases keep clear of"),
        ((version, ", ".join(map(plain, sorted(names)))) for version, names in sorted(TRAPS.items())),
    )


def thirteen() -> str:
    """One page of a tree, and what walkers that people use say of it."""
    rows = []
    for name, case in CASES.items():
        listed, walked = GDB_PT_DUMP.get(name, ("", ""))
        asked = "" if case.drgn == NOT_ASKED else case.drgn if isinstance(case.drgn, str) else f"PA {case.drgn:#x}"
        answers = ", ".join(
            f"{access}: {'ok' if is_ok is True else f'{is_ok[0]} fault, level {is_ok[1]}'}"  # type: ignore[index]
            for access, is_ok in case.answers.items()
        )
        dumped = f"lists {code(listed)}" if listed else "lists nothing"
        rows.append((plain(name), plain(answers), asked, f"{dumped}; walk: {walked}", plain(GEF.get(name, ""))))
    return table(("Table", "The architecture", "drgn", "gdb-pt-dump 9df79f3", "gef 2eeb16f, where wrong"), rows)


def casemate() -> str:
    """How many programs casemate was given, and where its answer is another one."""
    answers, differs = test_casemate.ANSWERS, test_casemate.DIFFERS
    there = {name: why for name, why in differs.items() if name in answers}
    said = f"{len(programs.CASES)} programs; {len(answers)} can be said as its traces; the same answer for "
    reasons: dict[str, list[str]] = {}
    for name, (_, why) in there.items():
        reasons.setdefault(why, []).append(name)
    rows = ((", ".join(code(name) for name in names), plain(why)) for why, names in reasons.items())
    return f"{said}{len(answers) - len(there)}.\n\n" + table(("Programs", "Why casemate's answer is another one"), rows)


CHOICES = ("T3", "T8", "low memory")  # of the rows of known.py: what the architecture leaves open, or the machine's


def peers() -> str:
    """How often each tool was found to be wrong, counted where it is recorded."""
    faults = {*(row.name for row in KNOWN), *(row.name for row in KNOWN_NESTED)} - {*CHOICES}
    avoided_too = set[str]().union(*TRAPS.values())
    wrong_pa = [n for n, case in CASES.items() if isinstance(case.drgn, int) and case.pa is None]
    differs = {why for name, (_, why) in test_casemate.DIFFERS.items() if name in test_casemate.ANSWERS}
    programs_differ = sum(name in test_casemate.ANSWERS for name in test_casemate.DIFFERS)
    rows = (
        (
            "QEMU 7.2, 10.0, 11.1",
            f"{len(faults)} numbered faults, {len(avoided_too)} more that random cases keep clear of",
        ),
        ("Unicorn 2.1.4", "its walk: [judges](judges.md#unicorns-own-mmu); its interface: [engines](engines.md)"),
        ("gdb-pt-dump 9df79f3", f"11 of {len(GDB_PT_DUMP)} one-page tables (`tests/cli/test_tables.py`)"),
        ("gef 2eeb16f", f"{len(GEF)} of {len(CASES)}, of those that were recorded"),
        ("drgn", f"{len(wrong_pa)} of {sum(case.drgn != NOT_ASKED for case in CASES.values())} that it was asked"),
        ("casemate 3.0.2", f"{programs_differ} of {len(test_casemate.ANSWERS)} programs, for {len(differs)} reasons"),
    )
    return table(("Tool", "Wrong, or of another opinion"), rows)


def mutants() -> str:
    """How many rules are broken on purpose, one at a time, and which judge tells."""
    judged = sum(mutant.judged for mutant in hardware.MUTANTS)
    rows = (
        ("stage 1: walk, permissions, faults, PAR", len(hardware.MUTANTS), f"QEMU's answers ({judged}), hand tables"),
        ("stage 2 and both stages", len(stage2.MUTANTS), "QEMU's answers"),
        ("kernel_model", len(kernel.MUTANTS), "the compiled functions"),
        ("TLB model and break-before-make checker", len(test_tlb_mutants.MUTANTS), "programs, good and bad"),
        ("128-bit descriptors", len(test_d128_mutants.MUTANTS), "**not judged**: tables typed from Arm's text"),
    )
    return table(("Part", "Rules broken", "Who notices"), ((part, f"{n}", who) for part, n, who in rows))


def compiled() -> str:
    """Which compiled functions the model of Linux is compared with."""
    names = ", ".join(code(name) for name in HARNESSES)
    whole = ", ".join(code(name) for name in WHOLES)
    known_traps = sum(line[:1].isdigit() for line in traps.TRAPS.splitlines())
    return (
        f"{len(HARNESSES)} functions, call by call: {names}.\n\nAs a whole: {whole}.\n\n"
        f"{known_traps} places where a mirror of these functions in Python goes wrong are each held by named tests "
        "(`tests/kernel_model/traps.py`).\n"
    )


def kinds() -> str:
    """The kinds of random cases that a QEMU can be asked now."""
    return f"{len(KINDS)} kinds: {', '.join(code(name) for name in KINDS)}.\n"


MADE: dict[str, Callable[[], str]] = {
    "corpora": corpora,
    "known": known,
    "avoided": avoided,
    "peers": peers,
    "thirteen": thirteen,
    "casemate": casemate,
    "mutants": mutants,
    "compiled": compiled,
    "kinds": kinds,
}
