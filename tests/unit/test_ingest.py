"""Ingest and the tables it writes: races, windows, times, and a disk that refuses."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.data.batches import BATCH_ROWS
from airflow_mlops.core.data.dataset import count_rows
from airflow_mlops.core.data.digest import RowDigest
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    CommitConflictError,
    DatasetNotFoundError,
    InsufficientDataError,
    MLOpsError,
    SchemaMismatchError,
    StorageError,
)
from airflow_mlops.integrations import delta
from airflow_mlops.operators.ingest import IngestDatasetOperator
from airflow_mlops.operators.validate import ValidateDatasetOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from tests.conftest import REPOSITORY
from tests.disks import immutable

JANUARY, FEBRUARY = Window.parse("2024-01-01", "2024-02-01"), Window.parse("2024-02-01", "2024-03-01")

SUITE = {
    "name": "s",
    "expectations": [{"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "x"}}],
}


def rows(window: Window, count: int = 20_000) -> pl.DataFrame:
    times = pl.Series("t", [window.start] * count, dtype=pl.Datetime("us", "UTC"))
    return pl.DataFrame({"t": times, "x": [float(window.start.month)] * count})


def land(folder: Path, name: str = "rows.parquet", **columns: list) -> str:
    """Write a source file."""
    pl.DataFrame(columns).write_parquet(folder / name)
    return str(folder / name)


def race(table: str, *windows: Window) -> list[int | MLOpsError]:
    """Write all windows at the same moment; what each gave, a version or an error."""
    together = threading.Barrier(len(windows))
    outcomes: list[int | MLOpsError] = []

    def write(window: Window) -> None:
        together.wait(timeout=30)
        try:
            outcomes.append(delta.replace_window(table, rows(window), time_column="t", window=window))
        except MLOpsError as err:
            outcomes.append(err)

    threads = [threading.Thread(target=write, args=(window,)) for window in windows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(outcomes) == len(windows)
    return outcomes


class TestRaces:
    def test_two_first_windows_are_both_kept(self, tmp_path: Path) -> None:
        for attempt in range(20):
            table = str(tmp_path / f"table{attempt}")
            outcomes = race(table, JANUARY, FEBRUARY)
            versions = [outcome for outcome in outcomes if isinstance(outcome, int)]
            lost = [outcome for outcome in outcomes if not isinstance(outcome, int)]
            assert all(isinstance(error, CommitConflictError) for error in lost)
            assert len(set(versions)) == len(versions)  # each names its own commit
            assert pl.read_delta(table)["x"].n_unique() == len(versions) > 0

    def test_the_same_window_twice_is_a_conflict_to_try_again(self, tmp_path: Path) -> None:
        table = str(tmp_path / "table")
        delta.replace_window(table, rows(JANUARY), time_column="t", window=JANUARY)
        outcomes = [outcome for _ in range(10) for outcome in race(table, JANUARY, JANUARY)]
        errors = [outcome for outcome in outcomes if not isinstance(outcome, int)]
        assert errors
        for error in errors:
            assert isinstance(error, CommitConflictError)
            assert f"another write to {table} came first" in str(error)
            assert "run the task again" in str(error)
        decision = MLOPS_RETRY_POLICY.evaluate(errors[0], 1, 3)
        assert (decision.action.name, decision.retry_delay) == ("RETRY", timedelta(seconds=30))
        assert delta.describe(table).row_count == 20_000


class TestAFolderThatDenies:
    @pytest.mark.parametrize("part", ["", "_delta_log"])
    def test_the_table_stays_as_it_was(self, tmp_path: Path, part: str) -> None:
        table = tmp_path / "table"
        delta.replace_window(str(table), rows(JANUARY, 10), time_column="t", window=JANUARY)
        before = delta.describe(str(table))
        with immutable(table / part), pytest.raises(StorageError) as denied:
            delta.replace_window(str(table), rows(FEBRUARY), time_column="t", window=FEBRUARY)
        assert f"could not write {table}" in str(denied.value)
        assert "check free space and write permission" in str(denied.value)
        assert "\x1b" not in str(denied.value)
        assert delta.describe(str(table)) == before

    def test_a_table_that_cannot_be_created(self, tmp_path: Path) -> None:
        with immutable(tmp_path), pytest.raises(StorageError, match=r"could not write .*check free space"):
            delta.replace_window(str(tmp_path / "new"), rows(JANUARY, 10), time_column="t", window=JANUARY)
        assert not delta.table_exists(str(tmp_path / "new"))


class TestWindows:
    def test_a_window_without_a_time_column_is_refused(self, tmp_path: Path) -> None:
        table = str(tmp_path / "table")
        source = land(tmp_path, t=[datetime(2024, 1, 2)], x=[1.0])
        window = {"window_start": "2024-01-01", "window_end": "2024-02-01"}
        ingest = IngestDatasetOperator(task_id="ingest", source=source, table=table, **window)
        validate = ValidateDatasetOperator(
            task_id="validate", dataset=table, suite=SUITE, report="never", **window
        )
        with pytest.raises(ValueError, match=r"needs time_column.*give no window to replace the whole table"):
            run_step("ingest", ingest.build_spec({}), Services())
        assert not delta.table_exists(table)
        with pytest.raises(ValueError, match=r"needs time_column.*give no window to judge the whole dataset"):
            run_step("validate", validate.build_spec({}), Services())

    def test_the_runs_own_window_is_left_aside_without_one(self) -> None:
        ingest = IngestDatasetOperator(task_id="ingest", source="a.csv", table="t")
        validate = ValidateDatasetOperator(task_id="validate", dataset="t", suite=SUITE, report="never")
        for task in (ingest, validate):
            task.window_start, task.window_end = "2024-01-01", "2024-02-01"  # as Airflow renders the defaults
            assert task.build_spec({})["window"] is None

    def test_an_empty_window(self, tmp_path: Path) -> None:
        source = land(tmp_path, t=[datetime(2024, 1, 2)], x=[1.0])
        spec = {"source": source, "table": str(tmp_path / "table"), "time_column": "t"}
        with pytest.raises(InsufficientDataError, match=r"has no rows in window \[2024-02-01, 2024-03-01\)"):
            run_step("ingest", spec | {"window": to_dict(FEBRUARY)}, Services())
        assert not delta.table_exists(spec["table"])
        run_step("ingest", spec | {"window": to_dict(JANUARY)}, Services())
        judged = {"dataset": spec["table"], "suite": SUITE, "time_column": "t", "window": to_dict(FEBRUARY)}
        with pytest.raises(
            InsufficientDataError, match=r"window \[2024-02-01, 2024-03-01\) of .* has no rows"
        ):
            run_step("validate", judged, Services())


def test_a_table_of_thousands_of_columns(tmp_path: Path) -> None:
    source = land(tmp_path, **{f"measurement_of_sensor_{number}": [1.0] for number in range(3_000)})
    result = run_step("ingest", {"source": source, "table": str(tmp_path / "table")}, Services())
    assert len(result["dataset"]["columns"]) == 3_000
    again = run_step("ingest", {"source": source, "table": str(tmp_path / "table")}, Services())
    assert again["dataset"]["dataset_digest"] == result["dataset"]["dataset_digest"]


class TestSources:
    """What is wrong with the files is said in the words of the declaration, and nothing is written."""

    def refuse(self, folder: Path, source: str, **spec: object) -> SchemaMismatchError:
        table = str(folder / "table")
        with pytest.raises(SchemaMismatchError) as refused:
            run_step("ingest", {"source": source, "table": table, "time_column": "t"} | spec, Services())
        assert source in str(refused.value)
        assert not delta.table_exists(table)
        return refused.value

    def test_a_text_that_is_no_time(self, tmp_path: Path) -> None:
        (tmp_path / "rows.csv").write_text("t,x\n2024-01-02,1\nyesterday,2\n")
        error = self.refuse(tmp_path, str(tmp_path / "rows.csv"))
        assert "column 't'" in str(error)
        assert "yesterday" in str(error)

    @pytest.mark.parametrize("text", ["01/02/2024", "2024-01-02T25:00", "2024", ""])
    def test_a_time_of_which_the_month_would_be_a_guess(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "rows.jsonl").write_text(f'{{"t": "2024-01-02"}}\n{{"t": "{text}"}}\n')
        error = self.refuse(tmp_path, str(tmp_path / "rows.jsonl"))
        assert f"time column 't' holds {text!r}, which is no ISO 8601 time" in str(error)

    def test_files_that_differ(self, tmp_path: Path) -> None:
        land(tmp_path, "a.parquet", t=[datetime(2024, 1, 2)], x=[1.0])
        land(tmp_path, "b.parquet", t=[datetime(2024, 1, 2)], y=[1.0])
        assert "b.parquet" in str(self.refuse(tmp_path, str(tmp_path / "*.parquet")))

    def test_a_file_that_is_broken(self, tmp_path: Path) -> None:
        land(tmp_path, "a.parquet", t=[datetime(2024, 1, 2)], x=[1.0])
        (tmp_path / "b.parquet").write_bytes(b"garbage")
        assert "b.parquet" in str(self.refuse(tmp_path, str(tmp_path / "*.parquet")))

    def test_a_file_that_is_no_such_file_is_named_and_there(self, tmp_path: Path) -> None:
        for name in ("a.parquet", "b.parquet"):
            (tmp_path / name).write_bytes(b"")
        pl.DataFrame({"x": [1]}).write_parquet(tmp_path / "a.parquet")
        for source in ("b.parquet", "[b].parquet"):
            with pytest.raises(DatasetNotFoundError, match=r"b\.parquet is there and can't be read: "):
                run_step("ingest", {"source": str(tmp_path / source), "table": "t"}, Services())

    def test_json_lines_as_windows_begins_them(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
        (tmp_path / "b.jsonl").write_text('{"x": 1}\n', encoding="utf-8-sig")
        with pytest.raises(
            SchemaMismatchError, match=r"b\.jsonl begins with a byte order mark, .* write it without"
        ):
            run_step("ingest", {"source": str(tmp_path / "*.jsonl"), "table": "t"}, Services())

    @pytest.mark.parametrize(
        ("line", "told"),
        [
            ('{"x": 1', r"it is no JSON from character 8 on"),
            ('{"x": NaN}', "NaN is no JSON"),
            ('[{"x": 1}]', "it is JSON, and no object"),
            ('{"x": "\xff"}', "its text is not UTF-8"),
        ],
    )
    def test_a_line_that_is_no_json_object_is_named(self, tmp_path: Path, line: str, told: str) -> None:
        (tmp_path / "a.jsonl").write_text('{"x": 1}\n')
        rows = '{"x": 1}\n' * 500 + "\n" + line + '\n{"x": 1}\n'
        (tmp_path / "b.jsonl").write_bytes(rows.encode("latin-1"))
        with pytest.raises(
            SchemaMismatchError, match=rf"b\.jsonl, line 502: {told}.* one object in each line"
        ):
            run_step("ingest", {"source": str(tmp_path / "*.jsonl"), "table": "t"}, Services())

    @pytest.mark.parametrize("separator", [",", ";"])
    @pytest.mark.parametrize("known", [False, True])
    def test_a_line_with_too_many_values_is_named(self, tmp_path: Path, separator: str, known: bool) -> None:
        def ask(rows: int, last: str) -> None:
            lines = ["x,y", '"1\n",2', *["1,2"] * rows, last, "1,2"]
            text = "\n".join(line.replace(",", separator) for line in lines)
            (tmp_path / "rows.csv").write_text(text)
            asked = {"source": str(tmp_path / "rows.csv"), "table": str(tmp_path / "t")}
            run_step("ingest", asked | {"csv_separator": separator}, Services())

        if known:  # its types are taken, and no row is looked at before they are read
            ask(0, "1,2")
        with pytest.raises(
            SchemaMismatchError,
            match=rf"rows\.csv, line 504: 3 values where there are 2 .* '{separator}' part",
        ):
            ask(500, "1,2,3")

    def test_a_quote_that_is_never_closed(self, tmp_path: Path) -> None:
        (tmp_path / "rows.csv").write_text('\n\nx,y\n1,2\n1,"2\n1,2\n')
        with pytest.raises(DatasetNotFoundError, match="can't be read: could not parse"):
            run_step("ingest", {"source": str(tmp_path / "rows.csv"), "table": "t"}, Services())

    def test_a_file_without_a_line(self, tmp_path: Path) -> None:
        for name in ("rows.csv", "rows.jsonl"):
            (tmp_path / name).write_text("")
            with pytest.raises(InsufficientDataError, match=rf"{name} has no rows, and no line that names"):
                run_step("ingest", {"source": str(tmp_path / name), "table": "t"}, Services())

    @pytest.mark.parametrize("header", ["x,t", "t,y", "t,x,z", "t"])
    def test_csv_files_with_other_columns(self, tmp_path: Path, header: str) -> None:
        (tmp_path / "a.csv").write_text("t,x\n2024-01-02,1\n")
        (tmp_path / "b.csv").write_text(header + "\n" + ",".join("2" * len(header.split(","))) + "\n")
        error = self.refuse(tmp_path, str(tmp_path / "*.csv"))
        assert f"has columns t, x, and {tmp_path / 'b.csv'} has {header.replace(',', ', ')}" in str(error)

    def test_json_lines_whose_types_do_not_go_together(self, tmp_path: Path) -> None:
        (tmp_path / "a.jsonl").write_text('{"t": "2024-01-02", "x": 1}\n')
        (tmp_path / "b.jsonl").write_text('{"t": "2024-01-02", "x": "one"}\n')
        error = self.refuse(tmp_path, str(tmp_path / "*.jsonl"))
        assert f"'x' is Int64 in {tmp_path / 'a.jsonl'} and String in {tmp_path / 'b.jsonl'}" in str(error)

    @pytest.mark.parametrize("window", [None, to_dict(JANUARY)])
    def test_a_row_without_a_time_is_counted_not_dropped(self, tmp_path: Path, window: object) -> None:
        source = land(tmp_path, t=[None, datetime(2024, 1, 2), None], x=[1.0, 2.0, 3.0])
        assert "time column 't' has 2 nulls" in str(self.refuse(tmp_path, source, window=window))

    def test_a_batch_without_any_time(self, tmp_path: Path) -> None:
        times = [None] * (2 * BATCH_ROWS) + [datetime(2024, 1, 2)]
        source = land(tmp_path, t=times, x=[0] * len(times))
        assert f"time column 't' has {2 * BATCH_ROWS} nulls" in str(self.refuse(tmp_path, source))


def test_times_are_read_however_iso_writes_them(tmp_path: Path) -> None:
    texts = ["2024-01-02", "2024-01-02T03:00", "2024-01-02 04:00:00.5Z", "2024-01-02T06:00:00+01:00"]
    (tmp_path / "rows.csv").write_text("t\n" + "\n".join(texts))
    spec = {"source": str(tmp_path / "rows.csv"), "table": str(tmp_path / "table"), "time_column": "t"}
    run_step("ingest", spec, Services())
    times = sorted(delta.read_table(str(tmp_path / "table")).collect()["t"])
    assert [time.isoformat(timespec="milliseconds")[11:23] for time in times] == [
        "00:00:00.000",
        "03:00:00.000",
        "04:00:00.500",
        "05:00:00.000",
    ]


def test_a_large_first_ingest_that_is_refused_leaves_no_thread_behind(tmp_path: Path) -> None:
    pl.select(pl.zeros(20 * BATCH_ROWS, pl.Int64).alias("id")).write_parquet(tmp_path / "a.parquet")
    spec = {"source": str(tmp_path / "a.parquet"), "table": str(tmp_path / "table"), "id_column": "id"}
    before = threading.active_count()
    with pytest.raises(SchemaMismatchError, match="id column") as caught:
        run_step("ingest", spec, Services())
    assert threading.active_count() == before, caught
    assert not (tmp_path / "table").exists()


class TestTextOfFiles:
    """What stands in a file as text is read as the table has it, and as all rows have it where there is no table."""

    def ingest(self, folder: Path, name: str, text: str) -> dict[Any, Any]:
        """Append a file; give column ``x`` of the table by its ``y``."""
        (folder / name).write_text(text)
        table = str(folder / "table")
        run_step("ingest", {"source": str(folder / name), "table": table, "mode": "append"}, Services())
        return dict(delta.read_table(table).select("y", "x").collect().rows())

    @pytest.mark.parametrize(
        ("texts", "column"),
        [
            (["1"] * 200 + ["2.5"], [1.0] * 200 + [2.5]),
            (["1"] * 200 + ["A7"], ["1"] * 200 + ["A7"]),
            (["true"] * 200 + ["maybe"], ["true"] * 200 + ["maybe"]),
            (["0.5"] * 200 + [""], [0.5] * 200 + [None]),
            ([""] * 150 + ["2.5", "1"], [None] * 150 + [2.5, 1.0]),
            ([""] * 150, [None] * 150),
            (["True"] * 150 + ["FALSE", "false"], [True] * 150 + [False, False]),
            (["1"] * 150 + ["18446744073709551615"], ["1"] * 150 + ["18446744073709551615"]),
            *[
                (["1"] * place + ["5.5"] + ["1"] * 6_000, [1.0] * place + [5.5] + [1.0] * 6_000)
                for place in (110, 1_000)
            ],
        ],
    )
    def test_a_new_table_has_the_type_of_all_rows(
        self, tmp_path: Path, texts: list[str], column: list[Any]
    ) -> None:
        lines = [f"{number},{text}" for number, text in enumerate(texts)]
        found = self.ingest(tmp_path, "a.csv", "\n".join(["y,x", *lines, ""]))
        assert found == dict(enumerate(column))

    def test_blank_lines_are_no_rows(self, tmp_path: Path) -> None:
        assert self.ingest(tmp_path, "a.csv", "y,x\n1,2\n\n3,\n\n\n") == {1: 2, 3: None}

    def test_a_name_that_comes_twice(self, tmp_path: Path) -> None:
        with pytest.raises(SchemaMismatchError, match="two columns named x: rename one"):
            self.ingest(tmp_path, "a.csv", "y,x,x\n1,2,3\n")

    def test_a_file_without_rows_says_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "a.csv").write_text("y,x\n")
        (tmp_path / "b.csv").write_text("y,x\nb,5\n")
        spec = {"source": str(tmp_path / "*.csv"), "table": str(tmp_path / "table")}
        assert run_step("ingest", spec, Services())["dataset"]["columns"] == {"y": "String", "x": "Int64"}

    @pytest.mark.parametrize(
        ("first", "then", "read"),
        [("1.5", "2", 2.0), ("5", "", None), ("A7", "007", "007"), ("true", "", None)],
    )
    def test_a_table_keeps_its_types(self, tmp_path: Path, first: str, then: str, read: Any) -> None:
        self.ingest(tmp_path, "a.csv", f"y,x\na,{first}\n")
        assert self.ingest(tmp_path, "b.csv", f"y,x\nb,{then}\n")["b"] == read

    @pytest.mark.parametrize("then", ["2.5", "A7"])
    def test_what_is_none_of_its_type_is_refused(self, tmp_path: Path, then: str) -> None:
        self.ingest(tmp_path, "a.csv", "y,x\na,5\n")
        with pytest.raises(SchemaMismatchError, match=r"x is (Float64|String), the table has Int64"):
            self.ingest(tmp_path, "b.csv", f"y,x\nb,{then}\n")

    def test_a_whole_number_of_json_in_a_column_of_floats(self, tmp_path: Path) -> None:
        self.ingest(tmp_path, "a.jsonl", '{"y": "a", "x": 1.5}\n')
        assert self.ingest(tmp_path, "b.jsonl", '{"y": "b", "x": 2}\n') == {"a": 1.5, "b": 2.0}


def test_every_key_of_json_lines_is_seen(tmp_path: Path) -> None:
    """Wherever it comes first: in a late line, or in another file than the first."""
    table = str(tmp_path / "table")
    (tmp_path / "a.jsonl").write_text("")
    (tmp_path / "b.jsonl").write_text('{"x": 1}\n' * 2000 + '{"x": 1.5, "late": true}\n')
    (tmp_path / "c.jsonl").write_text('{"x": 2, "renamed": "r"}\n')
    run_step("ingest", {"source": str(tmp_path / "*.jsonl"), "table": table}, Services())
    rows = delta.read_table(table).collect()
    assert rows.height == 2002
    assert rows.select(pl.col("x").sum(), pl.col("late", "renamed").drop_nulls()).row(0) == (
        2003.5,
        True,
        "r",
    )
    (tmp_path / "d.jsonl").write_text('{"x": 2, "renamed": "r", "late": false, "more": 1}\n')
    with pytest.raises(SchemaMismatchError, match=r"more is new .*add_columns"):
        run_step("ingest", {"source": str(tmp_path / "*.jsonl"), "table": table}, Services())


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize("mode", ["replace", "append"])
def test_files_are_taken_by_their_names(tmp_path: Path, mode: str, kind: str) -> None:
    """A name is no pattern, and hidden files, which others are still writing, are none of the source's."""
    for number, name in enumerate(["a1", "a[1]", "a*", ".a2"]):
        rows = pl.DataFrame({"x": [number]})
        write = {"parquet": rows.write_parquet, "csv": rows.write_csv, "jsonl": rows.write_ndjson}[kind]
        write(tmp_path / f"{name}.{kind}")
    table = str(tmp_path / "table")
    run_step("ingest", {"source": str(tmp_path / f"*.{kind}"), "table": table, "mode": mode}, Services())
    assert sorted(delta.read_table(table).collect()["x"]) == [0, 1, 2]


def test_a_file_that_is_written_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, table = land(tmp_path, x=[1, 2]), str(tmp_path / "table")
    run_step("ingest", {"source": source, "table": table}, Services())
    write = delta.TableWriter.replace

    def written_meanwhile(*arguments: Any, **options: Any) -> int:
        pl.DataFrame({"x": [3]}).write_parquet(tmp_path / "new")
        (tmp_path / "new").replace(source)
        return write(*arguments, **options)

    land(tmp_path, x=list(range(20 * BATCH_ROWS)))  # more than is read ahead of the write
    monkeypatch.setattr(delta.TableWriter, "replace", written_meanwhile)
    with pytest.raises(CommitConflictError, match=r"rows\.parquet changed while it was read"):
        run_step("ingest", {"source": source, "table": table}, Services())
    assert sorted(delta.read_table(table).collect()["x"]) == [1, 2]


def test_a_digest_is_that_of_the_table_read_at_once(tmp_path: Path) -> None:
    count = 3 * BATCH_ROWS
    columns = {
        "whole": range(count),
        "number": [row / 7 for row in range(count)],
        "flag": [row % 3 == 0 for row in range(count)],
        "text": [f"ü{row % 97}" for row in range(count)],
        "day": [datetime(2024, 1, 1) + timedelta(days=row % 31) for row in range(count)],
    }
    table = str(tmp_path / "table")
    for null in (None, 2 * BATCH_ROWS):  # in one batch of several
        frame = pl.DataFrame(columns)
        if null is not None:
            frame = frame.with_columns(pl.when(pl.int_range(pl.len()) != null).then(pl.all()))
        delta.replace_window(table, frame, time_column=None, window=None)
        read = delta.read_table(table).collect()
        digest = RowDigest({name: str(dtype) for name, dtype in read.schema.items()})
        digest.update(read)
        described = delta.describe(table, time_column="day")
        assert described.dataset_digest == digest.hexdigest()
        last = columns["day"][30].replace(tzinfo=UTC)
        assert (described.row_count, described.time_max) == (count, last)


@pytest.mark.parametrize("folder", ["my data", "größe", "100%"])
def test_a_folder_may_be_called_as_people_call_them(tmp_path: Path, folder: str) -> None:
    source = land(tmp_path, t=[datetime(2024, 1, 2)], x=[1.0])
    spec = {
        "source": source,
        "table": str(tmp_path / folder / "trips"),
        "time_column": "t",
        "window": to_dict(JANUARY),
    }
    run_step("ingest", spec, Services())
    dataset = run_step("ingest", spec, Services())["dataset"]
    assert dataset["row_count"] == 1
    table = delta.read_table(dataset["uri"], columns=["x"], window=JANUARY, time_column="t")
    assert table.collect()["x"].to_list() == [1.0]


def test_reference_dags_write_their_tables_one_run_at_a_time() -> None:
    from airflow.dag_processing.dagbag import DagBag

    dags = DagBag(str(REPOSITORY / "dags")).dags
    assert len(dags) >= 5
    assert [dag_id for dag_id, dag in dags.items() if dag.max_active_runs != 1] == []


def test_rows_are_counted_where_a_path_has_a_blank(tmp_path: Path) -> None:
    uri = str(tmp_path / "my data" / "table")
    delta.replace_window(uri, pl.DataFrame({"x": [1, 2, 3]}), time_column=None, window=None)
    assert count_rows(delta.read_table(uri)) == 3
    assert delta.describe(uri).row_count == delta.describe_files(uri).row_count == 3
