"""Small real model packages for tests."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import polars as pl

from airflow_mlops.core.codec import canonical_json, to_dict
from airflow_mlops.core.comparison.metrics import resolve_metric
from airflow_mlops.core.comparison.predictions import Graded, Predictions
from airflow_mlops.core.model.background import BACKGROUND_FILE, Background
from airflow_mlops.core.model.columns import ColumnRoles
from airflow_mlops.core.model.package import Holdout, PackageManifest, TrainedOn
from airflow_mlops.core.model.signature import FieldSpec, ModelSignature
from airflow_mlops.core.model.tuning import Candidate
from airflow_mlops.core.monitoring.estimation import ESTIMATION_FILE
from airflow_mlops.core.profiles.profile import profile_frame
from airflow_mlops.core.profiles.profile_format import PREDICTION, REFERENCE_PROFILE_FILE, profile_to_json
from airflow_mlops.integrations import onnx, sklearn
from airflow_mlops.integrations.mlflow import PACKAGE_FOLDER, Registry
from airflow_mlops.serving.package import hash_files, write_manifest
from airflow_mlops.steps.monitoring.estimation import error_model_signature, fit_error_model

if TYPE_CHECKING:
    import pytest

SIGNATURE = ModelSignature(
    inputs=(FieldSpec(name="x", type="number"), FieldSpec(name="kind", type="string")), output="y"
)
ROWS = [{"x": 1.0, "kind": "a"}, {"x": 2.0, "kind": "b"}, {"x": None, "kind": "a"}]


COLUMNS = ColumnRoles(target="y", time="t", numeric=("x",), categorical=("kind",))


def build_package(
    folder: Path,
    *,
    slope: float = 2.0,
    form: str = "onnx",
    labels: bool = False,
    idle: int = 0,
    background_rows: int = 0,
    held_out_error: float | None = None,
    estimator: str | None = None,
) -> str:
    """Train a small model of ``y = slope * x`` and package it; gives the digest.

    :param labels: predict ``high`` where y is more than 10, ``low`` elsewhere.
    :param idle: further inputs, numbers from 0 to 1 on which nothing depends.
    :param background_rows: training rows to store for explanations.
    :param held_out_error: mean absolute error on made held-out rows, from which an error model is learned; ``None``: without one.
    :param estimator: import path of another one, which takes no parameters.
    """
    folder.mkdir(parents=True)
    features = pd.DataFrame({"x": np.linspace(0.0, 10.0, 400), "kind": ["a", "b"] * 200})
    others = {f"idle_{number}": np.random.default_rng(number).random(400) for number in range(idle)}
    features = features.assign(**others)
    numeric = tuple(FieldSpec(name=name, type="number") for name in others)
    signature = ModelSignature(inputs=(*SIGNATURE.inputs, *numeric), output=SIGNATURE.output)
    rows = [row | dict.fromkeys(others, 0.5) for row in ROWS]
    target = slope * features["x"]
    kind = "Classifier" if labels else "Regressor"
    usual = Candidate(estimator=f"sklearn.ensemble.HistGradientBoosting{kind}", params={"max_iter": 30})
    pipeline = sklearn.build_pipeline(
        Candidate(estimator=estimator, params={}) if estimator else usual,
        replace(COLUMNS, numeric=("x", *others)),
        seed=0,
    ).fit(features, np.where(target > 10.0, "high", "low") if labels else target)
    if form == "onnx":
        (folder / "model.onnx").write_bytes(onnx.convert(pipeline, signature))
    elif form == "sklearn":
        sklearn.save_skops(pipeline, folder / "model.skops")
    else:
        (folder / "model.pkl").write_bytes(pickle.dumps(pipeline))
    model_file = next(folder.iterdir()).name
    if not labels:
        answers = pl.DataFrame({PREDICTION: pipeline.predict(features)})
        (folder / REFERENCE_PROFILE_FILE).write_text(
            profile_to_json(profile_frame(answers, numeric=[PREDICTION]))
        )
    if held_out_error is not None:
        add_error_model(folder, pipeline, features, held_out_error)
    if background_rows:
        drawn = features.sample(background_rows, random_state=0)
        columns = {name: tuple(drawn[name].tolist()) for name in drawn.columns}
        background = Background(columns=columns, drawn_from=400, seed=0)
        (folder / BACKGROUND_FILE).write_text(background.to_json())
    known = pd.DataFrame(rows).assign(x=[1.0, 2.0, np.nan])
    manifest = PackageManifest(
        task="classification" if labels else "regression",
        signature=signature,
        serving_form=form,
        serving_reason="for a test",
        model_file=model_file,
        files=hash_files(folder),
        target="y",
        classes=tuple(map(str, pipeline.classes_)) if labels else None,
        known_rows=tuple(rows),
        known_predictions=tuple(pipeline.predict(known).tolist()),
        trained_on=TrainedOn(
            dataset_digest="sha256:0",
            dataset_uri="memory",
            dataset_version=0,
            rows=400,
            simple_prediction="low" if labels else 1.0,
        ),
        holdout=Holdout(metric="mae", value=0.1, standard_deviation=0.1, row_count=10),
    )
    return write_manifest(folder, manifest)


_ONLY_HERE = """
import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin

class Middle(RegressorMixin, BaseEstimator):
    def fit(self, X, y):
        self.middle_ = float(np.median(y))
        return self

    def predict(self, X):
        return np.full(len(X), self.middle_)
"""


def build_unimportable(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Package a model whose class this process can import, as a task can from the Dag folder, and no service it starts; gives the digest."""
    path = folder.with_name(f"path_of_{folder.name}")
    path.mkdir()
    (path / "only_here.py").write_text(_ONLY_HERE)
    monkeypatch.syspath_prepend(str(path))
    monkeypatch.setenv("AIRFLOW_MLOPS_TRUSTED_TYPES", "only_here.Middle")
    return build_package(folder, form="sklearn", estimator="only_here.Middle")


def add_error_model(folder: Path, pipeline: Any, features: pd.DataFrame, error: float) -> None:
    """Write what a training writes for estimates, had its model been off by so much."""
    answers = pipeline.predict(features)
    random = np.random.default_rng(0)
    target = answers + error * random.choice([-1.0, 1.0], len(answers)) * random.exponential(
        1.0, len(answers)
    )
    model = fit_error_model(
        resolve_metric("mae"), Graded(target, Predictions(values=answers)), features, COLUMNS
    )
    inputs = error_model_signature(SIGNATURE, model.answer_field)
    (folder / "error_model.onnx").write_bytes(onnx.convert(model.pipeline, inputs))
    known = model.features.head(3)
    estimation = replace(
        model.estimation,
        model_file="error_model.onnx",
        model_form="onnx",
        answer_field=model.answer_field,
        known_rows=tuple(known.to_dict(orient="records")),
        known_errors=tuple(float(value) for value in model.pipeline.predict(known)),
    )
    (folder / ESTIMATION_FILE).write_text(canonical_json(to_dict(estimation)))


def register(registry: Registry, folder: Path, model_name: str, digest: str) -> str:
    """Make a version of a package, as a training and its registration do; gives its number."""
    with registry.run(registry.experiment_id("packages of tests"), "package", {}) as run_id:
        registry.upload(run_id, folder, PACKAGE_FOLDER)
    return registry.register(
        model_name, run_id=run_id, model_id=None, package_digest=digest, tags={}, description="for a test"
    ).model_version
