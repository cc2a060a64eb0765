"""Column roles, candidates and their search, pipelines, and the gate between the trained and the served form."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse
import skops.io
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer, TransformedTargetRegressor
from sklearn.decomposition import PCA
from sklearn.dummy import DummyRegressor
from sklearn.ensemble import (
    AdaBoostRegressor,
    BaggingRegressor,
    ExtraTreesRegressor,
    StackingRegressor,
    VotingRegressor,
)
from sklearn.feature_selection import RFE, SelectFromModel
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.tree import DecisionTreeRegressor

from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.comparison.metric import MetricValue
from airflow_mlops.core.comparison.metrics import evaluate_metric, require_decisive, resolve_metric
from airflow_mlops.core.data.dataset import DatasetVersion
from airflow_mlops.core.decision.retraining import TrainingPlan
from airflow_mlops.core.model.columns import ColumnRoles
from airflow_mlops.core.model.parity import ParityLimits, compare_forms
from airflow_mlops.core.model.signature import FieldSpec, ModelSignature
from airflow_mlops.core.model.simple_guess import best_constant
from airflow_mlops.core.model.tuning import Candidate, Range, Search, Trial, best_of, time_ordered_folds
from airflow_mlops.core.profiles.profile_format import REFERENCE_PROFILE_FILE, profile_from_json
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import InsufficientDataError, TransientError, UnsafeModelError
from airflow_mlops.integrations import halving, onnx, optuna, sklearn
from airflow_mlops.integrations.mlflow.copies import pinned_requirements
from airflow_mlops.integrations.sklearn import fitting
from airflow_mlops.integrations.sklearn.candidates import _distribution
from airflow_mlops.ledger.studies import studies_url
from airflow_mlops.operators.train import TrainModelOperator
from airflow_mlops.services import Services
from airflow_mlops.serving.model import TRUSTED_TYPES_VARIABLE, ServedModel, allowed_types, load_model
from airflow_mlops.serving.package import write_manifest
from airflow_mlops.steps import select
from airflow_mlops.steps.common import with_target
from airflow_mlops.steps.train import _task_key
from airflow_mlops.steps.training import model_package, spec as training_spec
from airflow_mlops.steps.training.code_version import code_version, dag_code_version
from airflow_mlops.steps.training.fit import choose_metric, require_measurable
from airflow_mlops.steps.training.record import write_evidence
from airflow_mlops.steps.training.rows import Split, row_weights, simple_prediction
from airflow_mlops.steps.training.spec import TrainResult, TrainSpec
from tests.unit.test_requests import Caller

COLUMNS = ColumnRoles(target="y", time="t", numeric=("a", "b"), categorical=("kind",), text=("note",))
SIGNATURE = ModelSignature(
    inputs=tuple(
        FieldSpec(name=name, type="number" if name in COLUMNS.numeric else "string")
        for name in COLUMNS.inputs
    ),
    output="y",
)
LIMITS = ParityLimits()


def rows(count: int = 600, *, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    kind = rng.choice(["red", "green", "blue", None], count, p=[0.4, 0.3, 0.2, 0.1])
    a, b = rng.normal(size=count), rng.exponential(size=count)
    b[rng.random(count) < 0.1] = np.nan
    y = 3.0 * a + np.where(kind == "red", 2.0, 0.0) + rng.normal(scale=0.1, size=count)
    start = datetime(2024, 1, 1, tzinfo=UTC)
    return pl.DataFrame(
        {
            "a": a,
            "b": b,
            "kind": kind.tolist(),
            "note": [f"ride number {i % 7} {'late' if i % 3 else 'early'}" for i in range(count)],
            "y": y,
            "t": [start + timedelta(hours=i) for i in range(count)],
        }
    )


def test_a_column_has_one_role() -> None:
    with pytest.raises(ValueError, match="'y' is given twice, as target and as numeric"):
        ColumnRoles(target="y", time="t", numeric=("a", "y"))
    with pytest.raises(ValueError, match="'id' is given twice, as numeric and as id"):
        ColumnRoles(target="y", time="t", numeric=("id",), id="id")
    with pytest.raises(ValueError, match="at least one input"):
        ColumnRoles(target="y", time="t")


@pytest.mark.parametrize("folds", [2, 3, 7])
def test_folds_always_validate_on_what_came_later(folds: int) -> None:
    times = np.sort(np.random.default_rng(0).integers(0, 60, size=500))  # many rows per instant
    cut = time_ordered_folds(times, folds)
    assert len(cut) == folds
    for learn, check in cut:
        assert times[learn].max() < times[check].min()
    assert np.array_equal(cut[-1][1][-1:], [499])
    assert len(cut[-1][0]) > len(cut[0][0])


def test_too_few_instants_to_fold_are_said() -> None:
    with pytest.raises(ValueError, match="10 training rows at 1 instants can't be cut into 3"):
        time_ordered_folds(np.zeros(10), 3)


def test_a_space_is_read_from_json() -> None:
    candidate = from_dict(
        Candidate,
        {
            "estimator": "a.b:C",
            "space": {"rate": {"low": 0.01, "high": 1, "log": True}, "depth": [3, None, "x"]},
        },
    )
    assert candidate.space == {"rate": Range(low=0.01, high=1.0, log=True), "depth": (3, None, "x")}
    assert candidate.name == "C"
    with pytest.raises(ValueError, match=r"space\.rate.*empty"):
        from_dict(Candidate, {"estimator": "a.b", "space": {"rate": {"low": 2, "high": 1}}})
    with pytest.raises(ValueError, match="can't begin at 0"):
        Range(low=0, high=1, log=True)


def test_estimator_and_candidates_exclude_each_other() -> None:
    spec: dict[str, Any] = {
        "dataset": "t",
        "model_name": "m",
        "target": "y",
        "numeric": ("a",),
        "time_column": "t",
    }
    one = Candidate(estimator="a.b")
    for wrong in ({}, {"estimator": "a.b", "candidates": (one,)}):
        with pytest.raises(ValueError, match="either estimator"):
            TrainSpec(**spec, **wrong).to_try()
    assert TrainSpec(**spec, estimator="a.b").how_to_search() is None
    assert TrainSpec(**spec, candidates=(one, one)).how_to_search() == Search()
    searched = replace(one, space={"x": (1, 2)})
    assert TrainSpec(**spec, candidates=(searched,)).how_to_search() == Search()


CANDIDATES = (
    Candidate(estimator="fake.Flat", params={"level": 5.0}),
    Candidate(estimator="fake.Bowl", space={"x": Range(low=-10.0, high=10.0), "kind": ("good", "bad")}),
)


def bowl(candidate: Candidate, fold: int) -> float:
    """Smallest at x = 3 with kind "good"."""
    if candidate.name == "Flat":
        return float(candidate.params["level"])
    penalty = 0.0 if candidate.params["kind"] == "good" else 50.0
    return (candidate.params["x"] - 3.0) ** 2 + penalty + 0.01 * fold


def run_search(
    storage: str | None, score: Any = bowl, *, seed: int = 1, **settings: Any
) -> tuple[Any, list[Trial]]:
    told: list[Trial] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = optuna.search(
            CANDIDATES,
            Search(**{"trials": 40, "folds": 3, **settings}),
            score,
            greater_is_better=False,
            study_name="study",
            storage_url=storage,
            seed=seed,
            on_trial=lambda _, trial: told.append(trial),
        )
    return found, told


def test_one_search_covers_several_estimators() -> None:
    found, told = run_search(None)
    assert found.best.name == "Bowl"
    assert found.best.space == {}
    assert found.best.params["kind"] == "good"
    assert found.best.params["x"] == pytest.approx(3.0, abs=1.0)
    assert {trial.candidate for trial in told[:2]} == {"Flat", "Bowl"}
    assert len(found.trials) == len(told) == 40
    pruned = [trial for trial in found.trials if trial.value is None]
    assert pruned, "trials that start badly are given up"
    assert all(len(trial.folds) < 3 for trial in pruned)


def killed(score: Callable[[Candidate, int], float], *, at: int) -> Callable[[Candidate, int], float]:
    """Give a score that ends the process, as far as a search can tell, instead of its ``at``-th fit."""
    calls = itertools.count(1)

    def dies(candidate: Candidate, fold: int) -> float:
        if next(calls) == at:
            raise KeyboardInterrupt
        return score(candidate, fold)

    return dies


def test_searches_with_neighboring_seeds_try_different_parameters() -> None:
    def tried(seed: int) -> set[Any]:
        found, _ = run_search(None, trials=12, seed=seed)
        return {trial.params["x"] for trial in found.trials if trial.candidate == "Bowl"}

    assert not tried(1) & tried(2)


def test_an_interrupted_search_goes_on_and_ends_as_one_that_ran_through(tmp_path: Path) -> None:
    whole, _ = run_search(f"sqlite:///{tmp_path}/whole.db", trials=12)
    storage = f"sqlite:///{tmp_path}/cut.db"
    with pytest.raises(KeyboardInterrupt):
        run_search(storage, killed(bowl, at=17), trials=12)
    resumed, told = run_search(storage, trials=12)
    assert 0 < len(told) < 12
    assert [trial.params for trial in resumed.trials] == [trial.params for trial in whole.trials]
    assert resumed.best == whole.best


def test_choices_of_several_values_are_tuples_in_every_trial_and_in_the_winner(tmp_path: Path) -> None:
    space = {"sizes": [[5], [5, 5]], "share": [1, 1.0], "same": [0.5, 1]}
    one = from_dict(Candidate, {"estimator": "e.E", "space": space})
    storage = f"sqlite:///{tmp_path}/sizes.db"
    seen: list[Any] = []

    def score(candidate: Candidate, fold: int) -> float:
        seen.append(candidate.params["sizes"])
        return len(candidate.params["sizes"]) + 2.0 * isinstance(candidate.params["share"], float)

    for trials in (3, 6):  # the second goes on with what the first one stored
        found = optuna.search(
            [one],
            Search(trials=trials, folds=2),
            score,
            greater_is_better=True,
            study_name="sizes",
            storage_url=storage,
            seed=0,
            on_trial=lambda _, trial: None,
        )
    assert {*seen} == {(5,), (5, 5)}
    assert found.best.params["sizes"] == (5, 5)
    assert isinstance(found.best.params["share"], float)  # 1.0 of the features are all of them, 1 is one
    assert {drawn.params["sizes"] for drawn in sklearn.draw(one, 4, 0)} == {(5,), (5, 5)}


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"low": 1, "high": 2, "step": 0.5}, r"space\.x\.range\.step: Unexpected"),
        ({"low": 1, "high": float("inf")}, "has no end to draw up to"),
        ({"low": 0.5, "high": 8, "log": True, "integer": True}, "a fraction at its end"),
        ({"low": 2, "high": 1}, "is empty"),
        (3, r"space\.x: give a list of choices, or a range"),
        ("svd", r"space\.x: give a list of choices, or a range"),
    ],
)
def test_a_space_that_says_something_else_than_was_meant_is_refused(part: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_dict(Candidate, {"estimator": "e.E", "space": {"x": part}})


@pytest.mark.parametrize("kind", [{}, {"integer": True}, {"log": True}, {"log": True, "integer": True}])
def test_a_range_of_one_value_is_that_value(kind: dict[str, bool]) -> None:
    one = from_dict(Candidate, {"estimator": "e.E", "space": {"x": {"low": 3, "high": 3} | kind}})
    assert [drawn.params for drawn in sklearn.draw(one, 5, 0)] == [{"x": 3}]
    found = optuna.search(
        [one],
        Search(trials=2, folds=2),
        lambda candidate, fold: float(candidate.params["x"]),
        greater_is_better=True,
        study_name="one",
        storage_url=None,
        seed=0,
        on_trial=lambda _, trial: None,
    )
    assert found.best.params == {"x": 3}


@pytest.mark.parametrize("last_fit", [1, 2, 4, 5])
def test_a_search_killed_in_its_first_trials_still_tries_every_candidate(
    last_fit: int, tmp_path: Path
) -> None:
    whole, _ = run_search(f"sqlite:///{tmp_path}/whole.db", trials=6)
    storage = f"sqlite:///{tmp_path}/cut.db"
    with pytest.raises(KeyboardInterrupt):
        run_search(storage, killed(bowl, at=last_fit), trials=6)
    resumed, _ = run_search(storage, trials=6)
    assert [(one.candidate, one.params) for one in resumed.trials] == [
        (one.candidate, one.params) for one in whole.trials
    ]
    assert resumed.best == whole.best


def test_logarithmic_integers_are_drawn_in_the_logarithm() -> None:
    state = np.random.RandomState(0)
    spread = _distribution(Range(low=1, high=1000, integer=True, log=True))
    numbers = [spread.rvs(random_state=state) for _ in range(2000)]
    assert {type(number) for number in numbers} == {int}
    assert (min(numbers), max(numbers)) == (1, pytest.approx(1000, rel=0.02))
    assert np.median(numbers) == pytest.approx(31, abs=6)  # evenly drawn it would be 500
    space = {"n": Range(low=1, high=1000, integer=True, log=True)}
    drawn = [one.params["n"] for one in sklearn.draw(Candidate(estimator="a.b", space=space), 50, 0)]
    assert len(set(drawn)) == len(drawn)  # no two the same
    ends = {"n": Range(low=2, high=3, integer=True, log=True)}
    assert {one.params["n"] for one in sklearn.draw(Candidate(estimator="a.b", space=ends), 50, 0)} == {2, 3}


@pytest.mark.parametrize("lack", [MemoryError("no room"), OSError(28, "No space left on device")])
def test_what_the_machine_lacks_is_held_against_no_parameters(tmp_path: Path, lack: Exception) -> None:
    """Else what was tried in that hour would be known as bad for good, and a retry would choose among the rest."""
    short = [True]

    def score(candidate: Candidate, fold: int) -> float:
        if short[0] and candidate.params.get("kind") == "bad":
            raise lack
        return bowl(candidate, fold)

    url = f"sqlite:///{tmp_path}/short.db"
    with pytest.raises(type(lack)):
        run_search(url, score, trials=25)
    short[0] = False
    found, _ = run_search(url, score, trials=25)
    assert all(trial.folds for trial in found.trials)
    short[0] = True
    with pytest.raises(type(lack)):
        halve(lambda candidate, learn, check: score(candidate, 0))


def test_parameters_that_do_not_go_together_fail_one_trial(tmp_path: Path) -> None:
    def picky(candidate: Candidate, fold: int) -> float:
        if candidate.params.get("kind") == "bad":
            raise ValueError("kind 'bad' supports only x = 0")
        return bowl(candidate, fold)

    found, told = run_search(f"sqlite:///{tmp_path}/picky.db", picky, trials=25)
    failed = [trial for trial in found.trials if trial.params.get("kind") == "bad"]
    assert 0 < len(failed) < 8, "the sampler learns what fails"
    assert all((trial.value, trial.folds) == (None, ()) for trial in failed)
    assert len(told) == len(found.trials) == 25
    assert found.best.params.get("kind") != "bad"
    again, told = run_search(f"sqlite:///{tmp_path}/picky.db", picky, trials=25)
    assert (again, told) == (found, [])

    def refuses(candidate: Candidate, fold: int) -> float:
        raise ValueError("no such solver")

    for _ in range(2):  # a retry tries again
        with pytest.raises(ValueError, match="all 3 trials failed, the last with ValueError: no such solver"):
            run_search(f"sqlite:///{tmp_path}/refused.db", refuses, trials=3)


HALVED = time_ordered_folds(np.arange(900), 2)


def halve(score: Any, families: Any = None, **settings: Any) -> tuple[Any, list[Trial]]:
    told: list[Trial] = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = halving.search(
            families or [sklearn.draw(one, 20, 0) if one.space else [one] for one in CANDIDATES],
            Search(**{"method": "halving", "folds": 2, **settings}),
            score,
            folds=HALVED,
            greater_is_better=False,
            on_trial=lambda _, trial: told.append(trial),
        )
    return found, told


def spec_of(**more: Any) -> TrainSpec:
    asked = {"dataset": "t", "model_name": "m", "estimator": "e.E", "target": "y", "time_column": "t"}
    return from_dict(TrainSpec, asked | {"numeric": ["a"]} | more)


def test_a_twin_is_of_a_model_of_all_rows() -> None:
    assert spec_of(refit=True, keep_twin=True).keep_twin
    with pytest.raises(ValueError, match="keep_twin is set, but refit is not"):
        spec_of(keep_twin=True)


def test_one_instant_is_one_holdout_start() -> None:
    texts = ["2024-01-01T00:00:00", "2024-01-01T00:00:00Z", "2024-01-01T01:00:00+01:00"]
    specs = [spec_of(holdout_start=text) for text in texts]
    assert {str(spec.holdout_start) for spec in specs} == {"2024-01-01 00:00:00+00:00"}


def test_a_plan_says_nothing_of_the_method() -> None:
    """Challengers and the model that is promoted for them are asked for by different plans."""
    method = training_spec.method_digest(spec_of(estimator="sklearn.linear_model.Ridge"))
    plan = TrainingPlan(
        window=Window(start=datetime(2024, 1, 1), end=datetime(2024, 2, 1)),
        rows="all",
        half_life_days=3.0,
        recipe="recent",
    )
    planned = spec_of(estimator="sklearn.linear_model.Ridge", **to_dict(plan))
    assert training_spec.method_digest(planned) == method
    beside = ("half_life_days", "background_rows")
    for more in (
        {"estimator": "sklearn.linear_model.Lasso"},
        {"numeric": ["b"]},
        {"half_life_days": 4.0},
        {"background_rows": 50},
    ):
        other = spec_of(**({"estimator": "sklearn.linear_model.Ridge"} | more))
        assert (training_spec.method_digest(other) == method) == any(name in more for name in beside)


class TestPlan:
    """What a decision asks for, and nothing else, takes the place of the operator's own arguments."""

    PLAN: ClassVar[dict[str, Any]] = {
        "window": {"start": "2024-01-01T00:00:00Z", "end": "2024-02-01T00:00:00Z"},
        "rows": "all",
        "refit": True,
    }

    def spec(self, plan: Any) -> dict[str, Any]:
        operator = TrainModelOperator(
            task_id="train",
            dataset="t",
            model_name="m",
            estimator="e.E",
            target="y",
            time_column="t",
            window_start="2023-01-01",
            window_end="2023-02-01",
            plan=plan,
        )
        return operator.build_spec({})  # type: ignore[arg-type]

    @pytest.mark.parametrize("plan", [PLAN, {"retrain": True, "plan": PLAN}])
    def test_as_it_is_or_in_what_the_deciding_task_returned(self, plan: Any) -> None:
        spec = self.spec(plan)
        assert {name: spec[name] for name in self.PLAN} == self.PLAN

    @pytest.mark.parametrize("plan", [None, "", "None"])
    def test_without_one_the_arguments_count(self, plan: Any) -> None:
        assert self.spec(plan)["window"]["start"].startswith("2023-01-01")

    @pytest.mark.parametrize(
        ("plan", "words"),
        [
            (
                {"retrain": False, "plan": None, "reason": "no window is ripe"},
                "asks for no training .no window is",
            ),
            (
                PLAN | {"allow_pickle": True, "estimator": "x.Y"},
                "plan holds allow_pickle, estimator: a plan says only",
            ),
            ("{'window': ...}", "render_template_as_native_obj"),
        ],
    )
    def test_what_is_none_is_said(self, plan: Any, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            self.spec(plan)


def test_halving_tries_many_on_few_rows_and_few_on_all(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[tuple[str, int, int]] = []

    def picky(candidate: Candidate, learn: Any, check: Any) -> float:
        fold = 0 if check[0] == HALVED[0][1][0] else 1
        assert np.array_equal(check, HALVED[fold][1])  # all of it, in every round
        assert set(learn) <= set(HALVED[fold][0])
        assert np.all(np.diff(learn) > 0)  # oldest to newest
        assert (learn[0], learn[-1]) == (0, HALVED[fold][0][-1])
        asked.append((candidate.name, fold, len(learn)))
        if candidate.params.get("kind") == "bad":
            raise ValueError("kind 'bad' supports only x = 0")
        return bowl(candidate, fold)

    caplog.set_level("INFO")
    found, told = halve(picky)
    assert found.best.params["x"] == pytest.approx(3.0, abs=2.0)
    assert found.value == pytest.approx((found.best.params["x"] - 3.0) ** 2 + 0.005)
    assert list(found.trials) == told
    assert [trial.candidate for trial in told] == ["Flat", "Bowl", "Bowl", "Bowl"]
    assert all(len(trial.folds) == 2 for trial in told)
    # Twenty sets, a third of them on three times as many rows; one set alone is tried on all at once.
    assert [count for name, fold, count in asked if fold == 1 and name == "Flat"] == [600]
    second = [count for name, fold, count in asked if fold == 1 and name == "Bowl"]
    good = sum(one.params["kind"] == "good" for one in sklearn.draw(CANDIDATES[1], 20, 0))
    assert second == [66] * good + [200] * 7 + [600] * 3
    assert re.search(r"Bowl on 33 % of the rows: .*; about \d+ s to go", caplog.text)
    assert "Bowl on 11 % of the rows: failed" in caplog.text
    again, _ = halve(picky)
    assert (again.best, again.value) == (found.best, found.value)


def test_halving_when_nothing_works_and_when_time_is_up() -> None:
    def refuses(candidate: Candidate, learn: Any, check: Any) -> float:
        raise ValueError("no such solver")

    with pytest.raises(
        ValueError, match="every parameter set failed, the last with ValueError: no such solver"
    ):
        halve(refuses)

    def flat_only(candidate: Candidate, learn: Any, check: Any) -> float:
        if candidate.name == "Bowl":
            raise ValueError("no such solver")
        return bowl(candidate, 0)

    found, _ = halve(flat_only)  # a family that fails leaves the others
    assert found.best.name == "Flat"
    stopped, told = halve(flat_only, timeout_seconds=0.0)
    assert (stopped.best.name, len(told)) == ("Flat", 1)

    def lost(candidate: Candidate, learn: Any, check: Any) -> float:
        raise TransientError("the disk is gone")

    with pytest.raises(TransientError, match="the disk is gone"):
        halve(lost)


def test_halving_goes_on_after_its_time_until_something_was_measured() -> None:
    def only_the_last(candidate: Candidate, learn: Any, check: Any) -> float:
        if candidate.params["level"] == 0.0:
            raise ValueError("no such solver")
        return 1.0

    families = [[replace(CANDIDATES[0], params={"level": level})] for level in (0.0, 2.0, 4.0)]
    found, told = halve(only_the_last, families, timeout_seconds=0.0)
    assert (found.best.params, [trial.value for trial in told]) == ({"level": 2.0}, [None, 1.0])


@pytest.mark.parametrize("sets", [1, 2, 3, 8, 9, 27, 243, 244])
def test_halving_ends_on_all_rows(sets: int) -> None:
    family = [replace(CANDIDATES[0], params={"level": float(level)}) for level in range(sets)]
    seen: list[int] = []

    def level(candidate: Candidate, learn: Any, check: Any) -> float:
        seen.append(len(learn))
        return float(candidate.params["level"])

    found, told = halve(level, [family])
    assert (found.value, len(seen)) == (0.0, 2 * sum(_rounds(sets)))
    assert 1 <= len(told) <= 3
    assert seen[-1] == 600


def _rounds(sets: int) -> list[int]:
    rounds = [sets]
    while rounds[-1] > 2 and len(rounds) <= halving.last_round(sets):
        rounds.append(-(-rounds[-1] // 3))
    return rounds


def test_nothing_to_search_tries_each_candidate_once() -> None:
    flat = (CANDIDATES[0], replace(CANDIDATES[0], params={"level": 4.0}))
    found = optuna.search(
        flat,
        Search(trials=30),
        bowl,
        greater_is_better=False,
        study_name="s",
        storage_url=None,
        seed=0,
        on_trial=lambda *_: None,
    )
    assert (len(found.trials), found.value) == (2, 4.0)


SMALL = (
    Candidate(estimator="m.Ridge", space={"alpha": (0.1, 1, 10)}),
    Candidate(estimator="m.Tree", space={"depth": Range(low=1, high=4, integer=True), "kind": ("a", ("b",))}),
    Candidate(estimator="m.Mean", space={"x": Range(low=3, high=3)}),
)


def small(candidate: Candidate, fold: int) -> float:
    """Ridge is best by far, so that the sampler would draw it again and again."""
    return 0.01 * fold + (0.1 if candidate.name == "Ridge" else 2.0) + candidate.params.get("alpha", 0)


def search_small(
    storage: str | None, score: Any = small, candidates: Any = SMALL, **settings: Any
) -> tuple[Any, list[str]]:
    fitted: list[str] = []

    def counted(candidate: Candidate, fold: int) -> float:
        value = score(candidate, fold)
        fitted.append(f"{candidate.name} {candidate.params} {fold}")
        return float(value)

    found = optuna.search(
        candidates,
        Search(**{"trials": 30, "folds": 2, **settings}),
        counted,
        greater_is_better=False,
        study_name="small",
        storage_url=storage,
        seed=0,
        on_trial=lambda _, trial: None,
    )
    return found, fitted


def test_no_parameter_set_is_fitted_twice_and_a_small_space_is_tried_in_full(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        found, fitted = search_small(None, prune=False)
    assert len(fitted) == len({*fitted}) == 2 * 12
    assert len(found.trials) == 12
    assert "the space holds 12 parameter sets, and all are tried" in caplog.text
    assert found.best.params == {"alpha": 0.1}
    endless = (SMALL[0], Candidate(estimator="m.Line", space={"x": Range(low=0.0, high=1.0)}))
    found, fitted = search_small(None, candidates=endless, prune=False)
    assert len(fitted) == len({*fitted}) == 2 * 30  # three of them Ridge: the others are of the endless part
    assert found.best.name == "Ridge"


@pytest.mark.parametrize("last_fit", [6, 20])
def test_a_small_search_that_is_killed_ends_as_one_that_ran_through(last_fit: int, tmp_path: Path) -> None:
    whole, _ = search_small(f"sqlite:///{tmp_path}/whole.db", prune=False)
    storage = f"sqlite:///{tmp_path}/cut.db"
    with pytest.raises(KeyboardInterrupt):
        search_small(storage, killed(small, at=last_fit), prune=False)
    resumed, _ = search_small(storage, prune=False)
    assert [(one.candidate, one.params) for one in resumed.trials] == [
        (one.candidate, one.params) for one in whole.trials
    ]
    assert resumed.best == whole.best


def test_candidates_that_time_left_no_trial_for_are_named(tmp_path: Path) -> None:
    found, _ = search_small(None, timeout_seconds=0.0)
    assert found.untried == ("m.Tree", "m.Mean")
    evidence = write_evidence(tmp_path, found)
    assert json.loads((evidence / "trials.json").read_text())[1:] == [
        {"candidate": "m.Tree", "untried": True},
        {"candidate": "m.Mean", "untried": True},
    ]
    assert search_small(None)[0].untried == ()
    families = [[replace(CANDIDATES[0], params={"level": level})] for level in (2.0, 4.0)]
    assert halve(lambda candidate, learn, check: 1.0, families, timeout_seconds=0.0)[0].untried == (
        "fake.Flat",
    )


def test_time_is_up() -> None:
    found, told = run_search(None, timeout_seconds=0.0, trials=10_000)
    assert 1 <= len(told) < 10_000
    assert found.best is not None


def test_the_best_of_mapped_candidates() -> None:
    results = [
        {"run_id": str(i), "metric": "mae", "validation_value": v} for i, v in enumerate((2.0, 1.0, 1.0))
    ]
    assert best_of(results, greater_is_better=False) == 1
    assert best_of(results, greater_is_better=True) == 0
    with pytest.raises(ValueError, match="run 0 was trained without cross-validation"):
        best_of([{"run_id": "0", "metric": "mae", "validation_value": None}], greater_is_better=False)
    with pytest.raises(ValueError, match="different metrics"):
        best_of([*results, {"run_id": "9", "metric": "r2", "validation_value": 1.0}], greater_is_better=False)
    with pytest.raises(ValueError, match="no candidate"):
        best_of([], greater_is_better=False)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"training_rows": 90}, "one is of 100 training rows in .* and the other of 90 training rows"),
        ({"folds": 9}, "one is of 3 folds and the other of 9 folds: give .* number of folds"),
        ({"model_name": "tips"}, "one is of model 'fares' and the other of model 'tips'"),
    ],
)
def test_candidates_of_different_rows_are_not_compared(more: dict[str, Any], words: str) -> None:
    dataset = DatasetVersion(uri="trips", version=0, dataset_digest="sha256:0", row_count=120, columns={})
    day = datetime(2024, 1, 1, tzinfo=UTC)
    first = TrainResult(
        model_name="fares",
        run_id="a",
        run_url="",
        model_id=None,
        package_digest="sha256:1",
        serving_form="onnx",
        serving_reason="",
        dataset=dataset,
        training=Window(start=day, end=day + timedelta(days=10)),
        holdout=Window(start=day + timedelta(days=10), end=day + timedelta(days=12)),
        training_rows=100,
        holdout_rows=20,
        estimator="e.E",
        estimator_params={},
        validation_value=1.0,
        trials=1,
        folds=3,
        metric="mae",
        metric_value=1.0,
        reused=False,
    )
    second = replace(first, run_id="b", validation_value=0.5, **more)
    with pytest.raises(ValueError, match=words):
        select.run(select.SelectSpec(trainings=(first, second)), Services())


def test_studies_lie_beside_the_ledger() -> None:
    assert studies_url(None) is None
    assert studies_url("sqlite://") is None
    assert studies_url("sqlite:////var/x/mlops.db") == "sqlite:////var/x/mlops-studies.db"


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("sklearn.ensemble.HistGradientBoostingRegressor", "OrdinalEncoder"),
        ("sklearn.ensemble.RandomForestRegressor", "OrdinalEncoder"),
        ("sklearn.linear_model.Ridge", "OneHotEncoder"),
        ("sklearn.neighbors.KNeighborsRegressor", "OneHotEncoder"),
    ],
)
def test_columns_reach_the_estimator_as_it_needs_them(estimator: str, expected: str) -> None:
    frame = rows()
    pipeline = sklearn.build_pipeline(Candidate(estimator=estimator), COLUMNS, seed=0)
    sklearn.fit(pipeline, sklearn.to_features(frame, COLUMNS), frame["y"].to_numpy(), None)
    assert type(pipeline["columns"].named_transformers_["categorical"]).__name__ == expected
    error = np.abs(
        pipeline.predict(sklearn.to_features(rows(seed=1), COLUMNS)) - rows(seed=1)["y"].to_numpy()
    )
    assert error.mean() < 1.3


TREE, LINE = DecisionTreeRegressor(), LinearRegression()


@pytest.mark.parametrize(
    ("estimator", "codes"),
    [
        (BaggingRegressor(), True),
        (AdaBoostRegressor(), True),
        (BaggingRegressor(LINE), False),
        (AdaBoostRegressor(BaggingRegressor(LINE)), False),
        (VotingRegressor([("a", TREE), ("b", BaggingRegressor(TREE))]), True),
        (VotingRegressor([("a", TREE), ("b", LINE)]), False),
        (VotingRegressor([("a", TREE), ("b", "drop")]), True),
        (StackingRegressor([("a", TREE)]), True),
        (StackingRegressor([("a", TREE)], passthrough=True), False),
        (StackingRegressor([("a", TREE)], final_estimator=TREE, passthrough=True), True),
        (TransformedTargetRegressor(TREE), True),
        (TransformedTargetRegressor(), False),
        (make_pipeline(PCA(), TREE), False),
    ],
    ids=repr,
)
def test_columns_reach_estimators_of_estimators_as_all_of_them_need_them(
    estimator: Any, codes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"{__name__}.voting_factory", lambda: clone(estimator))
    candidate = Candidate(estimator=f"{__name__}:voting_factory")
    pipeline = sklearn.build_pipeline(candidate, replace(COLUMNS, text=()), seed=0)
    parts = {name: type(part).__name__ for name, part, _ in pipeline["columns"].transformers}
    assert parts["categorical"] == ("OrdinalEncoder" if codes else "OneHotEncoder")
    frame = rows()
    features = sklearn.to_features(frame, COLUMNS)
    sklearn.fit(pipeline, features, frame["y"].to_numpy(), None)
    assert len(sklearn.predict(pipeline, features).values) == frame.height


def many_categories(count: int) -> tuple[pl.DataFrame, ColumnRoles]:
    """As many rows as categories; one-hot and dense, 24,000 take 4.3 GiB."""
    frame = rows(count).with_columns(user="user " + pl.int_range(pl.len()).cast(pl.String))
    return frame, ColumnRoles(target="y", time="t", numeric=("a", "b"), categorical=("user", "kind"))


def test_many_categories_stay_sparse_and_are_served_as_they_were_trained(tmp_path: Path) -> None:
    frame, columns = many_categories(24_200)
    model, served = packaged(Candidate(estimator="sklearn.linear_model.Ridge"), columns, frame, tmp_path)
    assert scipy.sparse.issparse(model.pipeline[:-1].transform(model.features.head(5)))
    assert served.manifest.serving_form == "onnx"


@pytest.mark.parametrize("selection", [None, sklearn.FeatureSelection(method="l1", keep=2)])
def test_categories_that_would_take_gigabytes_are_refused_beforehand(
    selection: sklearn.FeatureSelection | None,
) -> None:
    frame, columns = many_categories(24_000)
    name = "linear_model.Ridge" if selection else "neighbors.KNeighborsRegressor"
    pipeline = sklearn.build_pipeline(
        Candidate(estimator=f"sklearn.{name}"), columns, selection=selection, seed=0
    )
    words = r"made of 'user' \(24,000\), 'kind' .* take 4\.3 GiB in 24,000 rows.*preprocessing 'codes'"
    with pytest.raises(ValueError, match=words):
        sklearn.fit(pipeline, sklearn.to_features(frame, columns), frame["y"].to_numpy(), None)


@pytest.mark.parametrize(
    "estimator",
    [
        "sklearn.linear_model.Ridge",
        "sklearn.linear_model.Lasso",
        "sklearn.linear_model.SGDRegressor",
        "sklearn.neural_network.MLPRegressor",
        "sklearn.linear_model.LogisticRegression",
        "sklearn.linear_model.SGDClassifier",
        f"{__name__}:logarithmic_ridge",
    ],
)
def test_sparse_columns_give_the_same_model(
    estimator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frame = rows().with_columns(shop=pl.int_range(pl.len()).mod(40).cast(pl.String))
    columns = replace(COLUMNS, categorical=("kind", "shop"))
    features = sklearn.to_features(frame, columns)
    signature = replace(
        SIGNATURE, inputs=(*SIGNATURE.inputs[:3], FieldSpec(name="shop", type="string"), SIGNATURE.inputs[3])
    )
    target = frame["y"].to_numpy()
    answers = []
    for limit in (2**28, 0):
        monkeypatch.setattr(fitting, "_SPARSE_FROM", limit)
        pipeline = sklearn.build_pipeline(Candidate(estimator=estimator), columns, seed=0)
        learned = (target > 0).astype(int) if sklearn.is_classification(pipeline) else target
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an unfinished descent
            sklearn.fit(pipeline, features, learned, None)
        assert scipy.sparse.issparse(pipeline[:-1].transform(features)) == (limit == 0)
        answers.append(sklearn.predict(pipeline, features).values)
        assert model_package.refused_types(sklearn.save_skops(pipeline, tmp_path / "model.skops")) == []
    if sklearn.is_classification(pipeline):
        assert np.mean(answers[1] == answers[0]) > 0.97
    else:
        assert answers[1] == pytest.approx(answers[0], abs=0.02)
    hard, _ = onnx.hard_rows(pipeline, features, signature)
    if onnx.has_converter(pipeline[-1]) and not estimator.endswith(":logarithmic_ridge"):
        parity = onnx.check_parity(onnx.convert(pipeline, signature), pipeline, hard, signature, LIMITS)
        assert parity.passed, parity.reason


@pytest.mark.parametrize("method", ["rfe", "l1", "importance"])
def test_feature_selection_keeps_what_matters(method: Any) -> None:
    rng = np.random.default_rng(0)
    frame = rows().with_columns(pl.Series(f"noise{i}", rng.normal(size=600)) for i in range(6))
    columns = ColumnRoles(target="y", time="t", numeric=("a", *(f"noise{i}" for i in range(6))))
    pipeline = sklearn.build_pipeline(
        Candidate(estimator="sklearn.ensemble.HistGradientBoostingRegressor"),
        columns,
        selection=sklearn.FeatureSelection(method=method, keep=2),
        seed=0,
    )
    features = sklearn.to_features(frame, columns)
    sklearn.fit(pipeline, features, frame["y"].to_numpy(), None)
    support = pipeline["selection"].get_support()
    assert support[0]
    assert support.sum() <= 2
    signature = ModelSignature(
        inputs=tuple(FieldSpec(name=name, type="number") for name in columns.inputs), output="y"
    )
    parity = onnx.check_parity(onnx.convert(pipeline, signature), pipeline, features, signature, LIMITS)
    assert parity.passed, parity.reason


def test_text_columns_of_any_name(tmp_path: Path) -> None:
    frame = rows().rename({"note": "my__note"}).with_columns(pl.col("my__note").alias("numeric"))
    columns = replace(COLUMNS, text=("my__note", "numeric"))
    model, served = packaged(Candidate(estimator="sklearn.linear_model.Ridge"), columns, frame, tmp_path)
    assert served.manifest.serving_form == "onnx"
    assert model.pipeline["columns"].named_transformers_["text_0"].vocabulary_


@pytest.mark.parametrize("method", ["rfe", "l1", "importance"])
@pytest.mark.parametrize(
    ("estimator", "params"),
    [
        ("sklearn.ensemble.HistGradientBoosting", {"max_iter": 5}),
        ("sklearn.ensemble.RandomForest", {"n_estimators": 5}),
        ("sklearn.linear_model.Ridge", {}),
        ("xgboost.XGB", {"n_estimators": 5}),
        ("lightgbm.LGBM", {"n_estimators": 5, "verbose": -1}),
    ],
)
@pytest.mark.parametrize("kind", ["Regressor", "Classifier"])
def test_feature_selection_with_a_missing_number(
    method: Any, estimator: str, params: dict[str, Any], kind: str
) -> None:
    pytest.importorskip(estimator.partition(".")[0])
    frame = rows(120).with_columns(b=pl.when(pl.int_range(pl.len()) == 7).then(None).otherwise(pl.col("a")))
    columns = ColumnRoles(target="y", time="t", numeric=("a", "b"), categorical=("kind",))
    name = estimator if estimator.endswith("Ridge") and kind == "Regressor" else estimator + kind
    pipeline = sklearn.build_pipeline(
        Candidate(estimator=name, params=params),
        columns,
        selection=sklearn.FeatureSelection(method=method, keep=2),
        seed=0,
    )
    features = sklearn.to_features(frame, columns)
    target = frame["y"].to_numpy()
    sklearn.fit(pipeline, features, (target > 0).astype(int) if kind == "Classifier" else target, None)
    unseen = features.assign(a=np.nan, b=np.nan)
    assert len(sklearn.predict(pipeline, unseen).values) == 120


def test_selection_by_l1_of_a_table_with_gaps() -> None:
    columns = ColumnRoles(target="y", time="t", numeric=("a", "b"))
    pipeline = sklearn.build_pipeline(
        Candidate(estimator="sklearn.ensemble.HistGradientBoostingRegressor"),
        columns,
        preprocessing="none",
        selection=sklearn.FeatureSelection(method="l1", keep=1),
        seed=0,
    )
    frame = rows().with_columns(b=pl.when(pl.int_range(pl.len()) == 7).then(None).otherwise(pl.col("b")))
    sklearn.fit(pipeline, sklearn.to_features(frame, columns), frame["y"].to_numpy(), None)
    assert pipeline["selection"].get_support().tolist() == [True, False]


def changed_world(count: int = 1200) -> tuple[pl.DataFrame, ColumnRoles]:
    """Old rows follow x0 and weigh nothing; the newest quarter follows x1."""
    x = np.random.default_rng(0).normal(size=(count, 4))
    new = np.arange(count) >= 0.75 * count
    frame = pl.DataFrame({f"x{i}": x[:, i] for i in range(4)}).with_columns(
        y=pl.Series(3.0 * np.where(new, x[:, 1], x[:, 0])),
        w=pl.Series(new.astype(float)),
        t=pl.Series([datetime(2024, 1, 1, tzinfo=UTC) + timedelta(hours=i) for i in range(count)]),
    )
    return frame, ColumnRoles(target="y", time="t", numeric=("x0", "x1", "x2", "x3"))


@pytest.mark.parametrize("method", ["rfe", "l1", "importance"])
@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize(("weight", "half_life_days"), [("w", None), (None, 2.0)])
def test_features_are_selected_by_the_weights_of_rows(
    method: Any, labels: bool, weight: str | None, half_life_days: float | None
) -> None:
    frame, columns = changed_world()
    pipeline = sklearn.build_pipeline(
        Candidate(estimator=f"sklearn.linear_model.{'LogisticRegression' if labels else 'Ridge'}"),
        columns,
        selection=sklearn.FeatureSelection(method=method, keep=1),
        seed=0,
    )
    features = sklearn.to_features(frame, columns)
    target = (frame["y"].to_numpy() > 0).astype(int) if labels else frame["y"].to_numpy()
    sklearn.fit(pipeline, features, target, None)
    assert pipeline["selection"].get_support().tolist() == [True, False, False, False]
    weights = row_weights(frame, replace(columns, weight=weight), half_life_days)
    sklearn.fit(pipeline, features, target, weights)
    assert pipeline["selection"].get_support().tolist() == [False, True, False, False]


@pytest.mark.parametrize("method", ["rfe", "l1", "importance"])
def test_a_selection_is_stored_without_what_ranked_the_features(method: Any, tmp_path: Path) -> None:
    frame, columns = changed_world(3000)
    pipeline = sklearn.build_pipeline(
        Candidate(estimator="sklearn.linear_model.Ridge"),
        columns,
        selection=sklearn.FeatureSelection(method=method, keep=1),
        seed=0,
    )
    features = sklearn.to_features(frame, columns)
    sklearn.fit(pipeline, features, frame["y"].to_numpy(), None)
    path = tmp_path / "model.skops"
    assert model_package.refused_types(sklearn.save_skops(pipeline, path)) == []
    assert path.stat().st_size < 200_000
    expected = sklearn.predict(pipeline, features).values
    loaded = skops.io.load(path, trusted=[*allowed_types()])
    assert (sklearn.predict(loaded, features).values == expected).all()
    again = sklearn.fit(clone(loaded), features.tail(700), frame["y"].to_numpy()[-700:], None)
    assert again["selection"].get_support().tolist() == [False, True, False, False]  # it selects anew
    # The very first feature alone, of which skl2onnx makes zeros.
    signature = ModelSignature(
        inputs=tuple(FieldSpec(name=name, type="number") for name in columns.inputs), output="y"
    )
    parity = onnx.check_parity(onnx.convert(pipeline, signature), pipeline, features, signature, LIMITS)
    assert parity.passed, parity.reason


def test_selections_that_were_stored_with_their_forest_are_loaded(tmp_path: Path) -> None:
    """By the versions before this one."""
    frame, columns = changed_world(300)
    features, target = sklearn.to_features(frame, columns), frame["y"].to_numpy()
    trees = ExtraTreesRegressor(n_estimators=3, random_state=0)
    for selector in (RFE(trees), SelectFromModel(trees)):
        pipeline = Pipeline([("selection", selector), ("estimator", Ridge())]).fit(features, target)
        sklearn.save_skops(pipeline, tmp_path / "model.skops")
        loaded = skops.io.load(tmp_path / "model.skops", trusted=[*allowed_types()])
        assert (loaded.predict(features) == pipeline.predict(features)).all()


@pytest.mark.parametrize(
    ("numeric", "categorical"),
    [
        (["fare amount", "fare_amount"], ["größe m²"]),
        (["variable", "1/x"], ["label"]),
        (["probabilities"], ["é.%"]),
    ],
)
@pytest.mark.parametrize(
    "estimator", ["ensemble.HistGradientBoostingRegressor", "linear_model.LogisticRegression"]
)
def test_columns_of_any_name_have_an_onnx_form(
    numeric: list[str], categorical: list[str], estimator: str
) -> None:
    frame = rows().rename({"a": numeric[0], "kind": categorical[0]}).with_columns(pl.col("y").alias("target"))
    frame = frame.with_columns(pl.col(numeric[0]).alias(name) for name in numeric[1:])
    columns = ColumnRoles(target="target", time="t", numeric=(*numeric,), categorical=(*categorical,))
    pipeline = sklearn.build_pipeline(Candidate(estimator=f"sklearn.{estimator}"), columns, seed=0)
    features, target = sklearn.to_features(frame, columns), frame["target"].to_numpy()
    learned = np.where(target > np.median(target), "high", "low") if "Logistic" in estimator else target
    sklearn.fit(pipeline, features, learned, None)
    signature = ModelSignature(
        inputs=tuple(
            FieldSpec(name=name, type="number" if name in numeric else "string") for name in columns.inputs
        ),
        output="y",
    )
    parity = onnx.check_parity(onnx.convert(pipeline, signature), pipeline, features, signature, LIMITS)
    assert parity.passed, parity.reason


def test_columns_whose_names_json_escapes_are_served(tmp_path: Path) -> None:
    """From training to an answered request, by the form of the package and by the service's decoder."""
    number, text = 'screen (")\n\x1f', "back\\slash"
    frame = rows().rename({"a": number, "kind": text})
    columns = ColumnRoles(target="y", time="t", numeric=(number, "b"), categorical=(text,))
    candidate = Candidate(estimator="sklearn.linear_model.LinearRegression")
    (tmp_path / "package").mkdir()
    model, served = packaged(candidate, columns, frame, tmp_path / "package")
    asked = frame.tail(20).select(columns.inputs).with_columns(pl.col("b").fill_nan(None))
    answers = model.pipeline.predict(sklearn.to_features(asked, columns))
    service = Caller(tmp_path, tmp_path / "package")
    for body in ({"rows": asked.to_dicts()}, {"columns": asked.to_dict(as_series=False)}):
        status, answered, _ = service.ask("/predict", body)
        assert (status, answered["predictions"]) == (200, pytest.approx(answers, rel=1e-4))
    status, refused, _ = service.ask("/predict", {"row": {number: 1.0, "b": 2.0}})
    assert (status, refused["error"]) == (422, f"rows[0].{text}: field is missing (string)")
    assert {field.name for field in served.manifest.signature.inputs} == {number, "b", text}
    service.app.log.flush()
    logged = pl.read_parquet(tmp_path / "inference_log/**/*.parquet")
    assert logged[f"feature_{number}"].to_list() == [*asked[number].to_list()] * 2


@pytest.mark.parametrize("unit", [1e-6, 1e6])
def test_selection_by_l1_does_not_depend_on_the_unit_of_the_target(unit: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = rows().with_columns(
        pl.Series("c", rng.normal(size=600)), y=unit * (pl.col("a") + 2 * pl.Series(rng.normal(size=600)))
    )
    frame = frame.with_columns(d=pl.col("y") / unit - pl.col("a"))
    columns = ColumnRoles(target="y", time="t", numeric=("a", "c", "d"))
    pipeline = sklearn.build_pipeline(
        Candidate(estimator="sklearn.linear_model.LinearRegression"),
        columns,
        selection=sklearn.FeatureSelection(method="l1", keep=2),
        seed=0,
    )
    sklearn.fit(pipeline, sklearn.to_features(frame, columns), frame["y"].to_numpy(), None)
    assert pipeline["selection"].get_support().tolist() == [True, False, True]
    assert model_package.refused_types(sklearn.save_skops(pipeline, tmp_path / "model.skops")) == []


def my_factory(alpha: float = 1.0) -> Pipeline:
    from sklearn.linear_model import Ridge

    return make_pipeline(ColumnTransformer([("numbers", "passthrough", ["a"])]), Ridge(alpha=alpha))


def test_a_factory_may_bring_its_own_preprocessing() -> None:
    columns = ColumnRoles(target="y", time="t", numeric=("a",))
    candidate = Candidate(
        estimator=f"{__name__}:my_factory", params={"alpha": 2.0, "ridge__fit_intercept": False}
    )
    pipeline = sklearn.build_pipeline(candidate, columns, preprocessing="none", seed=0)
    frame = rows()
    sklearn.fit(pipeline, sklearn.to_features(frame, columns), frame["y"].to_numpy(), np.ones(frame.height))
    assert pipeline["estimator"]["ridge"].get_params()["alpha"] == 2.0
    assert pipeline["estimator"]["ridge"].intercept_ == 0.0


def voting_factory() -> Any:
    from sklearn.ensemble import RandomForestRegressor, VotingRegressor

    return VotingRegressor([("line", LinearRegression()), ("trees", RandomForestRegressor(n_estimators=3))])


def logarithmic_factory() -> Any:
    from sklearn.compose import TransformedTargetRegressor

    line = make_pipeline(LinearRegression())
    return TransformedTargetRegressor(line, func=np.sinh, inverse_func=np.arcsinh, check_inverse=False)


def logarithmic_ridge() -> Any:
    return TransformedTargetRegressor(Ridge(), func=np.sinh, inverse_func=np.arcsinh, check_inverse=False)


def test_what_a_factory_left_to_chance_is_seeded() -> None:
    columns = ColumnRoles(target="y", time="t", numeric=("a", "b"))
    frame = rows()
    features = sklearn.to_features(frame, columns)

    def answers(seed: int) -> bytes:
        candidate = Candidate(estimator=f"{__name__}:voting_factory")
        pipeline = sklearn.build_pipeline(candidate, columns, seed=seed)
        sklearn.fit(pipeline, features, frame["y"].to_numpy(), None)
        return sklearn.predict(pipeline, features).values.tobytes()

    assert answers(0) == answers(0)
    assert answers(0) != answers(1)


@pytest.mark.parametrize("factory", ["voting_factory", "logarithmic_factory"])
def test_weights_are_handed_on(factory: str) -> None:
    columns = ColumnRoles(target="y", time="t", numeric=("a",))
    frame = rows().with_columns(y=pl.when(pl.int_range(pl.len()) < 300).then(0.0).otherwise(1.0))
    weights = np.where(np.arange(frame.height) < 300, 0.0, 1.0)
    pipeline = sklearn.build_pipeline(Candidate(estimator=f"{__name__}:{factory}"), columns, seed=0)
    features = sklearn.to_features(frame, columns)
    sklearn.fit(pipeline, features, frame["y"].to_numpy(), weights)
    assert sklearn.predict(pipeline, features).values == pytest.approx(1.0)


def test_an_input_that_no_row_has_does_not_stop_a_training(tmp_path: Path) -> None:
    columns = ColumnRoles(target="y", time="t", numeric=("a", "b"))
    frame = rows().with_columns(b=pl.lit(None, dtype=pl.Float64))
    boosting = Candidate(estimator="sklearn.ensemble.HistGradientBoostingRegressor")
    for candidate in (boosting, Candidate(estimator="sklearn.linear_model.Ridge")):
        folder = tmp_path / candidate.name
        folder.mkdir()
        _, served = packaged(candidate, columns, frame, folder)
        assert served.manifest.serving_form == "onnx", served.manifest.serving_reason
        without, with_it = served.predict_records([{"a": 1.0, "b": None}, {"a": 1.0, "b": 5.0}])
        assert without == with_it
    bare = sklearn.build_pipeline(boosting, columns, preprocessing="none", seed=0)
    with pytest.raises(ValueError, match="column 'b' is empty in all of 600 rows: leave it out"):
        sklearn.fit(bare, sklearn.to_features(frame, columns), frame["y"].to_numpy(), None)
    silent = ColumnRoles(target="y", time="t", text=("note",))
    with pytest.raises(ValueError, match="column 'note' is empty in all of 600 rows"):
        sklearn.fit(
            sklearn.build_pipeline(boosting, silent, seed=0),
            sklearn.to_features(frame.with_columns(note=pl.lit("")), silent),
            frame["y"].to_numpy(),
            None,
        )


def test_wrong_params_and_weights_are_said() -> None:
    with pytest.raises(
        ValueError, match=r"'sklearn.linear_model.Ridge' does not take these params.*nonsense"
    ):
        sklearn.build_pipeline(
            Candidate(estimator="sklearn.linear_model.Ridge", params={"nonsense": 1}), COLUMNS, seed=0
        )
    knn = sklearn.build_pipeline(
        Candidate(estimator="sklearn.neighbors.KNeighborsRegressor"), COLUMNS, seed=0
    )
    frame = rows()
    with pytest.raises(ValueError, match="KNeighborsRegressor takes no row weights"):
        sklearn.fit(knn, sklearn.to_features(frame, COLUMNS), frame["y"].to_numpy(), np.ones(frame.height))


def test_weights_halve_with_age_and_multiply() -> None:
    frame = pl.DataFrame(
        {"t": [datetime(2024, 1, day, tzinfo=UTC) for day in (1, 11, 21)], "w": [2.0, 1.0, 1.0]}
    )
    columns = ColumnRoles(target="y", time="t", numeric=("a",), weight="w")
    assert row_weights(frame, columns, 10.0) == pytest.approx([1.0, 1.0, 2.0])
    assert row_weights(frame, replace(columns, weight=None), None) is None
    with pytest.raises(ValueError, match="weight column 'w' has missing, negative"):
        row_weights(frame.with_columns(w=pl.Series([1.0, None, 1.0])), columns, None)
    with pytest.raises(ValueError, match="half_life_days is 0"):
        row_weights(frame, columns, 0.0)


def test_age_shifts_weight_between_rows_and_takes_none_away() -> None:
    start = datetime(2020, 1, 1, tzinfo=UTC)
    frame = pl.DataFrame({"t": [start + timedelta(days=day) for day in range(4 * 365)]})
    columns = ColumnRoles(target="y", time="t", numeric=("a",))
    for part in (frame, frame.head(365)):
        weights = row_weights(part, columns, 1.0)
        assert weights is not None
        assert weights.mean() == pytest.approx(1.0)
        assert weights[-1] / weights[-2] == pytest.approx(2.0)
    # The one row that counts is far older than the newest.
    lone = frame.with_columns(w=pl.Series([3.0] + [0.0] * (frame.height - 1)))
    weights = row_weights(lone, replace(columns, weight="w"), 1.0)
    assert weights is not None
    assert weights.sum() == pytest.approx(3.0)


def last_is_best(target: Any, prediction: Any) -> Any:
    """A site's metric: too low costs nine times what too high does."""
    return np.where(prediction < target, 9.0, 1.0) * np.abs(target - prediction)


last_is_best.per_row = True  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("mae", 1.0),
        ("rmse", float(np.exp(0.5))),
        ("r2", float(np.exp(0.5))),
        ("quantile_loss@0.9", float(np.exp(1.2816))),
        ("tests.unit.test_training:last_is_best", float(np.exp(1.2816))),
    ],
)
def test_a_simple_guess_is_the_best_constant(metric: str, expected: float) -> None:
    """A model that knows nothing must not beat it: of skewed numbers the mean beats the median by RMSE."""
    target = pl.Series(np.exp(np.random.default_rng(0).normal(size=40_000)))
    assert simple_prediction(target, resolve_metric(metric)) == pytest.approx(expected, rel=0.05)


def test_a_simple_guess_is_measured_on_rows_of_every_hour() -> None:
    """Every so manieth row would be the same hour of every day."""
    hours = np.arange(240_000) % 24
    target = np.where(hours == 0, 500.0, 100.0)
    assert best_constant([500.0, 100.0], target, resolve_metric("mape"), ()) == 100.0


def test_recall_of_two_labels_decides_nothing() -> None:
    with pytest.raises(ValueError, match=r"whoever always says yes is perfect by it\. Choose f1 or pr_auc"):
        require_decisive(resolve_metric("recall"), 2)
    require_decisive(resolve_metric("recall"), 3)
    require_decisive(resolve_metric("f1"), 2)


@pytest.mark.parametrize(("metric", "noted"), [("recall", True), ("f1", False)])
def test_a_training_by_recall_says_that_the_evaluation_will_ask_for_another_metric(
    metric: str, noted: bool, caplog: pytest.LogCaptureFixture
) -> None:
    spec = TrainSpec(
        dataset="t",
        model_name="m",
        target="y",
        numeric=("x",),
        time_column="t",
        estimator="sklearn.linear_model.LogisticRegression",
        metric=metric,
    )
    assert choose_metric(spec, spec.columns(), pl.Series([0, 1, 1])).name == metric
    assert ("evaluation will need a metric of its own" in caplog.text) is noted


def split_of(training: dict[str, list[Any]], holdout: dict[str, list[Any]]) -> Split:
    day = datetime(2024, 1, 1, tzinfo=UTC)
    known, later = (
        pl.DataFrame(columns).with_columns(
            t=pl.Series([start + timedelta(hours=hour) for hour in range(len(columns["y"]))])
        )
        for columns, start in ((training, day), (holdout, day + timedelta(days=1)))
    )
    until = day + timedelta(days=1)
    return Split(
        known, later, Window(start=day, end=until), Window(start=until, end=until + timedelta(days=1))
    )


@pytest.mark.parametrize(
    ("metric", "training", "holdout", "words"),
    [
        ("roc_auc", ["a", "b"], ["a", "a"], "none of the 2 held-out rows has 'y' b: hold out more rows"),
        ("roc_auc", ["a", "b", "c"], ["a", "b"], "has 'y' c"),
        ("pr_auc", ["a", "b"], ["a", "a"], "has 'y' b"),
        ("mape", [1.0, 2.0], [0.0, 2.0], "'y' of the held-out rows is zero in 1 of 2 rows"),
    ],
)
def test_held_out_rows_that_can_not_be_measured_are_said_before_the_search(
    metric: str, training: list[Any], holdout: list[Any], words: str
) -> None:
    spec = TrainSpec(
        dataset="t", model_name="m", target="y", numeric=("x",), time_column="t", estimator="e.E"
    )
    with pytest.raises(InsufficientDataError, match=words):
        require_measurable(
            spec, spec.columns(), resolve_metric(metric), split_of({"y": training}, {"y": holdout})
        )
    require_measurable(
        spec, spec.columns(), resolve_metric(metric), split_of({"y": training}, {"y": training})
    )


def test_weights_of_held_out_rows_are_looked_at_before_a_model_is_fitted_on_them() -> None:
    spec = TrainSpec(
        dataset="t",
        model_name="m",
        target="y",
        numeric=("x",),
        weight_column="w",
        time_column="t",
        estimator="e.E",
        refit=True,
    )
    split = split_of({"y": [1.0, 2.0], "w": [1.0, 1.0]}, {"y": [1.0, 2.0], "w": [1.0, None]})
    with pytest.raises(ValueError, match="weight column 'w' has missing"):
        require_measurable(spec, spec.columns(), resolve_metric("mae"), split)
    require_measurable(replace(spec, refit=False), spec.columns(), resolve_metric("mae"), split)


def test_decimal_targets_are_numbers_to_compute_with() -> None:
    rows = pl.DataFrame({"y": pl.Series([Decimal("1.5"), Decimal("2.5")], dtype=pl.Decimal(10, 2))})
    assert with_target(rows, "y", where="t")["y"].to_numpy().tolist() == [1.5, 2.5]


def test_a_simple_guess_is_the_best_label() -> None:
    target = pl.Series(["no"] * 70 + ["yes"] * 30)
    guesses = {
        metric: simple_prediction(target, resolve_metric(metric), classes=("no", "yes"))
        for metric in ("accuracy", "log_loss", "recall", "f1", "precision")
    }
    assert guesses == {
        "accuracy": "no",
        "log_loss": "no",
        "recall": "yes",
        "f1": "yes",
        "precision": "yes",
    }


def test_the_estimators_package_is_pinned() -> None:
    types = [
        "scipy.interpolate._bsplines.BSpline",
        "sklearn.tree._tree.Tree",
        "my_models.Own",
        "builtins.list",
    ]
    pinned = pinned_requirements(types)
    assert [line.partition("==")[0] for line in pinned] == ["scikit-learn", "scipy", "skops"]
    assert f"scipy=={version('scipy')}" in pinned


def fitted(pipeline: Any, features: Any) -> model_package.FittedModel:
    metric = "accuracy" if sklearn.is_classification(pipeline) else "mae"
    score = MetricValue(metric=metric, value=0.0, standard_deviation=None, row_count=len(features))
    return model_package.FittedModel(pipeline, features, sklearn.predict(pipeline, features), score)


@pytest.mark.parametrize(
    "estimator",
    [
        "sklearn.ensemble.HistGradientBoostingRegressor",
        "sklearn.ensemble.RandomForestRegressor",
        "sklearn.linear_model.Ridge",
    ],
)
def test_forms_agree_on_missing_unseen_and_extreme_values(estimator: str) -> None:
    columns = replace(COLUMNS, text=())
    signature = replace(SIGNATURE, inputs=SIGNATURE.inputs[:3])
    frame = rows()
    pipeline = sklearn.build_pipeline(Candidate(estimator=estimator), columns, seed=0)
    features = sklearn.to_features(frame, columns)
    sklearn.fit(pipeline, features, frame["y"].to_numpy(), None)
    hard, real = onnx.hard_rows(pipeline, features, signature)
    assert (len(hard), real) == (600 + 20 * (3 + 3 + 3), 600)
    parity = onnx.check_parity(onnx.convert(pipeline, signature), pipeline, hard, signature, LIMITS)
    assert parity.passed, parity.reason


def test_rows_to_compare_the_forms_on_stay_few_where_inputs_are_many() -> None:
    names = [f"x{number}" for number in range(400)]
    rng = np.random.default_rng(0)
    features = pd.DataFrame({name: rng.normal(size=200) for name in names})
    signature = ModelSignature(
        inputs=tuple(FieldSpec(name=name, type="number") for name in names), output="y"
    )
    hard, real = onnx.hard_rows(DummyRegressor().fit(features, range(200)), features, signature)
    assert (len(hard), real) == (200 + 6 * 3 * 400, 200)
    made = hard.to_numpy()[real:].reshape(400, 3, 6, 400)
    for place in (0, 200, 399):
        assert np.isnan(made[place, 0, :, place]).all()
        assert (made[place, 1, :, place] < -10).all()
        assert (made[place, 2, :, place] > 10).all()
        others = np.delete(made[place], place, axis=2)
        assert (others == np.delete(features.to_numpy()[:6], place, axis=1)).all()


def wide(inputs: int, count: int) -> tuple[pd.DataFrame, ModelSignature]:
    names = [f"x{number}" for number in range(inputs)]
    table = np.random.default_rng(0).normal(size=(count, inputs))
    fields = tuple(FieldSpec(name=name, type="number") for name in names)
    return pd.DataFrame(table, columns=names), ModelSignature(inputs=fields, output="y")


def test_rows_to_compare_the_forms_on_do_not_grow_with_the_square_of_the_inputs() -> None:
    """5,000 inputs would make 15,000 rows, of 75 million cells; neighbours share a row instead, and none is left out."""
    features, signature = wide(5000, 50)
    hard, real = onnx.hard_rows(DummyRegressor().fit(features, range(50)), features, signature)
    assert (len(hard), real) == (50 + 3 * 1333, 50)
    assert hard.size - features.size <= 20_000_000
    made = hard.to_numpy()[real:].reshape(1333, 3, 5000)
    groups = np.arange(5000) * 1333 // 5000
    for kind, odd in enumerate((np.isnan(made[:, 0]), made[:, 1] < -10, made[:, 2] > 10)):
        assert np.array_equal(odd, groups == np.arange(1333)[:, None]), kind


@pytest.mark.parametrize(("cells", "each"), [(40_000, 80), (5_000, 10), (1, 3)])
def test_rows_to_compare_the_forms_on_stay_within_the_cells(cells: int, each: int) -> None:
    features, signature = wide(500, 300)
    model = DummyRegressor().fit(features, range(300))
    hard, real = onnx.hard_rows(model, features, signature, cells=cells)
    assert (len(hard), real) == (each + 3 * (each // 3), each)
    assert np.isnan(hard).any().all()  # every input is missing somewhere


class Refusing(BaseEstimator):
    """Refuses what is missing in one input, and counts how often it was asked."""

    def __init__(self, name: str | None = None) -> None:
        self.name, self.asked = name, 0

    def predict(self, features: Any) -> Any:
        self.asked += 1
        if features[self.name or list(features)].isna().to_numpy().any():
            raise ValueError("missing")
        return np.zeros(len(features))


@pytest.mark.parametrize(("name", "kept", "asked"), [("x700", 3 * 888 - 1, 30), (None, 2 * 888, 501)])
def test_refused_rows_are_found_in_few_tries(name: str | None, kept: int, asked: int) -> None:
    features, signature = wide(888, 40)
    refusing = Refusing(name)
    hard, real = onnx.hard_rows(refusing, features, signature)
    some = 8000 // (3 * 888)
    assert (len(hard), real) == (40 + some * kept, 40)
    assert refusing.asked <= asked


def test_the_gate_catches_the_converter_that_is_silently_wrong(tmp_path: Path) -> None:
    """skl2onnx converts HistGradientBoosting with categorical_features, and gets many labels wrong."""
    rng = np.random.default_rng(0)
    count = 8000
    frame = pl.DataFrame(
        {"a": rng.normal(size=count), "b": rng.integers(0, 12, count).astype(float), "t": range(count)}
    ).with_columns(y=((pl.col("b").cast(int) % 3 == 0) ^ (pl.col("a") > 0)).cast(pl.String))
    columns = ColumnRoles(target="y", time="t", numeric=("a", "b"))
    signature = ModelSignature(
        inputs=(FieldSpec(name="a", type="number"), FieldSpec(name="b", type="number")), output="y"
    )
    candidate = Candidate(
        estimator="sklearn.ensemble.HistGradientBoostingClassifier",
        params={"categorical_features": [1], "max_iter": 30},
    )
    pipeline = sklearn.build_pipeline(candidate, columns, seed=0)
    features = sklearn.to_features(frame, columns)
    sklearn.fit(pipeline, features, frame["y"].to_numpy(), None)
    parity = onnx.check_parity(onnx.convert(pipeline, signature), pipeline, features, signature, LIMITS)
    assert not parity.passed
    assert parity.label_flips > 1000
    form, reason = model_package._write_model(
        tmp_path / "model", fitted(pipeline, features), signature, LIMITS, None
    )
    assert form == "sklearn"
    assert f"of {len(onnx.hard_rows(pipeline, features, signature)[0])} labels differ" in reason
    assert not (tmp_path / "model.onnx").exists()


def test_words_are_the_same_in_both_forms_whatever_their_letters(tmp_path: Path) -> None:
    columns = ColumnRoles(target="y", time="t", text=("note",))
    words = [
        "Ärger mit dem Fahrer",
        "ärger keiner",
        "Ça va à Paris",
        "2nd-hand car, it's BAD",
        "ДОБРЫЙ день",
        "x y z",
    ]
    frame = rows().with_columns(
        note=pl.Series([words[i % 6] for i in range(600)]), y=pl.Series([float(i % 6) for i in range(600)])
    )
    model, served = packaged(Candidate(estimator="sklearn.linear_model.Ridge"), columns, frame, tmp_path)
    assert served.manifest.serving_form == "onnx", served.manifest.serving_reason
    answers = served.predict_columns({"note": [word.upper() for word in words]})
    assert answers == pytest.approx([float(i) for i in range(6)], abs=0.2)
    signature = ModelSignature(inputs=(FieldSpec(name="note", type="string"),), output="y")
    hard, real = onnx.hard_rows(model.pipeline, model.features, signature)
    made = hard["note"].to_numpy()[real:]
    assert "ÄRGER KEINERÉ" in made


def test_limits_are_limits() -> None:
    expected, got = np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 1.0, 2.0, 3.01])
    spread = float(np.std(expected))

    def compare(limit: float, values: Any = got) -> Any:
        return compare_forms(
            expected=expected,
            got=np.asarray(values),
            expected_probabilities=None,
            got_probabilities=None,
            limits=ParityLimits(maximum_difference=limit, p999_difference=limit),
        )

    assert compare(0.0101 / spread).passed
    assert not compare(0.0099 / spread).passed
    assert not compare(1e9, [0.0, 1.0, 2.0, np.nan]).passed
    assert not compare(1e9, [0.0, 1.0, 2.0, np.inf]).passed
    labels = np.array(["a", "b"] * 50)
    flipped = labels.copy()
    flipped[0] = "b"
    for share, passed in ((0.0, False), (0.01, True)):
        parity = compare_forms(
            expected=labels,
            got=flipped,
            expected_probabilities=np.full((100, 2), 0.5),
            got_probabilities=np.full((100, 2), 0.5),
            limits=ParityLimits(label_flips=share),
        )
        assert (parity.passed, parity.label_flips) == (passed, 1)


def test_made_rows_do_not_widen_the_spread() -> None:
    real, made = np.random.default_rng(0).normal(size=500), np.array([1e5, -1e5] * 20)
    expected = np.concatenate([real, made])
    got = expected.copy()
    got[:100] += 5.0

    def passes(real_rows: int | None) -> bool:
        return compare_forms(
            expected=expected,
            got=got,
            expected_probabilities=None,
            got_probabilities=None,
            limits=LIMITS,
            real_rows=real_rows,
        ).passed

    assert passes(None)
    assert not passes(500)


class Strict(TransformerMixin, BaseEstimator):
    """Refuses what it does not know, as a lookup in a dictionary does."""

    def fit(self, features: Any, target: Any = None) -> Strict:
        self.known_ = set(features["kind"])
        return self

    def transform(self, features: Any) -> Any:
        unknown = set(features["kind"]) - self.known_
        if unknown:
            raise KeyError(unknown.pop())
        return features[["year"]]


def test_only_the_made_rows_that_are_refused_are_left_out() -> None:
    columns = ColumnRoles(target="y", time="t", numeric=("year",), categorical=("kind",))
    signature = ModelSignature(
        inputs=(FieldSpec(name="year", type="number"), FieldSpec(name="kind", type="string")), output="y"
    )
    frame = rows().with_columns(year=pl.Series(np.random.default_rng(0).integers(2000, 2021, 600)))
    features = sklearn.to_features(frame, columns).assign(kind=["red", "green"] * 300)
    pipeline = make_pipeline(Strict(), LinearRegression()).fit(features, frame["y"].to_numpy())
    hard, real = onnx.hard_rows(pipeline, features, signature)
    # Missing years and missing or unseen kinds are refused; years far below and far above are not.
    assert (len(hard), real) == (600 + 2 * 20, 600)
    assert (hard["year"].min(), hard["year"].max()) == (1800.0, 2220.0)


@pytest.mark.parametrize(
    ("estimator", "form"),
    [
        ("sklearn.svm.SVC", "onnx"),
        ("sklearn.svm.LinearSVC", "onnx"),
        ("sklearn.linear_model.RidgeClassifier", None),
        ("sklearn.linear_model.SGDClassifier", None),
        ("sklearn.linear_model.Perceptron", None),
        ("sklearn.linear_model.LogisticRegression", "onnx"),
    ],
)
def test_margins_are_no_probabilities(estimator: str, form: str | None, tmp_path: Path) -> None:
    columns = ColumnRoles(target="label", time="t", numeric=("a", "b"))
    frame = rows().with_columns(label=pl.when(pl.col("a") > 0).then(pl.lit("yes")).otherwise(pl.lit("no")))
    model, served = packaged(Candidate(estimator=estimator), columns, frame, tmp_path)
    assert form in (None, served.manifest.serving_form), served.manifest.serving_reason
    answers = served.answer({name: model.features[name].to_numpy() for name in columns.inputs})
    assert answers.values.tolist() == model.unseen.values.tolist()
    if "Logistic" in estimator:
        assert answers.probabilities is not None
        assert answers.probabilities == pytest.approx(model.pipeline.predict_proba(model.features), abs=1e-5)
    else:
        assert answers.probabilities is None
        assert "gives no probabilities to compare" in served.manifest.serving_reason


@pytest.mark.parametrize(
    "names", [("label", "probabilities"), ("petal length (cm)", "1.Größe"), ("a b", "a_b")]
)
def test_columns_may_have_any_name(names: tuple[str, str], tmp_path: Path) -> None:
    """skl2onnx changes what is no identifier, and what it calls a value of its own."""
    frame = rows().rename(dict(zip(("a", "kind"), names, strict=True)))
    frame = frame.with_columns(flag=pl.when(pl.col("y") > 1).then(pl.lit("yes")).otherwise(pl.lit("no")))
    columns = ColumnRoles(target="flag", time="t", numeric=(names[0], "b"), categorical=names[1:])
    candidate = Candidate(estimator="sklearn.linear_model.LogisticRegression")
    model, served = packaged(candidate, columns, frame, tmp_path)
    assert served.manifest.serving_form == "onnx", served.manifest.serving_reason
    answers = served.answer({name: model.features[name].to_numpy() for name in columns.inputs})
    assert answers.probabilities == pytest.approx(model.pipeline.predict_proba(model.features), abs=1e-5)


def test_true_and_false_are_one_text_everywhere(tmp_path: Path) -> None:
    columns = ColumnRoles(target="flag", time="t", numeric=("a", "b"))
    frame = rows().with_columns(flag=pl.col("a") > 0.5)
    candidate = Candidate(estimator="sklearn.linear_model.LogisticRegression")
    model, served = packaged(candidate, columns, frame, tmp_path)
    manifest = served.manifest
    assert manifest.serving_form == "onnx", manifest.serving_reason
    assert manifest.classes == ("False", "True")
    assert manifest.trained_on.class_shares == pytest.approx(
        {"False": 1 - frame["flag"].head(-200).mean(), "True": frame["flag"].head(-200).mean()}  # type: ignore[operator,dict-item]
    )
    assert manifest.trained_on.simple_prediction == "False"
    answers = served.answer({name: model.features[name].to_numpy() for name in columns.inputs})
    accuracy = resolve_metric("accuracy")
    score = evaluate_metric(accuracy, target=frame["flag"].tail(200).to_numpy(), prediction=answers)
    assert score.value > 0.9


@pytest.mark.parametrize(("labels", "form"), [((0.0, 1.0), "onnx"), ((2.0, 10.0), "sklearn")])
def test_labels_that_are_fractions_are_answered_as_they_are(
    labels: tuple[float, float], form: str, tmp_path: Path
) -> None:
    columns = ColumnRoles(target="flag", time="t", numeric=("a", "b"))
    frame = rows().with_columns(flag=pl.when(pl.col("a") > 0.5).then(labels[1]).otherwise(labels[0]))
    candidate = Candidate(estimator="sklearn.linear_model.LogisticRegression")
    model, served = packaged(candidate, columns, frame, tmp_path)
    assert served.manifest.serving_form == form, served.manifest.serving_reason
    assert served.manifest.classes == tuple(map(str, labels))
    answers = served.answer({name: model.features[name].to_numpy() for name in columns.inputs})
    score = evaluate_metric(
        resolve_metric("accuracy"), target=frame["flag"].tail(200).to_numpy(), prediction=answers
    )
    assert score.value > 0.9


def labeled(labels: Any, count: int = 600) -> tuple[pl.DataFrame, ColumnRoles]:
    """Rows whose input says which label they have, once in a hundred wrongly."""
    places = np.random.default_rng(5).integers(0, len(labels), count)
    frame = rows(count).with_columns(
        a=pl.Series((places + np.where(np.arange(count) % 100, 0, 1)).astype(float)),
        y=pl.Series([labels[place] for place in places]),
        weight=pl.Series(np.where(places == 0, 1.0, 5.0)),
    )
    return frame, ColumnRoles(target="y", time="t", numeric=("a", "b"))


def fit_labels(
    estimator: str, frame: pl.DataFrame, columns: ColumnRoles, *, weights: Any = None, **params: Any
) -> Any:
    pipeline = sklearn.build_pipeline(Candidate(estimator=estimator, params=params), columns, seed=0)
    features = sklearn.to_features(frame, columns)
    return sklearn.fit(pipeline, features, sklearn.to_target(frame[columns.target], pipeline), weights)


def calibrated() -> Any:
    """Hands labels on to XGBoost as they are."""
    import xgboost

    return CalibratedClassifierCV(xgboost.XGBClassifier(n_estimators=10), cv=2)


@pytest.mark.parametrize(
    "labels", [(False, True), (0.0, 1.0), ("n", "y"), (0, 1), (1, 2, 3), ("a", "b", "c")]
)
@pytest.mark.parametrize(
    "estimator",
    ["sklearn.tree.DecisionTreeClassifier", "xgboost.XGBClassifier", f"{__name__}:calibrated"],
)
def test_a_classifier_answers_with_the_labels_it_was_given(estimator: str, labels: tuple[Any, ...]) -> None:
    """XGBoost refuses some labels and numbers others itself; it learns their codes then."""
    pytest.importorskip("xgboost")
    frame, columns = labeled(labels)
    pipeline = fit_labels(estimator, frame, columns)
    answers = sklearn.predict(pipeline, sklearn.to_features(frame, columns))
    assert answers.classes == tuple(map(str, labels))
    assert answers.probabilities is not None
    given = frame["y"].to_list()
    assert np.mean([str(one) == str(label) for one, label in zip(answers.values, given, strict=True)]) > 0.97
    likeliest = np.array(answers.classes)[answers.probabilities.argmax(axis=1)]
    assert likeliest.tolist() == [str(value) for value in answers.values]
    for metric in ("log_loss", "accuracy"):
        measured = evaluate_metric(resolve_metric(metric), target=frame["y"].to_numpy(), prediction=answers)
        assert (measured.value > 0.97) == (metric == "accuracy")


def test_labels_that_xgboost_takes_reach_it_as_they_are() -> None:
    pytest.importorskip("xgboost")
    for labels, coded in (((0, 1), False), (("n", "y"), True)):
        pipeline = fit_labels("xgboost.XGBClassifier", *labeled(labels), n_estimators=5)
        name = type(sklearn.final_estimator(pipeline)[1]).__name__
        assert name == ("LabelCodedClassifier" if coded else "XGBClassifier")


@pytest.mark.parametrize("labels", [(0, 1, 2), (1, 2, 3), ("a", "b", "c")])
def test_a_fold_without_a_label_is_fitted_and_measured(labels: tuple[Any, ...]) -> None:
    """XGBoost refuses 0 and 2 without 1; the label of the gap has probability 0, as with scikit-learn's."""
    pytest.importorskip("xgboost")
    frame, columns = labeled(labels)
    there = frame.filter(pl.col("y") != labels[1])
    losses = []
    for estimator in ("xgboost.XGBClassifier", "sklearn.tree.DecisionTreeClassifier"):
        answers = sklearn.predict(fit_labels(estimator, there, columns), sklearn.to_features(frame, columns))
        assert answers.classes == (str(labels[0]), str(labels[2]))
        measured = evaluate_metric(
            resolve_metric("log_loss"), target=frame["y"].to_numpy(), prediction=answers
        )
        losses.append(measured.value)
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


def test_weights_reach_xgboost_beneath_the_codes() -> None:
    """Rows of the second label count five times: where nothing tells them apart, its share is five sixths."""
    pytest.importorskip("xgboost")
    frame, columns = labeled(("n", "y"))
    frame = frame.with_columns(a=pl.lit(0.0), b=pl.lit(0.0))
    share = float((frame["y"] == "y").mean())  # type: ignore[arg-type]
    expected = 5 * share / (5 * share + 1 - share)
    for weights, wanted in ((None, share), (frame["weight"].to_numpy(), expected)):
        pipeline = fit_labels("xgboost.XGBClassifier", frame, columns, weights=weights)
        answers = sklearn.predict(pipeline, sklearn.to_features(frame.head(1), columns))
        assert answers.probabilities[0, 1] == pytest.approx(wanted, abs=0.01)  # type: ignore[index]


class CostsByName(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A user's own class that codes the labels itself, and goes by their names."""

    def __init__(self, booster: Any = None, costs: tuple[tuple[str, float], ...] = (("y", 5.0),)) -> None:
        self.booster, self.costs = booster, costs

    def fit(self, features: Any, target: Any) -> CostsByName:
        self.classes_, codes = np.unique(target, return_inverse=True)
        weights = np.array([dict(self.costs).get(label, 1.0) for label in target])
        self.booster_ = clone(self.booster).fit(features, codes, sample_weight=weights)
        return self

    def predict(self, features: Any) -> Any:
        return self.classes_[self.booster_.predict(features)]


def test_the_copy_for_mlflow_takes_numbers_of_any_kind() -> None:
    columns = ColumnRoles(target="y", time="t", numeric=("a", "b"))
    features = pd.DataFrame({"a": [1.0, 2.0, 4.0], "b": [3.0, 1.0, 2.0]})
    copy = sklearn.with_served_inputs(
        make_pipeline(DummyRegressor()).fit(features, features["a"]), features, columns
    )
    odd = pd.DataFrame({"a": [1, None, 4.0], "b": [True, 2, 3]}, dtype=object)
    seen = copy[0].transform(odd)
    assert seen["a"].tolist() == pytest.approx([1.0, float("nan"), 4.0], nan_ok=True)
    assert seen["b"].tolist() == [1.0, 2.0, 3.0]


def test_a_class_of_the_users_own_gets_the_labels_though_xgboost_is_a_part_of_it() -> None:
    xgboost = pytest.importorskip("xgboost")
    frame, columns = labeled(("n", "y"))
    features = sklearn.to_features(frame, columns)
    own = make_pipeline(CostsByName(xgboost.XGBClassifier(n_estimators=5)))
    sklearn.fit(own, features[list(columns.numeric)], frame["y"].to_numpy(), None)
    assert type(own[-1]) is CostsByName
    assert own[-1].classes_.tolist() == ["n", "y"]


def test_an_earlier_stage_of_xgboost_says_what_labels_it_takes() -> None:
    xgboost = pytest.importorskip("xgboost")
    frame, columns = labeled(("n", "y"))
    features = sklearn.to_features(frame, columns)[list(columns.numeric)]
    selecting = make_pipeline(SelectFromModel(xgboost.XGBClassifier(n_estimators=5)), LogisticRegression())
    with pytest.raises(ValueError, match="in a part of the pipeline takes only labels that are numbered"):
        sklearn.fit(selecting, features, frame["y"].to_numpy(), None)


def test_a_quantity_is_not_coded_as_labels() -> None:
    pytest.importorskip("xgboost")
    frame = rows(100)
    columns = ColumnRoles(target="y", time="t", numeric=("a",))
    pipeline = sklearn.build_pipeline(Candidate(estimator="xgboost.XGBClassifier"), columns, seed=0)
    with pytest.raises(ValueError, match="Unknown label type: continuous"):
        sklearn.fit(pipeline, sklearn.to_features(frame, columns), frame["y"].to_numpy(), None)


@pytest.mark.parametrize("labels", [(False, True), ("a", "b", "c"), (1, 2, 3)])
def test_xgboost_is_served_with_its_labels(
    labels: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xgboost")
    frame, columns = labeled(labels)
    candidate = Candidate(estimator="xgboost.XGBClassifier", params={"n_estimators": 20})
    monkeypatch.setenv(TRUSTED_TYPES_VARIABLE, "xgboost.sklearn.XGBClassifier")
    with pytest.raises(
        UnsafeModelError, match=r"holds types that no service would load: xgboost.core.Booster\."
    ):
        packaged(candidate, columns, frame, tmp_path)
    monkeypatch.setenv(TRUSTED_TYPES_VARIABLE, "xgboost.core.Booster,xgboost.sklearn.XGBClassifier")
    model, served = packaged(candidate, columns, frame, tmp_path)
    assert served.manifest.serving_form == "sklearn"
    assert "XGBClassifier learned codes of the labels" in served.manifest.serving_reason
    assert served.manifest.classes == tuple(map(str, labels))
    answers = served.answer({name: model.features[name].to_numpy() for name in ("a", "b")})
    assert answers.values.tolist() == [str(value) for value in model.unseen.values]
    assert np.array_equal(answers.probabilities, model.unseen.probabilities)  # type: ignore[arg-type]
    again = fit_labels("xgboost.XGBClassifier", frame.head(-200), columns, n_estimators=20)
    assert np.array_equal(again.predict_proba(model.features), model.unseen.probabilities)  # type: ignore[arg-type]


def test_numbers_are_served_as_they_were_learned(tmp_path: Path) -> None:
    """Boosting splits at values that occur; 0.7 and the float32 next to it are not on two sides of one."""
    columns = ColumnRoles(target="y", time="t", numeric=("a",), categorical=("kind",))
    tenths = np.tile(np.arange(1000) / 10.0, 20)
    frame = pl.DataFrame(
        {
            "a": tenths,
            "kind": np.tile(["red", "green"], 10_000),
            "y": np.floor(tenths * 10.0) % 7,
            "t": pl.datetime_range(
                datetime(2024, 1, 1), datetime(2026, 12, 31), "1h", time_zone="UTC", eager=True
            )[:20_000],
        }
    )
    candidate = Candidate(
        estimator="sklearn.ensemble.HistGradientBoostingRegressor",
        params={"max_iter": 20, "categorical_features": [1]},
    )
    _, served = packaged(candidate, columns, frame, tmp_path)
    assert served.manifest.serving_form == "sklearn", served.manifest.serving_reason
    asked = np.arange(1000) / 10.0
    learned = asked.astype(np.float32).astype(np.float64)
    answers, expected = (
        served.predict_columns({"a": values, "kind": ["red"] * 1000}) for values in (asked, learned)
    )
    assert answers == expected


def test_predictions_that_were_learned_by_heart_are_no_reference(tmp_path: Path) -> None:
    columns = ColumnRoles(target="y", time="t", numeric=("a", "b"))
    frame = rows().with_columns(y=pl.lit(np.random.default_rng(3).exponential(size=600)))
    tree = Candidate(estimator="sklearn.tree.DecisionTreeRegressor")
    window = Window(start=frame["t"].min(), end=frame["t"].max())  # type: ignore[arg-type]
    split = Split(frame.head(-200), frame.tail(200), window, window)
    features, held_out = (sklearn.to_features(part, columns) for part in (frame, split.holdout))
    twin = sklearn.build_pipeline(tree, columns, seed=0).fit(features.head(400), frame["y"].head(400))
    refit = sklearn.build_pipeline(tree, columns, seed=0).fit(features, frame["y"])
    assert refit.predict(held_out) == pytest.approx(split.holdout["y"].to_numpy())  # by heart
    dataset = DatasetVersion(
        uri="memory", version=0, dataset_digest="sha256:0", row_count=frame.height, columns={}
    )
    profiles = []
    for name, model in {
        "measured": fitted(twin, held_out),
        "refit": fitted(twin, held_out)._replace(pipeline=refit),
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        model_package.write_package(folder, model, columns, dataset, split, limits=LIMITS, quantize=None)
        profile = profile_from_json((folder / REFERENCE_PROFILE_FILE).read_text())
        profiles.append(profile.column("(prediction)"))
    assert profiles[0].mean == pytest.approx(profiles[1].mean)


def packaged(
    candidate: Candidate, columns: ColumnRoles, frame: pl.DataFrame, folder: Path
) -> tuple[model_package.FittedModel, ServedModel]:
    """Fit on all but the newest 200 rows, package, and load as a service does."""
    window = Window(start=frame["t"].min(), end=frame["t"].max())  # type: ignore[arg-type]
    split = Split(frame.head(-200), frame.tail(200), window, window)
    pipeline = sklearn.build_pipeline(candidate, columns, seed=0)
    target = sklearn.to_target(split.training[columns.target], pipeline)
    sklearn.fit(pipeline, sklearn.to_features(split.training, columns), target, None)
    model = fitted(pipeline, sklearn.to_features(split.holdout, columns))
    dataset = DatasetVersion(
        uri="memory", version=0, dataset_digest="sha256:0", row_count=frame.height, columns={}
    )
    manifest = model_package.write_package(
        folder, model, columns, dataset, split, limits=LIMITS, quantize=None
    )
    return model, load_model(folder, write_manifest(folder, manifest))


class Doubler(TransformerMixin, BaseEstimator):
    """A user's own transformer."""

    def fit(self, features: Any, target: Any = None) -> Doubler:
        self.fitted_ = True
        return self

    def transform(self, features: Any) -> Any:
        return np.asarray(features, dtype=float) * 2.0


def own_pipeline() -> Pipeline:
    return make_pipeline(Doubler(), LinearRegression())


def test_own_transformers_are_served_when_they_are_vouched_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = ColumnRoles(target="y", time="t", numeric=("a",))
    signature = ModelSignature(inputs=(FieldSpec(name="a", type="number"),), output="y")
    frame = rows()
    pipeline = sklearn.build_pipeline(
        Candidate(estimator=f"{__name__}:own_pipeline"), columns, preprocessing="none", seed=0
    )
    features = sklearn.to_features(frame, columns)
    sklearn.fit(pipeline, features, frame["y"].to_numpy(), None)
    model = fitted(pipeline, features)
    with pytest.raises(UnsafeModelError, match=r"test_training\.Doubler.*AIRFLOW_MLOPS_TRUSTED_TYPES"):
        model_package._write_model(tmp_path / "model", model, signature, LIMITS, None)
    monkeypatch.setenv(TRUSTED_TYPES_VARIABLE, f"{__name__}.Doubler")
    form, reason = model_package._write_model(tmp_path / "model", model, signature, LIMITS, None)
    assert form == "sklearn"
    assert "no ONNX form" in reason


@pytest.mark.parametrize("how", ["int8", "float16"])
def test_a_smaller_form_passes_the_same_gate_or_is_not_used(how: Any, tmp_path: Path) -> None:
    columns = ColumnRoles(target="y", time="t", numeric=("a",))
    signature = ModelSignature(inputs=(FieldSpec(name="a", type="number"),), output="y")
    frame = rows()
    candidate = Candidate(
        estimator="sklearn.neural_network.MLPRegressor",
        params={"hidden_layer_sizes": [64, 64], "max_iter": 40},
    )
    pipeline = sklearn.build_pipeline(candidate, columns, seed=0)
    features = sklearn.to_features(frame, columns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sklearn.fit(pipeline, features, frame["y"].to_numpy(), None)
    model = fitted(pipeline, features)
    _, exact = model_package._write_model(tmp_path / "model", model, signature, LIMITS, how)
    assert exact.startswith("kept exact")
    exact_size = (tmp_path / "model.onnx").stat().st_size
    loose = ParityLimits(maximum_difference=1.0, p999_difference=1.0)
    _, smaller = model_package._write_model(tmp_path / "model", model, signature, loose, how)
    assert smaller.startswith(f"{how}, ")
    assert (tmp_path / "model.onnx").stat().st_size < 0.8 * exact_size


@pytest.mark.parametrize("estimator", ["MLPRegressor", "MLPClassifier"])
@pytest.mark.parametrize("inputs", [{"categorical": ("kind",)}, {"text": ("note",)}])
def test_half_floats_go_with_categories_and_texts(
    estimator: str, inputs: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    columns = ColumnRoles(target="y", time="t", numeric=("a",), **inputs)  # type: ignore[arg-type]
    fields = [FieldSpec(name=n, type="number" if n == "a" else "string") for n in columns.inputs]
    signature = ModelSignature(inputs=tuple(fields), output="y")
    params = {"hidden_layer_sizes": [64, 64], "max_iter": 40}
    candidate = Candidate(estimator=f"sklearn.neural_network.{estimator}", params=params)
    pipeline = sklearn.build_pipeline(candidate, columns, seed=0)
    frame = rows()
    features, target = sklearn.to_features(frame, columns), frame["y"].to_numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sklearn.fit(
            pipeline, features, (target > 0).astype(int) if "Classifier" in estimator else target, None
        )
    limits = ParityLimits(label_flips=0.01, maximum_difference=0.03, p999_difference=0.03)
    _, reason = model_package._write_model(
        tmp_path / "model", fitted(pipeline, features), signature, limits, "float16"
    )
    assert reason.startswith("float16, "), reason


_WRITES_A_MODEL = """
import sys
from pathlib import Path
import lightgbm, numpy as np
from sklearn.neighbors import RadiusNeighborsRegressor
from sklearn.pipeline import make_pipeline
from airflow_mlops.integrations import sklearn
from tests.unit.test_training import WordList
x = np.random.default_rng(0).normal(size=(300, 3))
last = {
    "lightgbm": lightgbm.LGBMRegressor(n_estimators=5, verbose=-1, random_state=0),
    "neighbors": RadiusNeighborsRegressor(5.0),
}[sys.argv[1]]
scale = float(sys.argv[2])
sklearn.save_skops(make_pipeline(WordList(), last).fit(x, scale * x[:, 0]), Path(sys.argv[3]))
"""


class WordList(TransformerMixin, BaseEstimator):
    """A user's own transformer, with a set, shared arrays and bytes."""

    def fit(self, features: Any, target: Any = None) -> WordList:
        self.words_ = {"late", "early", "on time"}
        self.mean_ = self.again_ = np.asarray(features).mean(axis=0)
        self.key_ = bytearray(b"key")
        self.fitted_ = True
        return self

    def transform(self, features: Any) -> Any:
        return np.asarray(features, dtype=float) - self.mean_


@pytest.mark.parametrize("last", ["lightgbm", "neighbors"])
def test_the_scikit_learn_form_has_the_same_bytes_in_every_process(last: str, tmp_path: Path) -> None:
    pytest.importorskip("lightgbm")
    digests = []
    for number, scale in enumerate((1.0, 1.0, 2.0)):
        path = tmp_path / f"{number}.skops"
        subprocess.run(
            [sys.executable, "-c", _WRITES_A_MODEL, last, str(scale), str(path)],
            check=True,
            timeout=120,
            env=os.environ | {"PYTHONHASHSEED": str(number)},
        )
        digests.append(hashlib.sha256(path.read_bytes()).hexdigest())
    assert digests[0] == digests[1] != digests[2]
    loaded = skops.io.load(path, trusted=skops.io.get_untrusted_types(file=path))
    words = loaded[0]
    assert (words.words_, bytes(words.key_)) == ({"late", "early", "on time"}, b"key")
    assert words.mean_ is words.again_
    x = np.random.default_rng(0).normal(size=(300, 3))
    assert len(loaded.predict(x)) == 300


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (
            {"estimator_params": {"estimator": Ridge()}},
            r"estimator_params\['estimator'\] is an object \(Ridge\)",
        ),
        (
            {"candidates": [{"estimator": "a.B", "params": {"estimators": [["one", Ridge()]]}}]},
            r"candidates\[0\]\['params'\]\['estimators'\]\[0\]\[1\] is an object",
        ),
    ],
)
def test_an_object_as_a_parameter_is_refused_by_name(given: dict[str, Any], named: str) -> None:
    operator = TrainModelOperator(
        task_id="train", dataset="t", model_name="m", target="y", time_column="t", **given
    )
    with pytest.raises(ValueError, match=named + ".*make_estimator"):
        operator.build_spec({})


def test_a_package_that_nothing_would_load_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_package, "MAXIMUM_PACKAGE_BYTES", 1000)
    with pytest.raises(
        ValueError, match=r"package of the model has .* at most 1,000 are loaded\. Train a smaller"
    ):
        packaged(Candidate(estimator="sklearn.linear_model.Ridge"), COLUMNS, rows(), tmp_path)


def test_a_manifest_that_nothing_would_load_is_not_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_package, "MAXIMUM_MANIFEST_BYTES", 1000)
    with pytest.raises(ValueError, match=r"manifest of the package would have .* at most 1,000 are loaded"):
        packaged(Candidate(estimator="sklearn.linear_model.Ridge"), COLUMNS, rows(), tmp_path)


def test_example_rows_show_what_may_be_shown() -> None:
    features = pd.DataFrame({"age": [31.0, 7.0], "note": ["Jane Doe", None], "text": ["x" * 2000, "y"]})
    example = model_package.example_rows(features, 1, ["age", "note"])
    assert example.to_dict(orient="records") == [{"age": 0.0, "note": "private", "text": "x" * 1000}]
    assert features["note"][0] == "Jane Doe"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"private_columns": ["nobody"]}, "nobody, which is no input"),
        ({"private_columns": ["a"], "background_rows": 5}, "a is private"),
    ],
)
def test_private_columns_that_make_no_sense(more: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        spec_of(**more).columns()


@pytest.mark.parametrize(("how", "categories"), [("int8", ("kind",)), ("float16", ())])
def test_a_form_that_is_not_smaller_is_not_used(
    how: Any, categories: tuple[str, ...], tmp_path: Path
) -> None:
    columns = ColumnRoles(target="y", time="t", numeric=("a",), categorical=categories)
    inputs = (
        FieldSpec(name="a", type="number"),
        *(FieldSpec(name=name, type="string") for name in categories),
    )
    signature = ModelSignature(inputs=inputs, output="y")
    frame = rows()
    pipeline = sklearn.build_pipeline(Candidate(estimator="sklearn.linear_model.Ridge"), columns, seed=0)
    features = sklearn.to_features(frame, columns)
    sklearn.fit(pipeline, features, frame["y"].to_numpy(), None)
    model = fitted(pipeline, features)
    model_package._write_model(tmp_path / "model", model, signature, LIMITS, None)
    exact = (tmp_path / "model.onnx").read_bytes()
    loose = ParityLimits(maximum_difference=1.0, p999_difference=1.0)
    _, reason = model_package._write_model(tmp_path / "model", model, signature, loose, how)
    assert reason.startswith(f"kept exact, {how} has ")
    assert (tmp_path / "model.onnx").read_bytes() == exact


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false"]
    command = [shutil.which("git") or "git", "-C", str(folder), *who, *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=30)


def test_the_code_version_is_that_of_the_estimators_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout, elsewhere = tmp_path / "bundle", tmp_path / "elsewhere"
    for folder in (checkout / "models", elsewhere):
        folder.mkdir(parents=True)
    model = checkout / "models" / "my_models.py"
    model.write_text("one = 1\n")
    git(checkout, "init", "-q")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "one")
    monkeypatch.chdir(elsewhere)
    known = code_version([model])
    assert len(known["git_commit"]) == 40
    assert known["git_dirty"] == "false"
    (checkout / "notes.txt").write_text("no code")
    assert code_version([model]) == known
    helper = checkout / "helper.py"
    helper.write_text("two = 2\n")
    assert code_version([model]) == known | {"git_dirty": "true"}
    helper.unlink()
    model.write_text("one = 2\n")
    assert code_version([model])["git_dirty"] == "true"

    nothing = {"git_commit": "unknown", "git_dirty": "unknown"}
    assert code_version([elsewhere / "my_models.py"]) == nothing
    # An installed estimator: not the worker's working directory, but the Dag file says whose code decides.
    installed = tmp_path / "site-packages" / "sklearn" / "base.py"
    monkeypatch.chdir(checkout)
    assert code_version([installed]) == nothing
    git(checkout, "checkout", "-q", "models/my_models.py")
    dag = dag_code_version(model, None)
    assert dag == known
    assert code_version([installed], dag) == known
    assert code_version([model], dag) == known
    assert dag_code_version(elsewhere / "dag.py", None) == {}
    assert dag_code_version(elsewhere / "dag.py", "abc") == {
        "git_commit": "abc",
        "git_dirty": "unknown",
        "bundle_version": "abc",
    }


def test_the_dag_files_commit_travels_with_the_training_and_decides_nothing(tmp_path: Path) -> None:
    file = tmp_path / "dag.py"
    file.write_text("one = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "one")
    operator = TrainModelOperator(
        task_id="train",
        dataset="t",
        model_name="m",
        estimator="e.E",
        target="y",
        time_column="t",
        numeric=["x"],
    )
    operator.window_start = operator.window_end = None
    bundle = SimpleNamespace(version="v7")
    context: Any = {"dag": SimpleNamespace(fileloc=str(file)), "ti": SimpleNamespace(bundle_instance=bundle)}
    spec = from_dict(TrainSpec, operator.build_spec(context))
    assert len(spec.dag_code["git_commit"]) == 40
    assert (spec.dag_code["git_dirty"], spec.dag_code["bundle_version"]) == ("false", "v7")
    assert _task_key(spec) == _task_key(replace(spec, dag_code={}))


def test_infinity_is_another_argument_than_none() -> None:
    def keys(tol: Any) -> tuple[str, str, str]:
        asked = spec_of(estimator_params={"tol": tol, "sizes": [[1, tol]]})
        tried = spec_of(
            estimator=None,
            candidates=[{"estimator": "e.E", "params": {"tol": tol}, "space": {"x": [1.0, tol]}}],
        )
        space = spec_of(estimator=None, candidates=[{"estimator": "e.E", "space": {"x": [1.0, tol]}}])
        return _task_key(asked), _task_key(tried), _task_key(space)

    known = [keys(tol) for tol in (None, float("inf"), float("-inf"), float("nan"), 1.0)]
    assert all(len({*column}) == 5 for column in zip(*known, strict=True))


@pytest.mark.parametrize("kind", ["Regressor", "Classifier"])
def test_a_forest_on_several_threads_gives_the_same_bits_every_time(kind: str) -> None:
    columns = ColumnRoles(target="y", time="t", numeric=("a", "b"))
    frame = rows(2000)
    candidate = Candidate(
        estimator=f"sklearn.ensemble.RandomForest{kind}", params={"n_estimators": 60, "n_jobs": 4}
    )
    pipeline = sklearn.build_pipeline(candidate, columns, seed=0)
    features = sklearn.to_features(frame, columns)
    y = frame["y"].to_numpy()
    sklearn.fit(pipeline, features, y if kind == "Regressor" else y > 0, None)
    answers = [sklearn.predict(pipeline, features) for _ in range(15)]
    assert {one.values.tobytes() for one in answers} == {answers[0].values.tobytes()}
    if kind == "Classifier":
        assert len({np.asarray(one.probabilities).tobytes() for one in answers}) == 1
    assert pipeline.get_params()["estimator__n_jobs"] == 4  # a service may still use them all


def test_what_an_estimator_refuses_is_named() -> None:
    columns = ColumnRoles(target="y", time="t", numeric=("a", "b"))
    frame = rows(100)
    ridge = Candidate(estimator="sklearn.linear_model.Ridge")
    huge = frame.with_columns(a=pl.when(pl.col("t") == frame["t"][7]).then(1e300).otherwise(pl.col("a")))
    with pytest.raises(
        ValueError, match="column 'a' is infinite, or too large for 32 bits, in 1 of 100 rows"
    ):
        sklearn.fit(
            sklearn.build_pipeline(ridge, columns, seed=0),
            sklearn.to_features(huge, columns),
            frame["y"].to_numpy(),
            None,
        )
    one = ColumnRoles(target="y", time="t", numeric=("a",))
    selection = sklearn.FeatureSelection(method="rfe", keep=99)
    with pytest.raises(ValueError, match="feature_selection keeps 99 of 1 features"):
        sklearn.fit(
            sklearn.build_pipeline(ridge, one, selection=selection, seed=0),
            sklearn.to_features(frame, one),
            frame["y"].to_numpy(),
            None,
        )
    with pytest.raises(ValueError, match="keep is 0"):
        sklearn.FeatureSelection(method="rfe", keep=0)
    with pytest.raises(ValueError, match=r"space of 'a\.b' gives no value for alpha"):
        Candidate(estimator="a.b", space={"alpha": ()})


def test_a_search_that_another_process_took_over_can_be_tried_again(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path}/shared.db"

    def overtaken(candidate: Candidate, fold: int) -> float:
        run_search(storage, trials=2)
        return bowl(candidate, fold)

    with pytest.raises(TransientError, match="took this one for dead"):
        run_search(storage, overtaken, trials=2)


def test_peak_memory_is_this_processs_own() -> None:
    """A process that was forked from a large one is not as large as that."""
    held = np.ones(40_000_000)  # 320 MB here
    code = "import sys; from airflow_mlops.serving.probe import peak_memory_mb as peak; print(peak())"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert 20.0 < float(done.stdout) < held.nbytes / 1e6


def test_held_out_rows_that_are_infinite_are_named() -> None:
    frame = rows()
    pipeline = sklearn.build_pipeline(Candidate(estimator="sklearn.linear_model.Ridge"), COLUMNS, seed=0)
    features = sklearn.to_features(frame, COLUMNS)
    sklearn.fit(pipeline, features, sklearn.to_target(frame[COLUMNS.target], pipeline), None)
    name = COLUMNS.numeric[0]
    features.loc[3, name] = np.inf
    with pytest.raises(ValueError, match=f"column {name!r} is infinite.* in 1 of {len(features)} rows"):
        sklearn.predict(pipeline, features)
