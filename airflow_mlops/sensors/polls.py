"""What each sensor looks at: plain functions of plain arguments, run by a worker or by the triggerer.

Each gives a small JSON dict when the wait is over, and ``None``, or what is missing, while it is not. Connections are resolved here, so
no credential is stored with a trigger.
"""

from __future__ import annotations

import logging
import time
from typing import Any
from urllib.parse import urlencode, urlsplit

import httpx

from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import (
    ConnectionConfigError,
    DatasetNotFoundError,
    InsufficientDataError,
    RegistryUnavailableError,
)
from airflow_mlops.hooks.bentoml import BentoMLHook
from airflow_mlops.hooks.ledger import LedgerHook
from airflow_mlops.hooks.mlflow import MLflowHook
from airflow_mlops.hooks.storage import remember_stores
from airflow_mlops.triggers.poll import Waiting

log = logging.getLogger(__name__)


def new_data(*, source: str, min_files: int, settle_seconds: float = 0.5) -> dict[str, Any] | Waiting:
    """Look for files; they count once they stand still between two looks.

    :returns: the files, and ``source`` without its query, which may be a signature; or what is missing.
    :raises ConnectionConfigError: a web server refuses to give the file.
    :raises DatasetNotFoundError: it says that the file is gone for good.
    :raises ValueError: more files are awaited than a web address or a table has, or a web address is a pattern.
    """
    from airflow_mlops.integrations.download import plain_url

    shown = source
    if source.startswith(("http://", "https://")):
        shown = plain_url(source)
        if "*" in urlsplit(source).path:
            raise ValueError(
                f"{shown} is a pattern, and a web server lists no files: wait for one file, such as the last one that is "
                "written (a * in its name is %2A)"
            )
        _require_one(shown, min_files, "file")
    else:
        remember_stores(source)
    before = _marks(source, shown, min_files)
    if len(before) < min_files:
        return Waiting(f"waiting for {shown}: there are {len(before)} of {min_files} files")
    time.sleep(settle_seconds)
    if _marks(source, shown, min_files) != before:
        return Waiting(f"waiting for {shown}: it is still being written")
    return {"source": shown, "files": sorted(before)[:100], "file_count": len(before)}


def _require_one(shown: str, min_files: int, what: str) -> None:
    if min_files > 1:
        raise ValueError(f"min_files is {min_files}, and {shown} is one {what}: leave it out")


def _marks(source: str, shown: str, min_files: int) -> dict[str, Any]:
    """Find what a source stands for, each with what changes when it does; a Delta table is one."""
    import glob

    from airflow_mlops.integrations.download import web_mark
    from airflow_mlops.integrations.object_store import file_marks
    from airflow_mlops.steps.ingestion.source import ENDINGS

    if source.startswith(("http://", "https://")):
        mark = web_mark(source)
        return {} if mark is None else {shown: mark}
    found: dict[str, Any] = file_marks(source)
    if found or source.endswith(ENDINGS) or glob.has_magic(source) or not _has_rows(source):
        return found
    _require_one(shown, min_files, "Delta table")
    return {source: "table"}


def _has_rows(source: str) -> bool:
    """Tell whether a Delta table with data files is there: the first ingest makes an empty table before it writes."""
    from airflow_mlops.integrations.delta.tables import data_files, open_table, table_exists
    from airflow_mlops.integrations.object_store import file_marks

    # Delta knows fewer stores than files can be in, and fails on others.
    if not file_marks(f"{source.rstrip('/')}/_delta_log/*"):
        return False
    return table_exists(source) and bool(data_files(open_table(source, None)))


def labels_arrived(
    *,
    model_name: str,
    labels: str,
    id_column: str,
    target: str,
    window_start: str,
    window_end: str,
    minimum_labelled_share: float,
    bentoml_conn_id: str,
    ledger_conn_id: str = LedgerHook.default_conn_name,
) -> dict[str, Any] | None:
    """Look which share of a window's predictions has a label; as a grade does, of those of the champion when the window ended."""
    from pathlib import Path

    from airflow_mlops.steps.monitoring.labels import labelled_share

    remember_stores(labels)
    folder = (
        Path(BentoMLHook(bentoml_conn_id=bentoml_conn_id).services().require("serving_dir")) / "inference_log"
    )
    window = Window.parse(window_start, window_end)
    with LedgerHook(ledger_conn_id=ledger_conn_id).get_conn() as ledger:
        champion = ledger.champion_at(model_name, window.end)
    try:
        share = labelled_share(
            folder, model_name, window,
            labels=labels, id_column=id_column, target=target, model_version=champion,
        )  # fmt: skip
    except (InsufficientDataError, DatasetNotFoundError) as err:
        log.info("waiting for labels: %s", err)  # said, as a mistyped table looks the same
        return None
    if share < minimum_labelled_share:
        return None
    return {"model_name": model_name, "window": window.key, "labelled_share": share}


def model_version(
    *, model_name: str, alias: str, not_version: str | None, mlflow_conn_id: str
) -> dict[str, Any] | None:
    """Look where an alias points, over plain REST: importing MLflow costs seconds."""
    services = MLflowHook(mlflow_conn_id=mlflow_conn_id).services()
    url = f"{services.require('tracking_uri').rstrip('/')}/api/2.0/mlflow/registered-models/alias"
    try:
        answer = httpx.get(
            f"{url}?{urlencode({'name': model_name, 'alias': alias})}",
            headers=services.tracking_headers(),
            timeout=10,
        )
    except httpx.HTTPError as err:
        raise RegistryUnavailableError(f"MLflow at {services.tracking_uri} does not answer: {err}") from err
    version = _version_in(answer, f"connection {mlflow_conn_id!r}")
    if version is None or version == not_version:
        return None
    return {"model_name": model_name, "alias": alias, "model_version": version}


def endpoint_ready(
    *, model_name: str | None, model_version: str | None, bentoml_conn_id: str
) -> dict[str, Any] | None:
    """Look what the service answers with."""
    with BentoMLHook(bentoml_conn_id=bentoml_conn_id).get_conn() as client:
        status = client.ready()
    wanted = (model_name or status["model_name"], model_version or status["model_version"])
    if not status["ready"] or wanted != (status["model_name"], status["model_version"]):
        return None
    return {
        "model_name": status["model_name"],
        "model_version": status["model_version"],
        "endpoint_url": client.url,
    }


def check_recorded(
    *,
    model_name: str,
    window_start: str,
    window_end: str,
    check: str,
    only_if_found: bool,
    ledger_conn_id: str,
) -> dict[str, Any] | None:
    """Look for a window's check in the ledger; a grade that labels may still give is awaited, and the one that stands counts."""
    from airflow_mlops.ledger import EntryKind

    window = Window.parse(window_start, window_end)
    with LedgerHook(ledger_conn_id=ledger_conn_id).get_conn() as ledger:
        if EntryKind(check) is EntryKind.PERFORMANCE_CHECK:
            grade = next(iter(ledger.grades(model_name, window=window)), None)
            entry = grade.entry if grade is not None and (grade.measured or grade.final) else None
        else:
            entry = ledger.find(EntryKind(check), f"{model_name}|{window.key}")
    if entry is None:
        return None
    verdicts = ("drifted", "degraded", "estimate_degraded")
    found = any(entry.payload.get(name) for name in verdicts)
    if only_if_found and not found:
        return None
    return {
        "model_name": model_name,
        "window": window.key,
        "check": check,
        "found": found,
        "summary": entry.summary,
    }


def _version_in(answer: httpx.Response, connection: str) -> str | None:
    """Read MLflow's answer; ``None`` only where MLflow itself says that there is no such model or alias yet.

    :raises RegistryUnavailableError: the server failed, or asks for patience.
    :raises ConnectionConfigError: it refuses the login, or is no MLflow.
    :raises ValueError: MLflow refuses the names.
    """
    status = answer.status_code
    if status in {401, 403}:
        raise ConnectionConfigError(f"MLflow refuses {connection} ({status}): check Login and Password")
    if status == 429 or status >= 500:
        raise RegistryUnavailableError(f"MLflow at {answer.url} failed with {status}")
    try:
        body = answer.json()
        if status == 200:
            return str(body["model_version"]["version"])
        code, message = body["error_code"], str(body["message"])
    except (ValueError, TypeError, KeyError) as err:
        raise ConnectionConfigError(
            f"{answer.url} answered {status}, not as MLflow does: check the address of {connection}, its path included"
        ) from err
    missing = code == "INVALID_PARAMETER_VALUE" and "not found" in message  # what MLflow says of an alias
    if code == "RESOURCE_DOES_NOT_EXIST" or missing:
        return None
    raise ValueError(f"MLflow refused to look up {answer.url.params}: {message}")
