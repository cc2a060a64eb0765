"""Find commits by what they say about themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_mlops.core.windows import Window
from airflow_mlops.integrations.delta.tables import newest_version, open_table, table_exists

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

#: What a commit says about itself: the work it is the outcome of, and the window it replaced.
WORK, WINDOW = "airflow_mlops.work", "airflow_mlops.window"
#: Mark of a table's columns that hold hashes; its number names the key, 0 says that the column holds values.
HASHED = "airflow_mlops.hashed"
#: Mark of a commit that replaced all rows: its number is the version it replaced.
REPLACED = "airflow_mlops.replaced"
#: Commits that change files and no rows.
_ROWS_STAY = frozenset(
    {"OPTIMIZE", "VACUUM START", "VACUUM END", "SET TBLPROPERTIES", "UPDATE FIELD METADATA"}
)
#: Commits to look through first for what was done before; then twice as many, and so on.
_HISTORY = 1000


def place_of(window: Window | None) -> str:
    """Name what a commit replaced: a window, or the whole table."""
    return "all" if window is None else window.key


def read_commits(uri: str) -> Iterator[dict[str, Any]]:
    """Give what commits say about themselves, the last one first.

    A commit doesn't say its number. delta-rs counts down from the version that was opened, beginning with what is the last
    commit by then: with one that came in between, all are wrong.
    """
    newest, last = _last_commit(uri)
    if last is None:
        return
    seen, limit = 0, _HISTORY
    while True:
        found = open_table(uri, None).history(limit)
        texts = [{**commit, "version": newest} for commit in found]
        # Nothing where more have come in between than were asked for.
        commits = found[texts.index(last) :] if last in texts else []
        for number, commit in enumerate(commits):
            commit["version"] = newest - number
        yield from commits[seen:]
        if len(found) < limit:
            return
        seen, limit = max(seen, len(commits)), 2 * limit


def _last_commit(uri: str) -> tuple[int, dict[str, Any] | None]:
    """Give the newest version, and what its commit says about itself, if anything."""
    while True:
        table = open_table(uri, None)
        last = table.history(1)
        if newest_version(uri) == table.version():
            return table.version(), last[0] if last else None


def find_commit(uri: str, work: str, *, after: int = -1) -> int | None:
    """Find the version in which :func:`replace_window_streamed` committed a work's rows, whatever was written since.

    :param after: look at later versions than this one only.
    """
    if not table_exists(uri):
        return None
    for commit in read_commits(uri):
        if commit["version"] <= after:
            return None
        if commit.get(WORK) == work:
            return int(commit["version"])
    return None


def oldest_commit(uri: str) -> int:
    """Give the version of the oldest commit that says something about itself: Delta forgets those of more than 30 days ago."""
    return min((int(commit["version"]) for commit in read_commits(uri)), default=newest_version(uri))


def find_works(uri: str, note: str, told: Callable[[str], bool]) -> dict[str, dict[str, Any]]:
    """Find what the last commit of each work says about itself, of those with a note that tells this."""
    commits = [commit for commit in read_commits(uri) if note in commit and told(commit[note])]
    return {commit[WORK]: commit for commit in reversed(commits)}


def find_written(uri: str, works: Mapping[Window | None, str]) -> set[Window | None]:
    """Find the windows of a table that hold some works' rows: they were committed, and nobody has changed them since.

    The log is read once for all of them, and no further back than it takes.

    :param works: key of the work by window, as :func:`replace_window_streamed` was given them; the windows don't overlap.
    """
    found: set[Window | None] = set()
    if not table_exists(uri):
        return found
    windows = {place_of(window): window for window in works}
    unsettled = set(works)
    for commit in read_commits(uri):
        place = commit.get(WINDOW)
        if place in windows:
            window = windows[place]
            if window in unsettled and commit.get(WORK) == works[window]:
                found.add(window)
            unsettled.discard(window)
        elif commit.get("operation") not in _ROWS_STAY:
            unsettled -= _touched(unsettled, place)
        if not unsettled:
            break
    return found


def _touched(windows: set[Window | None], place: str | None) -> set[Window | None]:
    """Find the windows that a commit may have changed; ``None``: it does not say where."""
    if place is None or place == place_of(None):
        return windows
    other = Window.from_key(place)
    return {one for one in windows if one is None or (one.start < other.end and other.start < one.end)}
