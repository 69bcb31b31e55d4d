"""A campaign's results in one SQLite file, written by the coordinator alone.

Rules of this file:
- A chunk's cases and findings are one transaction; a case that is in already is left as it is, so that a chunk that
  was run twice counts once. Nothing is ever changed or deleted.
- The file says what campaign it is of. Another one is refused before anything is written.
- Nothing in it depends on the order in which results came, nor on time: two runs of a campaign give equal tables.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from emu import writing
from emu.campaigns.plan import CampaignError, Found, Plan, Result, Unit

SCHEMA = (
    "CREATE TABLE campaign (parameters TEXT NOT NULL, planned INTEGER NOT NULL)",
    "CREATE TABLE cases (id TEXT PRIMARY KEY, work TEXT NOT NULL, subject TEXT NOT NULL, release TEXT NOT NULL,"
    " part TEXT NOT NULL, granule TEXT NOT NULL, variant TEXT NOT NULL, judged INTEGER NOT NULL,"
    " agree INTEGER NOT NULL, known INTEGER NOT NULL, differ INTEGER NOT NULL, detail TEXT NOT NULL,"
    " CHECK (judged = agree + known + differ)) WITHOUT ROWID",
    "CREATE TABLE findings (signature TEXT NOT NULL, id TEXT NOT NULL, text TEXT NOT NULL, replay TEXT NOT NULL,"
    " PRIMARY KEY (signature, id)) WITHOUT ROWID",
)
# Like INSERT OR IGNORE, which would leave out a row whose counts do not add up as well.
_CASE = "INSERT INTO cases VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING"
_FINDING = "INSERT INTO findings VALUES (?, ?, ?, ?) ON CONFLICT (signature, id) DO NOTHING"
WAIT = 60.0  # seconds that a reader or another coordinator may hold the file


class Store:
    """An open store. `path`: the file; cases that findings are replayed with go into the folder PATH.cases."""

    def __init__(self, path: Path, database: sqlite3.Connection) -> None:
        self.path, self._database = path, database

    @classmethod
    def open(cls, path: str, plan: Plan | None = None) -> Store:
        """The store of `plan`, made if it is not there; without a plan that of any campaign, to read.

        Raises CampaignError for what is no store, or one of another campaign.
        """
        file = Path(path)
        if plan is None and not file.exists():
            raise CampaignError(f"{path}: no such store")
        with _told(file):
            mode = "ro" if plan is None else "rwc"
            database = sqlite3.connect(f"{file.absolute().as_uri()}?mode={mode}", WAIT, isolation_level=None, uri=True)
            store = cls(file, database)
            try:
                store._check(plan)
            except BaseException:
                database.close()
                raise
        return store

    def _check(self, plan: Plan | None) -> None:
        names = {name for (name,) in self._database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if plan and not names:
            self._make(plan)
        elif not names >= {"campaign", "cases", "findings"}:
            raise CampaignError(f"{self.path}: holds no campaign")
        if plan and (other := _differing(self.parameters, plan.parameters)):
            name, theirs, ours = other
            raise CampaignError(f"{self.path}: holds a campaign with {name} {theirs}, not {ours}: name another file")

    def _make(self, plan: Plan) -> None:
        with self._transaction():
            for statement in SCHEMA:
                self._database.execute(statement)
            self._database.execute("INSERT INTO campaign VALUES (?, ?)", [json.dumps(plan.parameters), plan.cases])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            if self._database.in_transaction:  # SQLite has ended it where the disk is full
                self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    @property
    def parameters(self) -> dict[str, Any]:
        """What the campaign was asked for."""
        (text,) = self._database.execute("SELECT parameters FROM campaign").fetchone()
        found: dict[str, Any] = json.loads(text)
        return found

    @property
    def planned(self) -> int:
        """Cases that the campaign has when it is complete."""
        (count,) = self._database.execute("SELECT planned FROM campaign").fetchone()
        return int(count)

    def done(self) -> set[str]:
        """The identities of the cases that are in."""
        return {case_id for (case_id,) in self._database.execute("SELECT id FROM cases")}

    def unit(self, case_id: str) -> Unit:
        """The unit of a case that is in. Raises CampaignError for any other."""
        query = "SELECT work, subject, release, part, granule, variant FROM cases WHERE id = ?"
        row = self._database.execute(query, [case_id]).fetchone()
        if row is None:
            raise CampaignError(f"{self.path}: has no case {case_id!r}")
        return Unit(*row)

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        """What an SQL query gives."""
        return self._database.execute(query).fetchall()

    def add(self, unit: Unit, result: Result) -> None:
        """Puts a chunk's results in, all or none. Raises CampaignError where the disk takes no more."""
        with _told(self.path):
            rows = [(row.id, *unit, *row[1:5], json.dumps(row.detail, sort_keys=True)) for row in result.rows]
            findings = [(f.signature, f.case, f.text, self._replay(f)) for f in result.found]
            with self._transaction():
                self._database.executemany(_CASE, rows)
                self._database.executemany(_FINDING, findings)

    def _replay(self, found: Found) -> str:
        """The finding's command line, its file written."""
        if found.file:
            folder = self.path.with_name(f"{self.path.name}.cases")
            file = folder / f"{hashlib.sha256(found.file.encode()).hexdigest()[:16]}.json"
            folder.mkdir(exist_ok=True)
            writing.write(file, found.file)
            return found.replay.replace("{file}", shlex.quote(str(file)))
        return found.replay.replace("{store}", shlex.quote(str(self.path))).replace("{case}", shlex.quote(found.case))

    def close(self) -> None:
        """Closes the file."""
        self._database.close()


def _differing(theirs: dict[str, Any], ours: dict[str, Any]) -> tuple[str, str, str] | None:
    """The first parameter that differs, and its values."""
    for name in ours | theirs:
        if theirs.get(name) != ours.get(name):
            return name, json.dumps(theirs.get(name)), json.dumps(ours.get(name))
    return None


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """What SQLite and the file system refuse becomes one sentence."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise CampaignError(f"{path}: {error}") from None
