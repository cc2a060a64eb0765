"""The digest of a table: additive, and computed from what is new only, with the same outcome as from all rows."""

from __future__ import annotations

import json
import shutil
import tempfile
from datetime import date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from deltalake import DeltaTable, convert_to_deltalake, write_deltalake
from deltalake.schema import Field, PrimitiveType, Schema
from hypothesis import HealthCheck, given, settings, strategies as st

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.data.digest import FORMAT, RowDigest
from airflow_mlops.core.windows import Window
from airflow_mlops.integrations import delta
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.common import resolve_dataset
from tests.disks import immutable

DAYS = [Window.parse(f"2024-01-0{day}", f"2024-01-0{day + 1}") for day in (1, 2, 3)]


def digest(rows: pl.DataFrame, **types: str) -> str:
    """From scratch, of all rows at once."""
    made = RowDigest({name: str(dtype) for name, dtype in rows.schema.items()} | types)
    made.update(rows)
    return made.hexdigest()


def from_scratch(table: str) -> str:
    return digest(delta.read_table(table).collect())


class TestRows:
    ROWS = pl.DataFrame(
        {
            "whole": [1, None, 2**62 + 1],
            "number": [0.5, None, -0.0],
            "flag": [True, None, False],
            "text": ["ü", None, ""],
            "at": [datetime(2024, 1, 1), None, datetime(2025, 1, 1)],
            "day": [date(2024, 1, 1), None, date(2025, 1, 1)],
            "money": [Decimal("1.50"), None, Decimal("2")],
            "raw": [b"\x00", None, b""],
            "tags": [[1, 2], None, []],
        }
    )

    @pytest.mark.parametrize("name", ROWS.columns)
    def test_every_value_counts(self, name: str) -> None:
        for row in range(3):
            other = (row + 1) % 3
            changed = self.ROWS.with_columns(
                pl.when(pl.int_range(pl.len()) == row)
                .then(pl.col(name).get(other))
                .otherwise(name)
                .alias(name)
            )
            assert digest(changed) != digest(self.ROWS)

    def test_parts_add_up_in_any_order(self) -> None:
        whole = RowDigest(dict.fromkeys(self.ROWS.columns, ""))
        whole.update(self.ROWS)
        parts = RowDigest(whole.columns)
        for row in (2, 0, 1):
            parts.update(self.ROWS[row : row + 1])
        assert parts.hexdigest() == whole.hexdigest()

    def test_nan_and_null_are_one_and_so_are_both_zeros(self) -> None:
        first, second = pl.DataFrame({"x": [float("nan"), 0.0]}), pl.DataFrame({"x": [None, -0.0]})
        assert digest(first) == digest(second)

    def test_whole_numbers_beside_a_null_keep_all_their_digits(self) -> None:
        assert digest(pl.DataFrame({"x": [2**53, None]})) != digest(pl.DataFrame({"x": [2**53 + 1, None]}))

    def test_a_column_of_nulls_changes_columns_and_no_row(self) -> None:
        made = [RowDigest(dict.fromkeys(columns, "")) for columns in (["x"], ["x", "y"])]
        for one, rows in zip(made, ({"x": [1]}, {"x": [1], "y": [None]}), strict=True):
            one.update(pl.DataFrame(rows))
        assert made[0].total == made[1].total
        assert made[0].hexdigest() != made[1].hexdigest()


#: What may happen to a table: how it is ingested, which rows, and whether the digest's file is lost before.
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["append", "upsert", "window", "whole", "column", "widen", "foreign", "optimize", "delete"]),
        st.lists(st.tuples(st.integers(0, 20), st.none() | st.integers(0, 3)), min_size=1, max_size=6,
                 unique_by=lambda row: row[0]),
        st.integers(0, 2),
        st.booleans(),
    ),
    min_size=2,
    max_size=7,
)  # fmt: skip


@settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS)
def test_whatever_happens_the_digest_is_that_of_all_rows(steps: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        table = f"{folder}/my table"
        columns: set[str] = set()
        whole = pl.Int32
        for number, (kind, rows, day, lost) in enumerate(steps):
            whole = pl.Int64 if kind == "widen" else whole
            columns |= {f"new{number}"} if kind == "column" else set()
            times = [DAYS[day].start + timedelta(hours=key % 24) for key, _ in rows]
            frame = pl.DataFrame(
                {
                    "t": pl.Series(times, dtype=pl.Datetime("us", "UTC")),
                    "key": [f"{day}-{key}" for key, _ in rows],
                    "n": pl.Series([value for _, value in rows], dtype=whole),
                }
            ).with_columns(pl.lit(float(number)).alias(name) for name in columns)
            if lost:
                shutil.rmtree(f"{table}/_airflow_mlops", ignore_errors=True)
            if kind in ("foreign", "optimize", "delete") and delta.table_exists(table):
                dataset = _foreign(kind, table, frame)
            else:
                dataset = _ingest(kind, folder, table, frame, number, DAYS[day])
            assert dataset["dataset_digest"] == from_scratch(table)
            assert dataset["row_count"] == delta.read_table(table).collect().height


def _ingest(
    kind: str, folder: str, table: str, frame: pl.DataFrame, number: int, day: Window
) -> dict[str, Any]:
    frame.write_parquet(f"{folder}/{number}.parquet")
    modes: dict[str, dict[str, Any]] = {
        "upsert": {"mode": "upsert", "keys": ["key"]},
        "window": {"mode": "replace", "window": to_dict(day)},
        "whole": {"mode": "replace"},
    }
    spec = {
        "source": f"{folder}/{number}.parquet",
        "table": table,
        "time_column": "t",
        "schema_policy": "widen",
    }
    done = run_step("ingest", spec | modes.get(kind, {"mode": "append"}), Services())
    found: dict[str, Any] = done["dataset"]
    return found


def _foreign(kind: str, table: str, frame: pl.DataFrame) -> dict[str, Any]:
    """Do what others may do to a table, without any digest."""
    if kind == "foreign":
        write_deltalake(table, frame.to_arrow(), mode="append", schema_mode="merge")
    elif kind == "optimize":
        DeltaTable(table).optimize.compact()
    else:
        DeltaTable(table).delete("n = 1")
    return to_dict(delta.describe(table))


class TestWhatIsRead:
    @pytest.fixture
    def table(self, tmp_path: Path) -> str:
        """Two files, of which nothing can be read any more."""
        table = str(tmp_path / "table")
        for number in range(2):
            self.append(tmp_path, table, number)
        for file in tmp_path.glob("table/*.parquet"):
            file.write_bytes(b"")
        return table

    def append(self, folder: Path, table: str, number: int) -> dict[str, Any]:
        pl.DataFrame({"x": [number] * 3}).write_parquet(folder / f"{number}.parquet")
        spec = {"source": str(folder / f"{number}.parquet"), "table": table, "mode": "append"}
        return run_step("ingest", spec, Services())["dataset"]  # type: ignore[no-any-return]

    def test_no_file_that_was_there_before(self, tmp_path: Path, table: str) -> None:
        expected = digest(pl.DataFrame({"x": [0] * 3 + [1] * 3 + [2] * 3}))
        assert self.append(tmp_path, table, 2)["dataset_digest"] == expected
        assert delta.describe(table).dataset_digest == expected

    def test_all_of_it_where_nothing_is_remembered(self, table: str) -> None:
        shutil.rmtree(f"{table}/_airflow_mlops")
        with pytest.raises(OSError, match="only 0 bytes long"):
            delta.describe(table)

    @pytest.mark.parametrize(
        "change",
        [
            {"columns": ["x"]},
            {"total": ["3", 1, 2]},
            {"total": [4, 1, 2]},
            {"total": [3, -1, 2]},
            {"total": [3]},
        ],
    )
    def test_what_is_remembered_may_be_wrong(self, tmp_path: Path, change: dict[str, Any]) -> None:
        """Also numbers that are no sum of so many rows as the log says the file has."""
        table = str(tmp_path / "table")
        self.append(tmp_path, table, 0)
        path = tmp_path / "table/_airflow_mlops/digest.json"
        ((files, columns, total),) = json.loads(path.read_text())[FORMAT]
        told = {"columns": columns, "total": total} | change
        path.write_text(json.dumps({FORMAT: [[files, told["columns"], told["total"]]]}))
        assert delta.describe(table).dataset_digest == from_scratch(table)

    @pytest.mark.parametrize(
        "text", ["", "[1]", "[[1, 2, 3]]", json.dumps({"a": 1}), json.dumps({FORMAT: [[1, 2, 3]]}), "\x00"]
    )
    def test_what_is_remembered_may_be_torn(self, tmp_path: Path, text: str) -> None:
        table = str(tmp_path / "table")
        self.append(tmp_path, table, 0)
        (tmp_path / "table/_airflow_mlops/digest.json").write_text(text)
        assert self.append(tmp_path, table, 1)["dataset_digest"] == from_scratch(table)

    def test_vacuum_leaves_it_alone(self, tmp_path: Path) -> None:
        table = str(tmp_path / "table")
        for number in range(2):
            self.append(tmp_path, table, number)
        DeltaTable(table).optimize.compact()
        gone = DeltaTable(table).vacuum(0, enforce_retention_duration=False, dry_run=False)
        assert len(gone) == 2
        assert (tmp_path / "table/_airflow_mlops/digest.json").exists()
        assert delta.describe(table).dataset_digest == from_scratch(table)

    def test_files_of_one_name_in_several_folders(self, tmp_path: Path) -> None:
        """As in a table that was made of folders of Parquet files."""
        for rows, city in enumerate(["a", "b"], start=1):
            (tmp_path / f"city={city}").mkdir()
            pl.DataFrame({"x": [rows] * rows}).write_parquet(tmp_path / f"city={city}" / "part-0.parquet")
        folders = Schema([Field("city", PrimitiveType("string"))])
        convert_to_deltalake(str(tmp_path), partition_by=folders, partition_strategy="hive")
        described = delta.describe(str(tmp_path))
        assert (described.row_count, described.dataset_digest) == (3, from_scratch(str(tmp_path)))

    def test_partitions(self, tmp_path: Path) -> None:
        table = str(tmp_path / "table")
        rows = pl.DataFrame({"city": ["a b", "c/d", None, "ü"], "x": [1, 2, 3, 4]})
        write_deltalake(table, rows.to_arrow(), partition_by=["city"])
        assert delta.describe(table).dataset_digest == from_scratch(table)


def test_a_table_by_its_uri_is_read_for_its_digest_once(tmp_path: Path) -> None:
    table = str(tmp_path / "table")
    pl.DataFrame({"x": [1, 2, 3]}).write_delta(table)
    first = resolve_dataset(table)
    (file,) = (tmp_path / "table").glob("*.parquet")
    file.rename(tmp_path / "away")
    assert resolve_dataset(table) == first


def test_a_table_that_may_only_be_read_has_a_digest_too(tmp_path: Path) -> None:
    table = tmp_path / "table"
    pl.DataFrame({"x": [1, 2, 3]}).write_delta(table)
    with immutable(table):
        assert resolve_dataset(str(table)).row_count == 3
    assert not (table / "_airflow_mlops").exists()
