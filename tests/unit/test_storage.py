"""The ledger on a disk that refuses: a clear error, and what was written stays."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from airflow_mlops.exceptions import StorageError
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from tests.disks import immutable, small_disk


def entry(key: str, size: int = 10) -> LedgerEntry:
    return LedgerEntry(
        kind=EntryKind.TRAINING, key=key, model_name="m", window=None, subject=None, summary="trained",
        payload={"report": "x" * size}, actor="test", recorded_at=datetime(2024, 1, 1, tzinfo=UTC),
    )  # fmt: skip


def test_a_folder_that_denies_a_new_ledger(tmp_path: Path) -> None:
    with immutable(tmp_path), pytest.raises(StorageError, match=r"ledger\.db can't be written.*permissions"):
        Ledger.open(f"sqlite:///{tmp_path}/ledger.db")


def test_a_folder_that_denies_the_ledger_that_is_there(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db"
    with Ledger.open(url) as ledger:
        ledger.record(entry("1"))
    with (
        immutable(tmp_path),
        pytest.raises(StorageError, match=r"the ledger .*check the file, its permissions and the disk"),
        Ledger.open(url) as ledger,
    ):
        ledger.record(entry("2"))
    with Ledger.open(url) as ledger:
        assert [each.key for each in ledger.entries()] == ["1"]


def test_a_full_disk_keeps_what_was_written(tmp_path: Path) -> None:
    with small_disk(tmp_path), Ledger.open(f"sqlite:///{tmp_path}/ledger.db") as ledger:
        ledger.record(entry("1"))
        with pytest.raises(StorageError, match=r"disk is full.*check the file, its permissions and the disk"):
            ledger.record(entry("2", size=500_000))
        assert [each.key for each in ledger.entries()] == ["1"]
