"""Ingest and the tables it writes: races, windows, times, and a disk that refuses."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pytest

from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import CommitConflictError, MLOpsError, StorageError
from airflow_mlops.integrations import delta
from tests.conftest import REPOSITORY

JANUARY, FEBRUARY = Window.parse("2024-01-01", "2024-02-01"), Window.parse("2024-02-01", "2024-03-01")


def rows(window: Window, count: int = 20_000) -> pl.DataFrame:
    times = pl.Series("t", [window.start] * count, dtype=pl.Datetime("us", "UTC"))
    return pl.DataFrame({"t": times, "x": [float(window.start.month)] * count})


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


@contextmanager
def immutable(path: Path) -> Iterator[None]:
    """Deny writing to a folder even to root, who is above permissions."""
    chattr = shutil.which("chattr")
    if chattr is None or subprocess.run([chattr, "+i", str(path)], capture_output=True).returncode != 0:
        pytest.skip("denying a folder needs chattr, the right to use it, and a file system that knows it")
    try:
        yield
    finally:
        subprocess.run([chattr, "-i", str(path)], check=True)


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


def test_reference_dags_write_their_tables_one_run_at_a_time() -> None:
    from airflow.dag_processing.dagbag import DagBag

    dags = DagBag(str(REPOSITORY / "dags")).dags
    assert len(dags) >= 5
    assert [dag_id for dag_id, dag in dags.items() if dag.max_active_runs != 1] == []
