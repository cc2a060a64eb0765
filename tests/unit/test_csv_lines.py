"""Lines of CSV files with too few values are found, whatever else is in the file."""

from __future__ import annotations

import csv
import io
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings, strategies as st

from airflow_mlops.exceptions import SchemaMismatchError
from airflow_mlops.integrations import delta, object_store
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.ingestion import csv_lines
from airflow_mlops.steps.ingestion.files import scan_files


def ingest(folder: Path, **spec: str) -> dict[str, list[object]]:
    run_step("ingest", {"source": str(folder / "*.csv"), "table": str(folder / "table")} | spec, Services())
    return delta.read_table(str(folder / "table")).collect().to_dict(as_series=False)


@pytest.mark.parametrize(
    ("text", "line", "values"),
    [
        ("a,b,c\n1,2,3\n4,5\n", 3, 2),
        ("a,b,c\r\n\r\n1,2,\r\n4\r\n\r\n", 4, 1),
        ('\n\n"a\nx",b,c\n"1,\n"",2",2,\n,,\n7,8', 8, 2),
    ],
)
def test_a_line_with_too_few_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, line: int, values: int
) -> None:
    monkeypatch.setattr(object_store, "_CHUNK", 3)
    (tmp_path / "a.csv").write_bytes(text.encode())
    with pytest.raises(
        SchemaMismatchError, match=rf"a\.csv, line {line}: {values} values where there are 3 col"
    ):
        ingest(tmp_path)
    assert not delta.table_exists(str(tmp_path / "table"))


def test_the_file_is_named_also_where_the_table_knows_the_types(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,2\n3,\n")
    assert ingest(tmp_path) == {"a": [1, 3], "b": [2, None]}
    (tmp_path / "b.csv").write_text("a,b\n5,6\n7\n8\n")
    with pytest.raises(SchemaMismatchError, match=r"b\.csv, line 3: 1 values .* \(lines with too few: 2\)"):
        ingest(tmp_path, mode="append")


def test_one_column_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a\n1\n\n2\n")
    assert ingest(tmp_path)["a"] == [1, None, 2]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('a,b,c,d\n5" x,6" y,2,\n7,8,9,10\n', None),
        ('a,b,c,d\n5" x,6" y,2,\n"1,2",5" ""x",8\n"7,8",9\n', r"line 3: 3 values .* few: 2\)"),
        ('a,b,c,d\nx","1,2,3,4,5",y"\n', r"line 2: 3 values .* few: 1\)"),  # more commas than values
    ],
)
@pytest.mark.parametrize("chunk", [3, 100])
def test_a_quote_inside_an_unquoted_value_quotes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, found: str | None, chunk: int
) -> None:
    monkeypatch.setattr(object_store, "_CHUNK", chunk)
    (tmp_path / "a.csv").write_text(text)
    if found is None:
        assert ingest(tmp_path)["b"] == ['6" y', "8"]
        return
    with pytest.raises(SchemaMismatchError, match=found):
        ingest(tmp_path)


def test_what_is_kept_of_a_file_is_less_than_its_rows(tmp_path: Path) -> None:
    rows = 400_000
    file = tmp_path / "a.csv"
    file.write_text("a,b\n" + "1,\n" * rows)
    nulls = pl.Series([True] * rows)
    tracemalloc.start()
    try:
        found = csv_lines._find_short(csv_lines._rows(read_in(file, 2**14), ","), nulls, 2, ",")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (found.rows, found.too_short) == (rows + 1, 0)
    assert peak < 2 * rows


def read_in(file: Path, size: int) -> Iterator[bytes]:
    with file.open("rb") as read:
        yield from iter(lambda: read.read(size), b"")


def test_a_file_from_an_address_is_called_by_it(tmp_path: Path) -> None:
    file = tmp_path / "5f1a.csv"
    file.write_text("a,b\n1\n")
    with pytest.raises(SchemaMismatchError, match=r"^https://example\.org/x\.csv, line 2: "):
        scan_files([str(file)], name="https://example.org/x.csv")


def written(row: list[str], end: str) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end).writerow(row)
    return text.getvalue()


@settings(max_examples=60)
@given(
    rows=st.lists(st.lists(st.text('a1,"\n ', max_size=3), min_size=1, max_size=3), max_size=6),
    bare=st.lists(st.sampled_from(["", '5" x,6" y,', '5"" x,']), min_size=6, max_size=6),
    end=st.sampled_from(["\n", "\r\n"]),
    chunk=st.integers(1, 9),
)
def test_what_a_reader_of_csv_finds_too_short(
    rows: list[list[str]], bare: list[str], end: str, chunk: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = str(tmp_path_factory.mktemp("csv") / "a.csv")
    for start, row in zip(bare, rows, strict=False):
        if start:  # polars refuses a row with such a quote and one that quotes commas further on
            row[:] = [value.translate(dict.fromkeys(b',"\n')) for value in row]
    lines = "".join(start + written(row, end) for start, row in zip(bare, rows, strict=False))
    read = list(csv.reader(io.StringIO(lines, newline="")))
    width = max([2, *map(len, read)])
    Path(file).write_text(written([f"c{number}" for number in range(width)], end) + lines, newline="")
    short = [row for row in read if len(row) < width]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(object_store, "_CHUNK", chunk)
        if not short:
            assert scan_files([file], name=file).collect().height <= len(rows)
            return
        with pytest.raises(SchemaMismatchError, match=rf"too few: {len(short)}\)"):
            scan_files([file], name=file)
