"""What a campaign consists of: identities and seeds that depend on nothing but the campaign, and its store."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from emu.campaigns.plan import CHUNK, COMPARISON, SEED_BITS, CampaignError, Found, Plan, Result, Row, Unit, dealt
from emu.campaigns.plan import case_seed as seed_of
from emu.campaigns.report import report_json, report_text
from emu.campaigns.store import Store

UNITS = [Unit(COMPARISON, "k", "6.12", name, "4K", world) for name in ("f", "g", "h") for world in ("plain", "ng")]


def plan(cases: int = 200, seed: int = 1, units: list[Unit] = UNITS) -> Plan:
    return Plan({"command": "fuzz", "seed": seed, "cases": cases}, seed, dealt(units, cases))


def rows(case_ids: list[str], **counts: int) -> list[Row]:
    made = {"judged": 1, "agree": 1, "known": 0, "differ": 0} | counts
    return [Row(case_id, **made, detail={"events": 2}) for case_id in case_ids]


@pytest.mark.parametrize("cases", [0, 1, 5, 6, 7, 200, 1001])
def test_chunks_have_every_case_once_and_no_unit_has_two_more_than_another(cases: int) -> None:
    ids = [case_id for chunk in plan(cases).chunks() for case_id in chunk.ids]
    assert len(ids) == len(set(ids)) == plan(cases).cases == cases
    shares = [sum(f" {unit.part} 4K {unit.variant} #" in case_id for case_id in ids) for unit in UNITS]
    assert max(shares) - min(shares) <= 1


def test_a_longer_campaign_has_the_cases_of_a_shorter_one_and_other_seeds_have_others() -> None:
    few = {case_id for chunk in plan(50).chunks() for case_id in chunk.ids}
    many = {case_id for chunk in plan(500).chunks() for case_id in chunk.ids}
    assert few < many
    seeds = {seed_of(seed, case_id) for seed in (1, 2) for case_id in many}
    assert len(seeds) == 2 * len(many)
    assert max(seeds) < 1 << SEED_BITS
    # printf '1 comparison k 6.12 f 4K plain #0' | sha256sum
    assert f"{seed_of(1, 'comparison k 6.12 f 4K plain #0'):012x}" == "96a704e0c90c"


def test_only_chunks_with_a_case_missing_are_handed_out_again() -> None:
    first, second, *_ = plan().chunks()
    rest = list(plan().chunks({*first.ids, *second.ids[1:]}))
    assert rest[0] == second
    assert first not in rest
    assert first.size == CHUNK[COMPARISON]


# the store


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "a.db"), plan())


def test_what_comes_twice_counts_once(store: Store) -> None:
    (chunk, *_) = plan().chunks()
    found = Found("s", chunk.ids[0], "text", "pgtable")
    for _ in range(3):
        store.add(chunk.unit, Result(rows(chunk.ids), [found]))
    report = report_json(store)
    assert (report["cases"], report["planned"], report["units"][0]["judged"]) == (chunk.size, 200, chunk.size)
    assert [(f["signature"], f["cases"]) for f in report["findings"]] == [("s", 1)]
    assert store.done() == set(chunk.ids)
    assert "verdict     1 findings, 175 cases are missing" in report_text(store)


def test_counts_that_do_not_add_up_are_not_taken_and_nothing_else_of_their_chunk_is(store: Store) -> None:
    (chunk, *_) = plan().chunks()
    wrong = rows(chunk.ids[:1]) + rows(chunk.ids[1:2], judged=3)
    with pytest.raises(CampaignError, match="CHECK constraint"):
        store.add(chunk.unit, Result(wrong, []))
    store.close()
    assert Store.open(str(store.path), plan()).done() == set()


def test_a_store_of_another_campaign_is_refused_with_the_parameter_that_differs(store: Store) -> None:
    store.close()
    before = store.path.read_bytes()
    for other, sentence in ((plan(seed=2), "seed 1, not 2"), (plan(cases=7), "cases 200, not 7")):
        with pytest.raises(CampaignError, match=f"a.db: holds a campaign with {sentence}: name another file"):
            Store.open(str(store.path), other)
    assert store.path.read_bytes() == before


def _text(path: Path) -> None:
    path.write_text("not a database, but somebody's notes")


def _other(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE cases (id TEXT)")
    database.close()


@pytest.mark.parametrize(
    ("make", "sentence"),
    [(_text, "file is not a database"), (_other, "holds no campaign"), (Path.mkdir, "disk I/O|unable to")],
)
def test_a_file_that_is_no_store_is_refused_and_left_alone(
    tmp_path: Path, make: Callable[[Path], Any], sentence: str
) -> None:
    path = tmp_path / "b.db"
    make(path)
    before = None if path.is_dir() else path.read_bytes()
    for asked in (plan(), None):
        with pytest.raises(CampaignError, match=sentence):
            Store.open(str(path), asked)
    assert before == (None if path.is_dir() else path.read_bytes())


def test_no_store_is_made_by_asking_for_a_report(tmp_path: Path) -> None:
    with pytest.raises(CampaignError, match="no such store"):
        Store.open(str(tmp_path / "c.db"))
    assert list(tmp_path.iterdir()) == []


def test_the_case_of_a_finding_is_a_file_beside_the_store(store: Store) -> None:
    (chunk, *_) = plan().chunks()
    found = [
        Found("a", chunk.ids[0], "", "pgtable check f --case {file}", "{}"),
        Found("b", chunk.ids[1], "", "pgtable fuzz {store} --case {case}"),
    ]
    store.add(chunk.unit, Result(rows(chunk.ids), found))
    first, second = report_json(store)["findings"]
    path = Path(first["replay"].split()[-1])
    assert (path.parent, path.read_text()) == (store.path.with_name("a.db.cases"), "{}")
    assert second["replay"] == f"pgtable fuzz {store.path} --case '{chunk.ids[1]}'"
