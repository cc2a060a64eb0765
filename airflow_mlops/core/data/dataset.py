"""Dataset versions: what a table held, addressed so that it can be read again and compared."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import polars as pl


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetVersion:
    """One immutable version of a Delta table.

    :param uri: table URI.
    :param version: Delta version number.
    :param dataset_digest: order-independent content digest (``sha256:`` + hex), the same for the same rows.
    :param row_count: rows in this version.
    :param columns: column name to Arrow type name.
    :param time_column: column that places a row in a window; ``None`` when there is none.
    :param time_min: smallest value of ``time_column``; ``None`` when there are no rows.
    :param time_max: largest value of ``time_column``.
    """

    uri: str
    version: int
    dataset_digest: str
    row_count: int
    columns: dict[str, str]
    time_column: str | None = None
    time_min: datetime | None = None
    time_max: datetime | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class PastDataset:
    """A table as it was.

    :param uri: table URI.
    :param as_of: a version number, or an instant in ISO 8601 (naive: UTC), which stands for the newest version not after it.
    """

    uri: str
    as_of: str


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionInUse:
    """A version of a table that a model learned from which is in use.

    :param alias: what the model version is: ``champion``, ``previous``, ``challenger``.
    :param dataset_uri: table URI.
    :param dataset_version: Delta version number.
    """

    model_name: str
    model_version: str
    alias: str
    dataset_uri: str
    dataset_version: int

    def __str__(self) -> str:
        return (
            f"version {self.dataset_version}, from which version {self.model_version} of {self.model_name} "
            f"({self.alias}) learned"
        )


def row_count() -> pl.Expr:
    """Count rows, by their first column.

    ``pl.len()`` asks for no column, and then polars' way by pyarrow, which tables whose path has a blank take, finds no rows.
    """
    import polars as pl

    return pl.first().count().cast(pl.Int64) + pl.first().null_count()


def count_rows(frame: pl.LazyFrame) -> int:
    """Count rows without loading them."""
    return int(frame.select(row_count()).collect(engine="streaming").item())
