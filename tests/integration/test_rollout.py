"""Rollouts on a real service under real traffic: canary, shadow, blue-green, A/B, and whatever can go wrong in between."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest

from airflow_mlops.core.canary import CanaryPolicy
from airflow_mlops.core.desired_state import ServedVersion
from airflow_mlops.core.rollout import RolloutPlan, plan_rollout
from airflow_mlops.exceptions import RolloutError
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.bentoml import EndpointClient, LocalServer
from airflow_mlops.ledger import EntryKind, Ledger
from airflow_mlops.serving.local import LocalEndpoint, deploy_package
from airflow_mlops.steps.rollout import Progress, QualitySpec, Rollout, RolloutSpec
from tests.packages import build_package
from tests.ports import free_port

pytestmark = pytest.mark.integration

POLICY = CanaryPolicy(minimum_requests=100)


class Traffic:
    """Ask the service from a few threads, all the time; note who answered and what failed."""

    def __init__(self, url: str, threads: int = 3) -> None:
        self.url = url
        self.answered: Counter[str] = Counter()
        self.of_key: dict[str, set[str]] = {}
        self.ids: list[tuple[str, float]] = []
        self.failures: list[str] = []
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(seed,)) for seed in range(threads)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=30)

    def _ask(self, seed: int) -> None:
        rng = random.Random(seed)
        with EndpointClient(self.url, "token") as client:
            while not self._stopped.is_set():
                x = rng.uniform(0.0, 2.0)
                key = f"caller {rng.randrange(1_000)}"
                try:
                    got = client.predict([{"x": x, "kind": "a"}], sticky_key=key)
                except Exception as err:  # noqa: BLE001 - whatever it is, it is a failed request
                    self.failures.append(str(err))
                    continue
                self.answered[got["model_version"]] += 1
                self.of_key.setdefault(key, set()).add(got["model_version"])
                self.ids.append((got["prediction_ids"][0], x))


class Stage:
    """A service, a ledger, and packages of versions: 1 and 2 alike, 3 quite another model."""

    def __init__(self, folder: Path, packages: dict[str, tuple[Path, str]], port: int) -> None:
        self.folder, self.packages = folder, packages
        self.ledger_url = f"sqlite:///{folder}/ledger.db"
        self.server = LocalServer(folder / "serving", port=port, token="token")
        self.endpoint = LocalEndpoint(self.server, timeout_seconds=60)

    def version(self, name: str) -> ServedVersion:
        return ServedVersion(model_version=name, package_digest=self.packages[name][1])

    def deploy(self, name: str) -> None:
        deploy_package(self.endpoint, self.packages[name][0], "m", self.version(name))

    def advance(self, name: str, plan: RolloutPlan, rollout: str = "dag/run/deploy", **spec: Any) -> Progress:
        how = RolloutSpec(**{"name": rollout, "plan": plan, "policy": POLICY, "actor": "test", **spec})
        with Ledger.open(self.ledger_url) as ledger:
            carried_out = Rollout(
                how,
                self.endpoint,
                ledger,
                model_name="m",
                new=self.version(name),
                fetch=lambda: self.packages[name][0],
            )
            return carried_out.advance()

    def roll_out(self, name: str, plan: RolloutPlan, **spec: Any) -> Progress:
        while (progress := self.advance(name, plan, **spec)).wait_seconds is not None:
            time.sleep(min(progress.wait_seconds, 5.0))
        return progress

    def told(self) -> list[str]:
        with Ledger.open(self.ledger_url) as ledger:
            found = ledger.entries(kind=EntryKind.ROLLOUT, newest_first=False)
        return [entry.payload["event"]["what"] for entry in found]

    def last(self) -> dict[str, Any]:
        with Ledger.open(self.ledger_url) as ledger:
            return ledger.entries(kind=EntryKind.ROLLOUT, limit=1)[0].payload["event"]

    def serving(self) -> set[str]:
        with EndpointClient(self.server.url, "token") as client:
            asked = [{"x": 1.0, "kind": "a"}]
            return {client.predict(asked)["model_version"] for _ in range(30)}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    root = tmp_path_factory.mktemp("packages")
    slopes = {"1": 2.0, "2": 2.1, "3": 50.0}
    return {
        version: (root / version, build_package(root / version, slope=slope))
        for version, slope in slopes.items()
    }


@pytest.fixture
def stage(tmp_path: Path, packages: dict[str, tuple[Path, str]]) -> Iterator[Stage]:
    made = Stage(tmp_path, packages, free_port())
    made.deploy("1")
    yield made
    made.server.stop()


def canary(seconds: float = 3.0, *shares: float) -> RolloutPlan:
    return plan_rollout("canary", shares=shares or (0.2, 0.5), seconds=seconds, looks=2, patience=3.0)


def test_a_canary_that_is_as_good_goes_through(stage: Stage) -> None:
    with Traffic(stage.server.url) as traffic:
        progress = stage.roll_out("2", canary())
    assert progress.state.status == "finished", progress.state.reason
    assert traffic.failures == []
    assert stage.serving() == {"2"}
    assert progress.desired.previous_version == "1"
    assert [what for what in stage.told() if what != "looked"] == ["entered", "entered", "finished"]
    assert traffic.answered["2"] > 100


def test_a_canary_that_answers_nonsense_is_rolled_back(stage: Stage) -> None:
    with Traffic(stage.server.url) as traffic:
        progress = stage.roll_out("3", canary())
    assert progress.state.status == "rolled_back"
    assert "answers of both versions are" in progress.state.reason
    assert traffic.failures == []
    assert stage.serving() == {"1"}


def test_a_shadow_answers_unseen_and_is_compared(stage: Stage) -> None:
    plan = plan_rollout("shadow", seconds=3.0, looks=2)
    with Traffic(stage.server.url) as traffic:
        progress = stage.roll_out("2", plan)
        assert traffic.answered.keys() == {"1"}
        worse = stage.roll_out("3", plan)
    assert progress.state.status == "finished", progress.state.reason
    assert worse.state.status == "rolled_back"
    assert traffic.failures == []
    assert traffic.answered.keys() == {"1"} == stage.serving()


def test_blue_green_serves_the_new_one_and_keeps_the_old_one_warm(stage: Stage) -> None:
    plan = plan_rollout("blue_green", seconds=3.0, looks=2)
    with Traffic(stage.server.url) as traffic:
        assert stage.advance("2", plan).wait_seconds
        assert stage.serving() == {"2"}
        assert stage.roll_out("2", plan).state.status == "finished"
        assert stage.roll_out("3", plan).state.status == "rolled_back"
    assert traffic.failures == []
    assert stage.serving() == {"2"}


@pytest.mark.parametrize(("truth", "wins"), [(3.0, True), (1.0, False)])
def test_an_ab_test_is_decided_by_labels(stage: Stage, truth: float, wins: bool) -> None:
    labels = str(stage.folder / "labels")
    plan = plan_rollout("ab", shares=[0.4], seconds=4.0, looks=1, patience=5.0)
    quality = QualitySpec(labels=labels, id_column="id", target="y", metric="mae")
    with Traffic(stage.server.url) as traffic:
        progress = stage.advance("2", plan, quality=quality)
        time.sleep(3.0)
        known = list(traffic.ids)
        told = pl.DataFrame({"id": [one for one, _ in known], "y": [truth * x for _, x in known]})
        delta.replace_window(
            labels, told.with_columns(t=pl.lit("2024-01-01").str.to_datetime()), time_column="t", window=None
        )
        progress = stage.roll_out("2", plan, quality=quality)
    assert progress.state.status == ("finished" if wins else "rolled_back"), progress.state.reason
    assert stage.serving() == {"2" if wins else "1"}
    torn = [key for key, versions in traffic.of_key.items() if len(versions) > 1]
    # Before and after the test all callers have the same version, so a caller has seen at most one other than the last.
    assert all(versions <= {"1", "2"} for versions in traffic.of_key.values()), torn


def test_callers_stay_with_their_version(stage: Stage) -> None:
    stage.advance("2", plan_rollout("ab", shares=[0.4], seconds=60.0))
    with Traffic(stage.server.url) as traffic:
        time.sleep(2.0)
    assert len(traffic.of_key) > 100
    assert all(len(versions) == 1 for versions in traffic.of_key.values())
    assert set(traffic.answered) == {"1", "2"}


def test_without_traffic_nothing_passes(stage: Stage) -> None:
    progress = stage.roll_out("2", plan_rollout("canary", shares=[0.5], seconds=0.5, patience=2.0))
    assert progress.state.status == "rolled_back"
    assert "not enough to judge it by" in progress.state.reason
    assert stage.serving() == {"1"}


def test_when_nobody_steers_the_stable_version_answers(stage: Stage) -> None:
    plan = canary(30.0, 0.5)
    assert stage.advance("2", plan, lease_seconds=1.5).wait_seconds
    assert stage.serving() == {"1", "2"}
    time.sleep(2.0)
    assert stage.serving() == {"1"}
    with EndpointClient(stage.server.url, "token") as client:
        assert "nobody steers" in client.ready()["error"]
        with pytest.raises(ValueError, match="ran out"):
            client.renew_lease(2, 60.0)
    # Whoever comes again with the same rollout begins the phase anew.
    assert stage.advance("2", plan).wait_seconds
    assert stage.serving() == {"1", "2"}
    assert stage.told() == ["entered", "entered"]


def test_one_rollout_at_a_time(stage: Stage) -> None:
    stage.advance("2", canary(30.0, 0.5))
    with pytest.raises(RolloutError, match="a rollout of version 2 is under way"):
        stage.advance("3", canary(30.0, 0.5), rollout="another/run/deploy")
    with pytest.raises(RolloutError, match="a rollout of version 2 is under way"):
        stage.deploy("3")
    assert stage.serving() == {"1", "2"}


def test_a_rollout_can_be_ended(stage: Stage) -> None:
    stage.advance("2", canary(30.0, 0.5))
    progress = stage.advance("2", canary(30.0, 0.5), abort="the task was killed")
    assert progress.state.status == "rolled_back"
    assert stage.last()["reason"] == "the task was killed"
    assert stage.serving() == {"1"}
    stage.advance("2", canary(30.0, 0.5), abort="again")  # changes nothing
    assert stage.told() == ["entered", "rolled_back"]


def test_a_rollback_that_is_not_confirmed_stands(stage: Stage) -> None:
    stage.advance("2", canary(60.0, 0.5))
    running = stage.server.running()
    assert running is not None
    family = psutil.Process(running.pid).children(recursive=True)
    for process in family:
        process.suspend()
    try:
        stage.endpoint.timeout_seconds = 2
        progress = stage.advance("2", canary(60.0, 0.5), abort="the task was killed")
    finally:
        for process in family:
            process.resume()
    assert progress.state.status == "rolled_back"
    assert progress.restore_seconds is None
    desired = stage.endpoint.desired()
    assert desired is not None
    assert [(one.model_version, one.share) for one in desired.versions] == [("1", 1.0)]
    deadline = time.monotonic() + 20
    while stage.serving() != {"1"} and time.monotonic() < deadline:
        time.sleep(0.2)
    assert stage.serving() == {"1"}


def test_what_passed_and_was_undone_can_be_done_again(stage: Stage) -> None:
    with Traffic(stage.server.url):
        assert stage.roll_out("2", canary(1.0, 0.5)).state.status == "finished"
        stage.deploy("1")
        assert stage.serving() == {"1"}
        assert stage.roll_out("2", canary(1.0, 0.5)).state.status == "finished"
    assert stage.serving() == {"2"}
    assert stage.told().count("finished") == 2


def test_nothing_to_compare_with_is_no_shadow(tmp_path: Path, packages: dict[str, tuple[Path, str]]) -> None:
    stage = Stage(tmp_path, packages, free_port())
    with pytest.raises(RolloutError, match="serves nothing that version 2 could be compared with"):
        stage.advance("2", plan_rollout("shadow"))
    assert stage.server.running() is None


STEERER = """
import json, sys, time
from tests.integration.test_rollout import Stage, canary
from pathlib import Path
folder, port, packages = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
stage = Stage(Path(folder), {name: (Path(path), digest) for name, (path, digest) in packages.items()}, port)
plan = canary(2.0, 0.2, 0.5)
while (progress := stage.advance("2", plan, lease_seconds=3.0)).wait_seconds is not None:
    time.sleep(min(progress.wait_seconds, 0.5))
"""


def steerer(stage: Stage) -> subprocess.Popen[bytes]:
    packages = {name: (str(path), digest) for name, (path, digest) in stage.packages.items()}
    command = [sys.executable, "-c", STEERER, str(stage.folder), str(stage.server.port), json.dumps(packages)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2])


def test_killed_at_any_moment_it_goes_on_or_goes_back(stage: Stage) -> None:
    """Kill whoever steers, at six moments; every request is answered, by the old version or the new one, and it ends well."""
    with Traffic(stage.server.url, threads=2) as traffic:
        for delay in (0.9, 1.3, 1.7, 2.4, 3.1, 3.8):
            process = steerer(stage)
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            process.wait(timeout=10)
            assert traffic.failures == []
        last = steerer(stage)
        assert last.wait(timeout=90) == 0
    assert traffic.failures == []
    assert stage.serving() == {"2"}
    told = stage.told()
    assert told.count("finished") == 1
    assert "rolled_back" not in told


def test_a_worker_that_dies_comes_back_in_the_middle(stage: Stage) -> None:
    stage.advance("2", canary(60.0, 0.5))
    running = stage.server.running()
    assert running is not None
    workers = [
        child
        for child in psutil.Process(running.pid).children(recursive=True)
        if child.name().startswith("python") and len(child.net_connections("inet")) > 0
    ]
    assert workers, [child.cmdline() for child in psutil.Process(running.pid).children(recursive=True)]
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            found = stage.serving()
            break
        except Exception:  # noqa: BLE001 - it is coming
            time.sleep(0.3)
    assert found == {"1", "2"}
