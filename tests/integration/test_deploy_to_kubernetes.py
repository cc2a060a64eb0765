"""Deployments of Bentos: a fake API server runs their pods as processes and probes them; everything else is real."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_mlops.exceptions import ConnectionConfigError, RolloutError
from airflow_mlops.integrations import rollout
from airflow_mlops.integrations.bentoml import EndpointClient
from airflow_mlops.integrations.kubernetes_cluster import RIGHTS
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import EntryKind, Ledger
from airflow_mlops.operators.deploy_to_kubernetes import DeployToKubernetesOperator
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from tests.conftest import REPOSITORY
from tests.fakekube.kubelet import PATH, why_not
from tests.fakekube.server import FakeKube, fake_kube
from tests.packages import ROWS, build_package, register

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

NAMESPACE, NAME, TOKEN = "mlops-models", "model-fare", "a-token-that-must-not-be-seen"
WORKER = "system:serviceaccount:mlops:airflow-worker"
REPOSITORY_OF_IMAGES = "registry.example/fare"
ENVIRONMENT = {"PATH": f"{Path(sys.executable).parent}:{PATH}", "OMP_NUM_THREADS": "1"}
SETTINGS = {"minimum": 1, "maximum": 1, "grace_seconds": 5, "progress_seconds": 60}


@pytest.fixture(scope="module")
def bentos(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of the build step for two versions, and one whose model was damaged on its way into the image."""
    folder, services = tmp_path_factory.mktemp("bentos"), Services(tracking_uri=mlflow_server)
    registry, found = Registry.connect(services), {}
    for version, slope in (("1", 2.0), ("2", 5.0)):
        digest = build_package(folder / version, slope=slope)
        number = register(registry, folder / version, "fare", digest)
        spec = {"model_name": "fare", "model_version": number, "destination": str(folder / "built")}
        found[version] = run_step("build", spec, services)
        assert number == version
    broken = folder / "broken"
    shutil.copytree(found["2"]["path"], broken)
    (model,) = broken.glob("src/bundle/models/fare/2/model.onnx")
    model.write_bytes(b"not what was registered")
    found["broken"] = found["2"] | {"path": str(broken)}
    return found


@pytest.fixture
def kube(
    bentos: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeKube]:
    """A cluster in which Airflow is the service account of ``deploy/kubernetes/deploy-role.yaml``."""
    images = {f"{REPOSITORY_OF_IMAGES}:{version}": ENVIRONMENT for version in bentos}
    with fake_kube(namespace=NAMESPACE, images=images) as kube:
        for version, built in bentos.items():
            kube.kubelet.bentos[f"{REPOSITORY_OF_IMAGES}:{version}"] = Path(built["path"])
        kube.apply(REPOSITORY / "deploy" / "kubernetes" / "deploy-role.yaml")
        be(kube, WORKER, monkeypatch)
        endpoint = {"conn_type": "bentoml", "host": "fare.example", "port": 80, "password": TOKEN}
        ledger = {"conn_type": "mlops_ledger", "extra": {"url": f"sqlite:///{tmp_path / 'ledger.db'}"}}
        monkeypatch.setenv("AIRFLOW_CONN_BENTOML_DEFAULT", json.dumps(endpoint))
        monkeypatch.setenv("AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps(ledger))
        yield kube


def be(kube: FakeKube, user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"kube_config": json.dumps(kube.kubeconfig(user)), "namespace": NAMESPACE}
    monkeypatch.setenv(
        "AIRFLOW_CONN_KUBERNETES_DEFAULT", json.dumps({"conn_type": "kubernetes", "extra": extra})
    )


@pytest.fixture
def deploy(bentos: dict[str, dict[str, Any]], kube: FakeKube) -> Any:
    def deploy(
        version: str, *, run: str = "a_run", index: int = -1, image: str | None = None, **settings: Any
    ) -> dict[str, Any]:
        task = DeployToKubernetesOperator(
            task_id="deploy",
            bento=bentos[version],
            image=image or f"{REPOSITORY_OF_IMAGES}:{version}",
            settings=SETTINGS | settings,
            poll_seconds=0.2,
        )
        ti = SimpleNamespace(dag_id="a_dag", run_id=run, task_id="deploy", map_index=index)
        return task.execute({"ti": ti})  # type: ignore[typeddict-item]

    return deploy


def answers(kube: FakeKube, token: str = TOKEN) -> list[tuple[str, float]]:
    """What every pod says that the Service leads to."""
    found = []
    for address in kube.addresses(NAME):
        with EndpointClient(address, token) as client:
            answer = client.predict(ROWS[:1])
            found.append((answer["model_version"], answer["predictions"][0]))
    return found


def entries(tmp_path: Path, kind: EntryKind) -> list[Any]:
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}") as ledger:
        return ledger.entries(kind=kind, newest_first=False)


def test_versions_follow_each_other_and_requests_are_answered(
    kube: FakeKube, deploy: Any, tmp_path: Path
) -> None:
    first = deploy("1", minimum=2, maximum=2)
    assert (first["state"], first["started"], first["previous_version"], first["revision"]) == (
        "serving",
        True,
        None,
        1,
    )
    assert first["endpoint_url"] == "http://model-fare.mlops-models.svc"
    assert answers(kube) == [("1", pytest.approx(2.0, abs=0.6))] * 2
    with pytest.raises(ValueError, match="token"):
        answers(kube, "wrong")

    stop, seen, failures = threading.Event(), [], []

    def keep_asking() -> None:
        while not stop.is_set():
            try:
                seen.extend(answers(kube))
            except Exception as err:  # noqa: BLE001 - any failure counts
                failures.append(err)
            time.sleep(0.05)

    thread = threading.Thread(target=keep_asking)
    thread.start()
    try:
        second = deploy("2", run="next", minimum=2, maximum=2)
    finally:
        stop.set()
        thread.join()
    assert failures == []
    assert {version for version, _ in seen} == {"1", "2"}
    assert (second["started"], second["previous_version"], second["revision"]) == (False, "1", 2)
    assert answers(kube) == [("2", pytest.approx(5.0, abs=1.5))] * 2
    again = deploy("2", run="next", minimum=2, maximum=2)  # a retry
    assert again["revision"] == 2
    assert [entry.subject for entry in entries(tmp_path, EntryKind.DEPLOYMENT)] == ["1", "2"]

    # The token is in the secret and nowhere else, and the role allows what was used and no more.
    changed = [what for _, _, resource, what in kube.store.changes if resource != "secrets"]
    assert TOKEN not in json.dumps([changed, first, second])
    used = {(verb, resource) for user, verb, resource in kube.store.audit if user == WORKER}
    granted = {(verb, resource) for (_, resource), verbs in RIGHTS.items() for verb in verbs}
    assert used == granted - {("list", "pods")}


def test_a_version_that_does_not_become_ready_is_taken_back(
    kube: FakeKube, deploy: Any, tmp_path: Path
) -> None:
    deploy("1", maximum=2)
    assert kube.get("horizontalpodautoscalers", NAME) is not None
    with pytest.raises(
        RolloutError, match=r"version 2 of fare .*/readyz does not answer.* Version 1 serves, as before"
    ):
        deploy("broken", run="broken", maximum=2, progress_seconds=15)
    assert answers(kube) == [("1", pytest.approx(2.0, abs=0.6))]
    (entry,) = entries(tmp_path, EntryKind.ROLLOUT)
    assert (entry.subject, entry.payload["event"]["what"]) == ("2", "rolled_back")
    with pytest.raises(RolloutError, match=r"ImagePullBackOff.* Version 1 serves, as before"):
        deploy("2", run="nowhere", image="registry.example/none:2", maximum=2, progress_seconds=3)
    assert answers(kube) == [("1", pytest.approx(2.0, abs=0.6))]
    assert deploy("2", run="good", maximum=2)["previous_version"] == "1"
    assert answers(kube) == [("2", pytest.approx(5.0, abs=1.5))]


def test_the_first_version_that_does_not_become_ready_is_left_to_be_looked_at(
    kube: FakeKube, deploy: Any
) -> None:
    with pytest.raises(
        RolloutError, match=r"ImagePullBackOff.*Nothing else is known to have served before; it was left"
    ):
        deploy("1", image="registry.example/none:1", progress_seconds=2)
    assert kube.get("deployments", NAME) is not None
    assert deploy("1", run="again")["serving_version"] == "1"


def test_a_task_that_is_killed_puts_back_what_served(
    kube: FakeKube, deploy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy("1")
    naps = []

    def die(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 5:
            raise SystemExit("killed")
        threading.Event().wait(seconds)

    with monkeypatch.context() as patched:
        patched.setattr(rollout, "time", SimpleNamespace(sleep=die, monotonic=time.monotonic))
        with pytest.raises(SystemExit):
            deploy("2", run="killed")
    found = kube.get("deployments", NAME)
    assert found is not None
    assert found["spec"]["template"]["spec"]["containers"][0]["image"] == f"{REPOSITORY_OF_IMAGES}:1"
    assert answers(kube) == [("1", pytest.approx(2.0, abs=0.6))]
    assert deploy("2", run="killed")["serving_version"] == "2"


def test_a_deployment_that_was_made_anew_is_another_one(kube: FakeKube, deploy: Any, tmp_path: Path) -> None:
    first = deploy("1", index=0)
    found = kube.get("deployments", NAME)
    assert found is not None
    assert found["metadata"]["annotations"]["airflow-mlops/deployed-by"] == "a_dag/a_run/deploy/0"
    kube.store.remove("deployments", NAMESPACE, NAME)
    second = deploy("1", index=0)
    assert (first["revision"], second["revision"]) == (1, 1)
    assert first["deployment_uid"] == found["metadata"]["uid"] != second["deployment_uid"]
    assert [entry.subject for entry in entries(tmp_path, EntryKind.DEPLOYMENT)] == ["1", "1"]


def test_another_token_is_rolled_out(kube: FakeKube, deploy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    deploy("1")
    endpoint = {"conn_type": "bentoml", "host": "fare.example", "port": 80, "password": "another"}
    monkeypatch.setenv("AIRFLOW_CONN_BENTOML_DEFAULT", json.dumps(endpoint))
    assert deploy("1", run="rotated")["revision"] == 2
    assert answers(kube, "another") == [("1", pytest.approx(2.0, abs=0.6))]
    assert len(kube.secrets()) == 2  # the former one, for a way back


def test_a_secret_of_somebody_else_becomes_variables(
    kube: FakeKube, deploy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "from-a-vault"}}
    secret["stringData"] = {"AIRFLOW_MLOPS_ENDPOINT_TOKEN": "from-a-vault"}
    (tmp_path / "secret.yaml").write_text(json.dumps(secret))
    kube.apply(tmp_path / "secret.yaml")
    endpoint = {"conn_type": "bentoml", "host": "fare.example", "port": 80}
    monkeypatch.setenv("AIRFLOW_CONN_BENTOML_DEFAULT", json.dumps(endpoint))
    deploy("1", env_secrets=["from-a-vault"])
    assert answers(kube, "from-a-vault") == [("1", pytest.approx(2.0, abs=0.6))]
    with pytest.raises(ValueError, match="token"):
        answers(kube, "wrong")
    assert len(kube.secrets()) == 1


def test_what_stands_in_the_way_is_said_before_anything_changes(
    kube: FakeKube, deploy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="settings can't say size, namespace"):
        deploy("1", size=3, namespace="elsewhere")
    role = kube.store.objects["roles", NAMESPACE, "airflow-mlops-deployer"]
    rules = role["rules"]
    role["rules"] = [rule for rule in rules if rule["resources"] != ["replicasets"]]
    with pytest.raises(ConnectionConfigError, match=r"may not list replicasets .*deploy-role.yaml. Nothing"):
        deploy("1")
    role["rules"] = rules
    assert kube.secrets() == []
    deploy("1")
    live = kube.store.objects["deployments", NAMESPACE, NAME]
    live["metadata"]["labels"]["app.kubernetes.io/managed-by"] = "Helm"
    with pytest.raises(RolloutError, match="was not made for model 'fare' by this operator"):
        deploy("1")
    be(kube, "nobody", monkeypatch)
    kube.tokens.clear()
    with pytest.raises(ConnectionConfigError, match="does not know connection 'kubernetes_default'"):
        deploy("1")
