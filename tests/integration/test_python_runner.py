"""A step in another Python environment: the same result, its log, its end."""

from __future__ import annotations

import json
import logging
import os
import signal
import site
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pytest

from airflow_mlops.exceptions import DatasetNotFoundError
from airflow_mlops.runners.in_process import InProcessRunner
from airflow_mlops.runners.python import PythonRunner
from airflow_mlops.services import Services

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def other_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another virtual environment, which finds this one's packages."""
    folder = tmp_path_factory.mktemp("other")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True, timeout=60)
    (library,) = folder.glob("lib/python*/site-packages")
    (library / "borrowed.pth").write_text("\n".join([str(REPOSITORY), *site.getsitepackages()]))
    return str(folder / "bin" / "python")


@pytest.fixture
def spec(tmp_path: Path) -> dict[str, Any]:
    pl.DataFrame({"id": [1, 2, 3], "x": [0.5, 1.5, 2.5]}).write_parquet(tmp_path / "rows.parquet")
    return {"source": str(tmp_path / "rows.parquet"), "table": str(tmp_path / "table")}


def test_a_step_elsewhere_gives_the_same(other_python: str, spec: dict[str, Any], tmp_path: Path) -> None:
    here = InProcessRunner().run("ingest", spec | {"table": str(tmp_path / "here")}, Services())
    there = PythonRunner(other_python).run("ingest", spec, Services())
    assert there["dataset"]["dataset_digest"] == here["dataset"]["dataset_digest"]
    assert set(there) == set(here)
    with pytest.raises(DatasetNotFoundError, match="nothing_here"):
        PythonRunner(other_python).run(
            "ingest", spec | {"source": str(tmp_path / "nothing_here.parquet")}, Services()
        )


SLOW = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(300)"])
with open(os.environ["PIDS"], "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
print("still at it", flush=True)
time.sleep(300)
"""


def started(
    runner: PythonRunner, spec: dict[str, Any], pids: Path
) -> tuple[threading.Thread, list[Exception]]:
    """Run a step that never ends, and wait until it is in the middle."""
    problems: list[Exception] = []

    def work() -> None:
        try:
            runner.run("ingest", spec, Services())
        except Exception as err:  # noqa: BLE001 - handed to the test
            problems.append(err)

    thread = threading.Thread(target=work)
    thread.start()
    deadline = time.monotonic() + 60
    while not (pids.exists() and len(pids.read_text().split()) == 2) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert pids.exists(), problems
    return thread, problems


@pytest.fixture
def endless(other_python: str, tmp_path: Path) -> tuple[PythonRunner, Path]:
    """A runner whose step starts a child and sleeps: Python imports ``sitecustomize`` before anything else."""
    (tmp_path / "endless").mkdir()
    (tmp_path / "endless" / "sitecustomize.py").write_text(SLOW)
    pids = tmp_path / "pids"
    return PythonRunner(other_python, env={"PYTHONPATH": str(tmp_path / "endless"), "PIDS": str(pids)}), pids


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_killing_the_task_ends_the_step_and_what_it_started(
    endless: tuple[PythonRunner, Path], spec: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    runner, pids = endless
    with caplog.at_level(logging.INFO):
        thread, problems = started(runner, spec, pids)
        deadline = time.monotonic() + 10
        while "still at it" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        assert "still at it" in caplog.text  # told while the step runs, not after it
        runner.cancel()
    thread.join(timeout=20)
    assert not thread.is_alive()
    step, child = map(int, pids.read_text().split())
    deadline = time.monotonic() + 5
    while not (gone(step) and gone(child)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert gone(step)
    assert gone(child)
    assert "was ended by SIGTERM" in str(problems[0])
    runner.cancel()  # nothing is left to end


def test_a_step_that_is_killed_says_by_what(endless: tuple[PythonRunner, Path], spec: dict[str, Any]) -> None:
    runner, pids = endless
    thread, problems = started(runner, spec, pids)
    step, child = map(int, pids.read_text().split())
    os.kill(step, signal.SIGKILL)
    os.kill(child, signal.SIGKILL)
    thread.join(timeout=20)
    assert "was ended by SIGKILL (out of memory?)" in str(problems[0])


ATTEMPT = """
import json, os, sys
from airflow_mlops.runners.python import PythonRunner
from airflow_mlops.services import Services
runner = PythonRunner(sys.argv[1], env=json.loads(sys.argv[3]), resume_in=sys.argv[4])
print(json.dumps(runner.run("ingest", json.loads(sys.argv[2]), Services())), flush=True)
"""

PATIENT = """
import os, time
with open(os.environ["STARTS"], "a") as file:
    file.write(f"{os.getpid()}\\n")
while not os.path.exists(os.environ["GO"]):
    time.sleep(0.05)
"""


@pytest.fixture
def attempt(other_python: str, spec: dict[str, Any], tmp_path: Path) -> Any:
    """Start an attempt of a task whose step waits for a file to appear."""
    (tmp_path / "patient").mkdir()
    (tmp_path / "patient" / "sitecustomize.py").write_text(PATIENT)
    env = {
        "PYTHONPATH": str(tmp_path / "patient"),
        "STARTS": str(tmp_path / "starts"),
        "GO": str(tmp_path / "go"),
    }
    processes = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", ATTEMPT, other_python, json.dumps(spec), json.dumps(env)]
        process = subprocess.Popen(
            [*command, str(tmp_path / "jobs")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate(timeout=10)
    for line in starts(tmp_path):
        if not gone(int(line)):
            os.kill(int(line), signal.SIGKILL)


def starts(folder: Path) -> list[str]:
    return (folder / "starts").read_text().split() if (folder / "starts").exists() else []


def wait_for_a_start(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not starts(folder) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert starts(folder)


@pytest.mark.parametrize("ends", ["after_the_retry", "before_the_retry"])
def test_a_retry_goes_on_with_the_step_of_a_killed_task(attempt: Any, tmp_path: Path, ends: str) -> None:
    first = attempt()
    wait_for_a_start(tmp_path)
    first.kill()
    first.communicate(timeout=10)
    (step,) = starts(tmp_path)
    assert not gone(int(step))
    if ends == "before_the_retry":
        (tmp_path / "go").touch()
        while not gone(int(step)):
            time.sleep(0.05)
    second = attempt()
    if ends == "after_the_retry":
        time.sleep(1.0)
        (tmp_path / "go").touch()
    told, errors = second.communicate(timeout=60)
    assert second.returncode == 0, errors
    assert json.loads(told)["row_count"] == 3
    assert starts(tmp_path) == [step]  # no second one was started
    assert not [path for path in (tmp_path / "jobs").iterdir() if path.is_dir()]


def test_a_step_that_died_with_its_task_is_started_again(attempt: Any, tmp_path: Path) -> None:
    first = attempt()
    wait_for_a_start(tmp_path)
    first.kill()
    first.communicate(timeout=10)
    os.kill(int(starts(tmp_path)[0]), signal.SIGKILL)
    (tmp_path / "go").touch()
    told, errors = attempt().communicate(timeout=60)
    assert json.loads(told)["row_count"] == 3, errors
    assert len(starts(tmp_path)) == 2


def test_a_step_writes_itself_down_for_a_task_that_was_killed_before_it_could(
    spec: dict[str, Any], tmp_path: Path
) -> None:
    asked, told = tmp_path / "spec", tmp_path / "process.json"
    os.mkfifo(asked)
    process = subprocess.Popen(
        [sys.executable, "-m", "airflow_mlops.steps", "ingest", "--spec", str(asked)],
        env={**os.environ, "AIRFLOW_MLOPS_STEP_PROCESS": str(told)},
        stdout=subprocess.PIPE,
    )
    asked.write_text(json.dumps(spec))  # goes through when the step reads
    assert process.communicate(timeout=60)[0]
    assert json.loads(told.read_text())["pid"] == process.pid


def test_a_step_that_nobody_would_find_is_ended(
    endless: tuple[PythonRunner, Path], spec: dict[str, Any], tmp_path: Path
) -> None:
    runner, _ = endless
    (tmp_path / "job" / "process.json").mkdir(parents=True)  # nothing can be written there
    with pytest.raises(OSError, match=r"process\.json"):
        runner._start(tmp_path / "job", "ingest", spec, Services())
    assert not [
        process
        for process in psutil.process_iter(["cmdline"])
        if str(tmp_path / "job") in " ".join(process.info["cmdline"] or [])
    ]
