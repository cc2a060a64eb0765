"""What several steps share: resolving a dataset, reading a window, keys of work."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.data.categories import category_texts
from airflow_mlops.core.data.dataset import DatasetVersion, PastDataset
from airflow_mlops.exceptions import InsufficientDataError, SchemaMismatchError
from airflow_mlops.integrations import delta

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import polars as pl

    from airflow_mlops.core.model.signature import ModelSignature
    from airflow_mlops.core.windows import Window

#: A dataset version as a former step returned it, a table as it was, or the URI of a table (its newest version is meant).
DatasetRef = DatasetVersion | PastDataset | str


def resolve_dataset(dataset: DatasetRef, *, time_column: str | None = None) -> DatasetVersion:
    """Turn a table into the version that is meant, with the digest of its rows; a version keeps its own.

    What was read for the digest of the newest version is kept in the table's folder, where that may be written to.

    :param time_column: whose first and last time are told; ``None``: that of the version, if it has one.

    :raises DatasetNotFoundError: no such table or version, or its files are gone.
    """
    if isinstance(dataset, str):
        return delta.describe(dataset, time_column=time_column, remember=True)
    return _resolve(dataset, time_column, delta.describe)


def pin_dataset(dataset: DatasetRef, *, time_column: str | None = None) -> DatasetVersion:
    """Like :func:`resolve_dataset`, with the digest of the list of files: no rows are read."""
    return _resolve(dataset, time_column, delta.describe_files)


def _resolve(
    dataset: DatasetRef, time_column: str | None, describe: Callable[..., DatasetVersion]
) -> DatasetVersion:
    if isinstance(dataset, str):
        return describe(dataset, time_column=time_column)
    if isinstance(dataset, PastDataset):
        version = delta.version_as_of(dataset.uri, dataset.as_of)
        return describe(dataset.uri, version=version, time_column=time_column)
    delta.require_readable(dataset.uri, dataset.version)
    return (
        dataset if time_column in {None, dataset.time_column} else delta.with_times(dataset, str(time_column))
    )


def read_rows(
    dataset: DatasetVersion, *, columns: Sequence[str], time_column: str | None, window: Window | None
) -> pl.DataFrame:
    """Read columns of a window of a dataset version.

    :raises InsufficientDataError: when the window holds no rows.
    """
    rows = delta.read_table(
        dataset.uri, version=dataset.version, columns=columns, window=window, time_column=time_column
    ).collect()
    if rows.height == 0:
        where = f"window {window} of " if window else ""
        raise InsufficientDataError(
            f"{where}{dataset.uri} (version {dataset.version}) has no rows; ingest the window first"
        )
    return rows


def work_key(step: str, *parts: object) -> str:
    """Digest of a step's inputs: equal work has an equal key, so a retry finds what is already done.

    >>> work_key("train", {"depth": 3, "rate": 0.1}) == work_key("train", {"rate": 0.1, "depth": 3})
    True
    """
    return hashlib.sha256(json.dumps([step, *parts], sort_keys=True, default=str).encode()).hexdigest()[:32]


def model_columns(rows: pl.DataFrame, signature: ModelSignature) -> dict[str, Any]:
    """Give table rows as a model takes them: numbers as float with NaN for missing, all else as text or ``None``.

    :raises SchemaMismatchError: a number is wanted where the table holds something else.
    """
    import polars as pl

    columns: dict[str, Any] = {}
    for field in signature.inputs:
        column = rows[field.name]
        if field.type == "string":
            columns[field.name] = category_texts(column).to_list()
        elif column.dtype.is_numeric() or column.dtype == pl.Boolean or column.null_count() == len(column):
            columns[field.name] = column.cast(float).to_numpy()
        else:
            raise SchemaMismatchError(
                f"column {field.name!r} holds {column.dtype}, the model takes a number there"
            )
    return columns


def with_target(rows: pl.DataFrame, target: str, *, where: str) -> pl.DataFrame:
    """Give the rows whose target is known.

    :param where: dataset and window, for the error.
    :raises InsufficientDataError: there are none.
    """
    known = with_float_target(rows.drop_nulls(target), target)
    if rows.schema[target].is_float():
        known = known.drop_nans(target)
    if known.height == 0:
        raise InsufficientDataError(
            f"none of the {rows.height} rows of {where} has a {target!r}: wait for the labels"
        )
    return known


def with_float_target(rows: pl.DataFrame, target: str) -> pl.DataFrame:
    """Give decimal targets as floats: estimators and metrics, a user's among them, compute with those."""
    import polars as pl

    if not rows.schema[target].is_decimal():
        return rows
    return rows.with_columns(pl.col(target).cast(pl.Float64))
