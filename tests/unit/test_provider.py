from __future__ import annotations

import importlib
import json
import re
from importlib import resources

import jsonschema

from airflow_mlops.provider import get_provider_info
from tests.conftest import REPOSITORY


def test_airflow_accepts_the_description() -> None:
    schema = json.loads((resources.files("airflow") / "provider_info.schema.json").read_text())
    assert list(jsonschema.Draft7Validator(schema).iter_errors(get_provider_info())) == []


def test_every_module_and_class_named_is_there() -> None:
    info = get_provider_info()
    modules = [
        name
        for kind in ("operators", "sensors", "hooks", "triggers")
        for item in info[kind]
        for name in item["python-modules"]
    ]
    for name in modules:
        importlib.import_module(name)
    hooks = [item["hook-class-name"] for item in info["connection-types"]]
    classes = [*info["extra-links"], *info["notifications"], *hooks]
    assert len(classes) == 12
    for path in classes:
        module, _, name = path.rpartition(".")
        assert hasattr(importlib.import_module(module), name)


def test_airflow_finds_hooks_and_links() -> None:
    from airflow.providers_manager import ProvidersManager
    from airflow.sdk.providers_manager_runtime import ProvidersManagerTaskRuntime

    hooks = ProvidersManagerTaskRuntime().hooks
    for conn_type in (
        "mlflow",
        "bentoml",
        "bentocloud",
        "mlops_ledger",
        "airflow_mlops_signing",
        "airflow_mlops_hashing",
    ):
        assert hooks[conn_type].hook_class_name.startswith("airflow_mlops.hooks.")
    manager = ProvidersManager()
    for name in ("ReportLink", "DataDocsLink"):
        assert f"airflow_mlops.links.{name}" in manager.extra_links_class_names


def test_every_module_of_operators_and_sensors_is_announced_once() -> None:
    info = get_provider_info()
    for part in ("operators", "sensors"):
        (announced,) = [entry["python-modules"] for entry in info[part]]
        files = [file for file in (REPOSITORY / "airflow_mlops" / part).glob("*.py") if file.stem != "base"]
        with_tasks = [
            file for file in files if re.search(r"^class \w+(Operator|Sensor)\(", file.read_text(), re.M)
        ]
        assert sorted(announced) == sorted(f"airflow_mlops.{part}.{file.stem}" for file in with_tasks)
