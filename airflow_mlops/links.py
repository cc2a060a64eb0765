"""Buttons on a task: its MLflow run, its model version, its report, its endpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow.sdk import BaseOperatorLink

if TYPE_CHECKING:
    from airflow.sdk import BaseOperator
    from airflow.sdk.types import TaskInstanceKey


class _FoundLink(BaseOperatorLink):
    """A link whose address the task learned when it ran.

    Airflow asks for it in the task's own process when the task ends, and keeps the answer for the UI.
    """

    def get_link(self, operator: BaseOperator, *, ti_key: TaskInstanceKey) -> str:
        """Give the address the operator noted, or nothing."""
        found: dict[str, str] = getattr(operator, "found_links", {})
        return found.get(self.name, "")


class MLflowRunLink(_FoundLink):
    """The run in MLflow."""

    name = "MLflow run"


class ModelVersionLink(_FoundLink):
    """The model version in MLflow."""

    name = "Model version"


class ReportLink(_FoundLink):
    """The drift report."""

    name = "Report"


class DataDocsLink(_FoundLink):
    """The page of a validation."""

    name = "Data Docs"


class EndpointLink(_FoundLink):
    """The model service."""

    name = "Endpoint"
