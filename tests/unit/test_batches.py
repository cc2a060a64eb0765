"""What a step's process has polars read ahead."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

VARIABLE = "POLARS_ROW_GROUP_PREFETCH_SIZE"


@pytest.mark.parametrize(("given", "then"), [(None, "1"), ("7", "7")])
def test_one_row_group_unless_the_environment_says_otherwise(
    tmp_path: Path, given: str | None, then: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    code = f"""
import os
from airflow_mlops.runners.in_process import InProcessRunner
from airflow_mlops.services import Services
try:
    InProcessRunner().run("ingest", {{"source": "nothing.parquet", "table": {str(tmp_path / "t")!r}}}, Services())
except Exception as err:
    print(type(err).__name__, os.environ[{VARIABLE!r}])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment | ({VARIABLE: given} if given else {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert done.stdout.split() == ["DatasetNotFoundError", then]
