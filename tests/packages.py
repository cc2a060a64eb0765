"""Small real model packages for tests."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl

from airflow_mlops.core.columns import ColumnRoles
from airflow_mlops.core.package import Holdout, PackageManifest, TrainedOn
from airflow_mlops.core.profile import profile_frame
from airflow_mlops.core.profile_format import PREDICTION, REFERENCE_PROFILE_FILE, profile_to_json
from airflow_mlops.core.signature import FieldSpec, ModelSignature
from airflow_mlops.core.tuning import Candidate
from airflow_mlops.integrations import onnx, sklearn
from airflow_mlops.integrations.mlflow import PACKAGE_FOLDER, Registry
from airflow_mlops.serving.package import hash_files, write_manifest

SIGNATURE = ModelSignature(
    inputs=(FieldSpec(name="x", type="number"), FieldSpec(name="kind", type="string")), output="y"
)
ROWS = [{"x": 1.0, "kind": "a"}, {"x": 2.0, "kind": "b"}, {"x": None, "kind": "a"}]


def build_package(folder: Path, *, slope: float = 2.0, form: str = "onnx") -> str:
    """Train a small model of ``y = slope * x`` and package it; gives the digest."""
    folder.mkdir(parents=True)
    features = pd.DataFrame({"x": np.linspace(0.0, 10.0, 400), "kind": ["a", "b"] * 200})
    pipeline = sklearn.build_pipeline(
        Candidate(estimator="sklearn.ensemble.HistGradientBoostingRegressor", params={"max_iter": 30}),
        ColumnRoles(target="y", time="t", numeric=("x",), categorical=("kind",)),
        seed=0,
    ).fit(features, slope * features["x"])
    if form == "onnx":
        (folder / "model.onnx").write_bytes(onnx.convert(pipeline, SIGNATURE))
    elif form == "sklearn":
        sklearn.save_skops(pipeline, folder / "model.skops")
    else:
        (folder / "model.pkl").write_bytes(pickle.dumps(pipeline))
    model_file = next(folder.iterdir()).name
    answers = pl.DataFrame({PREDICTION: pipeline.predict(features)})
    (folder / REFERENCE_PROFILE_FILE).write_text(
        profile_to_json(profile_frame(answers, numeric=[PREDICTION]))
    )
    known = pd.DataFrame({"x": [1.0, 2.0, np.nan], "kind": ["a", "b", "a"]})
    manifest = PackageManifest(
        task="regression",
        signature=SIGNATURE,
        serving_form=form,
        serving_reason="for a test",
        model_file=model_file,
        files=hash_files(folder),
        target="y",
        known_rows=tuple(ROWS),
        known_predictions=tuple(pipeline.predict(known).tolist()),
        trained_on=TrainedOn(
            dataset_digest="sha256:0",
            dataset_uri="memory",
            dataset_version=0,
            rows=400,
            simple_prediction=1.0,
        ),
        holdout=Holdout(metric="mae", value=0.1, standard_deviation=0.1, row_count=10),
    )
    return write_manifest(folder, manifest)


def register(registry: Registry, folder: Path, model_name: str, digest: str) -> str:
    """Make a version of a package, as a training and its registration do; gives its number."""
    with registry.run(registry.experiment_id("packages of tests"), "package", {}) as run_id:
        registry.upload(run_id, folder, PACKAGE_FOLDER)
    return registry.register(
        model_name, run_id=run_id, model_id=None, package_digest=digest, tags={}, description="for a test"
    ).model_version
