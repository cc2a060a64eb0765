"""CSV files as other programs write them: separators, encodings, empty files, and columns that are declared."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import polars as pl
import pytest

from airflow_mlops.exceptions import SchemaMismatchError
from airflow_mlops.integrations import delta
from airflow_mlops.operators.ingest import IngestDatasetOperator
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.ingestion import spool


def ingest(folder: Path, **arguments: Any) -> dict[str, list[Any]]:
    """Run the step on the spec that the operator builds; give the table."""
    given = {"source": str(folder / "*.csv"), "table": str(folder / "table")} | arguments
    task = IngestDatasetOperator(task_id="ingest", **given)
    run_step("ingest", task.build_spec({}), Services())
    return delta.read_table(given["table"]).collect().to_dict(as_series=False)


class TestSeparators:
    @pytest.mark.parametrize("separator", [";", "\t", "|"])
    def test_a_header_with_another_one_is_refused_and_read_when_it_is_named(
        self, tmp_path: Path, separator: str
    ) -> None:
        text = 'a;b\n1;2,5\n2;"x;y"\n'.replace(";", separator)
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(SchemaMismatchError, match=r"a\.csv has one column, .* give csv_separator="):
            ingest(tmp_path)
        assert not delta.table_exists(str(tmp_path / "table"))
        assert ingest(tmp_path, csv_separator=separator) == {"a": [1, 2], "b": ["2,5", f"x{separator}y"]}

    def test_a_name_that_holds_one(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("a;b\n1\n")
        assert ingest(tmp_path, csv_separator=",") == {"a;b": [1]}
        (tmp_path / "b.csv").write_text("a|b,c\n1,2\n")
        assert ingest(tmp_path, source=str(tmp_path / "b.csv"), table=str(tmp_path / "other")) == {
            "a|b": [1],
            "c": [2],
        }

    def test_a_line_with_too_few_values(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("a;b;c\n1;2;3\n4,5;6\n")
        with pytest.raises(SchemaMismatchError, match=r"a\.csv, line 3: 2 values where there are 3 columns"):
            ingest(tmp_path, csv_separator=";")


class TestEncodings:
    @pytest.mark.parametrize(
        ("encoding", "text"),
        [("latin-1", "Größe"), ("cp1252", "5 €"), ("utf-16", "Größe €"), ("shift_jis", "東京")],
    )
    def test_it_is_read_as_it_was_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, text: str
    ) -> None:
        monkeypatch.setattr("airflow_mlops.integrations.object_store._CHUNK", 3)  # which cuts letters in two
        monkeypatch.setattr(spool.tempfile, "tempdir", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        (tmp_path / "a.csv").write_bytes(f'{text},n\r\n"{text}\n,",1\r\n'.encode(encoding))
        assert ingest(tmp_path, csv_encoding=encoding) == {text: [f"{text}\n,"], "n": [1]}
        assert list((tmp_path / "temporary").iterdir()) == []

    def test_what_is_told_of_a_copy_names_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_bytes("ä,b,c\n1,2,3\n4,5\n".encode("latin-1"))
        with pytest.raises(SchemaMismatchError, match=rf"^{tmp_path}/a\.csv, line 3: 2 values"):
            ingest(tmp_path, csv_encoding="latin-1")

    @pytest.mark.parametrize(
        "text", ["ä,b\n1,1\n", "a,b\nMünchen,1\n", "a,b\n" + "x,1\n" * 200_000 + "München,1\n"]
    )
    def test_a_file_that_is_not_utf8_is_named_with_what_to_give(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "a.csv").write_text(
            "ä,b\nx,1\n" if text.startswith("ä") else "a,b\nx,1\n", encoding="utf-8"
        )
        (tmp_path / "b.csv").write_bytes(text.encode("latin-1"))
        line = text[: text.index("ä" if text.startswith("ä") else "ü")].count("\n") + 1
        with pytest.raises(
            SchemaMismatchError, match=rf"b\.csv is not UTF-8, in line {line}\. Give csv_encoding"
        ):
            ingest(tmp_path)

    def test_rows_of_a_known_table_that_are_not_utf8(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("a,b\nx,1\n")
        ingest(tmp_path)
        (tmp_path / "b.csv").write_bytes(("a,b\n" + "x,1\n" * 200_000 + "München,1\n").encode("latin-1"))
        with pytest.raises(SchemaMismatchError, match=r"b\.csv is not UTF-8, in line 200002"):
            ingest(tmp_path, mode="append")

    def test_another_encoding_than_was_told(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_bytes(b"a\n\x81\n")
        with pytest.raises(SchemaMismatchError, match=r"a\.csv is not cp1252, which csv_encoding says"):
            ingest(tmp_path, csv_encoding="cp1252")


class TestFilesWithoutALine:
    @pytest.mark.parametrize("text", ["", "\n", "a,b\n"])
    @pytest.mark.parametrize("name", ["0.csv", "2.csv"])
    def test_one_among_others_has_no_rows(self, tmp_path: Path, text: str, name: str) -> None:
        (tmp_path / "1.csv").write_text("a,b\n1,x\n")
        (tmp_path / name).write_text(text)
        for mode in ("replace", "append"):
            assert ingest(tmp_path, mode=mode, table=str(tmp_path / mode)) == {"a": [1], "b": ["x"]}

    def test_what_comes_into_it_later_is_appended(self, tmp_path: Path) -> None:
        (tmp_path / "1.csv").write_text("a\n1\n")
        (tmp_path / "2.csv").touch()
        for _ in range(2):
            assert ingest(tmp_path, mode="append") == {"a": [1]}
        (tmp_path / "2.csv").write_text("a\n2\n")
        for _ in range(2):
            assert sorted(ingest(tmp_path, mode="append")["a"]) == [1, 2]


class TestDeclaredTypes:
    TEXT = "zip,day,price,small,flag,share\n00123,2024-01-31,1.25,5,TRUE,100000000000000000000\n,,,,,\n"
    TYPES: ClassVar = {
        "zip": "String", "day": "Date", "price": "Decimal(10,2)", "small": "Int8", "flag": "Boolean", "share": "Float32",
    }  # fmt: skip

    def test_they_are_what_the_table_gets(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text(self.TEXT.replace(",,,,,", "7,,,,,"))
        table = ingest(tmp_path, column_types=self.TYPES)
        assert {name: values[0] for name, values in table.items()} == {
            "zip": "00123",
            "day": date(2024, 1, 31),
            "price": Decimal("1.25"),
            "small": 5,
            "flag": True,
            "share": pytest.approx(1e20),
        }
        schema = {
            name: str(dtype)
            for name, dtype in delta.read_table(str(tmp_path / "table")).collect_schema().items()
        }
        assert schema == self.TYPES | {"price": "Decimal(precision=10, scale=2)"}
        again = ingest(tmp_path, mode="append", column_types={"zip": "String"})  # the table knows the others
        assert again["zip"] == ["00123", "7"] * 2

    def test_zeros_that_a_number_does_not_keep_are_told_of(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "a.csv").write_text("zip,n,share,mixed\n00123,10,00.5,007\n0,0,0.5,a\n-07,-5,1,b\n")
        assert ingest(tmp_path)["zip"] == [123, 0, -7]
        (told,) = [record.getMessage() for record in caplog.records if "zeros" in record.getMessage()]
        assert told.startswith("column 'zip' becomes a whole number, and 2 of its texts lose the zeros")
        caplog.clear()
        kept = ingest(tmp_path, table=str(tmp_path / "other"), column_types={"zip": "String"})
        assert kept["zip"] == ["00123", "0", "-07"]
        assert ingest(tmp_path, mode="append", work_key="again")["zip"] == [123, 0, -7] * 2
        assert "zeros" not in caplog.text  # the table has said what it is

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("x\n1.255\n", "Decimal(10,2)"), ("x\n1e2\n", "Decimal(10,2)"), ("x\n123\n", "Decimal(3,1)"), ("x\n1.0\n", "Int64"),
            ("x\n200\n", "Int8"), ("x\n31.01.2024\n", "Date"), ("x\n2024-02-30\n", "Date"), ("x\nyes\n", "Boolean"), ("x\n1,5\n", "Float64"),
        ],
    )  # fmt: skip
    def test_a_text_that_is_none_is_refused(self, tmp_path: Path, text: str, told: str) -> None:
        (tmp_path / "a.csv").write_text(text)
        with pytest.raises(SchemaMismatchError, match=r"1 texts of column 'x' are no .*column_types"):
            ingest(tmp_path, csv_separator=";", column_types={"x": told})
        assert not delta.table_exists(str(tmp_path / "table"))

    def test_a_column_that_is_not_there_or_that_the_table_has_otherwise(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("zip\n00123\n")
        with pytest.raises(
            SchemaMismatchError, match="has no column ZIP, which column_types names; it has zip"
        ):
            ingest(tmp_path, column_types={"ZIP": "String"})
        assert ingest(tmp_path) == {"zip": [123]}
        with pytest.raises(SchemaMismatchError, match="zip is String, the table has Int64"):
            ingest(tmp_path, mode="append", work_key="again", column_types={"zip": "String"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"csv_separator": ";;"}, "csv_separator ';;' separates nothing"),
        ({"csv_separator": "§"}, "separates nothing"),
        ({"csv_separator": '"'}, "separates nothing"),
        ({"csv_encoding": "klingon"}, "csv_encoding 'klingon' is none that Python knows"),
        ({"csv_encoding": "hex"}, "is none that Python knows"),
        ({"column_types": {"a": "text"}}, r"column_types\['a'\] is 'text': give one of String, Boolean"),
        ({"column_types": {"a": "Decimal(39,2)"}}, "give one of"),
        ({"column_types": {"a": "Date"}, "hash_columns": "a"}, "take it out of column_types"),
        ({"csv_separator": ";", "source": "a.parquet"}, "belong to .csv files"),
        (
            {"column_types": {"a": "Date"}, "source": None, "sql": "SELECT 1", "source_conn_id": "db"},
            "belong to",
        ),
    ],
)
def test_what_can_not_be_meant_is_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    given = {"source": "a.csv", "table": "t"} | arguments
    spec = IngestDatasetOperator(task_id="ingest", **given).build_spec({})
    with pytest.raises(ValueError, match=message):
        run_step("ingest", spec, Services())


def test_an_empty_column_is_what_it_is_declared_to_be(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,\n")
    ingest(tmp_path, column_types={"b": "Int32"})
    assert delta.read_table(str(tmp_path / "table")).collect_schema() == {"a": pl.Int64, "b": pl.Int32}
