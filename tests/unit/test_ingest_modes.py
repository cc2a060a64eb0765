"""The modes of ingest: rows get into the table once, whatever happens twice, late or at the same moment."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import threading
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from hypothesis import HealthCheck, example, given, settings, strategies as st

from airflow_mlops.core.data.digest import RowDigest
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    CommitConflictError,
    DatasetNotFoundError,
    InsufficientDataError,
    MLOpsError,
    SchemaMismatchError,
)
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.object_store import file_marks
from airflow_mlops.operators.ingest import IngestDatasetOperator
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.ingestion.rows import key_hashes, require_single
from airflow_mlops.steps.validation.quarantine import SetAside
from tests.delta_logs import forget_commits

START = datetime(2024, 1, 1, tzinfo=UTC)


@pytest.fixture
def table(tmp_path: Path) -> str:
    return str(tmp_path / "table")


def land(folder: Path, name: str, **columns: Any) -> str:
    """Write a source file."""
    pl.DataFrame(columns).write_parquet(folder / name)
    return str(folder / name)


def ingest(source: str, table: str, **arguments: Any) -> dict[str, Any]:
    """Run the step on the spec that the operator builds."""
    task = IngestDatasetOperator(task_id="ingest", source=source, table=table, **arguments)
    return run_step("ingest", task.build_spec({}), Services())


def content(table: str, by: str = "x") -> dict[str, list[Any]]:
    return delta.read_table(table).collect().sort(by).to_dict(as_series=False)


def together(count: int, source: str, table: str, **arguments: Any) -> list[dict[str, Any] | MLOpsError]:
    """Run the same ingest several times at the same moment."""
    ready = threading.Barrier(count)
    outcomes: list[dict[str, Any] | MLOpsError] = []

    def attempt() -> None:
        ready.wait(timeout=30)
        try:
            outcomes.append(ingest(source, table, **arguments))
        except MLOpsError as err:
            outcomes.append(err)

    threads = [threading.Thread(target=attempt) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(outcomes) == count
    return outcomes


class TestAppend:
    def test_each_file_once(self, tmp_path: Path, table: str) -> None:
        land(tmp_path, "a.parquet", x=[1, 2])
        source = str(tmp_path / "*.parquet")
        first = ingest(source, table, mode="append")
        again = ingest(source, table, mode="append")
        assert (first["row_count"], again["row_count"]) == (2, 0)
        assert again["dataset"] == first["dataset"]
        land(tmp_path, "b.parquet", x=[3])
        assert ingest(source, table, mode="append")["row_count"] == 1
        assert content(table) == {"x": [1, 2, 3]}

    def test_a_file_by_another_spelling(
        self, tmp_path: Path, table: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "landing").mkdir()
        source = land(tmp_path / "landing", "a.parquet", x=[1, 2])
        (tmp_path / "link").symlink_to("landing")
        monkeypatch.chdir(tmp_path)
        spellings = (
            f"{tmp_path}/link/../landing/a.parquet",
            "./landing/../link/*.parquet",
            f"file://{source}",
            f"{tmp_path}//landing/*.parquet",
            source,
        )
        written = [ingest(spelling, table, mode="append")["row_count"] for spelling in spellings]
        assert (written, content(table)) == ([2, 0, 0, 0, 0], {"x": [1, 2]})

    def test_a_linked_folder_that_was_switched(self, tmp_path: Path, table: str) -> None:
        (tmp_path / "1").mkdir()
        (tmp_path / "current").symlink_to("1")
        land(tmp_path / "1", "a.parquet", x=[1, 2])
        source = f"{tmp_path}/current/*.parquet"

        def switch(number: str) -> None:
            shutil.copytree(tmp_path / "1", tmp_path / number, dirs_exist_ok=True)
            (tmp_path / "current").unlink()
            (tmp_path / "current").symlink_to(number)

        assert ingest(source, table, mode="append")["row_count"] == 2
        switch("2")
        assert ingest(source, table, mode="append")["row_count"] == 0
        (tmp_path / "2" / "b.parquet").write_bytes(Path(land(tmp_path, "b.parquet", x=[3])).read_bytes())
        assert ingest(source, table, mode="append")["row_count"] == 1
        land(tmp_path / "1", "a.parquet", x=[4])
        switch("3")
        with pytest.raises(
            SchemaMismatchError, match=r"current/a\.parquet was appended .* is another file now"
        ):
            ingest(source, table, mode="append")
        assert content(table) == {"x": [1, 2, 3]}

    def test_a_spelling_that_an_earlier_version_wrote_down(self, tmp_path: Path, table: str) -> None:
        source = f"{tmp_path}//{Path(land(tmp_path, 'a.parquet', x=[1, 2])).name}"
        mark = Transaction(f"airflow_mlops.file={source}", file_marks(source)[source])
        rows, known = pa.table({"x": [1, 2]}), CommitProperties(app_transactions=[mark])
        write_deltalake(table, rows, commit_properties=known)
        assert ingest(source, table, mode="append")["row_count"] == 0
        land(tmp_path, "a.parquet", x=[3])
        with pytest.raises(SchemaMismatchError, match="is another file now"):
            ingest(source, table, mode="append")

    def test_attempts_that_overlap(self, tmp_path: Path) -> None:
        source = land(tmp_path, "a.parquet", x=list(range(5_000)))
        for number in range(5):
            table = str(tmp_path / f"table{number}")
            outcomes = together(3, source, table, mode="append")
            lost = [outcome for outcome in outcomes if isinstance(outcome, MLOpsError)]
            assert all(isinstance(error, CommitConflictError) for error in lost)
            ingest(source, table, mode="append")  # the retry of whoever lost
            assert content(table)["x"] == list(range(5_000))

    @pytest.mark.parametrize("work_key", ["", "None"])
    def test_a_name_that_was_rendered_from_nothing(self, tmp_path: Path, table: str, work_key: str) -> None:
        source = land(tmp_path, "a.parquet", x=[1])
        with pytest.raises(ValueError, match="names nothing"):
            ingest(source, table, mode="append", work_key=work_key)

    def test_a_file_that_changed(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=[1, 2])
        ingest(source, table, mode="append")
        land(tmp_path, "a.parquet", x=[1, 2, 3])
        with pytest.raises(SchemaMismatchError, match=r"a\.parquet was appended .* work_key"):
            ingest(source, table, mode="append")
        assert ingest(source, table, mode="append", work_key="monday")["row_count"] == 3
        assert ingest(source, table, mode="append", work_key="monday")["row_count"] == 0
        assert content(table) == {"x": [1, 1, 2, 2, 3]}

    def test_no_file(self, tmp_path: Path, table: str) -> None:
        with pytest.raises(DatasetNotFoundError, match=r"no readable file matches"):
            ingest(str(tmp_path / "*.parquet"), table, mode="append")


class TestRestore:
    """What a restore took back was never ingested."""

    @pytest.mark.parametrize("how", ["version", "instant"])
    def test_files_are_appended_again_once(self, tmp_path: Path, table: str, how: str) -> None:
        source = str(tmp_path / "*.parquet")
        land(tmp_path, "a.parquet", x=[1])
        ingest(source, table, mode="append")
        for turn in range(3):
            land(tmp_path, f"b{turn}.parquet", x=[2 + turn])
            kept = DeltaTable(table)
            after = datetime.now(
                UTC
            )  # the time noted in a commit is before its file's, by which delta-rs goes
            ingest(source, table, mode="append")
            DeltaTable(table).restore(kept.version() if how == "version" else after)
            assert content(table)["x"] == list(range(1, 2 + turn))
            assert [ingest(source, table, mode="append")["row_count"] for _ in range(2)] == [1, 0]
            assert content(table)["x"] == list(range(1, 3 + turn))

    @settings(max_examples=20, suppress_health_check=list(HealthCheck))
    @given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=7))
    @example(steps=[(False, 1), (True, 1), (False, 2), (True, 2), (False, 1)])  # there and back again
    def test_whatever_was_restored_each_file_is_there_once(self, steps: list[tuple[bool, int]]) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder, table = Path(name), f"{name}/table"
            sources = [land(folder, f"{number}.parquet", x=[number]) for number in range(3)]
            ingest(sources[0], table, mode="append")
            for is_restore, number in steps:
                opened = DeltaTable(table)
                if is_restore:
                    opened.restore(number % opened.version())
                    continue
                rows = set(content(table)["x"])
                wanted = {*rows, number % 3}
                assert ingest(sources[number % 3], table, mode="append")["row_count"] == len(wanted - rows)
                assert content(table)["x"] == sorted(wanted)

    def test_values_and_hashes_do_not_mix(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=["a"])
        ingest(source, table)
        spec = {"source": source, "table": table, "cleaning": {"hash_columns": ["x"]}}
        run_step("ingest", spec, Services(hash_key="k" * 32))
        DeltaTable(table).restore(1)
        with pytest.raises(SchemaMismatchError, match="holds values in column 'x', and their hashes"):
            run_step("ingest", spec | {"mode": "append"}, Services(hash_key="k" * 32))
        assert content(table) == {"x": ["a"]}

    def test_it_counts_when_delta_has_forgotten_it(self, tmp_path: Path, table: str) -> None:
        """The first ingest after it says so in the table itself."""
        for number in (1, 2):
            ingest(land(tmp_path, f"{number}.parquet", x=[number]), table, mode="append")
        DeltaTable(table).restore(1)
        ingest(land(tmp_path, "3.parquet", x=[3]), table, mode="append")
        forget_commits(table)
        files = str(tmp_path / "*.parquet")
        assert [ingest(files, table, mode="append")["row_count"] for _ in range(2)] == [1, 0]
        assert content(table)["x"] == [1, 2, 3]

    def test_hashes_it_took_back_are_forgotten_with_it(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=["a"])
        ingest(source, table)
        spec = {"source": source, "table": table, "cleaning": {"hash_columns": ["x"]}}
        run_step("ingest", spec, Services(hash_key="k" * 32))
        DeltaTable(table).restore(1)
        ingest(land(tmp_path, "b.parquet", x=["b"]), table, mode="append")
        forget_commits(table)
        ingest(land(tmp_path, "c.parquet", x=["c"]), table, mode="append")
        with pytest.raises(SchemaMismatchError, match="holds values in column 'x', and their hashes"):
            run_step("ingest", spec | {"mode": "append"}, Services(hash_key="k" * 32))
        assert content(table) == {"x": ["a", "b", "c"]}


def test_a_version_has_its_own_number_while_others_commit(
    table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        write_deltalake(table, pa.table({"x": [1]}), mode="append")
    first = datetime.fromtimestamp(DeltaTable(table).history()[-1]["timestamp"] / 1000, UTC)
    history, late = DeltaTable.history, iter(range(2))

    def committed_meanwhile(self: DeltaTable, limit: int | None = None) -> Any:
        for _ in [*itertools.islice(late, 1)]:
            write_deltalake(table, pa.table({"x": [1]}), mode="append")
        return history(self, limit)

    monkeypatch.setattr(DeltaTable, "history", committed_meanwhile)
    assert delta.version_as_of(table, first.isoformat()) == 0


class TestUpsert:
    def test_rows_take_the_place_of_those_with_their_key(self, tmp_path: Path, table: str) -> None:
        first = land(tmp_path, "a.parquet", x=[1, 2], y=["a", "b"])
        second = land(tmp_path, "b.parquet", x=[2, 3], y=["B", "C"])
        ingest(first, table, mode="upsert", keys="x")
        one = ingest(second, table, mode="upsert", keys="x")
        two = ingest(second, table, mode="upsert", keys="x")
        assert content(table) == {"x": [1, 2, 3], "y": ["a", "B", "C"]}
        assert one["dataset"]["dataset_digest"] == two["dataset"]["dataset_digest"]

    def test_a_key_of_which_the_table_has_several_rows(self, tmp_path: Path, table: str) -> None:
        ingest(land(tmp_path, "a.parquet", x=[1, 1, 1, 2, 2], y=["a", "a", "b", "c", "d"]), table)
        other = land(tmp_path, "b.parquet", x=[3], y=["C"])
        ingest(other, table, mode="upsert", keys="x")  # says nothing of the keys that have several
        before = content(table)
        source = land(tmp_path, "c.parquet", x=[1, 4], y=["A", "D"])
        with pytest.raises(SchemaMismatchError, match=r"1 of the keys .* such as 3 of x=1; .*deduplicate_by"):
            ingest(source, table, mode="upsert", keys="x")
        with pytest.raises(SchemaMismatchError, match=r"such as 2 of x=1, y='a'"):
            ingest(land(tmp_path, "d.parquet", x=[1], y=["a"]), table, mode="upsert", keys=["x", "y"])
        late = {"mode": "incremental", "watermark_column": "x", "overlap": 9, "keys": "x"}
        with pytest.raises(SchemaMismatchError, match="such as 3 of x=1"):
            ingest(source, table, **late)
        assert content(table) == before

        ingest(table, table, deduplicate_by=["x"], deduplicate_order=["y"])  # what the message advises
        ingest(source, table, mode="upsert", keys="x")
        assert content(table) == {"x": [1, 2, 3, 4], "y": ["A", "d", "C", "D"]}

    def test_a_key_column_is_no_pattern(self, tmp_path: Path, table: str) -> None:
        rows = pl.DataFrame({"^k.*$": [1, 1, 2], "kx": [3, 4, 5]})
        with pytest.raises(SchemaMismatchError, match=r"such as 2 of \^k\.\*\$=1;"):
            require_single(rows.lazy(), ["^k.*$"], np.sort(key_hashes(rows, ["^k.*$"])), uri=table)

    def test_at_the_same_moment(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=list(range(2_000)), y=[1.0] * 2_000)
        ingest(land(tmp_path, "b.parquet", x=[-1], y=[0.0]), table, mode="upsert", keys=["x"])
        for _ in range(3):
            outcomes = together(3, source, table, mode="upsert", keys=["x"])
            lost = [outcome for outcome in outcomes if isinstance(outcome, MLOpsError)]
            assert len(lost) < 3
            assert all(isinstance(error, CommitConflictError) for error in lost)
            assert content(table)["x"] == list(range(-1, 2_000))

    def test_a_name_that_an_upsert_cannot_write(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", **{"x": [1], "a`b": [2]})
        with pytest.raises(SchemaMismatchError, match="has a backtick in its name"):
            ingest(source, table, mode="upsert", keys="x")
        assert not Path(table).exists()
        assert ingest(source, table)["row_count"] == 1

    def test_an_id_that_repeats_beside_the_keys(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=[1, 2], id=[7, 7])
        with pytest.raises(SchemaMismatchError, match="id column 'id' has 1 repeated values, such as 7"):
            ingest(source, table, mode="upsert", keys="x", id_column="id")
        assert not delta.table_exists(table)

    def test_keys_that_name_no_row(self, tmp_path: Path, table: str) -> None:
        twice = land(tmp_path, "a.parquet", x=[1, 1, 2], y=["a", "a", "b"])
        with pytest.raises(
            SchemaMismatchError, match=r"key 'x', 'y' has 1 repeated values, such as \(1, 'a'\)"
        ):
            ingest(twice, table, mode="upsert", keys=["x", "y"])
        null = land(tmp_path, "b.parquet", x=[1, None])
        with pytest.raises(SchemaMismatchError, match=r"key column 'x' has 1 nulls"):
            ingest(null, table, mode="upsert", keys=["x"])
        with pytest.raises(ValueError, match=r"needs keys"):
            ingest(null, table, mode="upsert")
        assert not delta.table_exists(table)


def set_aside(table: str, **which: Any) -> None:
    """Take rows out of a table into its quarantine, as a validation or a screen does."""
    rows = delta.read_table(table).filter(**which).collect().height
    reasons: list[tuple[str, Any]] = [
        ("bad", pl.all_horizontal(pl.col(name) == v for name, v in which.items()))
    ]
    judged = delta.describe(table, time_column=None)
    SetAside(
        dataset=judged,
        window=None,
        time_column=None,
        table=f"{table}_bad",
        reasons=reasons,
        count=rows,
        newest=False,
    ).write({})


class TestWhatLeftTheTable:
    """The highest value falls with the rows that leave; what was read stays read."""

    @pytest.mark.parametrize(
        "values",
        [
            [1, 2, 3, 4],
            [date(2024, 1, day) for day in (1, 2, 3, 4)],
            [datetime(2024, 1, day, 3, 4, 5, 6) for day in (1, 2, 3, 4)],
            [datetime(2024, 1, day, tzinfo=UTC) for day in (1, 2, 3, 4)],
        ],
        ids=["numbers", "dates", "times without a zone", "times"],
    )
    def test_is_not_read_again(self, tmp_path: Path, table: str, values: list[Any]) -> None:
        how = {"mode": "incremental", "watermark_column": "w"}
        source = land(tmp_path, "rows.parquet", w=values[:3], x=[1, 2, 3])
        reached = ingest(source, table, **how)["watermark"]
        set_aside(table, x=3)
        again = ingest(source, table, **how)
        assert (again["row_count"], again["watermark"]) == (0, reached)
        set_aside(table, x=2)  # of rows below it, nothing is forgotten
        land(tmp_path, "rows.parquet", w=values, x=[1, 2, 3, 4])
        assert ingest(source, table, **how)["row_count"] == 1
        assert content(table)["x"] == [1, 4]
        assert content(f"{table}_bad")["x"] == [2, 3]

    def test_nor_where_nothing_is_left(self, tmp_path: Path, table: str) -> None:
        how = {"mode": "incremental", "watermark_column": "x"}
        source = land(tmp_path, "rows.parquet", x=[1, 2], bad=[1, 1])
        ingest(source, table, **how)
        set_aside(table, bad=1)
        version = delta.newest_version(table)
        assert ingest(source, table, **how)["row_count"] == 0
        assert delta.newest_version(table) == version

    def test_is_read_again_once_it_was_restored_or_all_was_replaced(self, tmp_path: Path, table: str) -> None:
        how = {"mode": "incremental", "watermark_column": "x"}
        source = land(tmp_path, "rows.parquet", x=[1, 2, 3])
        first = ingest(source, table, **how)
        set_aside(table, x=3)
        DeltaTable(table).restore(first["dataset"]["version"])
        DeltaTable(table).delete("x > 1")
        assert ingest(source, table, **how)["row_count"] == 2
        set_aside(table, x=3)
        ingest(land(tmp_path, "one.parquet", x=[1]), table, mode="replace")
        assert ingest(source, table, **how)["row_count"] == 2

    @pytest.mark.parametrize("values", [[1], ["a"]], ids=["of its type", "of another"])
    def test_is_read_again_once_others_replaced_all(
        self, tmp_path: Path, table: str, values: list[Any]
    ) -> None:
        how = {"mode": "incremental", "watermark_column": "x"}
        source = land(tmp_path, "rows.parquet", x=[1, 2, 3], y=[1, 1, 0])
        ingest(source, table, **how)
        set_aside(table, y=0)
        assert ingest(source, table, **how)["row_count"] == 0
        rows = pl.DataFrame({"x": values, "y": [1]})
        write_deltalake(table, rows.to_arrow(), mode="overwrite", schema_mode="overwrite")
        more = [value * 2 for value in values]
        result = ingest(land(tmp_path, "more.parquet", x=[*values, *more], y=[1, 1]), table, **how)
        assert (result["row_count"], result["watermark"]) == (1, str(more[0]))

    def test_old_rows_of_another_column_are_dropped_once(self, tmp_path: Path, table: str) -> None:
        times = [datetime(2024, 1, day, tzinfo=UTC) for day in (9, 2, 1)]
        source = land(tmp_path, "rows.parquet", x=[1, 2, 3], t=times)
        how = {
            "mode": "incremental",
            "watermark_column": "x",
            "time_column": "t",
            "drop_before": "2024-01-05",
        }
        ingest(source, table, **how)
        version = delta.newest_version(table)
        assert ingest(source, table, **how)["row_count"] == 0
        assert (content(table)["x"], delta.newest_version(table)) == ([1], version)


class TestIncremental:
    def test_windows_belong_to_modes_that_write_them_again(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "rows.parquet", t=[START, START + timedelta(days=1)])
        window = {"time_column": "t", "window_start": "2024-01-01", "window_end": "2024-01-02"}
        with pytest.raises(ValueError, match=r"'incremental' into .* takes no window"):
            ingest(source, table, mode="incremental", watermark_column="t", **window)
        with pytest.raises(ValueError, match=r"'append' into .* takes no window: each file is added once"):
            ingest(source, table, mode="append", **window)
        assert not Path(table).exists()
        assert ingest(source, table, mode="append", work_key="first", **window)["row_count"] == 1

    def test_what_is_above_the_tables_highest_value(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=[1, 2])
        first = ingest(source, table, mode="incremental", watermark_column="x")
        assert (first["row_count"], first["watermark"]) == (2, "2")
        land(tmp_path, "a.parquet", x=[1, 2, 3, 4])
        second = ingest(source, table, mode="incremental", watermark_column="x")
        nothing = ingest(source, table, mode="incremental", watermark_column="x")
        assert (second["row_count"], second["watermark"]) == (2, "4")
        assert (nothing["row_count"], nothing["dataset"]) == (0, second["dataset"])
        assert content(table) == {"x": [1, 2, 3, 4]}

    def test_rows_that_come_late(self, tmp_path: Path, table: str) -> None:
        def hours(*values: int) -> list[datetime]:
            return [START + timedelta(hours=value) for value in values]

        how = {
            "mode": "incremental",
            "watermark_column": "t",
            "time_column": "t",
            "keys": "x",
            "overlap": 2 * 3600,
        }
        source = land(tmp_path, "a.parquet", x=[1, 5], t=hours(1, 5))
        ingest(source, table, **how)
        land(tmp_path, "a.parquet", x=[1, 2, 4, 5, 6], t=hours(1, 2, 4, 5, 6))
        assert ingest(source, table, **how)["watermark"] == "2024-01-01T06:00:00+00:00"
        assert content(table)["x"] == [1, 4, 5, 6]  # the one of 2 o'clock came later than the overlap
        with pytest.raises(ValueError, match=r"overlap needs mode 'incremental' and keys"):
            ingest(source, table, mode="incremental", watermark_column="t", overlap=60)

    def test_at_the_same_moment(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=[0])
        for stop in (2_000, 4_000, 6_000):
            ingest(source, table, mode="incremental", watermark_column="x")
            land(tmp_path, "a.parquet", x=list(range(stop)))
            together(3, source, table, mode="incremental", watermark_column="x")
            assert content(table)["x"] == list(range(stop))

    @pytest.mark.parametrize(
        ("values", "overlap"),
        [
            ([date(2024, 1, 1), date(2024, 1, 2), date(2024, 1, 4)], 2),
            ([Decimal("0.10"), Decimal("0.20"), Decimal("0.40")], 0.2),
            ([0.25, 0.5, 1.0], 0.5),
            ([1, 2, 4], 2.0),
        ],
    )
    def test_an_overlap_is_in_days_or_the_columns_unit(
        self, tmp_path: Path, table: str, values: list[Any], overlap: float
    ) -> None:
        how = {"mode": "incremental", "watermark_column": "w", "keys": "x", "overlap": overlap}
        ingest(land(tmp_path, "a.parquet", x=[0, 4], w=[values[0], values[2]]), table, **how)
        ingest(land(tmp_path, "b.parquet", x=[1, 2, 4], w=[values[0], values[1], values[2]]), table, **how)
        assert content(table)["x"] == [0, 2, 4]

    def test_a_time_of_another_zone(self, tmp_path: Path, table: str) -> None:
        how = {"mode": "incremental", "watermark_column": "t"}
        for name, hours in {"a": [1, 2], "b": [2, 3]}.items():
            times = pl.Series([START + timedelta(hours=hour) for hour in hours])
            source = land(tmp_path, f"{name}.parquet", t=times.dt.convert_time_zone("America/New_York"))
            last = ingest(source, table, **how)
        assert (last["row_count"], last["watermark"]) == (1, "2024-01-01T03:00:00+00:00")
        assert last["dataset"]["row_count"] == 3

    @pytest.mark.parametrize(
        ("values", "arguments", "said"),
        [
            (["a"], {}, "x is String, the table has Int64"),
            ([3], {"overlap": -5}, "overlap -5 is no distance"),
            ([3], {"overlap": "nan"}, "overlap nan is no distance"),
        ],
    )
    def test_what_is_not_above_or_below_anything(
        self, tmp_path: Path, table: str, values: list[Any], arguments: dict[str, Any], said: str
    ) -> None:
        how: dict[str, Any] = {"mode": "incremental", "watermark_column": "x", "keys": "x"}
        ingest(land(tmp_path, "a.parquet", x=[1, 2]), table, **how)
        with pytest.raises(ValueError, match=said):
            ingest(land(tmp_path, "b.parquet", x=values), table, **how, **arguments)

    def test_an_overlap_longer_than_time(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=[START])
        how: dict[str, Any] = {"mode": "incremental", "watermark_column": "x", "keys": "x"}
        ingest(source, table, **how)
        with pytest.raises(ValueError, match="reaches below the first year"):
            ingest(source, table, overlap=1e13, **how)

    def test_of_lists_none_is_the_highest(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=[[1], [2]])
        with pytest.raises(SchemaMismatchError, match="of which none is the highest"):
            ingest(source, table, mode="incremental", watermark_column="x")
        assert not delta.table_exists(table)

    def test_below_a_text_there_is_no_overlap(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=[1], w=["2024-01-01"])
        how = {"mode": "incremental", "watermark_column": "w", "keys": "x"}
        with pytest.raises(SchemaMismatchError, match=r"overlap needs .* 'w' of .* is String"):
            ingest(source, table, overlap=1, **how)
        ingest(source, table, **how)
        with pytest.raises(SchemaMismatchError, match=r"overlap needs .* 'w' of .* is String"):
            ingest(source, table, overlap=1, **how)

    @pytest.mark.parametrize("mode", ["incremental", "upsert"])
    def test_nan_is_no_watermark_and_no_key(self, tmp_path: Path, table: str, mode: str) -> None:
        """It is above every watermark, so its rows would come again each time."""
        source = land(tmp_path, "a.parquet", w=[1.0, float("nan")])
        with pytest.raises(SchemaMismatchError, match=r"column 'w' has 1 nulls or NaN"):
            ingest(source, table, mode=mode, watermark_column="w", keys="w")
        assert not delta.table_exists(table)


def test_times_of_a_table_that_others_append_to_while_it_is_replaced(
    tmp_path: Path, table: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = land(tmp_path, "a.parquet", t=[START])
    ingest(source, table)
    write = delta.TableWriter.replace

    def appended_meanwhile(*arguments: Any, **options: Any) -> int:
        write_deltalake(
            table,
            delta.read_table(table).select(pl.col("t") + timedelta(days=9)).collect().to_arrow(),
            mode="append",
        )
        return write(*arguments, **options)

    monkeypatch.setattr(delta.TableWriter, "replace", appended_meanwhile)
    task = IngestDatasetOperator(
        task_id="i", source=source, table=table, time_column="t", window_start=None, window_end=None
    )
    dataset = run_step("ingest", task.build_spec({}), Services())["dataset"]
    assert (dataset["row_count"], dataset["time_max"]) == (2, "2024-01-10T00:00:00Z")


class TestSchemaPolicy:
    def test_strict_names_columns_types_and_the_policy(self, tmp_path: Path, table: str) -> None:
        ingest(land(tmp_path, "a.parquet", x=pl.Series([1], dtype=pl.Int32), y=["a"]), table)
        wide = land(tmp_path, "b.parquet", x=[2], y=[1.5], z=[1])
        with pytest.raises(SchemaMismatchError) as refused:
            ingest(wide, table)
        assert "z is new (Int64; schema_policy='add_columns' takes it)" in str(refused.value)
        assert "x is Int64, the table has Int32; schema_policy='widen' takes it" in str(refused.value)
        assert "y is Float64, the table has String." in str(refused.value)
        with pytest.raises(SchemaMismatchError, match=r"x is Int64, the table has Int32"):
            ingest(wide, table, schema_policy="add_columns")

    @pytest.mark.parametrize("mode", ["replace", "append", "upsert", "incremental"])
    @pytest.mark.parametrize("policy", ["add_columns", "widen"])
    def test_new_columns(self, tmp_path: Path, table: str, mode: str, policy: str) -> None:
        how = {"mode": mode, "keys": "x", "watermark_column": "x", "schema_policy": policy}
        ingest(land(tmp_path, "a.parquet", x=[1]), table, **how)
        ingest(land(tmp_path, "b.parquet", x=[2], z=["new"]), table, **how)
        kept = {"x": [2], "z": ["new"]} if mode == "replace" else {"x": [1, 2], "z": [None, "new"]}
        assert content(table) == kept

    @pytest.mark.parametrize("mode", ["replace", "append", "upsert", "incremental"])
    def test_wider_and_narrower_types(self, tmp_path: Path, table: str, mode: str) -> None:
        how = {"mode": mode, "keys": "x", "watermark_column": "x", "schema_policy": "widen"}
        ingest(land(tmp_path, "a.parquet", x=pl.Series([1], dtype=pl.Int32)), table, **how)
        ingest(land(tmp_path, "b.parquet", x=[2**40]), table, **how)
        ingest(land(tmp_path, "c.parquet", x=pl.Series([2**31 - 1], dtype=pl.Int32)), table, **how)
        rows = {"replace": [2**31 - 1], "incremental": [1, 2**40]}.get(mode, [1, 2**31 - 1, 2**40])
        assert content(table) == {"x": rows}
        assert delta.read_table(table).collect_schema() == {"x": pl.Int64}

    def test_a_window_of_a_table_that_widens(self, tmp_path: Path, table: str) -> None:
        for day in (1, 2):
            kind = pl.Float32 if day == 1 else pl.Float64
            source = land(
                tmp_path, f"{day}.parquet", t=[START + timedelta(days=day)], x=pl.Series([0.5], dtype=kind)
            )
            window = {"window_start": f"2024-01-0{day + 1}", "window_end": f"2024-01-0{day + 2}"}
            ingest(source, table, time_column="t", schema_policy="widen", **window)
        assert content(table, "t")["x"] == [0.5, 0.5]

    @pytest.mark.parametrize("policy", ["strict", "add_columns", "widen"])
    def test_a_renamed_column(self, tmp_path: Path, table: str, policy: str) -> None:
        ingest(land(tmp_path, "a.parquet", x=[1], y=[1]), table)
        with pytest.raises(SchemaMismatchError, match=r"y is missing \(table: Int64\)"):
            ingest(land(tmp_path, "b.parquet", x=[1], why=[1]), table, schema_policy=policy)

    def test_types_that_delta_does_not_have(self, tmp_path: Path, table: str) -> None:
        source = land(
            tmp_path,
            "a.parquet",
            x=pl.Series([2**32 - 1], dtype=pl.UInt32),
            kind=pl.Series(["a"], dtype=pl.Categorical),
            t=pl.Series([START], dtype=pl.Datetime("ns", "Europe/Berlin")),
        )
        for _ in range(2):
            ingest(source, table)
        assert content(table) == {"x": [2**32 - 1], "kind": ["a"], "t": [START]}

    def test_types_inside_others(self, tmp_path: Path, table: str) -> None:
        days = pl.Series([[START], None], dtype=pl.List(pl.Datetime("ns", "Europe/Berlin")))
        source = land(
            tmp_path,
            "a.parquet",
            x=[1, 2],
            few=pl.Series([[1], [2]], dtype=pl.List(pl.UInt16)),
            pair=pl.Series([[1, 2], [3, 4]], dtype=pl.Array(pl.Int64, 2)),
            days=days,
            deep=pl.Series([{"c": "a"}, None], dtype=pl.Struct({"c": pl.Categorical})),
        )
        for _ in range(2):
            result = ingest(source, table, mode="append", work_key=str(_))
        rows = content(table)
        read = RowDigest(result["dataset"]["columns"])
        read.update(delta.read_table(table).collect())
        assert result["dataset"]["dataset_digest"] == read.hexdigest()
        assert rows["pair"][0] == [1, 2]
        assert rows["days"][0] == [START]
        assert rows["deep"][0] == {"c": "a"}

    @pytest.mark.parametrize(
        ("columns", "said"),
        [
            ({"x": [timedelta(1)]}, "column 'x' is Duration"),
            ({"x": [None]}, "column 'x' is Null, .* a column without any value"),
            ({"x": [[None]]}, r"column 'x' is List\(Null\)"),
            ({"x": [1], "X": [2]}, "columns 'x' and 'X' are one name to Delta"),
        ],
    )
    def test_what_delta_does_not_have(
        self, tmp_path: Path, table: str, columns: dict[str, Any], said: str
    ) -> None:
        source = land(tmp_path, "a.parquet", **columns)
        with pytest.raises(SchemaMismatchError, match=said):
            ingest(source, table)
        assert not Path(table).exists()

    def test_a_column_without_values_has_the_tables_type(self, tmp_path: Path, table: str) -> None:
        for name, values in {"a": [1.5], "b": [None]}.items():
            ingest(land(tmp_path, f"{name}.parquet", x=[name], fee=values), table, mode="append")
        assert content(table) == {"x": ["a", "b"], "fee": [1.5, None]}

    def test_a_number_too_large_for_the_table(self, tmp_path: Path, table: str) -> None:
        source = land(tmp_path, "a.parquet", x=pl.Series([1, 2**63], dtype=pl.UInt64))
        for how in ({}, {"deduplicate_by": "x"}):
            with pytest.raises(SchemaMismatchError, match=r"'x' for 1 out of .* values"):
                ingest(source, table, **how)

    def test_files_of_other_types(self, tmp_path: Path, table: str) -> None:
        land(tmp_path, "a.parquet", x=[1])
        land(tmp_path, "b.parquet", x=[1.5])
        with pytest.raises(
            SchemaMismatchError,
            match=r"column x is Int64 in .*a.parquet and Float64 in .*b.parquet.*schema_policy",
        ):
            ingest(str(tmp_path / "*.parquet"), table)

    def test_a_table_with_rules_of_its_own(self, tmp_path: Path, table: str) -> None:
        write_deltalake(
            table, pl.DataFrame({"x": [1]}).to_arrow(), configuration={"delta.appendOnly": "true"}
        )
        DeltaTable(table).alter.add_constraint({"small": "x < 5"})
        with pytest.raises(SchemaMismatchError, match="append-only"):
            ingest(land(tmp_path, "a.parquet", x=[2]), table)
        with pytest.raises(SchemaMismatchError, match="failed validation check"):
            ingest(land(tmp_path, "b.parquet", x=[7]), table, mode="append")
        assert content(table) == {"x": [1]}

    def test_new_categories(self, tmp_path: Path, table: str) -> None:
        how: dict[str, Any] = {"mode": "append", "new_categories": {"city": 1}}
        ingest(land(tmp_path, "a.parquet", city=["Rome", "Oslo", None]), table, **how)
        ingest(land(tmp_path, "b.parquet", city=["Rome", "Lima"]), table, **how)
        with pytest.raises(SchemaMismatchError) as refused:
            ingest(land(tmp_path, "c.parquet", city=["Bonn", "Riga"]), table, **how)
        assert "column 'city' has more than 1 new categories ('Bonn', 'Riga'); the table has 3" in str(
            refused.value
        )
        assert delta.describe(table).row_count == 5


def test_the_digest_on_the_way_is_the_tables(tmp_path: Path, table: str) -> None:
    count = 150_000
    for late in (None, 0, count - 1):  # a null in the first batch, or in the last one
        flags = [row % 2 == 0 if row != late else None for row in range(count)]
        times = [START + timedelta(seconds=row) for row in range(count)]
        source = land(
            tmp_path,
            "a.parquet",
            x=[None if row == late else row for row in range(count)],
            flag=flags,
            t=times,
        )
        result = ingest(source, table, time_column="t", window_start=None, window_end=None)
        dataset = delta.describe(table, time_column="t")
        assert result["dataset"]["dataset_digest"] == dataset.dataset_digest
        assert (result["dataset"]["row_count"], result["row_count"]) == (dataset.row_count, count)
        assert result["dataset"]["time_max"] == times[-1].isoformat().replace("+00:00", "Z")


def test_an_id_that_repeats_far_apart(tmp_path: Path, table: str) -> None:
    source = land(tmp_path, "a.parquet", x=[*range(200_000), 7])
    with pytest.raises(SchemaMismatchError, match=r"id column 'x' has 1 repeated values, such as 7"):
        ingest(source, table, id_column="x")
    assert not delta.table_exists(table)


@pytest.mark.parametrize(
    ("last", "arguments", "said"),
    [
        (0, {"id_column": "x"}, "id column 'x' has 1 repeated values"),
        (None, {"keys": "x", "mode": "upsert"}, "key column 'x' has 1 nulls"),
        (None, {"id_column": "x", "deduplicate_by": "y"}, "id column 'x' has 1 nulls"),
        (2**63, {}, "'x' for 1 out of"),
    ],
)
def test_rows_that_are_refused_late_are_no_table(
    tmp_path: Path, table: str, last: Any, arguments: dict[str, Any], said: str
) -> None:
    count = 2_000_000
    numbers = pl.int_range(count, eager=True, dtype=pl.UInt64)
    dtype = pl.UInt64 if last == 2**63 else pl.Int64
    source = land(
        tmp_path,
        "a.parquet",
        x=pl.concat([numbers.cast(dtype), pl.Series([last], dtype=dtype)]),
        y=range(count + 1),
    )
    with pytest.raises(SchemaMismatchError, match=said):
        ingest(source, table, **arguments)
    assert not Path(table).exists()


def test_no_rows_are_no_table(tmp_path: Path, table: str) -> None:
    source = land(tmp_path, "a.parquet", x=pl.Series([], dtype=pl.Int64))
    for mode in ("replace", "append"):
        with pytest.raises(InsufficientDataError):
            ingest(source, table, mode=mode)
    assert not delta.table_exists(table)


class TestDates:
    """Daily data has a date and no time."""

    def test_a_time_column_of_dates(self, tmp_path: Path, table: str) -> None:
        days = [date(2024, 1, day) for day in range(1, 7)]
        source = land(tmp_path, "a.parquet", day=days, x=list(range(6)))
        window = {"start": "2024-01-02T00:00:00Z", "end": "2024-01-04T00:00:00Z"}
        spec = {"source": source, "table": table, "time_column": "day", "window": window}
        for _ in range(2):  # the window is replaced
            result = run_step("ingest", spec, Services())
        assert (result["row_count"], result["dataset"]["time_min"]) == (2, "2024-01-02T00:00:00Z")
        assert content(table) == {"day": [START + timedelta(days=1), START + timedelta(days=2)], "x": [1, 2]}

        how = {"mode": "incremental", "watermark_column": "day", "time_column": "day"}
        rest = ingest(source, table, **how, drop_before="2024-01-03")
        assert rest["watermark"] == "2024-01-06T00:00:00+00:00"
        assert content(table)["x"] == [2, 3, 4, 5]
        late = ingest(source, table, **how, keys="x", overlap=86_400)
        assert (late["row_count"], content(table)["x"]) == (2, [2, 3, 4, 5])

    @pytest.mark.parametrize("hour", [0, 5])
    def test_a_table_that_has_dates(self, table: str, hour: int) -> None:
        rows = pl.DataFrame({"day": [date(2024, 1, day) for day in range(1, 7)], "x": list(range(6))})
        rows.write_delta(table)
        window = Window(
            start=START + timedelta(days=1, hours=hour), end=START + timedelta(days=3, hours=hour)
        )
        held = [1, 2] if hour == 0 else [2, 3]
        where = {"window": window, "time_column": "day"}
        assert delta.read_table(table, **where).collect()["x"].to_list() == held
        batches = delta.stream_table(table, columns=["x"], batch_rows=9, **where)
        assert pl.concat(batches)["x"].to_list() == held
        delta.replace_window(table, rows[held].with_columns(x=-pl.col("x")), **where)
        assert sorted(content(table)["x"]) == sorted({*range(6)} - {*held} | {-x for x in held})
        told = delta.describe(table, time_column="day")
        assert (told.time_min, told.time_max) == (START, START + timedelta(days=5))

    @pytest.mark.parametrize(
        "how",
        [
            {"mode": "append"},
            {"mode": "incremental", "watermark_column": "day"},
            {"mode": "incremental", "watermark_column": "day", "keys": ["x"], "overlap": 1},
            {"mode": "upsert", "keys": ["x"]},
            {"mode": "replace", "window": {"start": "2024-01-02T05:00Z", "end": "2024-01-05T00:00Z"}},
        ],
    )
    def test_dates_for_a_table_that_has_dates(self, tmp_path: Path, table: str, how: dict[str, Any]) -> None:
        days = [date(2024, 1, day) for day in range(1, 6)]
        pl.DataFrame({"day": days[:2], "x": [0, 1]}).write_delta(table)
        source = land(tmp_path, "a.parquet", day=days[2:], x=[2, 3, 4])
        for _ in range(2):
            spec = {"source": source, "table": table, "time_column": "day", **how}
            result = run_step("ingest", spec, Services())
        count = 4 if how.get("window") else 5
        assert content(table) == {"day": days[:count], "x": list(range(count))}
        assert (result["dataset"]["row_count"], result["dataset"]["time_max"]) == (
            count, f"2024-01-0{count}T00:00:00Z",
        )  # fmt: skip

    def test_a_whole_table_of_dates_is_replaced_by_dates(self, tmp_path: Path, table: str) -> None:
        pl.DataFrame({"day": [date(2024, 1, 9)], "x": [9]}).write_delta(table)
        days = [date(2024, 1, 3), date(2024, 1, 1)]
        source = land(tmp_path, "a.parquet", day=days, x=[0, 1])
        spec = {"source": source, "table": table, "time_column": "day", "mode": "replace"}
        dataset = run_step("ingest", spec, Services())["dataset"]
        assert content(table) == {"day": days, "x": [0, 1]}
        assert (dataset["time_min"], dataset["time_max"]) == ("2024-01-01T00:00:00Z", "2024-01-03T00:00:00Z")


class TestTimesWithoutZone:
    """A table that another tool wrote may hold times without a zone; they are UTC."""

    def test_a_window_is_read_replaced_described_and_dropped(self, table: str) -> None:
        times = [datetime(2024, 1, day) for day in range(1, 7)]
        rows = pl.DataFrame({"t": times, "x": list(range(6))})
        rows.write_delta(table)
        berlin = Window.parse("2024-01-02T01:00:00+01:00", "2024-01-04T01:00:00+01:00")
        where = {"window": berlin, "time_column": "t"}
        assert delta.read_table(table, **where).collect()["x"].to_list() == [1, 2]
        batches = delta.stream_table(table, columns=["x"], batch_rows=9, **where)
        assert pl.concat(batches)["x"].to_list() == [1, 2]
        delta.replace_window(table, rows[[1, 2]].with_columns(x=-pl.col("x")), **where)
        assert sorted(content(table)["x"]) == [-2, -1, 0, 3, 4, 5]
        for describe in (delta.describe, delta.describe_files):
            told = describe(table, time_column="t")
            assert (told.time_min, told.time_max) == (START, START + timedelta(days=5))
        assert delta.drop_before(table, START + timedelta(days=3), time_column="t") == 3
        assert sorted(content(table)["x"]) == [3, 4, 5]

    @pytest.mark.parametrize(
        "how",
        [
            {},
            {"mode": "append"},
            {"mode": "incremental", "watermark_column": "t"},
            {"mode": "incremental", "watermark_column": "t", "keys": ["x"], "overlap": 90_000},
            {"window": {"start": "2024-01-02T01:00+01:00", "end": "2024-01-05T00:00Z"}},
        ],
    )
    def test_rows_for_such_a_table_have_none_either(
        self, tmp_path: Path, table: str, how: dict[str, Any]
    ) -> None:
        times = [datetime(2024, 1, day) for day in range(1, 6)]
        pl.DataFrame({"t": times[:2], "x": [0, 1]}).write_delta(table)
        source = land(
            tmp_path, "a.parquet", t=[time.replace(tzinfo=UTC) for time in times[1:]], x=[1, 2, 3, 4]
        )
        spec = {"source": source, "table": table, "time_column": "t", **how}
        result = run_step("ingest", spec, Services())
        first = {"append": [0, 1, 1, 2, 3, 4], "incremental": [0, 1, 2, 3, 4]}
        held = first.get(str(how.get("mode")), [0, 1, 2, 3] if how else [1, 2, 3, 4])
        assert content(table) == {"t": [times[x] for x in held], "x": held}
        assert result["dataset"]["time_max"] == f"2024-01-0{held[-1] + 1}T00:00:00Z"

    def test_a_window_is_judged_and_bad_rows_set_aside(self, tmp_path: Path, table: str) -> None:
        times = [datetime(2024, 1, day, hour) for day in (1, 2, 3) for hour in range(20)]
        rows = pl.DataFrame({"t": times, "x": list(range(60))})
        rows.write_delta(table)
        suite = {
            "type": "expect_column_values_to_not_be_in_set",
            "kwargs": {"column": "x", "value_set": [25]},
        }
        spec = {
            "dataset": table,
            "suite": {"name": "s", "expectations": [suite]},
            "time_column": "t",
            "window": {"start": "2024-01-02T00:00:00Z", "end": "2024-01-03T00:00:00Z"},
            "quarantine": {"table": f"{table}_quarantine", "budget": 0.1},
        }
        result = run_step("validate", spec, Services())
        assert (result["success"], result["row_count"]) == (True, 20)
        assert content(table)["x"] == [x for x in range(60) if x != 25]
        assert content(f"{table}_quarantine")["x"] == [25]


def decimals(*texts: str) -> pl.Series:
    scale = max(len(text.partition(".")[2]) for text in texts)
    return pl.Series([Decimal(text) for text in texts], dtype=pl.Decimal(38, scale))


class TestDecimals:
    """A query's decimals have the scale that was seen, which may be larger the next day."""

    def test_a_larger_scale_widens_the_table(self, tmp_path: Path, table: str) -> None:
        ingest(land(tmp_path, "1.parquet", x=decimals("1.5", "-2.0")), table)
        more = land(tmp_path, "2.parquet", x=decimals("1.25", "3.00"))
        with pytest.raises(
            SchemaMismatchError, match=r"widen' takes it, or in a query CAST\(x AS NUMERIC\(38,1\)\)"
        ):
            ingest(more, table, mode="append")
        for _ in range(2):
            ingest(more, table, mode="append", schema_policy="widen")
        assert content(table)["x"] == [Decimal(text) for text in ("-2.00", "1.25", "1.50", "3.00")]
        assert delta.read_table(table).collect_schema()["x"] == pl.Decimal(38, 2)
        ingest(land(tmp_path, "3.parquet", x=decimals("7.5")), table, mode="append", schema_policy="widen")
        assert content(table)["x"][-1] == Decimal("7.50")

    def test_precision_grows_with_the_scale_where_there_is_room(self, tmp_path: Path, table: str) -> None:
        price = pl.Series([Decimal("12345678.25")], dtype=pl.Decimal(10, 2))
        ingest(land(tmp_path, "1.parquet", x=price), table)
        finer = pl.Series([Decimal("1.12345")], dtype=pl.Decimal(6, 5))
        ingest(land(tmp_path, "2.parquet", x=finer), table, mode="append", schema_policy="widen")
        assert delta.read_table(table).collect_schema()["x"] == pl.Decimal(13, 5)
        assert content(table)["x"] == [Decimal("1.12345"), Decimal("12345678.25000")]

    @pytest.mark.parametrize(("held", "new"), [("9" * 37, "0.25"), ("0.25", "9" * 37)])
    def test_values_that_would_need_more_digits_than_there_are(
        self, tmp_path: Path, table: str, held: str, new: str
    ) -> None:
        ingest(land(tmp_path, "1.parquet", x=decimals(held)), table)
        before = delta.newest_version(table), content(table)
        source = land(tmp_path, "2.parquet", x=decimals(new))
        with pytest.raises(SchemaMismatchError, match=r"too many digits|conversion from `decimal"):
            ingest(source, table, mode="append", schema_policy="widen")
        assert (delta.newest_version(table), content(table)) == before
