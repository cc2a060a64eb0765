"""Cleaning before anything is written: rows left out, one row per key, columns dropped or hashed; and no trace of what was hashed."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import random
import traceback
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from airflow.sdk import Asset
from deltalake import DeltaTable

from airflow_mlops.core.data import batches
from airflow_mlops.core.data.cleaning import ValueHasher
from airflow_mlops.core.data.row_values import RowColumns
from airflow_mlops.exceptions import (
    CommitConflictError,
    ConnectionConfigError,
    MLOpsError,
    SchemaMismatchError,
)
from airflow_mlops.hooks.hashing import HashingHook
from airflow_mlops.integrations import delta
from airflow_mlops.ledger import Ledger
from airflow_mlops.operators.ingest import IngestDatasetOperator
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.ingestion.clean import Cleaner, without_values
from airflow_mlops.steps.validation.quarantine import SetAside

KEY, OTHER_KEY = "8c1f" * 16, "77aa" * 16


def hashed(text: str, key: str = KEY) -> str:
    """Do it as anybody would, with Python's own library."""
    return hmac.new(key.encode(), text.encode(), hashlib.sha256).hexdigest()


@pytest.fixture
def table(tmp_path: Path) -> str:
    return str(tmp_path / "table")


def land(folder: Path, name: str, /, **columns: Any) -> str:
    pl.DataFrame(columns).write_parquet(folder / name)
    return str(folder / name)


def ingest(source: str, table: str, *, key: str | None = KEY, **arguments: Any) -> dict[str, Any]:
    """Run the step on the spec that the operator builds."""
    task = IngestDatasetOperator(task_id="ingest", source=source, table=table, **arguments)
    return run_step("ingest", task.build_spec({}), Services(hash_key=key))


def content(table: str, by: str = "x") -> dict[str, list[Any]]:
    return delta.read_table(table).collect().sort(by).to_dict(as_series=False)


def set_aside(table: str, x: int) -> None:
    """Set the row with this number aside, as a validation of the whole table does."""
    SetAside(
        dataset=delta.describe(table, time_column=None), window=None, time_column=None, table=f"{table}_bad",
        reasons=[("bad", pl.col("x") == x)], count=1, newest=False,
    ).write(x)  # fmt: skip


class TestRowsLeftOut:
    def test_those_for_which_the_condition_is_not_true(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=[1, 2, 3, 4], fare=[5.0, -1.0, None, 2.0])
        result = ingest(source, table, keep_where="fare > 0")
        assert content(table) == {"x": [1, 4], "fare": [5.0, 2.0]}
        assert (result["row_count"], result["cleaning"]["left_out"]) == (2, 2)

    def test_a_column_may_be_called_as_an_aggregate(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=["Len", "Agg", None], Agg=[1, 2, 3])
        ingest(source, table, keep_where="\"Agg\" BETWEEN 1 AND 2 AND x IN ('Len', 'Agg')")
        assert content(table)["x"] == ["Agg", "Len"]

    def test_all_of_the_first_batch(self, tmp_path: Path, table: str) -> None:
        count = 3 * batches.BATCH_ROWS
        source = land(tmp_path, "a.parquet", x=list(range(count)))
        ingest(land(tmp_path, "b.parquet", x=[-1]), table)
        result = ingest(source, table, mode="append", keep_where=f"x >= {count - 10}")
        assert (result["row_count"], result["dataset"]["row_count"]) == (10, 11)

    @pytest.mark.parametrize(
        ("condition", "said"),
        [
            ("fare >", "keep_where 'fare >' is no condition"),
            ("price > 0", "has no column price"),
            ("x + 1", "keep_where can't be applied"),
            ("x > avg(x)", "looks at more than the row it is about"),
            ("count(*) > 1", "looks at more than the row it is about"),
            ("row_number() OVER () = 1", "looks at more than the row it is about"),
            ("rank() OVER (ORDER BY x) = 1", "looks at more than the row it is about"),
        ],
    )
    def test_no_condition(self, tmp_path: Path, table: str, condition: str, said: str) -> None:
        source = land(tmp_path, "a.parquet", x=[1])
        with pytest.raises(ValueError, match=said):
            ingest(source, table, keep_where=condition)
        assert not delta.table_exists(table)


class TestOneRowPerKey:
    def test_equal_rows_are_one(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=[1, 2, 1, 1], y=["a", "b", "a", "a"])
        result = ingest(source, table, id_column="x", deduplicate_by="x")
        assert content(table) == {"x": [1, 2], "y": ["a", "b"]}
        assert (result["row_count"], result["cleaning"]["equal_rows"]) == (2, 2)

    def test_without_it_they_are_an_error(self, tmp_path: Path, table: str) -> None:
        with pytest.raises(SchemaMismatchError, match="repeated values"):
            ingest(land(tmp_path, "a.parquet", x=[1, 1]), table, id_column="x")

    @pytest.mark.parametrize(("keep", "kept"), [("last", "new"), ("first", "old")])
    def test_the_order_says_which_of_rows_that_differ(
        self, tmp_path: Path, table: str, keep: str, kept: str
    ) -> None:
        source = land(
            tmp_path, "a.parquet",
            x=[1, 1, 1, 1, 2], y=["old", "new", "none", "new", "b"], at=[1.0, 9.0, float("nan"), 9.0, None],
        )  # fmt: skip
        result = ingest(
            source,
            table,
            deduplicate_by="x",
            deduplicate_order="at",
            deduplicate_keep=keep,
            drop_columns="at",
        )
        assert content(table) == {"x": [1, 2], "y": [kept, "b"]}
        counts = result["cleaning"]
        same = 1 if keep == "last" else 0
        assert (counts["equal_rows"], counts["differing_rows"]) == (same, 3 - same)

    def test_rows_that_differ_where_nothing_says_which(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=[7, 7, 8], y=["a", "b", "c"], at=[1, 1, 1])
        with pytest.raises(
            SchemaMismatchError, match=r"1 values of 'x' have rows that differ, and nothing.*\(7,\)"
        ):
            ingest(source, table, deduplicate_by="x")
        with pytest.raises(SchemaMismatchError, match="deduplicate_order does not tell which"):
            ingest(source, table, deduplicate_by="x", deduplicate_order="at")
        with pytest.raises(SchemaMismatchError, match=r"the one to keep\. Name more columns"):
            ingest(source, table, deduplicate_by="x", hash_columns="x")
        assert not delta.table_exists(table)

    def test_a_key_that_is_null(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=[1, None])
        with pytest.raises(SchemaMismatchError, match="deduplicate_by column 'x' has 1 nulls"):
            ingest(source, table, deduplicate_by="x")

    @pytest.mark.parametrize("seed", range(4))
    def test_as_polars_would_in_memory(
        self, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Many keys over many batches, in files whose order is another one than that of the rows."""
        monkeypatch.setitem(batches.stream_batches.__kwdefaults__, "batch_rows", 500)
        random.seed(seed)
        count = 5_000
        rows = pl.DataFrame(
            {
                "x": [random.randrange(1_500) for _ in range(count)],
                "z": [random.choice("ab") for _ in range(count)],
                "at": random.sample(range(count), count),
            }
        )
        rows = pl.concat([rows, rows.sample(1_000, seed=seed)]).sample(fraction=1, shuffle=True, seed=seed)
        for number in range(3):
            rows[number * 2_000 : (number + 1) * 2_000].write_parquet(tmp_path / f"{9 - number}.parquet")
        kept = rows.sort("at").unique(["x", "z"], keep="last").sort("at")
        source = str(tmp_path / "*.parquet")
        results = [
            ingest(source, str(tmp_path / f"table{n}"), deduplicate_by="x, z", deduplicate_order="at")
            for n in (1, 2)
        ]
        found = delta.read_table(str(tmp_path / "table1")).collect().sort("at")
        assert found.equals(kept)
        repeated = rows.height - rows.unique("at").height
        counts = results[0]["cleaning"]
        assert counts["equal_rows"] + counts["differing_rows"] == rows.height - kept.height
        assert (
            counts["equal_rows"] == rows.filter(pl.col("at").is_in(kept["at"].implode())).height - kept.height
        )
        assert 0 < counts["equal_rows"] < repeated
        assert results[0]["dataset"]["dataset_digest"] == results[1]["dataset"]["dataset_digest"]

    @pytest.mark.parametrize("later", ["1\n1\n2\n", "1\n1\n3\n4\n", "1\n2\n3\n"])
    def test_a_source_that_changes_between_two_readings(
        self, tmp_path: Path, table: str, monkeypatch: pytest.MonkeyPatch, later: str
    ) -> None:
        source = tmp_path / "a.csv"
        source.write_text("x\n1\n1\n3\n")
        choose = Cleaner._choose

        def meanwhile(cleaner: Cleaner, frame: pl.LazyFrame) -> Any:
            chosen = choose(cleaner, frame)
            source.write_text(f"x\n{later}")
            return chosen

        monkeypatch.setattr(Cleaner, "_choose", meanwhile)
        with pytest.raises(CommitConflictError, match=r"changed while it was read\. Nothing was written"):
            ingest(str(source), table, deduplicate_by="x")
        assert not delta.table_exists(table)

    def test_in_each_mode(self, tmp_path: Path) -> None:
        source = land(tmp_path, "a.parquet", x=[1, 1, 2], y=["a", "b", "c"], at=[1, 2, 1])
        how = {"deduplicate_by": "x", "deduplicate_order": "at", "hash_columns": "x"}
        expected = sorted([(hashed("1"), "b"), (hashed("2"), "c")])
        modes: list[dict[str, Any]] = [
            {"mode": "replace"},
            {"mode": "append"},
            {"mode": "upsert", "keys": "x"},
            {"mode": "incremental", "watermark_column": "at"},
        ]
        for number, mode in enumerate(modes):
            table = str(tmp_path / f"table{number}")
            first = ingest(source, table, **mode, **how)
            again = ingest(source, table, **mode, **how)  # a retry
            assert first["dataset"]["dataset_digest"] == again["dataset"]["dataset_digest"]
            assert sorted(delta.read_table(table, columns=["x", "y"]).collect().rows()) == expected


class TestHashes:
    @pytest.mark.parametrize(
        ("values", "text"),
        [
            (pl.Series([5], dtype=pl.Int64), "5"),
            (pl.Series([5], dtype=pl.UInt8), "5"),
            (pl.Series([5.0]), "5"),
            (pl.Series(["5"]), "5"),
            (pl.Series(["5"], dtype=pl.Categorical), "5"),
            (pl.Series([b"5"]), "5"),
            (pl.Series([Decimal("5.00")]), "5"),
            (pl.Series([Decimal("500")]), "500"),
            (pl.Series([Decimal("5.10")]), "5.1"),
            (pl.Series([-0.0]), "0"),
            (pl.Series([0.1]), "0.1"),
            (pl.Series([True]), "true"),
            (pl.Series([date(2024, 1, 31)]), "2024-01-31"),
            (pl.Series([datetime(2024, 1, 31, 12)]), "2024-01-31T12:00:00.000000Z"),
            (pl.Series([datetime(2024, 1, 31, 12)], dtype=pl.Datetime("ns")), "2024-01-31T12:00:00.000000Z"),
            (pl.Series([datetime(2024, 1, 31, 14, tzinfo=timezone(timedelta(hours=2)))]).dt.convert_time_zone("Asia/Tokyo"),
             "2024-01-31T12:00:00.000000Z"),
            (pl.Series(["Zoë 🚕"]), "Zoë 🚕"),
        ],
    )  # fmt: skip
    def test_are_of_the_value_whatever_its_type(self, values: pl.Series, text: str) -> None:
        assert ValueHasher(KEY).hash_values(values).to_list() == [hashed(text)]

    def test_known_answer(self) -> None:
        # printf 'a@example.org' | openssl dgst -sha256 -hmac kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk
        assert (
            ValueHasher("k" * 32).hash_values(pl.Series(["a@example.org"])).item()
            == "84b387d80950196a0fad223b6e1d286bba037702cb319867d6c0f41934c59332"
        )

    def test_no_value_has_none(self) -> None:
        values = [pl.Series([None, 1.5, float("nan")]), pl.Series([None], dtype=pl.Null)]
        first, second = (ValueHasher(KEY).hash_values(one).to_list() for one in values)
        assert (first, second) == ([None, hashed("1.5"), None], [None])

    def test_of_a_list(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=[[1, 2]])
        with pytest.raises(MLOpsError, match=r"can't be read|no hash is defined"):
            ingest(source, table, hash_columns="x")

    def test_over_files_of_other_types(self, tmp_path: Path, table: str) -> None:
        (tmp_path / "a.csv").write_text("x,who\n1,7\n2,\n")
        (tmp_path / "b.jsonl").write_text('{"x": 3, "who": "7"}\n')
        source = land(tmp_path, "c.parquet", x=[4], who=[7.0])
        for file in (tmp_path / "a.csv", tmp_path / "b.jsonl", source):
            ingest(str(file), table, mode="append", hash_columns="who")
        assert content(table) == {"x": [1, 2, 3, 4], "who": [hashed("7"), None, hashed("7"), hashed("7")]}

    def test_leading_zeros_of_a_csv_file(self, tmp_path: Path, table: str) -> None:
        (tmp_path / "a.csv").write_text("x,phone\n1,0049\n2,49\n")
        ingest(str(tmp_path / "a.csv"), table, hash_columns="phone")
        assert content(table)["phone"] == [hashed("0049"), hashed("49")]

    def test_a_table_that_is_ingested_into_itself_keeps_its_hashes(self, tmp_path: Path, table: str) -> None:
        twice = land(tmp_path, "a.parquet", x=["a", "a"], y=[1, 2])
        ingest(twice, table, hash_columns="x")
        more = land(tmp_path, "b.parquet", x=["a", "b"], y=[3, 4])
        how = {"mode": "upsert", "keys": "x", "hash_columns": "x"}
        with pytest.raises(SchemaMismatchError, match=r"without time_column and hash_columns"):
            ingest(more, table, **how)

        remedy = {"deduplicate_by": "x", "deduplicate_order": "y"}
        itself = f"{table}/../table"
        with pytest.raises(SchemaMismatchError, match=r"hashes in 'x' already, which would be hashed again"):
            ingest(itself, table, **remedy, hash_columns="x")
        ingest(itself, table, **remedy)
        assert content(table) == {"x": [hashed("a")], "y": [2]}
        with pytest.raises(SchemaMismatchError, match="holds hashes in column 'x'"):
            ingest(more, table, mode="append")
        ingest(more, table, **how)
        assert content(table, "y") == {"x": [hashed("a"), hashed("b")], "y": [3, 4]}

    def test_a_table_made_of_another_has_its_hashes(self, tmp_path: Path, table: str) -> None:
        first = str(tmp_path / "first")
        ingest(land(tmp_path, "a.parquet", x=["a", "b"], y=["c", "d"]), first, hash_columns="x")
        with pytest.raises(
            SchemaMismatchError, match=r"first holds hashes in 'x' already, which would be hashed again"
        ):
            ingest(first, table, hash_columns="x")
        ingest(first, table, hash_columns="y")
        rows = zip(*content(table).values(), strict=True)
        assert sorted(rows) == sorted((hashed(x), hashed(y)) for x, y in ("ac", "bd"))
        # It knows of both: values of the first table's source do not mix with them.
        with pytest.raises(SchemaMismatchError, match="holds hashes in column 'x'"):
            ingest(land(tmp_path, "b.parquet", x=["a"], y=[hashed("e")]), table, mode="append")
        ingest(land(tmp_path, "b.parquet", x=["a"], y=["e"]), table, mode="append", hash_columns="x,y")
        assert content(table, "y")["x"].count(hashed("a")) == 2

    def test_an_earlier_version_of_a_table_holds_what_it_held(self, tmp_path: Path, table: str) -> None:
        first, source = str(tmp_path / "first"), land(tmp_path, "a.parquet", x=["a"])
        plain = ingest(source, first)["dataset"]["version"]
        hashes = ingest(source, first, hash_columns="x")["dataset"]["version"]
        ingest(first, table, source_version=plain, hash_columns="x")
        assert content(table) == {"x": [hashed("a")]}
        ingest(source, first)
        with pytest.raises(SchemaMismatchError, match="which would be hashed again"):
            ingest(first, table, source_version=hashes, hash_columns="x")
        ingest(first, table, source_version=hashes)
        assert content(table) == {"x": [hashed("a")]}
        with pytest.raises(SchemaMismatchError, match="holds hashes in column 'x'"):
            ingest(source, table, mode="append")

    def test_values_and_hashes_do_not_mix_in_a_quarantine(self, tmp_path: Path, table: str) -> None:
        """Rows that were set aside before their names were hashed would come back as they are."""
        how = {"mode": "upsert", "keys": "x"}
        beside = ["quarantine_reasons", "quarantine_version", "quarantine_work"]
        ingest(land(tmp_path, "a.parquet", x=[1, 2], who=["a", "b"]), table, **how)
        set_aside(table, 1)
        again = land(tmp_path, "b.parquet", x=[2, 3], who=["b", "c"])
        ingest(again, table, hash_columns="who")
        with pytest.raises(
            SchemaMismatchError, match=r"has rows whose 'who' is as it is, in .* it is hashed with"
        ):
            set_aside(table, 3)
        assert content(table)["x"] == [2, 3]
        with pytest.raises(SchemaMismatchError, match="holds hashes in column 'who'"):
            ingest(f"{table}_bad", table, **how, drop_columns=beside)
        ingest(f"{table}_bad", table, **how, drop_columns=beside, hash_columns="who")
        assert content(table) == {"x": [1, 2, 3], "who": [hashed(name) for name in "abc"]}
        DeltaTable(f"{table}_bad").delete()
        set_aside(table, 3)
        with pytest.raises(SchemaMismatchError, match="which would be hashed again"):
            ingest(f"{table}_bad", table, **how, drop_columns=beside, hash_columns="who")

    @pytest.mark.parametrize("times", [1, 2])
    def test_what_comes_back_from_a_quarantine_is_hashed_once(
        self, tmp_path: Path, table: str, times: int
    ) -> None:
        how = {"mode": "upsert", "keys": "x"}
        ingest(
            land(tmp_path, "a.parquet", x=[1, 2, 3], who=["a", "b", "c"]), table, **how, hash_columns="who"
        )
        for number in range(1, times + 1):
            set_aside(table, number)
        beside = ["quarantine_reasons", "quarantine_version", "quarantine_work"]
        with pytest.raises(SchemaMismatchError, match="which would be hashed again"):
            ingest(f"{table}_bad", table, **how, drop_columns=beside, hash_columns="who")
        ingest(f"{table}_bad", table, **how, drop_columns=beside)
        assert content(table) == {"x": [1, 2, 3], "who": [hashed(name) for name in "abc"]}

    def test_a_row_is_found_by_its_hashed_key(self, tmp_path: Path, table: str) -> None:
        how = {"mode": "upsert", "keys": "x", "hash_columns": "x"}
        ingest(land(tmp_path, "a.parquet", x=["a", "b"], y=[1, 2]), table, **how)
        ingest(land(tmp_path, "b.parquet", x=["b", "c"], y=[3, 4]), table, **how)
        assert content(table, "y") == {"x": [hashed(name) for name in "abc"], "y": [1, 3, 4]}

    def test_a_column_that_is_not_there(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=[1], e_mail=["a@b.org"])
        for how in ("hash_columns", "drop_columns", "deduplicate_by"):
            with pytest.raises(SchemaMismatchError, match="has no column email"):
                ingest(source, table, **{how: "email"})
        assert not delta.table_exists(table)

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"hash_columns": "x", "drop_columns": "x"}, "'x' is in drop_columns and is needed elsewhere"),
            ({"drop_columns": "x", "id_column": "x"}, "'x' is in drop_columns and is needed elsewhere"),
            (
                {"hash_columns": "t", "watermark_column": "t", "mode": "incremental"},
                "orders or parts the rows",
            ),
            (
                {"hash_columns": "region", "partition_column": "region", "partition_key": "eu"},
                "orders or parts the rows",
            ),
            ({"deduplicate_order": "t"}, "deduplicate_order needs deduplicate_by"),
            ({"deduplicate_keep": "best"}, "cleaning.deduplicate_keep: Input should be 'last' or 'first'"),
        ],
    )
    def test_arguments_that_contradict(self, table: str, arguments: dict[str, Any], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            ingest("a.parquet", table, **arguments)


class TestKeys:
    @pytest.mark.parametrize("mode", [{"mode": "append"}, {"mode": "upsert", "keys": "x"}])
    def test_values_and_hashes_do_not_mix(self, tmp_path: Path, table: str, mode: dict[str, Any]) -> None:
        first = land(tmp_path, "a.parquet", x=[1], who=["a"])
        second = land(tmp_path, "b.parquet", x=[2], who=["b"])
        ingest(first, table, **mode)
        with pytest.raises(
            SchemaMismatchError, match=r"holds values in column 'who'.*Replace the whole table"
        ):
            ingest(second, table, **mode, hash_columns="who")
        ingest(first, table, hash_columns="who")
        with pytest.raises(
            SchemaMismatchError, match="holds hashes in column 'who', and values are to be written"
        ):
            ingest(second, table, **mode)
        with pytest.raises(SchemaMismatchError, match="hashes of another key in column 'who'"):
            ingest(second, table, **mode, hash_columns="who", key=OTHER_KEY)
        assert content(table) == {"x": [1], "who": [hashed("a")]}

    def test_a_table_that_has_the_values_is_replaced_without(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=[1], phone=[49], name=["Ann"])
        ingest(source, table)
        how = {"hash_columns": "phone", "drop_columns": "name"}
        with pytest.raises(SchemaMismatchError, match="name is missing"):
            ingest(source, table, mode="append", work_key="again", **how)
        result = ingest(source, table, **how)
        assert content(table) == {"x": [1], "phone": [hashed("49")]}
        assert result["dataset"]["dataset_digest"] == delta.describe(table).dataset_digest

    def test_are_replaced_with_the_whole_table(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=[1], who=["a"])
        reports = [ingest(source, table, hash_columns="who", key=key)["cleaning"] for key in (KEY, OTHER_KEY)]
        assert reports[0]["hash_key_id"] != reports[1]["hash_key_id"]
        assert content(table)["who"] == [hashed("a", OTHER_KEY)]
        more = land(tmp_path, "b.parquet", x=[2], who=["b"])
        ingest(more, table, mode="append", hash_columns="who", key=OTHER_KEY)
        ingest(source, table)
        ingest(land(tmp_path, "c.parquet", x=[2], who=["b"]), table, mode="append")
        assert content(table)["who"] == ["a", "b"]

    def test_none_or_a_short_one(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, table: str) -> None:
        task = IngestDatasetOperator(task_id="i", source="a.csv", table=table, hash_columns="x")
        with pytest.raises(ConnectionConfigError, match="'hashing_default' is not defined"):
            task.services()
        monkeypatch.setenv(
            "AIRFLOW_CONN_HASHING_DEFAULT",
            json.dumps({"conn_type": "airflow_mlops_hashing", "password": "tooshort"}),
        )
        with pytest.raises(
            ConnectionConfigError, match=r"'hashing_default': Password: .* has 8 characters, at least 32"
        ) as short:
            task.services()
        assert "tooshort" not in str(short.value)
        assert HashingHook().test_connection()[0] is False
        source = land(tmp_path, "a.parquet", x=[1])
        with pytest.raises(ConnectionConfigError, match="hash_key is not set"):
            ingest(source, table, hash_columns="x", key=None)
        assert IngestDatasetOperator(task_id="i", source="a.csv", table=table).services() == Services()


class TestNoTrace:
    """What was hashed or dropped, and the key, are in no file, log, message or result."""

    CANARY, MORE = "canary-4711@example.org", "tweety 0815"

    @pytest.fixture
    def run(self, tmp_path: Path, table: str, monkeypatch: pytest.MonkeyPatch) -> Any:
        connections = {
            "HASHING_DEFAULT": {"conn_type": "airflow_mlops_hashing", "password": KEY},
            "LEDGER_DEFAULT": {
                "conn_type": "mlops_ledger",
                "extra": {"url": f"sqlite:///{tmp_path / 'ledger.db'}"},
            },
        }
        for name, fields in connections.items():
            monkeypatch.setenv(f"AIRFLOW_CONN_{name}", json.dumps(fields))
        asset = Asset("people")

        def run(source: str, **arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
            extra: dict[str, Any] = {}
            context = {
                "ti": SimpleNamespace(dag_id="d", run_id="r", task_id="ingest", try_number=1),
                "outlet_events": {asset: SimpleNamespace(extra=extra)},
            }
            task = IngestDatasetOperator(
                task_id="ingest", source=source, table=table, outlets=[asset],
                hash_columns=["email"], drop_columns=["name"], **arguments,
            )  # fmt: skip
            return task.execute(context), extra  # type: ignore[arg-type]

        return run

    def leaks(self, *texts: str) -> bool:
        return any(secret in text for text in texts for secret in (self.CANARY, self.MORE, KEY))

    def test_of_what_is_written(
        self, tmp_path: Path, table: str, run: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.DEBUG)
        landing = tmp_path / "landing"
        landing.mkdir()
        source = land(
            landing, "a.parquet", x=[1, 1], email=[self.CANARY] * 2, name=[self.MORE] * 2, age=[-3, -3]
        )
        result, extra = run(source, deduplicate_by="email", keep_where="name IS NOT NULL")
        assert content(table)["email"] == [hashed(self.CANARY)]
        assert extra["airflow_mlops"]["cleaning"]["hashed_columns"] == ["email"]
        with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}") as ledger:
            (entry,) = ledger.entries(limit=10)
        assert entry.payload["cleaning"] == result["cleaning"]
        assert "1 rows that repeat another" in entry.summary
        bad = {"type": "expect_column_values_to_be_between", "kwargs": {"column": "age", "min_value": 0}}
        judged = {
            "dataset": table, "suite": {"name": "s", "expectations": [bad]}, "id_column": "email",
            "quarantine": {"table": f"{table}_quarantine", "budget": 0.99},
        }  # fmt: skip
        ingest(land(landing, "b.parquet", x=[2], email=["b"], name=["b"], age=[5]), table, mode="append",
               hash_columns="email", drop_columns="name")  # fmt: skip
        quarantine = run_step("validate", judged, Services())
        assert quarantine["quarantined"] == 1
        written = [file for file in tmp_path.rglob("*") if file.is_file() and landing not in file.parents]
        assert any(file.suffix == ".parquet" for file in written)
        assert any(file.name == "ledger.db" for file in written)
        assert not self.leaks(*(file.read_bytes().decode("latin-1") for file in written))
        for uri in (table, f"{table}_quarantine"):  # Parquet may compress texts
            assert not self.leaks(delta.read_table(uri).collect().write_json())
        assert not self.leaks(caplog.text, json.dumps([result, extra, quarantine]))

    @pytest.mark.parametrize(
        ("name", "text", "shown"),
        [
            ("a.csv", "x,email,name\n" + "1,5,b\n" * 200 + "x{0},{0},{0},{0}\n", "a.csv, line 202: 4 values"),
            ("c.csv", "x,email,name\n" + "1,5,b\n" * 200 + '1,{0}",b\n', "what stands there is not shown"),
            (
                "a.jsonl",
                '{{"x": 1, "email": "{0}", "name": "{0}"}}\n{{"x": "{0}", "email": {0}\n',
                "a.jsonl, line 2: it is no JSON from character 43 on",
            ),
            (
                "c.jsonl",
                '{{"x": 1, "email": "{0}", "name": "{0}"}}\n"{0}"\n',
                "c.jsonl, line 2: it is JSON, and no object",
            ),
            ("b.csv", "t,email,name\n{0},{0},{0}\n", "what stands there is not shown"),
        ],
    )
    def test_of_what_cannot_be_read(
        self, tmp_path: Path, run: Any, caplog: pytest.LogCaptureFixture, name: str, text: str, shown: str
    ) -> None:
        (tmp_path / name).write_text(text.format(self.CANARY))
        with pytest.raises(MLOpsError) as problem:
            run(str(tmp_path / name), time_column="t" if name == "b.csv" else None,
                **({"window_start": None, "window_end": None} if name == "b.csv" else {}))  # fmt: skip
        assert shown in str(problem.value)
        told = "".join(traceback.format_exception(problem.value))
        assert not self.leaks(told, caplog.text)

    def test_of_what_polars_had_said_before(self) -> None:
        def fail() -> None:
            try:
                raise pl.exceptions.ComputeError(self.CANARY)
            except pl.exceptions.PolarsError:
                raise SchemaMismatchError("a.csv, line 3")  # noqa: B904 - what is implied is the matter

        with pytest.raises(SchemaMismatchError) as problem:
            fail()
        shown = without_values("a.csv", problem.value)
        assert str(shown) == "a.csv, line 3"
        assert not self.leaks("".join(traceback.format_exception(shown)))

    def test_of_what_no_column_can_hold(self) -> None:
        with pytest.raises(SchemaMismatchError, match="4929123456781234000") as shown:
            RowColumns(["card"], "a query").frame([(4929123456781234000000,)])
        assert "4929" not in str(without_values("a query", shown.value))

    def test_a_condition_with_a_slip_is_shown(self, tmp_path: Path, run: Any) -> None:
        source = land(tmp_path, "a.parquet", x=[1], email=["a"], name=["b"])
        with pytest.raises(ValueError, match="keep_where 'x >' is no condition"):
            run(source, keep_where="x >")

    def test_of_the_key_where_it_is_shown(self) -> None:
        assert not self.leaks(repr(Services(hash_key=KEY)), repr(ValueHasher(KEY)))
        assert Services.from_environment(Services(hash_key=KEY).to_environment()).hash_key == KEY
