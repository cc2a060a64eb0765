"""The lowest and the highest value of a column, by what the log says of each file; only files are read that it does not settle."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from airflow_mlops.integrations.delta.tables import scan

if TYPE_CHECKING:
    import polars as pl
    from deltalake import DeltaTable

#: The log has times in milliseconds, whichever way a writer rounds: two files' may be off by one each.
_ROUNDED = timedelta(milliseconds=2)
#: What a table's readers have to know that changes nothing about what the log says of files.
_HARMLESS = frozenset({"timestampNtz"})


def find_extremes(table: DeltaTable, column: str) -> tuple[Any, Any]:
    """Find the lowest and the highest value of a version's column; ``None`` where it has no value."""
    import polars as pl
    from polars.selectors import by_name

    told = _told_by_file(table, column)
    if told is None:
        rows = scan(table).select(by_name(column).min().alias("low"), by_name(column).max().alias("high"))
        low, high = rows.collect(engine="streaming").row(0)
        return low, high
    known = told.filter(told["low"].is_not_null() & told["high"].is_not_null())
    unknown = told.filter(told["low"].is_null() | told["high"].is_null())
    lows: list[Any] = []
    highs: list[Any] = []
    if known.height and not isinstance(known.schema["low"], pl.Datetime):
        lows, highs = [known["low"].min()], [known["high"].max()]
    elif known.height:
        first: Any = known["low"].min()
        last: Any = known["high"].max()
        near = (known["low"] - first <= _ROUNDED) | (last - known["high"] <= _ROUNDED)
        unknown = unknown.vstack(known.filter(near))
    for low, high in _read(table, column, set(unknown["path"])):
        lows.append(low)
        highs.append(high)
    there = [(low, high) for low, high in zip(lows, highs, strict=True) if low is not None]
    if not there:
        return None, None
    return min(low for low, _ in there), max(high for _, high in there)


def _told_by_file(table: DeltaTable, column: str) -> pl.DataFrame | None:
    """Give path, lowest and highest value of each file with a value; ``None`` where the log does not have them as they are.

    Texts are cut off there, and floats and decimals are rounded.
    """
    import polars as pl

    dtype = scan(table).collect_schema()[column]
    features = {*(table.protocol().reader_features or ())}
    if not (dtype.is_integer() or isinstance(dtype, (pl.Date, pl.Datetime))) or features - _HARMLESS:
        return None
    actions = pl.DataFrame(table.get_add_actions())
    parts = {"low": "min", "high": "max", "nulls": "null_count"}
    if not all(
        isinstance(kind := actions.schema.get(part), pl.Struct)
        and column in {one.name for one in kind.fields}
        for part in parts.values()
    ):
        return None  # also of a column whose values name folders
    told = actions.select(
        "path",
        pl.col("num_records"),
        # Not by struct.field(), which takes a name such as ^a$ for a pattern.
        *(actions[part].struct.unnest()[column].alias(name) for name, part in parts.items()),
    )
    if told.schema["low"] != dtype or told.schema["high"] != dtype:
        return None
    empty = (told["nulls"] == told["num_records"]).fill_null(value=False)
    return told.filter(~empty).select("path", "low", "high")


def _read(table: DeltaTable, column: str, files: set[str]) -> list[tuple[Any, Any]]:
    """Read the column of some files."""
    import pyarrow.compute as pc

    if not files:
        return []
    dataset = table.to_pyarrow_dataset()
    wanted = {unquote(file) for file in files}
    found = []
    for fragment in dataset.get_fragments():
        if fragment.path not in wanted:
            continue
        for batch in fragment.to_batches(
            schema=dataset.schema, columns=[column], batch_readahead=2, fragment_readahead=1
        ):
            both = pc.min_max(batch.column(0)).as_py()
            found.append((both["min"], both["max"]))
    return found
