"""Lines of JSON lines files that are none: polars does not say where."""

from __future__ import annotations

import codecs
import json
from typing import TYPE_CHECKING, NoReturn

from airflow_mlops.exceptions import SchemaMismatchError
from airflow_mlops.integrations.object_store import read_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


#: Bytes beyond which a line is not looked at.
_LONGEST = 64 * 1024**2


def require_objects(file: str, *, name: str, shown: Callable[[str], str] = str) -> None:
    """Find the first line that is no JSON object: for a file that polars does not read.

    :param name: what the file was found by.
    :param shown: what a file is called in messages.
    :raises SchemaMismatchError: naming file and line.
    """
    for number, line in enumerate(_lines(read_chunks(file, name)), start=1):
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            raise SchemaMismatchError(
                f"{shown(file)} begins with a byte order mark, which JSON must not have (RFC 8259): write it without"
            )
        problem = _problem(line)
        if problem:
            raise SchemaMismatchError(
                f"{shown(file)}, line {number}: {problem}. Write one object in each line at the source"
            )


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        yield from whole
        if len(rest) > _LONGEST:
            return
    yield rest


def _problem(line: bytes) -> str | None:
    """Tell why a line is no object, without what it holds."""
    if not line.strip():
        return None
    try:
        value = json.loads(line, parse_constant=_refuse)
    except UnicodeDecodeError:
        return "its text is not UTF-8"
    except json.JSONDecodeError as err:
        return f"it is no JSON from character {err.pos + 1} on ({err.msg})"
    except ValueError as err:
        return str(err)
    except RecursionError:
        return "it is nested too deeply"
    return None if isinstance(value, dict) else "it is JSON, and no object"


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON (null is)")
