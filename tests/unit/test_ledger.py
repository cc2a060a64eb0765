from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import tempfile
import traceback
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import alembic.command
import psutil
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from hypothesis import given, settings, strategies as st

from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    ConnectionConfigError,
    LedgerUnavailableError,
    PromotionConflictError,
    StorageError,
)
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry, database
from airflow_mlops.ledger.tables import metadata

START = datetime(2024, 1, 1, tzinfo=UTC)


def window(index: int) -> Window:
    return Window(start=START + timedelta(days=index), end=START + timedelta(days=index + 1))


def entry(kind: EntryKind, key: str, *, index: int | None = None, **payload: object) -> LedgerEntry:
    return LedgerEntry(
        kind=kind,
        key=key,
        model_name="m",
        window=window(index) if index is not None else None,
        subject=None,
        summary=f"{kind} {key}",
        payload=payload,
        actor="dag/run/task",
        recorded_at=START,
    )


def check(index: int, kind: EntryKind = EntryKind.PERFORMANCE_CHECK) -> LedgerEntry:
    return entry(kind, f"m|{window(index).key}", index=index, row_count=1)


def decision(index: int, outcome: str = "nothing") -> LedgerEntry:
    return entry(EntryKind.RETRAINING_DECISION, f"m|{window(index).key}", index=index, outcome=outcome)


def move(
    ledger: Ledger,
    version: str,
    expected: str | None,
    *,
    alias: str = "champion",
    actor: str = "dag/run/task",
    days: int = 0,
    request: str | None = None,
) -> bool:
    promotion = entry(
        EntryKind.PROMOTION, f"m|{alias}|{expected}|{version}", alias=alias, model_version=version
    )
    recorded = ledger.move_alias(
        model_name="m",
        alias=alias,
        model_version=version,
        expected_version=expected,
        entry=replace(promotion, actor=actor, recorded_at=START + timedelta(days=days)),
        request=request,
    )
    return recorded.created


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'ledger.db'}"


def test_the_same_key_is_written_once(url: str) -> None:
    with Ledger.open(url) as ledger:
        first = ledger.record(entry(EntryKind.DATASET, "a", value=float("nan")))
        second = ledger.record(entry(EntryKind.DATASET, "a", value=2))
        assert (first.created, second.created) == (True, False)
        assert second.entry == first.entry
        assert first.entry.payload == {"value": None}
        assert first.entry.recorded_at == START


def test_a_request_is_carried_out_once(url: str) -> None:
    """1, then 2 by a request, back to 1, and the request again."""
    with Ledger.open(url) as ledger:
        move(ledger, "1", None)
        assert [move(ledger, "2", "1", request="r") for _ in range(2)] == [True, False]
        move(ledger, "1", "2", actor="anna")
        with pytest.raises(
            PromotionConflictError, match=r"anna moved it on to version 1 .* a move is not repeated"
        ):
            move(ledger, "2", "1", request="r")
        assert ledger.aliases("m") == {"champion": "1"}
        assert move(ledger, "2", "1", request="another")


def test_entries_narrow_and_order(url: str) -> None:
    with Ledger.open(url) as ledger:
        ledger.record_all([check(0), check(1), decision(0)])
        assert [item.kind for item in ledger.entries(model_name="m")] == [
            EntryKind.RETRAINING_DECISION,
            EntryKind.PERFORMANCE_CHECK,
            EntryKind.PERFORMANCE_CHECK,
        ]
        assert [item.window for item in ledger.entries(window=window(1))] == [window(1)]
        assert ledger.entries(model_name="other") == []


def test_a_window_is_ripe_when_all_its_checks_are_there(url: str) -> None:
    both = (EntryKind.PERFORMANCE_CHECK, EntryKind.DRIFT_CHECK)
    with Ledger.open(url) as ledger:
        ledger.record_all([check(1), check(0), check(0, EntryKind.DRIFT_CHECK)])
        assert ledger.undecided_windows("m") == [window(0), window(1)]
        assert ledger.undecided_windows("m", required=both) == [window(0)]
        ledger.record(decision(0))
        assert ledger.undecided_windows("m") == [window(1)]


def test_a_window_is_overdue_by_its_first_check(url: str) -> None:
    with Ledger.open(url) as ledger:
        ledger.record_all(
            [check(0, EntryKind.DRIFT_CHECK), replace(check(1), recorded_at=START + timedelta(days=9))]
        )
        both = (EntryKind.PERFORMANCE_CHECK, EntryKind.DRIFT_CHECK)
        for required in (both, both[:1]):
            listed = ledger.undecided_windows("m", required=required, overdue_since=START + timedelta(days=5))
            assert listed[0] == window(0)
        assert ledger.undecided_windows("m", required=both, overdue_since=START - timedelta(days=1)) == []


def test_the_grade_that_stands_is_the_newest_that_measured(url: str) -> None:
    key = f"m|{window(0).key}"
    short = replace(
        check(0), key=f"{key}|12", payload={"measured": False, "awaits_labels": True, "final": False}
    )
    first = replace(check(0), payload={"measured": True, "final": False, "value": 1})
    second = replace(first, key=f"{key}|90", payload={"measured": True, "final": True, "value": 2})
    settled = replace(check(1), payload={"measured": False, "awaits_labels": False})
    before = window(9).start
    with Ledger.open(url) as ledger:
        ledger.record_all([short, replace(settled, recorded_at=START + timedelta(days=1))])
        assert [grade.measured for grade in ledger.grades("m")] == [False, False]
        assert ledger.unfinished_windows("m", before=before) == [window(0)]
        ledger.record(replace(first, recorded_at=START + timedelta(days=2)))
        ledger.record(decision(0))
        assert ledger.unfinished_windows("m", before=before) == [window(0)]  # though it is decided
        ledger.record(replace(second, recorded_at=START + timedelta(days=3)))
        (grade,) = ledger.grades("m", window=window(0))
        assert (grade.entry.payload["value"], grade.final, grade.first_checked_at) == (2, True, START)
        assert ledger.unfinished_windows("m", before=before) == []
        assert [found.window for found in ledger.grades("m", limit=1)] == [window(1)]
        assert [found.window for found in ledger.grades("m", before=window(1).start)] == [window(0)]


def test_a_grade_held_against_one_that_stands_no_more_is_not_written(url: str) -> None:
    first = replace(check(0), payload={"measured": True, "final": False})
    late, stale = (replace(first, key=f"{first.key}|{count} labelled") for count in (100, 80))
    with Ledger.open(url) as ledger:
        short = replace(first, key=f"{first.key}|0 labelled", payload={"measured": False})
        assert ledger.record_grade(short, standing=None)
        assert ledger.record_grade(first, standing=None)
        (standing,) = ledger.grades("m")
        assert ledger.record_grade(stale, standing=None) is None
        recorded = ledger.record_grade(late, standing=standing.entry)
        assert recorded is not None
        assert ledger.record_grade(stale, standing=standing.entry) is None
        again = ledger.record_grade(late, standing=recorded.entry)
        assert again is not None
        assert not again.created
        assert [grade.entry.key for grade in ledger.grades("m")] == [late.key]
        assert len(ledger.entries(kind=EntryKind.PERFORMANCE_CHECK)) == 3


def test_every_window_that_awaits_labels_is_listed_however_many_there_are(url: str) -> None:
    grades = [replace(check(index), payload={"measured": True, "final": False}) for index in range(100)]
    grades += [
        replace(check(0), key="m|last", payload={"measured": True, "final": True}),
        replace(check(1), key="m|short", payload={"measured": False, "awaits_labels": True, "final": False}),
        replace(check(2), key="m|old", payload={"measured": True}),  # of an earlier release, and all is said
    ]
    before = window(100).start
    with Ledger.open(url) as ledger:
        ledger.record_all(grades)
        late = ledger.unfinished_grades("m", before=before)
        assert [grade.window for grade in late] == [window(1), *(window(index) for index in range(3, 100))]
        assert late[0].entry.key == check(1).key, "what was measured stands"
        assert ledger.unfinished_windows("m", before=before) == [grade.window for grade in late]
        assert [one.window for one in ledger.unfinished_grades("m", before=window(5).start)] == [
            window(1),
            window(3),
            window(4),
        ]
        ledger.record(
            replace(
                check(100), payload={"measured": True, "final": False}, recorded_at=START + timedelta(days=1)
            )
        )
        (young,) = ledger.unfinished_grades("m", before=window(101).start, checked_after=START)
        assert young.window == window(100)


def test_of_a_window_that_was_looked_at_often_one_check_of_each_kind_is_read(url: str) -> None:
    looks = [
        replace(
            check(0),
            key=f"m|look {number}",
            payload={"measured": number == 3, "number": number},
            recorded_at=START + timedelta(hours=number),
        )
        for number in range(150)
    ]
    drift = replace(check(0, EntryKind.DRIFT_CHECK), recorded_at=START + timedelta(days=-1))
    with Ledger.open(url) as ledger:
        ledger.record_all([drift, *looks, check(1)])
        kinds = (EntryKind.PERFORMANCE_CHECK, EntryKind.DRIFT_CHECK)
        found = ledger.checks_of("m", [window(0), window(7)], kinds)
        assert list(found) == [window(0)]
        assert {one.kind: one.payload.get("number") for one in found[window(0)].checks} == {
            EntryKind.PERFORMANCE_CHECK: 3,
            EntryKind.DRIFT_CHECK: None,
        }
        assert found[window(0)].first_checked_at == drift.recorded_at
        assert ledger.checked_windows("m", kinds, limit=1) == [window(1)]
        assert ledger.checked_windows("m", kinds, ended_by=window(0).end, limit=9) == [window(0)]
        assert ledger.checked_windows("m", kinds, decided_from=window(0).end, limit=9) == []
        ledger.record_all([decision(0), decision(1)])
        assert ledger.checked_windows("m", kinds, decided_from=window(0).end, limit=9) == [window(1)]


def test_a_window_is_ungraded_until_it_is_measured_or_decided(url: str) -> None:
    short = check(0)
    short = replace(short, key=f"{short.key}|12", payload={"measured": False, "awaits_labels": True})
    settled = replace(check(1), payload={"measured": False, "awaits_labels": False})
    with Ledger.open(url) as ledger:
        ledger.record_all([short, settled, check(2, EntryKind.DRIFT_CHECK)])
        assert ledger.ungraded_windows("m", before=window(9).start) == [window(0), window(2)]
        assert ledger.ungraded_windows("m", before=window(1).start) == [window(0)]
        ledger.record_all([replace(check(0), payload={"measured": True}), decision(2)])
        assert ledger.ungraded_windows("m", before=window(9).start) == []


@pytest.mark.parametrize("key", ["None", f"m|{window(0).key}"])
def test_an_outcome_of_no_decision_is_refused(url: str, key: str) -> None:
    with Ledger.open(url) as ledger:
        outcome = replace(entry(EntryKind.RETRAINING_OUTCOME, key), model_name="other")
        ledger.record(decision(0, "retrain"))
        with pytest.raises(ValueError, match=r"names no retraining decision of other: pass the decision_key"):
            ledger.record(outcome)
        assert ledger.entries(kind=EntryKind.RETRAINING_OUTCOME) == []


def test_a_promotion_is_found_by_its_decision(url: str) -> None:
    with Ledger.open(url) as ledger:
        decided = ledger.record(decision(0, "retrain")).entry
        assert ledger.promotion_for(decided) is None
        move(ledger, "1", None)
        promoted = entry(EntryKind.PROMOTION, "p", decision_key=decided.key)
        ledger.record(promoted)
        found = ledger.promotion_for(decided)
        assert found is not None
        assert found.key == "p"


def test_a_retraining_is_open_until_its_outcome(url: str) -> None:
    with Ledger.open(url) as ledger:
        decided = ledger.record(decision(0, "retrain")).entry
        assert ledger.open_retraining("m") == decided
        ledger.record(entry(EntryKind.RETRAINING_OUTCOME, decided.key, outcome="promoted"))
        assert ledger.open_retraining("m") is None


def test_a_retraining_stays_open_however_many_decisions_follow(url: str) -> None:
    with Ledger.open(url) as ledger:
        decided = ledger.record(decision(0, "retrain")).entry
        ledger.record_all([decision(index) for index in range(1, 150)])
        assert ledger.open_retraining("m") == decided


def test_a_newer_retraining_covers_the_older_one(url: str) -> None:
    with Ledger.open(url) as ledger:
        newest = ledger.record_all([decision(0, "retrain"), decision(1, "retrain")])[-1].entry
        assert ledger.open_retraining("m") == newest
        ledger.record(entry(EntryKind.RETRAINING_OUTCOME, newest.key, outcome="promoted"))
        assert ledger.open_retraining("m") is None


def test_entries_are_only_ever_appended() -> None:
    """Nothing in the ledger's code updates or deletes an entry; only alias pointers move."""
    code = "".join(file.read_text() for file in Path(database.__file__).parent.glob("*.py"))
    assert "entries.insert()" in code
    assert "aliases.update()" in code
    for forbidden in ("entries.update(", "entries.delete(", "sa.delete(", "sa.update("):
        assert forbidden not in code


def test_all_or_none_of_several_entries_are_written(url: str) -> None:
    with Ledger.open(url) as ledger:
        with pytest.raises(ValueError, match=r"key of the dataset entry 'k+ has 501 characters"):
            ledger.record_all([check(0), entry(EntryKind.DATASET, "k" * 501)])
        assert ledger.entries() == []


def test_a_payload_that_is_not_json_is_refused(url: str) -> None:
    with Ledger.open(url) as ledger:
        with pytest.raises(ValueError, match="not JSON serializable"):
            ledger.record(entry(EntryKind.DATASET, "a", value=object()))
        assert ledger.entries() == []


def test_an_alias_moves_by_compare_and_set(url: str) -> None:
    with Ledger.open(url) as ledger:
        assert move(ledger, "1", None)
        assert not move(ledger, "1", None)  # a retry is no second promotion
        assert move(ledger, "2", "1")
        move(ledger, "3", "2", actor="a/b/c")
        with pytest.raises(PromotionConflictError, match=r"a/b/c moved it to version 3"):
            move(ledger, "4", "2")
        assert ledger.aliases("m") == {"champion": "3"}
        assert move(ledger, "2", "3")  # back and forth are four entries, not one
        assert move(ledger, "3", "2")
        assert len(ledger.entries(kind=EntryKind.PROMOTION)) == 5


def test_the_champion_of_a_day(url: str) -> None:
    with Ledger.open(url) as ledger:
        move(ledger, "1", None)
        move(ledger, "2", "1", days=3)
        move(ledger, "9", None, alias="challenger", days=4)
        assert ledger.champion_at("m", START - timedelta(seconds=1)) is None
        assert ledger.champion_at("m", START) == "1"
        assert ledger.champion_at("m", START + timedelta(days=2)) == "1"
        assert ledger.champion_at("m", START + timedelta(days=9)) == "2"
        assert ledger.champion_at("m", START + timedelta(days=9), alias="challenger") == "9"


RACE = """
import sys
from tests.unit.test_ledger import Ledger, move
from airflow_mlops.exceptions import PromotionConflictError
url, expected, version = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
with Ledger.open(url) as ledger:
    try:
        move(ledger, version, expected or None, actor="promoter-" + version)
        print("won")
    except PromotionConflictError as err:
        print(err)
"""


def race(url: str, code: str, arguments: list[tuple[str, ...]]) -> list[str]:
    """Run a program once per tuple of arguments, let all go at the same moment, give what each said."""
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", code, url, *given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for given in arguments
    ]
    try:
        for racer in racers:
            assert racer.stdout is not None
            assert racer.stdout.readline() == "ready\n"
        for racer in racers:
            assert racer.stdin is not None
            racer.stdin.write("go\n")
            racer.stdin.flush()
        said = [racer.communicate(timeout=60)[0].strip() for racer in racers]
        assert [racer.returncode for racer in racers] == [0] * len(racers)
        return said
    finally:
        for racer in racers:
            racer.kill()
            racer.wait()


#: Opens the studies as a search does, whose name is given.
SEARCH = """
import sys

import optuna

from airflow_mlops.steps.training.fit import studies_storage

print("ready", flush=True)
sys.stdin.readline()
study = optuna.create_study(study_name=sys.argv[2], storage=studies_storage(sys.argv[1]))
study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
print(len(study.trials))
"""


def searches_at_once(url: str) -> None:
    assert race(url, SEARCH, [("a",), ("b",), ("c",), ("d",)]) == ["2"] * 4


def promotion_race(url: str, expected: str | None) -> None:
    said = race(url, RACE, [(expected or "", "2"), (expected or "", "3")])
    assert said.count("won") == 1
    winner = ("2", "3")[said.index("won")]
    loser = next(text for text in said if text != "won")
    assert f"promoter-{winner} moved it to version {winner}" in loser
    with Ledger.open(url) as ledger:
        assert ledger.aliases("m") == {"champion": winner}
        assert len(ledger.entries(kind=EntryKind.PROMOTION)) == (2 if expected else 1)


def test_of_two_racing_promotions_one_wins(url: str) -> None:
    with Ledger.open(url) as ledger:
        move(ledger, "1", None)
    promotion_race(url, "1")


def test_of_two_racing_first_promotions_one_wins(url: str) -> None:
    promotion_race(url, None)


OPEN = """
import sys
from airflow_mlops.ledger import Ledger
import alembic.command  # so that all are as fast as each other
print("ready", flush=True)
sys.stdin.readline()
Ledger.open(sys.argv[1]).close()
"""


def test_many_processes_may_open_an_empty_file_at_once(url: str) -> None:
    race(url, OPEN, [()] * 8)
    with Ledger.open(url) as ledger:
        assert ledger.record(check(0)).created


def test_searches_that_begin_at_once_find_a_place_for_their_trials(url: str) -> None:
    searches_at_once(url)


OPEN_MANY = """
import sys
from airflow_mlops.ledger import Ledger
import alembic.command
print("ready", flush=True)
for line in sys.stdin:
    Ledger.open(line.strip()).close()
    print("opened", flush=True)
"""


def test_two_processes_that_open_a_new_file_wait_for_each_other(tmp_path: Path) -> None:
    """Both switch it to WAL: unless somebody waits, one in four of these rounds fails."""
    openers = [
        subprocess.Popen(
            [sys.executable, "-c", OPEN_MANY], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    try:
        assert [opener.stdout.readline() for opener in openers if opener.stdout] == ["ready\n"] * 2
        for number in range(30):
            for opener in openers:
                assert opener.stdin is not None
                opener.stdin.write(f"sqlite:///{tmp_path}/{number}.db\n")
                opener.stdin.flush()
            assert [opener.stdout.readline() for opener in openers if opener.stdout] == ["opened\n"] * 2
    finally:
        for opener in openers:
            opener.kill()
            opener.communicate()


def test_readers_do_not_wait_for_a_writer(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_BUSY_SECONDS", 0.2)
    with Ledger.open(url) as ledger:
        ledger.record(check(0))
        writer = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
        writer.execute("BEGIN IMMEDIATE")
        try:
            assert len(ledger.entries()) == 1
            with Ledger.open(url) as another:
                assert another.undecided_windows("m") == [window(0)]
            with pytest.raises(
                LedgerUnavailableError, match=r"ledger\.db does not answer: database is locked"
            ):
                ledger.record(check(1))
        finally:
            writer.close()
        assert ledger.record(check(1)).created


def test_the_schema_the_code_knows_is_the_newest_one_shipped() -> None:
    config = Config()
    config.set_main_option("script_location", str(database.MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_heads() == [database.HEAD]


def upgrade_to(connection: sa.Connection, revision: str) -> None:
    """Bring a database to an older schema, as an older release did."""
    config = Config()
    config.set_main_option("script_location", str(database.MIGRATIONS))
    config.attributes["connection"] = connection
    alembic.command.upgrade(config, revision)


def about(subject: str, number: int, kind: EntryKind = EntryKind.VALIDATION) -> LedgerEntry:
    return replace(entry(kind, f"{kind}|{subject}|{number}"), model_name=None, subject=subject)


def fill(ledger: Ledger) -> None:
    """Entries about twenty tables, as many of another kind."""
    kinds = (EntryKind.VALIDATION, EntryKind.DATASET)
    ledger.record_all([about(f"t{one % 20}", one, kind) for one in range(400) for kind in kinds])


def plan(ledger: Ledger, explain: str) -> str:
    """How the database finds a table's newest verdicts, by the very query the ledger asks."""
    asked: list[tuple[str, Any]] = []

    @sa.event.listens_for(ledger._engine, "before_cursor_execute")
    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    found = ledger.entries(kind=EntryKind.VALIDATION, subject="t7", limit=10)
    assert [item.key for item in found] == [f"validation|t7|{one}" for one in range(387, 187, -20)]
    statement, parameters = next(item for item in asked if "subject" in item[0])
    with ledger._engine.connect() as connection:
        rows = connection.exec_driver_sql(f"{explain} {statement}", parameters)
        return "\n".join(str(row[-1]) for row in rows)


def test_an_older_ledger_is_brought_up_to_date(url: str) -> None:
    engine = database.make_engine(url)
    with engine.begin() as connection:
        upgrade_to(connection, "0001")
    with Ledger(engine) as old:
        fill(old)
        before, told = old.entries(limit=1000), plan(old, "EXPLAIN QUERY PLAN")
        assert "mlops_ledger_entries_subject" not in told
    with Ledger.open(url) as ledger:
        assert ledger.entries(limit=1000) == before
        told = plan(ledger, "EXPLAIN QUERY PLAN")
        assert "USING INDEX mlops_ledger_entries_subject (subject=? AND kind=?)" in told
        assert "TEMP B-TREE" not in told  # nothing is sorted
        assert ledger.record(about("t7", 1000)).created
        with ledger._engine.connect() as connection:
            known = MigrationContext.configure(connection, opts={"version_table": "mlops_alembic_version"})
            assert compare_metadata(known, metadata) == []


def test_a_schema_of_a_newer_release_is_said(url: str, tmp_path: Path) -> None:
    Ledger.open(url).close()
    with sqlite3.connect(tmp_path / "ledger.db") as database:
        database.execute("UPDATE mlops_alembic_version SET version_num = '0099'")
    database.close()
    with pytest.raises(ConnectionConfigError, match=r"has schema 0099.*upgrade airflow-mlops"):
        Ledger.open(url)
    still_open = [file.path for file in psutil.Process().open_files()]
    assert str(tmp_path / "ledger.db") not in still_open


def test_the_ledger_shares_a_database_with_others(url: str, tmp_path: Path) -> None:
    """Airflow keeps its own migrations in ``alembic_version``."""
    with sqlite3.connect(tmp_path / "ledger.db") as database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        database.execute("INSERT INTO alembic_version VALUES ('theirs')")
    with Ledger.open(url) as ledger:
        assert ledger.record(check(0)).created
    assert database.execute("SELECT version_num FROM alembic_version").fetchall() == [("theirs",)]
    database.close()


def test_a_folder_may_have_any_name(tmp_path: Path) -> None:
    """Alembic reads its configuration with ``%`` as a special character, SQLAlchemy URLs have theirs."""
    with Ledger.open(f"sqlite:///{tmp_path}/50% off, naïve/ledger.db") as ledger:
        assert ledger.record(check(0)).created


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["check", "wake"]), st.integers(0, 5)), max_size=25))
def test_whatever_the_order_of_wake_ups_every_window_is_decided_once(history: list[tuple[str, int]]) -> None:
    """Checks arrive in any order; deciders wake too often, too late or not at all, until the clock wakes one."""
    with tempfile.TemporaryDirectory() as folder, Ledger.open(f"sqlite:///{folder}/ledger.db") as ledger:
        for what, index in [*history, ("wake", 0)]:
            if what == "check":
                ledger.record(check(index))
            else:
                ledger.record_all(
                    [decision((item.start - START).days) for item in ledger.undecided_windows("m")]
                )
        checked = {item.window for item in ledger.entries(kind=EntryKind.PERFORMANCE_CHECK)}
        decided = [item.window for item in ledger.entries(kind=EntryKind.RETRAINING_DECISION)]
        assert len(decided) == len(set(decided))
        assert set(decided) == checked


@pytest.mark.parametrize("text", ["no url at all: s3cret", "postgresql://me:pw@host:s3cret/name"])
def test_a_url_that_is_none_is_said_without_its_password(text: str) -> None:
    with pytest.raises(ConnectionConfigError, match="not a SQLAlchemy URL") as caught:
        Ledger.open(text)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_a_driver_that_is_missing_is_named() -> None:
    with pytest.raises(ConnectionConfigError, match=r"no driver for 'nosuchdatabase'.*sqlite"):
        Ledger.open("nosuchdatabase://host/name")
    with pytest.raises(ConnectionConfigError, match=r"nosuchdriver.*pip install psycopg2-binary") as caught:
        Ledger.open("postgresql+nosuchdriver://me:s3cret@host/name")
    assert "s3cret" not in str(caught.value)


def test_a_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"ledger\.db can't be written"):
        Ledger.open(f"sqlite:///{tmp_path}/file/ledger.db")


def test_a_file_that_is_no_database_is_said(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_text(json.dumps(["not", "a", "database"] * 100))
    with pytest.raises(StorageError, match=r"ledger\.db can't be used: file is not a database"):
        Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")


def test_a_change_counts_once_its_model_is_promoted_until_it_is_undone(url: str) -> None:
    first, third = window(1).start, window(3).start
    decided: list[dict[str, Any]] = [
        {"training": {"change": first.isoformat()}},
        {"training": {"change": None}},
        {"training": {"change": third.isoformat()}},
        {"undoes_since": window(2).start.isoformat()},  # knows nothing of the third
        {"training": {"change": third.isoformat()}},
        {"undoes_since": window(0).start.isoformat()},  # knows of none
    ]
    known = []
    with Ledger.open(url) as ledger:
        for index, about in enumerate(decided, start=1):
            key, before = f"d{index}", ledger.world_since("m")
            outcome = "retrain" if "training" in about else "bring_back"
            ledger.record(entry(EntryKind.RETRAINING_DECISION, key, index=index, outcome=outcome, **about))
            assert ledger.world_since("m") == before
            promoted = {"alias": "champion", "model_version": str(index), "decision_key": key}
            ledger.record(entry(EntryKind.PROMOTION, f"p{index}", **promoted))
            known.append(ledger.world_since("m"))
    assert known == [first, first, third, first, third, None]


def test_a_change_is_known_however_many_decisions_came_after_it(url: str) -> None:
    with Ledger.open(url) as ledger:
        change = {"change": window(0).start.isoformat()}
        for index in range(130):
            training = change if index == 0 else {"change": None}
            ledger.record(
                entry(
                    EntryKind.RETRAINING_DECISION,
                    f"d{index}",
                    index=index,
                    outcome="retrain",
                    training=training,
                )
            )
        promoted = {"alias": "champion", "model_version": "1", "decision_key": "d0"}
        ledger.record(entry(EntryKind.PROMOTION, "p0", **promoted))
        assert ledger.world_since("m") == window(0).start


def test_grades_are_found_behind_many_windows_that_wait(url: str) -> None:
    """What an estimate was worth is known from them, however late labels are."""
    with Ledger.open(url) as ledger:
        for index in range(100):
            waits = {"measured": False, "awaits_labels": True, "final": False}
            ledger.record(entry(EntryKind.PERFORMANCE_CHECK, f"w{index}", index=index, **waits))
            if index < 20:
                ledger.record(entry(EntryKind.PERFORMANCE_CHECK, f"g{index}", index=index, measured=True))
        assert not any(grade.measured for grade in ledger.grades("m"))
        found = ledger.grades("m", measured=True, limit=15)
        assert [grade.window for grade in found] == [window(index) for index in range(5, 20)]
        assert {grade.entry.key for grade in found} == {f"g{index}" for index in range(5, 20)}


def test_a_change_whose_model_was_rolled_back_did_not_last(url: str) -> None:
    with Ledger.open(url) as ledger:
        move(ledger, "1", None)
        for version, index in (("2", 1), ("3", 2)):
            change = {"change": window(index).start.isoformat()}
            ledger.record(
                entry(
                    EntryKind.RETRAINING_DECISION,
                    f"d{version}",
                    index=index,
                    outcome="retrain",
                    training=change,
                )
            )
            ledger.record(
                entry(
                    EntryKind.PROMOTION,
                    f"p{version}",
                    decision_key=f"d{version}",
                    alias="champion",
                    model_version=version,
                )
            )
        assert ledger.world_since("m") == window(2).start
        for target, since in (("2", window(1).start), ("1", None)):
            ledger.record(
                entry(EntryKind.ROLLBACK, f"back to {target}", alias="champion", model_version=target)
            )
            assert ledger.world_since("m") == since
            assert [one.payload["model_version"] for one in ledger.standing_moves("m")][-1] == target
