"""Labels as they come: twice, corrected, missing, of predictions nobody asked about, with a point."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from airflow_mlops.core.model.signature import FieldSpec, ModelSignature
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import SchemaMismatchError
from airflow_mlops.integrations import delta
from airflow_mlops.serving.inference_log import InferenceLog
from airflow_mlops.steps.monitoring.labels import (
    as_trained,
    id_texts,
    join_labels,
    labelled_predictions,
    labelled_share,
)

START = datetime(2024, 5, 1, tzinfo=UTC)
DAY = Window(start=START, end=START + timedelta(days=1))


@pytest.fixture
def log(tmp_path: Path) -> Path:
    writer = InferenceLog(tmp_path / "log")
    writer.append(
        model_name="fare",
        model_version="1",
        signature=ModelSignature(inputs=(FieldSpec(name="x", type="number"),), output="y"),
        prediction_ids=["a", "b", "c"],
        times=[START + timedelta(hours=hour) for hour in range(3)],
        columns={"x": [1.0, 2.0, 3.0]},
        predictions=[10.0, 20.0, 30.0],
        latency_ms=1.0,
    )
    writer.flush()
    return tmp_path / "log"


def land(folder: Path, ids: list[str | None], values: list[Any]) -> dict[str, Any]:
    uri = str(folder / "labels")
    delta.replace_window(uri, pl.DataFrame({"id": ids, "y": values}), time_column=None, window=None)
    return {"labels": uri, "id_column": "id", "target": "y"}


def joined(log: Path, ids: list[str | None], values: list[Any]) -> list[Any]:
    return labelled_predictions(log, "fare", DAY, **land(log.parent, ids, values))["y"].to_list()


def test_a_label_that_was_delivered_twice_is_one(log: Path) -> None:
    assert joined(log, ["a", "b", "a"], [1.0, 2.0, 1.0]) == [1.0, 2.0, None]


def test_a_label_that_came_after_a_missing_one_counts(log: Path) -> None:
    assert joined(log, ["a", "a", "b"], [None, 1.0, None]) == [1.0, None, None]


def test_what_is_no_number_is_no_label(log: Path) -> None:
    arguments = land(log.parent, ["a", "b"], [1.0, float("nan")])
    assert labelled_predictions(log, "fare", DAY, **arguments)["y"].to_list() == [1.0, None, None]
    assert labelled_share(log, "fare", DAY, **arguments) == pytest.approx(1 / 3)


def test_labels_of_other_predictions_are_nobodys_business(log: Path) -> None:
    assert joined(log, ["z", "z", None, None, "c"], [1.0, 2.0, 3.0, 4.0, 5.0]) == [None, None, 5.0]


def test_labels_that_contradict_each_other_name_one(log: Path) -> None:
    with pytest.raises(
        SchemaMismatchError,
        match=r"contradict each other for 1 predictions, such as id 'b' with y 2\.0 and 7\.0: keep the one that counts",
    ):
        joined(log, ["a", "b", "b"], [1.0, 7.0, 2.0])


@pytest.mark.parametrize(
    ("labels", "classes", "given"),
    [
        ([1.0, 0.0], ("0", "1"), [1, 0]),
        ([1, 0], ("0.0", "1.0"), [1.0, 0.0]),
        ([1, 0], ("0", "1"), [1, 0]),
        ([1, 2], ("0", "1"), [1, 2]),  # a new label is a mistake, not another type
        ([True, False], ("False", "True"), [True, False]),
        ([True, False], ("0", "1"), [1, 0]),
        ([True, False], ("0.0", "1.0"), [1.0, 0.0]),
        ([1.0, 0.0], ("False", "True"), [True, False]),
        (["a", "b"], ("a", "c"), ["a", "b"]),
        ([1.5, 2.5], None, [1.5, 2.5]),
    ],
)
def test_labels_have_the_type_of_the_training(
    labels: list[Any], classes: tuple[str, ...] | None, given: list[Any]
) -> None:
    found = as_trained(pl.Series("y", labels), classes).to_list()
    assert found == given
    assert [type(value) for value in found] == [type(value) for value in given]


def test_labels_in_other_words_are_refused() -> None:
    with pytest.raises(
        SchemaMismatchError, match="labels in 'y' are no, yes, and the model answers False, True: give"
    ):
        as_trained(pl.Series("y", ["yes", "no"]), ("False", "True"))


@pytest.mark.parametrize("name", ["prediction", "model_version"])
def test_labels_with_the_name_of_a_column_of_the_log_are_no_answers(log: Path, name: str) -> None:
    """Joined, the answers would be held against themselves: no error at all."""
    uri = str(log.parent / "labels")
    labels = pl.DataFrame({"id": ["a", "b"], name: [99.0, 99.0]})
    delta.replace_window(uri, labels, time_column=None, window=None)
    with pytest.raises(
        SchemaMismatchError, match=f"label column '{name}' has the name of a column of the inf"
    ):
        labelled_predictions(log, "fare", DAY, labels=uri, id_column="id", target=name)


def test_labels_of_a_regression_are_numbers() -> None:
    assert as_trained(pl.Series("y", ["1.5", "2"]), None).to_list() == [1.5, 2.0]
    with pytest.raises(SchemaMismatchError, match="labels in 'y' are of type Datetime"):
        as_trained(pl.Series("y", [START]), None)
    with pytest.raises(SchemaMismatchError, match="such as 'n/a', and the model answers numbers"):
        as_trained(pl.Series("y", ["1.5", "n/a"]), None)


@pytest.mark.parametrize(
    "ids",
    [
        pl.Series([12.0, 13.0, None]),
        pl.Series([12.0, 13.0, None], dtype=pl.Float32),
        pl.Series([Decimal("12.00"), Decimal("13.00"), None]),
        pl.Series([12, 13, None]),
        pl.Series(["12", "13", None]),
    ],
    ids=lambda column: str(column.dtype),
)
def test_a_number_is_the_same_id_whatever_the_table_made_of_it(tmp_path: Path, ids: pl.Series) -> None:
    """The service logs 12 as text; a table that once held a gap has 12.0."""
    labels = pl.DataFrame({"id": ids, "y": [1.0, 2.0, 3.0]})
    delta.replace_window(str(tmp_path / "labels"), labels, time_column=None, window=None)
    answers = pl.DataFrame({"prediction_id": ["13", "12", "0.5"]})
    joined = join_labels(answers, labels=str(tmp_path / "labels"), id_column="id", target="y")
    assert joined["y"].to_list() == [2.0, 1.0, None]


def test_ids_that_are_no_whole_numbers_stay_what_they_are() -> None:
    table = pl.LazyFrame({"id": [0.5, -3.0, 1e300, float("nan")]})
    assert table.select(id_texts(table, "id")).collect()["id"].to_list() == ["0.5", "-3", "1e+300", "NaN"]
