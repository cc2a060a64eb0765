"""Inferred suites: they hold on rows like those they come from, break where something happened, and are never overwritten."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from polars.selectors import by_name

from airflow_mlops.core.checks.inference import InferencePolicy, columns_unsaid, infer_expectations
from airflow_mlops.core.checks.validation import judge_compiled
from airflow_mlops.core.checks.verdict import gates
from airflow_mlops.exceptions import InsufficientDataError, StorageError
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.great_expectations import load_suite, validate_frame
from airflow_mlops.operators.infer_expectations import InferExpectationsOperator
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from tests.conftest import REPOSITORY

ROWS = 4000
START = datetime(2024, 1, 1, tzinfo=UTC)


def orders(seed: int) -> pl.DataFrame:
    """Rows of every kind of column, some of them missing or odd."""
    rng = np.random.default_rng(seed)
    chosen = rng.random(ROWS)
    return pl.DataFrame(
        {
            "id": [f"{seed}-{index}" for index in range(ROWS)],
            "serial": np.arange(ROWS) + ROWS * seed + 2**55,
            "amount": np.where(chosen < 0.002, -rng.random(ROWS), rng.lognormal(2, 1, ROWS)),
            "weight": [None if one < 0.1 else math.nan if one < 0.12 else one for one in chosen],
            "items": rng.poisson(2, ROWS).clip(0, 8),
            "status": rng.choice(["new", "paid", "sent", "bäck"], ROWS, p=[0.3, 0.3, 0.39, 0.01]),
            "code": rng.choice([1, 2, 99], ROWS, p=[0.7, 0.299, 0.001]),
            "gone": pl.Series([None] * ROWS, dtype=pl.Float64),
            "rate": np.where(chosen < 0.5, 0.5, math.inf),
            "at": [START + timedelta(minutes=index) for index in range(ROWS)],
            "day": [date(2024, 1, 1)] * ROWS,
            "price": pl.Series([Decimal("1.50")] * ROWS, dtype=pl.Decimal(10, 2)),
            "sent": chosen < 0.5,
        }
    )


SUITE = infer_expectations(orders(0).lazy(), InferencePolicy())


def broken(rows: pl.DataFrame) -> list[tuple[str, str]]:
    results = judge_compiled(rows.lazy(), SUITE)
    left = {item["kwargs"]["column"] for item, one in zip(SUITE, results, strict=True) if one is None}
    assert left == {"price", "sent"}  # no other is left to Great Expectations
    return [
        (one["expectation_config"]["type"].removeprefix("expect_"), one["expectation_config"]["kwargs"].get("column", ""))
        for one in results
        if one is not None and gates(one)
    ]  # fmt: skip


@pytest.mark.parametrize("seed", range(8))
def test_it_holds_on_rows_like_those(seed: int) -> None:
    assert broken(orders(seed)) == []


@pytest.mark.parametrize("at_once", [300, ROWS, 3 * ROWS])
def test_it_is_the_same_however_few_values_are_in_memory(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_mlops.core.checks.inference._VALUES_AT_ONCE", at_once)
    assert infer_expectations(orders(0).lazy(), InferencePolicy()) == SUITE


def test_one_repeated_value_of_many_is_seen() -> None:
    rows = pl.LazyFrame({"id": [*range(50_000), 7], "name": [f"n{index}" for index in range(50_001)]})
    unique = "expect_column_values_to_be_unique"
    found = infer_expectations(rows, InferencePolicy())
    assert [one["kwargs"]["column"] for one in found if one["type"] == unique] == ["name"]


def test_great_expectations_reads_it_and_agrees() -> None:
    suite = json.loads(json.dumps({"name": "orders", "expectations": SUITE}))
    (rows,) = [orders(0).drop("rate", "price", "day")]
    suite["expectations"] = [
        item for item in suite["expectations"] if item["kwargs"].get("column", "id") in rows.columns
    ]
    report = validate_frame(rows.lazy(), suite, engine="great_expectations")
    assert [result for result in report["results"] if not result["success"]] == []
    assert len(report["results"]) > 20


VALUE, NOT_IN = "column_values_to_be_between", "column_values_to_not_be_in_set"
SHARE = "column_proportion_of_non_null_values_to_be_between"
SOME = pl.int_range(pl.len()) % 50 == 0


@pytest.mark.parametrize(
    ("happened", "found"),
    [
        (pl.when(SOME).then(None).otherwise(pl.col("amount")).alias("amount"), (SHARE, "amount")),
        (pl.col("gone").fill_null(1.0), (SHARE, "gone")),
        (pl.when(SOME).then(-1.0).otherwise(pl.col("amount")).alias("amount"), (VALUE, "amount")),
        (pl.when(pl.int_range(pl.len()) == 7).then(46_826.21).otherwise(pl.col("amount")).alias("amount"), (VALUE, "amount")),
        (pl.lit(0).cast(pl.Int64).alias("items"), (NOT_IN, "items")),
        (pl.col("items").clip(lower_bound=1), ("column_values_to_be_in_set", "items")),
        (pl.when(SOME).then(pl.lit("lost")).otherwise(pl.col("status")).alias("status"), ("column_values_to_be_in_set", "status")),
        (pl.lit("0-1").alias("id"), ("column_values_to_be_unique", "id")),
    ],
)  # fmt: skip
def test_it_breaks_where_something_happened(happened: pl.Expr, found: tuple[str, str]) -> None:
    rows = orders(1).with_columns(happened)
    assert found in broken(rows)
    assert {column for _, column in broken(rows)} == {found[1]}


def test_a_column_or_half_of_the_rows_is_gone() -> None:
    assert ("table_row_count_to_be_between", "") in broken(orders(1).head(ROWS // 3))
    (there,) = [
        item
        for item in SUITE
        if item["type"] == "expect_column_to_exist" and item["kwargs"]["column"] == "sent"
    ]
    results = validate_frame(orders(1).drop("sent").lazy(), {"name": "s", "expectations": [there]})
    assert not results["success"]


def test_every_expectation_says_what_was_seen() -> None:
    assert all(item["notes"] and item["severity"] in ("critical", "warning") for item in SUITE)
    notes = {(item["type"], item["kwargs"].get("column")): item["notes"] for item in SUITE}
    assert notes["expect_column_proportion_of_non_null_values_to_be_between", "gone"] == (
        "100.00% were missing; that may move by 0.50% of the rows either way"
    )
    asked = {item["kwargs"]["column"]: item["notes"] for item in SUITE if "REVIEW" in item["notes"]}
    assert asked.keys() == {"amount", "rate"}
    assert re.match(
        r"REVIEW: \d+ of 4000 values were negative, down to -0\.\d+: can they be\?", asked["amount"]
    )
    assert re.match(r"REVIEW: \d+ of 4000 values were infinite, the others from 0\.5 to 0\.5", asked["rate"])


def test_what_is_not_a_policy() -> None:
    with pytest.raises(ValueError, match="outlier_factor of an inference policy is at least 1, got 0"):
        InferencePolicy(outlier_factor=0.0)
    with pytest.raises(ValueError, match="share of an inference policy"):
        InferencePolicy(share=math.nan)
    with pytest.raises(InsufficientDataError, match="from 10 rows; take a reference of at least 200"):
        infer_expectations(orders(0).head(10).lazy(), InferencePolicy())


class TestFile:
    @pytest.fixture
    def spec(self, tmp_path: Path) -> dict[str, Any]:
        delta.replace_window(str(tmp_path / "orders"), orders(0).drop("price"), time_column="at", window=None)
        task = InferExpectationsOperator(
            task_id="infer", dataset=str(tmp_path / "orders"), suite=str(tmp_path / "orders.json"), time_column="at",
            window_start="2024-01-01", window_end="2024-01-02", exclude="rate, day", policy={"share": 0.02},
        )  # fmt: skip
        return task.build_spec(SimpleNamespace())  # type: ignore[arg-type]

    def test_values_of_private_columns_are_not_in_it(self, tmp_path: Path) -> None:
        delta.replace_window(str(tmp_path / "rows"), orders(0), time_column="at", window=None)
        private = ["status", "id", "amount", "weight", "sent", "price"]
        task = InferExpectationsOperator(
            task_id="infer",
            dataset=str(tmp_path / "rows"),
            suite=str(tmp_path / "rows.json"),
            private_columns=", ".join(private),
        )
        given = task.build_spec(SimpleNamespace())  # type: ignore[arg-type]
        result = run_step("infer-expectations", given, Services())
        assert set(private) <= set(result["unsaid"])
        for one in (item for item in SUITE if item["kwargs"].get("column") not in private):
            assert one in load_suite(given["suite"])["expectations"]
        assert "bäck" not in (tmp_path / "rows.json").read_text()
        with pytest.raises(ValueError, match="has no column states"):
            run_step("infer-expectations", given | {"private_columns": ["states"]}, Services())

    def test_it_is_a_suite(self, spec: dict[str, Any]) -> None:
        result = run_step("infer-expectations", spec, Services())
        assert (result["row_count"], result["written"]) == (1440, True)
        suite = load_suite(spec["suite"])
        assert len(suite["expectations"]) == result["expectation_count"]
        assert suite["meta"]["inferred_from"]["policy"]["share"] == 0.02
        assert not {"rate", "day"} & {item["kwargs"].get("column") for item in suite["expectations"]}
        judged = {
            "dataset": spec["dataset"],
            "suite": spec["suite"],
            "time_column": "at",
            "window": spec["window"],
        }
        assert run_step("validate", judged, Services())["failed"] == 0

    def test_a_reviewed_one_stays(self, spec: dict[str, Any]) -> None:
        path = Path(spec["suite"])
        run_step("infer-expectations", spec, Services())
        assert not run_step("infer-expectations", spec, Services())["written"]  # a retry
        path.write_text(reviewed := path.read_text().replace("REVIEW", "reviewed"))
        with pytest.raises(FileExistsError, match=r"somebody may have reviewed it.*overwrite=True"):
            run_step("infer-expectations", spec, Services())
        assert path.read_text() == reviewed
        assert run_step("infer-expectations", spec | {"overwrite": True}, Services())["written"]
        assert path.read_text() != reviewed
        assert [file.name for file in path.parent.iterdir() if file.suffix != ""] == ["orders.json"]

    def test_a_folder_that_is_not_there(self, spec: dict[str, Any], tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="could not write the suite"):
            run_step("infer-expectations", spec | {"suite": str(tmp_path / "no" / "s.json")}, Services())


def test_the_table_of_the_page_is_what_the_script_counts(shared_data: Path) -> None:
    command = [
        sys.executable,
        str(REPOSITORY / "benchmarks" / "inferred_expectations.py"),
        str(shared_data),
        "0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    counts = re.findall(r"^(event|no event): (\d+) alarmed, (\d+) not$", done.stdout, re.MULTILINE)
    page = (REPOSITORY / "docs" / "how-to" / "write-expectations.md").read_text()
    shown = re.findall(r"^\| (event|no event) \| (\d+) \| (\d+) \|$", page, re.MULTILINE)
    assert shown == counts
    assert [name for name, _, _ in shown] == ["event", "no event"]


def test_a_column_that_ends_like_another_has_its_own_expectations() -> None:
    rows = pl.LazyFrame(
        {"fee": [1.0 + one for one in range(500)], "extra:fee": [-5.0 * one for one in range(500)]}
    )
    mine = [
        item for item in infer_expectations(rows, InferencePolicy()) if item["kwargs"].get("column") == "fee"
    ]
    alone = infer_expectations(rows.select("fee"), InferencePolicy())[1:]
    assert mine == alone


def test_a_value_that_never_changes_is_asked_about() -> None:
    rows = pl.LazyFrame({"month": ["2024-01"] * 500, "kind": ["a", "b"] * 250})
    notes = {item["kwargs"]["column"]: item["notes"] for item in infer_expectations(rows, InferencePolicy()) if "value_set" in item["kwargs"]}  # fmt: skip
    assert notes["month"].startswith("REVIEW: '2024-01' is the only value")
    assert "REVIEW" not in notes["kind"]


def odd_rows(seed: int) -> pl.DataFrame:
    """Rows of types that are not plain numbers or text; every column has nulls."""
    rng = np.random.default_rng(seed)
    cents = rng.integers(-1, 2_000, ROWS).tolist()
    rows = pl.DataFrame(
        {
            "fee": pl.Series([Decimal(cent) / 100 for cent in cents], dtype=pl.Decimal(38, 2)),
            "order": pl.Series([Decimal(one) for one in range(ROWS)], dtype=pl.Decimal(38, 0)),
            "paid": rng.random(ROWS) < 0.3,
            "always": True,
            "ratio": np.where(np.arange(ROWS) == 7, np.inf, rng.random(ROWS)),
            "day": [date(2024, 1, 1)] * ROWS,
            "^a$": rng.integers(0, 1000, ROWS),
            "name": [f"n{one}" for one in rng.integers(0, 1000, ROWS)],
        }
    )
    return rows.with_columns(pl.when(pl.int_range(pl.len()) % 100 != 3).then(pl.all()))


class TestOtherTypes:
    """Decimals, Booleans, a column with an infinity, and names that polars takes for patterns."""

    suite = tuple(infer_expectations(odd_rows(0).lazy(), InferencePolicy()))

    def broken(self, rows: pl.DataFrame) -> set[tuple[str, str]]:
        suite = json.loads(json.dumps({"name": "odd", "expectations": self.suite}))
        return {
            (result["expectation_config"]["type"], result["expectation_config"]["kwargs"]["column"])
            for result in validate_frame(rows.lazy(), suite)["results"]
            if not result["success"]
        }

    def test_the_suite_can_be_judged_and_holds(self) -> None:
        assert self.broken(odd_rows(0)) == self.broken(odd_rows(1)) == set()

    @pytest.mark.parametrize(
        ("happened", "found"),
        [
            (pl.col("fee") * 100, (f"expect_{VALUE}", "fee")),
            (
                pl.lit(0).cast(pl.Decimal(38, 2)).alias("fee"),
                ("expect_column_values_to_not_be_in_set", "fee"),
            ),
            (
                pl.lit(7).cast(pl.Decimal(38, 0)).alias("order"),
                ("expect_column_values_to_be_unique", "order"),
            ),
            (pl.lit(True).alias("paid"), ("expect_column_values_to_not_be_in_set", "paid")),
            (pl.lit(False).alias("paid"), ("expect_column_values_to_be_in_set", "paid")),
            (~pl.col("always"), ("expect_column_values_to_be_in_set", "always")),
            (pl.col("ratio") * 100, (f"expect_{VALUE}", "ratio")),
            (by_name("^a$") * 100, (f"expect_{VALUE}", "^a$")),
        ],
    )
    def test_it_breaks_where_something_happened(self, happened: pl.Expr, found: tuple[str, str]) -> None:
        rows = odd_rows(1)
        broken = self.broken(rows.with_columns(happened))
        assert found in broken
        assert {column for _, column in broken} == {found[1]}

    def test_an_infinity_and_a_constant_are_asked_about(self) -> None:
        asked = [item["notes"] for item in self.suite if "REVIEW" in item["notes"]]
        assert [note.partition(":")[0] for note in asked] == ["REVIEW"] * len(asked)
        assert any("1 of 3960 values were infinite" in note for note in asked)
        assert any("True is the only value" in note for note in asked)

    def test_the_extremes_of_decimals_are_within_their_range(self) -> None:
        rows = pl.DataFrame({"x": pl.Series([Decimal("0.1"), Decimal("0.3")] * 200, dtype=pl.Decimal(10, 1))})
        (told,) = [
            item for item in infer_expectations(rows.lazy(), InferencePolicy()) if "mostly" in item["kwargs"]
        ]
        low, high = told["kwargs"]["min_value"], told["kwargs"]["max_value"]
        assert Decimal(low) <= Decimal("0.1") < Decimal(low + 1e-15)
        assert Decimal(high) >= Decimal("0.3") > Decimal(high - 1e-15)

    def test_the_columns_of_which_nothing_is_said_are_named(self, tmp_path: Path) -> None:
        assert columns_unsaid(self.suite) == ["day", "name"]
        delta.replace_window(str(tmp_path / "t"), odd_rows(0), time_column=None, window=None)
        spec = {"dataset": str(tmp_path / "t"), "suite": str(tmp_path / "s.json")}
        result = run_step("infer-expectations", spec, Services())
        assert result["unsaid"] == ["day", "name"]
        assert result["headline"].endswith("nothing is said about the values of day, name")
        assert "nothing is said about the values of day, name" in load_suite(spec["suite"])["notes"]
