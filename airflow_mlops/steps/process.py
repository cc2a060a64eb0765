"""Where a step runs: the process writes itself down, for whoever comes after one that was killed."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import psutil

#: Names the file in which a process that runs a step says that it does.
PROCESS_VARIABLE = "AIRFLOW_MLOPS_STEP_PROCESS"


def write_process(path: Path, process: psutil.Process | psutil.Popen) -> None:
    """Write down which process it is: pids are used again, so with its start time."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".tmp") as file:
        json.dump({"pid": process.pid, "started": process.create_time()}, file)
    os.replace(file.name, path)


def write_own_process() -> None:
    """Write this process down, where it was asked to; what it starts is not asked."""
    asked = os.environ.pop(PROCESS_VARIABLE, None)
    if asked:
        write_process(Path(asked), psutil.Process())
