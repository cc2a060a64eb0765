"""What Airflow learns about this package when it discovers it as a provider."""

from __future__ import annotations

from typing import Any

from airflow_mlops import __version__


def get_provider_info() -> dict[str, Any]:
    """Describe the package to Airflow's provider manager."""
    return {
        "package-name": "airflow-mlops",
        "name": "Airflow MLOps",
        "description": "The closed model loop: ingest, validate, train, register, roll out, watch, retrain.",
        "versions": [__version__],
    }
