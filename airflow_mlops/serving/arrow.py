"""Requests and answers as Arrow streams, for callers who have tables."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.data.categories import category_texts
from airflow_mlops.serving.arrow_stream import unpacked_size
from airflow_mlops.serving.requests import MAXIMUM_ID, PredictionRequest, RequestError, require_unique

if TYPE_CHECKING:
    import polars as pl

    from airflow_mlops.core.model.signature import FieldSpec, ModelSignature

CONTENT_TYPE = b"application/vnd.apache.arrow.stream"

#: Columns that are no inputs, unless the model has inputs of these names.
ID_COLUMN = "prediction_id"
TIME_COLUMN = "time"


def is_arrow(content_type: bytes | None) -> bool:
    """Tell whether a body is a table, by its ``Content-Type``."""
    return content_type == CONTENT_TYPE or (content_type is not None and _name(content_type) == CONTENT_TYPE)


def wants_arrow(accept: bytes | None) -> bool:
    """Tell whether a caller wants a table, by his ``Accept``: he names it, and does not like JSON better.

    >>> wants_arrow(b"application/vnd.apache.arrow.stream, application/json;q=0.5"), wants_arrow(b"*/*")
    (True, False)
    """
    if accept is None or b"arrow" not in accept.lower():
        return False
    liked = {_name(one): _quality(one) for one in accept.split(b",")}
    return liked.get(CONTENT_TYPE, 0.0) > 0.0 and liked[CONTENT_TYPE] >= liked.get(b"application/json", 0.0)


def _name(media_type: bytes) -> bytes:
    return media_type.partition(b";")[0].strip().lower()


def _quality(media_type: bytes) -> float:
    found = re.search(rb";\s*q\s*=\s*([01](?:\.\d*)?)", media_type, re.IGNORECASE)
    return float(found[1]) if found else 1.0


def decode_arrow(
    data: bytes, signature: ModelSignature, maximum_rows: int, maximum_bytes: int
) -> PredictionRequest:
    """Read a table.

    :param maximum_bytes: of the table once it is unpacked, and of its texts: a small body can hold a large table.
    :raises RequestError: it is none, does not fit the signature, has too many rows, or is too large.
    """
    from polars.exceptions import PanicException

    _require_size(data, maximum_rows, maximum_bytes)
    try:
        return _decode(data, signature, maximum_rows, maximum_bytes)
    except PanicException as err:  # of damaged streams; no Exception, so nobody else would catch it
        raise RequestError(422, f"the body is not an Arrow stream: {err!s:.200}") from err


def _decode(
    data: bytes, signature: ModelSignature, maximum_rows: int, maximum_bytes: int
) -> PredictionRequest:
    import polars as pl

    try:
        table = pl.read_ipc_stream(io.BytesIO(data), use_pyarrow=False)
    except Exception as err:  # what is no Arrow fails anywhere inside
        raise RequestError(422, f"the body is not an Arrow stream: {err!s:.200}") from err
    _require_rows(table.height, maximum_rows)
    left = maximum_bytes
    for field in signature.inputs:
        left -= _text_bytes(table, field)
        if left < 0:
            raise RequestError(413, f"more than {maximum_bytes} bytes of text in one request")
    columns = {field.name: _column(table, field) for field in signature.inputs}
    extra = set(table.columns) - set(signature.names)
    return PredictionRequest(
        columns,
        table.height,
        _ids(table[ID_COLUMN]) if ID_COLUMN in extra else None,
        _times(table[TIME_COLUMN]) if TIME_COLUMN in extra else None,
    )


def _require_size(data: bytes, maximum_rows: int, maximum_bytes: int) -> None:
    """Refuse what would be too large, before any of it is unpacked."""
    try:
        rows, size = unpacked_size(data)
    except ValueError as err:
        raise RequestError(422, f"the body is not an Arrow stream: {err}") from err
    _require_rows(rows, maximum_rows)
    if size > maximum_bytes:
        raise RequestError(413, f"{size} bytes when unpacked; at most {maximum_bytes} in one request")


def _require_rows(count: int, maximum_rows: int) -> None:
    if not 0 < count <= maximum_rows:
        status, what = (413, f"at most {maximum_rows}") if count else (422, "at least one row is needed")
        raise RequestError(status, f"{count} rows; {what} in one request")


def _text_bytes(table: pl.DataFrame, field: FieldSpec) -> int:
    """Measure a text input before it is written out: rows may share one text."""
    import polars as pl

    given = table[field.name] if field.type == "string" and field.name in table.columns else None
    if given is None:
        return 0
    if given.dtype in (pl.Categorical, pl.Enum):
        return int(given.cat.len_bytes().sum())
    return int(given.str.len_bytes().sum()) if given.dtype == pl.String else 0


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
        texts = (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Date, pl.Null)
        fits = given.dtype.is_numeric() or given.dtype in texts
    if not fits:
        raise RequestError(422, f"{field.name}: expected {field.type}, got {given.dtype}")
    if given.dtype.is_float() and given.is_infinite().any():
        raise RequestError(422, f"{field.name}: expected {field.type}, got an infinite number")
    # NaN is a missing value, of either type.
    values = category_texts(given) if field.type == "string" else given.cast(pl.Float64).fill_nan(None)
    if values.null_count() and not field.nullable:
        raise RequestError(422, f"{field.name}: null is not allowed")
    return (values if field.type == "string" else values.fill_null(float("nan"))).to_list()


def _ids(given: pl.Series) -> list[str]:
    import polars as pl

    if given.dtype.is_integer() or given.dtype in (pl.Categorical, pl.Enum):  # as JSON's may be numbers
        given = given.cast(pl.String)
    if (
        given.dtype != pl.String
        or given.null_count()
        or not given.str.len_chars().is_between(1, MAXIMUM_ID).all()
    ):
        raise RequestError(422, f"{ID_COLUMN}: texts of 1 to {MAXIMUM_ID} characters are needed")
    ids: list[str] = given.to_list()
    require_unique(ids, ID_COLUMN)
    return ids


def _times(given: pl.Series) -> list[datetime]:
    import polars as pl

    if given.dtype != pl.Datetime or given.null_count():
        raise RequestError(422, f"{TIME_COLUMN}: times without gaps are needed, got {given.dtype}")
    try:
        instants = given.to_list()
        return [one.replace(tzinfo=UTC) if one.tzinfo is None else one.astimezone(UTC) for one in instants]
    except (ValueError, OverflowError) as err:
        raise RequestError(422, f"{TIME_COLUMN}: {err}") from err
