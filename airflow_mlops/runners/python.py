"""Run a step in another Python environment on the same machine: one with other versions, or with a GPU build."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections import deque
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from airflow_mlops.core.codec import canonical_json
from airflow_mlops.core.errors import rebuild_error
from airflow_mlops.integrations.signals import deferred_signals
from airflow_mlops.steps.process import PROCESS_VARIABLE, write_process

if TYPE_CHECKING:
    from collections.abc import Iterator

    from airflow_mlops.services import Services


log = logging.getLogger(__name__)

#: Lines of the step's output that an error repeats.
_LAST_LINES = 40

#: How often output and end of a step are looked at.
_POLL_SECONDS = 0.1

_SPEC, _RESULT, _OUTPUT, _PROCESS = "spec.json", "result.json", "output.log", "process.json"


class PythonRunner:
    """Run ``python -m airflow_mlops.steps`` with another interpreter.

    The spec travels in a file, credentials in the environment; nothing is put on the command line. What the step
    prints and logs appears in the task's log while it runs.

    :param python: interpreter of an environment that has ``airflow-mlops`` and the step's tools.
    :param env: variables set in addition to the task's own, such as ``PYTHONPATH`` or ``OMP_NUM_THREADS``.
    :param resume_in: folder of this machine in which running steps are remembered. A step outlives a task that is killed; with
        this, the task's next attempt goes on with it instead of starting another. Default: every attempt starts anew.
    """

    def __init__(
        self, python: str, *, env: dict[str, str] | None = None, resume_in: str | None = None
    ) -> None:
        self.python = python
        self.env = env or {}
        self.resume_in = resume_in
        self._process: psutil.Process | None = None

    def run(self, name: str, spec: dict[str, Any], services: Services) -> dict[str, Any]:
        """Run the step there; an error of this package's tree is raised again here as what it was.

        :raises RuntimeError: with the end of the step's output, when it failed otherwise.
        """
        with self._job(name, spec) as folder:
            process = _remembered(folder)
            if process is None and not (folder / _RESULT).exists():
                process = self._start(folder, name, spec, services)
            else:
                log.info("going on with step %r, which an earlier attempt started", name)
            self._process = process
            last, code = _follow(process, folder / _OUTPUT)
            outcome = json.loads((folder / _RESULT).read_text()) if (folder / _RESULT).exists() else None
        if outcome is not None and "error" not in outcome:
            result: dict[str, Any] = outcome
            return result
        told = f"step {name!r} in {self.python} {_how_it_ended(code)}:\n{last}"
        if outcome is None:
            raise RuntimeError(told)
        raise rebuild_error(outcome["error"], details=told)

    def cancel(self) -> None:
        """Ask the step's process and those it started to end, then insist."""
        process = self._process
        if process is None or not _alive(process):
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + 10.0
            while _alive(process) and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
            if _alive(process):
                os.killpg(process.pid, signal.SIGKILL)

    @contextmanager
    def _job(self, name: str, spec: dict[str, Any]) -> Iterator[Path]:
        """Give the folder of this work. It goes with the work's end, whatever that is, but not with a kill of this process."""
        if self.resume_in is None:
            with tempfile.TemporaryDirectory() as temporary:
                yield Path(temporary)
            return
        text = canonical_json([self.python, name, spec])
        folder = Path(self.resume_in) / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # An attempt that was only taken for dead may be following as well: one at a time.
        with folder.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            folder.mkdir(mode=0o700, exist_ok=True)
            yield folder
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self, folder: Path, name: str, spec: dict[str, Any], services: Services) -> psutil.Popen:
        (folder / _SPEC).write_text(json.dumps(spec, allow_nan=False))
        command = [self.python, "-m", "airflow_mlops.steps", name]
        command += ["--spec", str(folder / _SPEC), "--result", str(folder / _RESULT)]
        process: psutil.Popen | None = None
        try:
            with deferred_signals(), (folder / _OUTPUT).open("wb") as output:
                process = psutil.Popen(
                    command,
                    env={
                        **os.environ,
                        **self.env,
                        **services.to_environment(),
                        # It writes itself down too: whoever starts it may be killed before he does.
                        PROCESS_VARIABLE: str(folder / _PROCESS),
                    },
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # it outlives this task, and what it started can be ended with it
                )
            write_process(folder / _PROCESS, process)
        except BaseException:
            if process is not None:
                with deferred_signals(), contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait(timeout=10)
            raise
        return process


def _remembered(folder: Path) -> psutil.Process | None:
    """Find the process an earlier attempt started, if it still runs."""
    try:
        known = json.loads((folder / _PROCESS).read_text())
        process = psutil.Process(known["pid"])
        same = abs(process.create_time() - known["started"]) < 1.0  # pids are used again
    except (FileNotFoundError, psutil.NoSuchProcess):
        return None
    return process if same and _alive(process) else None


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _follow(process: psutil.Process | None, output: Path) -> tuple[str, int | None]:
    """Pass the output on until the process ends; give its last lines and, of a process of our own, its exit code."""
    last: deque[str] = deque(maxlen=_LAST_LINES)
    begun = b""
    with output.open("rb") as file:
        running = True
        while running:
            running = process is not None and _alive(process)
            *lines, begun = (begun + file.read()).split(b"\n")
            if not running and begun:
                lines.append(begun)
            for line in lines:
                text = line.decode(errors="replace")
                log.info("%s", text)
                last.append(f"{text}\n")
            if running:
                time.sleep(_POLL_SECONDS)
    return "".join(last), process.wait(timeout=10) if process is not None else None


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "ended without a result"
    if code == 128 + signal.SIGTERM:  # it cleaned up before it ended
        code = -signal.SIGTERM
    if code >= 0:
        return f"ended with {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
