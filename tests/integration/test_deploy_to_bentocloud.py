"""Deployments to a fake BentoCloud: the operator, BentoML's client, the uploads and the services are real."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_mlops.exceptions import ArtifactIntegrityError, ConnectionConfigError, RolloutError
from airflow_mlops.hooks.bentocloud import BentoCloudHook
from airflow_mlops.integrations import bentocloud, rollout
from airflow_mlops.integrations.bentoml import EndpointClient, wait_until
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import EntryKind, Ledger
from airflow_mlops.operators.deploy_to_bentocloud import DeployToBentoCloudOperator
from airflow_mlops.services import Services
from airflow_mlops.steps.base import run_step
from tests.fakecloud import FakeCloud
from tests.packages import ROWS, build_package, register

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # BentoML's, as it is imported here
]

API_TOKEN, TOKEN, MODEL, NAME = "an-api-token", "a-token-of-the-service", "cloud-fare", "model-cloud-fare"
CONNECTION = "AIRFLOW_CONN_BENTOCLOUD_DEFAULT"


@pytest.fixture(scope="module")
def bentos(mlflow_server: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results of the build step for two versions: one a tar file, one a folder."""
    folder, services = tmp_path_factory.mktemp("bentos"), Services(tracking_uri=mlflow_server)
    registry, found = Registry.connect(services), {}
    for version, slope, form in (("1", 2.0, "tar"), ("2", 5.0, "folder")):
        digest = build_package(folder / version, slope=slope)
        number = register(registry, folder / version, MODEL, digest)
        spec = {
            "model_name": MODEL,
            "model_version": number,
            "destination": str(folder / "built"),
            "form": form,
        }
        found[version] = run_step("build", spec, services)
        assert number == version
    return found


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCloud]:
    (tmp_path / "cloud").mkdir()
    with FakeCloud(tmp_path / "cloud", API_TOKEN).running() as cloud:
        connect(cloud, API_TOKEN, monkeypatch)
        endpoint = {"conn_type": "bentoml", "host": "fare.example", "port": 80, "password": TOKEN}
        ledger = {"conn_type": "mlops_ledger", "extra": {"url": f"sqlite:///{tmp_path / 'ledger.db'}"}}
        monkeypatch.setenv("AIRFLOW_CONN_BENTOML_DEFAULT", json.dumps(endpoint))
        monkeypatch.setenv("AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps(ledger))
        yield cloud
    assert cloud.unknown == [], "the client asked for what BentoCloud's API is not known to have"


def connect(cloud: FakeCloud, token: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        CONNECTION, json.dumps({"conn_type": "bentocloud", "host": cloud.url, "password": token})
    )


@pytest.fixture
def deploy(bentos: dict[str, dict[str, Any]], cloud: FakeCloud) -> Any:
    def deploy(version: str, *, run: str = "a_run", **settings: Any) -> dict[str, Any]:
        task = DeployToBentoCloudOperator(
            task_id="deploy",
            bento=bentos[version],
            settings={"ready_seconds": 60.0} | settings,
            poll_seconds=0.2,
        )
        ti = SimpleNamespace(dag_id="a_dag", run_id=run, task_id="deploy")
        return task.execute({"ti": ti})  # type: ignore[typeddict-item]

    return deploy


def answer(cloud: FakeCloud, token: str = TOKEN) -> tuple[str, float]:
    with EndpointClient(f"{cloud.url}/endpoints/{NAME}", token) as client:
        told = client.predict(ROWS[:1])
    return told["model_version"], told["predictions"][0]


def entries(tmp_path: Path, kind: EntryKind) -> list[Any]:
    with Ledger.open(f"sqlite:///{tmp_path / 'ledger.db'}") as ledger:
        return ledger.entries(kind=kind, newest_first=False)


def test_versions_follow_each_other_and_tokens_are_nowhere(
    cloud: FakeCloud,
    deploy: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("DEBUG")
    first = deploy("1", env={"OMP_NUM_THREADS": "1"})
    assert (first["state"], first["started"], first["previous_version"]) == ("serving", True, None)
    assert first["endpoint_url"] == f"{cloud.url}/endpoints/{NAME}"
    assert answer(cloud) == ("1", pytest.approx(2.0, abs=0.6))
    with pytest.raises(ValueError, match="token"):
        answer(cloud, "wrong")
    again = deploy("1", env={"OMP_NUM_THREADS": "1"})
    assert (again["revision"], again["started"]) == (first["revision"], False)
    assert cloud.deployments[NAME]["revisions"] == 1

    second = deploy("2", run="next", maximum=3)
    assert (second["started"], second["previous_version"]) == (False, "1")
    assert answer(cloud) == ("2", pytest.approx(5.0, abs=1.5))
    assert list(cloud.deployments) == [NAME]
    (target,) = cloud.deployments[NAME]["latest_revision"]["targets"]
    names = [one["name"] for one in target["config"]["envs"]]
    assert names == ["AIRFLOW_MLOPS_DEPLOYMENT"], "nothing of what was there before stays"
    assert [entry.subject for entry in entries(tmp_path, EntryKind.DEPLOYMENT)] == ["1", "2"]

    (secret,) = cloud.secrets.values()
    assert [one["value"] for one in secret["content"]["items"]] == [TOKEN]
    kept = json.dumps([first, second, cloud.deployments, cloud.bentos])
    said = caplog.text + "".join(capfd.readouterr())
    from bentoml._internal.configuration.containers import BentoMLContainer

    contexts = Path(BentoMLContainer.cloud_config.get())
    said += contexts.read_text() if contexts.exists() else ""
    assert not [token for token in (TOKEN, API_TOKEN) if token in kept + said]


def test_a_version_that_does_not_become_ready_is_taken_back(
    cloud: FakeCloud,
    deploy: Any,
    bentos: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ask = bentocloud.BentoCloud.why_not_ready

    def stumble_afterwards(self: bentocloud.BentoCloud, name: str) -> str:
        told = ask(self, name)
        cloud.failures = 1  # the first request of the way back
        return told

    monkeypatch.setattr(bentocloud.BentoCloud, "why_not_ready", stumble_afterwards)
    deploy("1")
    cloud.fates[bentos["2"]["tag"]] = "deploying"
    with pytest.raises(
        RolloutError,
        match=r"version 2 of cloud-fare did not .*after 15 s \(ready_seconds\) BentoCloud says 'deploying' "
        r"\(Pending: Insufficient cpu\).*Version 1 serves, as before",
    ):
        deploy("2", run="stuck", ready_seconds=15.0)
    assert answer(cloud) == ("1", pytest.approx(2.0, abs=0.6))
    (entry,) = entries(tmp_path, EntryKind.ROLLOUT)
    assert (entry.subject, entry.payload["event"]["what"]) == ("2", "rolled_back")
    cloud.fates[bentos["2"]["tag"]] = "image-build-failed"
    with pytest.raises(
        RolloutError, match=r"BentoCloud says 'image-build-failed'.*Version 1 serves, as before"
    ):
        deploy("2", run="refused")
    cloud.fates.clear()
    assert deploy("2", run="good")["previous_version"] == "1"
    assert answer(cloud) == ("2", pytest.approx(5.0, abs=1.5))


def test_the_first_version_that_does_not_become_ready_is_left_to_be_looked_at(
    cloud: FakeCloud, deploy: Any, bentos: dict[str, dict[str, Any]]
) -> None:
    cloud.fates[bentos["1"]["tag"]] = "image-build-failed"
    with pytest.raises(
        RolloutError, match=r"'image-build-failed'.*Nothing else is known to have served before"
    ):
        deploy("1")
    assert list(cloud.deployments) == [NAME]
    with pytest.raises(RolloutError, match="Nothing else is known to have served before"):
        deploy("1", run="again")  # the version that failed is no way back
    assert cloud.deployments[NAME]["revisions"] == 2
    cloud.fates.clear()
    cloud.failures = 1  # and a stumble on the way
    with pytest.raises(bentocloud.TransientError, match=r"BentoCloud failed.*come again"):
        deploy("1", run="again")
    assert deploy("1", run="again")["serving_version"] == "1"


def test_replicas_of_the_deployment_before_are_not_taken_for_the_new_ones(
    cloud: FakeCloud, deploy: Any
) -> None:
    deploy("1")
    cloud.hasty = True
    for threads in ("1", "2"):  # nothing else changes: the version that answers is the same
        deploy("1", env={"OMP_NUM_THREADS": threads})
        (target,) = cloud.deployments[NAME]["latest_revision"]["targets"]
        envs = {one["name"]: one["value"] for one in target["config"]["envs"]}
        with EndpointClient(f"{cloud.url}/endpoints/{NAME}", TOKEN) as client:
            assert client.ready()["deployment"] == envs["AIRFLOW_MLOPS_DEPLOYMENT"]


def test_whoever_deploys_meanwhile_is_left_alone(
    cloud: FakeCloud, deploy: Any, bentos: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy("1")
    look, theirs = bentocloud.BentoCloud.find, []

    def overtaken(self: bentocloud.BentoCloud, name: str) -> Any:
        found = look(self, name)
        if found is not None and found.get_bento(refetch=False) == bentos["2"]["tag"] and not theirs:
            config = bentocloud.config_of(found) | {"bento": bentos["1"]["tag"]}
            theirs.append(self.apply(config, found))
            return look(self, name)
        return found

    monkeypatch.setattr(bentocloud.BentoCloud, "find", overtaken)
    with pytest.raises(RolloutError, match=r"meanwhile cloud-fare:1-.* was asked for, not by this task"):
        deploy("2", run="overtaken")
    assert cloud.deployments[NAME]["revisions"] == 3


def test_a_task_that_is_killed_puts_back_what_served(
    cloud: FakeCloud, deploy: Any, bentos: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy("1")

    def die(seconds: float) -> None:
        raise SystemExit("killed")

    with monkeypatch.context() as patched:
        patched.setattr(rollout, "time", SimpleNamespace(sleep=die, monotonic=time.monotonic))
        with pytest.raises(SystemExit):
            deploy("2", run="killed")
    (target,) = cloud.deployments[NAME]["latest_revision"]["targets"]
    assert f"{target['bento']['repository']['name']}:{target['bento']['version']}" == bentos["1"]["tag"]
    assert answer(cloud) == ("1", pytest.approx(2.0, abs=0.6))


def test_the_attempt_after_a_lost_one_goes_on_with_its_deployment(
    cloud: FakeCloud, deploy: Any, bentos: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    cloud.fates[bentos["1"]["tag"]] = "deploying"
    script = (
        "import json, sys; from types import SimpleNamespace as N\n"
        "from airflow_mlops.operators.deploy_to_bentocloud import DeployToBentoCloudOperator as O\n"
        "task = O(task_id='deploy', bento=json.loads(sys.argv[1]), settings={'ready_seconds': 60.0}, poll_seconds=0.2)\n"
        "task.execute({'ti': N(dag_id='a_dag', run_id='a_run', task_id='deploy')})\n"
    )
    with (tmp_path / "lost.log").open("wb") as output:
        command = [sys.executable, "-c", script, json.dumps(bentos["1"])]
        lost = subprocess.Popen(command, env=dict(os.environ), stdout=output, stderr=subprocess.STDOUT)
    try:
        assert wait_until(lambda: NAME in cloud.deployments, timeout_seconds=90), (
            tmp_path / "lost.log"
        ).read_text()
    finally:
        lost.kill()
        lost.wait()
    made = cloud.deployments[NAME]["latest_revision"]["uid"]
    stuck = threading.Timer(1.0, lambda: cloud.release(NAME))
    stuck.start()
    result = deploy("1")
    stuck.join()
    assert (result["revision"], result["started"], result["state"]) == (made, False, "serving")
    assert (list(cloud.deployments), cloud.deployments[NAME]["revisions"]) == ([NAME], 1)
    assert [path for method, path in cloud.asked if method == "POST"].count("/api/v2/deployments") == 1
    assert answer(cloud) == ("1", pytest.approx(2.0, abs=0.6))


def test_what_stands_in_the_way_is_said_before_anything_changes(
    cloud: FakeCloud,
    deploy: Any,
    bentos: dict[str, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ValueError, match="settings can't say size, tag"):
        deploy("1", size=3, tag="another:1")
    with pytest.raises(ValueError, match="from 3 to 2 replicas"):
        deploy("1", minimum=3)
    connect(cloud, "an-old-token", monkeypatch)
    with pytest.raises(
        ConnectionConfigError, match="does not take the token of connection 'bentocloud_default'"
    ):
        deploy("1")
    assert BentoCloudHook().test_connection()[0] is False
    connect(cloud, API_TOKEN, monkeypatch)
    assert BentoCloudHook().test_connection() == (True, "BentoCloud knows the token")
    damaged = tmp_path / "damaged.tar"
    damaged.write_bytes(Path(bentos["1"]["path"]).read_bytes().replace(b"known_rows", b"known_lies"))
    monkeypatch.setitem(bentos, "1", bentos["1"] | {"path": str(damaged)})
    with pytest.raises(ArtifactIntegrityError, match="is not the Bento that was built"):
        deploy("1")
    assert (cloud.bentos, cloud.secrets, cloud.deployments) == ({}, {}, {})


def test_a_deployment_of_something_else_is_left_alone(cloud: FakeCloud, deploy: Any) -> None:
    deploy("1", ready_seconds=60.0)
    (target,) = cloud.deployments[NAME]["latest_revision"]["targets"]
    target["bento"]["repository"]["name"] = "somebody-elses"
    with pytest.raises(
        RolloutError, match=r"serves somebody-elses:.*no Bento of model 'cloud-fare'.*Nothing was changed"
    ):
        deploy("2")
    assert cloud.deployments[NAME]["revisions"] == 1


def test_a_connection_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CONNECTION, json.dumps({"conn_type": "bentocloud"}))
    with pytest.raises(ConnectionConfigError, match=r"Host, Password \(API token\) empty"):
        BentoCloudHook().get_conn()
    monkeypatch.setenv(
        CONNECTION, json.dumps({"conn_type": "bentocloud", "host": "team.example", "password": "p"})
    )
    cloud = BentoCloudHook().get_conn()
    assert str(cloud._client.client.session.base_url) == "https://team.example"
    cloud.close()
