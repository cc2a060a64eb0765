"""What Airflow learns about this package when it discovers it as a provider."""

from __future__ import annotations

from typing import Any

from airflow_mlops import __version__

_NAME = "Airflow MLOps"


def get_provider_info() -> dict[str, Any]:
    """Describe the package to Airflow's provider manager."""
    return {
        "package-name": "airflow-mlops",
        "name": _NAME,
        "description": "The closed model loop: ingest, validate, train, register, roll out, watch, retrain.",
        "versions": [__version__],
        "integrations": [
            {
                "integration-name": _NAME,
                "external-doc-url": "https://github.com/airflow-mlops/airflow-mlops",
                "tags": ["software"],
            }
        ],
        "operators": [_modules("operators", _OPERATORS)],
        "sensors": [_modules("sensors", _SENSORS)],
        "hooks": [_modules("hooks", ("bentocloud", "bentoml", "hashing", "ledger", "mlflow", "signing"))],
        "triggers": [_modules("triggers", ("poll", "rollout"))],
        "connection-types": [_mlflow(), _bentoml(), _bentocloud(), _ledger(), _signing(), _hashing()],
        "notifications": ["airflow_mlops.notifiers.incidents.IncidentNotifier"],
        "extra-links": [f"airflow_mlops.links.{name}" for name in _LINKS],
    }


_OPERATORS = (
    "approval",
    "build",
    "challengers",
    "check_skew",
    "deploy",
    "deploy_to_bentocloud",
    "deploy_to_kubernetes",
    "drift",
    "evaluate",
    "explain",
    "incidents",
    "infer_expectations",
    "ingest",
    "performance",
    "promotion",
    "register",
    "retraining",
    "score",
    "screen_dataset",
    "select",
    "train",
    "validate",
)
_SENSORS = ("drift", "endpoint", "labels", "model_version", "new_data")
_LINKS = ("DataDocsLink", "EndpointLink", "MLflowRunLink", "ModelVersionLink", "ReportLink")
_TEXT = {"type": ["string", "null"]}
_SECRET = {"type": ["string", "null"], "format": "password"}


def _modules(package: str, modules: tuple[str, ...]) -> dict[str, Any]:
    return {
        "integration-name": _NAME,
        "python-modules": [f"airflow_mlops.{package}.{name}" for name in modules],
    }


def _mlflow() -> dict[str, Any]:
    return {
        "connection-type": "mlflow",
        "hook-class-name": "airflow_mlops.hooks.mlflow.MLflowHook",
        "hook-name": "MLflow",
        "conn-fields": {
            "tracking_uri": {
                "label": "Tracking URI",
                "description": "The whole address, instead of Host and Port: https://mlflow.example.org/base",
                "schema": _TEXT,
            },
            "token": {
                "label": "Bearer token",
                "description": "Instead of Login and Password",
                "schema": _SECRET,
            },
        },
        "ui-field-behaviour": {
            "hidden-fields": [],
            "relabeling": {"schema": "Schema (http or https)"},
            "placeholders": {"host": "mlflow.example.org", "port": "5000", "schema": "http"},
        },
    }


def _bentoml() -> dict[str, Any]:
    return {
        "connection-type": "bentoml",
        "hook-class-name": "airflow_mlops.hooks.bentoml.BentoMLHook",
        "hook-name": "BentoML service",
        "conn-fields": {
            "serving_dir": {
                "label": "Serving folder",
                "description": "Folder of the local service: desired state, model copies, inference log",
                "schema": _TEXT,
            },
            "steering_token": {
                "label": "Steering token",
                "description": "Bearer token rollouts are steered with; empty: the one that the serving folder holds",
                "schema": _SECRET,
            },
        },
        "ui-field-behaviour": {
            "hidden-fields": ["login"],
            "relabeling": {"password": "Bearer token", "schema": "Schema (http or https)"},
            "placeholders": {"host": "127.0.0.1", "port": "3000", "schema": "http"},
        },
    }


def _bentocloud() -> dict[str, Any]:
    return {
        "connection-type": "bentocloud",
        "hook-class-name": "airflow_mlops.hooks.bentocloud.BentoCloudHook",
        "hook-name": "BentoCloud",
        "conn-fields": {
            "cluster": {
                "label": "Cluster",
                "description": "Default the organization's",
                "schema": _TEXT,
            }
        },
        "ui-field-behaviour": {
            "hidden-fields": ["login", "port", "schema"],
            "relabeling": {"host": "Address of the organization", "password": "API token"},
            "placeholders": {"host": "https://team.cloud.bentoml.com"},
        },
    }


def _ledger() -> dict[str, Any]:
    return {
        "connection-type": "mlops_ledger",
        "hook-class-name": "airflow_mlops.hooks.ledger.LedgerHook",
        "hook-name": "MLOps ledger",
        "conn-fields": {
            "url": {
                "label": "SQLAlchemy URL",
                "description": "Instead of the fields above: sqlite:////folder/ledger.db",
                "schema": _SECRET,
            },
            "dialect": {
                "label": "Dialect and driver",
                "description": "Used with Host and Database",
                "schema": {"type": ["string", "null"], "default": "postgresql+psycopg2"},
            },
        },
        "ui-field-behaviour": {
            "hidden-fields": [],
            "relabeling": {"schema": "Database"},
            "placeholders": {"host": "postgres.example.org", "port": "5432", "schema": "mlops"},
        },
    }


def _signing() -> dict[str, Any]:
    return {
        "connection-type": "airflow_mlops_signing",
        "hook-class-name": "airflow_mlops.hooks.signing.SigningHook",
        "hook-name": "Model signing",
        "conn-fields": {
            "public_keys": {
                "label": "Public keys",
                "description": "Also trusted, separated by spaces: keys used before, or of others who sign",
                "schema": _TEXT,
            }
        },
        "ui-field-behaviour": {
            "hidden-fields": ["host", "port", "schema", "login"],
            "relabeling": {"password": "Private key (Ed25519)"},
            "placeholders": {"password": "what `airflow-mlops signing-key` printed; empty: only verify"},
        },
    }


def _hashing() -> dict[str, Any]:
    return {
        "connection-type": "airflow_mlops_hashing",
        "hook-class-name": "airflow_mlops.hooks.hashing.HashingHook",
        "hook-name": "Hashing key",
        "ui-field-behaviour": {
            "hidden-fields": ["host", "port", "schema", "login", "extra"],
            "relabeling": {"password": "Key"},
            "placeholders": {"password": "what `openssl rand -hex 32` printed"},
        },
    }
