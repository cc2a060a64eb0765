"""Types of the columns of CSV files: the table's own where all texts read as such, else what all rows have, not the first ones."""

from __future__ import annotations

import codecs
import logging
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

from airflow_mlops.exceptions import SchemaMismatchError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import polars as pl

log = logging.getLogger(__name__)

#: Rows of each file that polars guesses a type from.
_GUESSED_ROWS = 100

#: What columns may be declared to be, beside ``Decimal(10,2)``.
_DECLARED = ("String", "Boolean", "Int8", "Int16", "Int32", "Int64", "Float32", "Float64", "Date")

#: What separates values in files that are not separated by commas.
_OTHERS = ";\t|"


class CsvFormat(NamedTuple):
    """How CSV files are written.

    :param separator: between values; ``None``: a comma, and a header that has none and looks as if it had another is refused.
    :param encoding: as Python names it.
    :param types: what columns are, by name; those that are not named are what all of their texts read as.
    """

    separator: str | None = None
    encoding: str = "utf-8"
    types: Mapping[str, str] = MappingProxyType({})

    @property
    def comma(self) -> str:
        """What separates values."""
        return self.separator or ","

    @property
    def recoded(self) -> bool:
        """Tell whether the files have to be written anew, as polars reads UTF-8 only."""
        return codecs.lookup(self.encoding).name not in ("utf-8", "utf-8-sig", "ascii")

    def require(self) -> None:
        """Check each for itself.

        :raises ValueError: one can't be.
        """
        if len(self.comma) != 1 or not self.comma.isascii() or self.comma in '"\r\n':
            raise ValueError(
                f"csv_separator {self.separator!r} separates nothing: give one ASCII character, such as ';' or a tab"
            )
        try:
            "".encode(self.encoding)
        except (LookupError, UnicodeError) as err:
            raise ValueError(
                f"csv_encoding {self.encoding!r} is none that Python knows: give one such as utf-8, latin-1, cp1252 or utf-16"
            ) from err
        for column, told in self.types.items():
            _declared(column, told)


def _declared(column: str, told: str) -> pl.DataType:
    """Read how a type is spelled.

    :raises ValueError: there is none such.
    """
    import polars as pl

    if told in _DECLARED:
        dtype: pl.DataType = getattr(pl, told)()
        return dtype
    digits = re.fullmatch(r"Decimal\((\d+), ?(\d+)\)", told)
    if digits and 1 <= int(digits[1]) <= 38 and int(digits[2]) <= int(digits[1]):
        return pl.Decimal(int(digits[1]), int(digits[2]))
    raise ValueError(
        f"column_types[{column!r}] is {told!r}: give one of {', '.join(_DECLARED)}, or Decimal(precision,scale) such as Decimal(10,2). "
        "Texts of times are read with time_column"
    )


def find_columns(
    files: Sequence[str],
    scan: Callable[..., pl.LazyFrame],
    *,
    written: CsvFormat,
    shown: Callable[[str], str],
) -> dict[str, dict[str, pl.DataType]]:
    """Find the columns of each file, with a first guess of their types; a file without a line has none, and no rows.

    :param shown: what a file is called in messages.
    :raises SchemaMismatchError: a header has another separator.
    """
    import polars as pl

    found: dict[str, dict[str, pl.DataType]] = {}
    for file in files:
        try:
            found[file] = dict(scan([file]).collect_schema())
        except pl.exceptions.NoDataError:
            continue
        header = next(iter(found[file]))
        other = next((mark for mark in _OTHERS if mark in header), None)
        if written.separator is None and other is not None and len(found[file]) == 1:
            raise SchemaMismatchError(
                f"{shown(file)} has one column, {header!r}: are its values separated by {other!r}? Then give csv_separator={other!r}, "
                "and csv_separator=',' if that is the column's name"
            )
    return found


def csv_types(
    columns: Mapping[str, Mapping[str, pl.DataType]],
    scan: Callable[..., pl.LazyFrame],
    *,
    written: CsvFormat,
    name: str,
    table: Mapping[str, pl.DataType],
    texts: Sequence[str],
) -> dict[str, pl.DataType]:
    """Find what the columns are read as.

    Rows are looked at where the guess is not the table's type, so of a table with the same types no more than the first ones are.

    :param columns: of each file, as :func:`find_columns` found them.
    :param scan: of files, with options of ``polars.scan_csv``.
    :param name: what the files were found by, for messages.
    :param table: types of the table that the rows are for, by column.
    :param texts: columns that are taken as they stand.
    :raises SchemaMismatchError: two columns have the same name; one that is declared is not there, or has texts that are none such.
    """
    import polars as pl

    files = list(columns)
    guessed = _guess(columns, scan)
    _require_names(guessed, name)
    declared = {column: _declared(column, told) for column, told in written.types.items()}
    _require_declared(files, scan, declared, guessed, name)
    types: dict[str, pl.DataType] = {}
    wanted: dict[str, list[pl.DataType]] = {}
    for column, dtype in guessed.items():
        if column in declared:
            types[column] = declared[column]
            continue
        types[column] = known = pl.String() if column in texts else table.get(column, pl.String())
        if column in texts or known == dtype or (column in table and known == pl.String):
            continue
        wanted[column] = [known, *_wider(dtype)] if column in table and _readable(known) else _wider(dtype)
        types[column] = pl.String()
    return types | _first_that_reads(files, scan, wanted, table)


def _require_names(columns: Iterable[str], name: str) -> None:
    """Find what polars makes of a name that comes twice."""
    renamed = [re.fullmatch(r"(.*)_duplicated_\d+", column, re.DOTALL) for column in columns]
    twice = sorted({found[1] for found in renamed if found} & {*columns})
    if twice:
        raise SchemaMismatchError(
            f"{name} has two columns named {', '.join(twice)}: rename one at the source"
        )


def _require_declared(
    files: Sequence[str],
    scan: Callable[..., pl.LazyFrame],
    declared: Mapping[str, pl.DataType],
    known: Iterable[str],
    name: str,
) -> None:
    """Check that the columns are there, and all of their texts are what they are declared to be.

    :raises SchemaMismatchError: naming those that are not.
    """
    import polars as pl
    from polars.selectors import by_name

    missing = [column for column in declared if column not in {*known}]
    if missing:
        raise SchemaMismatchError(
            f"{name} has no column {', '.join(missing)}, which column_types names; it has {', '.join(known)}"
        )
    read = {column: dtype for column, dtype in declared.items() if dtype != pl.String}
    if not read:
        return
    rows = scan(files, infer_schema=False)
    counts = rows.select(_undeclared(by_name(column), dtype).sum() for column, dtype in read.items())
    for (column, dtype), count in zip(read.items(), counts.collect(engine="streaming").row(0), strict=True):
        if count:
            raise SchemaMismatchError(
                f"{name}: {count} texts of column {column!r} are no {dtype}, which column_types says. "
                "Correct them at the source, or give another type; String takes all"
            )


def _undeclared(text: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Tell which texts are no value of a type, or one only when it is rounded."""
    import polars as pl

    if dtype == pl.Date:
        return text.str.to_date("%Y-%m-%d", strict=False).is_null() & (text != "")
    if dtype == pl.Boolean:
        return ~text.str.to_lowercase().is_in(["", "true", "false"])
    unread = text.cast(dtype, strict=False).is_null()
    if isinstance(dtype, pl.Decimal):
        unread |= ~text.str.contains(rf"^[+-]?\d*(\.\d{{0,{dtype.scale}}})?$")
    return unread & (text != "")


def _guess(
    columns: Mapping[str, Mapping[str, pl.DataType]], scan: Callable[..., pl.LazyFrame]
) -> dict[str, pl.DataType]:
    """Guess by the first rows of each file; a column without any value there is ``Null``."""
    import polars as pl

    guessed: dict[str, pl.DataType] = {}
    for file, schema in columns.items():
        # As texts: polars reads on beyond the first rows, and those after them may not be what it guessed.
        first = scan([file], infer_schema=False).head(_GUESSED_ROWS)
        counts = first.select(pl.all().count()).collect().row(0, named=True)
        for name, dtype in schema.items():
            found, known = dtype if counts[name] else pl.Null(), guessed.get(name, pl.Null())
            if known in (found, pl.Null()):
                guessed[name] = found
            elif found != pl.Null:
                guessed[name] = pl.Float64() if {known, found} == {pl.Int64(), pl.Float64()} else pl.String()
    return guessed


def _wider(dtype: pl.DataType) -> list[pl.DataType]:
    """Give what a column may turn out to be that was guessed to be this; a text in the end."""
    import polars as pl

    if dtype == pl.Null:
        return [pl.Int64(), pl.Float64(), pl.Boolean()]
    if dtype == pl.Int64:
        return [pl.Int64(), pl.Float64()]
    return [dtype] if _readable(dtype) else []


def _readable(dtype: pl.DataType) -> bool:
    import polars as pl

    return dtype in (pl.Boolean, pl.Date) or dtype.is_numeric()


def _first_that_reads(
    files: Sequence[str],
    scan: Callable[..., pl.LazyFrame],
    wanted: Mapping[str, Sequence[pl.DataType]],
    table: Mapping[str, pl.DataType],
) -> dict[str, pl.DataType]:
    """Give for each column the first of the types that all texts read as.

    Those without one are left out; a column without any text has the table's. Where numbers are made of codes such as ``00123``,
    the log says so: what they were can't be seen in the table any more.
    """
    import polars as pl
    from polars.selectors import by_name

    tries = [(name, dtype) for name, dtypes in wanted.items() for dtype in dtypes]
    if not tries:
        return {}
    codes = [name for name, dtypes in wanted.items() if name not in table and pl.Int64() in dtypes]
    seen = [
        *(_unread(by_name(name), dtype) for name, dtype in tries),
        *(by_name(name).str.contains(r"^[+-]?0\d").sum() for name in codes),
    ]
    rows = scan(files, infer_schema=False)
    counts = rows.select(count.alias(str(number)) for number, count in enumerate(seen))
    failed = counts.collect(engine="streaming").row(0)
    found: dict[str, pl.DataType] = {}
    for (name, dtype), count in zip(tries, failed, strict=False):
        if count == 0 or (count is None and dtype == table.get(name)):
            found.setdefault(name, dtype)
    for name, count in zip(codes, failed[len(tries) :], strict=True):
        if count and found.get(name) == pl.Int64:
            log.warning(
                "column %r becomes a whole number, and %s of its texts lose the zeros they begin with; column_types={%r: 'String'} keeps them",
                name,
                f"{count:,}",
                name,
            )
    return found


def _unread(text: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """Count the texts that are no value of a type; null where there is no text at all."""
    import polars as pl

    unread = _undeclared(text, dtype)
    if (
        dtype == pl.Float64
    ):  # which would take the last digits of a whole number that is too large for 64 bits
        unread |= text.str.contains(r"^[+-]?\d+$") & text.cast(pl.Int64, strict=False).is_null()
    return pl.when((text != "").sum() > 0).then(unread.sum())
