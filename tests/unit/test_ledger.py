from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    ConnectionConfigError,
    LedgerUnavailableError,
    PromotionConflictError,
    StorageError,
)
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry

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


def move(ledger: Ledger, version: str, expected: str | None, actor: str = "dag/run/task") -> bool:
    promotion = entry(
        EntryKind.PROMOTION, f"m|champion|{expected}|{version}", alias="champion", model_version=version
    )
    recorded = ledger.move_alias(
        model_name="m",
        alias="champion",
        model_version=version,
        expected_version=expected,
        entry=LedgerEntry(
            **{name: getattr(promotion, name) for name in promotion.__slots__} | {"actor": actor}
        ),
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


def test_a_retraining_is_open_until_its_outcome(url: str) -> None:
    with Ledger.open(url) as ledger:
        decided = ledger.record(decision(0, "retrain")).entry
        assert ledger.open_retraining("m") == decided
        ledger.record(entry(EntryKind.RETRAINING_OUTCOME, decided.key, outcome="promoted"))
        assert ledger.open_retraining("m") is None


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
        assert ledger.champion_at("m", START - timedelta(seconds=1)) is None
        assert ledger.champion_at("m", START) == "1"


RACE = """
import sys
from tests.unit.test_ledger import Ledger, move
from airflow_mlops.exceptions import PromotionConflictError
sys.stdin.readline()
with Ledger.open(sys.argv[1]) as ledger:
    try:
        move(ledger, sys.argv[2], "1", actor="promoter-" + sys.argv[2])
        print("won")
    except PromotionConflictError as err:
        print(err)
"""


def test_of_two_racing_promotions_one_wins(url: str) -> None:
    with Ledger.open(url) as ledger:
        move(ledger, "1", None)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, url, version],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for version in ("2", "3")
    ]
    said = [racer.communicate("go\n", timeout=60)[0].strip() for racer in racers]
    assert said.count("won") == 1
    winner = ("2", "3")[said.index("won")]
    loser = next(text for text in said if text != "won")
    assert f"promoter-{winner} moved it to version {winner}" in loser


def test_many_processes_may_open_an_empty_file_at_once(url: str) -> None:
    code = "import sys; from airflow_mlops.ledger import Ledger; Ledger.open(sys.argv[1]).close()"
    openers = [subprocess.Popen([sys.executable, "-c", code, url]) for _ in range(6)]
    assert [opener.wait(timeout=60) for opener in openers] == [0] * 6


@settings(max_examples=60, deadline=None)
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


def test_a_url_that_is_none_is_said_without_its_password() -> None:
    with pytest.raises(ConnectionConfigError, match="not a SQLAlchemy URL") as caught:
        Ledger.open("no url at all: s3cret")
    assert "s3cret" not in str(caught.value)


def test_a_driver_that_is_missing_is_named() -> None:
    with pytest.raises(ConnectionConfigError, match="driver"):
        Ledger.open("nosuchdatabase://host/name")


def test_a_file_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"ledger\.db can't be written"):
        Ledger.open(f"sqlite:///{tmp_path}/file/ledger.db")


def test_a_file_that_is_no_database_is_said(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_text(json.dumps(["not", "a", "database"] * 100))
    with pytest.raises(LedgerUnavailableError, match=r"ledger\.db"):
        Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}")
