"""What a run keeps of how it was made: environment, trials, times, parameters."""

from __future__ import annotations

import json
import logging
import time
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.codec import to_dict
from airflow_mlops.exceptions import TransientError

if TYPE_CHECKING:
    from pathlib import Path

    from airflow_mlops.core.data.dataset import DatasetVersion
    from airflow_mlops.core.model.tuning import Candidate, SearchResult, Trial
    from airflow_mlops.integrations.mlflow import Registry
    from airflow_mlops.steps.training.rows import Split
    from airflow_mlops.steps.training.spec import TrainSpec

log = logging.getLogger(__name__)

#: Folder of the run's artifacts with the trials, the environment and the result.
TRAINING_FOLDER = "training"


def write_evidence(folder: Path, found: SearchResult | None) -> Path:
    """Write what a person needs to do the training again: every installed version, and every trial."""
    target = folder / TRAINING_FOLDER
    target.mkdir()
    # Every look at ``metadata`` reads the package's file again.
    installed = {known["Name"]: known["Version"] for known in (dist.metadata for dist in distributions())}
    lines = [
        f"{name}=={version}" for name, version in sorted(installed.items(), key=lambda item: item[0].lower())
    ]
    (target / "environment.txt").write_text("\n".join(lines) + "\n")
    if found is not None:
        trials = [to_dict(trial) for trial in found.trials]
        trials += [{"candidate": path, "untried": True} for path in found.untried]
        (target / "trials.json").write_text(json.dumps(trials, indent=1))
    return target


class TrialChart:
    """The metric of every trial in MLflow, while the search goes on: nothing that a search is given up for.

    What can't be sent while MLflow is away is sent with a later trial.

    :param metric: name of the metric.
    """

    def __init__(self, registry: Registry, run_id: str, metric: str) -> None:
        self._registry, self._run_id, self._metric = registry, run_id, metric
        self._unsent: list[tuple[int, float | None]] = []
        self._warned = False

    def tell(self, number: int, trial: Trial) -> None:
        """Send the point of one trial, and those before it that were not sent."""
        self._unsent.append((number, trial.value))
        try:
            while self._unsent:
                step, value = self._unsent[0]
                self._registry.log_step(self._run_id, f"trial_{self._metric}", value, step)
                del self._unsent[0]
        except TransientError as err:
            if not self._warned:
                log.warning("training: the search goes on without its chart in MLflow: %s", err)
            self._warned = True


class Clock:
    """Wall time since the last lap, by name."""

    def __init__(self) -> None:
        self.laps: dict[str, float | None] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name], self._last = now - self._last, now


def flat_params(spec: TrainSpec, winner: Candidate) -> dict[str, Any]:
    """Parameters as MLflow shows them: one level, the estimator's own under ``estimator.``."""
    values = spec.asked()
    for name in ("dataset", "estimator_params", "candidates"):
        values.pop(name)
    params = {f"estimator.{name}": value for name, value in winner.params.items()}
    return values | {"estimator": winner.estimator} | params


def row_facts(dataset: DatasetVersion, split: Split, *, measured: Split) -> dict[str, Any]:
    """Say which rows it learned from and was measured on.

    :param split: of the model.
    :param measured: of the model that was measured: its twin's, where it was fitted again on all rows.
    """
    twin = {
        "twin_training_window": str(measured.training_window),
        "twin_training_rows": measured.training.height,
    }
    return (twin if measured is not split else {}) | {
        "dataset_version": dataset.version,
        "training_window": str(split.training_window),
        "training_rows": split.training.height,
        "holdout_rows": split.holdout.height,
    }
