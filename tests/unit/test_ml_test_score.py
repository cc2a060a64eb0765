from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import pytest

from airflow_mlops.cli import main
from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.comparison.artifact import ArtifactFacts, ArtifactLimits, judge_artifact
from airflow_mlops.core.comparison.evaluation import compare_models
from airflow_mlops.core.comparison.fairness import FairnessReport, GroupRates
from airflow_mlops.core.comparison.predictions import Predictions
from airflow_mlops.core.comparison.promotion import (
    Check,
    Outcome as CheckOutcome,
    PromotionPolicy,
    decide_promotion,
)
from airflow_mlops.core.comparison.slices import SliceReport
from airflow_mlops.core.data.dataset import DatasetVersion
from airflow_mlops.core.decision.challengers import ChallengerCheck, Contender
from airflow_mlops.core.decision.retraining import Outcome
from airflow_mlops.core.ml_test.facts import ModelFacts, RunFacts
from airflow_mlops.core.ml_test.ml_test_rules import score_facts
from airflow_mlops.core.ml_test.ml_test_score import (
    Evidence,
    Finding,
    ScorePolicy,
    TestPoints,
    add_up,
    interpret,
)
from airflow_mlops.core.ml_test.ml_tests import TESTS, find_test
from airflow_mlops.core.ml_test.score_page import describe_score
from airflow_mlops.exceptions import ModelVersionNotFoundError
from airflow_mlops.ledger import EntryKind, Ledger
from airflow_mlops.services import Services
from airflow_mlops.steps.challengers import ChallengersResult
from airflow_mlops.steps.evaluate import EvaluateResult
from airflow_mlops.steps.ml_test_score import attest, score_model
from airflow_mlops.steps.train import TrainResult
from airflow_mlops.steps.validate import ValidateResult
from tests.conftest import REPOSITORY
from tests.unit.test_ledger import START, entry, url, window
from tests.unit.test_timeline import decided, drift, grade

__all__ = ["url"]

TABLE = "s3://tables/trips"
DATASET = DatasetVersion(
    uri=TABLE, version=1, dataset_digest="sha256:1", row_count=9, columns={"x": "double"}
)
#: The newest window of these tests, and the time of the score.
NEWEST = 30
NOW = window(NEWEST).end + timedelta(hours=1)
LINK = "https://wiki.example/review-12"


class World:
    """A ledger in which version 2 of ``m`` was made champion by hand; nothing else is known."""

    def __init__(self, url: str) -> None:
        self.url, self.count = url, 0
        self.services = Services(ledger_url=url)
        with Ledger.open(url) as self.ledger:
            self.promote("2", verdict=None)

    def write(
        self,
        kind: EntryKind,
        payload: dict[str, Any],
        *,
        subject: str | None = None,
        index: int | None = None,
        at: datetime | None = None,
        actor: str = "monitor/scheduled__2024/task",
        model_name: str | None = "m",
    ) -> None:
        self.count += 1
        new = entry(kind, f"{kind}|{self.count}", index=index, **payload)
        at = at or (window(index).end if index is not None else NOW - timedelta(days=1))
        with Ledger.open(self.url) as ledger:
            ledger.record(replace(new, subject=subject, actor=actor, recorded_at=at, model_name=model_name))

    def promote(
        self,
        version: str,
        *,
        verdict: str | None = "promote",
        actor: str = "retrain/asset_triggered__1/promote",
        decision_key: str | None = None,
    ) -> None:
        self.write(EntryKind.REGISTRATION, {"run_id": f"run-{version}"}, subject=version)
        payload = {
            "alias": "champion",
            "model_version": version,
            "verdict": verdict,
            "evaluated_run_id": f"run-{version}" if verdict else None,
            "decision_key": decision_key,
        }
        new = entry(EntryKind.PROMOTION, f"p{version}", **payload)
        new = replace(new, subject=version, actor=actor, recorded_at=NOW - timedelta(days=2))
        with Ledger.open(self.url) as ledger:
            ledger.move_alias(
                model_name="m",
                alias="champion",
                model_version=version,
                expected_version=ledger.aliases("m").get("champion"),
                entry=new,
            )

    def check(
        self,
        make: Callable[..., Any],
        *indexes: int,
        actor: str = "monitor/scheduled__2024/task",
        **other: Any,
    ) -> None:
        for index in indexes:
            made = make(index, **other)
            self.write(made.kind, made.payload, index=index, actor=actor)

    def train(self, run: str, *, at: datetime | None = None, **other: Any) -> None:
        result = TrainResult(
            **{
                "model_name": "m",
                "run_id": run,
                "run_url": "http://mlflow/run",
                "model_id": None,
                "package_digest": f"sha256:{run}",
                "serving_form": "onnx",
                "serving_reason": "",
                "dataset": DATASET,
                "training": window(0),
                "holdout": window(1),
                "training_rows": 9,
                "holdout_rows": 3,
                "estimator": f"lib.{run}",
                "estimator_params": {},
                "validation_value": None,
                "trials": 0,
                "metric": "mae",
                "metric_value": 0.5,
                "training_digest": f"sha256:{other.get('estimator', run)}",
                "reused": False,
            }
            | other
        )
        self.write(EntryKind.TRAINING, to_dict(result), subject=run, at=at)

    def evaluate(
        self,
        run: str,
        *,
        better: float = 0.5,
        actor: str = "retrain/asset_triggered__1/evaluate",
        limit: float | None = 0.5,
        **kept: Any,
    ) -> None:
        result = evaluation(run, better=better, limit=limit)
        self.write(EntryKind.EVALUATION, to_dict(replace(result, **kept)), subject=run, actor=actor)

    def validate(self, *indexes: int, **other: Any) -> None:
        for index in indexes:
            result = ValidateResult(
                dataset=DATASET,
                window=window(index),
                success=True,
                suite_name="s",
                row_count=9,
                evaluated=4,
                failed=0,
                failures=(),
                engines={},
                headline="all held",
            )
            payload = to_dict(replace(result, **other))
            self.write(EntryKind.VALIDATION, payload, index=index, subject=TABLE, model_name=None)

    def attest(self, test_id: str, **other: Any) -> None:
        given = {"by": "Anna", "evidence": LINK, "now": NOW - timedelta(days=1)} | other
        attest("m", self.services, test_id=test_id, **given)

    def points(self, now: datetime = NOW, policy: ScorePolicy | None = None) -> dict[str, TestPoints]:
        return {one.test_id: one for one in score_model("m", self.services, now=now, policy=policy).tests}


def evaluation(run: str, *, better: float, limit: float | None) -> EvaluateResult:
    """What the real comparison concludes on rows on which the challenger errs by ``1 - better`` of the champion's error."""
    noise = np.random.default_rng(0).normal(size=400)
    report = compare_models(
        target=np.zeros(400),
        challenger=Predictions(values=noise * (1.0 - better)),
        champion=Predictions(values=noise),
        baselines={"a simple guess": Predictions(values=noise * 1.2)},
        metrics=["mae"],
    )
    slices = SliceReport(loss="mae", looked_at=4, worst=(), broken=())
    rates = tuple(GroupRates(group=name, row_count=200, mean_loss=1.0) for name in "ab")
    groups = (FairnessReport(column="area", positive=None, groups=rates, loss_ratio=1.1),)
    artifact = ArtifactFacts(size_mb=2.0, cold_start_seconds=1.0, p99_milliseconds=0.5, memory_mb=90.0)
    decision = decide_promotion(
        report,
        PromotionPolicy(maximum_group_difference=limit),
        slices=slices,
        groups=groups,
        further=[judge_artifact(artifact, ArtifactLimits())],
    )
    return EvaluateResult(
        model_name="m",
        run_id=run,
        run_url="",
        evaluation_url="",
        champion_version="1",
        dataset=DATASET,
        window=window(1),
        verdict=decision.verdict,
        reason=decision.reason,
        checks=decision.checks,
        report=report,
        slices=slices,
        groups=groups,
        artifact=artifact,
    )


def aged(index: int, *, since: int = 5) -> Any:
    """A challenger check with two models of a recipe, the older one trained until window ``since``."""
    contenders = (
        Contender(version="4", recipe="recent", trained_until=window(since).start, loss=2.0),
        Contender(version="5", recipe="recent", trained_until=window(5).start, loss=1.5),
    )
    check = ChallengerCheck(
        window=window(index), row_count=9, champion="2", simple_loss=4.0, contenders=contenders, gaps=()
    )
    result = ChallengersResult(model_name="m", window=window(index), metric="mae", check=check, reason="")
    return replace(entry(EntryKind.CHALLENGER_CHECK, "c", index=index), payload=to_dict(result))


def versions(world: World) -> None:
    for index, version in enumerate(["1", "2", "3"], start=NEWEST - 2):
        world.check(grade, index, model_version=version, reference_value=float(index), value=index + 1.0)


def rolled_back(world: World) -> None:
    actor = "rollback/manual__1/back"
    payload = {"alias": "champion", "model_version": "1", "previous_version": "2"}
    world.write(EntryKind.ROLLBACK, payload, subject="1", actor=actor, at=NOW - timedelta(days=5))
    world.write(
        EntryKind.DEPLOYMENT, {}, subject="1", actor=actor, at=NOW - timedelta(days=5) + timedelta(minutes=3)
    )


def invariants(world: World) -> None:
    world.train("run-2")
    world.validate(NEWEST, NEWEST - 1)
    world.check(drift, NEWEST, NEWEST - 1)


def repeated(world: World) -> None:
    for number in range(2):
        for run in ("a", "b"):
            world.train(f"{run}-{number}", estimator=f"lib.{number}")


def released(world: World) -> None:
    world.evaluate("run-3")
    world.promote("3")


def stable(world: World) -> None:
    world.train("run-2")
    world.check(grade, NEWEST, NEWEST - 1)


#: What gives each test of the ledger its whole point.
ENOUGH: dict[str, Callable[[World], None]] = {
    "data-1": lambda world: (world.train("run-2"), world.validate(NEWEST, NEWEST - 1)),  # type: ignore[dict-item]
    "model-2": versions,
    "model-3": lambda world: world.train("run-2", trials=20),
    "model-4": lambda world: world.check(aged, NEWEST, NEWEST - 1, since=3),
    "model-5": lambda world: world.evaluate("run-2"),
    "model-6": lambda world: world.evaluate("run-2"),
    "model-7": lambda world: world.evaluate("run-2"),
    "infra-1": repeated,
    "infra-4": released,
    "infra-7": rolled_back,
    "monitor-2": invariants,
    "monitor-3": lambda world: world.check(drift, NEWEST, NEWEST - 1),
    "monitor-4": lambda world: world.check(decided, NEWEST, NEWEST - 1),
    "monitor-5": stable,
    "monitor-6": lambda world: world.evaluate("run-2"),
    "monitor-7": lambda world: world.check(grade, NEWEST, NEWEST - 1),
}
#: And those that MLflow has a part in.
OF_MLFLOW = {"data-2", "model-1", "infra-5"}
ATTESTED = {test.test_id for test in TESTS if test.attestable} - {"model-1"}


@pytest.fixture
def world(url: str) -> Iterator[World]:
    return World(url)


def test_there_are_28_tests_in_four_parts_of_seven() -> None:
    assert [test.test_id for test in TESTS] == [
        f"{part}-{number}" for part in ("data", "model", "infra", "monitor") for number in range(1, 8)
    ]
    assert {*ENOUGH} | OF_MLFLOW | ATTESTED == {test.test_id for test in TESTS}


def test_no_point_is_given_for_free(world: World) -> None:
    score = score_model("m", world.services, now=NOW)
    assert {one.points for one in score.tests} == {0.0}
    assert not any(one.evidence for one in score.tests if one.test_id not in {"infra-4"})
    assert all(one.missing for one in score.tests)
    assert (score.score, score.model_version) == (0.0, "2")
    assert score.interpretation == "more of a research project than a productionized system"


@pytest.mark.parametrize("test_id", ENOUGH)
def test_evidence_gives_the_point(world: World, test_id: str) -> None:
    assert world.points()[test_id].points == 0.0
    ENOUGH[test_id](world)
    told = world.points()[test_id]
    assert told.points == 1.0, told.sentence
    assert told.evidence
    assert told.missing is None
    assert all(one.source.startswith("ledger entry ") for one in told.evidence)


@pytest.mark.parametrize("test_id", sorted(ATTESTED))
def test_a_persons_word_gives_half_and_a_job_the_whole(world: World, test_id: str) -> None:
    world.attest(test_id, now=NOW - timedelta(days=3))
    told = world.points()[test_id]
    assert told.points == 0.5
    assert told.sentence == "done by hand and written down, says Anna on 2024-01-29, good until 2025-01-28"
    assert told.evidence[0].source == LINK
    world.attest(test_id, automated=True)
    told = world.points()[test_id]
    assert (told.points, told.missing) == (1.0, None)


def test_a_persons_word_expires(world: World) -> None:
    world.attest("data-5", now=NOW, days=30)
    assert world.points(NOW + timedelta(days=29))["data-5"].points == 0.5
    expired = world.points(NOW + timedelta(days=30))["data-5"]
    assert expired.points == 0.0
    assert expired.sentence == "Anna vouched for it on 2024-02-01; that expired on 2024-03-02"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"test_id": "data-9"}, "there is no test 'data-9'; there are data-1"),
        (
            {"test_id": "monitor-7"},
            "not taken on anybody's word, as it is measured here: schedule CheckPerformance",
        ),
        ({"by": " "}, "vouched for by nobody"),
        ({"evidence": "trust me"}, "'trust me' is no link"),
        ({"evidence": "https://      "}, "is no link"),
        ({"evidence": "https://[oops/review"}, "is no link"),
        (
            {"evidence": "https://anna:s3cret@ci.example/job"},
            "at ci.example holds a login: give the address without",
        ),
        ({"days": 0.0}, "can't count for 0 days"),
        ({"days": math.nan}, "can't count for nan days"),
        ({"days": 1e12}, "give more than 0 and at most 36,525"),
    ],
)
def test_what_is_no_attestation_is_refused(world: World, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        world.attest(**({"test_id": "data-5"} | given))
    with Ledger.open(world.url) as ledger:
        assert not ledger.entries(kind=EntryKind.ATTESTATION)


@pytest.mark.parametrize("test_id", ["data-1", "model-2", "model-4", "monitor-3", "monitor-4", "monitor-7"])
def test_stale_evidence_is_not_recurring(world: World, test_id: str) -> None:
    ENOUGH[test_id](world)
    world.check(grade, *range(NEWEST + 1, NEWEST + 4), measured=False)
    old = world.points(window(NEWEST + 3).end)[test_id]
    assert old.points == 0.5
    assert "stale, so not recurring" in old.sentence
    assert old.missing


def test_evidence_grows_stale_with_the_days_too(world: World) -> None:
    ENOUGH["monitor-7"](world)
    assert world.points(NOW + timedelta(days=61))["monitor-7"].points == 1.0
    old = world.points(NOW + timedelta(days=63))["monitor-7"]
    assert old.points == 0.5
    assert "63 days ago; stale, so not recurring" in old.sentence


@pytest.mark.parametrize("test_id", ["model-3", "model-5", "infra-7", "infra-1"])
def test_what_was_found_of_a_version_counts_for_a_year(world: World, test_id: str) -> None:
    ENOUGH[test_id](world)
    assert world.points(NOW + timedelta(days=300))[test_id].points == 1.0
    old = world.points(NOW + timedelta(days=400))[test_id]
    assert old.points == 0.5
    assert "stale" in old.sentence


def test_once_is_not_recurring(world: World) -> None:
    world.check(grade, NEWEST)
    told = world.points()["monitor-7"]
    assert (told.points, told.sentence.partition(": ")[2]) == (0.5, "once so far, which is not recurring")


@pytest.mark.parametrize(
    ("actor", "points"),
    [
        ("monitor/scheduled__2024-01-31/check_drift", 1.0),
        ("monitor/asset_triggered__2024-01-31/check_drift", 1.0),
        ("monitor/operator_triggered__2024-01-31/check_drift", 1.0),
        ("monitor/manual__2024-01-31/check_drift", 0.5),
        ("monitor/backfill__2024-01-31/check_drift", 0.5),
        ("monitor/my_own_id/check_drift", 0.5),
        ("anna", 0.5),
    ],
)
def test_a_check_by_hand_is_half(world: World, actor: str, points: float) -> None:
    world.check(drift, NEWEST, NEWEST - 1, actor=actor)
    told = world.points()["monitor-3"]
    assert told.points == points
    assert (f"by hand: {actor}" in told.sentence) == (points < 1.0)


def test_what_only_other_versions_had_is_half(world: World) -> None:
    world.train("run-1", trials=20)
    told = world.points()["model-3"]
    assert told.points == 0.5
    assert "not for version 2, which serves" in told.sentence


def test_a_gate_in_a_run_by_hand_counts_from_the_second_on(world: World) -> None:
    by_hand = "train/manual__1/evaluate"
    world.evaluate("run-2", actor=by_hand)
    assert world.points()["model-5"].points == 0.5
    world.evaluate("run-1", actor=by_hand)
    assert world.points()["model-5"].points == 1.0


def test_an_evaluation_that_a_person_wrote_is_half(world: World) -> None:
    world.evaluate("run-2", actor="anna")
    told = world.points()["monitor-6"]
    assert told.points == 0.5
    assert "by hand: anna" in told.sentence


def test_two_versions_are_too_few_for_a_correlation(world: World) -> None:
    world.check(grade, NEWEST, NEWEST - 1)
    told = world.points()["model-2"]
    assert told.points == 0.5
    assert "of 1 versions, 3 are needed" in told.sentence


def test_promises_that_do_not_come_true_are_a_concern(world: World) -> None:
    for place, version in enumerate("123"):
        index = NEWEST - place
        world.check(grade, index, model_version=version, reference_value=float(place), value=9.0 - place)
    told = world.points()["model-2"]
    assert told.points == 1.0
    assert told.sentence.endswith("correlation over 3 versions: -1.00")
    assert told.concern


def test_models_of_one_age_tell_nothing_of_staleness(world: World) -> None:
    world.check(aged, NEWEST, NEWEST - 1, since=5)
    assert world.points()["model-4"].points == 0.0


def test_a_recipe_of_one_model_tells_nothing_of_staleness(world: World) -> None:
    """As after the first window of `retrain_on_drift`: of each recipe there is one model."""

    def single(index: int) -> Any:
        contenders = (
            Contender(version="4", recipe="recent", trained_until=window(5).start, loss=2.0),
            Contender(version="5", recipe="all", trained_until=window(5).start, loss=1.5),
        )
        check = ChallengerCheck(
            window=window(index), row_count=9, champion="2", simple_loss=4.0, contenders=contenders, gaps=()
        )
        result = ChallengersResult(model_name="m", window=window(index), metric="mae", check=check, reason="")
        return replace(entry(EntryKind.CHALLENGER_CHECK, "c", index=index), payload=to_dict(result))

    world.check(single, NEWEST)
    assert world.points()["model-4"].points == 0.0


def test_a_group_comparison_without_a_limit_stops_nothing(world: World) -> None:
    world.evaluate("run-2", limit=None)
    told = world.points()["model-7"]
    assert told.points == 0.5
    assert told.sentence.endswith("no limit is set")


@pytest.mark.parametrize(
    ("test_id", "without"),
    [
        ("model-5", {"checks": ()}),
        ("model-6", {"slices": None}),
        ("model-7", {"groups": ()}),
        ("monitor-6", {"artifact": None}),
    ],
)
def test_an_evaluation_without_the_check_gives_nothing(
    world: World, test_id: str, without: dict[str, Any]
) -> None:
    world.evaluate("run-2", **without)
    assert world.points()[test_id].points == 0.0


def test_a_champion_worse_than_a_guess_is_a_concern(world: World) -> None:
    world.evaluate("run-2", better=-0.5)
    told = world.points()["model-5"]
    assert told.points == 1.0
    assert told.concern is not None
    assert told.concern.startswith("no better: MAE")


def test_who_was_promoted_past_the_gate_was_not_validated(world: World) -> None:
    released(world)
    assert world.points()["infra-4"].points == 1.0
    world.promote("4", verdict=None)
    told = world.points()["infra-4"]
    assert told.points == 0.0
    assert "version 4 serves without an evaluation that let it through" in told.sentence
    world.promote("5")  # says so, but no such evaluation is in the ledger
    assert world.points()["infra-4"].points == 0.0


@pytest.mark.parametrize(
    ("promote_on", "points"), [("predecessors", 0.5), ("untested", 0.0), ("held_out", 0.0)]
)
def test_a_champion_that_was_not_tested_itself_is_half_by_its_predecessors(
    world: World, promote_on: str, points: float
) -> None:
    made = decided(NEWEST, Outcome.RETRAIN)
    with Ledger.open(world.url) as ledger:
        ledger.record(replace(made, payload=made.payload | {"promote_on": promote_on}))
    checks = (Check(name="predecessors", outcome=CheckOutcome.PASS, reason="its predecessors won"),)
    world.evaluate("run-3", checks=checks)
    world.promote("3", decision_key=made.key)
    told = world.points()["infra-4"]
    assert told.points == points
    assert told.sentence.startswith("version 3 was not tested itself")


def test_a_champion_that_came_back_was_compared_with_every_model(world: World) -> None:
    released(world)
    back = decided(NEWEST, Outcome.BRING_BACK)
    with Ledger.open(world.url) as ledger:
        ledger.record(back)
    world.promote("4", decision_key=back.key)
    told = world.points()["infra-4"]
    assert told.points == 1.0
    assert "an earlier champion comes back where it did much better again" in told.sentence


def test_a_training_that_came_out_otherwise_is_not_reproducible(world: World) -> None:
    repeated(world)
    world.train("c-1", estimator="lib.1", metric_value=0.7)
    told = world.points()["infra-1"]
    assert told.points == 0.0
    assert told.concern == "the same training came to different models: mae 0.7 and 0.5"


def test_a_repeated_training_once_is_half(world: World) -> None:
    world.train("a", estimator="lib.same")
    world.train("b", estimator="lib.same")
    world.train("c", estimator="lib.same", dataset=replace(DATASET, dataset_digest="sha256:2"))
    told = world.points()["infra-1"]
    assert (told.points, told.sentence.partition("; ")[2]) == (0.5, "once is not recurring")


def test_models_of_other_weights_or_columns_are_no_repetition(world: World) -> None:
    """As `retrain_on_drift` trains challengers: the same rows and parameters, by two recipes."""
    world.train("recent", recipe="recent", training_digest="sha256:recent")
    world.train("all", recipe="all", training_digest="sha256:all", metric_value=0.7)
    world.train("also", recipe="also", training_digest="sha256:also")
    told = world.points()["infra-1"]
    assert (told.points, told.concern, told.sentence) == (0.0, None, "no training was ever repeated")


def test_a_training_that_does_not_say_how_it_was_made_is_nobodys_repetition(world: World) -> None:
    repeated(world)
    world.train("old", estimator="lib.1", training_digest=None, metric_value=0.7)
    assert world.points()["infra-1"].points == 1.0


def test_a_window_that_was_not_compared_tells_nothing(world: World) -> None:
    result = ChallengersResult(
        model_name="m", window=window(NEWEST), metric="mae", check=None, reason="not compared"
    )
    world.write(EntryKind.CHALLENGER_CHECK, to_dict(result), index=NEWEST)
    assert world.points()["model-4"].points == 0.0


@pytest.mark.parametrize("name", ["maximum_windows", "maximum_days", "release_days", "attestation_days"])
@pytest.mark.parametrize("value", [0, -1, math.nan])
def test_a_policy_by_which_nothing_counts_names_the_field(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is .*give more than 0"):
        ScorePolicy(**{name: value})


def test_a_rollback_that_never_served_is_half(world: World) -> None:
    payload = {"alias": "champion", "model_version": "1", "previous_version": "2"}
    world.write(EntryKind.ROLLBACK, payload, subject="1")
    assert world.points()["infra-7"].sentence.endswith("but was never deployed again")
    assert world.points()["infra-7"].points == 0.5


def test_a_deployment_that_is_tried_first_is_half_a_canary(world: World) -> None:
    world.write(EntryKind.DEPLOYMENT, {}, subject="1")
    assert world.points()["infra-6"].points == 0.0
    world.write(EntryKind.DEPLOYMENT, {}, subject="2")
    assert world.points()["infra-6"].points == 0.5


def test_a_rollout_that_was_passed_under_traffic_is_a_canary(world: World) -> None:
    world.write(EntryKind.DEPLOYMENT, {}, subject="2")
    for what in ("entered", "looked"):
        world.write(EntryKind.ROLLOUT, {"strategy": "canary", "event": {"what": what}}, subject="2")
    assert world.points()["infra-6"].points == 0.5
    world.write(EntryKind.ROLLOUT, {"strategy": "canary", "event": {"what": "finished"}}, subject="2")
    assert world.points()["infra-6"].points == 1.0
    assert "(canary), and passed on" in world.points()["infra-6"].sentence


@pytest.mark.parametrize("side", ["tables", "requests"])
def test_one_side_of_the_invariants_is_half(world: World, side: str) -> None:
    world.train("run-2")
    if side == "tables":
        world.validate(NEWEST, NEWEST - 1)
    else:
        world.check(drift, NEWEST, NEWEST - 1)
    assert world.points()["monitor-2"].points == 0.5


def test_a_suite_that_checks_nothing_and_another_table_count_for_nothing(world: World) -> None:
    world.validate(NEWEST, NEWEST - 1)  # of a table that no training of the model read
    assert world.points()["data-1"].points == 0.0
    world.train("run-2")
    assert world.points()["data-1"].points == 1.0
    world.validate(NEWEST + 1, evaluated=0)
    assert world.points()["data-1"].sentence.endswith("last for [2024-01-31, 2024-02-01)")


def test_broken_expectations_are_a_concern(world: World) -> None:
    ENOUGH["data-1"](world)
    world.validate(NEWEST, success=False)
    told = world.points()["data-1"]
    assert told.points == 1.0
    assert told.concern is not None
    assert told.concern.startswith("the newest rows broke it")


@pytest.mark.parametrize(("trusted", "points"), [(True, 1.0), (False, 0.0)])
def test_without_labels_only_trusted_estimates_count(world: World, trusted: bool, points: float) -> None:
    guessed = {"measured": False, "estimated": True, "estimated_value": 2.0, "estimate_trusted": trusted}
    world.check(grade, NEWEST, NEWEST - 1, **guessed)
    assert world.points()["monitor-7"].points == points


def explained(run: RunFacts, world: World) -> dict[str, TestPoints]:
    world.write(EntryKind.EXPLANATION, {"headline": "x"}, subject="run-2")
    seen: list[ModelFacts] = []
    score_model_facts(world, seen)
    return {one.test_id: one for one in score_facts(replace(seen[0], run=run), ScorePolicy()).tests}


def score_model_facts(world: World, seen: list[ModelFacts]) -> None:
    from airflow_mlops.steps import ml_test_score

    with Ledger.open(world.url) as ledger:
        seen.append(ml_test_score._facts(ledger, "m", world.services, NOW))


RUN = RunFacts(run_id="run-2", git_commit="abc" * 13, git_clean=True)


def test_explanations_need_their_artifacts(world: World) -> None:
    told = explained(RUN, world)
    assert [told[name].points for name in ("data-2", "infra-5")] == [0.5, 0.5]
    assert "the champion's run holds no explanation/importance.json" in told["data-2"].sentence
    assert world.points()["data-2"].sentence.endswith("MLflow was not asked: set AIRFLOW_MLOPS_TRACKING_URI")
    whole = explained(replace(RUN, importances={"x": (1.0, 0.1), "y": (0.1, 0.1)}, explained_rows=20), world)
    assert [whole[name].points for name in ("data-2", "infra-5")] == [1.0, 1.0]
    assert whole["data-2"].concern == "without effect beyond chance, so better left out: y"


def test_a_spec_is_reviewed_when_its_commit_is_clean_and_a_person_says_so(world: World) -> None:
    assert world.points()["model-1"].points == 0.0
    assert explained(RUN, world)["model-1"].points == 0.5
    world.attest("model-1", automated=True)
    assert explained(RUN, world)["model-1"].points == 1.0
    dirty = explained(replace(RUN, git_clean=False), world)["model-1"]
    assert dirty.points == 0.0
    assert "with changes that are not in it" in dirty.sentence
    assert explained(replace(RUN, git_commit=None), world)["model-1"].points == 0.0


def test_the_score_is_the_weakest_part() -> None:
    proof = (Evidence(source="x", at=NOW, by="y"),)
    findings = {
        test.test_id: Finding(
            points=0.5 if test.test_id.startswith("model") else 1.0, sentence="s", evidence=proof
        )
        for test in TESTS
    }
    score = add_up(ModelFacts(model_name="m", now=NOW, champion="2"), findings)
    assert score.parts == {"data": 7.0, "model": 3.5, "infra": 7.0, "monitor": 7.0}
    assert score.score == 3.5
    assert score.interpretation.startswith("strong levels")


def test_points_that_rest_on_nothing_can_not_be_made() -> None:
    with pytest.raises(ValueError, match="0 pieces of evidence"):
        Finding(points=0.5, sentence="trust me")
    with pytest.raises(ValueError, match=r"0\.7 points"):
        Finding(points=0.7, sentence="", evidence=(Evidence(source="x", at=NOW, by="y"),))


def test_every_band_of_the_paper_has_its_words() -> None:
    words = [interpret(score) for score in (0.0, 0.5, 1.0, 1.5, 2.5, 3.0, 4.0, 5.0, 5.5, 7.0)]
    assert [words.index(word) for word in words] == [0, 1, 1, 3, 4, 4, 6, 6, 8, 8]


def test_everything_known_is_the_best_score(world: World) -> None:
    """All at once, for version 3 that came by the gate."""
    released(world)
    for test_id, give in ENOUGH.items():
        if test_id != "infra-4":
            give(world)
    world.train("run-3", trials=20)
    world.write(EntryKind.EXPLANATION, {"headline": "x"}, subject="run-3")
    for test_id in [*ATTESTED, "model-1"]:
        world.attest(test_id, automated=True)
    seen: list[ModelFacts] = []
    score_model_facts(world, seen)
    known = RunFacts(
        run_id="run-3", git_commit="abc", git_clean=True, importances={"x": (1.0, 0.1)}, explained_rows=9
    )
    score = score_facts(replace(seen[0], run=known), ScorePolicy())
    assert [one.test_id for one in score.tests if one.points < 1.0] == []
    assert (score.score, score.interpretation) == (
        7.0,
        "exceptional levels of automated testing and monitoring",
    )


def test_the_page_says_what_is_missing_and_escapes_what_it_is_told(world: World) -> None:
    ENOUGH["monitor-7"](world)
    world.attest("data-5", by="<b>Anna</b>")
    page = describe_score(score_model("m", world.services, now=NOW))
    text, html = page.to_markdown(), page.to_html()
    assert "What is missing" in text
    assert "schedule DecideRetrainingOperator" in text
    assert "--attest data-3" in text
    assert "ledger entry" in text
    assert "<b>Anna" not in html
    assert "&lt;b&gt;Anna" in html


def test_every_remedy_names_what_exists() -> None:
    operators = (REPOSITORY / "airflow_mlops" / "operators").glob("*.py")
    known = {
        name
        for file in operators
        for name in re.findall(r"^class (\w+Operator)\(", file.read_text(), re.MULTILINE)
    }
    named = {word.strip("(),;:") for test in TESTS for word in test.remedy.split() if "Operator" in word}
    assert len(named) >= 8
    assert named <= known


def test_the_command(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AIRFLOW_MLOPS_TRACKING_URI", raising=False)
    base = ["score", "m", "--ledger", world.url]
    attesting = [*base, "--attest", "data-5", "--by", "Anna", "--evidence", LINK]
    assert main([*attesting, "--days", "90"]) == 0
    assert capsys.readouterr().out.startswith(f"Anna vouches for data-5 of m: {LINK}; it counts until 20")
    assert main(base) == 0
    told = capsys.readouterr().out
    assert told.startswith("ML Test Score of m (version 2): 0 of 7, more of a research project")
    assert "0.5  data-5     The data pipeline has appropriate privacy controls\n" in told
    assert main([*base, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"]["data"] == 0.5
    assert main([*base, "--html"]) == 0
    assert capsys.readouterr().out.startswith("<!doctype html>")
    assert main([*base, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("# m: ML Test Score")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--attest", "data-5", "--evidence", LINK], "give a name with --by"),
        (["--by", "Anna"], "belong to --attest"),
        (["--attest", "data-5", "--by", "Anna", "--evidence", LINK, "--html"], "one at a time"),
    ],
)
def test_the_command_says_what_is_wrong(
    world: World, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(["score", "m", "--ledger", world.url, *more]) == 1
    assert message in capsys.readouterr().err


def test_a_model_nobody_knows_is_an_error_not_a_zero(world: World) -> None:
    with pytest.raises(ModelVersionNotFoundError, match="no model named 'x'; known: m"):
        score_model("x", world.services, now=NOW)
    with pytest.raises(ModelVersionNotFoundError, match="no model named 'x'"):
        attest("x", world.services, test_id="data-5", by="Anna", evidence=LINK, now=START)
    assert find_test("data-5").attestable
