"""Lines of CSV files with too few values are found, whatever else is in the file."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from airflow_mlops.exceptions import SchemaMismatchError
from airflow_mlops.integrations import delta, object_store
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
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


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.text('a1,"\n ', max_size=3), min_size=1, max_size=3), max_size=6),
    end=st.sampled_from(["\n", "\r\n"]),
    chunk=st.integers(1, 9),
)
def test_what_a_reader_of_csv_finds_too_short(
    rows: list[list[str]], end: str, chunk: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = str(tmp_path_factory.mktemp("csv") / "a.csv")
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end).writerows([["x", "y", "z"], *rows])
    Path(file).write_text(text.getvalue(), newline="")
    short = [row for row in rows if len(row) < 3]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(object_store, "_CHUNK", chunk)
        if not short:
            assert scan_files([file], name=file).collect().height <= len(rows)
            return
        with pytest.raises(SchemaMismatchError, match=rf"too few: {len(short)}\)"):
            scan_files([file], name=file)
