"""The screen of new partitions: wrong labels are found, clean partitions enter, and what can't be told is not called fine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest
from airflow.sdk import Asset
from airflow.sdk.exceptions import AirflowSkipException

from airflow_mlops.core.checks.label_shares import nearest_distances
from airflow_mlops.core.checks.poisoning import (
    Direction,
    HeldBefore,
    PoisoningPolicy,
    conformal_p_value,
    held_by_chance,
    judge_jointly,
    judge_noise,
)
from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    InsufficientDataError,
    PartitionHeldError,
    SchemaMismatchError,
    StaleDatasetError,
)
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.label_consistency import own_answers
from airflow_mlops.ledger import EntryKind, Ledger
from airflow_mlops.operators.screen_dataset import ScreenDatasetOperator
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.screen import _held_windows
from airflow_mlops.steps.validation.screen_partitions import Screened, screen_partitions
from tests.conftest import REPOSITORY

DAYS, ROWS = 10, 300
#: Days of the table that operators read.
DAYS_KEPT = 5
#: A day like the others; of such ones every tenth is held at this rate, and this one is not.
CLEAN = 22
#: Units that no value of these tests is measured by.
FLOORS = dict.fromkeys(("high", "low", "labels"), 1e-9)
START = datetime(2024, 1, 1, tzinfo=UTC)
#: Nine trusted partitions are enough for it, and there are as many, or one more.
POLICY = PoisoningPolicy(false_alarm_rate=0.1, minimum_rows=100)


def day(number: int, *, kind: str = "binary", turned: bool = False) -> pl.DataFrame:
    """Rows of a day whose label depends on x and group; with ``turned`` the other way round."""
    random = np.random.default_rng(number)
    x, group = random.standard_normal(ROWS), random.integers(0, 4, ROWS)
    level = 2 * x + group
    if kind == "number":
        label: Any = np.exp(level / 2) + random.normal(0, 0.05, ROWS)
    elif kind == "truth":
        label = level > 1.5
    elif kind == "several":
        label = np.array(["low", "mid", "high"])[np.digitize(level, [0.0, 2.5])]
    else:
        label = ((level > 1.5) ^ (random.random(ROWS) < 0.03) ^ turned).astype(int)
    times = [START + timedelta(days=number, minutes=4 * index) for index in range(ROWS)]
    columns = {
        "t": times,
        "id": [f"{number}-{index}" for index in range(ROWS)],
        "x": x,
        "group": group.astype(str),
    }
    return pl.DataFrame({**columns, "y": label})


def with_wrong(rows: pl.DataFrame, share: float, *, seed: int = 0) -> tuple[pl.DataFrame, set[str]]:
    """Give some rows the label of another one with another label."""
    random = np.random.default_rng(seed)
    labels = rows["y"].to_list()
    chosen = random.choice(rows.height, round(share * rows.height), replace=False)
    for place in chosen:
        labels[place] = random.choice([label for label in labels if label != labels[place]])
    return rows.with_columns(pl.Series("y", labels, dtype=rows.schema["y"])), {
        rows["id"][int(i)] for i in chosen
    }


def screen(
    new: pl.DataFrame,
    kind: str = "binary",
    policy: PoisoningPolicy = POLICY,
    count: int = DAYS - 1,
    held: tuple[HeldBefore, ...] = (),
) -> Screened:
    trusted = [day(number, kind=kind) for number in range(count)]
    return screen_partitions(
        new,
        trusted,
        features=["x", "group"],
        target="y",
        time_column="t",
        policy=policy,
        held=held,
        answers_of=remembered,
    )


def screen_few(*extra: pl.Series | pl.Expr, features: tuple[str, ...] = ("x", "group")) -> Screened:
    """Screen a clean day beside four, the last of which may have other columns."""
    days = [day(number) for number in range(DAYS_KEPT)]
    days = [rows.with_columns(extra[:1] if rows is not days[-1] else extra[-1:]) for rows in days]
    return screen_partitions(
        days[-1],
        days[:-1],
        features=list(features),
        target="y",
        time_column="t",
        policy=PoisoningPolicy(false_alarm_rate=0.2, minimum_rows=100),
    )


@pytest.mark.parametrize("before", [None, 1.0])
def test_a_feature_that_no_row_of_a_partition_has(before: float | None) -> None:
    gone = pl.lit(None, dtype=pl.Float64).alias("gone")
    found = screen_few(pl.lit(before, dtype=pl.Float64).alias("gone"), gone, features=("x", "group", "gone"))
    assert found == screen_few()


def test_labels_that_are_all_the_same_tell_nothing() -> None:
    found = screen_few(pl.lit(1).alias("y"))
    assert (found.verdict, found.reason) == (
        "undecided",
        "all labels are the same, so wrong ones could not be seen",
    )


def test_features_of_lists_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"tags is List.*name those it is to look at as features"):
        screen_few(pl.concat_list("x").alias("tags"), features=("x", "tags"))


def test_decimal_labels_are_numbers() -> None:
    level = (3 * pl.col("x") + pl.col("group").cast(pl.Float64)).round(2).alias("y")
    assert screen_few(level.cast(pl.Decimal(10, 2))) == screen_few(level)
    few = pl.col("y").cast(pl.Decimal(1, 0))
    assert screen_few(few) == screen_few(pl.col("y").cast(pl.Float64))


def test_a_feature_may_be_called_count() -> None:
    texts = pl.format("in {}", "group")
    found = screen_few(texts.alias("count"), texts.alias("count"), features=("x", "count"))
    assert found == screen_few(texts.alias("text"), texts.alias("text"), features=("x", "text"))


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (pl.format("comment {}", "t"), "the target y has 1500 classes .* takes at most 100"),
        (pl.concat_list("x"), r"the target y is List\(Float64\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused_by_name(label: pl.Expr, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        screen_few(label.alias("y"), label.alias("y"))


ANSWERS: dict[bytes, Any] = {}


def remembered(features: Any, labels: Any, compared: Any, *, classes: int | None) -> Any:
    key = features.tobytes() + labels.tobytes()
    if key not in ANSWERS:
        ANSWERS[key] = own_answers(features, labels, compared, classes=classes)
    return ANSWERS[key]


class TestScreen:
    @pytest.mark.parametrize(
        ("kind", "shares"),
        [("binary", (0.05, 0.1)), ("several", (0.1,)), ("truth", (0.1,)), ("number", (0.05,))],
    )
    def test_wrong_labels_are_found_and_clean_ones_enter(self, kind: str, shares: tuple[float, ...]) -> None:
        clean = day(CLEAN, kind=kind)
        assert screen(clean, kind).verdict == "enters"
        for share in shares:
            changed, ids = with_wrong(clean, share)
            found = screen(changed, kind)
            assert found.verdict == "held", found.reason
            low, high = found.noise.interval  # type: ignore[union-attr]
            assert 0 < low <= found.noise.share <= high  # type: ignore[union-attr]
            suspicious = {changed["id"][place] for place in found.rows}
            # Near the border of two classes nobody can tell; far from it everybody can.
            assert len(suspicious & ids) >= 0.6 * min(len(ids), len(suspicious))

    def test_slices_where_wrong_labels_are_are_named(self) -> None:
        rows = day(CLEAN)
        part = (pl.col("group") == "2") & (
            pl.col("id").str.ends_with("1")
            | pl.col("id").str.ends_with("4")
            | pl.col("id").str.ends_with("7")
        )
        changed = rows.with_columns(pl.when(part).then(1 - pl.col("y")).otherwise(pl.col("y")).alias("y"))
        found = screen(changed)
        assert found.verdict == "held"
        assert found.slices[0].where == "group 2"
        assert found.slices[0].share > 3 * found.slices[0].trusted_share

    def test_a_pattern_is_a_change_of_the_relation_and_no_noise(self) -> None:
        turned = day(CLEAN, turned=True)
        found = screen(turned)
        assert found.noise is not None
        assert found.relation is not None
        assert found.verdict == "enters"
        assert found.relation.changed
        assert found.relation.gap > 0.8
        strict = PoisoningPolicy(false_alarm_rate=0.2, minimum_rows=100, hold_on="noise_or_relation")
        held = screen(turned, policy=strict)
        assert held.verdict == "held"
        assert "labels were changed in a pattern" in held.reason

    @pytest.mark.parametrize(
        ("new", "count", "policy", "said"),
        [
            (day(CLEAN), 8, POLICY, "8 trusted partitions .* needs 9"),
            (day(CLEAN).head(50), DAYS - 1, POLICY, "50 rows with a label, 100 are needed"),
            (day(CLEAN), DAYS - 1, PoisoningPolicy(false_alarm_rate=0.1, minimum_rows=100, detectable_share=0.001), "0.1% was asked for"),
        ],
    )  # fmt: skip
    def test_what_cannot_be_told_is_undecided(
        self, new: pl.DataFrame, count: int, policy: PoisoningPolicy, said: str
    ) -> None:
        found = screen(new, policy=policy, count=count)
        assert found.verdict == "undecided"
        assert pl.Series([found.reason]).str.contains(said).item(), found.reason

    def test_labels_the_features_tell_nothing_of(self) -> None:
        def drawn(number: int) -> pl.DataFrame:
            random = np.random.default_rng(100 + number)
            return day(number).with_columns(pl.Series("y", random.integers(0, 2, ROWS)))

        found = screen_partitions(
            drawn(DAYS), [drawn(number) for number in range(9)],
            features=["x", "group"], target="y", time_column="t", policy=POLICY,
        )  # fmt: skip
        assert found.verdict == "undecided", found.reason


def overwritten(rows: pl.DataFrame, share: float, value: Any) -> pl.DataFrame:
    chosen = pl.Series(np.random.default_rng(7).random(rows.height) < share)
    label = pl.when(chosen).then(pl.lit(value)).otherwise("y").cast(rows.schema["y"])
    return rows.with_columns(label.alias("y"))


def share_inside(found: Screened, clean: pl.DataFrame, changed: pl.DataFrame) -> bool:
    assert found.noise is not None
    low, high = found.noise.interval
    return low <= (clean["y"] != changed["y"]).mean() <= high  # type: ignore[operator, return-value]


class TestOverwrittenLabels:
    """One value in the place of others is easier to answer than labels are, and not called fine."""

    @pytest.mark.parametrize("share", [0.3, 1.0])
    @pytest.mark.parametrize(("kind", "value"), [("binary", 0), ("several", "mid"), ("number", 0.0)])
    def test_they_are_held(self, kind: str, value: Any, share: float) -> None:
        clean = day(CLEAN, kind=kind)
        changed = overwritten(clean, share, value)
        found = screen(changed, kind)
        assert found.verdict == "held", found.reason
        assert share_inside(found, clean, changed)
        if share == 1.0:
            assert "all labels are the same, in no trusted partition are they" in found.reason
            assert found.noise.share is None  # type: ignore[union-attr]

    @pytest.mark.parametrize("hidden", [0.5, 1.0])
    def test_half_of_a_rare_class_hidden(self, hidden: float) -> None:
        def rare(number: int) -> pl.DataFrame:
            rows = pl.concat([day(100 * number + part) for part in range(4)])
            return rows.with_columns((pl.col("x") > 1.6).cast(int).alias("y"), rows["t"].sort())

        def judge(new: pl.DataFrame) -> Screened:
            return screen_partitions(
                new, [rare(number) for number in range(1, DAYS)],
                features=["x", "group"], target="y", time_column="t", policy=POLICY, answers_of=remembered,
            )  # fmt: skip

        clean = rare(DAYS)
        assert judge(clean).verdict == "enters"
        changed = overwritten(clean, hidden, 0)
        found = judge(changed)
        assert found.verdict == "held", found.reason
        assert share_inside(found, clean, changed)

    def test_a_class_that_is_gone(self) -> None:
        changed = day(CLEAN, kind="several").filter(pl.col("y") != "mid")
        found = screen(changed, "several")
        assert found.verdict == "held"
        assert "no label is mid, in every trusted partition some are" in found.reason
        assert found.labels is not None
        assert found.labels.missing == ("mid",)

    def test_a_rare_class_that_is_gone_may_be_chance_and_is_told_all_the_same(self) -> None:
        def with_rare(number: int) -> pl.DataFrame:
            # One row of each day, but of a day that is farther out than one without any.
            rare = pl.int_range(pl.len()) < (1 if number else 150)
            return day(number).with_columns(pl.when(rare).then(2).otherwise("y").alias("y"))

        found = screen_partitions(
            day(CLEAN), [with_rare(number) for number in range(DAYS - 1)],
            features=["x", "group"], target="y", time_column="t", policy=POLICY, private=("y",),
        )  # fmt: skip
        told = "no label is class 3, in every trusted partition some are: none was there, or they were overwritten"
        assert (found.verdict, found.reason) == ("undecided", told)
        assert found.noise is not None
        assert (found.noise.share, found.noise.interval) == (None, (0.0, 1.0))

    def test_many_wrong_labels_are_held_though_a_rare_class_is_gone(self) -> None:
        def drawn(seed: int, *, wrong: float = 0.0, rare: bool = True) -> pl.DataFrame:
            random = np.random.default_rng(seed)
            x = random.normal(random.uniform(-1.2, 1.2), 1.0, 1_000)
            y = (x + random.normal(0.0, 0.2, 1_000) > 0.0).astype(int)
            flipped = random.choice(1_000, round(wrong * 1_000), replace=False)
            y[flipped] = 1 - y[flipped]
            if rare:
                y[random.integers(1_000)] = 2
            return pl.DataFrame({"x": x, "y": y, "t": range(1_000)})

        found = screen_partitions(
            drawn(99, wrong=0.3, rare=False), [drawn(seed) for seed in range(1, 31)],
            features=["x"], target="y", time_column="t", policy=POLICY,
        )  # fmt: skip
        assert found.verdict == "held", found.reason
        assert found.noise is not None
        assert found.noise.interval[0] > 0.1
        assert found.noise.interval[1] == 1.0

    def test_labels_that_a_model_answered(self) -> None:
        """Their shares are as usual; that no row contradicts them is not."""
        rows = day(CLEAN)
        changed = rows.with_columns((2 * pl.col("x") + pl.col("group").cast(int) > 1.5).cast(int).alias("y"))
        found = screen(changed)
        assert found.verdict != "enters"
        assert "answered by a model" in found.reason
        assert share_inside(found, rows, changed)

    def test_what_is_seen_of_each_direction_is_told(self) -> None:
        noise = screen(day(CLEAN)).noise
        assert noise is not None
        assert set(noise.detectable_by) == {"wrong at random", "overwritten with 0", "overwritten with 1"}
        assert noise.detectable_share == max(noise.detectable_by.values())


def test_level_is_kept_exactly_where_partitions_are_exchangeable() -> None:
    """Of twenty values in a random order the last is the largest in one of twenty, whatever their distribution."""
    random = np.random.default_rng(0)
    values = random.standard_cauchy((4000, 20))
    p_values = np.array([conformal_p_value(row[-1], row[:-1].tolist()) for row in values])
    for level in (0.05, 0.1, 0.5):
        # 4000 draws: four standard errors.
        assert abs(np.mean(p_values <= level + 1e-12) - level) < 4 * np.sqrt(level * (1 - level) / 4000)


def screen_stream(random: np.random.Generator, *, kept: bool) -> float:
    """Share of clean partitions that are held in a long run, where nobody releases one."""

    def drawn() -> tuple[HeldBefore, Any]:
        """Give a partition, and the shares of its classes."""
        ones = random.normal(0.4, 0.02)
        return HeldBefore(random.normal(0.1, 0.01), 0.0), np.array([1.0 - ones, ones])

    past = [(*drawn(), False) for _ in range(39)]
    for _ in range(400):
        trusted, held, shares = [], [], []
        for item, share, stopped in reversed(past):
            (held if stopped else trusted).append(item)
            shares += [] if stopped else [share]
            if len(trusted) == 39:
                break
        new, share = drawn()
        *distances, distance = nearest_distances(np.array([*shares, share])).tolist()
        known = [item._replace(distance=one) for item, one in zip(trusted, distances, strict=True)]
        new = new._replace(distance=distance)
        beside = held_by_chance(held, known, 0.05) if kept else []
        rates, _, far = np.array([*known, *beside, new]).T
        joint = judge_jointly({"high": rates, "low": -rates, "labels": far}, FLOORS, 0.05)
        past.append((new, share, bool(joint.beyond)))
    return float(np.mean([stopped for *_, stopped in past[-200:]]))


def test_what_is_held_by_chance_does_not_make_the_next_ones_suspicious() -> None:
    random = np.random.default_rng(0)
    # 12 runs of 200 partitions: a standard error of 0.005.
    assert np.mean([screen_stream(random, kept=True) for _ in range(12)]) < 0.085
    assert np.mean([screen_stream(random, kept=False) for _ in range(4)]) > 0.2


@pytest.mark.parametrize("count", [20, 40])
def test_all_tests_together_keep_the_level(count: int) -> None:
    """However they hang together, and also where one has far outliers."""
    random = np.random.default_rng(0)
    said = []
    for _ in range(4000):
        rates, far = random.normal(0.1, 0.01, count), np.abs(random.standard_cauchy(count))
        values = {
            "high": rates,
            "low": -rates,
            "labels": far,
            "relation": rates + random.normal(0, 0.01, count),
        }
        joint = judge_jointly(values, dict.fromkeys(values, 1e-9), 0.05)
        assert bool(joint.beyond) == (joint.p_value <= 0.05 + 1e-12)
        assert all((values[name][-1] > joint.limits[name]) == (name in joint.beyond) for name in values)
        said.append(bool(joint.beyond))
    # 4000 draws: four standard errors.
    assert abs(np.mean(said) - 0.05) < 4 * np.sqrt(0.05 * 0.95 / 4000)


def test_a_partition_is_ranked_with_what_chance_may_have_held() -> None:
    found = screen(day(CLEAN))
    alone, labels = found.noise, found.labels
    assert alone is not None
    assert labels is not None
    near = HeldBefore(alone.rate, 0.0, labels.distance)
    among = screen(day(CLEAN), held=(near, near._replace(rate=0.5), near._replace(distance=0.5))).noise
    assert among is not None
    assert among.p_value == pytest.approx((alone.p_value * DAYS + 1) / (DAYS + 1))


def test_what_is_held_for_more_than_chance_hides_no_other() -> None:
    trusted = [HeldBefore(rate, 0.0, 0.1) for rate in np.random.default_rng(0).normal(0.1, 0.01, 39)]
    for far in (HeldBefore(0.18, 0.0, 0.1), HeldBefore(0.0, 0.0, 0.1), HeldBefore(0.1, 0.0, 0.5)):
        assert held_by_chance([far] * 10, trusted, 0.05) == []


@pytest.mark.parametrize("level", [0.05, 0.1, 0.2])
def test_interval_leaves_zero_exactly_where_the_test_for_noise_says_no(level: float) -> None:
    random = np.random.default_rng(1)
    seen = 0
    for _ in range(300):
        rates, far = random.normal(0.1, 0.01, 26), random.random(26)
        joint = judge_jointly({"high": rates, "low": -rates, "labels": far}, FLOORS, level)
        ways = [Direction("wrong at random", (0.7, 0.8)), Direction("overwritten with 1", (0.5,), 0.2, 0.3)]
        policy = PoisoningPolicy(false_alarm_rate=level)
        noise = judge_noise(float(rates[-1]), rates[:-1].tolist(), joint, ways, policy)
        assert (noise.share is None) == (
            bool(joint.beyond & {"labels", "low"}) or rates[-1] < rates[:-1].min()
        )
        assert (noise.interval[0] > 0) == ("high" in joint.beyond)
        if noise.share is None:
            assert noise.interval[1] == 1.0
        else:
            assert noise.interval[0] <= noise.share <= noise.interval[1] + 1e-12
            seen += noise.interval[0] > 0
    assert seen > 2


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"false_alarm_rate": 0.0}, "false_alarm_rate is 0.0"),
        ({"tolerated_share": 1.0}, "tolerated_share is a share"),
        ({"hold_on": "all"}, "unknown hold_on 'all'"),
        ({"rows_per_partition": 10}, "rows_per_partition=10"),
    ],
)  # fmt: skip
def test_policies_that_make_no_sense(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        PoisoningPolicy(**wrong)


@pytest.fixture
def table(tmp_path: Path) -> str:
    """Four clean days, as many as a rate of one in five needs, and one in ten of whose labels is wrong."""
    uri = str(tmp_path / "rows")
    days = [*(day(number) for number in range(DAYS_KEPT - 1)), with_wrong(day(DAYS_KEPT - 1), 0.1)[0]]
    delta.replace_window(uri, pl.concat(days), time_column="t", window=None)
    return uri


WINDOW = Window(start=START + timedelta(days=DAYS_KEPT - 1), end=START + timedelta(days=DAYS_KEPT))


class TestOperator:
    @pytest.fixture
    def run(self, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
        ledger = f"sqlite:///{tmp_path / 'ledger.db'}"
        connection = {"conn_type": "mlops_ledger", "extra": {"url": ledger}}
        monkeypatch.setenv("AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps(connection))
        asset = Asset("rows")
        tries = iter(range(1, 10))

        def run(window: Window = WINDOW, **arguments: Any) -> SimpleNamespace:
            extra: dict[str, Any] = {}
            context = {
                "ti": SimpleNamespace(dag_id="d", run_id="r", task_id="screen", try_number=next(tries)),
                "outlet_events": {asset: SimpleNamespace(extra=extra)},
            }
            given = {
                "dataset": to_dict(delta.describe(table)), "target": "y", "time_column": "t", "id_column": "id",
                "window_start": window.start.isoformat(), "window_end": window.end.isoformat(), "outlets": [asset],
                "policy": {"false_alarm_rate": 0.2, "minimum_rows": 100},
            }  # fmt: skip
            task = ScreenDatasetOperator(task_id="screen", **(given | arguments))
            outcome = SimpleNamespace(extra=extra, result=None, error=None, entries=[])
            try:
                outcome.result = task.execute(context)  # type: ignore[arg-type]
            except (PartitionHeldError, InsufficientDataError) as err:
                outcome.error = err
            with Ledger.open(ledger) as opened:
                outcome.entries = opened.entries(limit=10)
            return outcome

        return run

    def test_gate(self, run: Any) -> None:
        done = run()
        assert isinstance(done.error, PartitionHeldError)
        assert "of the labels contradict the rows around them" in str(done.error)
        assert len(done.error.evidence["suspicious_rows"]) == 20
        assert done.error.evidence["suspicious_rows"][0].startswith(f"{DAYS_KEPT - 1}-")
        (entry,) = done.entries
        assert (entry.kind, entry.payload["verdict"]) == (EntryKind.SCREENING, "held")

    def test_a_person_releases_it(self, run: Any) -> None:
        done = run(released_by="ada")
        assert done.result["verdict"] == "held"
        assert done.entries[0].payload["released_by"] == "ada"
        assert "held, released by ada" in done.entries[0].summary

    def test_warn(self, run: Any) -> None:
        assert run(action="warn").result["verdict"] == "held"

    def test_quarantine(self, run: Any, table: str) -> None:
        before = delta.describe(table, time_column="t")
        done = run(action="quarantine")
        assert done.result["dataset"]["row_count"] == before.row_count - ROWS
        assert delta.describe(table, time_column="t").time_max < WINDOW.start  # type: ignore[operator]
        aside = delta.read_table(f"{table}_held").collect()
        assert set(aside["id"]) == {f"{DAYS_KEPT - 1}-{index}" for index in range(ROWS)}
        assert done.extra["airflow_mlops"]["dataset"] == done.result["dataset"]
        again = run(action="quarantine", dataset=to_dict(before))  # a retry is given the same version
        assert again.result["dataset"] == done.result["dataset"]
        assert delta.read_table(f"{table}_held").collect().height == ROWS

    def test_held_rows_wake_nobody(self, run: Any, table: str) -> None:
        with pytest.raises(AirflowSkipException, match=r"rows are in .*nothing new goes on"):
            run(action="quarantine", skip_held=True)
        assert delta.describe(table, time_column="t").time_max < WINDOW.start  # type: ignore[operator]
        clean = Window(start=WINDOW.start - timedelta(days=1), end=WINDOW.start)
        assert run(clean, action="quarantine", skip_held=True, allow_undecided=True).result

    def test_the_event_tells_verdict_and_validation(self, run: Any, table: str) -> None:
        validated = {"dataset": to_dict(delta.describe(table)), "quality": {"score": 0.9}}
        extra = run(dataset=validated, released_by="ada").extra
        assert extra["airflow.dataquality.result"] == {"score": 0.9}
        assert (extra["airflow_mlops"]["verdict"], extra["airflow_mlops"]["released_by"]) == ("held", "ada")
        assert "airflow.dataquality.result" not in run(action="warn").extra

    def test_newer_rows_stay(self, table: str, tmp_path: Path) -> None:
        spec = {
            "dataset": to_dict(delta.describe(table)), "window": to_dict(WINDOW), "time_column": "t", "target": "y",
            "id_column": "id", "policy": {"false_alarm_rate": 0.2, "minimum_rows": 100}, "quarantine": f"{table}_held",
        }  # fmt: skip
        delta.replace_window(table, day(DAYS_KEPT - 1), time_column="t", window=WINDOW)
        with pytest.raises(StaleDatasetError, match=r"was written again after version .* and screen what"):
            run_step("screen", spec, Services(ledger_url=f"sqlite:///{tmp_path / 'l.db'}"))
        assert delta.describe(table).row_count == DAYS_KEPT * ROWS
        assert not delta.table_exists(f"{table}_held")

    def test_held_rows_are_held_once_and_leave_when_they_are_let_in(self, run: Any, table: str) -> None:
        rows = delta.read_table(table).filter(pl.col("t") >= WINDOW.start).collect()
        unlabelled = rows.with_columns(pl.when(pl.col("x") < 2).then("y"))
        held = []
        for partition in (rows, rows, unlabelled):
            delta.replace_window(table, partition, time_column="t", window=WINDOW)
            run(action="quarantine")
            held.append(delta.read_table(f"{table}_held").collect())
        first, again, other = held
        assert first.sort("t").drop("quarantine_version").equals(again.sort("t").drop("quarantine_version"))
        assert other["id"].n_unique() == ROWS
        assert other["quarantine_work"].n_unique() == 2  # other rows than before, and all of them
        assert "contradict the rows around them" in first["quarantine_reasons"][0]
        delta.replace_window(table, rows, time_column="t", window=WINDOW)
        done = run(action="quarantine", released_by="ada")
        assert done.result["dataset"]["row_count"] == DAYS_KEPT * ROWS
        left = delta.read_table(f"{table}_held").collect()
        assert left.equals(
            other.filter(pl.col("quarantine_work") != first["quarantine_work"][0]), null_equal=True
        )
        assert left.height == ROWS

    def test_rows_leave_when_they_are_let_in_though_the_table_has_another_column_now(
        self, run: Any, table: str
    ) -> None:
        rows = delta.read_table(table).collect()
        run(action="quarantine")
        wider = rows.with_columns(new=pl.when(pl.col("t") < WINDOW.start).then(1))
        wider.write_delta(table, mode="overwrite", delta_write_options={"schema_mode": "overwrite"})
        done = run(action="quarantine", released_by="ada")
        assert done.result["dataset"]["row_count"] == DAYS_KEPT * ROWS
        assert delta.read_table(f"{table}_held").collect().height == 0

    def test_a_release_leaves_rows_that_the_table_has_not(self, run: Any, table: str) -> None:
        judged = to_dict(delta.describe(table))
        run(action="quarantine", dataset=judged)
        run(
            action="quarantine", dataset=judged, released_by="ada"
        )  # the screen alone was cleared, not the ingest
        assert delta.read_table(f"{table}_held").collect().height == ROWS
        assert delta.describe(table).row_count == (DAYS_KEPT - 1) * ROWS

    def test_what_was_held_is_not_trusted_until_it_is_released(
        self, run: Any, table: str, tmp_path: Path
    ) -> None:
        noise = run().entries[0].payload["noise"]
        held = _held_windows(table, Services(ledger_url=f"sqlite:///{tmp_path / 'ledger.db'}"))
        assert {window: one.rate for window, one in held.items()} == {WINDOW: noise["rate"]}
        # Four other days are before it, so that the test can say no; the held one does not count as a fifth.
        later = Window(start=WINDOW.end, end=WINDOW.end + timedelta(days=1))
        delta.replace_window(table, day(DAYS_KEPT), time_column="t", window=later)
        done = run(window=later, action="warn")
        assert (done.result["trusted_windows"], done.result["held_windows"]) == (DAYS_KEPT - 1, 1)
        assert done.result["noise"]["p_value"] * DAYS_KEPT == pytest.approx(1)  # far from chance: not ranked
        run(released_by="ada")
        assert run(window=later, action="warn").result["trusted_windows"] == DAYS_KEPT

    def test_a_table_has_one_list_of_held_windows_however_it_is_written(
        self, run: Any, table: str, tmp_path: Path
    ) -> None:
        run(action="quarantine", dataset=f"{table}/")
        (tmp_path / "link").symlink_to(table)
        services = Services(ledger_url=f"sqlite:///{tmp_path / 'ledger.db'}")
        for other in (table, f"file://{table}", str(tmp_path / "x" / ".." / "rows"), str(tmp_path / "link")):
            assert set(_held_windows(other, services)) == {WINDOW}
        assert not _held_windows(f"{table}_held", services)
        rows = delta.read_table(f"{table}_held").select(delta.read_table(table).collect_schema().names())
        delta.replace_window(table, rows.collect(), time_column="t", window=WINDOW)
        run(action="quarantine", dataset=table, released_by="ada")
        assert delta.read_table(f"{table}_held").collect().height == 0
        assert not _held_windows(f"{table}/", services)

    def test_values_of_private_columns_are_nowhere(
        self, run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
        caplog.set_level("DEBUG")
        rows = pl.concat([day(number) for number in range(DAYS_KEPT)])
        secret = pl.format("Canary-{}", "group").alias("group")
        last = pl.col("t") >= WINDOW.start
        turned = pl.when(last & (pl.col("group") == "2")).then(1 - pl.col("y")).otherwise(pl.col("y"))
        half = pl.when(pl.int_range(pl.len()) % 2 == 0).then(turned).otherwise(pl.col("y")).alias("y")
        uri = str(tmp_path / "private")
        delta.replace_window(uri, rows.with_columns(half).with_columns(secret), time_column="t", window=None)
        where = {"dataset": uri, "time_column": "t"}
        held = run(**where, private_columns="group, id")
        done = run(**where, private_columns=["group", "id"], action="quarantine")
        ids = held.error.evidence["suspicious_rows"]
        assert len(ids) == 20
        assert all(0 <= int(place) < ROWS for place in ids)  # places, not ids
        told = [
            str(held.error),
            json.dumps(held.error.evidence),
            json.dumps(done.result),
            json.dumps(done.extra),
        ]
        log = "".join(capfd.readouterr())  # a task's own lines go there
        assert "of the labels contradict the rows around them" in log
        told += [
            caplog.text,
            log,
            *(path.read_bytes().decode("latin-1") for path in tmp_path.glob("ledger.db*")),
        ]
        assert not [one for one in told if "Canary" in one or f"{DAYS_KEPT - 1}-{ids[0]}" in one]
        delta.replace_window(uri, rows.with_columns(half).with_columns(secret), time_column="t", window=None)
        shown = run(**where, action="warn")
        assert "group Canary-2" in [item["where"] for item in shown.result["slices"]]
        assert shown.result["suspicious_rows"][0] == f"{DAYS_KEPT - 1}-{ids[0]}"

    def test_a_young_table(self, run: Any) -> None:
        second = Window(start=START + timedelta(days=1), end=START + timedelta(days=2))
        done = run(window=second)
        assert isinstance(done.error, InsufficientDataError)
        assert "Set allow_undecided" in str(done.error)
        assert run(window=second, allow_undecided=True).result["verdict"] == "undecided"

    @pytest.mark.parametrize(
        ("wrong", "error", "said"),
        [
            ({"action": "delete"}, ValueError, "unknown action 'delete'"),
            ({"target": "label"}, SchemaMismatchError, "has no column label"),
            ({"features": "x,y"}, ValueError, "columns beside target and time"),
            ({"private_columns": "grupp"}, SchemaMismatchError, "has no column grupp"),
            ({"window_start": "2030-01-01", "window_end": "2030-01-02"}, InsufficientDataError, "nothing to screen"),
        ],
    )  # fmt: skip
    def test_what_makes_no_sense(
        self, run: Any, wrong: dict[str, Any], error: type[Exception], said: str
    ) -> None:
        if error is InsufficientDataError:
            assert said in str(run(**wrong).error)
        else:
            with pytest.raises(error, match=said):
                run(**wrong)


KILLED = """
import json, os, signal, sys
from airflow_mlops.integrations import delta
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step

write, seen, last = delta.replace_window_streamed, 0, int(sys.argv[3])

def killed(*given, **arguments):
    global seen
    seen += 1
    version = write(*given, **arguments)
    if seen == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return version

delta.replace_window_streamed = killed
run_step("screen", json.loads(sys.argv[1]), Services(ledger_url=sys.argv[2]))
"""


@pytest.mark.parametrize("write", [1, 2])
def test_killed_after_a_write_and_tried_again(table: str, tmp_path: Path, write: int) -> None:
    spec = {
        "dataset": to_dict(delta.describe(table)), "window": to_dict(WINDOW), "time_column": "t", "target": "y", "id_column": "id",
        "policy": {"false_alarm_rate": 0.2, "minimum_rows": 100}, "quarantine": f"{table}_held",
    }  # fmt: skip
    ledger = f"sqlite:///{tmp_path / 'ledger.db'}"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps(spec), ledger, str(write)],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    everywhere = [delta.read_table(uri).collect()["id"] for uri in (table, f"{table}_held")]
    assert pl.concat(everywhere).n_unique() == DAYS_KEPT * ROWS  # at no moment is a row in neither
    result = run_step("screen", spec, Services(ledger_url=ledger))
    assert (result["verdict"], result["dataset"]["row_count"]) == ("held", (DAYS_KEPT - 1) * ROWS)
    assert delta.read_table(f"{table}_held").collect().height == ROWS
