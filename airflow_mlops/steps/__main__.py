"""Run one step by name: how another environment, a pod or a shell runs it."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from airflow_mlops.core.data.batches import limit_read_ahead
from airflow_mlops.core.errors import describe_error
from airflow_mlops.services import Services
from airflow_mlops.steps.base import STEP_MODULES, run_step
from airflow_mlops.steps.process import write_own_process


def main(argv: list[str] | None = None) -> int:
    """Read a spec, run the step, write its result; services come from ``AIRFLOW_MLOPS_*`` variables."""
    parser = argparse.ArgumentParser(prog="python -m airflow_mlops.steps", description=main.__doc__)
    parser.add_argument("name", choices=sorted(STEP_MODULES))
    parser.add_argument("--spec", type=Path, required=True, help="JSON file with the step's spec")
    parser.add_argument("--result", type=Path, help="where to write the result (default: standard output)")
    args = parser.parse_args(argv)
    if args.result is not None and not args.result.parent.is_dir():
        parser.error(f"--result {args.result}: there is no folder {args.result.parent}")
    try:
        spec = _read_spec(args.spec)
    except ValueError as err:
        if args.result is not None:
            _write_whole(args.result, json.dumps({"error": describe_error(err)}))
        parser.error(str(err))
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    # A step that is asked to end cleans up first; the first process of a container would not even end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    limit_read_ahead()
    try:
        outcome = run_step(args.name, spec, Services.from_environment())
    except Exception as err:
        if args.result is not None:
            _write_whole(args.result, json.dumps({"error": describe_error(err)}))
        raise
    text = json.dumps(outcome, indent=2, allow_nan=False)
    if args.result is None:
        sys.stdout.write(text + "\n")
    else:
        _write_whole(args.result, text)
    return 0


def _read_spec(path: Path) -> dict[str, Any]:
    """Read the spec.

    :raises ValueError: there is no such file, or it holds no JSON object.
    """
    try:
        spec: Any = json.loads(path.read_text())
    except (OSError, ValueError) as err:
        raise ValueError(
            f"--spec {path} can't be read: {err}; give a file with the step's spec as JSON"
        ) from err
    if not isinstance(spec, dict):
        raise ValueError(f"--spec {path} holds no JSON object but {type(spec).__name__}")
    return spec


def _write_whole(path: Path, text: str) -> None:
    """Write under a temporary name and rename, so a reader sees all of it or nothing."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, suffix=".tmp") as file:
        file.write(text)
    os.replace(file.name, path)


if __name__ == "__main__":
    write_own_process()
    sys.exit(main())
