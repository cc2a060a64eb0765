"""The marks of a table's commits, read at once: as delta-rs tells them one by one."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import polars as pl
import pytest
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from hypothesis import HealthCheck, given, settings, strategies as st

from airflow_mlops.integrations import delta
from airflow_mlops.integrations.delta import history
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step

NAMES = [f"file={letter}" for letter in "abcdefgh"]
COMMIT = st.dictionaries(st.sampled_from(NAMES), st.integers(0, 9), max_size=3)


def one_by_one(table: DeltaTable) -> dict[str, int]:
    told = {name: table.transaction_version(name) for name in NAMES}
    return {name: number for name, number in told.items() if number is not None}


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(steps=st.lists(st.one_of(COMMIT, st.sampled_from(["checkpoint", "restore"])), max_size=8))
def test_they_are_those_that_delta_tells(steps: list[dict[str, int] | str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        uri = f"{folder}/table"
        pl.DataFrame({"x": [0]}).write_delta(uri)
        for step in steps:
            table = DeltaTable(uri)
            if step == "checkpoint":
                table.create_checkpoint()
            elif step == "restore" and table.version() > 0:
                table.restore(0)
            elif isinstance(step, dict):
                marks = CommitProperties(app_transactions=[Transaction(*mark) for mark in step.items()])
                write_deltalake(
                    table, pl.DataFrame({"x": [1]}).to_arrow(), mode="append", commit_properties=marks
                )
        table = DeltaTable(uri)
        known = one_by_one(table)
        assert history._all_marks(uri, table) == known
        assert history._logged_marks(uri, table, NAMES) == known
        middle = DeltaTable(uri, version=table.version() // 2)  # the last checkpoint may be newer
        assert history._logged_marks(uri, middle, NAMES) == one_by_one(middle)


def test_a_log_that_begins_with_a_checkpoint_nobody_points_to(tmp_path: Path) -> None:
    uri = str(tmp_path / "table")
    for number, name in enumerate(NAMES):
        marks = CommitProperties(app_transactions=[Transaction(name, number)])
        write_deltalake(uri, pl.DataFrame({"x": [1]}).to_arrow(), mode="append", commit_properties=marks)
    table = DeltaTable(uri)
    table.create_checkpoint()
    log = tmp_path / "table" / "_delta_log"
    (log / "_last_checkpoint").unlink()
    for commit in log.glob("*.json"):
        commit.unlink()
    with pytest.raises(FileNotFoundError):
        history._all_marks(uri, table)
    assert history._logged_marks(uri, DeltaTable(uri), NAMES) == dict(zip(NAMES, range(8), strict=True))


def test_the_log_is_read_once_for_many_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    ask = DeltaTable.transaction_version
    monkeypatch.setattr(
        DeltaTable, "transaction_version", lambda table, name: asked.append(name) or ask(table, name)
    )
    (tmp_path / "landing").mkdir()
    spec = {
        "source": str(tmp_path / "landing" / "*.jsonl"),
        "table": str(tmp_path / "table"),
        "mode": "append",
    }
    for numbers in (range(30), range(30, 31)):
        for number in numbers:
            (tmp_path / "landing" / f"{number}.jsonl").write_text(json.dumps({"x": number}))
        run_step("ingest", spec, Services())
    assert sorted(delta.read_table(spec["table"]).collect()["x"]) == list(range(31))
    assert not [name for name in asked if "jsonl" in name]
