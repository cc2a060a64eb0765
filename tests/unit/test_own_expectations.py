"""Expectations of a site's own: judged by Great Expectations itself, as a gate, by row in a quarantine, in another process."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from airflow.sdk import DAG

from airflow_mlops.exceptions import ExpectationError
from airflow_mlops.integrations import delta
from airflow_mlops.runners.in_process import InProcessRunner
from airflow_mlops.runners.python import PythonRunner
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "how-to" / "write-expectations.md"
CENTS = {"type": "expect_column_values_to_be_whole_cents", "kwargs": {"column": "fare"}}
STUCK = {"type": "expect_column_largest_share_to_be_between", "kwargs": {"column": "fare", "max_value": 0.5}}
RUNNERS = {
    "in this process": InProcessRunner(),
    "in another Python": PythonRunner(
        sys.executable, env={"PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'dags'}", "OMP_NUM_THREADS": "1"}
    ),
}


@pytest.fixture(autouse=True)
def dag_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the Dag folder on the path, as Airflow does in a task."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "dags"))


@pytest.fixture
def table(tmp_path: Path) -> str:
    uri = str(tmp_path / "trips")
    fares = [1.234, None, float("nan"), 7.0001, *[1.0 + 0.05 * n for n in range(996)]]
    rows = pl.DataFrame({"id": [f"trip-{n}" for n in range(1000)], "number": range(1000), "fare": fares})
    delta.replace_window(uri, rows, time_column=None, window=None)
    return uri


def spec(table: str, *expectations: dict[str, Any], **more: Any) -> dict[str, Any]:
    judged = {"name": "own", "expectations": list(expectations)}
    return {
        "dataset": table,
        "suite": judged,
        "expectation_modules": ["site_expectations"],
        "id_column": "id",
    } | more


@pytest.mark.parametrize("runner", RUNNERS)
def test_they_gate(table: str, runner: str) -> None:
    result = RUNNERS[runner].run("validate", spec(table, CENTS, STUCK), Services())
    assert (result["success"], result["failed"], result["engines"]) == (False, 1, {"great_expectations": 2})
    (failure,) = result["failures"]
    assert (failure["unexpected_count"], failure["row_ids"]) == (2, ["trip-0", "trip-3"])


def test_of_a_whole_column(table: str) -> None:
    few = {**STUCK, "kwargs": {"column": "fare", "max_value": 0.001}}
    (failure,) = run_step("validate", spec(table, few), Services())["failures"]
    assert failure["observed_value"] == 0.002  # null and NaN are one value to pandas


@pytest.mark.parametrize("id_column", ["id", "number"])
@pytest.mark.parametrize("engine", ["auto", "great_expectations"])
def test_rows_are_set_aside_by_their_id(table: str, id_column: str, engine: str) -> None:
    high = {"type": "expect_column_values_to_be_between", "kwargs": {"column": "fare", "max_value": 50.0}}
    place = {"table": f"{table}_quarantine", "budget": 0.05}
    asked = spec(table, CENTS, high, quarantine=place, id_column=id_column, engine=engine)
    result = run_step("validate", asked, Services())
    wrong = {0, 3, *(n + 4 for n in range(996) if 1.0 + 0.05 * n > 50.0)}
    assert (result["success"], result["quarantined"]) == (True, len(wrong)), result["headline"]
    aside = delta.read_table(place["table"]).collect()
    assert set(aside["number"]) == wrong
    assert set(delta.read_table(table).collect()["number"]) == set(range(1000)) - wrong
    why = dict(aside.select("number", "quarantine_reasons").rows())
    assert (why[3], why[999]) == (
        "expect_column_values_to_be_whole_cents(fare)",
        "expect_column_values_to_be_between(fare, max_value=50.0)",
    )


@pytest.mark.parametrize(
    ("ids", "asked"),
    [(["a", "a"], "id"), ([None, "b"], "id"), ([0.5, 1.5], "id"), (["a", "b"], None)],
    ids=["shared", "missing", "floats", "none"],
)
def test_rows_that_have_no_name_are_not_guessed(tmp_path: Path, ids: list[Any], asked: str | None) -> None:
    uri = str(tmp_path / "table")
    delta.replace_window(uri, pl.DataFrame({"id": ids, "fare": [0.001, 1.0]}), time_column=None, window=None)
    place = {"table": f"{uri}_quarantine", "budget": 0.9}
    result = run_step("validate", spec(uri, CENTS, quarantine=place, id_column=asked), Services())
    assert not result["success"]
    assert "no id_column tells which rows Great Expectations means" in result["headline"]
    assert not delta.table_exists(place["table"])


def test_rows_that_are_not_unique_stay(table: str) -> None:
    unique = {"type": "expect_column_values_to_be_unique", "kwargs": {"column": "fare"}}
    repeated = pl.concat([delta.read_table(table).collect()] * 2).with_columns(number=pl.int_range(2000))
    delta.replace_window(table, repeated, time_column=None, window=None)
    place = {"table": f"{table}_quarantine", "budget": 0.99}
    asked = spec(table, unique, quarantine=place, id_column="number", engine="great_expectations")
    result = run_step("validate", asked, Services())
    assert "quarantine can't help: expect_column_values_to_be_unique" in result["headline"]


def test_a_module_that_is_not_there(table: str) -> None:
    with pytest.raises(ValueError, match=r"expectation_modules: 'gone_expectations' can't be imported"):
        run_step("validate", spec(table, CENTS, expectation_modules=["gone_expectations"]), Services())


def test_one_that_raises_is_an_error(table: str) -> None:
    with pytest.raises(ExpectationError, match=r"whole_cents.*could not be evaluated"):
        run_step("validate", spec(table, {**CENTS, "kwargs": {"column": "id"}}), Services())


def test_airflow_does_not_read_the_example_as_a_dag() -> None:
    text = (REPOSITORY / "dags" / "site_expectations.py").read_text().lower()
    assert not ("dag" in text and "airflow" in text)  # importing it takes seconds


def test_the_task_of_the_page(table: str) -> None:
    text = PAGE.read_text()
    section = text.split("## Your own expectation\n")[1].split("\n## ")[0]
    (source,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    names: dict[str, Any] = {"dataset": table}
    with DAG("own", schedule=None):
        exec(compile(source, str(PAGE), "exec"), names)  # noqa: S102 - our own page
    task = names["validate"]
    task.report = "never"
    result = run_step("validate", json.loads(json.dumps(task.build_spec({}))), Services())
    assert (result["quarantined"], result["engines"]) == (2, {"great_expectations": 2})
