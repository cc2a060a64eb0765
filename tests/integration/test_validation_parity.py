"""All expectations that polars judges, on every month of real taxi trips: Great Expectations says the same of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from airflow_mlops.core.checks.expectations import COVERED
from tests.unit.test_validation import SUITE, require_same

pytestmark = pytest.mark.integration


def _on(kind: str, **kwargs: Any) -> dict[str, Any]:
    return {"type": f"expect_{kind}", "kwargs": kwargs}


FLAG = "store_and_fwd_flag"
MORE = [
    _on("column_values_to_be_null", column="congestion_surcharge", mostly=0.5),
    _on("column_values_to_not_be_in_set", column="payment_type", value_set=[0, 5]),
    _on("column_values_to_not_match_regex", column=FLAG, regex="Y"),
    _on("column_values_to_match_regex_list", column=FLAG, regex_list=["^Y$", "^N$"], match_on="any"),
    _on("column_values_to_not_match_regex_list", column=FLAG, regex_list=["x", "Y"]),
    _on("column_value_lengths_to_be_between", column=FLAG, min_value=1, max_value=1),
    _on("column_values_to_be_unique", column="total_amount", mostly=0.1),
    _on("column_pair_values_to_be_equal", column_A="pickup_location_id", column_B="dropoff_location_id", mostly=0.05),
    _on("column_min_to_be_between", column="fare_amount", min_value=0),
    _on("column_max_to_be_between", column="trip_distance", max_value=100, strict_max=True),
    _on("column_sum_to_be_between", column="tip_amount", min_value=0, strict_min=True),
    _on("column_unique_value_count_to_be_between", column="payment_type", max_value=4),
    _on("column_proportion_of_non_null_values_to_be_between", column="passenger_count", min_value=0.99),
    _on("table_row_count_to_equal", value=10_000),
    _on("table_column_count_to_be_between", min_value=5),
    _on("table_column_count_to_equal", value=19),
]  # fmt: skip


def test_every_month(shared_data: Path) -> None:
    suite = [*SUITE, *MORE]
    assert {item["type"] for item in suite} == set(COVERED)
    raw = pl.read_parquet(shared_data / "nyc_taxi_raw.parquet")
    months = raw.partition_by("file_month", maintain_order=True)
    assert len(months) == 36
    judged = [require_same(rows.drop("file_month"), suite) for rows in months]
    assert all(kinds == [item["type"] for item in suite] for kinds in judged)
