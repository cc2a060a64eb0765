"""Windows of the ledger: which were checked and decided, and what was found in each."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from airflow_mlops.core.windows import Window
from airflow_mlops.ledger.appending import Entries, entry_of
from airflow_mlops.ledger.entries import EntryKind, LedgerEntry, WindowChecks
from airflow_mlops.ledger.tables import entries

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

#: What is found out about a window.
CHECKS = (str(EntryKind.PERFORMANCE_CHECK), str(EntryKind.DRIFT_CHECK))

#: Entries that are asked for by their number at once.
_AT_ONCE = 500


class Windows(Entries):
    """What is known of windows, and what is still to be decided."""

    def undecided_windows(
        self,
        model_name: str,
        *,
        required: Sequence[EntryKind] = (EntryKind.PERFORMANCE_CHECK,),
        checked_by: datetime | None = None,
        overdue_since: datetime | None = None,
    ) -> list[Window]:
        """List the windows whose required checks are all here and that no retraining decision covers, oldest first.

        This, not an event, is what a decider works from: an event that was lost, merged or sent twice changes nothing.

        :param checked_by: of those with all required checks only the ones whose first check is as old.
        :param overdue_since: a window whose first check is older than this is listed with whatever checks it has.
        """
        checks = entries.alias("checks")
        wanted = {str(kind) for kind in required}
        query = (
            sa.select(checks.c.window_start, checks.c.window_end)
            .where(
                checks.c.model_name == model_name,
                checks.c.kind.in_(wanted | set(CHECKS)),
                checks.c.window_start.is_not(None),
                ~decided(checks),
            )
            .group_by(checks.c.window_start, checks.c.window_end)
            .order_by(checks.c.window_start, checks.c.window_end)
        )
        first = sa.func.min(checks.c.recorded_at)
        present = sa.case((checks.c.kind.in_(wanted), checks.c.kind))
        complete = sa.func.count(sa.distinct(present)) == len(wanted)
        if checked_by is not None:
            complete = sa.and_(complete, first <= checked_by)
        overdue = first <= overdue_since if overdue_since else sa.false()
        return self._windows(query.having(sa.or_(complete, overdue)))

    def checked_windows(
        self,
        model_name: str,
        kinds: Sequence[EntryKind],
        *,
        ended_by: datetime | None = None,
        decided_from: datetime | None = None,
        limit: int,
    ) -> list[Window]:
        """List the newest windows that have one of these checks, oldest first.

        :param ended_by: only those that ended by then.
        :param decided_from: only those that started then or later, and were decided.
        :param limit: at most so many.
        """
        query = sa.select(entries.c.window_start, entries.c.window_end).where(
            entries.c.model_name == model_name,
            entries.c.kind.in_([str(kind) for kind in kinds]),
            entries.c.window_start.is_not(None),
        )
        if ended_by is not None:
            query = query.where(entries.c.window_end <= ended_by)
        if decided_from is not None:
            query = query.where(entries.c.window_start >= decided_from, decided(entries))
        newest = query.distinct().order_by(entries.c.window_start.desc(), entries.c.window_end.desc())
        return self._windows(newest.limit(limit))[::-1]

    def checks_of(
        self, model_name: str, windows: Sequence[Window], kinds: Sequence[EntryKind]
    ) -> dict[Window, WindowChecks]:
        """Give the checks of windows that stand, of each kind one; those without any are left out.

        However often a window was looked at, what is read is one entry per kind.
        """
        asked = set(windows)
        if not asked:
            return {}
        standing = standing_checks(
            entries.c.model_name == model_name,
            entries.c.kind.in_([str(kind) for kind in kinds]),
            entries.c.window_start.between(min(one.start for one in asked), max(one.start for one in asked)),
        )
        with self._reading() as connection:
            rows = [
                (window, row)
                for row in connection.execute(standing)
                if (window := Window(start=row.window_start, end=row.window_end)) in asked
            ]
        found = self._numbered([row.entry_id for _, row in rows])
        checks: dict[Window, WindowChecks] = {}
        for window, row in rows:
            before = checks.get(window)
            checks[window] = WindowChecks(
                window=window,
                checks=(*(before.checks if before else ()), found[row.entry_id]),
                first_checked_at=min(row.first_checked_at, before.first_checked_at)
                if before
                else row.first_checked_at,
            )
        return checks

    def _numbered(self, numbers: Sequence[int]) -> dict[int, LedgerEntry]:
        """Read entries by their numbers."""
        found: dict[int, LedgerEntry] = {}
        with self._reading() as connection:
            for start in range(0, len(numbers), _AT_ONCE):
                query = sa.select(entries).where(entries.c.entry_id.in_(numbers[start : start + _AT_ONCE]))
                found |= {row.entry_id: entry_of(row) for row in connection.execute(query)}
        return found

    def _windows(self, query: sa.Select[Any]) -> list[Window]:
        with self._reading() as connection:
            return [Window(start=row.window_start, end=row.window_end) for row in connection.execute(query)]


def standing_checks(*which: sa.ColumnElement[bool]) -> sa.Select[Any]:
    """Select the number of the check of each window and kind that stands: the newest that measured something, else the newest.

    :param which: the entries that are looked at.
    """
    measured = sa.case((entries.c.payload["measured"].as_boolean(), entries.c.entry_id))
    return (
        sa.select(
            entries.c.window_start,
            entries.c.window_end,
            entries.c.kind,
            sa.func.coalesce(sa.func.max(measured), sa.func.max(entries.c.entry_id)).label("entry_id"),
            sa.func.min(entries.c.recorded_at).label("first_checked_at"),
        )
        .where(*which, entries.c.window_start.is_not(None))
        .group_by(entries.c.window_start, entries.c.window_end, entries.c.kind)
    )


def decided(checks: Any) -> sa.ColumnElement[bool]:
    """Tell whether a retraining decision covers a check's window."""
    decision = entries.alias("decision")
    return sa.exists().where(
        decision.c.kind == str(EntryKind.RETRAINING_DECISION),
        decision.c.model_name == checks.c.model_name,
        decision.c.window_start == checks.c.window_start,
        decision.c.window_end == checks.c.window_end,
    )
