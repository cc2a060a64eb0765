"""The page of a validation, kept as an artifact of a run in MLflow; a verdict does not wait for it."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.checks.data_docs import PastVerdict, describe_validation
from airflow_mlops.core.codec import json_safe
from airflow_mlops.exceptions import MLOpsError

if TYPE_CHECKING:
    from airflow_mlops.core.data.dataset import DatasetVersion
    from airflow_mlops.services import Services

logger = logging.getLogger(__name__)

#: Experiment that holds the pages of a table's validations.
VALIDATION_EXPERIMENT = "{table} validation"
PAGE_FILE, RESULT_FILE = "validation.html", "validation.json"

#: When a page is written.
REPORTS = ("always", "failed", "never")


def write_page(
    services: Services,
    outcome: Mapping[str, Any],
    report: Mapping[str, Any],
    *,
    judged: DatasetVersion,
    key: str,
    notes: Sequence[str | None],
    row_ids: Mapping[int, Any],
    id_column: str | None,
    history: Sequence[PastVerdict],
) -> str | None:
    """Write the page, and the whole result in Great Expectations' shape beside it; equal work finds what is there.

    :param report: validation result with all expectations, in Great Expectations' shape.
    :param key: of this work.
    :returns: its address; ``None`` where it could not be written, which is logged: the verdict stands without it.
    """
    page = describe_validation(
        outcome,
        report["results"],
        judged=judged,
        notes=notes,
        row_ids=row_ids,
        id_column=id_column,
        history=history,
    ).to_html()
    try:
        return _upload(services, outcome, report, page, judged, key)
    except (MLOpsError, OSError, ValueError) as err:
        logger.warning("the page of this validation could not be written: %s", err)
        return None


def _upload(
    services: Services,
    outcome: Mapping[str, Any],
    report: Mapping[str, Any],
    page: str,
    judged: DatasetVersion,
    key: str,
) -> str:
    from airflow_mlops.integrations.mlflow import Registry

    registry = Registry.connect(services)
    table = judged.uri.rstrip("/").rsplit("/", 1)[-1]
    experiment_id = registry.experiment_id(VALIDATION_EXPERIMENT.format(table=table))
    finished = registry.finished_run(experiment_id, key)
    if finished is not None:
        return registry.run_url(experiment_id, str(finished.info.run_id), PAGE_FILE)
    what = f"the page of the validation of {judged.uri} version {judged.version}"
    registry.take_over_dead_runs(experiment_id, key, what)
    tags = {
        "airflow_mlops.table": judged.uri,
        "airflow_mlops.verdict": "passed" if outcome["success"] else "failed",
    }
    name = f"{table} version {judged.version}"
    with registry.leased_run(experiment_id, name, step_key=key, what=what, tags=tags) as run_id:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            (folder / PAGE_FILE).write_text(page, encoding="utf-8")
            (folder / RESULT_FILE).write_text(
                json.dumps(json_safe(report), default=str, ensure_ascii=False, indent=1), encoding="utf-8"
            )
            registry.upload(run_id, folder, "")
        registry.log_dataset(run_id, judged, "validation")
    return registry.run_url(experiment_id, run_id, PAGE_FILE)
