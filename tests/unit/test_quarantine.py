"""What a failing validation does: gate, warn, set rows aside; once, also when it is killed in between."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from airflow.sdk import Asset
from deltalake import write_deltalake

from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    DataQualityError,
    InsufficientDataError,
    SchemaMismatchError,
    StaleDatasetError,
)
from airflow_mlops.integrations import delta
from airflow_mlops.ledger import EntryKind, Ledger
from airflow_mlops.operators.validate import ValidateDatasetOperator
from airflow_mlops.policies import MLOPS_RETRY_POLICY
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.validation.quarantine import let_in_again
from tests.conftest import REPOSITORY
from tests.delta_logs import forget_commits

JANUARY, FEBRUARY = Window.parse("2024-01-01", "2024-02-01"), Window.parse("2024-02-01", "2024-03-01")
ROWS = 1000


def month(window: Window, bad: int = 0, **columns: Any) -> pl.DataFrame:
    """Rows with fares from 1 on; the first ``bad`` fares are negative, and one of these rows has no passengers."""
    times = [window.start + timedelta(minutes=index) for index in range(ROWS)]
    made = {
        "t": pl.Series(times, dtype=pl.Datetime("us", "UTC")),
        "id": [f"{window.start:%m}-{index}" for index in range(ROWS)],
        "fare": [-1.0 * index if index < bad else 1.0 + index % 7 for index in range(1, ROWS + 1)],
        "people": [None if index == 0 and bad else 1 for index in range(ROWS)],
    }
    return pl.DataFrame(made | columns)


FARE = {"type": "expect_column_values_to_be_between", "kwargs": {"column": "fare", "min_value": 0}}
PEOPLE = {"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "people"}}
FEW = {"type": "expect_table_row_count_to_be_between", "kwargs": {"min_value": 1, "max_value": 10}}
UNIQUE = {"type": "expect_column_values_to_be_unique", "kwargs": {"column": "people"}}
TYPE = {"type": "expect_column_values_to_be_of_type", "kwargs": {"column": "fare", "type_": "int64"}}


def suite(*expectations: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"name": "trips", "expectations": [item | more for item in expectations]}


@pytest.fixture
def table(tmp_path: Path) -> str:
    """January with 6 bad rows of 1000, February with none."""
    uri = str(tmp_path / "trips")
    delta.replace_window(uri, month(JANUARY, bad=7), time_column="t", window=JANUARY)
    delta.replace_window(uri, month(FEBRUARY), time_column="t", window=FEBRUARY)
    return uri


def spec(table: str, judged: dict[str, Any], *, budget: float | None = 0.01, **more: Any) -> dict[str, Any]:
    place = {"table": f"{table}_quarantine", "budget": budget} if budget is not None else None
    return {
        "dataset": to_dict(delta.describe(table, time_column="t")),
        "suite": judged,
        "time_column": "t",
        "window": to_dict(JANUARY),
        "id_column": "id",
        "quarantine": place,
    } | more


def validate(table: str, *expectations: dict[str, Any], **more: Any) -> dict[str, Any]:
    return run_step("validate", spec(table, suite(*expectations), **more), Services())


def read(table: str, version: int | None = None) -> pl.DataFrame:
    return delta.read_table(table, version=version).collect()


def content(table: str) -> list[tuple[Any, ...]]:
    return read(table).sort("t").rows()


class TestQuarantine:
    def test_bad_rows_go_aside_and_the_rest_goes_on(self, table: str) -> None:
        before = delta.describe(table)
        result = validate(table, FARE, PEOPLE)
        assert result["success"]
        assert (result["failed"], result["failed_critical"], result["quarantined"]) == (2, 2, 6)
        assert result["headline"].endswith(
            f"6 of 1000 rows (0.600%) are in {table}_quarantine, the rest goes on"
        )
        assert result["dataset"]["version"] == before.version + 1
        assert result["dataset"]["row_count"] == 2 * ROWS - 6
        aside = read(f"{table}_quarantine").sort("t")
        assert aside["id"].to_list() == [f"01-{index}" for index in range(6)]
        assert aside["quarantine_version"].unique().to_list() == [before.version]
        fare = "expect_column_values_to_be_between(fare, min_value=0)"
        people = "expect_column_values_to_not_be_null(people)"
        assert aside["quarantine_reasons"].to_list() == [f"{fare}; {people}"] + [fare] * 5
        kept = read(table)
        assert not set(kept["id"]) & set(aside["id"])
        together = pl.concat([kept, aside.select(kept.columns)]).sort("t")
        assert together.equals(read(table, before.version).sort("t"))
        again = run_step(
            "validate",
            spec(table, suite(FARE, PEOPLE)) | {"dataset": result["dataset"]},
            Services(),
        )
        assert (again["failed"], again["quarantine"]) == (0, None)
        assert again["dataset"] == result["dataset"]

    @pytest.mark.parametrize(
        ("expectations", "budget", "said"),
        [
            ([FARE], 0.005, r"6 of 1000 rows \(0.600%\) break a critical one, the quarantine's budget is 0.500%"),
            ([FARE, FEW], 0.1, r"quarantine can't help: expect_table_row_count_to_be_between"),
            ([FARE, UNIQUE], 0.1, r"quarantine can't help: expect_column_values_to_be_unique\(people\)"),
            ([FARE, TYPE], 0.1, r"is not about single rows, or no id_column tells which rows Great Expectations means"),
            ([FARE, {"type": "expect_table_row_count_to_equal", "kwargs": {"value": ROWS}}], 0.1,
             r"without the 6 rows that break a critical one, expect_table_row_count_to_equal\(value=1000\) still fails"),
        ],
    )  # fmt: skip
    def test_where_it_does_not_help_nothing_is_written(
        self, table: str, expectations: list[dict[str, Any]], budget: float, said: str
    ) -> None:
        before = delta.describe(table)
        result = validate(table, *expectations, budget=budget)
        assert not result["success"]
        assert re.search(said, result["headline"]), result["headline"]
        assert result["dataset"] == to_dict(delta.describe(table, time_column="t"))
        assert delta.describe(table) == before
        assert not delta.table_exists(f"{table}_quarantine")

    @pytest.mark.parametrize("budget", [0.1, 0.001])
    def test_what_is_asked_of_private_columns_is_told_nowhere(self, table: str, budget: float) -> None:
        ids = [*month(JANUARY)["id"][5:], "Canary"]
        known = {"type": "expect_column_values_to_be_in_set", "kwargs": {"column": "id", "value_set": ids}}
        others = {"type": "comparison", "column": {"name": "id"}, "operator": "!=", "parameter": "Canary"}
        asked = {"column": "fare", "min_value": 0, "row_condition": others}
        paid = {"type": "expect_column_values_to_be_between", "kwargs": asked}
        result = validate(table, known, paid, PEOPLE, budget=budget, private_columns=["id"])
        assert (result["failed"], result["success"]) == (3, budget == 0.1)
        assert [one["kwargs"] for one in result["failures"]] == [
            {"column": "id"},
            {"column": "fare"},
            {"column": "people"},
        ]
        assert [one["unexpected_count"] for one in result["failures"]] == [5, 6, 1]
        assert "Canary" not in json.dumps(result)
        if result["success"]:
            assert (
                "expect_column_values_to_be_in_set(id); "
                in read(f"{table}_quarantine").sort("t")["quarantine_reasons"][0]
            )
            assert not read(f"{table}_quarantine")["quarantine_reasons"].str.contains("Canary").any()

    def test_bad_rows_that_an_expectation_allows_stay(self, table: str) -> None:
        mostly = {**FARE, "kwargs": {**FARE["kwargs"], "mostly": 0.99}}
        result = validate(table, mostly, {**PEOPLE, "severity": "warning"})
        assert (result["success"], result["failed"], result["quarantined"]) == (True, 1, 0)

    def test_the_whole_table(self, table: str) -> None:
        result = validate(table, FARE, window=None)
        assert (result["quarantined"], result["dataset"]["row_count"]) == (6, 2 * ROWS - 6)

    def test_a_window_that_was_written_again_keeps_its_newer_rows(self, table: str) -> None:
        judged = spec(table, suite(FARE))
        delta.replace_window(table, month(FEBRUARY, bad=2), time_column="t", window=FEBRUARY)  # no matter
        newer = month(JANUARY, bad=3)
        delta.replace_window(table, newer, time_column="t", window=JANUARY)
        with pytest.raises(StaleDatasetError, match=r"was written again after version .* newer rows stay"):
            run_step("validate", judged, Services())
        assert MLOPS_RETRY_POLICY.evaluate(StaleDatasetError("x"), 1, 3).action.name == "FAIL"
        assert read(table).filter(pl.col("t") < JANUARY.end).sort("t").equals(newer)

    def test_another_window_may_be_written_meanwhile(self, table: str) -> None:
        judged = spec(table, suite(FARE))
        delta.replace_window(table, month(FEBRUARY, bad=2), time_column="t", window=FEBRUARY)
        result = run_step("validate", judged, Services())
        assert result["dataset"]["row_count"] == 2 * ROWS - 6

    def test_another_window_may_bring_a_column_and_a_wider_type_meanwhile(
        self, table: str, tmp_path: Path
    ) -> None:
        narrow = month(JANUARY, bad=7).with_columns(people=pl.col("people").cast(pl.Int32))
        delta.replace_window(f"{table}_2", narrow, time_column="t", window=JANUARY)
        judged = spec(f"{table}_2", suite(FARE))
        month(FEBRUARY, tip=[1.0] * ROWS).write_parquet(tmp_path / "february.parquet")
        newer = {
            "source": str(tmp_path / "february.parquet"), "table": f"{table}_2", "time_column": "t",
            "window": to_dict(FEBRUARY), "schema_policy": "widen",
        }  # fmt: skip
        run_step("ingest", newer, Services())
        assert run_step("validate", judged, Services())["quarantined"] == 6
        rows = delta.read_table(f"{table}_2").collect()
        assert (rows.height, rows["tip"].null_count(), rows["people"].dtype) == (
            2 * ROWS - 6,
            ROWS - 6,
            pl.Int64(),
        )

    def test_months_share_a_quarantine(self, table: str) -> None:
        delta.replace_window(table, month(FEBRUARY, bad=4), time_column="t", window=FEBRUARY)
        validate(table, FARE)
        validate(table, FARE, window=to_dict(FEBRUARY))
        assert read(f"{table}_quarantine").height == 6 + 3

    def test_a_quarantine_has_no_quarantine(self, table: str) -> None:
        validate(table, FARE)
        positive = {**FARE, "kwargs": {"column": "fare", "min_value": -3}}
        with pytest.raises(ValueError, match=r"has a column quarantine_reasons, .*is it one\?"):
            validate(f"{table}_quarantine", positive, window=None, budget=0.99)


class TestYearsLater:
    """Delta keeps what commits say about themselves for 30 days, and what they did for ever."""

    def test_rows_stay_in_the_quarantine(self, table: str) -> None:
        validate(table, FARE, window=None)
        first = read(f"{table}_quarantine")
        forget_commits(table)
        more = month(Window.parse("2024-03-01", "2024-04-01"), bad=2)
        write_deltalake(table, more.select(read(table).columns).to_arrow(), mode="append")
        validate(table, FARE, window=None)
        held = read(f"{table}_quarantine")
        assert held.height == first.height + 1
        assert set(first["id"]) < set(held["id"])
        assert not set(held["id"]) & set(read(table)["id"])

    def test_rows_that_are_let_in_again_leave_it(self, table: str) -> None:
        validate(table, FARE)
        forget_commits(table)
        delta.replace_window(table, month(JANUARY, bad=7), time_column="t", window=JANUARY)
        let_in_again(table, JANUARY, time_column="t", table=f"{table}_quarantine")
        assert read(f"{table}_quarantine").height == 0


class TestSchemaOfAQuarantine:
    """It follows the table's."""

    def write(self, uri: str, rows: pl.DataFrame) -> None:
        """Make these rows the table, as an ingest with another schema does."""
        delta.TableWriter(uri).replace(iter([rows]), dict(rows.schema), time_column=None, window=None)

    def test_columns_come_and_go_and_types_widen(self, tmp_path: Path) -> None:
        uri = str(tmp_path / "trips")
        narrow = pl.col("people").cast(pl.Int16)
        self.write(uri, month(JANUARY, bad=3, zone=["a"] * ROWS).with_columns(narrow))
        validate(uri, FARE)
        self.write(uri, month(FEBRUARY, bad=4, tip=[0.5] * ROWS, **{"^tip$": [0.25] * ROWS}))
        february = {"window": to_dict(FEBRUARY)}
        validate(uri, FARE, **february)
        self.write(uri, month(JANUARY, bad=5).with_columns(narrow))  # and is narrower than what was set aside
        validate(uri, FARE)
        aside = read(f"{uri}_quarantine").sort("quarantine_version", "t")
        assert aside.schema["people"] == pl.Int64()
        assert aside["people"].to_list() == [None, 1, None, 1, 1, None, 1, 1, 1]
        assert aside["zone"].to_list() == ["a"] * 2 + [None] * 7
        assert aside["tip"].to_list() == [None] * 2 + [0.5] * 3 + [None] * 4
        assert aside["^tip$"].to_list() == [None] * 2 + [0.25] * 3 + [None] * 4
        assert aside["id"].to_list()[:5] == ["01-0", "01-1", "02-0", "02-1", "02-2"]
        assert aside["quarantine_reasons"].null_count() == 0

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (pl.col("people").cast(pl.String), "people is String, the table has Int64"),
            (pl.lit(1).alias("ID"), "ID is id there, one name to Delta"),
        ],
    )
    def test_what_cannot_be_widened_is_refused(self, table: str, change: pl.Expr, said: str) -> None:
        validate(table, FARE)
        aside = read(f"{table}_quarantine")
        self.write(table, month(JANUARY, bad=7).with_columns(change).drop("id" if "ID" in said else []))
        before = read(table)
        with pytest.raises(SchemaMismatchError, match=rf"{said}.*another table \(quarantine_table=\)"):
            validate(table, FARE, id_column=None)
        assert read(table).equals(before)
        assert read(f"{table}_quarantine").equals(aside)


KILLED = """
import os, signal, sys
from airflow_mlops.integrations import delta
from airflow_mlops.policies import MLOPS_RETRY_POLICY
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
import json

moment, number = sys.argv[2].split()
write, seen = delta.replace_window_streamed, 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def killed(uri, frames, **arguments):
    global seen
    seen += 1
    here = seen == int(number)

    def dying():
        for frame in frames:
            yield frame
            if here and moment == "in":
                die()

    if here and moment == "before":
        die()
    version = write(uri, dying(), **arguments)
    if here and moment == "after":
        die()
    return version

delta.replace_window_streamed = killed
run_step("validate", json.loads(sys.argv[1]), Services())
"""


@pytest.mark.parametrize("moment", ["before 1", "in 1", "after 1", "in 2", "after 2"])
def test_killed_at_a_write_and_tried_again(table: str, moment: str) -> None:
    judged = spec(table, suite(FARE, PEOPLE))
    for attempt in range(
        2
    ):  # the retry may be killed as well; what it finds done it does not do, and so it may live
        done = subprocess.run(
            [sys.executable, "-c", KILLED, json.dumps(judged), moment],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode in (-signal.SIGKILL, 0), done.stderr[-2000:]
        if attempt == 0:
            assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
        whole = {row[1] for row in content(table)}
        aside = f"{table}_quarantine"
        if delta.table_exists(aside):
            whole |= {row[1] for row in content(aside)}
        assert len(whole) == 2 * ROWS  # at no moment is a row in neither
    result = run_step("validate", judged, Services())
    assert (result["success"], result["quarantined"]) == (True, 6)
    assert (result["dataset"]["row_count"], result["dataset"]["version"]) == (2 * ROWS - 6, 3)
    kept, aside = read(table), read(f"{table}_quarantine")
    assert (kept.height, aside.height) == (2 * ROWS - 6, 6)
    assert kept["id"].n_unique() + aside["id"].n_unique() == 2 * ROWS


class TestEvidence:
    def test_rows_are_named_by_their_key(self, table: str) -> None:
        result = validate(table, FARE, PEOPLE, budget=None)
        assert not result["success"]
        fare, people = result["failures"]
        assert fare["row_ids"] == [f"01-{index}" for index in range(6)]
        assert people["row_ids"] == ["01-0"]

    def test_those_that_great_expectations_shows_too(self, table: str) -> None:
        judged = spec(table, suite(FARE), budget=None, engine="great_expectations")
        (failure,) = run_step("validate", judged, Services())["failures"]
        assert failure["row_ids"] == [f"01-{index}" for index in range(6)]

    def test_no_more_than_twenty(self, table: str) -> None:
        all_bad = {
            "type": "expect_column_values_to_be_between",
            "kwargs": {"column": "fare", "max_value": -99},
        }
        (failure,) = validate(table, all_bad, budget=None)["failures"]
        assert (failure["unexpected_count"], len(failure["row_ids"])) == (ROWS, 20)

    def test_an_empty_window(self, table: str) -> None:
        march = to_dict(Window.parse("2024-03-01", "2024-04-01"))
        with pytest.raises(InsufficientDataError, match="has no rows: nothing to validate"):
            validate(table, FARE, window=march)
        result = validate(table, FARE, FEW, window=march, allow_empty=True)
        assert (result["row_count"], result["failed"], result["quarantined"]) == (0, 1, 0)
        assert not result["success"]

    def test_a_severity_nobody_knows(self, table: str) -> None:
        with pytest.raises(ValueError, match=r"has severity 'fatal'; known: critical, warning, info"):
            validate(table, {**FARE, "severity": "fatal"})


class TestOperator:
    """The operator, with a real ledger and the events of an outlet."""

    @pytest.fixture
    def run(self, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        ledger = f"sqlite:///{tmp_path / 'ledger.db'}"
        monkeypatch.setenv(
            "AIRFLOW_CONN_LEDGER_DEFAULT",
            json.dumps({"conn_type": "mlops_ledger", "extra": {"url": ledger}}),
        )
        asset = Asset("trips")

        def run(*expectations: dict[str, Any], **arguments: Any) -> SimpleNamespace:
            extra: dict[str, Any] = {}
            context = {
                "ti": SimpleNamespace(dag_id="d", run_id="r", task_id="validate", try_number=1),
                "outlet_events": {asset: SimpleNamespace(extra=extra)},
            }
            task = ValidateDatasetOperator(
                task_id="validate", dataset=to_dict(delta.describe(table)), suite=suite(*expectations),
                time_column="t", window_start="2024-01-01", window_end="2024-02-01", outlets=[asset], **arguments,
            )  # fmt: skip
            outcome = SimpleNamespace(extra=extra, result=None, error=None, entries=[])
            try:
                outcome.result = task.execute(context)  # type: ignore[arg-type]
            except DataQualityError as err:
                outcome.error = err
            with Ledger.open(ledger) as opened:
                outcome.entries = opened.entries(limit=10)
            return outcome

        return run

    def test_quarantine(self, run: Any, table: str, caplog: pytest.LogCaptureFixture) -> None:
        done = run(FARE, {**PEOPLE, "severity": "warning"}, action="quarantine")
        assert done.result["quarantined"] == 6
        assert {entry.kind for entry in done.entries} == {EntryKind.DATASET, EntryKind.VALIDATION}
        assert done.extra["airflow_mlops"]["dataset"]["version"] == 3
        quality = done.extra["airflow.dataquality.result"]
        assert quality["failed_rules"] == ["expect_column_values_to_be_between(fare, min_value=0)"]
        assert quality["warned_rules"] == ["expect_column_values_to_not_be_null(people)"]
        assert (quality["score"], quality["table"], quality["errored"]) == (0.375, table, 0)

    def test_what_is_not_critical_does_not_gate(self, run: Any) -> None:
        done = run(FARE, PEOPLE, PEOPLE, PEOPLE)
        assert done.error.evidence["failures"][0]["severity"] == "critical"
        for severity in ("warning", "info"):
            done = run({**FARE, "severity": severity})
            assert done.result["success"]
            assert "none of them critical" in done.result["headline"]

    def test_warn(self, run: Any) -> None:
        done = run(FARE, action="warn")
        assert (done.result["success"], done.result["failed_critical"]) == (False, 1)

    def test_beyond_the_budget(self, run: Any) -> None:
        done = run(FARE, action="quarantine", quarantine_budget=0.001)
        assert "the quarantine's budget is 0.100%" in str(done.error)
        assert done.error.evidence["failures"]

    def test_an_action_nobody_knows(self, run: Any) -> None:
        with pytest.raises(ValueError, match="unknown action 'fail'; known: gate, warn, quarantine"):
            run(FARE, action="fail")
        with pytest.raises(ValueError, match="unknown engine 'polars'; known: auto, great_expectations"):
            run(FARE, engine="polars")
        with pytest.raises(ValueError, match=r"quarantine_budget is a share of rows in \[0, 1\), got 5"):
            run(FARE, action="quarantine", quarantine_budget=5)
