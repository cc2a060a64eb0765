"""Requests and answers as Arrow streams, for callers who have tables."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow_mlops.serving.requests import MAXIMUM_ID, PredictionRequest, RequestError

if TYPE_CHECKING:
    import polars as pl

    from airflow_mlops.core.signature import FieldSpec, ModelSignature

CONTENT_TYPE = b"application/vnd.apache.arrow.stream"

#: Columns that are no inputs, unless the model has inputs of these names.
ID_COLUMN = "prediction_id"
TIME_COLUMN = "time"


def decode_arrow(data: bytes, signature: ModelSignature, maximum_rows: int) -> PredictionRequest:
    """Read a table.

    :raises RequestError: it is none, does not fit the signature, or has too many rows.
    """
    import polars as pl

    try:
        table = pl.read_ipc_stream(io.BytesIO(data), use_pyarrow=False)
    except Exception as err:  # what is no Arrow fails anywhere inside
        raise RequestError(422, f"the body is not an Arrow stream: {err!s:.200}") from err
    if not 0 < table.height <= maximum_rows:
        status, what = (
            (413, f"at most {maximum_rows}") if table.height else (422, "at least one row is needed")
        )
        raise RequestError(status, f"{table.height} rows; {what} in one request")
    columns = {field.name: _column(table, field) for field in signature.inputs}
    extra = set(table.columns) - set(signature.names)
    return PredictionRequest(
        columns,
        table.height,
        _ids(table[ID_COLUMN]) if ID_COLUMN in extra else None,
        _times(table[TIME_COLUMN]) if TIME_COLUMN in extra else None,
    )


def encode_arrow(
    prediction_ids: Sequence[str], predictions: Sequence[Any], output: str = "prediction"
) -> bytes:
    """Write predictions as a table of two columns."""
    return encode_table({ID_COLUMN: prediction_ids, output: predictions})


def encode_table(columns: Mapping[str, Sequence[Any]]) -> bytes:
    """Write a table."""
    import polars as pl

    stream = io.BytesIO()
    table = pl.DataFrame({name: list(values) for name, values in columns.items()})
    # The plain string type, which every reader of Arrow knows.
    table.write_ipc_stream(stream, compat_level=pl.CompatLevel.oldest())
    return stream.getvalue()


def _column(table: pl.DataFrame, field: FieldSpec) -> list[Any]:
    import polars as pl

    if field.name not in table.columns:
        raise RequestError(422, f"{field.name}: column is missing ({field.type})")
    given = table[field.name]
    fits = given.dtype.is_numeric() or given.dtype in (pl.Boolean, pl.Null)
    if field.type == "string":
        fits = given.dtype.is_integer() or given.dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null)
    if not fits:
        raise RequestError(422, f"{field.name}: expected {field.type}, got {given.dtype}")
    if given.null_count() and not field.nullable:
        raise RequestError(422, f"{field.name}: null is not allowed")
    if field.type == "string":
        return given.cast(pl.String).to_list()
    numbers = given.cast(pl.Float64)
    if numbers.is_infinite().any():
        raise RequestError(422, f"{field.name}: expected number, got an infinite one")
    return numbers.fill_null(float("nan")).to_list()


def _ids(given: pl.Series) -> list[str]:
    import polars as pl

    if (
        given.dtype != pl.String
        or given.null_count()
        or not given.str.len_chars().is_between(1, MAXIMUM_ID).all()
    ):
        raise RequestError(422, f"{ID_COLUMN}: texts of 1 to {MAXIMUM_ID} characters are needed")
    return given.to_list()


def _times(given: pl.Series) -> list[datetime]:
    import polars as pl

    if given.dtype != pl.Datetime or given.null_count():
        raise RequestError(422, f"{TIME_COLUMN}: times without gaps are needed, got {given.dtype}")
    try:
        instants = given.to_list()
        return [one.replace(tzinfo=UTC) if one.tzinfo is None else one.astimezone(UTC) for one in instants]
    except (ValueError, OverflowError) as err:
        raise RequestError(422, f"{TIME_COLUMN}: {err}") from err
