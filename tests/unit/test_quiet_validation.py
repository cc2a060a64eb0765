"""Great Expectations phones nobody, and leaves the task's log to the task."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY

#: Python itself tells of every socket that is made, by whatever library.
SCRIPT = """
import logging, sys
import urllib3  # which binds a socket to this machine's own ::1 when it is imported, to see whether that goes
told = []
sys.addaudithook(lambda event, given: told.append(event) if event.startswith("socket.") else None)
logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="LOG %(name)s %(message)s")
import json
import polars as pl
from airflow_mlops.integrations.great_expectations import validate_frame

rows = pl.LazyFrame({"n": list(range(1000)), "s": ["a", "b"] * 500})
suite = {"name": "quiet", "expectations": [
    {"type": "expect_column_values_to_be_between", "kwargs": {"column": "n", "max_value": 10}},
    {"type": "expect_column_values_to_be_in_type_list", "kwargs": {"column": "n", "type_list": ["int64"]}},
    {"type": "expect_column_most_common_value_to_be_in_set", "kwargs": {"column": "s", "value_set": ["a"]}},
]}
results = validate_frame(rows, suite, engine="great_expectations")["results"]
import socket
before = len(told)
socket.socket().close()
print(json.dumps({"judged": len(results), "sockets": told[:before], "heard": len(told) > before}))
"""


def test_no_socket_and_no_noise(tmp_path: Path) -> None:
    silent = {"GX_ANALYTICS_ENABLED", "DO_NOT_TRACK"}  # of the tests' own: nothing here depends on them
    environment = {name: value for name, value in os.environ.items() if name not in silent}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment | {"PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=True, cwd=tmp_path,
    )  # fmt: skip
    (line,) = done.stdout.splitlines()  # and no progress bar
    assert json.loads(line) == {"judged": 3, "sockets": [], "heard": True}
    assert done.stderr == ""
    assert not list(tmp_path.iterdir())  # no file of its own, no id of a user
