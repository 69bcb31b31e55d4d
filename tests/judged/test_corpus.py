"""The corpora as recorded, and what the reader says to files that are none."""

from __future__ import annotations

import json
import lzma
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emu.judge.corpus import (
    DEFAULTS,
    DONE,
    EXC,
    HANDLER,
    ISLANDS,
    PA_BITS,
    TO_EL2,
    Case,
    CorpusError,
    dump,
    is_safe,
    islands,
    load,
    loads,
    save,
)

CORPUS = Path(__file__).parent / "corpus"
FILES = sorted(CORPUS.glob("*.xz"))
FIGURES = {  # cases, queries, table words, answers, changed words
    "access": (420, 99_868, 25_202, 185_168, 618),
    "at_clean": (1_284, 346_237, 77_268, 675_674, 893),
    "at_edge": (450, 122_225, 28_623, 237_450, 318),
    "rme": (42, 5_040, 23_410, 7_560, 0),
}


def name_of(path: Path) -> str:
    return path.name.partition(".")[0]


@pytest.fixture(scope="module", params=FILES, ids=name_of)
def corpus(request: pytest.FixtureRequest) -> tuple[str, list[Case]]:
    return name_of(request.param), list(load(request.param))


def test_every_record_is_read(corpus: tuple[str, list[Case]]) -> None:
    name, cases = corpus
    found = (
        len(cases),
        sum(len(c.queries) for c in cases),
        sum(len(c.mem) for c in cases),
        sum(len(a) for c in cases for a in c.answers.values()),
        sum(len(words) for c in cases for words in c.after.values()),
    )
    assert found == FIGURES[name]


def test_what_is_written_reads_the_same(corpus: tuple[str, list[Case]]) -> None:
    _, cases = corpus
    assert list(loads(map(dump, cases))) == cases


def test_written_again_it_is_the_same_text(corpus: tuple[str, list[Case]]) -> None:
    _, cases = corpus
    lines = [dump(c) for c in cases[::20]]
    assert [dump(c) for c in loads(lines)] == lines


def test_every_answer_has_the_form_of_its_sort(corpus: tuple[str, list[Case]]) -> None:
    name, cases = corpus
    for case in cases:
        assert case.is_access == (name == "access" or case.kind == "rme-acc")
        assert (case.half in (0, 1)) == case.is_access
        for answers in case.answers.values():
            assert len(answers) == len(case.queries)
            sorts = {type(a) for a in answers} | ({DONE} if DONE in answers else set())
            assert sorts <= ({int, tuple, type(None), DONE} if case.is_access else {int, type(None)})


def test_no_access_goes_to_the_half_of_the_asking_program(corpus: tuple[str, list[Case]]) -> None:
    _, cases = corpus
    for case in cases:
        if case.is_access and case.code_ipa is None:
            assert {va >> 55 & 1 for va, _ in case.queries} == {case.half}
            assert case.regs[f"TTBR{1 - (case.half or 0)}_EL1"] == HANDLER


def test_every_table_word_is_in_the_ram_of_its_cpu(corpus: tuple[str, list[Case]]) -> None:
    _, cases = corpus
    for case in cases:
        assert case.words == case.mem
        assert all(is_safe(pa, case.cpu) for pa in case.mem)


def test_the_believed_version_was_asked(corpus: tuple[str, list[Case]]) -> None:
    _, cases = corpus
    assert Counter(c.reference for c in cases)
    for case in cases:
        assert case.reference in case.answers
        assert set(case.after) <= set(case.answers)


def test_a_smaller_cpu_has_fewer_islands() -> None:
    assert islands("max") == ISLANDS
    assert [len(islands(cpu)) for cpu in PA_BITS] == [10, 10, 10, 8, 8, 6, 4, 4]


def test_the_asking_program_and_devices_are_not_safe() -> None:
    assert not is_safe(0x0900_0000, "max")  # the UART
    assert not is_safe(0x4020_0000, "max")  # the program
    assert not is_safe(HANDLER, "max")
    assert not is_safe((1 << 51) + (16 << 20), "max")  # devices above the last island
    assert is_safe(0x4180_0000, "max")
    assert is_safe(0x8000_0000, "max")  # a hole


# ---- one case by hand

RECORD: dict[str, Any] = {
    "id": "x",
    "kind": "s1-4k",
    "cpu": "max",
    "ref": "11.1",
    "regs": {"TCR_EL1": "19"},
    "mem": {"41800000": "41801003"},
    "ops": ["S1E1R", "S1E0W"],
    "q": "1000:0 ff:1",
    "par": {"11.1": ["80b", "10000000096000150"], "10.0": "=", "7.2": None},
    "after": {"11.1": {"41800000": "41801403"}},
}
ACCESS = {
    **{k: v for k, v in RECORD.items() if k not in ("par", "ref")},
    "half": 0,
    "pan": 1,
    "code_ipa": "9604c000",
    "acc": {"11.1": [0, ["8000000092000007", "ff", "10"]], "10.0": [None, 0]},
}


def test_a_case_is_what_its_record_says() -> None:
    [case] = loads([json.dumps(RECORD), "\n"])
    assert case.regs == {**DEFAULTS, "TCR_EL1": 0x19}
    assert case.mem == {0x4180_0000: 0x4180_1003}
    assert case.queries == ((0x1000, "S1E1R"), (0xFF, "S1E0W"))
    assert case.answers == dict.fromkeys(("11.1", "10.0"), (0x80B, EXC | 0x9600_0150))
    assert case.changed("11.1") == {0x4180_0000: 0x4180_1403}
    assert case.changed("10.0") == {}
    assert case.reference == "11.1"
    assert not case.is_access


def test_an_access_case_is_what_its_record_says() -> None:
    [case] = loads([json.dumps(ACCESS)])
    assert case.answers["11.1"] == (DONE, (TO_EL2 | 0x9200_0007, 0xFF, 0x10))
    assert case.answers["10.0"] == (None, DONE)
    assert (case.half, case.pan, case.code_ipa, case.reference) == (0, 1, 0x9604_C000, "11.1")


def test_answers_are_added_and_taken_away() -> None:
    [case] = loads([json.dumps(RECORD)])
    asked = case.answered("7.2", [1, None], {8: 9})
    assert asked.answers["7.2"] == (1, None)
    assert asked.after["7.2"] == {8: 9}
    question = asked.question()
    assert (question.answers, question.after, question.ref) == ({}, {}, None)
    assert question.answered("7.2", [1, None], {}).ref == "7.2"
    assert next(loads([dump(asked)])) == asked


def test_equal_answers_are_written_once() -> None:
    [case] = loads([json.dumps(RECORD)])
    assert json.loads(dump(case))["par"]["10.0"] == "="


@pytest.mark.parametrize("name", ["cases.jsonl.xz", "cases.jsonl"])
def test_a_corpus_is_found_by_content(tmp_path: Path, name: str) -> None:
    cases = [replace(next(loads([json.dumps(RECORD)])), id=str(i)) for i in range(3)]
    assert save(tmp_path / name, cases) == 3
    (tmp_path / name).rename(tmp_path / "other")
    assert list(load(tmp_path / "other")) == cases


def packed(record: dict[str, Any]) -> bytes:
    return lzma.compress(json.dumps(record).encode())


def without(key: str) -> dict[str, Any]:
    return {k: v for k, v in RECORD.items() if k != key}


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("[1]", r"a record is a JSON object, not \[1\]"),
        ("{", "not JSON: Expecting"),
        (without("cpu"), "there is no 'cpu'"),
        ({**RECORD, "cpu": "6502"}, "cpu '6502' is not one of max, "),
        ({**RECORD, "regs": {"TCR_EL1": "xyz"}}, r'regs\[TCR_EL1\] is "xyz", not a hex number of 64 bits'),
        ({**RECORD, "regs": {"TCR_EL1": 25}}, r"regs\[TCR_EL1\] is 25, not a hex"),
        ({**RECORD, "mem": {"41800004": "0"}}, r"mem\[41800004\] is not at a multiple of 8"),
        ({**RECORD, "mem": {"10000000000000": "0"}}, "an address in mem is .* not a hex number of 52 bits"),
        ({**RECORD, "mem": []}, r"'mem' is \[\], not a JSON object"),
        ({**RECORD, "q": "1000:2 0:0"}, "query '1000:2' has no index into the 2 ops"),
        ({**RECORD, "q": "1000 0:0"}, "query '1000:' has no index"),
        ({**RECORD, "ops": [7]}, r"'ops' is \[7\], not a list of strings"),
        ({**RECORD, "par": {"11.1": ["1"]}}, "QEMU 11.1 has 1 answers to 2 queries"),
        ({**RECORD, "par": {"11.1": "="}}, 'the answers of QEMU 11.1 are "=", not a list'),
        ({**RECORD, "par": {"11.1": ["1", [1]]}}, r"an answer of QEMU 11.1 is \[1\], not a hex number of 65 bits"),
        ({**RECORD, "after": {"11.1": 3}}, r"after\[11.1\] is 3, not a JSON object"),
        ({**ACCESS, "half": 2}, "'half' is 2, not 0 or 1"),
        ({**ACCESS, "acc": {"11.1": [0, ["1", "2"]]}}, r"is \[\"1\", \"2\"\], not 0, null or \[esr, far, hpfar\]"),
    ],
)
def test_a_bad_record_is_named_in_one_sentence(record: Any, says: str, tmp_path: Path) -> None:
    path = tmp_path / "bad"
    path.write_text(json.dumps(RECORD) + "\n" + (record if isinstance(record, str) else json.dumps(record)))
    with pytest.raises(CorpusError, match=says) as error:
        list(load(path))
    assert str(error.value).startswith(f"{path}, line 2: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: None, "cannot be read: No such file"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
        (lambda path: path.write_bytes(b""), "is empty, a corpus has one JSON object a line"),
        (lambda path: path.write_bytes(packed(RECORD)[:-40]), "cannot be read: .*before the end"),
        (lambda path: path.write_bytes(b"\xfd7zXZ\0" + b"?" * 99), "cannot be read: "),
        (lambda path: path.write_bytes(b"\x7fELF\xff\xfe"), "cannot be read: .*codec"),
    ],
    ids=["missing", "folder", "empty", "truncated", "broken", "binary"],
)
def test_a_file_that_is_no_corpus_is_named(make: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    make(path)
    with pytest.raises(CorpusError, match=says) as error:
        list(load(path))
    assert str(error.value).startswith(f"{path}: ")
