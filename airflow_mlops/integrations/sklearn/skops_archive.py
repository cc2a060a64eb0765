"""The archive that skops writes, without what differs from one writing to the next."""

from __future__ import annotations

import json
import zipfile
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

_SCHEMA = "schema.json"

#: The first day that a zip archive can name.
_NO_TIME = (1980, 1, 1, 0, 0, 0)


def write_repeatable(dumped: BinaryIO, path: Path) -> None:
    """Write a skops archive so that equal models give equal bytes.

    skops numbers objects and names files by addresses in memory, or at random, and every file has the time of the writing. Here
    they are numbered in the order in which the schema names them.

    :param dumped: what ``skops.io.dump`` wrote.
    :param path: the archive to write.
    """
    with zipfile.ZipFile(dumped) as source, zipfile.ZipFile(path, "w") as archive:
        schema = json.loads(source.read(_SCHEMA))
        _order_sets(schema)
        members = _number(schema, {*source.namelist()})
        for old, new in members.items():
            with source.open(old) as data, archive.open(_entry(new, source.getinfo(old)), "w") as copy:
                while block := data.read(2**20):
                    copy.write(block)
        archive.writestr(zipfile.ZipInfo(_SCHEMA, _NO_TIME), json.dumps(schema))


def _entry(name: str, like: zipfile.ZipInfo) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _NO_TIME)
    entry.file_size = (
        like.file_size
    )  # whether the entry has room for large sizes is decided before it is written
    return entry


def _number(schema: Any, names: set[str]) -> dict[str, str]:
    """Give objects and files their numbers.

    :returns: the new name of each file by its old one.
    """
    numbers: dict[int, int] = {}
    members: dict[str, str] = {}
    for node in _nodes(schema):
        if node.get("__loader__") == "JsonNode":
            # Numbers and texts that are one object here may be two in another process, and nothing depends on it.
            node.pop("__id__", None)
        if isinstance(node.get("__id__"), int):
            node["__id__"] = numbers.setdefault(node["__id__"], len(numbers) + 1)
        file = node.get("file")
        if isinstance(file, str) and file in names:
            node["file"] = members.setdefault(file, f"{len(members) + 1}{PurePosixPath(file).suffix}")
    return members


def _nodes(part: Any) -> Iterator[dict[str, Any]]:
    """Give every object of the schema in its order."""
    if isinstance(part, dict):
        yield part
        for value in part.values():
            yield from _nodes(value)
    elif isinstance(part, list):
        for value in part:
            yield from _nodes(value)


def _order_sets(schema: Any) -> None:
    """Sort the members of sets, which come in another order in every process where they are texts."""
    for node in _nodes(schema):
        if node.get("__loader__") == "SetNode":
            node["content"].sort(key=_told)


def _told(part: Any) -> str:
    return json.dumps(_without_numbers(part), sort_keys=True)


def _without_numbers(part: Any) -> Any:
    if isinstance(part, dict):
        return {key: _without_numbers(value) for key, value in part.items() if key != "__id__"}
    return [_without_numbers(value) for value in part] if isinstance(part, list) else part
