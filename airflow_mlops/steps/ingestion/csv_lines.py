"""Lines of CSV files that have too few values or too many.

Where they are too few, polars takes the last ones for null, as if they were written empty; where too many, it does not say in which line.
"""

from __future__ import annotations

import csv
import sys
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from airflow_mlops.exceptions import SchemaMismatchError
from airflow_mlops.integrations.object_store import read_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from typing import TypeAlias

    import polars as pl

    _Numbers: TypeAlias = np.ndarray[tuple[int], np.dtype[np.int64]]

_QUOTE, _NEWLINE, _RETURN = b'"\n\r'
#: Bytes of a row beyond which a quote is taken for one that is never closed.
_LONGEST = 64 * 1024**2


class _Rows(NamedTuple):
    """Some rows of a file as they are written, a row with a line break in a quoted text being one.

    :param text: holds them.
    :param starts: where each begins in the text.
    :param ends: where the line break after each is.
    :param lines: the line each ends at, from 1.
    :param values: how many each has; 0 of a blank line.
    :param unsure: those with a quote inside an unquoted value (``5" pipe``), of which ``values`` is not to be believed.
    """

    text: bytes
    starts: _Numbers
    ends: _Numbers
    lines: _Numbers
    values: _Numbers
    unsure: np.ndarray[tuple[int], np.dtype[np.bool_]]


class _Short(NamedTuple):
    """What a file has of rows with too few values.

    :param rows: all rows of the file, the header being one.
    :param too_short: those with too few.
    :param line: where the first of them ends.
    :param values: how many that one has.
    """

    rows: int
    too_short: int = 0
    line: int = 0
    values: int = 0


def require_full_lines(
    files: Sequence[str],
    scan: Callable[..., pl.LazyFrame],
    columns: Sequence[str],
    *,
    name: str,
    separator: str = ",",
    shown: Callable[[str], str] = str,
) -> None:
    """Find the first line with fewer values than there are columns.

    Such a line is null in the last column to polars. So that column is read, and where it has nulls, commas outside quotes
    are counted; a file of which polars finds other rows is left to polars.

    :param scan: of files, with options of ``polars.scan_csv``.
    :param name: what the files were found by.
    :param separator: between values.
    :param shown: what a file is called in messages.
    :raises SchemaMismatchError: naming file and line.
    """
    import polars as pl
    from polars.selectors import by_name

    for file in files:
        last = scan([file], infer_schema=False).select(by_name(columns[-1]).is_null())
        try:
            nulls = last.collect(engine="streaming").to_series()  # a bit for each row
        except pl.exceptions.PolarsError:
            require_no_long_line(file, name=name, separator=separator, shown=shown)
            return  # something else is wrong, which is said when the rows are read
        if not nulls.any():
            continue
        rows = _rows(read_chunks(file, name), separator)
        short = _find_short(rows, nulls, len(columns), separator)
        if short.too_short and short.rows == len(nulls) + 1:
            raise SchemaMismatchError(
                f"{shown(file)}, line {short.line}: {short.values} values where there are {len(columns)} columns "
                f"(lines with too few: {short.too_short}). Which ones are missing can't be told: write their separators at the source, "
                "or remove the lines"
            )


def require_no_long_line(
    file: str, *, name: str, separator: str = ",", shown: Callable[[str], str] = str
) -> None:
    """Find the first line with more values than its header: for a file that polars does not read.

    :param name: what the file was found by.
    :param separator: between values.
    :param shown: what a file is called in messages.
    :raises SchemaMismatchError: naming file and line.
    """
    width = 0
    for part in _rows(read_chunks(file, name), separator):
        if not part.values.any():
            continue  # blank lines, or none that ends
        width = width or _count_values(part, int((part.values > 0).argmax()), separator)
        for row in np.flatnonzero((part.values > width) | part.unsure).tolist():
            count = _count_values(part, row, separator)
            if width < count < sys.maxsize:
                raise SchemaMismatchError(
                    f"{shown(file)}, line {part.lines[row]}: {count} values where there are {width} columns. Is a {separator!r} part of a value? "
                    "Then write that value in quotes at the source"
                )


def _find_short(parts: Iterable[_Rows], nulls: pl.Series, width: int, separator: str) -> _Short:
    """Compare the rows of a file with where polars finds null in their last column."""
    found = _Short(rows=0)
    for part in parts:
        skipped = 0
        if not found.rows:  # blank lines before the header are no rows
            if not part.values.any():
                continue
            skipped = int((part.values > 0).argmax()) + 1
            found = found._replace(rows=1)
        null = nulls.slice(found.rows - 1, len(part.values) - skipped).to_numpy()
        values = part.values[skipped:]
        found = found._replace(rows=found.rows + len(values))
        if len(null) < len(values):
            break  # more rows than polars finds
        suspected = null & (values > 0) & ((values < width) | part.unsure[skipped:])
        for row in (np.flatnonzero(suspected) + skipped).tolist():
            count = _count_values(part, row, separator)
            if count < width:
                first = {} if found.too_short else {"line": int(part.lines[row]), "values": count}
                found = found._replace(too_short=found.too_short + 1, **first)
    return found


def _count_values(rows: _Rows, row: int, separator: str) -> int:
    """Count the values of a row; one that is not whole has more than any."""
    if not rows.unsure[row]:
        return int(rows.values[row])
    text = rows.text[rows.starts[row] : rows.ends[row]].decode("latin-1")
    try:
        return len(next(csv.reader([text], delimiter=separator)))
    except csv.Error:  # a value that is too long, or a line break where none may be
        return sys.maxsize


def _rows(chunks: Iterable[bytes], separator: str) -> Iterator[_Rows]:
    """Count the values of each row, in the order of the file."""
    rest, line = b"", 0
    for chunk in chunks:
        text = rest + chunk
        rows, size = _counted(text, line, separator)
        rest = text[size:]
        yield rows
        line += text.count(b"\n", 0, size)
        if len(rest) > _LONGEST:
            return
    if rest:
        yield _counted(rest + b"\n", line, separator)[0]


def _counted(text: bytes, line: int, separator: str) -> tuple[_Rows, int]:
    """Count in the whole rows of a text, and tell how long these are.

    A row ends where polars ends it, at a line break after an even number of quotes.

    :param line: lines before them.
    """
    read = np.frombuffer(text, dtype=np.uint8)
    breaks = np.flatnonzero(read == _NEWLINE)
    ends, commas, bare = breaks, np.flatnonzero(read == ord(separator)), np.empty(0, dtype=np.int64)
    if b'"' in text:
        quotes = read == _QUOTE
        quoted = np.cumsum(quotes, dtype=np.uint8) % 2 == 1  # 256 is even: it may run over
        ends, commas = ends[~quoted[ends]], commas[~quoted[commas]]
        opening = np.flatnonzero(quotes & quoted)
        opening = opening[opening > 0]
        # A quote opens a value at its start, and goes on with it after the quote before.
        bare = opening[~np.isin(read[opening - 1], (_QUOTE, ord(separator), _NEWLINE))]
    values = np.diff(np.searchsorted(commas, ends), prepend=0) + 1
    starts = np.concatenate([[0], ends[:-1] + 1])[: len(ends)]
    blank = (starts == ends) | ((starts + 1 == ends) & (read[starts] == _RETURN))
    values[blank] = 0
    unsure = np.diff(np.searchsorted(bare, ends), prepend=0) > 0
    rows = _Rows(text, starts, ends, np.searchsorted(breaks, ends) + 1 + line, values, unsure)
    return rows, int(ends[-1]) + 1 if len(ends) else 0
