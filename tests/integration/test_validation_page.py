"""The page of a validation in a real MLflow: linked from the task, also from one that fails; the verdict does not need it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import polars as pl
import pytest

from airflow_mlops.exceptions import DataQualityError
from airflow_mlops.integrations import delta
from airflow_mlops.links import DataDocsLink
from airflow_mlops.operators.validate import ValidateDatasetOperator

pytestmark = pytest.mark.integration

FARE = {"type": "expect_column_values_to_be_between", "kwargs": {"column": "fare", "min_value": 0}}
RIDER = {"type": "expect_column_values_to_match_regex", "kwargs": {"column": "rider", "regex": "^[a-z]+$"}}


@pytest.fixture
def table(tmp_path: Path) -> str:
    uri = str(tmp_path / f"trips-{tmp_path.name}")
    start = datetime(2024, 1, 1, tzinfo=UTC)
    rows = pl.DataFrame(
        {
            "t": pl.Series([start + timedelta(hours=n) for n in range(200)], dtype=pl.Datetime("us", "UTC")),
            "trip_id": [f"trip-{n}" for n in range(200)],
            "fare": [-7.25, *[9.5] * 199],
            "rider": ["Ann Canary", *["x"] * 199],
        }
    )
    delta.replace_window(uri, rows, time_column=None, window=None)
    return uri


@pytest.fixture
def validate(table: str, tmp_path: Path, mlflow_server: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    ledger = {"conn_type": "mlops_ledger", "extra": {"url": f"sqlite:///{tmp_path / 'ledger.db'}"}}
    monkeypatch.setenv("AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps(ledger))
    monkeypatch.setenv(
        "AIRFLOW_CONN_MLFLOW_DEFAULT",
        json.dumps({"conn_type": "mlflow", "extra": {"tracking_uri": mlflow_server}}),
    )
    attempts = iter(range(1, 99))

    def validate(*expectations: dict[str, Any], **arguments: Any) -> SimpleNamespace:
        task = ValidateDatasetOperator(
            task_id="validate", suite={"name": "trips", "expectations": list(expectations)},
            **({"dataset": table} | arguments)
        )  # fmt: skip
        instance = SimpleNamespace(dag_id="d", run_id="r", task_id="validate", try_number=next(attempts))
        done = SimpleNamespace(result=None, error=None)
        try:
            done.result = task.execute({"ti": instance, "outlet_events": {}})  # type: ignore[arg-type]
        except DataQualityError as err:
            done.error = err
        done.link = DataDocsLink().get_link(task, ti_key=None)  # type: ignore[arg-type]
        return done

    return validate


def artifact(server: str, link: str, name: str) -> str:
    run_id = link.split("/runs/")[1].split("/")[0]
    answer = httpx.get(f"{server}/get-artifact", params={"path": name, "run_uuid": run_id}, timeout=60)
    answer.raise_for_status()
    return answer.text


def test_a_gate_that_fails_is_linked_to_its_page(validate: Any, mlflow_server: str) -> None:
    done = validate(FARE, id_column="trip_id")
    assert done.error
    assert done.link.startswith(mlflow_server)
    page = artifact(mlflow_server, done.link, "validation.html")
    assert '<span class="verdict failed">failed</span>' in page
    assert "trip-0</td>" in page
    assert "-7.25</td>" in page
    told = json.loads(artifact(mlflow_server, done.link, "validation.json"))
    assert told["results"][0]["result"]["unexpected_count"] == 1
    assert told["statistics"]["evaluated_expectations"] == 1


def test_a_retry_finds_the_page_and_the_next_one_tells_of_it(validate: Any, mlflow_server: str) -> None:
    first, again = validate(FARE), validate(FARE)
    assert first.link == again.link
    other = validate(FARE, RIDER)
    assert other.link != first.link
    assert artifact(mlflow_server, other.link, "validation.html").count("not accepted</td>") == 2


def test_the_page_tells_of_verdicts_by_another_address(validate: Any, table: str, mlflow_server: str) -> None:
    validate(FARE, dataset=f"file://{table}/")
    page = artifact(mlflow_server, validate(RIDER).link, "validation.html")
    assert page.count("not accepted</td>") == 1


def test_rows_that_were_set_aside_are_told(validate: Any, mlflow_server: str) -> None:
    done = validate(FARE, action="quarantine")
    assert done.result["report_url"] == done.link
    page = artifact(mlflow_server, done.link, "validation.html")
    assert "1 of 200 (0.5 %)" in page
    assert "version 2 with 199 rows" in page


def test_private_values_are_nowhere(validate: Any, mlflow_server: str, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("DEBUG")
    seen = {"notes": "REVIEW: 'Canary' is the only value"}
    asked = {
        "type": "expect_column_values_to_be_in_set",
        "kwargs": {"column": "rider", "value_set": ["Bob Canary"]},
    } | seen
    done = validate(FARE, RIDER, asked, private_columns="rider, trip_id", id_column="trip_id")
    pages = [artifact(mlflow_server, done.link, name) for name in ("validation.html", "validation.json")]
    told = [*pages, str(done.error), json.dumps(done.error.evidence), caplog.text]
    assert all("Canary" not in one and "trip-0" not in one for one in told)
    assert b"Canary" not in (tmp_path / "ledger.db").read_bytes()
    assert "-7.25" in pages[0]


def test_a_private_column_that_is_not_there_is_refused(validate: Any) -> None:
    with pytest.raises(ValueError, match="raider"):
        validate(FARE, private_columns=["raider"])


def test_only_failures_or_never(validate: Any) -> None:
    held = {"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "fare"}}
    assert validate(held, report="failed").link == ""
    assert validate(FARE, report="failed").link
    assert validate(FARE, report="never").link == ""
    assert validate(held).link


@pytest.mark.parametrize("connection", ["gone", "dead"])
def test_the_verdict_needs_no_mlflow(validate: Any, monkeypatch: pytest.MonkeyPatch, connection: str) -> None:
    if connection == "gone":
        monkeypatch.delenv("AIRFLOW_CONN_MLFLOW_DEFAULT")
    else:
        dead = {"conn_type": "mlflow", "extra": {"tracking_uri": "http://127.0.0.1:9"}}
        monkeypatch.setenv("AIRFLOW_CONN_MLFLOW_DEFAULT", json.dumps(dead))
    done = validate(FARE, action="warn")
    assert (done.result["success"], done.result["report_url"], done.link) == (False, None, "")
    assert validate(FARE).error
