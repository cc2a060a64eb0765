"""Content digest of a table: the same for the same rows in any order, computed in one vectorized pass."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import polars as pl

UInt64Array = NDArray[np.uint64]

_ROUNDS = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
_LAST_SHIFT = np.uint64(31)
_NULL = np.uint64(0x9E3779B97F4A7C15)
#: Rows hashed at a time: the scratch arrays stay in the processor's cache.
_BLOCK = 8192
#: Hashes of texts kept for the next batch.
_KNOWN_TEXTS = 100_000
_LANES = (np.uint64(0x243F6A8885A308D3), np.uint64(0x13198A2E03707344))


class RowDigest:
    """Accumulate an order-independent digest of rows.

    Each row is hashed column by column (64 bits, two lanes); rows are combined by addition modulo 2^64, which
    does not care about order and counts duplicates. The digest is sha256 over column names, types, row count and both lanes.
    It finds accidental differences; it is no defense against someone who constructs a collision.

    :param columns: column name to type name; part of the digest, sorted by name.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = dict(sorted(columns.items()))
        self.row_count = 0
        self._lanes = [0, 0]
        self._texts: dict[Any, int] = {}

    def update(self, rows: Mapping[str, Sequence[Any] | NDArray[Any]]) -> None:
        """Add a batch.

        :param rows: one array per column, all of one length: numbers, booleans, ``datetime64`` or objects of
            ``str``/``None``; NaN and ``None`` count as null.
        """
        self._add([_words(np.asarray(rows[name])) for name in self.columns])

    def update_frame(self, frame: pl.DataFrame, *, with_nulls: frozenset[str] = frozenset()) -> None:
        """Add a batch of a table that is read in batches; the digest is that of the table as a whole.

        :param with_nulls: whole-number and Boolean columns that have a null anywhere in the table: numpy knows no null
            in them, so the whole column counts as another type, in the batches without one, too.
        """
        import polars as pl

        words = []
        for name in self.columns:
            column = frame[name]
            if column.dtype == pl.String:
                words.append(_Words(self._hash_texts(column), None, mixed=True))
                continue
            if name in with_nulls and column.dtype == pl.Boolean:
                words.append(_words(column.to_numpy().astype(object)))
            elif name in with_nulls:
                words.append(_words(column.cast(pl.Float64).to_numpy()))
            else:
                words.append(_words(column.to_numpy()))
        self._add(words)

    def hexdigest(self) -> str:
        """Give ``sha256:`` and the digest in hexadecimal."""
        lanes = ",".join(str(lane) for lane in self._lanes)
        text = f"rows-v1;{self.columns};{self.row_count};{lanes}"
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def _add(self, columns: list[_Words]) -> None:
        count = len(columns[0].values) if columns else 0
        size = min(count, _BLOCK)
        word, scratch = np.empty(size, np.uint64), np.empty(size, np.uint64)
        rows = [np.empty(size, np.uint64) for _ in _LANES]
        for start in range(0, count, _BLOCK):
            length = min(_BLOCK, count - start)
            block = slice(start, start + length)
            for row, seed in zip(rows, _LANES, strict=True):
                row.fill(seed)
            for column in columns:
                column.hash_into(word[:length], block, scratch[:length])
                for row in rows:
                    np.bitwise_xor(row[:length], word[:length], out=row[:length])
                    _mix(row[:length], scratch[:length])
            for lane, row in enumerate(rows):
                self._lanes[lane] = (self._lanes[lane] + int(row[:length].sum(dtype=np.uint64))) % 2**64
        self.row_count += count

    def _hash_texts(self, column: pl.Series) -> UInt64Array:
        """Do the same without a Python object per row."""
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


@dataclass(frozen=True, slots=True)
class _Words:
    """A column as 64-bit words, where its nulls are, and whether the words are hashes already."""

    values: UInt64Array
    nulls: NDArray[np.bool_] | None
    mixed: bool = False

    def hash_into(self, word: UInt64Array, block: slice, scratch: UInt64Array) -> None:
        np.copyto(word, self.values[block])
        if not self.mixed:
            _mix(word, scratch)
        if self.nulls is not None:
            word[self.nulls[block]] = _NULL


def _words(values: NDArray[Any]) -> _Words:
    kind = values.dtype.kind
    if kind == "f":
        # Adding zero turns -0.0 into 0.0: equal values must hash alike.
        return _Words((values.astype(np.float64, copy=False) + 0.0).view(np.uint64), _any(np.isnan(values)))
    if kind == "M":
        stamps = values.astype("datetime64[us]", copy=False)
        return _Words(np.ascontiguousarray(stamps).view(np.uint64), _any(np.isnat(stamps)))
    if kind in "iub":
        return _Words(np.ascontiguousarray(values.astype(np.int64, copy=False)).view(np.uint64), None)
    # Text: hash each distinct value once, then look the rows up.
    listed = values.tolist()
    distinct = {value: _hash_text(value) for value in set(listed)}
    hashes = np.fromiter((distinct[value] for value in listed), dtype=np.uint64, count=len(listed))
    return _Words(hashes, None, mixed=True)


def _any(nulls: NDArray[np.bool_]) -> NDArray[np.bool_] | None:
    return nulls if nulls.any() else None


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


def _hash_text(value: Any) -> int:
    if value is None:
        return int(_NULL)
    return int.from_bytes(hashlib.blake2b(str(value).encode(), digest_size=8).digest(), "little")
