"""Content digest of a table: the same for the same rows in any order, computed in one vectorized pass, and additive."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Mapping

    import polars as pl

#: Which hashes are summed; sums of another format can't be added to.
FORMAT = "rows-v3"

UInt64Array = NDArray[np.uint64]

_ROUNDS = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
_LAST_SHIFT = np.uint64(31)
#: Rows hashed at a time: the scratch arrays stay in the processor's cache.
_BLOCK = 32_768
#: Hashes of texts kept for the next batch.
_KNOWN_TEXTS = 100_000
_LANES = (np.uint64(0x243F6A8885A308D3), np.uint64(0x13198A2E03707344))


@dataclass(frozen=True, slots=True)
class RowSum:
    """Sum of the hashes of some rows: those of two parts of a table add up to that of the table.

    :param row_count: how many rows.
    :param first: sum modulo 2^64.
    :param second: the same of other hashes.
    """

    row_count: int = 0
    first: int = 0
    second: int = 0

    def __add__(self, other: RowSum) -> RowSum:
        return RowSum(
            self.row_count + other.row_count,
            (self.first + other.first) % 2**64,
            (self.second + other.second) % 2**64,
        )

    def hexdigest(self, columns: Mapping[str, str]) -> str:
        """Give ``sha256:`` and the digest in hexadecimal.

        :param columns: of the table, with the name of their types.
        """
        text = f"{FORMAT};{dict(sorted(columns.items()))};{self.row_count};{self.first},{self.second}"
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


class RowDigest:
    """Accumulate an order-independent digest of rows.

    A row's hash is the sum of its values' hashes (64 bits), each seeded by the name of its column, mixed once more in two ways;
    rows are combined by addition modulo 2^64, which does not care about order and counts duplicates. A null adds nothing, so rows
    keep their hash when the table gets another column. The digest is sha256 over column names, types, row count and both sums.
    It finds accidental differences (two rows that differ have the same hash once in 2^64); it is no defense against someone who
    constructs a collision.

    NaN counts as null, -0.0 as 0.0. A number's hash is that of its value as 64-bit integer or float, whatever the width of its type.

    :param columns: column name to type name; part of the digest.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = dict(sorted(columns.items()))
        self.total = RowSum()
        self._texts: dict[Any, int] = {}

    def update(self, frame: pl.DataFrame) -> None:
        """Add a batch."""
        # Without its name: what polars does to a series called ^a$ it does to all columns that match.
        columns = [(_seed(name), *self._words(frame[name].alias(""))) for name in self.columns]
        size = min(frame.height, _BLOCK)
        word, scratch, row = (np.empty(size, np.uint64) for _ in range(3))
        sums = [0, 0]
        for start in range(0, frame.height, _BLOCK):
            length = min(_BLOCK, frame.height - start)
            block = slice(start, start + length)
            word, scratch, row = word[:length], scratch[:length], row[:length]
            row.fill(0)
            for seed, values, nulls in columns:
                np.bitwise_xor(values[block], seed, out=word)
                _mix(word, scratch)
                if nulls is not None:
                    word[nulls[block]] = 0
                np.add(row, word, out=row)
            for lane, constant in enumerate(_LANES):
                np.bitwise_xor(row, constant, out=word)
                _mix(word, scratch)
                sums[lane] += int(word.sum(dtype=np.uint64))
        self.total += RowSum(frame.height, *sums)

    def hexdigest(self) -> str:
        """Give ``sha256:`` and the digest in hexadecimal."""
        return self.total.hexdigest(self.columns)

    def _words(self, column: pl.Series) -> tuple[UInt64Array, NDArray[np.bool_] | None]:
        """Give a column as 64-bit words, and where its nulls are."""
        import polars as pl

        dtype = column.dtype
        nulls = column.is_null().to_numpy() if column.null_count() else None
        if dtype.is_float():
            # Adding zero turns -0.0 into 0.0: equal values must hash alike.
            numbers = column.cast(pl.Float64).to_numpy() + 0.0
            none = np.isnan(numbers)  # also what is null
            values, nulls = numbers.view(np.uint64), none if none.any() else None
        elif dtype.is_integer() or dtype == pl.Boolean or dtype.is_temporal():
            whole = column.dt.cast_time_unit("us") if isinstance(dtype, pl.Datetime | pl.Duration) else column
            whole = whole.to_physical().cast(pl.Int64).fill_null(0)
            values = np.ascontiguousarray(whole.to_numpy()).view(np.uint64)
        else:
            values = self._hash_texts(_texts(column))
        return values, nulls

    def _hash_texts(self, column: pl.Series) -> UInt64Array:
        """Hash each distinct text once."""
        import polars as pl

        distinct = column.unique()
        hashes = [
            self._texts[value] if value in self._texts else _hash_text(value) for value in distinct.to_list()
        ]
        if len(self._texts) + len(hashes) <= _KNOWN_TEXTS:
            self._texts.update(zip(distinct.to_list(), hashes, strict=True))
        words = column.replace_strict(distinct, pl.Series(hashes, dtype=pl.UInt64), return_dtype=pl.UInt64)
        found: UInt64Array = words.to_numpy()
        return found


def _texts(column: pl.Series) -> pl.Series:
    import polars as pl

    if column.dtype in (pl.String, pl.Categorical, pl.Enum) or column.dtype.is_decimal():
        return column.cast(pl.String)
    listed = [None if value is None else repr(value) for value in column.to_list()]
    return pl.Series(column.name, listed, dtype=pl.String)


def _mix(value: UInt64Array, scratch: UInt64Array) -> None:
    """Spread every bit over the word, in place.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64 finalizer).
    """
    for shift, factor in _ROUNDS:
        np.right_shift(value, shift, out=scratch)
        np.bitwise_xor(value, scratch, out=value)
        np.multiply(value, factor, out=value)
    np.right_shift(value, _LAST_SHIFT, out=scratch)
    np.bitwise_xor(value, scratch, out=value)


def _seed(name: str) -> np.uint64:
    return np.uint64(_hash_text(name))


def _hash_text(value: str | None) -> int:
    if value is None:
        return 0
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little")
