"""From an Airflow connection to what opens a store, and who gets to see it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from airflow_mlops.exceptions import ConnectionConfigError
from airflow_mlops.hooks.storage import stores_of
from airflow_mlops.integrations import storage
from airflow_mlops.services import Services

ACCOUNT = {"type": "service_account", "private_key": "k"}


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_connections", {})


def opened(
    monkeypatch: pytest.MonkeyPatch, uri: str, **connection: Any
) -> tuple[dict[str, str] | None, dict[str, Any]]:
    """Define the connection and give the options of polars and delta-rs, and those of fsspec."""
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", json.dumps(connection))
    storage.remember(stores_of({"dataset": {"uri": uri}}))
    place = storage.locate(uri)
    assert "lake" not in place.uri
    return place.options, place.file_options


def test_s3_with_a_session_token(monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {
        "aws_session_token": "t",
        "region_name": "eu-west-1",
        "config_kwargs": {"s3": {"addressing_style": "virtual"}},
    }
    options, files = opened(
        monkeypatch, "s3://lake@b/k", conn_type="aws", login="k", password="s", extra=extra
    )
    assert options == {
        "aws_access_key_id": "k",
        "aws_secret_access_key": "s",
        "aws_session_token": "t",
        "aws_region": "eu-west-1",
        "aws_virtual_hosted_style_request": "true",
    }
    assert files == {
        "key": "k",
        "secret": "s",
        "token": "t",
        "client_kwargs": {"region_name": "eu-west-1"},
        "config_kwargs": {"s3": {"addressing_style": "virtual"}},
    }


def test_gcs(monkeypatch: pytest.MonkeyPatch) -> None:
    options, files = opened(
        monkeypatch,
        "gs://lake@b/k",
        conn_type="google_cloud_platform",
        extra={"keyfile_dict": json.dumps(ACCOUNT)},
    )
    assert json.loads((options or {})["google_service_account_key"]) == ACCOUNT
    assert files == {"token": ACCOUNT}


@pytest.mark.parametrize(
    ("connection", "files"),
    [
        ({"login": "account", "password": "key"}, {"account_name": "account", "account_key": "key"}),
        (
            {
                "host": "https://account.blob.core.windows.net",
                "login": "app",
                "password": "p",
                "extra": {"tenant_id": "t"},
            },
            {"account_name": "account", "tenant_id": "t", "client_id": "app", "client_secret": "p"},
        ),
        (
            {"login": "account", "extra": {"sas_token": "sas"}},
            {"account_name": "account", "sas_token": "sas"},
        ),
    ],
)
def test_azure(monkeypatch: pytest.MonkeyPatch, connection: dict[str, Any], files: dict[str, str]) -> None:
    options, found = opened(monkeypatch, "abfss://lake@container/k", conn_type="wasb", **connection)
    assert found == files
    assert (options or {}).keys() == {
        f"azure_storage_{name.replace('sas_token', 'sas_key')}" for name in files
    }


def test_services_take_connections_along_and_show_them_nobody() -> None:
    services = Services(connections={"lake": {"kind": "s3", "key": "k", "secret": "hidden"}})
    assert Services.from_environment(services.to_environment()) == services
    assert "hidden" not in repr(services)
    with pytest.raises(ConnectionConfigError, match=r"must be a JSON object") as refused:
        Services.from_environment({"AIRFLOW_MLOPS_CONNECTIONS": '{"lake": "hidden"}'})
    assert "hidden" not in str(refused.value)


def test_a_password_in_an_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ValueError, match=r"write s3://conn_id@b/k") as refused:
        stores_of({"table": "s3://key:hidden@b/k"})
    assert "hidden" not in str(refused.value)


def test_an_address_without_a_connection_is_the_environments() -> None:
    for uri in ("s3://b/k", "/data/t", "abfss://c@account.dfs.core.windows.net/t"):
        assert stores_of({"table": uri}) == {}
        assert storage.locate(uri) == (uri, None, {})


def test_a_connection_that_no_argument_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW_CONN_LAKE", json.dumps({"conn_type": "wasb", "login": "account"}))
    storage.remember(stores_of({}, ["lake"]))
    assert storage.locate("az://lake@c/k").file_options == {"account_name": "account"}
    with pytest.raises(ConnectionConfigError, match=r"no connection of such a store"):
        storage.locate("s3://lake@c/k")
