from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest

from airflow_mlops.core.decision.retraining import Outcome, RetrainingDecision
from airflow_mlops.ledger import EntryKind, Ledger
from airflow_mlops.replay.report import write_report
from airflow_mlops.replay.runner import replay_one, run
from airflow_mlops.replay.stream import Stream, StreamConfig
from benchmarks import hurting_streams

if TYPE_CHECKING:
    from airflow_mlops.core.decision.evidence import WindowEvidence

CONFIG = """
name = "fares"
data = "fares.parquet"
time_column = "at"
target = "fare"
numeric = ["distance", "hour"]
metric = "mae"
window = "10d"
reference = 3
estimator = "sklearn.linear_model.Ridge"
"""

#: Windows are of ten days; the price of a mile changes with the sixth.
CHANGE = datetime(2020, 2, 20, tzinfo=UTC)


def write_stream(folder: Path, *, changes: bool, lasts: timedelta = timedelta(days=99)) -> Stream:
    noise = np.random.default_rng(0)
    at = pl.datetime_range(datetime(2020, 1, 1), datetime(2020, 3, 20, 23), "5m", time_unit="us", eager=True)
    distance, hour = noise.gamma(2.0, 2.0, len(at)), noise.integers(0, 24, len(at)).astype(float)
    changed = at.dt.replace_time_zone("UTC").is_between(CHANGE, CHANGE + lasts, closed="left").to_numpy()
    price = np.where(changed & changes, 4.0, 2.5)
    fare = 3.0 + price * distance + 0.1 * hour + noise.normal(0.0, 1.0, len(at))
    pl.DataFrame({"at": at, "distance": distance, "hour": hour, "fare": fare}).write_parquet(
        folder / "fares.parquet"
    )
    # Tests share a MLflow server, and a replay takes one that holds nothing of its stream.
    name = f"fares_{secrets.token_hex(4)}"
    (folder / "fares.toml").write_text(CONFIG.replace('name = "fares"', f'name = "{name}"'))
    return Stream.load(StreamConfig.read(folder / "fares.toml"), folder)


class TestPolicies:
    def test_a_change_is_met_and_a_table_says_so(self, tmp_path: Path, mlflow_server: str) -> None:
        stream = write_stream(tmp_path, changes=True)
        result = replay_one(stream, "challengers", tmp_path / "challengers", mlflow_server)
        never = replay_one(stream, "never", tmp_path / "never", mlflow_server)
        assert never.value == pytest.approx(never.first_value)
        assert never.promotions == never.trainings == 0
        assert result.first_value == pytest.approx(never.value)
        changed = [item.window.start >= CHANGE for item in result.windows]
        before = [item for item, after in zip(result.windows, changed, strict=True) if not after]
        after = [item for item, after in zip(result.windows, changed, strict=True) if after]
        assert not any(item.promoted for item in before)
        # The first window after the change is met unprepared; then it is over.
        assert after[0].value > 3.0
        assert max(item.value for item in after[2:]) < 1.2
        assert min(item.first_value for item in after) > 3.0
        assert 1 <= result.promotions <= 3
        with Ledger.open(f"sqlite:///{tmp_path / 'challengers' / 'ledger.db'}") as ledger:
            decisions = ledger.entries(kind=EntryKind.RETRAINING_DECISION)
            checks = ledger.entries(kind=EntryKind.CHALLENGER_CHECK)
        assert len(decisions) == len(result.windows) - 1
        assert len(checks) == len(result.windows)
        with Ledger.open(f"sqlite:///{tmp_path / 'never' / 'ledger.db'}") as ledger:
            newest = ledger.entries(kind=EntryKind.PERFORMANCE_CHECK)[0]
        assert newest.payload["change"]["window_count"] == len(after)  # earlier grades are looked at, too
        write_report([result, never], tmp_path / "report")
        assert (
            f"| {stream.config.name} | challengers | mae |" in (tmp_path / "report" / "table.md").read_text()
        )
        assert (tmp_path / "report" / f"{stream.config.name}.png").stat().st_size > 10_000

    def test_what_was_true_before_and_is_again_needs_no_training(
        self, tmp_path: Path, mlflow_server: str
    ) -> None:
        stream = write_stream(tmp_path, changes=True, lasts=timedelta(days=10))
        short = Stream(replace(stream.config, name="recurs"), stream.rows, stream.windows)
        result = replay_one(short, "challengers", tmp_path / "recurs", mlflow_server)
        place = next(place for place, item in enumerate(result.windows) if item.window.start == CHANGE)
        fooled, over, after = result.windows[place : place + 3]
        assert fooled.outcome == "retrain"
        assert over.model_version == fooled.promoted
        assert (over.outcome, over.promoted, after.model_version) == ("bring_back", "1", "1")
        assert after.value == pytest.approx(after.first_value)
        with Ledger.open(f"sqlite:///{tmp_path / 'recurs' / 'ledger.db'}") as ledger:
            assert ledger.world_since("recurs_challengers") is None  # all rows count again
            assert ledger.open_retraining("recurs_challengers") is None
            assert ledger.former_champions("recurs_challengers") == [fooled.promoted]

    @pytest.mark.parametrize("lasts", [10, 99])
    def test_a_trial_keeps_a_change_from_costing_a_second_window(
        self, tmp_path: Path, mlflow_server: str, lasts: int
    ) -> None:
        stream = write_stream(tmp_path, changes=True, lasts=timedelta(days=lasts))
        tried = Stream(replace(stream.config, name=f"tried_{lasts}"), stream.rows, stream.windows[:8])
        result = replay_one(tried, "challengers", tmp_path / "tried", mlflow_server, trial=0.1)
        place = next(place for place, item in enumerate(result.windows) if item.window.start == CHANGE)
        fooled, over = result.windows[place : place + 2]
        assert fooled.promoted
        if lasts == 10:  # it did not last: the model of it answered nobody
            assert (over.taken_back, over.model_version) == (fooled.promoted, "1")
            assert over.value == pytest.approx(over.first_value)
        else:  # the version before it answered the first tenth
            assert (over.taken_back, over.model_version) == (None, fooled.promoted)
            assert over.value < 0.5 * over.first_value
        with Ledger.open(f"sqlite:///{tmp_path / 'tried' / 'ledger.db'}") as ledger:
            since = ledger.world_since(f"tried_{lasts}_challengers")
        assert since == (None if lasts == 10 else CHANGE)

    def test_where_nothing_changes_nobody_is_promoted(self, tmp_path: Path, mlflow_server: str) -> None:
        stream = write_stream(tmp_path, changes=False)
        result = replay_one(stream, "challengers", tmp_path / "challengers", mlflow_server)
        assert result.promotions == 0
        assert result.value == pytest.approx(result.first_value)

    def test_where_retraining_hurts_nobody_is_promoted(self, tmp_path: Path, mlflow_server: str) -> None:
        (world,) = [one for one in hurting_streams.WORLDS if one.draw is hurting_streams.seasons]
        config = StreamConfig.read(hurting_streams.write_stream(world, 0, tmp_path, windows=5))
        linear = replace(config, estimator="sklearn.linear_model.Ridge", estimator_params={})
        stream = Stream.load(linear, tmp_path)
        blind = replay_one(stream, "always", tmp_path / "always", mlflow_server)
        result = replay_one(stream, "challengers", tmp_path / "challengers", mlflow_server)
        assert blind.value > 1.2 * blind.first_value
        assert result.value <= 1.01 * result.first_value
        assert result.trainings >= 4

    def test_all_rows_alike_after_every_window(self, tmp_path: Path, mlflow_server: str) -> None:
        stream = write_stream(tmp_path, changes=False)
        short = Stream(replace(stream.config, name="alike"), stream.rows, stream.windows[:6])
        result = replay_one(short, "always_all", tmp_path / "alike", mlflow_server)
        assert (result.promotions, result.trainings) == (2, 2)
        with Ledger.open(f"sqlite:///{tmp_path / 'alike' / 'ledger.db'}") as ledger:
            trained = ledger.entries(kind=EntryKind.TRAINING, limit=2)
        assert {entry.payload["training"]["start"][:10] for entry in trained} == {"2020-01-01"}

    def test_a_gate_lets_through_what_is_better_on_the_newest_half(
        self, tmp_path: Path, mlflow_server: str
    ) -> None:
        stream = write_stream(tmp_path, changes=True)
        moved = pl.col("at") >= CHANGE
        rows = stream.rows.with_columns(
            [pl.when(moved).then(pl.col(name) + 9.0).otherwise(pl.col(name)) for name in ("distance", "hour")]
        )
        short = Stream(replace(stream.config, name="gated"), rows, stream.windows[2:7])
        result = replay_one(short, "gated", tmp_path / "gated", mlflow_server)
        promoted = [item for item in result.windows if item.promoted]
        assert [item.window.start for item in promoted] == [CHANGE]
        with Ledger.open(f"sqlite:///{tmp_path / 'gated' / 'ledger.db'}") as ledger:
            (training,) = ledger.entries(kind=EntryKind.TRAINING, limit=1)
        assert training.payload["holdout"] == {
            "start": "2020-02-25T00:00:00Z",
            "end": "2020-03-01T00:00:00Z",
        }

    def test_a_policy_of_your_own_decides(self, tmp_path: Path, mlflow_server: str) -> None:
        stream = write_stream(tmp_path, changes=True)
        result = replay_one(stream, "airflow_mlops.replay.policies:always", tmp_path / "own", mlflow_server)
        assert result.promotions == len(result.windows) - 1

    def test_a_policy_of_your_own_sees_all_that_there_is_to_see(
        self, tmp_path: Path, mlflow_server: str
    ) -> None:
        stream = write_stream(tmp_path, changes=False)
        short = Stream(replace(stream.config, name="seen"), stream.rows, stream.windows[:5])
        result = replay_one(short, f"{__name__}:sees_everything", tmp_path / "own", mlflow_server)
        assert result.windows[0].reason.endswith("seen")


def sees_everything(evidence: Sequence[WindowEvidence], *_: Any, **__: Any) -> list[RetrainingDecision]:
    assert all(item.performance and item.drift and item.challengers for item in evidence)
    return [
        RetrainingDecision(window=item.window, outcome=Outcome.NOTHING, reason="seen") for item in evidence
    ]


@pytest.mark.parametrize(
    ("policies", "files", "why"),
    [
        (["never", "nevermore"], ["fares.toml"], "'nevermore' is not an import path"),
        (["never", "math:hypothesis"], ["fares.toml"], "'math' has no 'hypothesis'"),
        (["never"], ["fares.toml", "fares.toml"], "two streams have the name fares"),
    ],
)
def test_mistakes_are_told_before_anything_is_trained(
    tmp_path: Path, policies: list[str], files: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_stream(tmp_path, changes=False)
    workspace = tmp_path / "replay"
    assert run([tmp_path / file for file in files], policies=policies, workspace=workspace) == 1
    assert logging.getLogger("airflow_mlops").level == logging.NOTSET  # what comes after it is heard
    assert why in capsys.readouterr().out
    assert not workspace.exists()


class TestHurtingStreams:
    @pytest.mark.parametrize("world", hurting_streams.WORLDS, ids=lambda world: world.name)
    def test_they_are_what_a_replay_takes(self, tmp_path: Path, world: hurting_streams.World) -> None:
        path = hurting_streams.write_stream(world, 1, tmp_path)
        stream = Stream.load(StreamConfig.read(path), tmp_path)
        rows = [stream.inside(window).height for window in stream.windows]
        assert rows == [world.reference_rows] + hurting_streams.WINDOWS * [world.rows]
        assert stream.rows["target"].is_finite().all()
        assert hurting_streams.make_stream(world, 1).equals(hurting_streams.make_stream(world, 1))
        assert world.why.endswith(".")


class TestStream:
    def test_windows_of_days_begin_with_the_first_row(self, tmp_path: Path) -> None:
        stream = write_stream(tmp_path, changes=False)
        assert stream.windows[0].start == datetime(2020, 1, 1, tzinfo=UTC)
        assert len(stream.later) == len(stream.windows) - 3
        assert sum(stream.inside(window).height for window in stream.windows) == stream.rows.height

    def test_a_shuffled_stream_holds_the_same_rows_at_other_times(self, tmp_path: Path) -> None:
        stream = write_stream(tmp_path, changes=True)
        dealt = Stream.load(stream.config, tmp_path, shuffle=1)
        assert dealt.rows["at"].equals(stream.rows["at"])
        assert not dealt.rows["fare"].equals(stream.rows["fare"])
        assert (
            dealt.rows.sort("fare", "distance")
            .drop("at", "replay_id")
            .equals(stream.rows.sort("fare", "distance").drop("at", "replay_id"))
        )
        before, after = (dealt.inside(dealt.windows[number])["fare"].mean() for number in (0, -1))
        assert before == pytest.approx(after, rel=0.1)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (("fares.parquet", "other.parquet"), "there is no such file"),
            (('target = "fare"', 'target = "tip"'), "has no column tip"),
            (('window = "10d"', 'window = "week"'), "give 'month', or days"),
            (("reference = 3", "reference = 30"), "at least one more is needed"),
            (('metric = "mae"', 'metrik = "mae"'), "unknown: metrik"),
            (("reference = 3", "reference = []"), "describes no stream"),
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path: Path, change: tuple[str, str], message: str) -> None:
        write_stream(tmp_path, changes=False)
        path = tmp_path / "fares.toml"
        path.write_text(CONFIG.replace(*change))
        with pytest.raises(ValueError, match=message):
            Stream.load(StreamConfig.read(path), tmp_path)
