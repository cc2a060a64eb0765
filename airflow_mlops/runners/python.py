"""Run a step in another Python environment on the same machine: one with other versions, or with a GPU build."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import tempfile
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.errors import rebuild_error

if TYPE_CHECKING:
    from airflow_mlops.services import Services


log = logging.getLogger(__name__)

#: Lines of the step's output that an error repeats.
_LAST_LINES = 40


class PythonRunner:
    """Run ``python -m airflow_mlops.steps`` with another interpreter.

    The spec travels in a file, credentials in the environment; nothing is put on the command line. What the step
    prints and logs appears in the task's log while it runs.

    :param python: interpreter of an environment that has ``airflow-mlops`` and the step's tools.
    :param env: variables set in addition to the task's own, such as ``PYTHONPATH`` or ``OMP_NUM_THREADS``.
    """

    def __init__(self, python: str, *, env: dict[str, str] | None = None) -> None:
        self.python = python
        self.env = env or {}
        self._process: subprocess.Popen[str] | None = None

    def run(self, name: str, spec: dict[str, Any], services: Services) -> dict[str, Any]:
        """Run the step there; an error of this package's tree is raised again here as what it was.

        :raises RuntimeError: with the end of the step's output, when it failed otherwise.
        """
        with tempfile.TemporaryDirectory() as folder:
            spec_file, result_file = Path(folder) / "spec.json", Path(folder) / "result.json"
            spec_file.write_text(json.dumps(spec, allow_nan=False))
            self._process = subprocess.Popen(  # noqa: S603 - the interpreter the Dag author named
                [
                    self.python,
                    "-m",
                    "airflow_mlops.steps",
                    name,
                    "--spec",
                    str(spec_file),
                    "--result",
                    str(result_file),
                ],
                env={**os.environ, **self.env, **services.to_environment()},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # so that what the step itself started can be ended with it
            )
            last = self._relay(self._process)
            outcome = json.loads(result_file.read_text()) if result_file.exists() else None
            if self._process.returncode == 0 and outcome is not None:
                result: dict[str, Any] = outcome
                return result
        ended = _how_it_ended(self._process.returncode)
        told = f"step {name!r} in {self.python} {ended}:\n{last}"
        if outcome is None or "error" not in outcome:
            raise RuntimeError(told)
        raise rebuild_error(outcome["error"], details=told)

    def cancel(self) -> None:
        """Ask the step's process and those it started to end, then insist."""
        if self._process is None or self._process.poll() is not None:
            return
        os.killpg(self._process.pid, signal.SIGTERM)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)

    @staticmethod
    def _relay(process: subprocess.Popen[str]) -> str:
        """Pass the output on line by line until the process ends; give its last lines."""
        last: deque[str] = deque(maxlen=_LAST_LINES)
        with process:
            for line in process.stdout or ():
                log.info("%s", line.rstrip("\n"))
                last.append(line)
        return "".join(last)


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
