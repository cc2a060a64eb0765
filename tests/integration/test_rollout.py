"""Rollouts on a real service under real traffic: canary, shadow, blue-green, A/B, and whatever can go wrong in between."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import polars as pl
import psutil
import pytest

from airflow_mlops.core.codec import from_dict
from airflow_mlops.core.rollouts.canary import CanaryPolicy
from airflow_mlops.core.rollouts.desired_state import ServedVersion
from airflow_mlops.core.rollouts.observations import Observations
from airflow_mlops.core.rollouts.rollout import RolloutPlan, plan_rollout
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    ArtifactIntegrityError,
    ConnectionConfigError,
    LedgerUnavailableError,
    RegistryUnavailableError,
    RolloutError,
    RolloutInterruptedError,
    VersionRefusedError,
)
from airflow_mlops.integrations import delta
from airflow_mlops.integrations.bentoml import STEERING_FILE, EndpointClient, LocalServer, wait_until
from airflow_mlops.integrations.mlflow import Registry
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.services import Services
from airflow_mlops.serving.inference_log import read_received_since
from airflow_mlops.serving.local import LocalEndpoint, deploy_package
from airflow_mlops.serving.log_rows import FEATURE_PREFIX
from airflow_mlops.serving.log_settings import LOG_FOLDER, SETTINGS_FILE
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.rollouts.quality import QualitySpec
from airflow_mlops.steps.rollouts.rollout import Rollout
from airflow_mlops.steps.rollouts.spec import Progress, RolloutSpec
from tests.packages import build_package, build_unimportable, register
from tests.ports import free_port

pytestmark = pytest.mark.integration

POLICY = CanaryPolicy(minimum_requests=100)


class Traffic:
    """Ask the service from a few threads, all the time; note who answered and what failed."""

    def __init__(self, url: str, threads: int = 3, more: Mapping[str, float] | None = None) -> None:
        self.url, self.more = url, more or {}
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
                    got = client.predict([{"x": x, "kind": "a", **self.more}], sticky_key=key)
                except Exception as err:  # noqa: BLE001 - whatever it is, it is a failed request
                    self.failures.append(str(err))
                    continue
                self.answered[got["model_version"]] += 1
                self.of_key.setdefault(key, set()).add(got["model_version"])
                self.ids.append((got["prediction_ids"][0], x))


class Stage:
    """A service, a ledger, and packages of versions: 1 and 2 alike, 3 quite another model, 4 to 6 with error models of their own."""

    def __init__(self, folder: Path, packages: dict[str, tuple[Path, str]], port: int) -> None:
        self.folder, self.packages = folder, packages
        self.ledger_url = f"sqlite:///{folder}/ledger.db"
        self.server = LocalServer(folder / "serving", port=port, token="token")
        self.endpoint = LocalEndpoint(self.server, timeout_seconds=60)

    def version(self, name: str) -> ServedVersion:
        return ServedVersion(model_version=name, package_digest=self.packages[name][1])

    def deploy(self, name: str) -> None:
        deploy_package(self.endpoint, self.packages[name][0], "m", self.version(name))

    def advance(
        self,
        name: str,
        plan: RolloutPlan,
        rollout: str = "dag/run/deploy",
        fetch: Callable[[], Path] | None = None,
        **spec: Any,
    ) -> Progress:
        how = RolloutSpec(**{"name": rollout, "plan": plan, "policy": POLICY, "actor": "test", **spec})
        with Ledger.open(self.ledger_url) as ledger:
            carried_out = Rollout(
                how,
                self.endpoint,
                ledger,
                model_name="m",
                new=self.version(name),
                fetch=fetch or (lambda: self.packages[name][0]),
            )
            return carried_out.advance()

    def roll_out(self, name: str, plan: RolloutPlan, **spec: Any) -> Progress:
        while (progress := self.advance(name, plan, **spec)).wait_seconds is not None:
            time.sleep(min(progress.wait_seconds, 5.0))
        return progress

    def told(self, rollout: str = "") -> list[str]:
        with Ledger.open(self.ledger_url) as ledger:
            found = ledger.entries(kind=EntryKind.ROLLOUT, newest_first=False)
        return [
            entry.payload["event"]["what"] for entry in found if entry.payload["rollout"].startswith(rollout)
        ]

    def last(self) -> dict[str, Any]:
        with Ledger.open(self.ledger_url) as ledger:
            return ledger.entries(kind=EntryKind.ROLLOUT, limit=1)[0].payload["event"]

    def summary(self) -> str:
        with Ledger.open(self.ledger_url) as ledger:
            return ledger.entries(kind=EntryKind.ROLLOUT, limit=1)[0].summary

    def findings(self, rollout: str = "") -> dict[str, dict[str, Any]]:
        """What the last look at a rollout found."""
        with Ledger.open(self.ledger_url) as ledger:
            entries = ledger.entries(kind=EntryKind.ROLLOUT)
        looked = [
            entry.payload["event"]["analysis"]
            for entry in entries
            if entry.payload["rollout"].startswith(rollout)
        ]
        return {one["metric"]: one for one in next(found for found in looked if found)["findings"]}

    def serving(self) -> set[str]:
        with EndpointClient(self.server.url, "token") as client:
            asked = [{"x": 1.0, "kind": "a"}]
            return {client.predict(asked)["model_version"] for _ in range(30)}


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    root = tmp_path_factory.mktemp("packages")
    made: dict[str, dict[str, float]] = {
        "1": {"slope": 2.0},
        "2": {"slope": 2.1},
        "3": {"slope": 50.0},
        "4": {"slope": 2.0, "held_out_error": 0.5},
        "5": {"slope": 2.1, "held_out_error": 0.5},
        "6": {"slope": 2.1, "held_out_error": 5.0},
    }
    return {version: (root / version, build_package(root / version, **how)) for version, how in made.items()}


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


#: Rolls out version 3 as one try of a task does, and dies where what a look decided has been done.
JUDGED = """
import json, os, signal, sys
from pathlib import Path
from airflow_mlops.steps.rollouts.history import RolloutHistory
from tests.integration.test_rollout import Stage, canary

folder, port, packages = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
write = RolloutHistory.write

def die(history, what, **how):
    write(history, what, **how)
    if what == "rolled_back":
        os.kill(os.getpid(), signal.SIGKILL)

RolloutHistory.write = die
stage = Stage(Path(folder), {name: (Path(path), digest) for name, (path, digest) in packages.items()}, port)
stage.roll_out("3", canary(), request="until try 3")
"""


def test_what_a_look_took_back_is_not_tried_again_by_a_retry(stage: Stage) -> None:
    packages = {name: (str(path), digest) for name, (path, digest) in stage.packages.items()}
    command = [sys.executable, "-c", JUDGED, str(stage.folder), str(stage.server.port), json.dumps(packages)]
    with Traffic(stage.server.url) as traffic:
        done = subprocess.run(command, cwd=Path(__file__).parents[2], timeout=60)
        assert done.returncode == -signal.SIGKILL
        assert stage.told()[-1] == "rolled_back"
        told, answered = stage.told(), traffic.answered["3"]
        for _ in range(2):
            retried = stage.advance("3", canary(), request="until try 3")
            assert (retried.state.status, retried.wait_seconds) == ("rolled_back", None)
            assert retried.worse
        assert (stage.told(), traffic.answered["3"], stage.serving()) == (told, answered, {"1"})
        # Whoever clears the task wants it tried again.
        assert stage.advance("3", canary(), request="until try 6").wait_seconds
        stage.advance("3", canary(), request="until try 6", abort="the task was killed")
        # A try that was killed has judged nothing.
        assert stage.advance("3", canary(), request="until try 6").wait_seconds
    assert traffic.failures == []


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
        good, bad = (stage.roll_out(version, plan).state for version in "23")
        assert (good.status, bad.status) == ("finished", "rolled_back"), (good.reason, bad.reason)
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


@pytest.mark.parametrize(
    ("strategy", "truth", "passes"),
    [("shadow", 3.0, True), ("shadow", 1.0, False), ("blue_green", 1.0, False)],
)
def test_a_mirror_is_held_against_labels(stage: Stage, strategy: Any, truth: float, passes: bool) -> None:
    """Versions 1 and 2 answer nearly alike, so nothing but labels tells which one is right."""
    labels = str(stage.folder / "labels")
    plan = plan_rollout(strategy, seconds=4.0, looks=1, patience=5.0)
    quality = QualitySpec(labels=labels, id_column="id", target="y", metric="mae")
    with Traffic(stage.server.url) as traffic:
        stage.advance("2", plan, quality=quality)
        time.sleep(3.0)
        told = pl.DataFrame({"id": [one for one, _ in traffic.ids], "y": [truth * x for _, x in traffic.ids]})
        delta.replace_window(
            labels, told.with_columns(t=pl.lit("2024-01-01").str.to_datetime()), time_column="t", window=None
        )
        progress = stage.roll_out("2", plan, quality=quality)
    assert traffic.failures == []
    assert progress.state.status == ("finished" if passes else "rolled_back"), progress.state.reason
    found = stage.findings()["quality"]
    assert found["judgement"] == ("fine" if passes else "worse")
    assert "on the same" in found["sentence"]
    assert (found["better_p_value"] < 0.001) is passes


def test_an_estimate_stops_what_is_plainly_worse(stage: Stage) -> None:
    """Version 6 answers like version 5, in as short a time, and no label comes: only its error model knows."""
    stage.deploy("4")
    plan = canary(3.0, 0.5)
    with Traffic(stage.server.url) as traffic:
        worse = stage.roll_out("6", plan, rollout="dag/worse/deploy")
        assert stage.serving() == {"4"}
        alike = stage.roll_out("5", plan, rollout="dag/alike/deploy")
        assert stage.serving() == {"5"}
        stage.deploy("4")
        with Ledger.open(stage.ledger_url) as ledger:
            for day in range(1, 6):  # the estimates of version 4 are known to be wrong
                ledger.record(check_of("4", day, realized=9.0, estimated=0.5))
        unheard = stage.roll_out("6", plan, rollout="dag/unheard/deploy")
    assert traffic.failures == []
    assert (worse.state.status, alike.state.status, unheard.state.status) == (
        "rolled_back",
        "finished",
        "finished",
    )
    assert worse.state.reason.startswith(
        "without labels, the new version's mean loss (mae) is estimated to be"
    )
    assert worse.worse == ("estimate",)
    assert stage.findings("dag/alike/deploy")["estimate"]["judgement"] == "fine"
    assert "estimate" not in stage.findings("dag/unheard/deploy")


def check_of(version: str, day: int, *, realized: float, estimated: float) -> LedgerEntry:
    window = Window(start=datetime(2024, 1, day, tzinfo=UTC), end=datetime(2024, 1, day + 1, tzinfo=UTC))
    payload = {
        "model_version": version,
        "metric": "mae",
        "measured": True,
        "degraded": False,
        "value": realized,
        "estimated_value": estimated,
        "estimate_interval": [estimated - 0.1, estimated + 0.1],
    }
    return LedgerEntry(
        kind=EntryKind.PERFORMANCE_CHECK, key=f"m|{window.key}", model_name="m", window=window, subject=version,
        summary="for a test", payload=payload, actor="test", recorded_at=datetime(2024, 2, 1, tzinfo=UTC),
    )  # fmt: skip


def test_callers_stay_with_their_version(stage: Stage) -> None:
    stage.advance("2", plan_rollout("ab", shares=[0.4], seconds=60.0))
    with Traffic(stage.server.url) as traffic:
        time.sleep(2.0)
    assert len(traffic.of_key) > 100
    assert all(len(versions) == 1 for versions in traffic.of_key.values())
    assert set(traffic.answered) == {"1", "2"}


def test_a_caller_of_two_workers_counts_once(
    tmp_path: Path, packages: dict[str, tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIRFLOW_MLOPS_SERVICE_WORKERS", "2")
    stage = Stage(tmp_path, packages, free_port())
    try:
        stage.deploy("1")
        assert stage.advance("2", plan_rollout("ab", shares=[0.4], seconds=60.0)).wait_seconds
        with Traffic(stage.server.url, threads=16) as traffic:
            deadline = time.monotonic() + 60
            while sum(traffic.answered.values()) < 2_000 and time.monotonic() < deadline:
                time.sleep(0.1)
        observed = stage.server.serving_dir / "observed"
        (key,) = observed.glob("*.key")
        asked = Counter(next(iter(versions)) for versions in traffic.of_key.values())

        def told() -> Observations:
            with stage.endpoint.client() as client:
                return from_dict(Observations, client.rollout())

        def complete() -> bool:
            return sum(told().of(version).requests for version in "12") >= sum(traffic.answered.values())

        assert wait_until(complete, timeout_seconds=30)
        seen = told()
        assert {version: seen.of_callers(version).requests for version in "12"} == asked
        files = [from_dict(Observations, json.loads(path.read_text())) for path in observed.glob("*.json")]
        assert len(files) == 2
        both = sum(part.of_callers(version).requests for part in files for version in "12")
        assert both > len(traffic.of_key)  # some were answered by both workers

        def logged() -> int:
            parts = [pl.read_parquet(path) for path in stage.server.serving_dir.rglob("part-*.parquet")]
            return pl.concat(parts, how="vertical_relaxed")["caller"].drop_nulls().n_unique()

        assert wait_until(lambda: logged() == len(traffic.of_key), timeout_seconds=30)
        stage.advance("2", canary(30.0, 0.5), abort="the test is over")
        assert wait_until(lambda: not key.exists(), timeout_seconds=30)
    finally:
        stage.server.stop()


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
    with stage.endpoint.client() as client:
        assert "nobody steers" in client.ready()["error"]
        with pytest.raises(ValueError, match="ran out"):
            client.renew_lease(2, 60.0)
    # Whoever comes again with the same rollout begins the phase anew.
    assert stage.advance("2", plan).wait_seconds
    assert stage.serving() == {"1", "2"}
    assert stage.told() == ["entered", "entered"]


def test_whoever_may_ask_may_not_steer(stage: Stage) -> None:
    stage.advance("2", canary(30.0, 0.5))
    with EndpointClient(stage.server.url, "token", steering_token="token") as caller:
        with pytest.raises(ConnectionConfigError, match=r"\(403\): this token asks for predictions"):
            caller.renew_lease(2, 0.0)
        with pytest.raises(ConnectionConfigError, match="steering_token"):
            caller.rollout()
    assert stage.serving() == {"1", "2"}
    token = stage.server.serving_dir / STEERING_FILE
    assert token.stat().st_mode & 0o777 == 0o600
    token.write_text("not what the service was started with")
    # Whoever steers with a wrong token does not begin anew for ever: the old version serves, and the ledger says why.
    with pytest.raises(ConnectionConfigError, match=r"\(401\): the steering token is missing or wrong"):
        stage.advance("2", canary(30.0, 0.5))
    assert stage.serving() == {"1"}
    assert "steering token is missing or wrong" in stage.last()["reason"]


def test_a_rollout_begins_with_the_tokens_of_today(stage: Stage) -> None:
    before = stage.server.running()
    stage.server.steering_token = "today yesterday"  # noqa: S105 - of a test
    assert stage.advance("2", canary(30.0, 0.5)).wait_seconds
    stage.server.steering_token = "yesterday"  # noqa: S105 - of a test
    assert stage.advance("2", canary(30.0, 0.5)).wait_seconds
    assert stage.server.running() == before


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
    assert stage.told() == ["entered", "stopping", "rolled_back"]


ENDED = """
import json, os, signal, sys
from pathlib import Path
from airflow_mlops.serving import local
from airflow_mlops.steps.base import run_step
from airflow_mlops.steps.rollouts.history import RolloutHistory
from tests.integration.test_rollout import Stage, canary

folder, port, packages, name, when, of, what = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), *sys.argv[4:8]
owner = {"RolloutHistory": RolloutHistory, "local": local}[of]
does = getattr(owner, what)

def die(*args, **how):
    if what == "write" and args[1] != when.split()[1]:
        return does(*args, **how)
    if when.startswith("after"):
        does(*args, **how)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, what, die)
stage = Stage(Path(folder), {name: (Path(path), digest) for name, (path, digest) in packages.items()}, port)
stage.advance("2", canary(60.0, 0.5), rollout=name, abort="the task was killed")
"""


POINTS = [
    ("before stopping", "RolloutHistory", "write"),
    ("after stopping", "RolloutHistory", "write"),
    ("before", "local", "end_lease"),
    ("after", "local", "end_lease"),
    ("before", "local", "write_whole"),
    ("after", "local", "write_whole"),
    ("after", "local", "_wait_until_live"),
    ("before rolled_back", "RolloutHistory", "write"),
    ("after rolled_back", "RolloutHistory", "write"),
]


def test_what_was_to_end_ends_wherever_it_was_killed(stage: Stage) -> None:
    """Kill whoever ends a rollout between any two things he does; who comes next, by the same name, does the rest."""
    packages = {name: (str(path), digest) for name, (path, digest) in stage.packages.items()}
    command = [sys.executable, "-c", ENDED, str(stage.folder), str(stage.server.port), json.dumps(packages)]
    with Traffic(stage.server.url, threads=1) as traffic:
        for point in POINTS:
            name, plan = f"dag/{point}/deploy", canary(60.0, 0.5)
            stage.advance("2", plan, rollout=name)
            done = subprocess.run([*command, name, *point], cwd=Path(__file__).parents[2], timeout=60)
            assert done.returncode == -signal.SIGKILL, point
            if (
                point[0] == "before stopping"
            ):  # nobody knows of it: the lease ends it, or whoever comes next goes on
                assert stage.told(name) == ["entered"]
                assert stage.advance("2", plan, rollout=name).wait_seconds
                stage.advance("2", plan, rollout=name, abort="the task was killed")
            elif point[0] != "after rolled_back":
                assert stage.told(name) == ["entered", "stopping"], point
                assert stage.advance("2", plan, rollout=name).state.status == "rolled_back"
            assert stage.told(name) == ["entered", "stopping", "rolled_back"], point
            assert stage.last()["reason"] == "the task was killed"
            assert stage.serving() == {"1"}, point
    assert traffic.failures == []


def test_a_ledger_that_is_down_keeps_no_version_in_service(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.advance("2", canary(60.0, 0.5))

    def down(*args: object) -> None:
        raise LedgerUnavailableError("the ledger is down")

    with monkeypatch.context() as broken:
        broken.setattr(Ledger, "record", down)
        with pytest.raises(LedgerUnavailableError):
            stage.advance("2", canary(60.0, 0.5), abort="the task was killed")
    assert stage.serving() == {"1"}
    assert stage.advance("2", canary(60.0, 0.5), abort="once more").state.status == "rolled_back"


def test_a_rollback_that_is_not_confirmed_stands(stage: Stage) -> None:
    stage.deploy("4")  # now the one before, which is not loaded
    stage.deploy("1")
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
    assert "serves on" not in stage.summary()
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


def test_a_retry_does_not_replace_what_was_deployed_meanwhile(stage: Stage) -> None:
    """The task was killed and its lease ran out; another one deployed a version, and then the first comes back."""
    stage.advance("2", canary(60.0, 0.5), request="until try 3", lease_seconds=0.5)
    time.sleep(1.0)
    stage.deploy("4")
    retried = stage.advance("2", canary(60.0, 0.5), request="until try 3")
    assert (retried.state.status, retried.wait_seconds) == ("rolled_back", None)
    assert retried.state.reason == "version 4 was deployed meanwhile, and serves"
    assert (stage.told(), stage.serving()) == (["entered", "rolled_back"], {"4"})
    # Whoever clears the task wants it all the same.
    assert stage.advance("2", canary(60.0, 0.5), request="until try 6").wait_seconds
    assert stage.serving() == {"2", "4"}


def test_a_first_version_in_a_folder_that_was_emptied(
    tmp_path: Path, packages: dict[str, tuple[Path, str]]
) -> None:
    stage = Stage(tmp_path, packages, free_port())
    try:
        assert stage.advance("2", canary()).state.status == "finished"
        stage.server.stop()
        shutil.rmtree(stage.server.serving_dir)
        again = stage.advance("2", canary())
        assert (again.state.status, again.started, stage.serving()) == ("finished", True, {"2"})
        assert stage.told() == ["finished", "finished"]
        assert stage.advance("2", canary()).state.status == "finished"  # it serves already
        assert stage.told() == ["finished", "finished"]
    finally:
        stage.server.stop()


#: Ends the process of a service on one input, as a fault in a library does, or whoever needs the memory.
_FATAL = """
import os
import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin

class Fatal(RegressorMixin, BaseEstimator):
    def fit(self, features, target):
        self.fitted_ = True
        return self

    def predict(self, features):
        x = np.asarray(features)[:, 0].astype(float)
        if "AIRFLOW_MLOPS_TOKEN_FILE" in os.environ and (x > 3.0).any():  # standardized: x is above 18
            os._exit(139)
        return 2.0 * (x * 2.894 + 5.0)
"""


def test_a_log_of_its_own_begins_with_a_deployment_that_passes(stage: Stage) -> None:
    """Until then the service writes where it did, and readers look there."""
    endpoint, settings = (
        LocalEndpoint(stage.server, own_log=True),
        stage.server.serving_dir / LOG_FOLDER / SETTINGS_FILE,
    )
    unknown = ServedVersion(model_version="2", package_digest=f"sha256:{'0' * 64}")
    with pytest.raises(ArtifactIntegrityError):
        deploy_package(endpoint, stage.packages["2"][0], "m", unknown)
    assert not settings.exists()
    deploy_package(endpoint, stage.packages["2"][0], "m", stage.version("2"))
    assert json.loads(settings.read_text())["uri"] is None


def test_a_deployment_that_is_killed_says_nothing_of_its_version(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: list[Exception] = []

    def killed(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    def on_signal(*_: object) -> None:
        raise RolloutInterruptedError("the task was killed")

    before = signal.signal(signal.SIGUSR1, on_signal)
    monkeypatch.setattr("airflow_mlops.serving.local._wait_until_live", killed)
    try:
        with pytest.raises(RolloutInterruptedError):
            deploy_package(
                stage.endpoint, stage.packages["2"][0], "m", stage.version("2"), on_refusal=refused.append
            )
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert refused == []
    assert wait_until(lambda: stage.serving() == {"1"}, timeout_seconds=10)


@pytest.fixture
def fatal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    """A service whose new version takes its worker with it where x is 100."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "fatal_model.py").write_text(_FATAL)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'modules'}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("AIRFLOW_MLOPS_TRUSTED_TYPES", "fatal_model.Fatal")
    old, new = (tmp_path / name for name in ("old", "fatal"))
    packages = {
        "1": (old, build_package(old, background_rows=10)),
        "2": (
            new,
            build_package(new, form="sklearn", estimator="fatal_model.Fatal", background_rows=10),
        ),
    }
    stage = Stage(tmp_path, packages, free_port())
    stage.deploy("1")
    yield stage
    stage.server.stop()


WIDE = CanaryPolicy(minimum_requests=20, latency_tolerance=50.0, slowest_tolerance=1.0, answer_tolerance=None)


@pytest.mark.parametrize("path", ["/predict", "/predict/explain"])
def test_a_version_that_takes_its_worker_with_it_is_taken_back(fatal: Stage, path: str) -> None:
    """Nobody counts the request that killed it, and what else failed then was of both versions."""
    plan = canary(20.0, 0.5)
    assert fatal.advance("2", plan, policy=WIDE).wait_seconds is not None
    with httpx.Client(base_url=fatal.server.url, headers={"authorization": "Bearer token"}) as client:

        def ask(where: str, x: float, times: int) -> None:
            for _ in range(times):
                client.post(where, json={"row": {"x": x, "kind": "a"}}, timeout=60).raise_for_status()

        ask("/predict", 1.0, 200)
        with pytest.raises(httpx.HTTPError):  # as soon as the new version is drawn
            ask(path, 100.0, 100)
    progress = fatal.roll_out("2", plan, policy=WIDE)
    assert progress.state.status == "rolled_back"
    assert progress.state.reason.startswith(
        "workers died while they computed answers, 1 with the new version at work"
    )
    assert fatal.serving() == {"1"}


def test_one_that_leaves_no_worker_to_be_asked_is_taken_back_once(fatal: Stage) -> None:
    """Whoever looks finds no service: what died tells all the same, and a retry does not give it to callers once more."""
    stopped = threading.Event()

    def ask() -> None:
        with httpx.Client(base_url=fatal.server.url, headers={"authorization": "Bearer token"}) as client:
            while not stopped.wait(0.05):
                with contextlib.suppress(httpx.HTTPError):
                    client.post("/predict", json={"row": {"x": 100.0, "kind": "a"}})

    plan = canary(6.0, 0.5)
    asking = threading.Thread(target=ask)
    progress = fatal.advance("2", plan, policy=WIDE, request="until try 3")
    asking.start()
    try:
        time.sleep(4.0)
        progress = fatal.roll_out("2", plan, policy=WIDE, request="until try 3")
        assert progress.state.status == "rolled_back"
        assert "with the new version at work" in progress.state.reason
        assert fatal.told().count("entered") <= 2
        told = fatal.told()
        assert fatal.advance("2", plan, policy=WIDE, request="until try 3").state.status == "rolled_back"
        assert fatal.told() == told
    finally:
        stopped.set()
        asking.join(timeout=30)


def test_what_no_worker_can_load_ends_at_once_and_the_ledger_says_why(
    tmp_path: Path,
    packages: dict[str, tuple[Path, str]],
    mlflow_server: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    digest = build_unimportable(tmp_path / "own", monkeypatch)
    stage = Stage(tmp_path, {"0": packages["1"], "2": packages["2"]}, free_port())
    services = Services(
        tracking_uri=mlflow_server,
        ledger_url=stage.ledger_url,
        serving_dir=str(stage.server.serving_dir),
        endpoint_url=stage.server.url,
        endpoint_token="token",
    )
    version = register(Registry.connect(services), tmp_path / "own", "m", digest)
    spec = {"model_name": "m", "model_version": version, "package_digest": digest, "timeout_seconds": 3_600}
    try:
        with pytest.raises(RolloutError, match=r"(?s)No module named 'only_here'.*Nothing serves"):
            run_step("deploy", spec | {"strategy": "canary", "rollout": "first"}, services)
        assert stage.told() == ["rolled_back"]
        stage.deploy("0")
        # The second one of a kind is a retry, which begins anew.
        for attempt in (2, 3):
            with pytest.raises(
                VersionRefusedError, match=r"(?s)No module named 'only_here'.*Version 0 serves on"
            ):
                run_step("deploy", spec | {"rollout": "recreate"}, services)
            assert stage.told() == ["rolled_back"] * attempt
            assert "No module named 'only_here'" in stage.last()["reason"]
        for attempt in (4, 5):  # a version that can't be loaded has not passed, and its alias goes back
            ended = run_step("deploy", spec | {"strategy": "canary", "rollout": "canary"}, services)
            assert (ended["state"], ended["serving_version"]) == ("rolled_back", "0")
            assert "No module named 'only_here'" in ended["reason"]
            assert stage.told() == ["rolled_back"] * attempt
            assert "No module named 'only_here'" in stage.last()["reason"]
        # What keeps it from being written down does not hide it.
        with pytest.raises(RolloutError, match="No module named 'only_here'"):
            run_step("deploy", spec, replace(services, ledger_url="nosuch://x"))
        with pytest.raises(RolloutError, match="No module named 'only_here'"):
            run_step("deploy", spec | {"phase_seconds": -1}, services)
        assert stage.serving() == {"0"}
        stage.advance("2", canary(60.0), rollout="another")
        told = stage.told()
        with pytest.raises(RolloutError, match="a rollout of version 2 is under way"):
            run_step("deploy", spec, services)
        assert stage.told() == told
    finally:
        stage.server.stop()


def test_only_what_was_brought_to_the_service_and_did_not_come_up_is_written_down(
    stage: Stage, tmp_path: Path
) -> None:
    for err in (RegistryUnavailableError("it is down"), KeyboardInterrupt(), SystemExit()):

        def fetch(err: BaseException = err) -> Path:
            raise err

        with pytest.raises(type(err)):
            stage.advance("2", canary(), fetch=fetch)
    assert stage.told() == []
    broken = shutil.copytree(stage.packages["2"][0], tmp_path / "broken")
    (broken / "model.onnx").write_bytes(b"garbage")
    progress = stage.advance("2", canary(), fetch=lambda: broken)
    assert (progress.state.status, progress.wait_seconds) == ("rolled_back", None)
    assert progress.state.reason.startswith("ArtifactIntegrityError: ")
    assert "model.onnx" in progress.state.reason
    assert stage.told() == ["rolled_back"]
    assert stage.serving() == {"1"}


def test_nothing_to_compare_with_is_no_shadow(tmp_path: Path, packages: dict[str, tuple[Path, str]]) -> None:
    stage = Stage(tmp_path, packages, free_port())
    with pytest.raises(RolloutError, match="serves nothing that version 2 could be compared with"):
        stage.advance("2", plan_rollout("shadow"))
    assert stage.server.running() is None


def test_what_can_not_be_compared_has_not_passed(stage: Stage) -> None:
    folder = stage.folder / "labels"
    stage.packages = stage.packages | {"7": (folder, build_package(folder, labels=True))}
    for told in (1, 2):  # every time it is tried
        progress = stage.advance("7", plan_rollout("shadow"))
        assert (progress.state.status, progress.wait_seconds) == ("rolled_back", None)
        assert progress.desired.stable.model_version == "1"
        assert "version 7 answers the labels high, low, version 1 numbers" in progress.state.reason
        assert stage.told() == ["rolled_back"] * told
    assert stage.serving() == {"1"}


@pytest.mark.parametrize("known", [True, False])
def test_one_that_answers_unseen_reads_its_own_inputs_of_a_request(stage: Stage, known: bool) -> None:
    """It is compared once callers send what it takes, which is what one wants to know of a new input."""
    folder = stage.folder / "more"
    stage.packages = stage.packages | {"7": (folder, build_package(folder, idle=1))}
    more = {"idle_0": 0.5} if known else {}
    with Traffic(stage.server.url, more=more) as traffic:
        progress = stage.roll_out("7", plan_rollout("shadow", seconds=3.0, looks=2))
    assert (traffic.failures, stage.serving()) == ([], {"1"})
    if known:
        assert progress.state.status == "finished", progress.state.reason
        log = stage.server.serving_dir / LOG_FOLDER
        logged = read_received_since(log, "m", datetime(2020, 1, 1, tzinfo=UTC), shadow=True)
        assert logged is not None
        unseen = logged.filter(pl.col("model_version") == "7")
        assert unseen["shadow"].all()
        assert unseen[f"{FEATURE_PREFIX}idle_0"].to_list() == [0.5] * unseen.height
        assert unseen.height > 100
    else:
        assert progress.state.status == "rolled_back"
        assert progress.state.reason.endswith(
            "; its inputs idle_0 are not those of version 1: callers must send them before it is rolled out"
        )


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
