"""A site's own expectations: classes of Great Expectations, which a suite names like any other.

``ValidateDatasetOperator(expectation_modules=["site_expectations"])`` imports this module where the suite is judged.
"""

from __future__ import annotations

# [START site_expectations]
from typing import Any, ClassVar

import polars as pl
from great_expectations.execution_engine import PandasExecutionEngine
from great_expectations.expectations.expectation import ColumnAggregateExpectation, ColumnMapExpectation
from great_expectations.expectations.metrics.column_aggregate_metric_provider import (
    ColumnAggregateMetricProvider,
    column_aggregate_value,
)
from great_expectations.expectations.metrics.map_metric_provider import (
    ColumnMapMetricProvider,
    column_condition_partial,
)


class ColumnValuesWholeCents(ColumnMapMetricProvider):
    """Tell of each amount whether it is whole cents: the rows that are not can be set aside."""

    condition_metric_name = "column_values.whole_cents"

    @column_condition_partial(engine=PandasExecutionEngine)
    def _pandas(cls, column: Any, **kwargs: Any) -> Any:  # noqa: N805
        return (column * 100 - (column * 100).round()).abs() < 1e-6


class ExpectColumnValuesToBeWholeCents(ColumnMapExpectation):
    """Expect amounts of money without fractions of a cent."""

    map_metric = "column_values.whole_cents"
    success_keys = ("mostly",)


class ColumnLargestShare(ColumnAggregateMetricProvider):
    """Count how large a share of the rows has the most frequent value, in polars."""

    metric_name = "column.largest_share"

    @column_aggregate_value(engine=PandasExecutionEngine)
    def _pandas(cls, column: Any, **kwargs: Any) -> float:  # noqa: N805
        values = pl.from_pandas(column)
        return float(values.value_counts()["count"].max() or 0) / max(len(values), 1)


class ExpectColumnLargestShareToBeBetween(ColumnAggregateExpectation):
    """Expect no value to be too frequent: a meter that is stuck repeats itself."""

    min_value: float | None = None
    max_value: float | None = None
    metric_dependencies = ("column.largest_share",)
    success_keys: ClassVar[tuple[str, ...]] = ("min_value", "max_value")

    def _validate(self, metrics: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        observed = metrics["column.largest_share"]
        above = self.min_value is None or observed >= self.min_value
        below = self.max_value is None or observed <= self.max_value
        return {"success": above and below, "result": {"observed_value": observed}}


# [END site_expectations]
