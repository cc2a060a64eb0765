"""The rows that Great Expectations finds wrong, by their id: positions in its copy are no rows of a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.core.data.dataset import row_count
from airflow_mlops.integrations import great_expectations

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import polars as pl

#: Of rows that share what they may not share, none is the wrong one.
_NOT_ROW_BY_ROW = frozenset({"expect_column_values_to_be_unique", "expect_compound_columns_to_be_unique"})


def rows_by_name(
    rows: pl.LazyFrame,
    suite: Mapping[str, Any],
    failed: Sequence[int],
    *,
    id_column: str,
    modules: Sequence[str],
) -> dict[int, pl.Expr]:
    """Give what is true on the rows that break an expectation, by its position in the suite.

    :param failed: positions of what Great Expectations judged.
    :param id_column: names the rows.
    :param modules: modules with expectations of one's own.
    :returns: nothing for an expectation that is not about single rows, or where ``id_column`` does not name each row.
    """
    import polars as pl

    asked = [index for index in failed if suite["expectations"][index]["type"] not in _NOT_ROW_BY_ROW]
    if not asked or not _names_every_row(rows, id_column):
        return {}
    found = great_expectations.unexpected_ids(
        rows,
        suite,
        [suite["expectations"][index] for index in asked],
        id_column=id_column,
        modules=modules,
    )
    dtype = rows.collect_schema()[id_column]
    return {
        index: pl.col(id_column).is_in(pl.Series(ids, dtype=dtype).implode())
        for index, ids in zip(asked, found, strict=True)
        if ids is not None
    }


def _names_every_row(rows: pl.LazyFrame, column: str) -> bool:
    """Tell whether a column is a text or whole number that no two rows share."""
    import polars as pl

    dtype = rows.collect_schema()[column]
    if not (dtype == pl.String or dtype.is_integer()):
        return False
    name = pl.col(column)
    counted = rows.select(nulls=name.null_count(), rows=row_count(), names=name.n_unique())
    nulls, count, distinct = counted.collect(engine="streaming").row(0)
    return bool(nulls == 0 and distinct == count)
