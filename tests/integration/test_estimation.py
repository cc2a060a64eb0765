"""Estimates in the real loop: a classifier is trained, its probabilities calibrated, its windows judged without labels."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
import pytest

from airflow_mlops.core.monitoring.estimation import ESTIMATION_FILE
from airflow_mlops.core.windows import Window
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.services import Services
from airflow_mlops.serving.inference_log import InferenceLog
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.registry.packages import load_version

pytestmark = pytest.mark.integration

MODEL = "flag_of_inputs"
START = datetime(2024, 1, 1, tzinfo=UTC)


def rows(count: int, seed: int, *, shift: float = 0.0, concept: float = 1.0) -> pl.DataFrame:
    """Give rows whose flag depends on two inputs, by ``concept`` as strongly as at training."""
    random = np.random.default_rng(seed)
    a, b = random.standard_normal(count) + shift, random.standard_normal(count)
    flag = random.random(count) < 1 / (1 + np.exp(-concept * (2.0 * a + b)))
    times = [START + timedelta(days=30 * seed, minutes=place) for place in range(count)]
    return pl.DataFrame(
        {"id": [f"{seed}-{place}" for place in range(count)], "t": times, "a": a, "b": b, "flag": flag}
    )


class Classifier(NamedTuple):
    folder: Path
    services: Services

    def watch(self, seed: int, *, labels: bool, **world: float) -> dict[str, Any]:
        """Let the champion answer a window's rows, and check its performance."""
        asked = rows(2000, seed, **world)
        window = Window(start=asked["t"].min(), end=asked["t"].max() + timedelta(seconds=1))  # type: ignore[operator,arg-type]
        registry = Registry.connect(self.services)
        served = load_version(registry, registry.version_by_alias(MODEL, "champion"), self.services)
        columns = {name: asked[name].to_list() for name in ("a", "b")}
        log = InferenceLog(Path(self.services.require("serving_dir")) / "inference_log")
        log.append(
            model_name=MODEL, model_version="1", signature=served.manifest.signature, prediction_ids=asked["id"].to_list(),
            times=asked["t"].to_list(), columns=columns, predictions=served.predict_columns(columns), latency_ms=1.0,
        )  # fmt: skip
        log.flush()
        table = str(self.folder / f"labels-{seed}")
        delta.replace_window(table, asked.select("id", "flag"), time_column=None, window=None)
        spec = {
            "model_name": MODEL, "window": {"start": window.start.isoformat(), "end": window.end.isoformat()},
            "labels": table if labels else None, "id_column": "id", "target": "flag", "metric": "log_loss",
            "metrics": ["accuracy", "tests.integration.test_estimation:cost"],
        }  # fmt: skip
        return run_step("performance", spec, self.services)


def cost(target: np.ndarray, prediction: np.ndarray) -> float:
    """A missed flag costs five."""
    return float(np.mean(np.where(target & ~prediction, 5.0, np.where(~target & prediction, 1.0, 0.0))))


@pytest.fixture(scope="module")
def classifier(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    folder = tmp_path_factory.mktemp("classifier")
    services = Services(
        tracking_uri=mlflow_server,
        ledger_url=f"sqlite:///{folder}/ledger.db",
        serving_dir=str(folder / "serving"),
    )
    delta.replace_window(str(folder / "rows"), rows(6000, 0), time_column="t", window=None)
    spec = {
        "dataset": str(folder / "rows"), "model_name": MODEL, "estimator": "sklearn.linear_model.LogisticRegression",
        "target": "flag", "numeric": ["a", "b"], "time_column": "t", "id_column": "id", "holdout_share": 0.5,
        "metric": "log_loss",
    }  # fmt: skip
    trained = run_step("train", spec, services)
    spec = {"model_name": MODEL, "run_id": trained["run_id"], "package_digest": trained["package_digest"]}
    run_step("register", spec, services)
    Registry.connect(services).set_alias(MODEL, "champion", "1")
    return Classifier(folder, services)


def test_moved_inputs_are_seen_without_labels(classifier: Classifier) -> None:
    easy, as_ever = classifier.watch(2, labels=False, shift=2.0), classifier.watch(3, labels=False)
    assert easy["estimated_value"] < as_ever["estimated_value"] - 0.1  # most rows are clear cases now
    for seed, world, blind in ((2, {"shift": 2.0}, easy), (3, {}, as_ever)):
        seen = classifier.watch(seed, labels=True, **world)
        low, high = seen["estimate_interval"]
        assert seen["estimated_value"] == blind["estimated_value"]
        assert low <= seen["value"] <= high
        assert not seen["degraded"]


def test_probabilities_and_what_mistakes_cost_are_graded(classifier: Classifier) -> None:
    seen = classifier.watch(4, labels=True)
    assert seen["measured"]
    assert seen["value"] == pytest.approx(seen["reference_value"], rel=0.1)
    assert 0.7 < seen["other_metrics"]["accuracy"] < 0.9
    assert 0.0 < seen["other_metrics"]["tests.integration.test_estimation:cost"] < 1.0


def test_a_world_that_changed_is_seen_by_labels_alone(classifier: Classifier) -> None:
    seen = classifier.watch(5, labels=True, concept=-1.0)
    assert seen["degraded"]
    assert seen["change"]["changed"]
    low, high = seen["estimate_interval"]
    assert not low <= seen["value"] <= high


def test_the_package_holds_it_by_the_manifest(classifier: Classifier, tmp_path: Path) -> None:
    registry = Registry.connect(classifier.services)
    folder = registry.download_version(registry.version_by_alias(MODEL, "champion"), tmp_path)
    assert (folder / ESTIMATION_FILE).stat().st_size < 40_000
