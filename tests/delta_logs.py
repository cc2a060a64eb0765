"""What Delta does to a table's log by itself in the course of months."""

from __future__ import annotations

import os
import time
from pathlib import Path

from deltalake import DeltaTable

#: Delta keeps commits for 30 days.
_MONTHS_AGO = 100 * 24 * 3600


def forget_commits(table: str) -> None:
    """Let months pass: of the commits so far a checkpoint is left, and nobody knows what they were."""
    before = time.time() - _MONTHS_AGO
    log = Path(table) / "_delta_log"
    for file in log.iterdir():
        os.utime(file, (before, before))
    opened = DeltaTable(table)
    opened.create_checkpoint()
    opened.cleanup_metadata()
    assert len(list(log.glob("*.json"))) <= 1
