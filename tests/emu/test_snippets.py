"""emu.snippets: source, words and listing agree, and each does what its first comment says."""

from __future__ import annotations

import shutil

import pytest

from emu import snippets
from emu.check import SnippetSubject, linear_pages, main_job, run_case
from emu.machine import Machine
from emu.snippets import ASSEMBLER, SnippetError
from pgtable.registers import PAR_FAULT, PAR_OK

NAMES = snippets.names()
EINVAL = -22


def code(name: str) -> bytes:
    return bytes(snippets.load(name))


@pytest.fixture
def m() -> Machine:
    return Machine.bare()


# files


def test_these_snippets_come_with_the_package() -> None:
    assert NAMES == [
        "at",
        "fetch",
        "load",
        "misaligned",
        "recorder",
        "set_memory_valid",
        "sleeper",
        "store",
        "svc",
        "toggle_valid",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_listing_is_what_capstone_makes_of_the_words(name: str) -> None:
    snippet = snippets.load(name)
    recorded = snippets.resources.files(snippets).joinpath(f"{name}.lst").read_text()
    assert snippet.listing() == recorded
    assert b"".join(w.to_bytes(4, "little") for w in snippet.words) == bytes(snippet)


@pytest.mark.skipif(not shutil.which(ASSEMBLER), reason=f"no {ASSEMBLER}: apt install binutils-aarch64-linux-gnu")
@pytest.mark.parametrize("name", NAMES)
def test_the_source_assembles_to_the_words(name: str) -> None:
    snippet = snippets.load(name)
    assert snippets.assemble(snippet.source, name).words == snippet.words


def test_a_name_that_is_not_there_lists_those_that_are() -> None:
    with pytest.raises(SnippetError, match="snippet laod: there is none, only at, fetch, load"):
        snippets.load("laod")


@pytest.mark.skipif(not shutil.which(ASSEMBLER), reason=f"no {ASSEMBLER}: apt install binutils-aarch64-linux-gnu")
def test_a_source_that_is_wrong_is_told_in_the_assemblers_words() -> None:
    with pytest.raises(SnippetError, match=r"mine: .*unknown mnemonic `lod'"):
        snippets.assemble("lod x0, [x0]\n", "mine")


def test_without_an_assembler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(SnippetError, match=f"no {ASSEMBLER} on PATH: install the Debian package binutils"):
        snippets.assemble("nop\n")


# what they do


@pytest.mark.parametrize("el", [0, 1])
def test_load_and_store(m: Machine, el: int) -> None:
    va = m.plan.spare if el else m.plan.user_data
    m.run(code("store"), va, 0x1122334455667788, el=el).ok()
    assert m.run(code("load"), va, el=el).ok().value == 0x1122334455667788


def test_fetch_calls_and_comes_back(m: Machine) -> None:
    m.tables.protect(m.plan.spare & -m.plan.page_size, m.plan.page_size, PXN=0)
    m.write(m.plan.spare, b"".join(word.to_bytes(4, "little") for word in (0xD28000E0, 0xD65F03C0)))
    assert m.run(code("fetch"), m.plan.spare).ok().value == 7


def test_misaligned_reads_over_a_page_border(m: Machine) -> None:
    va = m.plan.spare + m.plan.page_size - 8
    m.write(va + 4, bytes(range(8)))
    assert m.run(code("misaligned"), va).ok().value == 0x0706050403020100


def test_at_gives_par_for_el1_reads_and_el0_writes(m: Machine) -> None:
    result = m.run(code("at"), m.plan.spare).ok()
    assert PAR_OK["PA"].get(result.value) == m.translate(m.plan.spare).pa
    assert PAR_FAULT.view(result.x[1]).F == 1
    both = m.run(code("at"), m.plan.user_data).ok()
    assert both.value == both.x[1]


def test_svc_leaves_el0(m: Machine) -> None:
    stop = m.run(code("svc"), el=0).stop
    assert stop
    assert (stop.kind, stop.message) == ("exception", "svc #0x2a")


@pytest.mark.parametrize("times", [0, 1, 2, 7])
def test_toggle_valid_flips_bit_0_each_time_with_tlb_maintenance(m: Machine, times: int) -> None:
    slot = m.tables.slot(m.plan.spare)
    result = m.run(code("toggle_valid"), m.plan.linear_va(slot.pa), times, m.plan.spare, record="order").ok()
    assert len(result.maintenance) == times
    assert {t.va for t in result.maintenance} <= {m.plan.spare}
    assert result.barriers == ("dsb ishst", "dsb ish", "isb") * times
    assert [c.fields for c in result.changes] == ([{"VALID": (1, 0)}] if times % 2 else [])
    assert bool(m.run(code("load"), m.plan.spare).stop) == bool(times % 2)


# the stand-in for a kernel


@pytest.mark.parametrize("pages", [1, 2, 511, 512, 513, 1024])
def test_its_set_memory_valid_does_what_the_model_says_6_1_does(pages: int) -> None:
    for report in main_job(SnippetSubject(), pages):
        assert [str(d) for d in report.differences] == []
        assert len(report.result.maintenance) == (pages if pages <= 512 else 1)
        assert len(report.result.changes) == pages


def test_its_set_memory_valid_is_compared_in_order() -> None:
    report = run_case(SnippetSubject(), linear_pages(3, 1))
    assert [str(e) for e in report.real.order][1:3] == ["dsb ishst", "isb"]
    assert report.predicted.order == report.real.order


def test_its_set_memory_valid_crosses_a_table_and_refuses_what_is_no_page(m: Machine) -> None:
    valid = code("set_memory_valid")
    va = m.plan.linear_va(m.plan.ram[0] + (2 << 20)) - 2 * 4096
    crossed = m.run(valid, va, 4, 0).ok()
    assert (crossed.signed, [c.va for c in crossed.changes]) == (0, [va + i * 4096 for i in range(4)])
    assert m.run(valid, va, 4, 1).ok().changes.new.tolist() == crossed.changes.old.tolist()

    block = m.plan.linear + (1 << 40)
    m.tables.map(block, 2 << 20, 2 << 20, level=2, AF=1)
    for numpages, address in ((0, va), (-1, va), (1, block), (1, block + (1 << 30))):
        result = m.run(valid, address, numpages, 0).ok()
        assert (result.signed, len(result.changes)) == (EINVAL, 0)
