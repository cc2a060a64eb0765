"""Probe: load a packaged model in a new process, as a service would, and measure what it costs.

``python -m airflow_mlops.serving.probe FOLDER [MODEL]`` prints the measurements as JSON; with the name of a model, the package must
be signed as that model.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from airflow_mlops.core.codec import from_dict, to_dict
from airflow_mlops.core.comparison.artifact import FULL_ANSWERS, ArtifactFacts, ArtifactLimits, judge_artifact
from airflow_mlops.core.comparison.promotion import Check, Outcome
from airflow_mlops.core.environment import bare_environment
from airflow_mlops.core.model.signing import Trust

#: Rows answered one by one, and how many of them warm up.
REQUESTS, WARM_UP = FULL_ANSWERS + 50, 50
#: Seconds spent on them at most; a tenth of that on warming up. A slow model is measured on fewer.
BUDGET_SECONDS = 20.0

#: What Python says where a class is only on the path of the process that trained.
_UNFOUND = "No module named"

_STARTED = "AIRFLOW_MLOPS_PROBE_STARTED"
_PUBLIC_KEYS = "AIRFLOW_MLOPS_SIGNING_PUBLIC_KEYS"


def check_artifact(
    folder: Path,
    limits: ArtifactLimits,
    *,
    timeout_seconds: float | None = None,
    signed_as: str | None = None,
    public_keys: str | None = None,
) -> tuple[Check, ArtifactFacts | None]:
    """Run the probe and hold what it measured against the limits.

    :param folder: a verified package folder.
    :param limits: what it may cost.
    :param timeout_seconds: it is ended then, which is a failure; default as the limits allow.
    :param signed_as: model as which the package must be signed; ``None`` asks for no signature.
    :param public_keys: keys that may have signed it.
    :returns: what follows, and what was measured; ``None`` when the model did not answer.
    """
    patience = limits.timeout_seconds if timeout_seconds is None else timeout_seconds
    environment = bare_environment() | {"OMP_NUM_THREADS": "1", _STARTED: str(time.time())}
    command = [sys.executable, "-m", "airflow_mlops.serving.probe", str(folder)]
    if signed_as is not None:
        command.append(signed_as)
        environment[_PUBLIC_KEYS] = public_keys or ""
    try:
        done = subprocess.run(  # noqa: S603 - this package, with a folder of ours
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=patience,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _failed(f"the packaged model did not answer within {patience:g} s in a new process")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}"])[-1]
        hint = (
            ". Install it where models are served, or name its folder in PYTHONPATH"
            if _UNFOUND in last
            else ""
        )
        return _failed(f"the packaged model could not be used in a new process: {last[:500]}{hint}")
    facts = from_dict(ArtifactFacts, json.loads(done.stdout.splitlines()[-1]))
    return judge_artifact(facts, limits), facts


def measure(folder: Path, *, started: float, trust: Trust | None = None) -> ArtifactFacts:
    """Load the model, let it answer, and measure.

    :param folder: package folder.
    :param started: when this process was started, in seconds since 1970.
    :param trust: whose signature it must carry; ``None`` asks for none.
    :raises ArtifactIntegrityError: it can't be loaded, or does not answer as it did when it was packaged.
    """
    from airflow_mlops.serving.model import load_model

    model = load_model(folder, trust=trust)  # lets it answer the known rows
    cold_start = time.time() - started
    spent = time_answers(model.predict_records, model.manifest.known_rows)
    return ArtifactFacts(
        size_mb=sum(path.stat().st_size for path in folder.iterdir()) / 1e6,
        cold_start_seconds=cold_start,
        p99_milliseconds=sorted(spent)[-max(1, len(spent) // 100)] * 1e3,
        memory_mb=peak_memory_mb(),
        timed_answers=len(spent),
    )


def time_answers(
    answer: Callable[[list[dict[str, Any]]], Any],
    rows: Sequence[dict[str, Any]],
    *,
    budget_seconds: float = BUDGET_SECONDS,
) -> list[float]:
    """Let a model answer row by row, and take the time once it is warm.

    :param answer: of the model.
    :param rows: asked for in turn.
    :param budget_seconds: no answer is begun after that, but for the first that is timed.
    :returns: seconds per answer, at least one.
    """
    spent: list[float] = []
    begin = time.perf_counter()
    for number in range(REQUESTS):
        begun = time.perf_counter()
        if spent and begun - begin > budget_seconds:
            break
        answer([rows[number % len(rows)]])
        if number >= WARM_UP or begun - begin > budget_seconds / 10.0:
            spent.append(time.perf_counter() - begun)
    return spent


def peak_memory_mb() -> float:
    """Peak resident memory of this process in megabytes."""
    try:
        # The peak that getrusage knows is the larger of ours and that of the process we were forked from.
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(status["VmHWM"].split()[0]) * 1024 / 1e6
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, else kilobytes
        return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def _failed(reason: str) -> tuple[Check, None]:
    return Check(name="artifact", outcome=Outcome.FAIL, reason=reason), None


if __name__ == "__main__":
    asked = Trust.of(os.environ.get(_PUBLIC_KEYS), sys.argv[2]) if len(sys.argv) > 2 else None
    facts = measure(Path(sys.argv[1]), started=float(os.environ[_STARTED]), trust=asked)
    sys.stdout.write(f"{json.dumps(to_dict(facts))}\n")
