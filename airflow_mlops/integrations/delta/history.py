"""Versions of the past: which one stood when, whether it can be read, and what a restore took back."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from airflow_mlops.exceptions import DatasetNotFoundError
from airflow_mlops.integrations.delta.commits import read_commits
from airflow_mlops.integrations.delta.tables import data_files, open_table
from airflow_mlops.integrations.object_store import ObjectStore

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from deltalake import DeltaTable

logger = logging.getLogger(__name__)

#: How the names of our marks and notes begin.
_OURS = "airflow_mlops."

#: A restore that came in this version, its mark's number, is told by the marks themselves: those that it took back have this number.
_SETTLED, _TAKEN_BACK = "airflow_mlops.settled", -(2**63)

#: So many marks are asked of delta-rs one by one.
_FEW = 4


def version_as_of(uri: str, as_of: str) -> int:
    """Give the version a table had: the one of this number, or the newest that was not committed after an instant.

    :param as_of: a version number, or an instant in ISO 8601; a naive one is UTC.
    :raises DatasetNotFoundError: no such table; it has no such version, was made later, or the version's files are gone.
    :raises ValueError: ``as_of`` is neither.
    """
    if as_of.isdecimal():
        version = int(as_of)
        open_table(uri, version)
    else:
        version = _committed_by(uri, as_of)
    require_readable(uri, version)
    return version


def _committed_by(uri: str, as_of: str, *, before: int | None = None) -> int:
    try:
        instant = datetime.fromisoformat(as_of)
    except ValueError as err:
        raise ValueError(
            f"as_of {as_of!r} is neither a version number nor an ISO 8601 time such as 2024-03-01T00:00:00Z"
        ) from err
    instant = instant if instant.tzinfo is not None else instant.replace(tzinfo=UTC)
    first = None
    for commit in read_commits(uri):
        first = commit
        if before is not None and commit["version"] >= before:
            continue
        if datetime.fromtimestamp(commit["timestamp"] / 1000, UTC) <= instant:
            return int(commit["version"])
    known = (
        f"; its oldest known version is {first['version']} of "
        f"{datetime.fromtimestamp(first['timestamp'] / 1000, UTC).isoformat(timespec='milliseconds')}"
        if first
        else ""
    )
    raise DatasetNotFoundError(f"table {uri} had no version at {instant.isoformat()}{known}")


def require_readable(uri: str, version: int) -> None:
    """Check that a version's files are still there; those of the newest are.

    :raises DatasetNotFoundError: no such table or version, or it was vacuumed away.
    """
    from deltalake.fs import DeltaStorageHandler
    from pyarrow.fs import FileType

    newest = open_table(uri, None)
    if newest.version() == version:
        return
    table = open_table(uri, version)
    paths = _paths(table)
    gone = [
        info.path
        for info in DeltaStorageHandler.from_table(table._table).get_file_info(sorted(paths - _paths(newest)))
        if info.type == FileType.NotFound
    ]
    if gone:
        raise DatasetNotFoundError(
            f"version {version} of {uri} can't be read any more: {len(gone)} of its {len(paths)} files are gone, "
            f"such as {gone[0]}; they were vacuumed. Take a newer version, and keep files for longer"
        )


def _paths(table: DeltaTable) -> set[str]:
    """Give the paths of a version's files; the log spells them as in a URL."""
    return {unquote(path) for path in data_files(table)}


def marks_at(uri: str, version: int | None, names: Sequence[str]) -> dict[str, int]:
    """Find the marks that stand in a version of a table; ``None`` takes the newest."""
    return standing_marks(uri, open_table(uri, version), names)


def standing_marks(uri: str, table: DeltaTable, names: Sequence[str]) -> dict[str, int]:
    """Find marks that stand. Delta keeps those of commits whose rows are gone because an earlier version was restored."""
    logged = _logged_marks(uri, table, [*names, _SETTLED])
    settled = logged.get(_SETTLED, -1)
    told = {name: logged[name] for name in names if name in logged}
    restored = _last_restored(uri, table.metadata().id, table.version()) if told else None
    if restored is None or restored[0] <= settled:
        return _standing(told)
    at, to = restored
    try:
        # Also those that an earlier restore took back: this one may be to a version that has their rows.
        standing = standing_marks(uri, open_table(uri, to), list(told))
    except DatasetNotFoundError:
        return _standing(told)  # so long ago that the log no longer knows
    for version in range(at + 1, table.version() + 1):
        standing |= {name: number for name, number in _marks_of(uri, version).items() if name in told}
    return _standing(standing)


def _standing(marks: Mapping[str, int]) -> dict[str, int]:
    return {name: number for name, number in marks.items() if number != _TAKEN_BACK}


def settled_marks(uri: str, table: DeltaTable) -> dict[str, int]:
    """Give the marks that say of all others what a restore has made of them: Delta forgets the restore itself after 30 days."""
    restored = _last_restored(uri, table.metadata().id, table.version())
    if restored is None:
        return {}
    try:
        told = _all_marks(uri, table)
    except (OSError, LookupError, ValueError) as err:
        logger.debug("the marks of %s can't be listed, so a restore is looked up each time: %s", uri, err)
        return {}
    if restored[0] <= told.pop(_SETTLED, -1):
        return {}
    ours = [name for name in told if name.startswith(_OURS)]
    standing = standing_marks(uri, table, ours)
    now = {name: standing.get(name, _TAKEN_BACK) for name in ours}
    return {name: number for name, number in now.items() if number != told[name]} | {_SETTLED: restored[0]}


def _logged_marks(uri: str, table: DeltaTable, names: Sequence[str]) -> dict[str, int]:
    """Find marks of any commit of a version's log.

    delta-rs reads the log once for each name, so for more than a few it is read here.
    """
    if len(names) > _FEW:
        try:
            return _all_marks(uri, table)
        except (OSError, LookupError, ValueError) as err:  # not written as it mostly is, or just cleaned up
            logger.debug("the marks of %s are asked for one by one: %s", uri, err)
    told = {name: table.transaction_version(name) for name in names}
    return {name: number for name, number in told.items() if number is not None}


def _all_marks(uri: str, table: DeltaTable) -> dict[str, int]:
    """Read the marks of the last checkpoint and of the commits since.

    :raises LookupError: the checkpoint is of a kind, or the table has a setting, that only delta-rs knows what to make of.
    """
    import pyarrow as pa
    from pyarrow import parquet

    store = ObjectStore(uri)
    if "delta.setTransactionRetentionDuration" in table.metadata().configuration:
        raise LookupError("marks of this table expire")
    marks: dict[str, int] = {}
    version = -1
    try:
        last = json.loads(store.read("_delta_log/_last_checkpoint"))
    except FileNotFoundError:
        last = None
    if last is not None:
        version = int(last["version"])
        if version > table.version() or last.get("parts") or last.get("v2Checkpoint"):
            raise LookupError("the last checkpoint is not this version's, or in several files")
        content = pa.BufferReader(store.read(f"_delta_log/{version:020}.checkpoint.parquet"))
        for row in parquet.read_table(content, columns=["txn"]).column("txn").to_pylist():
            if row is not None and row.get("appId") is not None:
                marks[row["appId"]] = int(row["version"])
    for number in range(version + 1, table.version() + 1):
        marks |= _marks_of(uri, number)
    return marks


@lru_cache(maxsize=32)
def _last_restored(uri: str, table_id: str, newest: int) -> tuple[int, int] | None:
    """Give the last version, up to one, that restored another, and which; ``None``: there is none. The past stays what it is."""
    for commit in read_commits(uri):
        if commit["version"] > newest or commit.get("operation") != "RESTORE":
            continue
        told = commit["operationParameters"]
        if "version" in told:
            return commit["version"], int(told["version"])
        instant = datetime.fromtimestamp(int(told["datetime"]) / 1000, UTC)
        return commit["version"], _committed_by(uri, instant.isoformat(), before=commit["version"])
    return None


def replaced_by_others(uri: str, *, after: int) -> bool:
    """Tell whether somebody else than we has put other rows in the place of all of a table's, since a version.

    As far back as the table's commits tell: what Spark, delta-rs and others do to it bears no mark of ours.
    """
    for commit in read_commits(uri):
        if commit["version"] <= after:
            return False
        if _replaces_all(commit) and not any(name.startswith(_OURS) for name in commit):
            try:
                marks = _marks_of(uri, commit["version"])
            except FileNotFoundError:  # cleaned up at this moment
                return True
            if not any(name.startswith(_OURS) for name in marks):
                return True
    return False


def _replaces_all(commit: Mapping[str, Any]) -> bool:
    what, how = str(commit.get("operation")), commit.get("operationParameters") or {}
    everywhere = str(how.get("predicate") or "[]").lower() in ("[]", "true", '["true"]')
    if what == "WRITE":
        return everywhere and str(how.get("mode")).lower() == "overwrite"
    return (what == "DELETE" and everywhere) or what.startswith(("CREATE OR REPLACE", "REPLACE", "TRUNCATE"))


def _marks_of(uri: str, version: int) -> dict[str, int]:
    """Read the marks of one commit."""
    lines = ObjectStore(uri).read(f"_delta_log/{version:020}.json").decode().splitlines()
    actions = [json.loads(line) for line in lines if line.strip()]
    return {action["txn"]["appId"]: int(action["txn"]["version"]) for action in actions if "txn" in action}
