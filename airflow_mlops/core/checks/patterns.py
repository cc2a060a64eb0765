"""Regular expressions in Python's dialect, searched in columns."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import polars as pl


def matches(value: pl.Expr, pattern: Any) -> pl.Expr | None:
    """Search a pattern in Python's own dialect; what it says of plain texts, polars finds faster."""
    import polars as pl

    if not isinstance(pattern, str):
        return None
    try:
        search = re.compile(pattern).search
    except re.error:
        return None
    of_ascii = for_ascii(pattern)

    def search_batch(texts: pl.Series) -> pl.Series:
        if of_ascii is not None and (texts.str.len_bytes() == texts.str.len_chars()).all():
            return texts.str.contains(of_ascii)
        if texts.is_empty():
            return pl.Series(texts.name, [], dtype=pl.Boolean)
        distinct = texts.unique()
        found = [None if text is None else search(text) is not None for text in distinct]
        return texts.replace_strict(distinct, pl.Series(found, dtype=pl.Boolean), return_dtype=pl.Boolean)

    return value.map_batches(search_batch, return_dtype=pl.Boolean, is_elementwise=True)


#: Patterns that mean the same to Python and to polars, whose dialect is Rust's, where all texts are ASCII: characters, classes of them,
#: groups, alternatives, repetitions; a dollar only at the end.
_CHARACTER = r"[A-Za-z0-9 _@:,;/#%&=<>!'\"~`-]|\\[dw.+*?()\[\]{}|^$\\/-]"
_CLASS = r"\[\^?(?:[A-Za-z0-9]-[A-Za-z0-9]|[A-Za-z0-9 _@.,:;/+*#]|\\[dw.+\-\[\]\\/])+-?\]"
_REPEATED = r"(?:(?:\{\d+(?:,\d*)?\}|[+*?])\??)?"
_COMMON = re.compile(rf"(?:\^|\((?:\?:)?|\||(?:\)|\.|{_CLASS}|{_CHARACTER}){_REPEATED})+\$?", re.ASCII)
_ASCII_CLASSES = {r"\d": "0-9", r"\w": "0-9A-Za-z_"}


def for_ascii(pattern: str) -> str | None:
    r"""Translate a pattern for texts of ASCII only; ``None`` where polars would read it otherwise.

    >>> for_ascii(r"^[\d.]{5}\d$"), for_ascii(r"(?<=a)b")
    ('^[0-9.]{5}[0-9]\\n?\\z', None)
    """
    import polars as pl

    if not _COMMON.fullmatch(pattern):
        return None
    pieces, inside = [], False
    for piece in re.findall(r"\\.|.", pattern):
        known = _ASCII_CLASSES.get(piece)
        pieces.append(piece if known is None else known if inside else f"[{known}]")
        inside = piece == "[" or (inside and piece != "]")
    if pieces[-1] == "$":
        pieces[-1] = r"\n?\z"  # Python's dollar is also before a last line end
    translated = "".join(pieces)
    try:
        pl.Series([""]).str.contains(translated)
    except pl.exceptions.PolarsError:  # such as too many repetitions
        return None
    return translated
