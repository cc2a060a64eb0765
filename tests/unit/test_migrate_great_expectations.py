"""The snippets for users of airflow-provider-great-expectations: they are one Dag, and its tasks judge real rows."""

from __future__ import annotations

import json
import re
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pendulum
import polars as pl
import pytest
from airflow.sdk import DAG
from airflow.timetables.trigger import CronTriggerTimetable as Ticking

from airflow_mlops.exceptions import DataQualityError
from airflow_mlops.integrations import delta
from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "how-to" / "migrate-from-airflow-provider-great-expectations.md"
#: Every operator of its releases, with all parameters of their own.
THERE = {
    "GXValidateDataFrameOperator": ["configure_dataframe", "configure_expectations", "expect", "result_format", "context_type", "conn_id"],
    "GXValidateBatchOperator": ["configure_batch_definition", "batch_parameters"],
    "GXValidateCheckpointOperator": ["configure_checkpoint", "batch_parameters", "context_type", "configure_file_data_context"],
    "GreatExpectationsOperator": [
        "run_name", "conn_id", "execution_engine", "expectation_suite_name", "data_asset_name", "data_context_root_dir",
        "data_context_config", "dataframe_to_validate", "query_to_validate", "checkpoint_name", "checkpoint_config", "checkpoint_kwargs",
        "validation_failure_callback", "fail_task_on_validation_failure", "return_json_dict", "use_open_lineage", "schema",
        "runtime_environment",
    ],
}  # fmt: skip
HEADER = "vendor_id,passenger_count,pickup_datetime\n"


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    landing = tmp_path / "landing"
    landing.mkdir()
    (tmp_path / "suites").mkdir()
    for month in (1, 2):
        rows = [f"1,{1 + day % 4},2019-0{month}-{day:02} 10:00:00" for day in range(1, 29)]
        rows[0] = rows[0].replace("1,2,", "1,0,") if month == 2 else rows[0]
        (landing / f"yellow_tripdata_2019-0{month}.csv").write_text(HEADER + "\n".join(rows) + "\n")
    ledger = {"conn_type": "mlops_ledger", "extra": {"url": f"sqlite:///{tmp_path / 'ledger.db'}"}}
    monkeypatch.setenv("AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps(ledger))
    return tmp_path


@pytest.fixture
def snippets(lake: Path) -> dict[str, Any]:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    assert len(blocks) == 6
    with DAG("migrated", schedule=None):
        for block in blocks:
            exec(compile(block.replace('"/lake', f'"{lake}'), str(PAGE), "exec"), names)  # noqa: S102 - our own page
    names["write_suite"](lake / "suites" / "trips.json")
    return names


def run(task: Any, **given: Any) -> dict[str, Any]:
    for name, value in given.items():
        setattr(task, name, value)  # what Airflow renders
    instance = SimpleNamespace(dag_id="migrated", run_id="r", task_id=task.task_id, try_number=1)
    result: dict[str, Any] = task.execute({"ti": instance, "outlet_events": {}})
    return result


def test_every_operator_and_parameter_is_in_a_table() -> None:
    text = PAGE.read_text()
    sections = {part.split("\n")[0]: part for part in re.split(r"^## ", text, flags=re.MULTILINE)}
    for operator, parameters in THERE.items():
        assert f"| `{operator}`" in text
        told = {
            name
            for row in re.findall(r"^\| (.*?) \|", sections[operator], re.MULTILINE)
            for name in re.findall(r"`(\w+)", row)
        }
        assert set(parameters) <= told, operator


def test_a_data_frame(snippets: dict[str, Any]) -> None:
    landed = snippets["land"].function()
    ingested = run(snippets["ingest"], source=landed)
    result = run(snippets["validate"], dataset=ingested)
    assert (result["success"], result["row_count"], result["evaluated"]) == (True, 28, 3)


def test_a_batch(snippets: dict[str, Any]) -> None:
    schedule = snippets["ingest_month"].dag.timetable
    ticks = Ticking(schedule.expression, timezone=schedule.timezone, interval=schedule.interval)

    tasks = [snippets["ingest_month"], snippets["validate_month"]]
    templates = [(task.window_start, task.window_end) for task in tasks]

    def judge(due: str) -> dict[str, Any]:
        """Run both as in the run that is due then, with the interval that Airflow's scheduler gives it."""
        interval = ticks.infer_manual_data_interval(run_after=pendulum.parse(due))
        told = {"data_interval_start": interval.start, "data_interval_end": interval.end}
        result: dict[str, Any] = {}
        for task, template in zip(tasks, templates, strict=True):
            start, end = task.render_template(template, told)
            result = run(task, window_start=start, window_end=end, **({"dataset": result} if result else {}))
        return result

    assert (judge("2019-02-01")["success"], judge("2019-02-01")["row_count"]) == (True, 28)
    with pytest.raises(DataQualityError, match="passenger_count"):
        judge("2019-03-01")


def test_a_checkpoint_and_a_suite_of_the_old_kind(snippets: dict[str, Any], lake: Path) -> None:
    rows = pl.DataFrame({"vendor_id": [None, 1], "passenger_count": [1, 9], "t": [datetime(2019, 1, 1)] * 2})
    for name in ("trips", "months"):
        delta.replace_window(str(lake / name), rows, time_column=None, window=None)
    for check in snippets["checks"]:
        result = run(check)
        assert (result["success"], result["failed"]) == (False, 2)
    old = {
        "expectation_suite_name": "old",
        "expectations": [
            {"expectation_type": "expect_column_values_to_not_be_null", "kwargs": {"column": "vendor_id"}, "meta": {}}
        ],
        "data_asset_type": None,
        "meta": {"great_expectations_version": "0.18.22"},
    }  # fmt: skip
    (lake / "suites" / "old.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"expectation_type.*Great Expectations 0\.x.*migrate"):
        run(snippets["judge"], suite=str(lake / "suites" / "old.json"))
    snippets["convert_suite"](lake / "suites" / "old.json", lake / "suites" / "converted.json")
    converted = str(lake / "suites" / "converted.json")
    assert run(snippets["judge"], suite=converted)["failures"][0]["unexpected_count"] == 1
