"""Steps in pods: a fake API server runs their containers as processes; everything else is real."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import polars as pl
import pytest
import yaml
from airflow.sdk.exceptions import AirflowTaskTimeout, TaskDeferred
from airflow.sdk.execution_time.context import set_current_context
from airflow.sdk.execution_time.timeout import TimeoutPosix

from airflow_mlops.exceptions import ConnectionConfigError, DatasetNotFoundError, TransientError
from airflow_mlops.operators.ingest import IngestDatasetOperator
from airflow_mlops.runners.in_process import InProcessRunner
from airflow_mlops.runners.kubernetes import KubernetesRunner, ResourceSpec
from airflow_mlops.runners.pods import RIGHTS
from airflow_mlops.services import Services
from tests.conftest import REPOSITORY
from tests.fakekube.kubelet import PATH, why_not
from tests.fakekube.server import FakeKube, fake_kube

if TYPE_CHECKING:
    from airflow.triggers.base import BaseTrigger

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
    # The provider's client leaves its connections to the end of the process, which in Airflow is the task's.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
]

NAMESPACE, IMAGE = "mlops-steps", "registry.example/steps:1"
WORKER = "system:serviceaccount:mlops:airflow-worker"
SIDECAR = "alpine:3.24.2"
CANARY = "a-password-that-must-not-be-seen"
SERVICES = Services(tracking_uri="http://127.0.0.1:1", tracking_password=CANARY)

OURS = {
    "PATH": f"{Path(sys.executable).parent}:{PATH}",
    "PYTHONPATH": str(REPOSITORY),
    "OMP_NUM_THREADS": "1",
}
IMAGES = {IMAGE: OURS, "registry.example.com/airflow-mlops:0.1.0": OURS, SIDECAR: {}}


@pytest.fixture
def kube(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKube]:
    """A cluster in which Airflow is the service account of ``deploy/kubernetes/role.yaml``."""
    with fake_kube(namespace=NAMESPACE, images=IMAGES) as kube:
        kube.apply(REPOSITORY / "deploy" / "kubernetes" / "role.yaml")
        be(kube, WORKER, monkeypatch)
        yield kube


def be(kube: FakeKube, user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = {"kube_config": json.dumps(kube.kubeconfig(user)), "namespace": NAMESPACE}
    connection = {"conn_type": "kubernetes", "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_KUBERNETES_DEFAULT", json.dumps(connection))


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    pl.DataFrame({"id": [1, 2, 3], "x": [0.5, 1.5, 2.5]}).write_parquet(tmp_path / "rows.parquet")
    return {"source": str(tmp_path / "rows.parquet"), "table": str(tmp_path / "table")}


class StateStore(dict[str, Any]):
    """What Airflow keeps of a task from one attempt to the next."""

    def set(self, key: str, value: Any) -> None:
        self[key] = value


class Attempt:
    """One attempt of a task, as far as the runner and the provider look at it."""

    def __init__(self, number: int = 1, store: StateStore | None = None) -> None:
        self.pushed: dict[str, Any] = {}
        ti = SimpleNamespace(
            dag_id="a_dag",
            run_id="manual__2024-01-01T00:00:00+00:00",
            task_id="ingest",
            map_index=-1,
            try_number=number,
            xcom_push=lambda key, value: self.pushed.update({key: value}),
        )
        self.context: Any = {
            "task_state_store": store,
            "ti": ti,
            "run_id": ti.run_id,
            "dag": SimpleNamespace(),
            "task": SimpleNamespace(),
        }
        self.runner = KubernetesRunner(image=IMAGE)
        self.problem: Exception | None = None

    def run(self, spec: dict[str, Any], **arguments: Any) -> dict[str, Any]:
        self.runner = KubernetesRunner(
            **{"image": IMAGE, "poll_seconds": 0.2, "grace_seconds": 1} | arguments
        )
        with set_current_context(self.context):
            return self.runner.run("ingest", spec, SERVICES)

    def begin(self, spec: dict[str, Any], **arguments: Any) -> threading.Thread:
        def work() -> None:
            try:
                self.run(spec, **arguments)
            except Exception as err:  # noqa: BLE001 - handed to the test
                self.problem = err

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread


def wait_until(what: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def assert_nothing_left(kube: FakeKube) -> None:
    assert wait_until(lambda: kube.pods() == []), kube.pods()
    assert kube.secrets() == []
    assert all(one.ended for one in kube.kubelet.containers.values())


PATIENT = """
import os, time
with open(os.environ["STARTS"], "a") as file:
    file.write("started\\n")
print("still at it", "and more", sep="\\n", flush=True)
while not os.path.exists(os.environ["GO"]):
    time.sleep(0.05)
"""


@pytest.fixture
def patient(tmp_path: Path) -> dict[str, str]:
    """Variables that make a step wait for a file: Python imports ``sitecustomize`` before anything else."""
    (tmp_path / "patient").mkdir()
    (tmp_path / "patient" / "sitecustomize.py").write_text(PATIENT)
    return {
        "PYTHONPATH": f"{tmp_path / 'patient'}:{REPOSITORY}",
        "STARTS": str(tmp_path / "starts"),
        "GO": str(tmp_path / "go"),
    }


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text().splitlines()) if (folder / "starts").exists() else 0


def test_a_step_in_a_pod_gives_the_same(
    kube: FakeKube, spec: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    here = InProcessRunner().run("ingest", spec | {"table": str(tmp_path / "here")}, Services())
    attempt = Attempt()
    there = attempt.run(spec)
    assert there["dataset"]["dataset_digest"] == here["dataset"]["dataset_digest"]
    assert set(there) == set(here)
    assert_nothing_left(kube)
    # The one place where credentials are is the secret that went with the pod.
    (secret,) = [sent for sent in kube.store.sent if sent["kind"] == "Secret"]
    assert secret["stringData"]["AIRFLOW_MLOPS_TRACKING_PASSWORD"] == CANARY
    elsewhere = [sent for sent in kube.store.sent if sent["kind"] != "Secret"]
    changed = [what for _, _, resource, what in kube.store.changes if resource != "secrets"]
    said = b"".join(line for one in kube.kubelet.containers.values() for _, line in one.lines).decode()
    log = capfd.readouterr().out
    assert "Building pod" in log
    assert CANARY not in json.dumps([elsewhere, changed, attempt.pushed, there]) + log + said


def test_an_error_of_ours_comes_back_as_what_it_was(
    kube: FakeKube, spec: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    attempt = Attempt()
    with pytest.raises(DatasetNotFoundError, match="nothing_here"):
        attempt.run(spec | {"source": str(tmp_path / "nothing_here.parquet")})
    assert "Traceback" in capfd.readouterr().out  # the step's own log is the task's
    assert set(attempt.pushed) == {"pod_name", "pod_namespace"}
    assert_nothing_left(kube)


def test_the_log_is_told_while_the_step_runs(
    kube: FakeKube, spec: dict[str, Any], patient: dict[str, str], tmp_path: Path
) -> None:
    attempt, log = Attempt(), tmp_path / "log.txt"
    # Not by pytest's capture: to read that is to empty it, and a line that comes meanwhile is lost.
    with log.open("a", buffering=1) as file, redirect_stdout(file):
        thread = attempt.begin(spec, env=patient)
        # The provider holds a line back until the next one comes.
        assert wait_until(lambda: "still at it" in log.read_text())
        assert thread.is_alive()
        (tmp_path / "go").touch()
        thread.join(timeout=60)
    assert attempt.problem is None


def test_a_pod_that_dies_says_how(
    kube: FakeKube, spec: dict[str, Any], patient: dict[str, str], tmp_path: Path
) -> None:
    attempt = Attempt()
    thread = attempt.begin(spec, env=patient)
    assert wait_until(lambda: starts(tmp_path))
    (pod,) = kube.pods()
    kube.kill(pod)
    thread.join(timeout=60)
    assert isinstance(attempt.problem, RuntimeError)
    message = str(attempt.problem)
    assert f"{NAMESPACE}/{pod['metadata']['name']} of {IMAGE} was killed" in message
    assert "ResourceSpec(memory=...)" in message
    assert "still at it" in message
    assert_nothing_left(kube)


def test_success_takes_a_result(kube: FakeKube, spec: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match="ended with 0 and without a result"):
        Attempt().run(spec, python="true")
    with pytest.raises(RuntimeError, match="ended with 1 and without a result"):
        Attempt().run(spec, python="false")
    assert_nothing_left(kube)


def test_a_missing_image_is_named(kube: FakeKube, spec: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"image 'registry.example/none:2' of step 'ingest' .*pull_secrets"):
        Attempt().run(spec, image="registry.example/none:2")
    assert_nothing_left(kube)


def test_a_pod_that_does_not_start_may_be_tried_again(kube: FakeKube, spec: dict[str, Any]) -> None:
    kube.kubelet.pull_seconds = 60.0
    with pytest.raises(TransientError, match=r"did not start: .*startup_timeout"):
        Attempt().run(spec, startup_timeout=timedelta(seconds=1))
    assert_nothing_left(kube)


def test_a_pod_that_is_taken_away_may_be_tried_again(
    kube: FakeKube, spec: dict[str, Any], patient: dict[str, str], tmp_path: Path
) -> None:
    attempt = Attempt()
    thread = attempt.begin(spec, env=patient)
    assert wait_until(lambda: starts(tmp_path))
    (pod,) = kube.pods()
    kube.delete(pod)
    thread.join(timeout=60)
    assert isinstance(attempt.problem, TransientError)
    assert "was deleted before it had a result" in str(attempt.problem)
    assert_nothing_left(kube)


def test_a_pod_ends_at_its_deadline(kube: FakeKube, spec: dict[str, Any], patient: dict[str, str]) -> None:
    with pytest.raises(RuntimeError, match="took longer than the runner's timeout"):
        Attempt().run(spec, env=patient, timeout=timedelta(seconds=2))
    assert_nothing_left(kube)


def test_killing_the_task_takes_the_pod_along(
    kube: FakeKube, spec: dict[str, Any], patient: dict[str, str], tmp_path: Path
) -> None:
    attempt = Attempt()
    thread = attempt.begin(spec, env=patient)
    assert wait_until(lambda: starts(tmp_path))
    attempt.runner.cancel()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert_nothing_left(kube)


ATTEMPT = """
import json, sys
from tests.integration.test_kubernetes_runner import Attempt
print(json.dumps(Attempt().run(json.loads(sys.argv[1]), env=json.loads(sys.argv[2]))), flush=True)
"""


@pytest.mark.parametrize("ends", ["after_the_retry", "before_the_retry"])
def test_a_retry_goes_on_with_the_pod_of_a_killed_task(
    kube: FakeKube, spec: dict[str, Any], patient: dict[str, str], tmp_path: Path, ends: str
) -> None:
    command = [sys.executable, "-c", ATTEMPT, json.dumps(spec), json.dumps(patient)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPOSITORY)
    assert wait_until(lambda: starts(tmp_path))
    first.kill()
    first.communicate(timeout=10)
    (pod,) = kube.pods()
    if ends == "before_the_retry":
        (tmp_path / "go").touch()
        assert wait_until(lambda: kube.kubelet.container(pod, "base").ended)  # type: ignore[union-attr]
    attempt = Attempt(2)
    if ends == "after_the_retry":
        threading.Timer(2.0, (tmp_path / "go").touch).start()
    assert attempt.run(spec, env=patient)["row_count"] == 3
    assert attempt.pushed["pod_name"] == pod["metadata"]["name"]
    assert (starts(tmp_path), len(kube.started())) == (1, 1)  # no second one
    assert_nothing_left(kube)


def test_a_cluster_that_stumbles_does_not_cost_the_work(
    kube: FakeKube, spec: dict[str, Any], patient: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-c", ATTEMPT, json.dumps(spec), json.dumps(patient)]
    once = os.environ | {"AIRFLOW__WORKERS__API_RETRIES": "1"}  # the provider would try again for some time
    first = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY, env=once
    )
    assert wait_until(lambda: starts(tmp_path))
    assert wait_until(lambda: (WORKER, "get", "pods/log") in kube.store.audit)
    kube.stumble(1)
    output, errors = first.communicate(timeout=60)
    assert "the cluster of 'kubernetes_default' failed: apiserver not ready" in errors
    assert "the next attempt goes on with it" in output
    (tmp_path / "go").touch()
    assert Attempt(2).run(spec, env=patient)["row_count"] == 3
    assert (starts(tmp_path), len(kube.started())) == (1, 1)
    assert_nothing_left(kube)


def test_the_tasks_own_timeout_stays_one(
    kube: FakeKube, spec: dict[str, Any], patient: dict[str, str]
) -> None:
    with pytest.raises(AirflowTaskTimeout), TimeoutPosix(5):
        Attempt().run(spec, env=patient)
    assert_nothing_left(kube)


def test_a_retry_with_other_work_ends_the_former_pod_first(
    kube: FakeKube, spec: dict[str, Any], patient: dict[str, str], tmp_path: Path
) -> None:
    store = StateStore()
    first = Attempt(1, store)
    thread = first.begin(spec, env=patient)
    assert wait_until(lambda: starts(tmp_path))
    (pod,) = kube.pods()
    assert Attempt(2, store).run(spec | {"table": str(tmp_path / "other")})["row_count"] == 3
    thread.join(timeout=60)
    assert isinstance(first.problem, TransientError)
    assert_nothing_left(kube)
    came_and_went = [
        (how, what["metadata"]["name"] == pod["metadata"]["name"])
        for _, how, resource, what in kube.store.changes
        if resource == "pods" and how != "MODIFIED"
    ]
    assert came_and_went == [("ADDED", True), ("DELETED", True), ("ADDED", False), ("DELETED", False)]


class TestDeferred:
    """The task waits in the triggerer, and comes back in another process."""

    def defer(self, attempt: Attempt, spec: dict[str, Any], **arguments: Any) -> BaseTrigger:
        with pytest.raises(TaskDeferred) as deferred:
            attempt.run(spec, deferrable=True, **arguments)
        assert deferred.value.method_name == "execute_complete"
        path, kwargs = deferred.value.trigger.serialize()
        assert CANARY not in json.dumps(kwargs, default=str)
        module, _, name = path.rpartition(".")
        trigger: BaseTrigger = getattr(importlib.import_module(module), name)(**kwargs)
        return trigger

    def resume(self, trigger: BaseTrigger, arguments: dict[str, Any]) -> dict[str, Any]:
        """Go on as Airflow does: with a runner that was made anew."""

        async def event() -> Any:
            fired = await anext(aiter(trigger.run()))
            return json.loads(json.dumps(fired.payload, default=str))

        attempt = Attempt()
        attempt.runner = KubernetesRunner(image=IMAGE, deferrable=True, **arguments)
        operator = IngestDatasetOperator(task_id="ingest", source="x", table="y", runner=attempt.runner)
        operator.record = lambda result, context: None  # type: ignore[method-assign]
        with set_current_context(attempt.context):
            return operator.execute_complete(attempt.context, asyncio.run(event()))

    def test_the_result_is_taken_afterwards(self, kube: FakeKube, spec: dict[str, Any]) -> None:
        trigger = self.defer(Attempt(), spec)
        assert self.resume(trigger, {"poll_seconds": 0.2})["row_count"] == 3
        assert_nothing_left(kube)

    def test_an_error_of_ours_comes_back_as_what_it_was(
        self, kube: FakeKube, spec: dict[str, Any], tmp_path: Path
    ) -> None:
        trigger = self.defer(Attempt(), spec | {"source": str(tmp_path / "nothing_here.parquet")})
        with pytest.raises(DatasetNotFoundError, match="nothing_here"):
            self.resume(trigger, {})
        assert_nothing_left(kube)

    def test_a_missing_image_is_named(self, kube: FakeKube, spec: dict[str, Any]) -> None:
        trigger = self.defer(Attempt(), spec, image="registry.example/none:2")
        with pytest.raises(ValueError, match=r"image .* can't be started: .*registry.example/none:2"):
            self.resume(trigger, {})
        assert_nothing_left(kube)

    def test_a_retry_gives_the_secret_that_a_killed_task_could_not(
        self, kube: FakeKube, spec: dict[str, Any]
    ) -> None:
        kube.kubelet.pull_seconds = 3.0
        self.defer(Attempt(), spec)
        (secret,) = kube.secrets()
        kube.store.remove("secrets", NAMESPACE, secret["metadata"]["name"])
        trigger = self.defer(Attempt(2), spec)
        assert self.resume(trigger, {"poll_seconds": 0.2})["row_count"] == 3
        assert len(kube.started()) == 1
        assert_nothing_left(kube)

    def test_a_pod_that_does_not_start_may_be_tried_again(self, kube: FakeKube, spec: dict[str, Any]) -> None:
        kube.kubelet.pull_seconds = 60.0
        trigger = self.defer(Attempt(), spec, startup_timeout=timedelta(seconds=1))
        with pytest.raises(TransientError, match="was not done in time: Pod took too long to start"):
            self.resume(trigger, {})
        assert_nothing_left(kube)

    def test_a_pod_that_is_taken_away_may_be_tried_again(
        self, kube: FakeKube, spec: dict[str, Any], patient: dict[str, str], tmp_path: Path
    ) -> None:
        trigger = self.defer(Attempt(), spec, env=patient)
        assert wait_until(lambda: starts(tmp_path))
        kube.delete(kube.pods()[0])
        assert_nothing_left(kube)
        with pytest.raises(TransientError, match="was deleted before it had a result"):
            self.resume(trigger, {})

    def test_another_runner_can_not_go_on(self) -> None:
        operator = IngestDatasetOperator(task_id="ingest", source="x", table="y")
        with pytest.raises(TypeError, match="'ingest' was deferred by another runner than InProcessRunner"):
            operator.execute_complete(Attempt().context, {})

    def test_killing_the_waiting_task_takes_the_pod_along(
        self, kube: FakeKube, spec: dict[str, Any], patient: dict[str, str], tmp_path: Path
    ) -> None:
        trigger = self.defer(Attempt(), spec, env=patient)
        assert wait_until(lambda: starts(tmp_path))
        asyncio.run(trigger.on_kill())
        assert_nothing_left(kube)

    def test_a_retry_goes_on_with_the_pod(
        self, kube: FakeKube, spec: dict[str, Any], patient: dict[str, str], tmp_path: Path
    ) -> None:
        store = StateStore()
        self.defer(Attempt(1, store), spec, env=patient)
        assert wait_until(lambda: starts(tmp_path))
        assert store["pod_identifier"]["name"] == kube.pods()[0]["metadata"]["name"]
        trigger = self.defer(Attempt(2, store), spec, env=patient)
        (tmp_path / "go").touch()
        assert self.resume(trigger, {"env": patient})["row_count"] == 3
        assert (starts(tmp_path), len(kube.started())) == (1, 1)
        assert_nothing_left(kube)


@pytest.mark.parametrize("right", [f"{verb} {name}" for name, verbs in RIGHTS.items() for verb in verbs])
def test_a_right_that_is_missing_is_named_before_anything_starts(
    kube: FakeKube, spec: dict[str, Any], right: str
) -> None:
    verb, resource = right.split()
    (role,) = [found for key, found in kube.store.objects.items() if key[0] == "roles"]
    for rule in role["rules"]:
        if rule["resources"] == [resource]:
            rule["verbs"].remove(verb)
    with pytest.raises(ConnectionConfigError, match=f"may not {right} in namespace '{NAMESPACE}'.*role.yaml"):
        Attempt().run(spec)
    assert kube.started() == []


@pytest.fixture
def airflow_home(
    kube: FakeKube, own_mlflow_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """An environment with the reference Dag and the scenario's in its Dag folder, and everything it connects to."""
    dags = tmp_path / "dags"
    dags.mkdir()
    shutil.copy(REPOSITORY / "dags" / "train_on_kubernetes.py", dags)
    shutil.copy(Path(__file__).parent / "kubernetes_scenario.py", dags)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = httpx.URL(own_mlflow_server)
    bentoml = {"host": "127.0.0.1", "port": port, "extra": {"serving_dir": str(tmp_path / "serving")}}
    connections = {
        "MLFLOW": {"conn_type": "mlflow", "host": server.host, "port": server.port, "password": CANARY},
        "BENTOML": {"conn_type": "bentoml"} | bentoml,
        "LEDGER": {"conn_type": "mlops_ledger", "extra": {"url": f"sqlite:///{tmp_path / 'ledger.db'}"}},
    }
    environment = {
        **os.environ,
        **{f"AIRFLOW_CONN_{name}_DEFAULT": json.dumps(value) for name, value in connections.items()},
        "AIRFLOW_HOME": str(tmp_path / "airflow"),
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW_VAR_MLOPS_DATA_ROOT": str(tmp_path / "data"),
        "SCENARIO_IMAGE": IMAGE,
        "PYTHONWARNINGS": "ignore",
    }
    for command in (["db", "migrate"], ["dags", "reserialize"]):
        airflow = [sys.executable, "-m", "airflow", *command]
        done = subprocess.run(airflow, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
    return environment


def test_dags_train_in_pods(kube: FakeKube, airflow_home: dict[str, str], tmp_path: Path) -> None:
    kube.kubelet.pull_seconds = 4.0  # long enough to ask why it takes so long
    scenario = [sys.executable, str(tmp_path / "dags" / "kubernetes_scenario.py")]
    done = subprocess.run(scenario, env=airflow_home, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    outcome = json.loads(done.stdout.splitlines()[-1])
    reference = ("train", "evaluate", "register", "promote", "deploy")
    assert outcome["train_on_kubernetes"] == dict.fromkeys(reference, "success"), done.stdout[-6000:]
    assert outcome["waiting_in_the_task"] == {"train": "success", "train_on_nothing": "failed"}
    assert [found["model_name"] for found in outcome["train_on_kubernetes, xcom"]] == ["trip_fare"]
    assert [found and found["model_name"] for found in outcome["waiting_in_the_task, xcom"]] == [
        "waiting",
        None,
    ]
    assert outcome["entries"].count("training") == 2
    assert "DatasetNotFoundError" in done.stdout
    assert len(kube.started()) == 3
    assert_nothing_left(kube)
    assert CANARY not in done.stdout + done.stderr + json.dumps(kube.started())
    # What the role grants is what both ways of waiting asked for, and nothing else was refused.
    asked = {(resource, verb) for user, verb, resource in kube.store.audit if user == WORKER}
    assert asked == {(resource, verb) for resource, verbs in RIGHTS.items() for verb in verbs}


def test_the_role_that_ships_is_what_is_needed() -> None:
    role, binding = yaml.safe_load_all((REPOSITORY / "deploy" / "kubernetes" / "role.yaml").read_text())
    granted = {
        (resource, verb) for rule in role["rules"] for resource in rule["resources"] for verb in rule["verbs"]
    }
    assert granted == {(resource, verb) for resource, verbs in RIGHTS.items() for verb in verbs}
    assert binding["roleRef"]["name"] == role["metadata"]["name"]


def test_a_cluster_that_refuses_says_what(
    kube: FakeKube, spec: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConnectionConfigError, match=r"may not create pods, .* in namespace 'elsewhere'"):
        Attempt().run(spec, namespace="elsewhere")
    with pytest.raises(ValueError, match=r'refuses the pod of step .*\[memory\]: Invalid value: "8 GB"'):
        Attempt().run(spec, resources=ResourceSpec(memory="8 GB"))
    with pytest.raises(
        ValueError, match=r"what no pod has: pod.spec.tolerations\[0\].forever: True; write it as"
    ):
        Attempt().run(spec, resources=ResourceSpec(tolerations=({"key": "gpu", "forever": True},)))
    kube.store.refusal = "exceeded quota: gpus, requested: 1, used: 4, limited: 4"
    with pytest.raises(TransientError, match=r"no room for step 'ingest' now: .*exceeded quota"):
        Attempt().run(spec)
    kube.store.refusal = "violates PodSecurity"
    with pytest.raises(
        ConnectionConfigError, match=r"a rule of the namespace refuses .*violates PodSecurity"
    ):
        Attempt().run(spec)
    kube.store.refusal = None
    be(kube, "admin", monkeypatch)
    with pytest.raises(ConnectionConfigError, match='namespaces "elsewhere" not found'):
        Attempt().run(spec, namespace="elsewhere")
    kube.tokens.clear()
    with pytest.raises(ConnectionConfigError, match="does not know connection 'kubernetes_default'"):
        Attempt().run(spec)
    kube.url = "http://127.0.0.1:9"  # nobody listens there
    be(kube, WORKER, monkeypatch)
    with pytest.raises(TransientError, match="the cluster of 'kubernetes_default' can't be reached"):
        Attempt().run(spec)
    assert kube.pods() == []


def test_what_has_no_argument_comes_from_a_template(
    kube: FakeKube, spec: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    Path(spec["source"]).rename(tmp_path / "data" / "rows.parquet")
    template = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "any", "annotations": {"team": "pricing"}},
        "spec": {
            "containers": [
                {"name": "base", "volumeMounts": [{"name": "data", "mountPath": "/data-of-the-team"}]}
            ],
            "volumes": [{"name": "data", "hostPath": {"path": str(tmp_path / "data")}}],
        },
    }
    (tmp_path / "pod.yaml").write_text(yaml.safe_dump(template))
    result = Attempt().run(
        spec | {"source": "/data-of-the-team/rows.parquet"}, pod_template_file=str(tmp_path / "pod.yaml")
    )
    assert result["row_count"] == 3
    (pod,) = kube.started()
    assert pod["metadata"]["annotations"] == {"team": "pricing"}
    containers = pod["spec"]["containers"]
    assert [one["name"] for one in containers] == ["base", "airflow-xcom-sidecar"]
    for container in containers:
        assert container["securityContext"] == ResourceSpec().container_security
