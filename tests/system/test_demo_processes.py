"""The demo when things do not go as told: interrupted in the middle, killed outright, data that no gate lets through."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import polars as pl
import psutil
import pytest

from airflow_mlops.demo.processes import end_leftovers
from airflow_mlops.demo.stream import TARGET, simulate
from airflow_mlops.demo.workspace import NOTE

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]


@contextlib.contextmanager
def demo(workspace: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    running = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "airflow_mlops.cli",
            "demo",
            "--exit",
            "--workspace",
            str(workspace),
            *arguments,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def processes_of(workspace: Path) -> list[psutil.Process]:
    """Everything that was started for a workspace: its folder is in each one's environment."""
    found = []
    for process in psutil.process_iter():
        try:
            home = process.environ().get("AIRFLOW_HOME", "")
            if home.startswith(str(workspace)) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def is_alive(process: psutil.Process) -> bool:
    """Whether it runs; what has ended and was not yet taken note of by the first process of the machine does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_output(running: subprocess.Popen[str], words: str) -> str:
    """Read until some words were said."""
    assert running.stdout is not None
    said = ""
    for line in running.stdout:
        said += line
        if words in said:
            return said
    raise AssertionError(f"{words!r} was not said: {said[-3000:]}")


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path.resolve() / "demo"
    yield folder
    end_leftovers(folder / NOTE)  # should a test fail half-way


def test_ctrl_c_in_the_middle_of_the_story_leaves_nothing(workspace: Path) -> None:
    with demo(workspace) as running:
        wait_for_output(running, "2. Months go by")  # Airflow, MLflow and the model service are up
        family = processes_of(workspace) + psutil.Process(running.pid).children(recursive=True)
        assert len(family) > 8
        running.send_signal(signal.SIGINT)
        rest, _ = running.communicate(timeout=60)
    assert running.returncode == 130, rest
    assert "Every process of the demo is gone." in rest
    assert [process for process in family if is_alive(process)] == []
    assert processes_of(workspace) == []


def test_a_run_after_a_kill_ends_what_was_left_and_a_closed_gate_is_explained(
    workspace: Path, tmp_path: Path
) -> None:
    with demo(workspace) as killed:
        wait_for_output(killed, "Starting MLflow and Airflow")
        deadline = time.monotonic() + 60
        while not processes_of(workspace):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    orphans = processes_of(workspace)
    assert orphans

    impossible = simulate(trips_per_month=700).with_columns(-pl.col(TARGET))
    impossible.write_parquet(tmp_path / "impossible.parquet")
    with demo(workspace, "--data", str(tmp_path / "impossible.parquet")) as failing:
        output, _ = failing.communicate(timeout=200)
    assert failing.returncode == 1, output
    assert "task validate of train_and_deploy failed" in output
    assert "DataQualityError" in output
    assert str(workspace / "logs") in output
    assert [process for process in orphans if is_alive(process)] == []
    assert processes_of(workspace) == []
