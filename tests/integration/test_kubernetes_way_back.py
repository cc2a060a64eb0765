"""What a cluster is left asked for when a rollout ends as nobody wanted; pods are told to be ready or not, the rest is real HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from kubernetes.config import new_client_from_config_dict

from airflow_mlops.exceptions import RolloutError, TransientError
from airflow_mlops.integrations import kubernetes_rollout, rollout
from airflow_mlops.integrations.kubernetes_cluster import Cluster
from airflow_mlops.integrations.kubernetes_manifests import (
    VERSION,
    KubernetesEndpoint,
    Manifest,
    annotation_of_template,
)
from tests.fakekube.server import FakeKube, fake_kube

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

    from airflow_mlops.integrations.rollout import RolledOut

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

NAMESPACE, NAME = "mlops", "model-fare"
IMAGES = {"fare:1": True, "fare:2": True, "fare:9": True, "fare:broken": False}


@pytest.fixture
def kube() -> Iterator[FakeKube]:
    with fake_kube(namespace=NAMESPACE, images={image: {} for image in IMAGES}) as kube:
        kube.kubelet.still.update(IMAGES)
        yield kube


@pytest.fixture
def api(kube: FakeKube) -> ApiClient:
    return new_client_from_config_dict(kube.kubeconfig())


class InterruptedCluster(Cluster):
    """A cluster that does something before the Deployment is read for the n-th time."""

    def __init__(self, api: ApiClient, number: int, what: Callable[[], None]) -> None:
        super().__init__(api, NAMESPACE, "kubernetes_default")
        self.left, self.what = number, what

    def deployment(self, name: str) -> Manifest | None:
        self.left -= 1
        if self.left == 0:
            self.what()
        return super().deployment(name)


def endpoint_of(version: str, **settings: Any) -> KubernetesEndpoint:
    facts = {"model_name": "fare", "package_digest": f"sha256:{version}", "namespace": NAMESPACE}
    sizes = {"minimum": 2, "maximum": 4, "progress_seconds": 2, "grace_seconds": 1}
    return KubernetesEndpoint(model_version=version, image=f"fare:{version}", **(facts | sizes | settings))


@pytest.fixture
def deploy(api: ApiClient) -> Callable[..., RolledOut]:
    def deploy(version: str, run: str, cluster: Cluster | None = None, **settings: Any) -> RolledOut:
        return kubernetes_rollout.roll_out(
            cluster or Cluster(api, NAMESPACE, "kubernetes_default"),
            endpoint_of(version, **settings),
            actor=f"a_dag/{run}/deploy",
            poll_seconds=0.1,
        )

    return deploy


def asked_for(kube: FakeKube) -> str | None:
    found = kube.get("deployments", NAME)
    assert found is not None
    return annotation_of_template(found, VERSION)


def killed() -> None:
    raise RolloutError("the task was killed")


@pytest.mark.parametrize("run", ["second", "third"])
@pytest.mark.parametrize(
    "fault",
    [("patch", "services"), ("patch", "horizontalpodautoscalers"), ("patch", "poddisruptionbudgets"), None],
)
def test_what_served_before_an_attempt_goes_on_when_the_attempt_fails(
    kube: FakeKube, api: ApiClient, deploy: Any, fault: tuple[str, str] | None, run: str
) -> None:
    deploy("1", "first")
    deploy("2", "second")
    cluster = None
    if fault is None:
        cluster = InterruptedCluster(api, 2, killed)
    else:
        kube.faults.append(fault)
    with pytest.raises((TransientError, RolloutError), match=r"leader changed|was killed"):
        deploy("2", run, cluster)
    assert asked_for(kube) == "2"
    assert deploy("2", run).serving_version == "2"


def test_the_way_back_is_to_what_was_found_and_not_to_the_newest_other(kube: FakeKube, deploy: Any) -> None:
    deploy("1", "first")
    deploy("2", "second")
    deploy("1", "third")
    deploy("9", "fourth")
    deploy("1", "fifth")
    taken_back = deploy("broken", "sixth")
    assert (taken_back.state, taken_back.serving_version, asked_for(kube)) == ("rolled_back", "1", "1")


def test_a_retry_that_finds_its_own_half_done_work_finds_the_way_back(
    kube: FakeKube, api: ApiClient, deploy: Any
) -> None:
    deploy("1", "first")
    lost = Cluster(api, NAMESPACE, "kubernetes_default")
    lost.apply(endpoint_of("broken").deployment(actor="a_dag/second/deploy"))  # and then kill -9
    time.sleep(0.5)
    assert deploy("broken", "second").serving_version == "1"
    # What somebody else is in the middle of is not ours to take back.
    lost.apply(endpoint_of("broken").deployment(actor="a_dag/third/deploy"))
    time.sleep(0.5)
    with pytest.raises(RolloutError, match="Nothing else is known to have served before"):
        deploy("broken", "fourth")
    assert asked_for(kube) == "broken"


def test_whoever_deploys_meanwhile_is_named_and_left_alone(
    kube: FakeKube, api: ApiClient, deploy: Any
) -> None:
    deploy("1", "first")
    other = Cluster(api, NAMESPACE, "kubernetes_default")

    def theirs() -> None:
        other.apply(endpoint_of("9").deployment(actor="another/run/deploy"))

    with pytest.raises(RolloutError, match="meanwhile version 9 was asked for, by another/run/deploy"):
        deploy("2", "second", InterruptedCluster(api, 2, theirs))
    assert asked_for(kube) == "9"


def test_whoever_deploys_while_a_version_is_taken_back_is_named_and_left_alone(
    kube: FakeKube, api: ApiClient, deploy: Any
) -> None:
    deploy("1", "first")
    other = Cluster(api, NAMESPACE, "kubernetes_default")

    class Overtaken(Cluster):
        def apply(self, manifest: Manifest, *manager: str) -> Manifest:
            made = super().apply(manifest, *manager)
            if manifest["kind"] == "Deployment" and asked_for(kube) == "1":
                other.apply(endpoint_of("9").deployment(actor="another/run/deploy"))
            return made

    with pytest.raises(RolloutError, match="meanwhile version 9 was asked for, by another/run/deploy"):
        deploy("broken", "second", Overtaken(api, NAMESPACE, "kubernetes_default"))
    assert asked_for(kube) == "9"


def size(kube: FakeKube) -> tuple[int, int, int]:
    """How few, how many pods may be, and how many are asked for."""
    deployment, autoscaler = (kube.get(what, NAME) for what in ("deployments", "horizontalpodautoscalers"))
    assert deployment is not None
    assert autoscaler is not None
    limits = autoscaler["spec"]
    return limits["minReplicas"], limits["maxReplicas"], deployment["spec"].get("replicas", 1)


def wait_for_size(kube: FakeKube, expected: tuple[int, int, int]) -> None:
    deadline = time.monotonic() + 10.0
    while size(kube) != expected:
        assert time.monotonic() < deadline, size(kube)
        time.sleep(0.05)


def test_the_size_of_a_version_that_is_taken_back_never_counted(kube: FakeKube, deploy: Any) -> None:
    deploy("1", "first", minimum=3, maximum=6)
    assert size(kube) == (3, 6, 3)
    assert deploy("broken", "second", minimum=1, maximum=2).serving_version == "1"
    assert size(kube) == (3, 6, 3)
    deploy("2", "third", minimum=1, maximum=2)
    wait_for_size(kube, (1, 2, 2))


def test_a_fixed_number_of_pods_and_a_range_follow_each_other(kube: FakeKube, deploy: Any) -> None:
    deploy("1", "first", minimum=3, maximum=3)
    assert size(kube) == (3, 3, 3)
    deploy("2", "second", minimum=2, maximum=4)
    assert size(kube) == (2, 4, 3)
    deploy("1", "third", minimum=1, maximum=1)
    wait_for_size(kube, (1, 1, 1))


def test_a_number_of_pods_that_was_applied_is_handed_over(
    kube: FakeKube, api: ApiClient, deploy: Any
) -> None:
    cluster = Cluster(api, NAMESPACE, "kubernetes_default")
    former = endpoint_of("1").deployment(actor="a_dag/first/deploy")
    former["spec"]["replicas"] = 3
    cluster.apply(former)
    deploy("2", "second", minimum=2, maximum=4)
    assert size(kube) == (2, 4, 3)
    used = [what["spec"].get("replicas", 1) for _, _, of, what in kube.store.changes if of == "deployments"]
    assert set(used) == {3}, "at no time were there fewer"


class StumblingCluster(Cluster):
    """A cluster that fails, or a task that is killed, whenever the way back begins."""

    def __init__(self, api: ApiClient, *errors: Exception) -> None:
        super().__init__(api, NAMESPACE, "kubernetes_default")
        self.errors, self.gave_up = list(errors), False

    def why_not_ready(self, selector: Any, version: str) -> str:
        self.gave_up = True
        return super().why_not_ready(selector, version)

    def deployment(self, name: str) -> Manifest | None:
        if self.gave_up and self.errors:
            raise self.errors.pop(0)
        return super().deployment(name)


def test_a_cluster_that_stumbles_on_the_way_back_is_asked_again(
    kube: FakeKube, api: ApiClient, deploy: Any
) -> None:
    deploy("1", "first")
    stumbling = StumblingCluster(api, TransientError("503"), TransientError("503"))
    taken_back = deploy("broken", "second", stumbling)
    assert (taken_back.state, taken_back.serving_version, asked_for(kube)) == ("rolled_back", "1", "1")


def test_a_task_that_is_killed_twice_on_the_way_back_still_takes_it(
    kube: FakeKube, api: ApiClient, deploy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy("1", "first")
    kill = RolloutError("the task was killed")
    with pytest.raises(RolloutError, match="the task was killed"):
        deploy("broken", "second", StumblingCluster(api, kill, kill, TransientError("503")))
    assert asked_for(kube) == "1"
    monkeypatch.setattr(rollout, "UNDO_SECONDS", 0.0)
    with pytest.raises(TransientError, match="503"):
        deploy("broken", "third", StumblingCluster(api, *[TransientError("503")] * 4))
    assert asked_for(kube) == "broken"  # bounded: and the log says so
