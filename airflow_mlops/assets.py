"""Assets that connect Dags: a dataset, a model's alias, a model's monitoring.

An asset event wakes a Dag up; what there is to do stands in the ledger.
"""

from __future__ import annotations

from airflow.sdk import Asset


def dataset_asset(name: str) -> Asset:
    """Give the asset of a dataset, updated by every ingest."""
    return Asset(name=f"{name} dataset", uri=f"x-mlops://dataset/{name}")


def model_asset(model_name: str, *, alias: str = "champion") -> Asset:
    """Give the asset of a model's alias, updated when the alias moves."""
    return Asset(name=f"{model_name} {alias}", uri=f"x-mlops://model/{model_name}/{alias}")


def monitoring_asset(model_name: str) -> Asset:
    """Give the asset of a model's checks, updated when a window was checked."""
    return Asset(name=f"{model_name} monitoring", uri=f"x-mlops://monitoring/{model_name}")
