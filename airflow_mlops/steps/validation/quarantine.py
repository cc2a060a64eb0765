"""Rows set aside: bad ones into a sibling table, the rest in their place, each row once whoever writes at the same time."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_mlops.core.data.dataset import DatasetVersion, count_rows
from airflow_mlops.core.data.schema_policy import fit_schema
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import CommitConflictError, SchemaMismatchError, StaleDatasetError
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.storage import same_place
from airflow_mlops.steps.common import work_key

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

    import polars as pl

Written = TypeVar("Written")

logger = logging.getLogger(__name__)

#: Columns of a quarantine beside the table's own: why a row is there, of which version, by which validation.
REASONS, VERSION, WORK = "quarantine_reasons", "quarantine_version", "quarantine_work"
#: What a quarantine's commit says: where its rows are from, and the digest of all that was judged there.
_FROM, _JUDGED = "airflow_mlops.quarantined_from", "airflow_mlops.judged"

#: Mark of the commit that took a work's rows out of the table: it stays, while what a commit says about itself is kept for 30 days.
_TAKEN_OUT = "airflow_mlops.taken_out"

#: Rows that are sorted at once; a few such batches are in memory.
_BATCH_ROWS = 64_000
#: How often a commit is tried while others write what does not matter to it.
_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class SetAside:
    """Move bad rows of a window out of a table.

    The rows are in the table until they are in the quarantine, and then a second commit leaves them out; it succeeds only on top of
    the very rows that were judged. Both commits carry the key of the work, which names those rows: a second attempt finds what is done.

    :param dataset: what was judged.
    :param time_column: places a row in the window.
    :param table: the quarantine.
    :param reasons: name and condition (polars expression) of each expectation that a bad row breaks.
    :param count: number of bad rows.
    :param newest: another attempt would judge the newest version, not this one.
    :param step: whose work it is.
    """

    dataset: DatasetVersion
    window: Window | None
    time_column: str | None
    table: str
    reasons: list[tuple[str, Any]]
    count: int
    newest: bool
    step: str = "validate"

    def write(self, rules: Any) -> tuple[DatasetVersion, DatasetVersion]:
        """Write both tables.

        :param rules: what the rows were judged by, part of the work's key.
        :returns: the quarantine, and the table without the bad rows.
        :raises StaleDatasetError: what was judged was written again or added to meanwhile; nothing is set aside.
        :raises CommitConflictError: likewise, where another attempt judges the newest version.
        """
        judged = self._digest(self.dataset.version)
        key = work_key(
            self.step,
            self.dataset.uri,
            judged,
            self.window.key if self.window else None,
            rules,
            self.table,
        )
        try:
            kept = self._write(key, judged)
        except StaleDatasetError as err:
            # The rows stay in the table, so they must not be in the quarantine as well.
            if delta.table_exists(self.table):
                _try_again(lambda: delta.delete_rows(self.table, column=WORK, values=[key]))
            if not self.newest:
                raise
            raise CommitConflictError(f"{err}; the next attempt judges the newest version") from err
        return (
            delta.describe_files(self.table, time_column=self.time_column),
            delta.describe(self.dataset.uri, version=kept, time_column=self.time_column),
        )

    def _write(self, key: str, judged: str) -> int:
        kept, _ = self._look(key, judged)
        if kept is not None:
            self._write_quarantine(key, judged)
            return kept
        self._clear_abandoned(key)
        self._write_quarantine(key, judged)
        kept = self._write_rest(key, judged)
        # Who lets the rows in again meanwhile takes them out of the quarantine, see :func:`let_in_again`.
        self._write_quarantine(key, judged)
        return kept

    def _digest(self, version: int | None) -> str:
        return delta.digest_window(
            self.dataset.uri, version=version, window=self.window, time_column=self.time_column
        )

    def _look(self, key: str, judged: str) -> tuple[int | None, int]:
        """Give the version in which another attempt has written the rest, if any, and else the newest, whose rows here are those judged.

        :raises StaleDatasetError: they are not, and no attempt at this work changed them.
        """
        done = self._written_by_another(key)
        newest = delta.newest_version(self.dataset.uri)
        if done is None and newest != self.dataset.version and self._digest(newest) != judged:
            # It may have come between the two looks; without a second one its rows would be taken out of the quarantine.
            done = self._written_by_another(key)
            if done is None:
                raise StaleDatasetError(
                    f"{self.window or 'the content'} of {self.dataset.uri} was written again after version {self.dataset.version}, "
                    "which was judged: the newer rows stay, and nothing was set aside. "
                    f"Run the task that ingests them again, and {self.step} what it gives"
                )
        return done, newest

    def _written_by_another(self, key: str) -> int | None:
        return delta.find_commit(self.dataset.uri, key, after=self.dataset.version)

    def _clear_abandoned(self, key: str) -> None:
        """Take rows out of the quarantine that another validation put there and then could not take out of the table.

        One that was killed between its commits, and whose rows were written again since; none that may still go on, and none of which
        the table's history no longer tells whether its rows have left.
        """
        works = _works(self.table, self.dataset.uri, self.window)
        left = set(works) - {key} - _taken_out(self.dataset.uri, works)
        left &= _taken_from(self.table, delta.oldest_commit(self.dataset.uri) - 1) if left else set()
        if left:
            now = self._digest(None)
            past = [work for work in left if works[work] != now]
            _try_again(lambda: delta.delete_rows(self.table, column=WORK, values=past))

    def _write_quarantine(self, key: str, judged: str) -> None:
        """Write the bad rows under the work's own key: two attempts at once replace each other's rows, and nobody else's."""
        import polars as pl

        schema = delta.read_table(self.dataset.uri, version=self.dataset.version).collect_schema()
        taken = [name for name in (REASONS, VERSION, WORK) if name in schema]
        if taken:
            raise SchemaMismatchError(
                f"{self.dataset.uri} has a column {', '.join(taken)}, as a quarantine has: is it one? Judge the table it was taken from"
            )
        added = {
            REASONS: pl.concat_str(
                [pl.when(broken).then(pl.lit(name)) for name, broken in self.reasons],
                separator="; ",
                ignore_nulls=True,
            ),
            VERSION: pl.lit(self.dataset.version, dtype=pl.Int64),
            WORK: pl.lit(key),
        }
        bad = pl.any_horizontal(*(one for _, one in self.reasons))

        def write() -> int | None:
            if self._is_quarantined(key):
                logger.info("another attempt has written this to %s already", self.table)
                return None
            types = _follow(
                self.table, {**schema, REASONS: pl.String(), VERSION: pl.Int64(), WORK: pl.String()}
            )
            columns = _as_in(types, [*schema, *added])
            return delta.replace_window_streamed(
                self.table,
                _in_own_thread(
                    frame.filter(bad).with_columns(**added).select(columns) for frame in self._batches()
                ),
                schema=types,
                add_columns=True,
                time_column=None,
                window=None,
                work=key,
                work_column=WORK,
                notes={_FROM: _place(self.dataset.uri, self.window), _JUDGED: judged},
                marks=self._hashed(schema, key),
            )

        _try_again(write)

    def _hashed(self, columns: Iterable[str], key: str) -> dict[str, int]:
        """Give the marks of columns with hashes that the quarantine does not have yet: what comes back from it is not hashed again.

        :raises SchemaMismatchError: rows that are there already have values in such a column, or hashes of another key.
        """
        marks = [f"{delta.HASHED}={name}" for name in columns]
        held = delta.marks_at(self.dataset.uri, self.dataset.version, marks)
        quarantine = delta.TableWriter(self.table)
        known = quarantine.marks(marks)
        changed = {name: held.get(name, 0) for name in marks if held.get(name, 0) != known.get(name, 0)}
        there = {f"{delta.HASHED}={name}" for name in quarantine.schema or {}}
        mixed = sorted(name for name in changed if name in there)
        if mixed and self._has_others(key):
            column = mixed[0].partition("=")[2]
            raise SchemaMismatchError(
                f"{self.table} has rows whose {column!r} is {_spelled(known.get(mixed[0], 0))}, in {self.dataset.uri} it is "
                f"{_spelled(changed[mixed[0]])} by now: together nobody could tell which is which. Nothing was set aside. Let the rows in "
                "again or delete them first, or set these aside in another table (quarantine_table=)"
            )
        return changed

    def _has_others(self, key: str) -> bool:
        import polars as pl

        works = delta.read_table(self.table, columns=[WORK])
        return works.filter(pl.col(WORK) != key).head(1).collect().height > 0

    def _is_quarantined(self, key: str) -> bool:
        import polars as pl

        if not delta.table_exists(self.table):
            return False
        rows = delta.read_table(self.table, columns=[WORK])
        return count_rows(rows.filter(pl.col(WORK) == key)) == self.count

    def _write_rest(self, key: str, judged: str) -> int:
        """Replace the window by its good rows, once, unless it is not the one that was judged any more."""
        import polars as pl

        bad = pl.any_horizontal(*(one for _, one in self.reasons))

        def write() -> int:
            done, newest = self._look(key, judged)
            if done is not None:
                logger.info(
                    "another attempt has written this to %s already, as version %d", self.dataset.uri, done
                )
                return done
            # Another window may have brought a column or a wider type since.
            schema: Mapping[str, pl.DataType] = delta.read_table(
                self.dataset.uri, version=newest
            ).collect_schema()
            columns = _as_in(schema, self.dataset.columns)
            return delta.replace_window_streamed(
                self.dataset.uri,
                _in_own_thread(frame.filter(~bad).select(columns) for frame in self._batches()),
                schema=schema,
                time_column=self.time_column,
                window=self.window,
                work=key,
                read_version=newest,
                marks={f"{_TAKEN_OUT}={key}": 1} | delta.reached_marks(delta.TableWriter(self.dataset.uri)),
            )

        return _try_again(write)

    def _batches(self) -> Iterator[pl.DataFrame]:
        return delta.stream_table(
            self.dataset.uri,
            version=self.dataset.version,
            columns=list(self.dataset.columns),
            window=self.window,
            time_column=self.time_column,
            batch_rows=_BATCH_ROWS,
        )


def let_in_again(uri: str, window: Window, *, time_column: str, table: str) -> None:
    """Take a window's rows out of a quarantine where the table has the very same again, and now keeps them.

    Rows of a validation or screen that is not through are left: it may be killed, or about to take them out of the table.

    :param table: the quarantine.
    """
    works = _works(table, uri, window)
    through = _taken_out(uri, works)
    if through:
        now = delta.digest_window(uri, version=None, window=window, time_column=time_column)
        back = [work for work in through if works[work] == now]
        _try_again(lambda: delta.delete_rows(table, column=WORK, values=back))


def _works(table: str, uri: str, window: Window | None) -> dict[str, str]:
    """Find whose rows of a window are in a quarantine, each with the digest of all that was judged there."""
    if not delta.table_exists(table):
        return {}
    found = delta.find_works(table, _FROM, partial(_is_place, uri=uri, window=window))
    return {work: commit[_JUDGED] for work, commit in found.items()}


def _taken_out(uri: str, works: Collection[str]) -> set[str]:
    """Tell which works have taken their rows out of the table; those of earlier releases have no mark."""
    marks = delta.TableWriter(uri).marks([f"{_TAKEN_OUT}={work}" for work in works])
    return {
        work for work in works if f"{_TAKEN_OUT}={work}" in marks or delta.find_commit(uri, work) is not None
    }


def _taken_from(table: str, oldest: int) -> set[str]:
    """Tell whose rows in a quarantine were judged in this version of their table, or a later one."""
    import polars as pl

    rows = delta.read_table(table, columns=[WORK, VERSION]).filter(pl.col(VERSION) >= oldest)
    return set(rows.select(WORK).unique().collect()[WORK].to_list())


def _spelled(number: int) -> str:
    return f"hashed with key {number:x}" if number else "as it is"


def _place(uri: str, window: Window | None) -> str:
    return f"{uri}|{window.key if window else None}"


def _is_place(said: str, *, uri: str, window: Window | None) -> bool:
    """Tell whether a commit's rows are from this window of this table, however its address was written there."""
    where = said.rpartition("|")[0]
    return said == _place(where, window) and same_place(where, uri)


def _as_in(types: Mapping[str, pl.DataType], known: Collection[str]) -> list[pl.Expr]:
    """Select rows as a table has them: columns they do not have are null."""
    import polars as pl
    from polars.selectors import by_name  # names as they are: of columns, ^a$ is a pattern

    return [
        by_name(name).cast(dtype) if name in known else pl.lit(None, dtype=dtype).alias(name)
        for name, dtype in types.items()
    ]


def _follow(table: str, rows: Mapping[str, pl.DataType]) -> dict[str, pl.DataType]:
    """Widen a quarantine's columns to what the rows need, and give the types the rows are to have there.

    Schemas of tables change, and what was set aside before stays with them: columns that are new are null in older rows, columns
    that are gone are null in newer ones.

    :raises SchemaMismatchError: no type holds both what is there and what comes.
    """
    writer = delta.TableWriter(table)
    known = writer.schema
    if known is None:
        return dict(rows)
    spelled = {name.lower(): name for name in known}
    gone = {name: dtype for name, dtype in known.items() if name not in rows}
    renamed = [name for name in rows if spelled.get(name.lower(), name) != name]
    remedy = "What is there stays; set these rows aside in another table (quarantine_table=)"
    if renamed:
        raise SchemaMismatchError(
            f"rows do not fit {table}: {', '.join(f'{name} is {spelled[name.lower()]} there' for name in renamed)}, "
            f"one name to Delta. {remedy}"
        )
    fit = fit_schema(known, {**rows, **gone}, policy="widen", where=table, remedy=remedy)
    writer.widen(fit.widened)
    return fit.rows


def _try_again(write: Callable[[], Written]) -> Written:
    """Write; a conflict is with somebody else's rows, or ``write`` finds out that it is not."""
    for _ in range(_ATTEMPTS - 1):
        try:
            return write()
        except CommitConflictError as err:
            logger.info("%s", err)
    return write()


def _in_own_thread(frames: Iterator[pl.DataFrame]) -> Iterator[pl.DataFrame]:
    """Read ahead of the writer, which asks from within delta-rs; that can't be entered a second time there."""
    with ThreadPoolExecutor(1, "read") as reader:
        read = reader.submit(next, frames, None)
        while (frame := read.result()) is not None:
            read = reader.submit(next, frames, None)
            yield frame
