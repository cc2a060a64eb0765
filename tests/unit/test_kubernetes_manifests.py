from __future__ import annotations

import kubernetes_validate
import pytest
import yaml

from airflow_mlops.integrations.bentoml_build import bento_name
from airflow_mlops.integrations.kubernetes_cluster import RIGHTS
from airflow_mlops.integrations.kubernetes_manifests import (
    TEMPLATE,
    KubernetesEndpoint,
    former_of,
    object_name,
    progress_of,
    secret_of,
    template_of,
)
from tests.conftest import REPOSITORY
from tests.fakekube.objects import SCHEMAS

ENDPOINT = KubernetesEndpoint(
    model_name="Trip_Fare",
    model_version="3",
    package_digest="sha256:1",
    image="registry.example/fare:3",
    namespace="mlops",
    secret="model-x-1",
    variables=("AIRFLOW_MLOPS_ENDPOINT_TOKEN",),
    env={"OMP_NUM_THREADS": "1"},
    env_secrets=("store",),
    pull_secrets=("registry",),
    node_selector={"disk": "fast"},
    service_account="models",
)


def test_every_manifest_fits_its_schema_and_no_field_is_unknown():
    made = [
        ENDPOINT.deployment(actor="dag/run/task"),
        ENDPOINT.service(),
        ENDPOINT.autoscaler(),
        ENDPOINT.disruption_budget(),
        secret_of("mlops", "Trip_Fare", {"AIRFLOW_MLOPS_ENDPOINT_TOKEN": "t"}),
    ]
    for manifest in made:
        kubernetes_validate.validate(manifest, SCHEMAS, strict=True)
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(made[0] | {"speck": {}}, SCHEMAS, strict=True)


def test_pods_are_restricted():
    """What the Pod Security Standard *restricted* asks for, and a root that can't be written to."""
    spec = ENDPOINT.template()["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
    }
    assert not spec["automountServiceAccountToken"]
    assert {name for volume in spec["volumes"] for name in volume} == {"name", "emptyDir"}


def test_probes_ask_what_the_service_answers():
    (container,) = ENDPOINT.template()["spec"]["containers"]
    asked = {name: container[name]["httpGet"]["path"] for name in container if name.endswith("Probe")}
    assert asked == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}


def test_a_number_of_pods_is_said_by_one_only():
    assert "replicas" not in ENDPOINT.deployment(actor="a")["spec"]
    fixed = KubernetesEndpoint(
        model_name="m",
        model_version="1",
        package_digest="d",
        image="i",
        namespace="n",
        minimum=3,
        maximum=3,
    )
    assert "replicas" not in fixed.deployment(actor="a")["spec"]
    limits = fixed.autoscaler()["spec"]
    assert (limits["minReplicas"], limits["maxReplicas"]) == (3, 3)
    with pytest.raises(ValueError, match="from 3 to 2 pods"):
        KubernetesEndpoint(
            model_name="m",
            model_version="1",
            package_digest="d",
            image="i",
            namespace="n",
            minimum=3,
            maximum=2,
        )


def test_names_are_labels_and_never_shared():
    names = ["fare", "Fare", "fare_", "a" * 90, "ä", "9", "a" * 91, "taxi-fare", "Taxi_Fare", "Taxi Fare"]
    names += [object_name("Taxi_Fare").removeprefix("model-"), bento_name("Taxi Fare")]
    made = [object_name(name) for name in names]
    assert len({*made}) == len({bento_name(name) for name in names}) == len(names)
    assert all(len(name) <= 53 and name.startswith("model-") and not name.endswith("-") for name in made)


def test_other_values_are_another_secret():
    one, same, other = (secret_of("n", "m", {"A": value})["metadata"]["name"] for value in ("1", "1", "2"))
    assert one == same != other


def test_the_role_is_what_is_used():
    role, _ = yaml.safe_load_all((REPOSITORY / "deploy" / "kubernetes" / "deploy-role.yaml").read_text())
    granted = {
        (group, resource): tuple(sorted(rule["verbs"]))
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert granted == {what: tuple(sorted(verbs)) for what, verbs in RIGHTS.items()}


def replica_set(template: str, revision: int, ready: int) -> dict:
    meta = {"annotations": {TEMPLATE: template}, "labels": {"a": "b", "pod-template-hash": "x"}}
    return {
        "metadata": {"annotations": {"deployment.kubernetes.io/revision": str(revision)}},
        "spec": {"template": {"metadata": meta, "spec": {"containers": []}}},
        "status": {"readyReplicas": ready} if ready else {},
    }


def test_the_former_one_is_the_one_that_still_serves():
    sets = [replica_set("old", 1, 0), replica_set("serving", 2, 2), replica_set("broken", 3, 0)]
    found = former_of([*sets, replica_set("new", 4, 0)], "new")
    assert found is sets[1]
    assert template_of(sets[1])["metadata"] == {"labels": {"a": "b"}, "annotations": {TEMPLATE: "serving"}}
    assert former_of(sets[2:], "broken") is None


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ({}, "waiting"),
        ({"observedGeneration": 1, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2}, "waiting"),
        ({"observedGeneration": 2, "replicas": 3, "updatedReplicas": 2, "availableReplicas": 3}, "waiting"),
        ({"observedGeneration": 2, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 1}, "waiting"),
        ({"observedGeneration": 2, "replicas": 2, "updatedReplicas": 2, "availableReplicas": 2}, "done"),
    ],
)
def test_a_rollout_is_done_when_every_pod_is_new_and_available(status, expected):
    deployment = {"metadata": {"generation": 2}, "spec": {"replicas": 2}, "status": status}
    assert progress_of(deployment).status == expected


def test_a_deadline_that_is_over_says_what_the_cluster_says():
    late = {"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded"}
    quota = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota: pods=2"}
    status = {"observedGeneration": 2, "replicas": 2, "conditions": [late, quota]}
    progress = progress_of({"metadata": {"generation": 2}, "spec": {"replicas": 2}, "status": status})
    assert progress.status == "failed"
    assert progress.reason.endswith("exceeded quota: pods=2")
