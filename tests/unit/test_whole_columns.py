"""Numbers about whole columns that are not held as a whole: exact, whatever the values are."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from airflow_mlops.core.checks.whole_columns import count_distinct, exact_median

VALUES = st.lists(st.sampled_from([None, -3, 0, 1, 2, 7]) | st.integers(-(2**52), 2**52), max_size=60)


@given(values=VALUES, at_once=st.sampled_from([1, 2, 5, 100]), floats=st.booleans())
@settings(max_examples=200)
def test_any_values(values: list[Any], at_once: int, floats: bool) -> None:
    rows = pl.LazyFrame({"v": pl.Series(values, dtype=pl.Float64 if floats else pl.Int64)})
    known = [value for value in values if value is not None]
    median = exact_median(rows, pl.col("v"), rows_at_once=at_once)
    assert median == (statistics.median(known) if known else None)
    assert count_distinct(rows, pl.col("v"), rows_at_once=at_once) == len(set(known))


@pytest.mark.parametrize(
    "values",
    [
        np.random.default_rng(0).normal(0, 1, 300_000),
        np.random.default_rng(1).lognormal(0, 9, 300_001),
        np.repeat([0.0, 1.0], 150_000),  # the middle is between the only two values
        np.sort(np.random.default_rng(2).integers(0, 5, 300_000)),
        np.concatenate([np.zeros(200_000), np.arange(100_000.0)]),
        np.arange(300_000, 0, -1),
    ],
    ids=["normal", "skewed", "two", "few", "ties", "falling"],
)
def test_many_rows_are_narrowed_down(values: Any) -> None:
    rows = pl.LazyFrame({"v": values})
    assert exact_median(rows, pl.col("v"), rows_at_once=1_000) == np.median(values)
    assert count_distinct(rows, pl.col("v"), rows_at_once=10_000) == len(np.unique(values))
