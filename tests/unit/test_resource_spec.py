"""What a step's pod may use, as the manifest that Kubernetes gets."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from datetime import timedelta
from typing import Any

import kubernetes_validate
import pytest

from airflow_mlops.runners.kubernetes import KubernetesRunner, ResourceSpec
from airflow_mlops.services import Services

EVERYTHING = ResourceSpec(
    cpu="2",
    memory="16Gi",
    cpu_limit="8",
    gpus=2,
    node_selector={"cloud.example/accelerator": "a100"},
    tolerations=({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},),
    service_account="steps",
    priority_class="batch",
    pull_secrets=("registry",),
)


def manifest(resources: ResourceSpec) -> dict[str, Any]:
    runner = KubernetesRunner(
        image="x:1", resources=resources, timeout=timedelta(hours=2), env={"OMP_NUM_THREADS": "8"}
    )
    return runner.manifest("train", "train-1", ["AIRFLOW_MLOPS_TRACKING_PASSWORD"])


@pytest.mark.parametrize("resources", [ResourceSpec(), EVERYTHING], ids=["default", "everything"])
@pytest.mark.parametrize("release", ["1.32", "1.34", "1.36"])
def test_a_pod_fits_the_schemas(resources: ResourceSpec, release: str) -> None:
    kubernetes_validate.validate(manifest(resources), release, strict=True)


@pytest.mark.parametrize("resources", [ResourceSpec(), EVERYTHING], ids=["default", "everything"])
def test_a_pod_is_restricted_as_the_standard_asks(resources: ResourceSpec) -> None:
    spec = manifest(resources)["spec"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert all("hostPath" not in volume for volume in spec["volumes"])
    (container,) = spec["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }


def test_what_is_asked_for_is_in_the_manifest() -> None:
    spec = manifest(EVERYTHING)["spec"]
    (container,) = spec["containers"]
    assert container["resources"] == {
        "requests": {"cpu": "2", "memory": "16Gi"},
        "limits": {"cpu": "8", "memory": "16Gi", "nvidia.com/gpu": "2"},
    }
    assert spec["activeDeadlineSeconds"] == 7200
    assert (spec["serviceAccountName"], spec["priorityClassName"]) == ("steps", "batch")
    assert spec["imagePullSecrets"] == [{"name": "registry"}]
    values = {item["name"]: item.get("value", item.get("valueFrom")) for item in container["env"]}
    assert values["OMP_NUM_THREADS"] == "8"
    secret = {"name": "train-1", "key": "AIRFLOW_MLOPS_TRACKING_PASSWORD"}
    assert values["AIRFLOW_MLOPS_TRACKING_PASSWORD"] == {"secretKeyRef": secret}


def test_it_is_a_value() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EVERYTHING.cpu = "4"  # type: ignore[misc]
    assert ResourceSpec(cpu="2") == ResourceSpec(cpu="2")
    assert manifest(ResourceSpec())["spec"]["containers"][0]["resources"] == {}


def test_a_dag_file_that_names_a_runner_stays_light() -> None:
    code = (
        "import sys, airflow_mlops.runners.kubernetes; print(*{'airflow', 'kubernetes'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == ""


def test_a_spec_that_no_secret_holds_is_refused_by_name() -> None:
    runner = KubernetesRunner(image="x:1")
    with pytest.raises(ValueError, match=r"spec of step 'train' has 1,\d{3},\d{3} bytes.*InProcessRunner"):
        runner.run("train", {"numeric": ["a column with a long name"] * 50_000}, Services())
