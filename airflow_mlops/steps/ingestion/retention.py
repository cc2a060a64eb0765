"""Retention: old rows leave a table, and files of old versions the disk."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from airflow_mlops.core.data.dataset import VersionInUse
from airflow_mlops.integrations import delta

if TYPE_CHECKING:
    from airflow_mlops.core.windows import Window

#: Less could take files away from under whoever reads or writes; it is Delta's own limit.
MIN_VACUUM_DAYS = 7


@dataclass(frozen=True, kw_only=True, slots=True)
class Retention:
    """What is kept.

    :param drop_before: rows with an earlier time are dropped; naive times are UTC. Default none.
    :param vacuum_days: files that have been in no version for so many days are deleted; default never.
    :param in_use: versions of the table that models learned from which are in use.
    :param keep_in_use: leave the files of these.
    """

    drop_before: datetime | None = None
    vacuum_days: float | None = None
    in_use: tuple[VersionInUse, ...] = ()
    keep_in_use: bool = True

    @property
    def first(self) -> datetime | None:
        """The first instant that is kept, in UTC."""
        if self.drop_before is None or self.drop_before.tzinfo is not None:
            return self.drop_before
        return self.drop_before.replace(tzinfo=UTC)

    def require_arguments(self, *, time_column: str | None, window: Window | None) -> None:
        """Check that it can be meant so.

        :raises ValueError: saying why it can't.
        """
        if self.vacuum_days is not None and not math.isfinite(self.vacuum_days):
            raise ValueError(f"vacuum_days is {self.vacuum_days:g}: give a number of days, or leave it out")
        if self.vacuum_days is not None and self.vacuum_days < MIN_VACUUM_DAYS:
            raise ValueError(
                f"vacuum_days is {self.vacuum_days:g}, at least {MIN_VACUUM_DAYS} are needed: "
                "less could delete files that somebody is reading or about to commit"
            )
        if self.first is None:
            return
        if time_column is None:
            raise ValueError("drop_before needs time_column, which says how old a row is")
        if window is not None and window.start < self.first:
            raise ValueError(
                f"drop_before {self.first.isoformat()} would drop rows of window {window}, which is being ingested"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RetentionReport:
    """What was taken away.

    :param dropped_rows: rows that were too old.
    :param vacuumed_files: files of old versions that were deleted.
    :param kept: versions in use whose files were old enough, and left.
    :param lost: versions in use that can't be read any more, as such files were deleted.
    """

    dropped_rows: int = 0
    vacuumed_files: int = 0
    kept: tuple[VersionInUse, ...] = ()
    lost: tuple[VersionInUse, ...] = ()


def retain(table: str, retention: Retention, *, time_column: str | None) -> RetentionReport:
    """Drop old rows in one commit, then delete files; done again, there is nothing to do.

    :raises InsufficientDataError: no row would be left.
    :raises CommitConflictError: another write changed the same rows meanwhile; nothing was dropped.
    """
    dropped = 0
    if retention.first is not None and time_column is not None:
        marks = delta.reached_marks(delta.TableWriter(table))
        dropped = delta.drop_before(table, retention.first, time_column=time_column, marks=marks)
    if retention.vacuum_days is None:
        return RetentionReport(dropped_rows=dropped)
    used = [item.dataset_version for item in retention.in_use]
    vacuumed, due = delta.vacuum(table, days=retention.vacuum_days, used=used, keep=retention.keep_in_use)
    needed = tuple(item for item in retention.in_use if item.dataset_version in due)
    return RetentionReport(
        dropped_rows=dropped,
        vacuumed_files=vacuumed,
        kept=needed if retention.keep_in_use else (),
        lost=() if retention.keep_in_use else needed,
    )
