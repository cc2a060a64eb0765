"""Aliases of the ledger: pointers at versions that move by compare-and-set, and where they have been."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from airflow_mlops.exceptions import PromotionConflictError
from airflow_mlops.ledger.appending import Entries, append, entry_of, standing_entry
from airflow_mlops.ledger.database import lock
from airflow_mlops.ledger.entries import ChampionPeriod, EntryKind, LedgerEntry, Recorded
from airflow_mlops.ledger.tables import aliases, entries

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: A move from further in the future was made by a wrong clock, and does not date those after it.
CLOCK_SKEW = timedelta(hours=1)


class Aliases(Entries):
    """Where aliases point, and every move of theirs."""

    def aliases(self, model_name: str) -> dict[str, str]:
        """Give every alias of a model with the version it points at."""
        query = sa.select(aliases.c.alias, aliases.c.model_version).where(aliases.c.model_name == model_name)
        with self._reading() as connection:
            return {row.alias: row.model_version for row in connection.execute(query)}

    def move_alias(
        self,
        *,
        model_name: str,
        alias: str,
        model_version: str,
        expected_version: str | None,
        entry: LedgerEntry,
        request: str | None = None,
        clock: Callable[[], datetime] | None = None,
        guard: Callable[[Sequence[LedgerEntry]], None] | None = None,
    ) -> Recorded:
        """Point an alias at a version if it still points where the caller believes; entry and pointer change together.

        An alias that is already there is left alone: a retry is no second promotion.

        :param expected_version: where the alias points now; ``None``: it is not set yet.
        :param entry: what to write. The request is appended to its key; without one a revision, so that A to B to A to B is
            four entries.
        :param request: names what is asked for, by whom. It is carried out once: asked for again after somebody moved the
            alias on, it is refused, also when the alias is back where the caller believes.
        :param clock: tells the time of the move, once no other can come before it; default: that of the entry. It is not before
            that of the move before, whose clock may be ahead, unless that one was wrong by more than an hour.
        :param guard: gets the moves so far, the first one first, and raises what speaks against this one. Nobody moves the alias
            between what it saw and the move.
        :raises PromotionConflictError: somebody else moved the alias; the message says who and where to.
        """
        with self._writing() as connection:
            # A row that is not there yet can't be locked: the first promotion may be raced for, too.
            lock(connection, f"{model_name}|{alias}")
            this = (aliases.c.model_name == model_name, aliases.c.alias == alias)
            row = connection.execute(sa.select(aliases).where(*this)).one_or_none()
            current = row.model_version if row else None
            last = entry_of(_last_move(connection, row)) if row is not None else None
            if last is not None and current == model_version and _same_package(last, entry):
                return Recorded(entry=last, created=False)
            if guard is not None:
                moves = connection.execute(_moves(model_name, alias).order_by(entries.c.entry_id))
                guard([entry_of(move) for move in moves])
            revision = row.revision + 1 if row else 1
            keyed = replace(entry, key=f"{entry.key}|{request or revision}")
            carried_out = standing_entry(connection, keyed) if request else None
            if last is not None and carried_out is not None:
                raise _undone(entry_of(carried_out), last, alias)
            if current != expected_version:
                raise _conflict(connection, row, model_name, alias, model_version, expected_version)
            moved_at = clock() if clock else entry.recorded_at
            if last is not None and last.recorded_at - _aware(moved_at) <= CLOCK_SKEW:
                moved_at = max(_aware(moved_at), last.recorded_at)
            recorded = append(connection, replace(keyed, recorded_at=moved_at))
            pointer = {
                "model_version": model_version,
                "revision": revision,
                "entry_id": recorded.entry.entry_id,
            }
            if row is None:
                connection.execute(aliases.insert().values(model_name=model_name, alias=alias, **pointer))
            else:
                connection.execute(aliases.update().where(*this).values(**pointer))
            return recorded

    def last_move(self, model_name: str, alias: str) -> LedgerEntry | None:
        """Find the entry that put an alias where it points now; ``None`` when it points nowhere."""
        query = (
            sa.select(entries)
            .join(aliases, aliases.c.entry_id == entries.c.entry_id)
            .where(aliases.c.model_name == model_name, aliases.c.alias == alias)
        )
        found = self._query(query)
        return found[0] if found else None

    def moves(self, model_name: str, alias: str = "champion") -> list[LedgerEntry]:
        """List every move of an alias, the first one first."""
        return self._query(_moves(model_name, alias).order_by(entries.c.entry_id))

    def standing_moves(self, model_name: str, alias: str = "champion") -> list[LedgerEntry]:
        """List the moves of an alias that nobody took back, the first one first: a rollback undoes those since its version came."""
        standing: list[LedgerEntry] = []
        for move in self.moves(model_name, alias):
            version = move.payload["model_version"]
            there = any(before.payload["model_version"] == version for before in standing)
            if move.kind is EntryKind.ROLLBACK and there:
                while standing[-1].payload["model_version"] != version:
                    standing.pop()
            else:
                standing.append(move)
        return standing

    def former_champions(self, model_name: str, *, alias: str = "champion", limit: int = 24) -> list[str]:
        """List the versions that were champion and are not, the one that left last first; not those that somebody took back.

        :param limit: at most so many: the first one there was, and those that left last.
        """
        left: dict[str, bool] = {}
        for move in self.moves(model_name, alias):
            version, before = str(move.payload["model_version"]), move.payload.get("previous_version")
            left.pop(version, None)
            if before is not None:
                left.pop(str(before), None)
                left[str(before)] = move.kind is not EntryKind.ROLLBACK
        found = [version for version, welcome in reversed(left.items()) if welcome]
        return found if len(found) <= limit else [*found[: limit - 1], found[-1]]

    def champion_at(self, model_name: str, at: datetime, *, alias: str = "champion") -> str | None:
        """Tell which version an alias pointed at, at a time; ``None``: at none yet."""
        found = self.who_was_champion(model_name, at, alias=alias)
        return found.model_version if found else None

    def who_was_champion(
        self, model_name: str, at: datetime, *, alias: str = "champion"
    ) -> ChampionPeriod | None:
        """Tell which version an alias pointed at, at a time, since and until when, and who moved it there.

        Moves are told apart by the order they were written in, not by the clocks of those who wrote them.

        :param at: the time; naive values are taken as UTC.
        :returns: ``None`` when it pointed at none yet.
        """
        before = self._query(
            _moves(model_name, alias)
            .where(entries.c.recorded_at <= at)
            .order_by(entries.c.entry_id.desc())
            .limit(1)
        )
        if not before:
            return None
        move = before[0]
        after = self._query(
            _moves(model_name, alias)
            .where(entries.c.entry_id > move.entry_id)
            .order_by(entries.c.entry_id)
            .limit(1)
        )
        return ChampionPeriod(
            model_name=model_name,
            model_version=str(move.payload["model_version"]),
            since=move.recorded_at,
            until=after[0].recorded_at if after else None,
            actor=move.actor,
            summary=move.summary,
        )


def standing_rollback(
    moves: Sequence[LedgerEntry], model_version: str, package_digest: str | None
) -> LedgerEntry | None:
    """Find the rollback that took a package back; ``None`` when none did, or it came back since.

    A package that is registered anew has another number, and a number that is given anew another package. Only an entry of an
    older release, which does not say what package it left, is told by its number.

    :param moves: those of the alias, the first one first.
    """
    for move in reversed(moves):
        payload = move.payload
        for number, package, left in (
            (payload["model_version"], payload.get("package_digest"), False),
            (payload.get("previous_version"), payload.get("previous_package_digest"), True),
        ):
            known = package is not None and package_digest is not None
            same = package == package_digest if known else number == model_version
            if same and (not left or move.kind is EntryKind.ROLLBACK):
                return move if left else None
    return None


def _moves(model_name: str, alias: str) -> sa.Select[Any]:
    return sa.select(entries).where(
        entries.c.model_name == model_name,
        entries.c.kind.in_([str(EntryKind.PROMOTION), str(EntryKind.ROLLBACK)]),
        entries.c.payload["alias"].as_string() == alias,
    )


def _last_move(connection: sa.Connection, pointer: Any) -> Any:
    """Give the entry of the move that put the pointer where it is."""
    return connection.execute(sa.select(entries).where(entries.c.entry_id == pointer.entry_id)).one()


def _aware(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)


def _same_package(last: LedgerEntry, new: LedgerEntry) -> bool:
    """Tell whether two moves to one number are to one version: those of a model that was deleted are given again."""
    digests = {move.payload.get("package_digest") for move in (last, new)}
    return None in digests or len(digests) == 1


def _conflict(
    connection: sa.Connection, row: Any, model_name: str, alias: str, wanted: str, expected: str | None
) -> PromotionConflictError:
    believed = f"version {expected}" if expected else "no version"
    if row is None:
        return PromotionConflictError(
            f"{alias} of {model_name} was believed to be {believed}, but the ledger has none; "
            f"version {wanted} was not promoted. Evaluate again, or, by hand, give champion_version=None: nobody is replaced"
        )
    winner = _last_move(connection, row)
    return PromotionConflictError(
        f"{alias} of {model_name} was believed to be {believed}, but {winner.actor} moved it to version "
        f"{row.model_version}; version {wanted} was not promoted. Evaluate against the present {alias} again"
    )


def _undone(move: LedgerEntry, last: LedgerEntry, alias: str) -> PromotionConflictError:
    version = move.payload["model_version"]
    return PromotionConflictError(
        f"{move.actor} moved {alias} of {move.model_name} to version {version} at {move.recorded_at:%Y-%m-%d %H:%M} already, "
        f"and {last.actor} moved it on to version {last.payload['model_version']} ({last.summary}); a move is not repeated. "
        f"Whoever wants version {version} again promotes it by hand, with a reason of its own"
    )
