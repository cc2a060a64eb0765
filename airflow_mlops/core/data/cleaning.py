"""What is done to rows before anything is written: rows and columns left out, values hashed, one row kept per key."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from airflow_mlops.exceptions import ConnectionConfigError, SchemaMismatchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import polars as pl

#: Characters of a key at least: a short one is found by trying.
MIN_HASH_KEY = 32
#: Parts of polars' expressions of which a value depends on other rows, and those that hold a name or text.
_OF_SEVERAL_ROWS = frozenset(
    {"Agg", "Over", "Rank", "Shift", "Quantile", "Correlation", "SubPlan", "Explode"}
)
_NAMES = frozenset({"Column", "String"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Cleaning:
    """What becomes of the rows of a source, in this order.

    :param keep_where: condition in polars' SQL, such as ``fare > 0 AND city IS NOT NULL``; rows for which it is not true are left out.
    :param deduplicate_by: columns that together name a row; of rows with the same values one is kept.
    :param deduplicate_order: columns that say which one, of rows that differ; without any, rows that differ are an error.
    :param deduplicate_keep: the row that is ``last`` by these columns, or ``first``; null is never chosen over a value.
    :param drop_columns: columns that are not written.
    :param hash_columns: columns of which an HMAC-SHA256 of the value is written, 64 hexadecimal digits; null stays null.
    """

    keep_where: str | None = None
    deduplicate_by: tuple[str, ...] = ()
    deduplicate_order: tuple[str, ...] = ()
    deduplicate_keep: Literal["last", "first"] = "last"
    drop_columns: tuple[str, ...] = ()
    hash_columns: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """Columns that a source must have: a misspelt or renamed one must not be written as it is."""
        return [*self.deduplicate_by, *self.deduplicate_order, *self.drop_columns, *self.hash_columns]

    @property
    def hides(self) -> bool:
        """Whether the source has values that nobody is to see, in a message either."""
        return bool(self.drop_columns or self.hash_columns)

    def require_kept(self, needed: Sequence[str], *, as_they_are: Sequence[str | None]) -> None:
        """Check that what is needed later is still there then.

        :param needed: columns of the table that something else is told by.
        :param as_they_are: of these the ones whose order matters, so they can't be hashed.
        :raises ValueError: naming the column.
        """
        for name in self.drop_columns:
            if name in needed or name in self.hash_columns:
                raise ValueError(
                    f"column {name!r} is in drop_columns and is needed elsewhere: take it out of one of them"
                )
        for name in self.hash_columns:
            if name in as_they_are:
                raise ValueError(
                    f"column {name!r} is in hash_columns and orders or parts the rows: it has to be written as it is"
                )
        if self.deduplicate_order and not self.deduplicate_by:
            raise ValueError("deduplicate_order needs deduplicate_by: the columns that together name a row")


@dataclass(frozen=True, kw_only=True, slots=True)
class CleaningReport:
    """What was done.

    :param left_out: rows for which ``keep_where`` was not true.
    :param equal_rows: rows left out that are the same, in what is written, as the one that was kept of their key.
    :param differing_rows: rows left out that differ from it.
    :param dropped_columns: columns that were not written.
    :param hashed_columns: columns of which hashes were written.
    :param hash_key_id: tells one key from another and tells nothing else of it; ``None`` without ``hashed_columns``.
    """

    left_out: int = 0
    equal_rows: int = 0
    differing_rows: int = 0
    dropped_columns: tuple[str, ...] = ()
    hashed_columns: tuple[str, ...] = ()
    hash_key_id: str | None = None


def keep_condition(condition: str) -> pl.Expr:
    """Read ``keep_where``.

    :raises ValueError: it is no condition, or one that looks at other rows as well.
    """
    import polars as pl

    try:
        expression = pl.sql_expr(condition)
    except pl.exceptions.PolarsError as err:
        raise ValueError(f"keep_where {condition!r} is no condition in polars' SQL: {err}") from err
    if _looks_around(json.loads(expression.meta.serialize(format="json"))):
        raise ValueError(
            f"keep_where {condition!r} looks at more than the row it is about, and rows come a batch at a time: "
            "leave out aggregates such as avg() and count(), OVER and subqueries"
        )
    return expression.fill_null(value=False)


def _looks_around(part: Any) -> bool:
    """Tell whether a part of an expression, as polars writes it down, takes its value from several rows."""
    if isinstance(part, dict):
        return any(
            name in _OF_SEVERAL_ROWS or (name not in _NAMES and _looks_around(value))
            for name, value in part.items()
        )
    if isinstance(part, list):
        return any(map(_looks_around, part))
    return isinstance(part, str) and part == "Len"


class ValueHasher:
    """Keyed hashes of values: the same value has the same one, whatever the column, file or type.

    What is hashed is a text: whole numbers in digits (5, 5.0 and "5" are one value), other floats as Python writes them,
    instants as ``2024-01-31T12:00:00.000000Z`` (without a zone they are UTC), dates as ``2024-01-31``, Booleans as ``true`` and ``false``,
    text and bytes as they are.

    :param key: a secret of at least :data:`MIN_HASH_KEY` characters.
    :raises ConnectionConfigError: it is shorter.
    """

    def __init__(self, key: str) -> None:
        if len(key.strip()) < MIN_HASH_KEY:
            raise ConnectionConfigError(
                f"the key for hashes has {len(key.strip())} characters, at least {MIN_HASH_KEY} are needed: "
                "make one with `openssl rand -hex 32`"
            )
        self._key = key.strip().encode()

    @property
    def key_id(self) -> str:
        """Name of the key, which is itself a hash made with it."""
        return self._digest(b"airflow-mlops hash key id")[:15]

    def hash_values(self, values: pl.Series) -> pl.Series:
        """Give the hashes as text; null, and NaN, which is no value either, is null.

        :raises SchemaMismatchError: values of such a type have no text of their own, such as lists.

        >>> import polars as pl
        >>> hashes = ValueHasher("k" * 32).hash_values(pl.Series("n", [5, None, 5]))
        >>> hashes[0] == hashes[2], hashes[1], len(hashes[0])
        (True, None, 64)
        """
        import polars as pl

        texts = _texts(values).to_list()
        hashes = {
            text: self._digest(text if isinstance(text, bytes) else text.encode())
            for text in set(texts)
            if text is not None
        }
        return pl.Series(values.name, list(map(hashes.get, texts)), dtype=pl.String)

    def _digest(self, message: bytes) -> str:
        return hmac.digest(self._key, message, hashlib.sha256).hex()


def _texts(values: pl.Series) -> pl.Series:
    import polars as pl

    dtype = values.dtype
    if dtype.is_float():
        texts = [
            None
            if value is None or value != value
            else str(int(value))
            if value.is_integer()
            else repr(value)
            for value in values.to_list()
        ]
        return pl.Series(values.name, texts, dtype=pl.String)
    if isinstance(dtype, pl.Decimal):
        return values.cast(pl.String).str.replace(r"(\.\d*?)0+$", "$1").str.strip_chars_end(".")
    if isinstance(dtype, pl.Datetime):
        return (
            values.dt.cast_time_unit("us").dt.replace_time_zone(None).dt.strftime("%Y-%m-%dT%H:%M:%S%.6fZ")
            if (dtype.time_zone is None)
            else _texts(values.dt.convert_time_zone("UTC").dt.replace_time_zone(None))
        )
    plain = (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Date, pl.Null)
    if dtype.is_integer() or isinstance(dtype, plain):
        return values.cast(pl.String)
    if dtype == pl.Binary:
        return values
    raise SchemaMismatchError(
        f"column {values.name!r} is {dtype}, of which no hash is defined; drop it (drop_columns), or make a text of it at the source"
    )


class KeptRows:
    """Which row is kept of each key that comes more than once; memory goes with the number of such keys.

    :param cleaning: its ``deduplicate_...`` fields.
    :param written: columns that make two rows equal or different.
    """

    def __init__(self, cleaning: Cleaning, written: Sequence[str]) -> None:
        self._by = list(cleaning.deduplicate_by)
        self._order = [f"\0order{number}" for number, _ in enumerate(cleaning.deduplicate_order)]
        self._order_columns = dict(zip(self._order, cleaning.deduplicate_order, strict=True))
        self._last = cleaning.deduplicate_keep == "last"
        self._written = list(written)
        self._best: pl.DataFrame | None = None
        self._waiting: list[pl.DataFrame] = []

    def add(self, rows: pl.DataFrame) -> None:
        """Take note of rows whose keys may come more than once."""
        import polars as pl

        told = rows.select(
            *self._by,
            *(_orderable(rows[column]).alias(name) for name, column in self._order_columns.items()),
            *self._content(rows),
            pl.lit(value=False).alias("\0tie"),
        )
        self._waiting.append(told)
        known = 0 if self._best is None else self._best.height
        if sum(frame.height for frame in self._waiting) > max(known, 65_536):
            self._settle()

    def settle(self) -> pl.DataFrame:
        """Give the keys, which row each has, and whether rows that differ are equally good (column ``tie``)."""
        import polars as pl

        self._settle()
        assert self._best is not None  # noqa: S101 - there are suspects
        return self._best.select(*self._by, "\0one", "\0two", "\0tie").with_columns(
            pl.int_range(pl.len(), dtype=pl.Int64).alias("\0number")
        )

    def choose(self, rows: pl.DataFrame, best: pl.DataFrame, given: Counter[str], done: Any) -> pl.Series:
        """Tell which of the rows are kept.

        :param rows: with keys that may come more than once.
        :param best: what :meth:`settle` gave.
        :param given: rows left out are counted here.
        :param done: one flag for each of ``best``: its row has been given.
        """
        import polars as pl

        told = rows.select(*self._by, *self._content(rows)).join(
            best, on=self._by, how="left", maintain_order="left", suffix="\0best"
        )
        told = told.with_columns(
            ((pl.col("\0one") == pl.col("\0one\0best")) & (pl.col("\0two") == pl.col("\0two\0best"))).alias(
                "\0same"
            )
        )
        numbers = told["\0number"].fill_null(0)
        first = told.select(
            pl.col("\0same").fill_null(value=False) & pl.struct("\0number", "\0same").is_first_distinct()
        ).to_series()
        kept = first & ~pl.Series(done[numbers.to_numpy()])
        done[numbers.filter(kept).to_numpy()] = True
        given["equal"] += int((told["\0same"].fill_null(value=False) & ~kept).sum())
        given["differing"] += int((~told["\0same"].fill_null(value=True)).sum())
        given["unknown"] += told["\0number"].null_count()
        return kept

    def _content(self, rows: pl.DataFrame) -> list[pl.Series]:
        written = rows.select(self._written)
        return [written.hash_rows(seed=1).alias("\0one"), written.hash_rows(seed=2).alias("\0two")]

    def _settle(self) -> None:
        import polars as pl

        known = [] if self._best is None else [self._best]
        rows = pl.concat([*known, *self._waiting])
        self._waiting = []
        if self._order:
            rows = rows.sort(self._order, descending=self._last, nulls_last=True, maintain_order=True)
        best = pl.all_horizontal(
            pl.lit(value=True), *(pl.col(name).eq_missing(pl.col(name).first()) for name in self._order)
        )
        self._best = rows.group_by(self._by, maintain_order=True).agg(
            *(pl.col(name).first() for name in self._order),
            pl.col("\0one").first(),
            pl.col("\0two").first(),
            (
                (pl.col("\0tie") & best).any() | (pl.struct("\0one", "\0two").filter(best).n_unique() > 1)
            ).alias("\0tie"),
        )


def _orderable(values: pl.Series) -> pl.Series:
    """Give values of which null is the only one that has no order."""
    return values.fill_nan(None) if values.dtype.is_float() else values
