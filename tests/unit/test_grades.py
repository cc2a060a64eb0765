"""A window graded again: by two tasks at once, and when labels were corrected."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowSkipException

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.windows import Window
from airflow_mlops.ledger import EntryKind, Ledger
from airflow_mlops.operators.challengers import CompareChallengersOperator
from airflow_mlops.operators.performance import CheckPerformanceOperator

WINDOW = Window(start=datetime(2024, 1, 1), end=datetime(2024, 2, 1))
CONTEXT = {"ti": SimpleNamespace(dag_id="monitor", run_id="run", task_id="check"), "outlet_events": {}}


def grade(labelled: int, **more: Any) -> dict[str, Any]:
    found: dict[str, Any] = {
        "model_name": "m", "window": to_dict(WINDOW), "model_version": "1", "measured": True, "final": labelled == 100,
        "degraded": False, "labelled_share": labelled / 100, "row_count": labelled, "value": 1.0, "reason": "as promised",
    }  # fmt: skip
    return found | more


def write(labelled: int, **more: Any) -> dict[str, Any]:
    """Write a grade as the task does; give the one that stands."""
    task = CheckPerformanceOperator(task_id="check", model_name="m")
    return task.record(grade(labelled, **more), CONTEXT)


@pytest.fixture(autouse=True)
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    connection = {"conn_type": "mlops_ledger", "extra": {"url": url}}
    monkeypatch.setenv("AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps(connection))
    return url


@pytest.mark.parametrize(
    ("before", "first", "second"), [(50, 100, 80), (50, 80, 100), (None, 80, 100), (None, 100, 80)]
)
def test_who_is_overtaken_looks_again(
    url: str, monkeypatch: pytest.MonkeyPatch, before: int | None, first: int, second: int
) -> None:
    if before is not None:
        write(before)
    read = Ledger.grades

    def overtaken(ledger: Ledger, *given: Any, **more: Any) -> Any:
        """Let the other task come in between reading and writing."""
        found = read(ledger, *given, **more)
        monkeypatch.setattr(Ledger, "grades", read)
        write(first)
        return found

    monkeypatch.setattr(Ledger, "grades", overtaken)
    assert write(second)["row_count"] == 100
    with Ledger.open(url) as ledger:
        (standing,) = ledger.grades("m")
        assert standing.final
        keys = [entry.key for entry in ledger.entries(kind=EntryKind.PERFORMANCE_CHECK, newest_first=False)]
    assert len(keys) == len({*keys}) <= 3


def test_labels_that_were_corrected_are_graded_again_where_the_task_runs_again(url: str) -> None:
    def standing(version: int, value: float, labelled: int = 100, **more: Any) -> float:
        labels = {"uri": "labels", "version": version}
        return float(write(labelled, labels=labels, value=value, **more)["value"])

    assert standing(1, 1.0) == 1.0
    assert standing(2, 1.0 + 1e-15) == 1.0, "sums in another order are no correction"
    assert standing(2, 1.5, degraded=True) == 1.5
    assert standing(1, 1.0) == 1.5, "a run that reads the older labels takes nothing back"
    assert standing(3, 1.2, labelled=90) == 1.5, "labels that went are no correction"
    assert standing(4, 1.3) == 1.3
    with Ledger.open(url) as ledger:
        (grade,) = ledger.grades("m")
        assert grade.entry.payload["flipped"]
        assert "it was 1.5 with 100%" in grade.entry.payload["reason"]
        assert len(ledger.entries(kind=EntryKind.PERFORMANCE_CHECK)) == 3


def test_of_labels_that_still_come_a_correction_counts_when_it_turns_the_verdict(url: str) -> None:
    def standing(version: int, value: float, **more: Any) -> float:
        return float(write(90, labels={"uri": "labels", "version": version}, value=value, **more)["value"])

    assert standing(1, 1.0) == 1.0
    assert standing(2, 1.1) == 1.0
    assert standing(3, 1.5, degraded=True) == 1.5


def test_a_window_that_waits_for_labels_has_a_line_for_every_ten_points_of_a_hundred(url: str) -> None:
    short = {"measured": False, "awaits_labels": True, "value": None}
    for labelled in range(0, 60, 2):
        write(labelled, **short)
    assert write(60, **short | {"estimate_degraded": True, "final": True, "awaits_labels": False})["final"]
    with Ledger.open(url) as ledger:
        checks = ledger.entries(kind=EntryKind.PERFORMANCE_CHECK, newest_first=False)
        assert [check.payload["row_count"] for check in checks] == [0, 10, 20, 30, 40, 50, 60]
        assert write(80)["measured"]
        (standing,) = ledger.grades("m")
        assert standing.entry.payload["row_count"] == 80


class TestChallengers:
    """They are compared where labels are, however many windows wait for theirs."""

    @staticmethod
    def hour(number: int) -> Window:
        return Window(
            start=WINDOW.start + timedelta(hours=number), end=WINDOW.start + timedelta(hours=number + 1)
        )

    def graded(self, number: int) -> tuple[list[dict[str, Any]], bool]:
        task = CompareChallengersOperator(
            task_id="compare", model_name="m", dataset="trips", time_column="t", target="y"
        )
        return task._graded(to_dict(self.hour(number)))

    def test_windows_of_an_hour_and_labels_of_a_week(self) -> None:
        waiting = {"measured": False, "awaits_labels": True, "value": None}
        for number in range(171):
            write(0 if number else 100, window=to_dict(self.hour(number)), **({} if number == 0 else waiting))
        assert self.graded(170) == ([to_dict(self.hour(0))], False)
        assert self.graded(171)[1], "what is not graded yet can be compared: its labels may be here"

    def test_a_window_that_waits_is_skipped(self) -> None:
        write(0, measured=False, awaits_labels=True, value=None)
        task = CompareChallengersOperator(
            task_id="compare", model_name="m", dataset="trips", time_column="t", target="y",
            window_start="2024-01-01", window_end="2024-02-01",
        )  # fmt: skip
        with pytest.raises(AirflowSkipException, match="labels of this window are late"):
            task.execute(CONTEXT)
