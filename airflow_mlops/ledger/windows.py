"""Windows of the ledger: which were checked, graded and decided."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from airflow_mlops.core.windows import Window
from airflow_mlops.ledger.appending import Entries, append
from airflow_mlops.ledger.database import lock
from airflow_mlops.ledger.entries import EntryKind, LedgerEntry, Recorded, WindowGrade
from airflow_mlops.ledger.tables import entries

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

#: What is found out about a window.
_CHECKS = (str(EntryKind.PERFORMANCE_CHECK), str(EntryKind.DRIFT_CHECK))


class Windows(Entries):
    """What is known of windows, and what is still to be found out."""

    def undecided_windows(
        self,
        model_name: str,
        *,
        required: Sequence[EntryKind] = (EntryKind.PERFORMANCE_CHECK,),
        overdue_since: datetime | None = None,
    ) -> list[Window]:
        """List the windows whose required checks are all here and that no retraining decision covers, oldest first.

        This, not an event, is what a decider works from: an event that was lost, merged or sent twice changes nothing.

        :param overdue_since: a window whose first check is older than this is listed with whatever checks it has.
        """
        checks = entries.alias("checks")
        wanted = {str(kind) for kind in required}
        query = (
            sa.select(checks.c.window_start, checks.c.window_end)
            .where(
                checks.c.model_name == model_name,
                checks.c.kind.in_(wanted | set(_CHECKS)),
                checks.c.window_start.is_not(None),
                ~_decided(checks),
            )
            .group_by(checks.c.window_start, checks.c.window_end)
            .order_by(checks.c.window_start, checks.c.window_end)
        )
        present = sa.case((checks.c.kind.in_(wanted), checks.c.kind))
        complete = sa.func.count(sa.distinct(present)) == len(wanted)
        overdue = sa.func.min(checks.c.recorded_at) <= overdue_since if overdue_since else sa.false()
        return self._windows(query.having(sa.or_(complete, overdue)))

    def ungraded_windows(self, model_name: str, *, before: datetime) -> list[Window]:
        """List the undecided windows that were checked, but whose performance could not be measured yet, oldest first.

        :param before: only those that ended by then.
        """
        checks, grades = entries.alias("checks"), entries.alias("grades")
        graded = sa.exists().where(
            grades.c.kind == str(EntryKind.PERFORMANCE_CHECK),
            grades.c.model_name == checks.c.model_name,
            grades.c.window_start == checks.c.window_start,
            grades.c.window_end == checks.c.window_end,
            sa.or_(
                grades.c.payload["measured"].as_boolean(), ~grades.c.payload["awaits_labels"].as_boolean()
            ),
        )
        query = (
            sa.select(checks.c.window_start, checks.c.window_end)
            .where(
                checks.c.model_name == model_name,
                checks.c.kind.in_(_CHECKS),
                checks.c.window_end <= before,
                ~graded,
                ~_decided(checks),
            )
            .distinct()
            .order_by(checks.c.window_start, checks.c.window_end)
        )
        return self._windows(query)

    def grades(
        self,
        model_name: str,
        *,
        window: Window | None = None,
        before: datetime | None = None,
        limit: int = 60,
    ) -> list[WindowGrade]:
        """List the performance checks that stand, one per window, oldest window first.

        :param window: only this window.
        :param before: only windows that ended by then.
        :param limit: the newest so many windows at most.
        """
        mine = [entries.c.kind == str(EntryKind.PERFORMANCE_CHECK), entries.c.model_name == model_name]
        if before is not None:
            mine.append(entries.c.window_end <= before)
        if window is not None:
            mine += [entries.c.window_start == window.start, entries.c.window_end == window.end]
        windows = (
            sa.select(entries.c.window_start, entries.c.window_end)
            .where(*mine, entries.c.window_start.is_not(None))
            .distinct()
            .order_by(entries.c.window_start.desc(), entries.c.window_end.desc())
            .limit(limit)
            .subquery()
        )
        same = sa.and_(
            entries.c.window_start == windows.c.window_start, entries.c.window_end == windows.c.window_end
        )
        query = (
            sa.select(entries)
            .join(windows, same)
            .where(*mine)
            .order_by(entries.c.window_start, entries.c.window_end, entries.c.entry_id.desc())
        )
        checks: dict[Window, list[LedgerEntry]] = {}
        for entry in self._query(query):
            if entry.window is not None:
                checks.setdefault(entry.window, []).append(entry)
        return [
            WindowGrade(
                window=checked,
                entry=next((entry for entry in found if entry.payload.get("measured")), found[0]),
                first_checked_at=min(entry.recorded_at for entry in found),
            )
            for checked, found in checks.items()
        ]

    def record_grade(self, entry: LedgerEntry, *, standing: LedgerEntry | None) -> Recorded | None:
        """Append a window's grade, if the one it was held against still stands.

        Of two that are graded at once the one with fewer labels could come last otherwise, and would stand.

        :param entry: the performance check.
        :param standing: the measured one that stood when this was worked out; ``None``: there was none.
        :returns: the grade as it stands; ``None``: the window was graded meanwhile, and nothing is written.
        """
        if entry.window is None:
            raise ValueError(f"the grade {entry.key!r} has no window")
        newest = sa.select(sa.func.max(entries.c.entry_id)).where(
            entries.c.kind == str(EntryKind.PERFORMANCE_CHECK),
            entries.c.model_name == entry.model_name,
            entries.c.window_start == entry.window.start,
            entries.c.window_end == entry.window.end,
            entries.c.payload["measured"].as_boolean(),
        )
        with self._writing() as connection:
            lock(connection, f"{entry.model_name}|grades")
            if connection.execute(newest).scalar() != (standing.entry_id if standing else None):
                return None
            return append(connection, entry)

    def matured_windows(
        self,
        model_name: str,
        *,
        before: datetime,
        checked_after: datetime,
        checked_before: datetime,
        limit: int = 60,
    ) -> list[Window]:
        """List the windows whose time for late labels is over and that have no last grade yet, oldest first.

        :param before: only those that ended by then.
        :param checked_after: only those whose first grade is younger.
        :param checked_before: only those whose first grade is as old as this.
        :param limit: at most so many.
        """
        first = sa.func.min(entries.c.recorded_at)
        last = sa.func.max(sa.case((entries.c.payload["final"].as_boolean(), 1), else_=0))
        query = (
            sa.select(entries.c.window_start, entries.c.window_end)
            .where(
                entries.c.kind == str(EntryKind.PERFORMANCE_CHECK),
                entries.c.model_name == model_name,
                entries.c.window_end <= before,
            )
            .group_by(entries.c.window_start, entries.c.window_end)
            .having(sa.and_(first > checked_after, first <= checked_before, last == 0))
            .order_by(entries.c.window_start, entries.c.window_end)
            .limit(limit)
        )
        return self._windows(query)

    def unfinished_windows(self, model_name: str, *, before: datetime) -> list[Window]:
        """List the windows whose labels are still awaited, oldest first: not graded yet, or graded on a part of them.

        :param before: only those that ended by then.
        """
        maturing = {grade.window for grade in self.grades(model_name, before=before) if not grade.final}
        return sorted(maturing | set(self.ungraded_windows(model_name, before=before)))

    def _windows(self, query: sa.Select[Any]) -> list[Window]:
        with self._reading() as connection:
            return [Window(start=row.window_start, end=row.window_end) for row in connection.execute(query)]


def _decided(checks: Any) -> sa.ColumnElement[bool]:
    """Tell whether a retraining decision covers a check's window."""
    decided = entries.alias("decided")
    return sa.exists().where(
        decided.c.kind == str(EntryKind.RETRAINING_DECISION),
        decided.c.model_name == checks.c.model_name,
        decided.c.window_start == checks.c.window_start,
        decided.c.window_end == checks.c.window_end,
    )
