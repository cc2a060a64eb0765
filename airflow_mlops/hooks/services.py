"""From connection ids to what a step needs."""

from __future__ import annotations

from dataclasses import replace

from airflow_mlops.hooks.bentoml import BentoMLHook
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.hooks.mlflow import MLflowHook
from airflow_mlops.hooks.signing import SigningHook
from airflow_mlops.services import Services


def services_from_connections(
    *,
    mlflow_conn_id: str | None = None,
    bentoml_conn_id: str | None = None,
    ledger_conn_id: str | None = None,
    signing_conn_id: str | None = None,
    may_sign: bool = False,
) -> Services:
    """Resolve the connections that are named and leave the rest empty.

    :param may_sign: whether the step gets the private key as well; it goes only where packages are signed.

    :raises ConnectionConfigError: a named connection is missing or incomplete.
    """
    services = Services()
    if mlflow_conn_id is not None:
        services = with_mlflow(services, mlflow_conn_id)
    if bentoml_conn_id is not None:
        bentoml = BentoMLHook(bentoml_conn_id=bentoml_conn_id).services()
        services = replace(
            services,
            endpoint_url=bentoml.endpoint_url,
            endpoint_token=bentoml.endpoint_token,
            steering_token=bentoml.steering_token,
            serving_dir=bentoml.serving_dir,
        )
    if ledger_conn_id is not None:
        services = replace(
            services, ledger_url=LedgerHook(ledger_conn_id=ledger_conn_id).services().ledger_url
        )
    if signing_conn_id is not None:
        signing = SigningHook(signing_conn_id=signing_conn_id).services()
        services = replace(
            services,
            signing_key=signing.signing_key if may_sign else None,
            signing_public_keys=signing.signing_public_keys,
        )
    return services


def with_mlflow(services: Services, mlflow_conn_id: str) -> Services:
    """Resolve an MLflow connection beside what is resolved already.

    :raises ConnectionConfigError: it is missing or incomplete.
    """
    mlflow = MLflowHook(mlflow_conn_id=mlflow_conn_id).services()
    return replace(
        services,
        tracking_uri=mlflow.tracking_uri,
        tracking_username=mlflow.tracking_username,
        tracking_password=mlflow.tracking_password,
        tracking_token=mlflow.tracking_token,
    )
