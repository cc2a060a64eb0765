"""MLflow: runs, leases, artifacts, copies and model versions, behind one small client."""

from __future__ import annotations

from airflow_mlops.integrations.mlflow.artifacts import PACKAGE_FOLDER, TWIN_FOLDER
from airflow_mlops.integrations.mlflow.connection import patiently
from airflow_mlops.integrations.mlflow.copies import COPY_DIGEST_TAG, Copies, ModelCopy
from airflow_mlops.integrations.mlflow.leases import (
    LEASE_VARIABLE,
    MODEL_NAME_TAG,
    TASK_KEY_TAG,
    WAIT_VARIABLE,
    HeldElsewhereError,
    Leases,
    wait_seconds,
)
from airflow_mlops.integrations.mlflow.runs import PACKAGE_DIGEST_TAG, STEP_KEY_TAG, TrainingRun
from airflow_mlops.integrations.mlflow.versions import (
    CARD_TAG,
    DESCRIPTION_CHARACTERS,
    METRIC_TAGS,
    RECIPE_TAG,
    RUN_ID_TAG,
    SIGNATURE_TAG,
    TAG_CHARACTERS,
    TRAINED_UNTIL_TAG,
    RegisteredVersion,
    Versions,
)

__all__ = [
    "CARD_TAG",
    "COPY_DIGEST_TAG",
    "DESCRIPTION_CHARACTERS",
    "LEASE_VARIABLE",
    "METRIC_TAGS",
    "MODEL_NAME_TAG",
    "PACKAGE_DIGEST_TAG",
    "PACKAGE_FOLDER",
    "RECIPE_TAG",
    "RUN_ID_TAG",
    "SIGNATURE_TAG",
    "STEP_KEY_TAG",
    "TAG_CHARACTERS",
    "TASK_KEY_TAG",
    "TRAINED_UNTIL_TAG",
    "TWIN_FOLDER",
    "WAIT_VARIABLE",
    "HeldElsewhereError",
    "ModelCopy",
    "RegisteredVersion",
    "Registry",
    "TrainingRun",
    "patiently",
    "wait_seconds",
]


class Registry(Leases, Versions, Copies):
    """What this package needs of MLflow; each part is in its own file."""
