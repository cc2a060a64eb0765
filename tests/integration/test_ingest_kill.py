"""Ingest killed at each of its writes, by the kernel: the table has the rows once after the retry, and was whole before it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from airflow_mlops.integrations import delta
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step

STRACE = shutil.which("strace") or ""

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not STRACE, reason="strace kills at a system call; install it to run these"),
]

OLD, NEW = {"x": [1, 2], "y": ["a", "b"]}, {"x": [2, 3], "y": ["B", "C"]}
#: What a commit does, and whether its rows are there when it is killed as it does it.
COMMIT = {
    "rename": False,  # the data file is written and gets its name
    "linkat": False,  # the entry of the log is written and gets its name, which is the commit
    "unlink": True,  # the entry's first name goes
}
#: What goes before in the first commit to a table: its folders appear.
FIRST = ("mkdir", "linkat", "rename")


#: The step; where temporary folders are is told, as Python would find out by making and unlinking a file.
_STEP = "import runpy, sys, tempfile; tempfile.tempdir = sys.argv.pop(1); runpy.run_module('airflow_mlops.steps', run_name='__main__')"


def killed_at(call: str, spec: dict[str, Any], folder: Path) -> None:
    """Run the step in a process of its own, which the kernel kills when it first makes the call on the table."""
    path, log = folder / "spec.json", folder / "calls"
    path.write_text(json.dumps(spec))
    command = [sys.executable, "-c", _STEP, str(folder), "ingest", "--spec", str(path)]
    done = subprocess.run(
        [STRACE, "-f", "-qq", "-o", log, "-e", f"trace={call}", "-e", f"inject={call}:signal=KILL:when=1", *command],
        # Without byte code no other file is written than those of the table.
        capture_output=True, text=True, timeout=120, check=False, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    killed = next(line for line in log.read_text().splitlines() if f"{call}(" in line)
    assert spec["table"] in killed


def content(table: str) -> dict[str, list[Any]] | None:
    if not delta.table_exists(table):
        return None
    return delta.read_table(table).collect().sort("x", "y").to_dict(as_series=False)


@pytest.mark.parametrize(
    ("mode", "call", "after"),
    [
        (mode, call, after)
        for mode, after in {
            "replace": NEW,
            "append": {"x": [1, 2, 2, 3], "y": ["a", "B", "b", "C"]},
            "upsert": {"x": [1, 2, 3], "y": ["a", "B", "C"]},
            "incremental": {"x": [1, 2, 3], "y": ["a", "b", "C"]},
        }.items()
        for call in COMMIT
    ],
)
def test_killed_in_a_commit(tmp_path: Path, mode: str, call: str, after: dict[str, list[Any]]) -> None:
    pl.DataFrame(OLD).write_parquet(tmp_path / "old.parquet")
    pl.DataFrame(NEW).write_parquet(tmp_path / "new.parquet")
    table = str(tmp_path / "table")
    how = {"mode": mode, "keys": ["x"], "watermark_column": "x", "table": table}
    run_step("ingest", how | {"source": str(tmp_path / "old.parquet")}, Services())
    new = how | {"source": str(tmp_path / "new.parquet")}
    killed_at(call, new, tmp_path)
    assert content(table) == (after if COMMIT[call] else OLD)
    run_step("ingest", new, Services())
    assert content(table) == after


@pytest.mark.parametrize("call", COMMIT)
@pytest.mark.parametrize("how", ["column", "time"])
def test_killed_as_it_replaces_a_partition(tmp_path: Path, how: str, call: str) -> None:
    days = [datetime(2024, 3, day, tzinfo=UTC) for day in (1, 2)]
    source, table = tmp_path / "a.parquet", str(tmp_path / "table")
    place: dict[str, Any] = {"partition": {"column": "y", "key": "b"}}
    if how == "time":
        place = {"time_column": "at", "window": {"start": "2024-03-02", "end": "2024-03-03"}}
    pl.DataFrame({"x": [1, 2], "y": ["a", "b"], "at": days}).write_parquet(source)
    common = {"source": str(source), "table": table}
    run_step("ingest", common, Services())
    run_step("ingest", common | place, Services())
    pl.DataFrame({"x": [10, 20], "y": ["a", "b"], "at": days}).write_parquet(source)
    killed_at(call, common | place, tmp_path)
    after, before = {"x": [1, 20], "y": ["a", "b"], "at": days}, {"x": [1, 2], "y": ["a", "b"], "at": days}
    assert content(table) == (after if COMMIT[call] else before)
    run_step("ingest", common | place, Services())
    assert content(table) == after


@pytest.mark.parametrize("call", FIRST)
def test_killed_in_the_first_commit(tmp_path: Path, call: str) -> None:
    pl.DataFrame(NEW).write_parquet(tmp_path / "new.parquet")
    table = str(tmp_path / "table")
    new = {"mode": "append", "source": str(tmp_path / "new.parquet"), "table": table}
    killed_at(call, new, tmp_path)
    assert content(table) in (None, {"x": [], "y": []})
    run_step("ingest", new, Services())
    assert content(table) == NEW
