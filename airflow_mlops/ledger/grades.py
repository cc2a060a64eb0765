"""Grades of the ledger: the performance checks of windows, those that stand and those that labels may still change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from airflow_mlops.ledger.appending import append
from airflow_mlops.ledger.database import lock
from airflow_mlops.ledger.entries import EntryKind, LedgerEntry, Recorded, WindowGrade
from airflow_mlops.ledger.tables import entries
from airflow_mlops.ledger.windows import CHECKS, Windows, decided, standing_checks

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from airflow_mlops.core.windows import Window


class Grades(Windows):
    """How good a model was in each window, as far as labels tell."""

    def grades(
        self,
        model_name: str,
        *,
        window: Window | None = None,
        before: datetime | None = None,
        measured: bool = False,
        limit: int = 60,
    ) -> list[WindowGrade]:
        """List the performance checks that stand, one per window, oldest window first.

        :param window: only this window.
        :param before: only windows that ended by then.
        :param measured: only windows whose labels have come; they count for ``limit`` then, and those that wait do not.
        :param limit: the newest so many windows at most.
        """
        mine = _performance_of(model_name, before)
        has_labels = entries.c.payload["measured"].as_boolean()
        if window is not None:
            mine += [entries.c.window_start == window.start, entries.c.window_end == window.end]
        newest = (
            sa.select(entries.c.window_start)
            .where(*mine, entries.c.window_start.is_not(None), *([has_labels] if measured else []))
            .distinct()
            .order_by(entries.c.window_start.desc())
            .limit(limit)
        )
        oldest = sa.select(sa.func.min(newest.subquery().c.window_start)).scalar_subquery()
        standing = standing_checks(*mine, entries.c.window_start >= oldest)
        if measured:
            standing = standing.having(sa.func.max(sa.case((has_labels, 1))) == 1)
        return self._graded(standing)[-limit:]

    def unfinished_grades(
        self, model_name: str, *, before: datetime, checked_after: datetime | None = None
    ) -> list[WindowGrade]:
        """List the grades that labels may still change, however many they are, oldest window first.

        :param before: only windows that ended by then.
        :param checked_after: only those whose first check is younger: who waited longer has given up.
        """
        standing = standing_checks(*_performance_of(model_name, before))
        if checked_after is not None:
            standing = standing.having(sa.func.min(entries.c.recorded_at) > checked_after)
        return [grade for grade in self._graded(standing, _unfinished()) if not grade.final]

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
                checks.c.kind.in_(CHECKS),
                checks.c.window_end <= before,
                ~graded,
                ~decided(checks),
            )
            .distinct()
            .order_by(checks.c.window_start, checks.c.window_end)
        )
        return self._windows(query)

    def unfinished_windows(
        self, model_name: str, *, before: datetime, checked_after: datetime | None = None
    ) -> list[Window]:
        """List the windows whose labels are still awaited, oldest first: not graded yet, or graded on a part of them.

        :param before: only those that ended by then.
        :param checked_after: of those graded on a part of their labels only the ones whose first check is younger: nobody grades the
            others any more.
        """
        found = self.unfinished_grades(model_name, before=before, checked_after=checked_after)
        maturing = {grade.window for grade in found}
        return sorted(maturing | set(self.ungraded_windows(model_name, before=before)))

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
            *_performance_of(entry.model_name, None),
            entries.c.window_start == entry.window.start,
            entries.c.window_end == entry.window.end,
            entries.c.payload["measured"].as_boolean(),
        )
        with self._writing() as connection:
            lock(connection, f"{entry.model_name}|grades")
            if connection.execute(newest).scalar() != (standing.entry_id if standing else None):
                return None
            return append(connection, entry)

    def _graded(self, standing: sa.Select[Any], *which: sa.ColumnElement[bool]) -> list[WindowGrade]:
        """Read grades by their numbers, oldest window first."""
        found = standing.subquery("standing")
        query = (
            sa.select(found.c.entry_id, found.c.first_checked_at)
            .join(entries, entries.c.entry_id == found.c.entry_id)
            .where(*which)
            .order_by(entries.c.window_start, entries.c.window_end)
        )
        with self._reading() as connection:
            rows: Sequence[Any] = connection.execute(query).all()
        checks = self._numbered([row.entry_id for row in rows])
        return [
            WindowGrade(window=check.window, entry=check, first_checked_at=row.first_checked_at)
            for row in rows
            if (check := checks[row.entry_id]).window is not None
        ]


def _performance_of(model_name: str | None, before: datetime | None) -> list[sa.ColumnElement[bool]]:
    mine = [entries.c.kind == str(EntryKind.PERFORMANCE_CHECK), entries.c.model_name == model_name]
    return mine if before is None else [*mine, entries.c.window_end <= before]


def _unfinished() -> sa.ColumnElement[bool]:
    """Leave out most of the grades that are final; those of earlier releases do not say, and are looked at one by one."""
    final = entries.c.payload["final"].as_boolean()
    return sa.or_(final.is_(None), ~final)
