"""The process of the local service: it takes the place of the one before it, and says itself where it is found.

Whoever starts or restarts a service may be killed at any moment. So neither is done by him, but by the process that becomes the
service: it ends its predecessor, writes down that it is the service, and only then turns into BentoML, which opens the port.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import psutil

from airflow_mlops.core.codec import from_dict, to_dict

if TYPE_CHECKING:
    from collections.abc import Iterator

ENDPOINT_FILE = "endpoint.json"
SERVICE = "airflow_mlops.serving.service:ModelEndpoint"

#: Holds a :class:`Launch` for the process that becomes the service.
LAUNCH_VARIABLE = "AIRFLOW_MLOPS_LAUNCH"

#: How long a service that is to be replaced may take to end by itself; longer than it goes on answering for.
STOP_SECONDS = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunningServer:
    """The process that serves, as ``endpoint.json`` holds it.

    :param pid: leader of its own process group.
    :param process_started: its start time; with the pid it names the process, also after pids were reused.
    :param url: address.
    :param settings: digest of what it was started with, see :attr:`~airflow_mlops.integrations.bentoml.LocalServer.settings`.
    """

    pid: int
    process_started: float
    url: str
    settings: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What a process is told that is to become the service.

    :param host: to listen on.
    :param port: to listen on.
    :param url: address, as :class:`RunningServer` has it.
    :param settings: likewise.
    :param replaces: process whose place it takes; ``None``: there is none.
    """

    host: str
    port: int
    url: str
    settings: str
    replaces: RunningServer | None = None


def running_server(serving_dir: Path) -> RunningServer | None:
    """Find the process a folder's service runs in, if it still does."""
    try:
        known = from_dict(RunningServer, json.loads((serving_dir / ENDPOINT_FILE).read_text()))
        process = psutil.Process(known.pid)
        same = abs(process.create_time() - known.process_started) < 1.0
        return known if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
        return None


def end_server(serving_dir: Path, server: RunningServer, *, timeout_seconds: float = STOP_SECONDS) -> None:
    """Ask a service's process group to end, then insist."""
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        leader = psutil.Process(server.pid)
        family = [leader, *leader.children(recursive=True)]
        os.killpg(server.pid, signal.SIGTERM)
        for process in _outliving(family, timeout_seconds):  # BentoML's workers lead groups of their own
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        _outliving(family, 5.0)
        psutil.wait_procs(family, timeout=0)  # reaps those that are our own
    (serving_dir / ENDPOINT_FILE).unlink(missing_ok=True)


def _outliving(family: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait for processes to end; one that nobody has reaped yet has ended.

    :returns: those that still run.
    """
    deadline = time.monotonic() + seconds
    while (left := [process for process in family if _runs(process)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@contextmanager
def one_at_a_time(serving_dir: Path) -> Iterator[None]:
    """Let one process at a time end the service, or become it; the lock goes when that one ends or turns into BentoML."""
    with (serving_dir / ".launch.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def become_service(serving_dir: Path, launch: Launch) -> NoReturn:
    """End the predecessor and turn into the service, unless another process is it already; then this one ends."""
    with one_at_a_time(serving_dir):
        running = running_server(serving_dir)
        if running is not None and running != launch.replaces:
            sys.exit(f"process {running.pid} serves {serving_dir} already")
        if running is not None:
            end_server(serving_dir, running)
        process = psutil.Process()
        started = process.create_time()
        server = RunningServer(
            pid=process.pid, process_started=started, url=launch.url, settings=launch.settings
        )
        write_private(serving_dir / ENDPOINT_FILE, json.dumps(to_dict(server)).encode())
        address = ["--host", launch.host, "--port", str(launch.port)]
        command = [sys.executable, "-m", "bentoml", "serve", SERVICE, *address]
        os.execv(sys.executable, command)  # noqa: S606 - our own interpreter and service


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read; whoever reads it sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.touch(mode=0o600)
    temporary.write_bytes(data)
    os.replace(temporary, path)


if __name__ == "__main__":
    become_service(
        Path(os.environ["AIRFLOW_MLOPS_SERVING_DIR"]),
        from_dict(Launch, json.loads(os.environ.pop(LAUNCH_VARIABLE))),
    )
