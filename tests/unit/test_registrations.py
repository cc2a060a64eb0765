"""Registrations in the ledger: each signature and evaluation of a package is an entry, and hides no other version."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.ledger import EntryKind, Ledger, LedgerEntry
from airflow_mlops.ledger.lineage import versions_in_use
from airflow_mlops.operators.register import RegisterModelOperator

NOW = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
def ledger_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = f"sqlite:///{tmp_path / 'ledger.db'}"
    connection = {"conn_type": "mlops_ledger", "extra": {"url": url}}
    monkeypatch.setenv("AIRFLOW_CONN_LEDGER_DEFAULT", json.dumps(connection))
    return url


def register(version: str, **more: Any) -> None:
    """Write what the operator writes after the step."""
    result = {
        "model_name": "m", "model_version": version, "run_id": f"run-{version}", "package_digest": f"sha256:{version}",
        "signed_by": None, "vouched_by": None, "version_url": "", "card_url": "", "changes": [], "evaluation_digest": None,
    }  # fmt: skip
    context: Any = {"ti": SimpleNamespace(dag_id="d", run_id="r", task_id="t", map_index=-1)}
    RegisterModelOperator(task_id="r", training={}).record(result | more, context)


def test_what_is_new_about_a_version_is_an_entry(ledger_url: str) -> None:
    for more in (
        {},
        {},  # a retry
        {"signed_by": "old"},
        {"signed_by": "new"},
        {"signed_by": "new", "evaluation_digest": "sha256:e"},
        {"signed_by": "new", "vouched_by": "anna"},
        {"signed_by": "new", "vouched_by": "bob"},
        {"signed_by": "new", "vouched_by": "bob"},
        {"package_digest": "sha256:of a model that was deleted and made anew"},
    ):
        register("1", **more)
    with LedgerHook().get_conn() as ledger:
        written = ledger.entries(kind=EntryKind.REGISTRATION, newest_first=False)
    told = [
        tuple(entry.payload[name] for name in ("signed_by", "evaluation_digest", "vouched_by"))
        for entry in written
    ]
    assert told == [
        (None, None, None),
        ("old", None, None),
        ("new", None, None),
        ("new", "sha256:e", None),
        ("new", None, "anna"),
        ("new", None, "bob"),
        (None, None, None),
    ]


def test_a_champion_that_is_signed_again_is_no_newer_than_its_candidates(ledger_url: str) -> None:
    for version in ("1", "2", "3"):
        register(version)
    with Ledger.open(ledger_url) as ledger:
        for version in ("1", "2", "3"):
            dataset = {"uri": "t", "version": int(version)}
            ledger.record(entry(EntryKind.TRAINING, f"run-{version}", {"dataset": dataset}))
        payload = {"alias": "champion", "model_version": "1", "previous_version": None}
        ledger.move_alias(
            model_name="m",
            alias="champion",
            model_version="1",
            expected_version=None,
            entry=entry(EntryKind.PROMOTION, "m|champion", payload),
        )
        for number in range(25):
            register("1", signed_by=f"key {number}")
        kept = {(item.alias, item.model_version) for item in versions_in_use(ledger)}
    assert kept == {("champion", "1"), ("challenger", "2"), ("challenger", "3")}


def entry(kind: EntryKind, key: str, payload: dict[str, Any]) -> LedgerEntry:
    return LedgerEntry(
        kind=kind,
        key=key,
        model_name="m",
        window=None,
        subject=None,
        summary="",
        payload=payload,
        actor="test",
        recorded_at=NOW,
    )
