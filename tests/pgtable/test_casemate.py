"""Casemate's trace format, and casemate itself as a judge: its answers to our programs are stored, each with a digest
of the trace it answered. It is a C program that no package has, so that the answers come by a command, not in a test:

    python -m tests.pgtable.test_casemate CASEMATE-CHECK
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pgtable.bbm import check, parse_program, run
from pgtable.casemate import parse_records, read_trace, write_trace
from pgtable.tlb_events import Write
from pgtable.tlb_scene import Program
from tests.pgtable.programs import CASES, Case, verdict

STORED = Path(__file__).with_name("casemate.json")
ANSWERS: dict[str, Any] = json.loads(STORED.read_text()) if STORED.exists() else {}
RECORD = "python -m tests.pgtable.test_casemate CASEMATE-CHECK"

NAMES = {"vaale1is": "vale2is", "vaae1is": "vae2is", "vmalle1is": "alle2is"}
# Programs in which the page of V is broken: what a return would find is found by making another page.
MAKE = "cpu0 write 0x40003008 L3 0 -> 0x60000050005703\n"


def at_el2(case: Case) -> Program:
    """The program for EL2's tables, which casemate knows, with a make in place of a return."""
    text = case.text.replace("0xffff0000", "0x")
    for ours, theirs in NAMES.items():
        text = text.replace(ours, theirs)
    broken = text.rfind("0x40003008 L3") >= 0 and re.search(r"0x40003008 L3 \S+ -> 0\n(?!.*0x40003008 L3)", text, re.S)
    return parse_program("regime EL2\n" + text.replace("cpu0 return\n", MAKE if broken else ""))


# Where casemate's answer is another one, and why. `True`: it finds something.
DIFFERS: dict[str, tuple[bool, str]] = {
    **dict.fromkeys(
        (
            *("good_split_level2", "good_split_level3", "good_split_nT", "good_join_level2"),
            *("bad_split_level2_no_tlbi", "bad_join_level2_one_page"),
        ),
        (True, "it takes every change of size as wrong: no FEAT_BBM levels, no nT"),
    ),
    **dict.fromkeys(
        ("bad_remap_no_break", "bad_memory_type", "bad_cacheability", "bad_shareability", "bad_contiguous_level0"),
        (False, "from leaf to leaf it looks at the size alone where one of the two has AF set"),
    ),
    "good_free_table": (True, "a TLBI by VA never cleans a table entry for it, one of everything does"),
    "bad_unmap_wrong_ttl": (False, "it reads TTL without using it"),
}


def expressible() -> list[Case]:
    """The programs that a trace can say."""
    found = []
    for case in CASES:
        try:
            write_trace(at_el2(case))
        except ValueError:
            continue
        found.append(case)
    return found


CAN_BE_SAID = expressible()


def test_enough_programs_can_be_said() -> None:
    assert len(CAN_BE_SAID) >= 35


@pytest.mark.parametrize("case", CAN_BE_SAID, ids=lambda case: case.name)
def test_a_trace_is_read_back(case: Case) -> None:
    """What was written is read as the same stores and TLBIs; a trace has no FEAT_BBM level and no accesses."""
    program = at_el2(case)
    again = read_trace(write_trace(program))
    stores = [
        [(e.cpu, e.pa, e.level, e.va, e.old, e.new) for e in p.events if isinstance(e, Write)] for p in (program, again)
    ]
    assert stores[0] == stores[1]
    assert again.params.base == program.params.base
    before = check(program.events, program.params, bbm=program.scene.bbm, memory=program.memory())
    if program.scene.bbm == 0 and "free" not in case.text:
        after = check(again.events, program.params, memory=again.memory())
        assert verdict(after, cause=True) == verdict([f for f in before if "return" not in f.rule], cause=True)


def digest(trace: str) -> str:
    """Of the trace that casemate was given: an answer to another trace is no answer."""
    return hashlib.sha256(trace.encode()).hexdigest()[:16]


@pytest.mark.parametrize("case", CAN_BE_SAID, ids=lambda case: case.name)
def test_casemate_says_the_same_or_it_is_known_why_not(case: Case) -> None:
    program = at_el2(case)
    answer = ANSWERS.get(case.name)
    assert answer, f"{case.name} was never given to casemate: {RECORD}"
    assert answer["trace"] == digest(write_trace(program)), f"{case.name} has changed since: {RECORD}"
    ours = bool(run(program))
    expected, _ = DIFFERS.get(case.name, (ours, ""))
    assert answer["finds"] == expected
    assert (case.name in DIFFERS) == (answer["finds"] != ours)


def test_every_answer_is_to_one_of_the_programs() -> None:
    assert set(ANSWERS) == {case.name for case in CAN_BE_SAID}


def asked(checker: str, trace: str) -> bool:
    """Whether casemate finds something; asked again where it took what it has not set for a descriptor (an entry that
    was never valid)."""
    with tempfile.NamedTemporaryFile("w", suffix=".trace") as file:
        file.write(trace)
        file.flush()
        for _ in range(20):
            done = subprocess.run([checker, file.name, "-R", "-q", "-a"], capture_output=True, text=True, check=False)
            if "Saw invalid pte encoding" not in done.stdout:
                break
    return bool(done.returncode)


def record(checker: str) -> None:
    """Asks casemate about every program and stores what it said."""
    traces = {case.name: write_trace(at_el2(case)) for case in CAN_BE_SAID}
    answers = {name: {"trace": digest(trace), "finds": asked(checker, trace)} for name, trace in traces.items()}
    STORED.write_text(json.dumps(answers, indent=1) + "\n")
    print(f"{len(answers)} answers stored in {STORED.name}")


# Stage 2: a page, a table above it (levels 0 to 3), VMID 0. Written for this test.
STAGE2 = """
(mem-init (id 0) (tid 0) (address 41000000) (size 4000) (src "t:1"))
(mem-write (id 1) (tid 0) (mem-order plain) (address 41000000) (value 41001003) (src "t:1"))
(mem-write 2 0 plain 41001000 41002003 "t:1")
(mem-write 3 0 plain 41002000 41003003 "t:1")
(mem-write 4 0 plain 41003008 500007ff "t:1")
(sysreg-write (id 5) (tid 0) (sysreg vttbr_el2) (value 41000000) (src "t:1"))
(mem-write (id 6) (tid 0) (mem-order plain) (address 41003008) (value 0) (src "t:1"))
(barrier (id 7) (tid 0) dsb (kind ish) (src "t:1"))
"""
BY_IPA = '(tlbi (id 8) (tid 0) ipas2e1is (value 1) (src "t:1"))\n(barrier 9 0 dsb ish "t:1")\n'
STAGE1 = '(tlbi 10 0 vmalle1is "t:1")\n(barrier 11 0 dsb ish "t:1")\n'
OTHER_VMID = '(sysreg-write 10 0 vttbr_el2 1000041800000 "t:1")\n'
REMAKE = '(mem-write 20 0 plain 41003008 510007ff "t:1")\n'


@pytest.mark.parametrize(
    ("middle", "expected"),
    [
        (BY_IPA + STAGE1, "-"),
        ('(tlbi 8 0 vmalls12e1is "t:1")\n(barrier 9 0 dsb ish "t:1")\n', "-"),
        ('(tlbi 8 0 alle1is "t:1")\n(barrier 9 0 dsb ish "t:1")\n', "-"),
        ("", "make before clean (no TLBI)"),
        (STAGE1, "make before clean (no TLBI)"),
        (BY_IPA, "make before clean (no TLBI of stage 1 after that of stage 2)"),
        (BY_IPA.replace("(value 1)", "(value 2)") + STAGE1, "make before clean (no TLBI)"),
        (BY_IPA.replace('(barrier 9 0 dsb ish "t:1")\n', ""), "make before clean (no DSB after the TLBI)"),
        (BY_IPA + OTHER_VMID + STAGE1, "make before clean (no TLBI of stage 1 after that of stage 2)"),
        (OTHER_VMID + BY_IPA + STAGE1, "make before clean (TLBI of another VMID)"),
    ],
)
def test_stage_2(middle: str, expected: str) -> None:
    program = read_trace(STAGE2 + middle + REMAKE)
    assert verdict(run(program), cause=True) == expected


def test_fields_may_stand_without_their_names() -> None:
    named = '(mem-write (id 3) (tid 1) (mem-order release) (address 2A) (value 0x5d) (src "f:9"))'
    assert list(parse_records(named)) == list(parse_records('(mem-write 3 1 release 2a 5D "f:9")'))
    (record,) = parse_records(named)
    assert record == {
        **{"event": "mem-write", "id": 3, "tid": 1, "mem-order": "release", "address": 42, "value": 93, "src": "f:9"}
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('(jump 1 0 "f:1")', "no event is called 'jump'"),
        ("(mem-write 1 0 plain 10 xyz)", "mem-write: value 'xyz' is not a number"),
        ("(mem-write (id 1) (tid 0) (colour 2))", "mem-write has no field 'colour'"),
        ("(mem-write 1 0 plain", "an event is not closed"),
        ("hello", "'hello' is outside of an event"),
    ],
)
def test_bad_traces_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(parse_records(text))


def test_what_a_trace_cannot_say_is_refused() -> None:
    with pytest.raises(ValueError, match="EL2's tables of 4 KiB pages"):
        write_trace(parse_program(""))
    with pytest.raises(ValueError, match="dsb sy: a casemate trace has ish, ishst, nsh only"):
        write_trace(parse_program("regime EL2\ncpu0 dsb sy\n"))
    with pytest.raises(ValueError, match="tlbi vale3: a casemate trace of EL2 has"):
        write_trace(parse_program("regime EL2\ncpu0 tlbi vale3 0x1000\n"))


if __name__ == "__main__":
    record(sys.argv[1])
