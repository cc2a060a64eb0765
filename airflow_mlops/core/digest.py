"""Content digest of a table: the same for the same rows in any order, computed in one vectorized pass."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

UInt64Array = NDArray[np.uint64]

_NULL = np.uint64(0x9E3779B97F4A7C15)
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
        self._lanes = [np.uint64(0), np.uint64(0)]

    def update(self, rows: Mapping[str, Sequence[Any] | NDArray[Any]]) -> None:
        """Add a batch.

        :param rows: one array per column, all of one length: numbers, booleans, ``datetime64`` or objects of
            ``str``/``None``; NaN and ``None`` count as null.
        """
        hashed = [_hash_column(np.asarray(rows[name])) for name in self.columns]
        count = len(hashed[0]) if hashed else 0
        for lane, seed in enumerate(_LANES):
            row = np.full(count, seed, dtype=np.uint64)
            for column in hashed:
                row = _mix(row ^ column)
            self._lanes[lane] = np.add(self._lanes[lane], row.sum(dtype=np.uint64), dtype=np.uint64)
        self.row_count += count

    def hexdigest(self) -> str:
        """Give ``sha256:`` and the digest in hexadecimal."""
        lanes = ",".join(str(int(lane)) for lane in self._lanes)
        text = f"rows-v1;{self.columns};{self.row_count};{lanes}"
        return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def _mix(value: UInt64Array) -> UInt64Array:
    """Spread every bit over the word.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014 (SplitMix64 finalizer).
    """
    with np.errstate(over="ignore"):
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed: UInt64Array = value ^ (value >> np.uint64(31))
    return mixed


def _hash_column(values: NDArray[Any]) -> UInt64Array:
    kind = values.dtype.kind
    if kind == "f":
        # Adding zero turns -0.0 into 0.0: equal values must hash alike.
        bits = (values.astype(np.float64) + 0.0).view(np.uint64)
        return np.where(np.isnan(values), _NULL, _mix(bits))
    if kind == "M":
        stamps = values.astype("datetime64[us]")
        return np.where(np.isnat(stamps), _NULL, _mix(stamps.view(np.uint64)))
    if kind in "iub":
        return _mix(values.astype(np.int64).view(np.uint64))
    # Text: hash each distinct value once, then look the rows up.
    distinct = {value: _hash_text(value) for value in set(values.tolist())}
    return np.fromiter((distinct[value] for value in values.tolist()), dtype=np.uint64, count=len(values))


def _hash_text(value: Any) -> int:
    if value is None:
        return int(_NULL)
    return int.from_bytes(hashlib.blake2b(str(value).encode(), digest_size=8).digest(), "little")
