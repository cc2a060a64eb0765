"""What a service is asked against the contract of the training: few requests like the training are no skew, and unlike ones are."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from airflow_mlops.core.checks.validation import judge_compiled
from airflow_mlops.core.model.signature import FieldSpec
from airflow_mlops.core.profiles.profile import profile_frame
from airflow_mlops.core.rollouts.served_values import about_inputs, contract_of

INPUTS = [f"x{number}" for number in range(10)]
FIELDS = [*(FieldSpec(name=name, type="number") for name in INPUTS), FieldSpec(name="c", type="string")]


def rows(count: int, seed: int) -> pl.DataFrame:
    random = np.random.default_rng(seed)
    values: dict[str, Any] = {name: random.standard_normal(count) for name in INPUTS}
    frame = pl.DataFrame({**values, "c": random.choice(["a", "b"], count)})
    gone = pl.Series(random.random(count) < 0.1)
    return frame.with_columns(pl.when(~gone).then("x0"))


TRAINED = profile_frame(rows(1000, 0), numeric=INPUTS, categorical=["c"])


def failed(asked: pl.DataFrame) -> list[tuple[str, str]]:
    there = {name: asked.height - asked[name].null_count() for name in asked.columns}
    contract = contract_of(FIELDS, TRAINED, share=0.01, rows=asked.height, there=there)
    results = judge_compiled(asked.lazy(), contract)
    assert all(results)
    return [
        (item["type"], item["kwargs"]["column"])
        for item, one in zip(contract, results, strict=True)
        if one and not one["success"]
    ]


@pytest.mark.parametrize("count", [20, 50, 200, 1000])
def test_few_requests_like_the_training_are_no_skew(count: int) -> None:
    """Without what chance may add more than half of windows of 50 requests fail, as one beyond an extreme is 2 %."""
    alarms = [bool(failed(rows(count, seed))) for seed in range(1, 61)]
    assert sum(alarms) <= 1


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        (pl.lit(9.0).alias("x1"), ("expect_column_values_to_be_between", "x1")),
        (pl.lit(None).cast(pl.Float64).alias("x2"), ("expect_column_values_to_not_be_null", "x2")),
        (pl.lit("new").alias("c"), ("expect_column_values_to_be_in_set", "c")),
    ],
)
def test_five_of_fifty_requests_unlike_the_training_are(broken: pl.Expr, found: tuple[str, str]) -> None:
    asked = rows(50, 100)
    assert failed(asked) == []
    assert failed(pl.concat([asked.head(45), asked.tail(5).with_columns(broken)])) == [found]


@pytest.mark.parametrize(
    "condition",
    [
        'paid == "card" and x1 > 0',
        "`paid`.notnull()",
        'col("paid") == "card"',
        {"type": "comparison", "column": {"name": "paid"}, "operator": "==", "parameter": "card"},
    ],
)
def test_what_depends_on_a_column_that_is_no_input_is_left_out(condition: Any) -> None:
    kwargs = {"column": "x1", "min_value": 0, "row_condition": condition}
    item = {"type": "expect_column_values_to_be_between", "kwargs": kwargs}
    assert about_inputs([item], ["x1", "x2"]) == ([], [item])
    assert about_inputs([item], ["x1", "paid"]) == ([item], [])
