"""Sum a version's rows file by file; only files are read that nobody has read before."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from airflow_mlops.core.data.batches import BATCH_ROWS
from airflow_mlops.core.data.digest import FORMAT, RowDigest, RowSum
from airflow_mlops.integrations.delta.tables import data_files
from airflow_mlops.integrations.object_store import ObjectStore

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import polars as pl
    from deltalake import DeltaTable

logger = logging.getLogger(__name__)

#: Where in a table's folder the sums are kept; Delta and its vacuum leave folders alone that begin like this.
_FILE = "_airflow_mlops/digest.json"


class FileSum(NamedTuple):
    """Sum over the rows of some data files. A data file never changes, and no two have the same name.

    :param files: paths in the table's folder.
    :param columns: name and type of the table's columns when they were read.
    """

    files: frozenset[str]
    columns: dict[str, str]
    total: RowSum


def sum_table(
    uri: str, table: DeltaTable, schema: Mapping[str, pl.DataType], known: Iterable[FileSum] = ()
) -> tuple[RowSum, list[FileSum]]:
    """Sum over a version's rows: what is remembered, and the other files read.

    :param uri: the table's folder.
    :param known: what was learned in passing; goes before what is remembered.
    :returns: the sum, and what it consists of.
    """
    columns = {name: str(dtype) for name, dtype in schema.items()}
    rows = data_files(table)
    missing = set(rows)
    parts: list[FileSum] = []
    for part in (*known, *_recall(uri)):
        # With a column that was added since, the older rows are null there, which adds nothing.
        if (
            part.files
            and part.files <= missing
            and part.columns.items() <= columns.items()
            and _whole(part, rows)
        ):
            parts.append(part)
            missing -= part.files
    parts += [FileSum(frozenset({file}), columns, total) for file, total in _read(table, schema, missing)]
    return sum((part.total for part in parts), RowSum()), parts


def _whole(part: FileSum, rows: Mapping[str, int]) -> bool:
    """Tell whether a sum is over as many rows as the table's log says the files have."""
    known = [rows[file] for file in part.files]
    return -1 in known or sum(known) == part.total.row_count


def remember_sums(uri: str, parts: list[FileSum]) -> None:
    """Keep what a version's sum consists of; where that fails, the files are read again next time."""
    kept = [[sorted(part.files), part.columns, _numbers(part.total)] for part in parts]
    text = json.dumps({FORMAT: kept})
    try:
        ObjectStore(uri).write(_FILE, text.encode())
    except OSError as err:
        logger.warning("the digest of %s will be computed anew: %s", uri, err)


def _recall(uri: str) -> list[FileSum]:
    try:
        listed = json.loads(ObjectStore(uri).read(_FILE))[FORMAT]
        return [
            FileSum(frozenset(files), dict(columns), RowSum(_number(count), _number(first), _number(second)))
            for files, columns, (count, first, second) in listed
        ]
    except (OSError, LookupError, ValueError, TypeError) as err:
        logger.debug("no digest is remembered for %s: %s", uri, err)
        return []


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**64:
        raise ValueError(f"{value!r} is no sum")
    return value


def _read(
    table: DeltaTable, schema: Mapping[str, pl.DataType], files: set[str]
) -> Iterator[tuple[str, RowSum]]:
    import polars as pl
    import pyarrow as pa
    from polars.selectors import by_name  # of names as they are: select() takes ^a$ for a pattern

    if not files:
        return
    dataset = table.to_pyarrow_dataset()
    found = {fragment.path: fragment for fragment in dataset.get_fragments()}
    for file in sorted(files):
        digest = RowDigest({name: str(dtype) for name, dtype in schema.items()})
        # The log spells what it needs to of a name as in a URL. Files in two folders may have one name.
        batches = found[unquote(file)].to_batches(
            schema=dataset.schema, batch_size=BATCH_ROWS, batch_readahead=2, fragment_readahead=1
        )
        for batch in batches:
            frame = pl.DataFrame(pa.Table.from_batches([batch]))
            digest.update(frame.select(by_name(name).cast(dtype) for name, dtype in schema.items()))
        yield file, digest.total


def _numbers(total: RowSum) -> list[Any]:
    return [total.row_count, total.first, total.second]
