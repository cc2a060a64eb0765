"""A window graded by two tasks at once: the grade with all labels stands, whoever comes last."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.windows import Window
from airflow_mlops.ledger import EntryKind, Ledger
from airflow_mlops.operators.performance import CheckPerformanceOperator

WINDOW = Window(start=datetime(2024, 1, 1), end=datetime(2024, 2, 1))
CONTEXT = {"ti": SimpleNamespace(dag_id="monitor", run_id="run", task_id="check"), "outlet_events": {}}


def grade(labelled: int) -> dict[str, Any]:
    return {
        "model_name": "m", "window": to_dict(WINDOW), "model_version": "1", "measured": True, "final": labelled == 100,
        "degraded": False, "labelled_share": labelled / 100, "row_count": labelled, "value": 1.0, "reason": "as promised",
    }  # fmt: skip


def write(labelled: int) -> int:
    """Write a grade as the task does; give how many labels the one that stands rests on."""
    task = CheckPerformanceOperator(task_id="check", model_name="m")
    return int(task.record(grade(labelled), CONTEXT)["row_count"])


@pytest.mark.parametrize(
    ("before", "first", "second"), [(50, 100, 80), (50, 80, 100), (None, 80, 100), (None, 100, 80)]
)
def test_who_is_overtaken_looks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int | None, first: int, second: int
) -> None:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    connection = {"conn_type": "mlops_ledger", "extra": {"url": url}}
    monkeypatch.setenv("AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps(connection))
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
    assert write(second) == 100
    with Ledger.open(url) as ledger:
        (standing,) = ledger.grades("m")
        assert standing.final
        keys = [entry.key for entry in ledger.entries(kind=EntryKind.PERFORMANCE_CHECK, newest_first=False)]
    assert len(keys) == len({*keys}) <= 3
