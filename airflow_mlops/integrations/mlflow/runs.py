"""Runs: opened, filled and ended, and found again by the work they did."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from airflow_mlops.exceptions import ModelVersionNotFoundError
from airflow_mlops.integrations.mlflow.connection import Connected, patiently, translated

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from airflow_mlops.core.data.dataset import DatasetVersion

#: Tag of a run: digest of the step's inputs; a retry finds the finished run by it.
STEP_KEY_TAG = "airflow_mlops.step_key"
#: Tag of a run, and of a model version: digest of the package it holds.
PACKAGE_DIGEST_TAG = "airflow_mlops.package_digest"

#: What MLflow stores of a parameter at most.
PARAMETER_CHARACTERS = 6000
#: What MLflow stores of a dataset's schema at most.
_SCHEMA_CHARACTERS = 1_048_575


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingRun:
    """What a run says about itself.

    :param experiment_id: its experiment.
    :param params: its parameters.
    :param is_deleted: whether it is in MLflow's trash, which ``mlflow gc`` empties.
    """

    experiment_id: str
    params: dict[str, str]
    is_deleted: bool


class Runs(Connected):
    """Runs of this installation's experiments."""

    def experiment_id(self, name: str) -> str:
        """Find or create an experiment.

        :raises ValueError: it was deleted; MLflow keeps its name.
        """
        from mlflow.exceptions import MlflowException

        with translated(f"experiment {name!r}"):
            found = self.client.get_experiment_by_name(name)
            if found is None:
                try:
                    return str(self.client.create_experiment(name))
                except MlflowException as err:  # somebody else was faster
                    if err.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    return self.experiment_id(name)
        if found.lifecycle_stage == "deleted":
            raise ValueError(
                f"experiment {name!r} was deleted in MLflow: restore it (mlflow experiments restore -x {found.experiment_id}), "
                "or name another one"
            )
        return str(found.experiment_id)

    def finished_run(self, experiment_id: str, step_key: str) -> Any | None:
        """Find the run that already did exactly this work."""
        with translated("search runs"):
            runs = self.client.search_runs(
                [experiment_id],
                f"tags.`{STEP_KEY_TAG}` = '{step_key}' and attributes.status = 'FINISHED'",
                max_results=1,
            )
        return runs[0] if runs else None

    def is_finished(self, run_id: str) -> bool:
        """Tell whether there is such a run, not deleted, that ended well."""
        try:
            with translated(f"run {run_id}"):
                info = self.client.get_run(run_id).info
        except ModelVersionNotFoundError:
            return False
        return (info.status, info.lifecycle_stage) == ("FINISHED", "active")

    def training_run(self, run_id: str) -> TrainingRun:
        """Read what a run says about itself.

        :raises ModelVersionNotFoundError: there is no such run.
        """
        with translated(f"run {run_id}"):
            run = self.client.get_run(run_id)
        return TrainingRun(
            experiment_id=str(run.info.experiment_id),
            params=dict(run.data.params),
            is_deleted=run.info.lifecycle_stage == "deleted",
        )

    def tag_run(self, run_id: str, name: str, value: str) -> None:
        """Write a tag of a run.

        :raises ModelVersionNotFoundError: there is no such run.
        """
        with translated(f"run {run_id}"):
            self.client.set_tag(run_id, name, value)

    def run_tags(self, run_id: str) -> dict[str, str]:
        """Read the tags of a run.

        :raises ModelVersionNotFoundError: there is no such run.
        """
        with translated(f"run {run_id}"):
            return dict(self.client.get_run(run_id).data.tags)

    def run_digest(self, run_id: str) -> str | None:
        """Give the digest of the package a run holds, as its training noted it.

        :raises ModelVersionNotFoundError: there is no such run.
        """
        return self.run_tags(run_id).get(PACKAGE_DIGEST_TAG)

    @contextmanager
    def run(self, experiment_id: str, name: str, tags: Mapping[str, str]) -> Iterator[str]:
        """Open a run; it ends FINISHED, or FAILED when the block raises."""
        from mlflow.exceptions import MlflowException

        with translated("create run"):
            run_id = str(self.client.create_run(experiment_id, run_name=name, tags=dict(tags)).info.run_id)
        try:
            yield run_id
        except BaseException:
            # Should MLflow be gone, then the error to report is the one that brought us here; a retry closes the run.
            with suppress(MlflowException):
                self._fail(experiment_id, run_id)
            raise
        patiently(self._finish, run_id)

    def log(
        self,
        run_id: str,
        *,
        params: Mapping[str, Any],
        metrics: Mapping[str, float | None],
        tags: Mapping[str, str],
    ) -> None:
        """Log in one request, all or nothing; a metric that could not be measured (``None``) is left out."""
        from mlflow.entities import Metric, Param, RunTag

        now = int(time.time() * 1000)
        with translated(f"log to run {run_id}"):
            self.client.log_batch(
                run_id,
                params=[Param(key, str(value)[:PARAMETER_CHARACTERS]) for key, value in params.items()],
                metrics=[
                    Metric(metric_name(name), value, now, 0)
                    for name, value in metrics.items()
                    if value is not None
                ],
                tags=[RunTag(key, value) for key, value in tags.items()],
            )

    def log_step(self, run_id: str, key: str, value: float | None, step: int) -> None:
        """Log one point of a metric while the run goes on; what could not be measured is left out."""
        if value is not None:
            with translated(f"log to run {run_id}"):
                self.client.log_metric(run_id, metric_name(key), value, step=step)

    def log_dataset(self, run_id: str, dataset: DatasetVersion, context: str) -> None:
        """Attach the dataset version to the run as MLflow dataset input."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        entity = Dataset(
            name=dataset.uri.rstrip("/").rsplit("/", 1)[-1],
            digest=dataset.dataset_digest.removeprefix("sha256:")[:32],
            source_type="delta_table",
            # MLflow's own words, so that its clients find the table.
            source=json.dumps({"path": dataset.uri, "delta_table_version": dataset.version}),
            schema=_colspec(dataset.columns),
            profile=json.dumps(
                {
                    "num_rows": dataset.row_count,
                    "dataset_digest": dataset.dataset_digest,
                    "time_column": dataset.time_column,
                    "time_min": dataset.time_min and dataset.time_min.isoformat(),
                    "time_max": dataset.time_max and dataset.time_max.isoformat(),
                }
            ),
        )
        with translated(f"log dataset to run {run_id}"):
            self.client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", context)])])

    def run_url(self, experiment_id: str, run_id: str, artifact: str | None = None) -> str:
        """Page of a run, or of one of its artifacts."""
        page = f"{self.tracking_uri}/#/experiments/{experiment_id}/runs/{run_id}"
        return f"{page}/artifacts/{quote(artifact)}" if artifact else page

    def _finish(self, run_id: str) -> None:
        with translated("end run"):
            self.client.set_terminated(run_id, status="FINISHED")

    def _fail(self, experiment_id: str, run_id: str) -> None:
        """End a run as failed, and with it the models it logged: nobody may take one of them for finished."""
        self.client.set_terminated(run_id, status="FAILED")
        self._fail_models(experiment_id, run_id)


def _colspec(columns: Mapping[str, str]) -> str | None:
    """Give a table's columns as MLflow shows them; ``None`` where there are more than it stores."""
    types = {
        "Int64": "long",
        "Float64": "double",
        "Float32": "float",
        "Boolean": "boolean",
        "Binary": "binary",
    }
    listed = [
        {
            "name": name,
            "type": types.get(dtype)
            or ("integer" if "Int" in dtype else "datetime" if dtype.startswith("Date") else "string"),
        }
        for name, dtype in columns.items()
    ]
    text = json.dumps({"mlflow_colspec": listed})
    return text if len(text) <= _SCHEMA_CHARACTERS else None


def metric_name(name: str) -> str:
    """Give a name as MLflow takes it: ``@`` and ``:`` of quantiles and import paths become ``_``.

    >>> metric_name("holdout_quantile_loss@0.9"), metric_name("trial_my_metrics:cost")
    ('holdout_quantile_loss_0.9', 'trial_my_metrics_cost')
    """
    return "".join(sign if sign.isalnum() or sign in "_-. /" else "_" for sign in name)
