"""A dataset as it was: by version number or instant, and what is said of one that is gone."""

from __future__ import annotations

import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from deltalake import DeltaTable

from airflow_mlops.core.data.dataset import PastDataset
from airflow_mlops.exceptions import DatasetNotFoundError
from airflow_mlops.integrations import delta
from airflow_mlops.operators.base import dataset_ref
from airflow_mlops.operators.drift import CheckDriftOperator
from airflow_mlops.operators.evaluate import EvaluateModelOperator
from airflow_mlops.operators.performance import CheckPerformanceOperator
from airflow_mlops.operators.score import ScoreBatchOperator
from airflow_mlops.operators.train import TrainModelOperator
from airflow_mlops.operators.validate import ValidateDatasetOperator
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.common import pin_dataset, resolve_dataset


@pytest.fixture
def table(tmp_path: Path) -> str:
    """A table of three versions after the empty one: of one row, of two, of three."""
    uri = str(tmp_path / "my table")
    for count in (1, 2, 3):
        pl.DataFrame({"x": list(range(count))}).write_parquet(tmp_path / "a.parquet")
        run_step("ingest", {"source": str(tmp_path / "a.parquet"), "table": uri}, Services())
    return uri


def committed(table: str) -> dict[int, datetime]:
    return {
        commit["version"]: datetime.fromtimestamp(commit["timestamp"] / 1000, UTC)
        for commit in DeltaTable(table).history()
    }


def test_a_version_number_and_an_instant_name_the_same_version(table: str) -> None:
    for version, instant in committed(table).items():
        by_number = resolve_dataset(PastDataset(uri=table, as_of=str(version)))
        by_instant = resolve_dataset(PastDataset(uri=table, as_of=instant.isoformat()))
        assert by_number == by_instant
        assert (by_number.version, by_number.row_count) == (version, version)
        assert resolve_dataset(by_number) is by_number
    assert resolve_dataset(table).version == 3


def test_an_instant_stands_for_the_newest_version_not_after_it(table: str) -> None:
    times, moment = committed(table), timedelta(milliseconds=1)
    assert delta.version_as_of(table, (times[2] - moment).isoformat()) == 1
    assert delta.version_as_of(table, (times[3] + timedelta(days=9)).isoformat()) == 3
    assert delta.version_as_of(table, times[2].replace(tzinfo=None).isoformat()) == 2
    assert delta.version_as_of(table, times[2].astimezone().isoformat()) == 2
    with pytest.raises(
        DatasetNotFoundError, match=r"had no version at 2000-01-01.*; its oldest known version is 0 of"
    ):
        delta.version_as_of(table, "2000-01-01")


def test_what_names_no_version_is_refused(table: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetNotFoundError, match="has no version 9"):
        delta.version_as_of(table, "9")
    with pytest.raises(DatasetNotFoundError, match="has no version 1180591620717411303424"):
        delta.version_as_of(table, str(2**70))
    with pytest.raises(DatasetNotFoundError, match="no Delta table at"):
        delta.version_as_of(str(tmp_path / "other"), "2024-01-01")
    with pytest.raises(
        ValueError, match="as_of 'yesterday' is neither a version number nor an ISO 8601 time"
    ):
        delta.version_as_of(table, "yesterday")


def test_a_version_that_was_vacuumed_away_says_so_before_it_is_read(table: str) -> None:
    pinned = pin_dataset(PastDataset(uri=table, as_of="1"))
    DeltaTable(table).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    for dataset in (pinned, PastDataset(uri=table, as_of="1")):
        with pytest.raises(
            DatasetNotFoundError, match=r"version 1 of .* can't be read any more: 1 of its 1 files"
        ):
            resolve_dataset(dataset)
    assert resolve_dataset(table).row_count == 3


def test_a_log_that_was_cleaned_up_says_what_is_left(table: str) -> None:
    table_ = DeltaTable(table)
    table_.create_checkpoint()
    for version in (0, 1):
        os.remove(Path(table, "_delta_log", f"{version:020}.json"))  # noqa: PTH107
    with pytest.raises(DatasetNotFoundError, match="its oldest known version is 2 of"):
        delta.version_as_of(table, "2000-01-01")
    with pytest.raises(DatasetNotFoundError, match="has no version 1"):
        delta.version_as_of(table, "1")


def test_files_whose_partition_has_an_odd_name_are_found(tmp_path: Path) -> None:
    table = str(tmp_path / "table")
    for count in (1, 2):
        rows = pl.DataFrame({"x": ["New York/é 100%=?"] * count, "y": list(range(count))})
        rows.write_parquet(tmp_path / "a.parquet")
        spec = {"source": str(tmp_path / "a.parquet"), "table": table}
        place = {"partition": {"column": "x", "key": "New York/é 100%=?"}}
        run_step("ingest", spec | place, Services())
    assert resolve_dataset(PastDataset(uri=table, as_of="1")).row_count == 1


TRAINING = {
    "dataset": {"uri": "t", "version": 7, "time_column": "at"},
    "model_name": "m",
    "run_id": "r",
    "package_digest": "d",
    "holdout": None,
    "metric": "mae",
}
WINDOW = {"window_start": "2024-01-01", "window_end": "2024-02-01"}
COLUMNS = {"id_column": "i", "time_column": "at"}


@pytest.mark.parametrize(
    ("operator", "field"),
    [
        (TrainModelOperator(task_id="a", dataset="t", as_of=3, model_name="m", target="y", time_column="at", **WINDOW), "dataset"),
        (ValidateDatasetOperator(task_id="b", dataset="t", as_of="3", suite={}), "dataset"),
        (ScoreBatchOperator(task_id="c", dataset="t", as_of="3", table="p", model_name="m", **COLUMNS, **WINDOW), "dataset"),
        (EvaluateModelOperator(task_id="d", training=TRAINING, as_of="3"), "dataset"),
        (CheckDriftOperator(task_id="e", labels="t", labels_as_of="3", model_name="m", **WINDOW), "labels"),
        (CheckPerformanceOperator(task_id="f", labels="t", labels_as_of="3", model_name="m", **WINDOW), "labels"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)  # fmt: skip
def test_whatever_takes_a_dataset_takes_it_as_it_was(operator: Any, field: str) -> None:
    assert operator.build_spec({})[field] == {"uri": "t", "as_of": "3"}
    assert {"as_of", "labels_as_of"} & set(operator.template_fields)


def test_a_version_is_not_asked_for_again() -> None:
    assert EvaluateModelOperator(task_id="e", training=TRAINING).build_spec({})["dataset"]["version"] == 7
    assert (
        EvaluateModelOperator(task_id="e", training=TRAINING, as_of=0).build_spec({})["dataset"]["as_of"]
        == "0"
    )
    assert dataset_ref({"dataset": {"uri": "t", "version": 7}}, None) == {"uri": "t", "version": 7}
    assert dataset_ref("t", "None") == "t"
    assert dataset_ref("t", datetime(2024, 1, 1, tzinfo=UTC))["as_of"] == "2024-01-01T00:00:00+00:00"
    with pytest.raises(ValueError, match="as_of 3 of what is version 7 of t already: give the table's URI"):
        dataset_ref({"dataset": {"uri": "t", "version": 7}}, 3)


def test_a_past_version_is_judged_by_its_rows(table: str) -> None:
    suite = {
        "name": "s",
        "expectations": [
            {"type": "expect_table_row_count_to_be_between", "kwargs": {"min_value": 2, "max_value": 2}}
        ],
    }
    for as_of, success in (("1", False), ("2", True), (committed(table)[2].isoformat(), True)):
        task = ValidateDatasetOperator(
            task_id="judge", dataset=table, as_of=as_of, suite=suite, window_start=None, window_end=None
        )
        result = run_step("validate", task.build_spec({}), Services())
        assert result["success"] is success
        assert result["dataset"]["version"] == (1 if as_of == "1" else 2)
