from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from airflow_mlops.steps.ingestion.spool import Spool

if TYPE_CHECKING:
    import pytest

HOLD = """
import sys
from airflow_mlops.steps.ingestion.spool import Spool
with Spool() as spool:
    (spool.folder / "rows-000000.parquet").write_text("personal")
    print(spool.folder, flush=True)
    sys.stdin.read()
"""


def test_what_a_killed_step_left_is_deleted_by_the_next_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            text=True,
        )
        for _ in range(3)
    ]
    folders = []
    for holder in holders:
        assert holder.stdout is not None
        folders.append(Path(holder.stdout.readline().strip()))
    killed, fresh, living = folders
    for holder in holders[:2]:
        holder.send_signal(signal.SIGKILL)
        holder.communicate()
    for folder in (killed, living):
        os.utime(folder, (0, 0))
    with Spool() as spool:
        assert spool.folder.is_dir()
        assert (killed.exists(), fresh.exists(), living.exists()) == (False, True, True)
    holders[2].communicate("")
    assert [*tmp_path.iterdir()] == [fresh]
