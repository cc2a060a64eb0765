"""Lines of CSV files that have too few values: polars takes the last ones for null, as if they were written empty."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from airflow_mlops.exceptions import SchemaMismatchError
from airflow_mlops.integrations.object_store import read_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    import polars as pl

_QUOTE, _COMMA, _NEWLINE, _RETURN = b'",\n\r'
#: Bytes of a row beyond which a quote is taken for one that is never closed.
_LONGEST = 64 * 1024**2


class _Rows(NamedTuple):
    """Some rows of a file as they are written, a row with a line break in a quoted text being one.

    :param lines: the line each ends at, from 1.
    :param values: how many each has; 0 of a blank line.
    """

    lines: np.ndarray[tuple[int], np.dtype[np.int64]]
    values: np.ndarray[tuple[int], np.dtype[np.int64]]


def require_full_lines(
    files: Sequence[str], scan: Callable[..., pl.LazyFrame], columns: Sequence[str], *, name: str
) -> None:
    """Find the first line with fewer values than there are columns.

    Such a line is null in the last column to polars. So that column is read, and where it has nulls, commas outside quotes
    are counted; a file of which polars finds other rows is left to polars.

    :param scan: of files, with options of ``polars.scan_csv``.
    :param name: what the files were found by.
    :raises SchemaMismatchError: naming file and line.
    """
    import polars as pl
    from polars.selectors import by_name

    for file in files:
        last = scan([file], infer_schema=False).select(by_name(columns[-1]).is_null())
        try:
            nulls = last.collect(engine="streaming").to_series().to_numpy()
        except pl.exceptions.PolarsError:
            return  # something else is wrong, which is said when the rows are read
        if not nulls.any():
            continue
        rows = _without_leading_blanks(list(_rows(read_chunks(file, name))))
        if len(rows.values) != len(nulls) + 1:  # the header is one, too
            continue
        short = (rows.values[1:] > 0) & (rows.values[1:] < len(columns)) & nulls
        if short.any():
            first = int(short.argmax()) + 1
            raise SchemaMismatchError(
                f"{file}, line {rows.lines[first]}: {rows.values[first]} values where there are {len(columns)} columns "
                f"(lines with too few: {short.sum()}). Which ones are missing can't be told: write their commas at the source, "
                "or remove the lines"
            )


def _without_leading_blanks(parts: list[_Rows]) -> _Rows:
    rows = _Rows(
        np.concatenate([part.lines for part in parts]), np.concatenate([part.values for part in parts])
    )
    start = int((rows.values > 0).argmax())
    return _Rows(rows.lines[start:], rows.values[start:])


def _rows(chunks: Iterable[bytes]) -> Iterator[_Rows]:
    """Count the values of each row, in the order of the file."""
    rest, line = b"", 0
    for chunk in chunks:
        rows, size = _counted(rest + chunk, line)
        whole, rest = (rest + chunk)[:size], (rest + chunk)[size:]
        yield rows
        line += whole.count(b"\n")
        if len(rest) > _LONGEST:
            return
    if rest:
        yield _counted(rest + b"\n", line)[0]


def _counted(text: bytes, line: int) -> tuple[_Rows, int]:
    """Count in the whole rows of a text, and tell how long these are.

    :param line: lines before them.
    """
    read = np.frombuffer(text, dtype=np.uint8)
    breaks = np.flatnonzero(read == _NEWLINE)
    ends, commas = breaks, np.flatnonzero(read == _COMMA)
    if b'"' in text:
        quoted = np.cumsum(read == _QUOTE, dtype=np.uint8) % 2 == 1  # 256 is even: it may run over
        ends, commas = ends[~quoted[ends]], commas[~quoted[commas]]
    values = np.diff(np.searchsorted(commas, ends), prepend=0) + 1
    starts = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
    blank = (starts == ends) | ((starts + 1 == ends) & (read[starts] == _RETURN))
    values[blank] = 0
    rows = _Rows(np.searchsorted(breaks, ends) + 1 + line, values)
    return rows, int(ends[-1]) + 1 if len(ends) else 0
