"""Buttons on a task: its MLflow run, its model version, its report, its endpoint."""

from __future__ import annotations

from airflow.sdk import BaseOperatorLink


class _StoredLink(BaseOperatorLink):
    """A link whose address the task stored as XCom when it ran."""

    def get_link(self, operator: object, *, ti_key: object) -> str:
        """Give nothing: Airflow reads the stored address by ``xcom_key``."""
        return ""


class MLflowRunLink(_StoredLink):
    """The run in MLflow."""

    name = "MLflow run"
    xcom_key = "mlflow_run_url"


class ModelVersionLink(_StoredLink):
    """The model version in MLflow."""

    name = "Model version"
    xcom_key = "model_version_url"


class ReportLink(_StoredLink):
    """The drift report."""

    name = "Report"
    xcom_key = "report_url"


class EndpointLink(_StoredLink):
    """The model service."""

    name = "Endpoint"
    xcom_key = "endpoint_url"
