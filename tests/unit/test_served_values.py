"""What a service is asked against the contract of the training: few requests like the training are no skew, and unlike ones are."""

from __future__ import annotations

from typing import Any

import numpy as np
import polars as pl
import pytest

from airflow_mlops.core.checks.skew import find_skew
from airflow_mlops.core.checks.validation import judge_compiled
from airflow_mlops.core.model.signature import FieldSpec
from airflow_mlops.core.monitoring.drift import compare_profiles
from airflow_mlops.core.profiles.profile import profile_frame
from airflow_mlops.core.rollouts.served_values import about_inputs, contract_of, same_within

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


def test_what_is_infinite_is_like_no_other() -> None:
    infinite = float("inf")
    served = [0.0, infinite, infinite, infinite, None, 5.0, None]
    table = [infinite, 5.0, -infinite, infinite, infinite, 5.0 + 1e-9, None]
    pairs = pl.DataFrame({"served": served, "table": table})
    for tolerance, close in ((1e-6, True), (0.0, False)):
        same = same_within(pl.col("served"), pl.col("table"), number=True, tolerance=tolerance)
        assert pairs.select(same).to_series().to_list() == [False, False, False, True, False, close, True]


@pytest.mark.parametrize("asked", [np.float32, np.float64, "decimals"])
@pytest.mark.parametrize("prices", [[0.1, 0.2, 0.3], [0.19], np.arange(1, 2000) / 100])
def test_numbers_of_32_bits_are_the_same_in_other_digits(prices: Any, asked: Any) -> None:
    """A table of floats of 32 bits has 0.10000000149, and who asks sends 0.1."""
    random = np.random.default_rng(0)
    wide = np.asarray(prices, dtype=np.float64)
    table = pl.DataFrame({"price": random.choice(wide, 5000).astype(np.float32)})
    sent = random.choice(wide, 5000)
    if asked != "decimals":
        sent = sent.astype(np.float32).astype(asked)
    trained = profile_frame(table, numeric=["price"])
    now = profile_frame(pl.DataFrame({"price": sent}), numeric=["price"], like=trained)
    assert not compare_profiles(trained, now).features[0].drifted
    assert find_skew(trained, now) == ()
    field = FieldSpec(name="price", type="number")
    contract = contract_of([field], trained, share=0.0, rows=5000, there={"price": 5000})
    results = judge_compiled(pl.LazyFrame({"price": sent}), contract)
    assert [one and one["success"] for one in results] == [True] * len(contract)
