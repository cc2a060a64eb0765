"""Validate: a Great Expectations suite over one window of a dataset version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.dataset import DatasetVersion
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import InsufficientDataError
from airflow_mlops.integrations import delta, great_expectations
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import DatasetRef, resolve_dataset

if TYPE_CHECKING:
    from airflow_mlops.services import Services

#: A result shows this many failed expectations; the rest is counted.
SHOWN_FAILURES = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidateSpec:
    """What to validate.

    :param dataset: dataset version, or table URI for its newest.
    :param suite: path of the suite's JSON file, or the suite itself.
    :param time_column: needed with ``window``.
    :param window: judge only these rows; ``None`` judges the whole version.
    :param engine: ``auto`` or ``great_expectations``.
    """

    dataset: DatasetRef
    suite: str | dict[str, Any]
    time_column: str | None = None
    window: Window | None = None
    engine: str = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidateResult:
    """Verdict of the suite, with the first failures."""

    dataset: DatasetVersion
    window: Window | None
    success: bool
    suite_name: str | None
    row_count: int
    evaluated: int
    failed: int
    failures: tuple[dict[str, Any], ...]
    engines: dict[str, int]
    headline: str


def run(spec: ValidateSpec, services: Services) -> ValidateResult:
    """Judge the suite.

    :raises InsufficientDataError: no rows; an empty window proves nothing.
    :raises ExpectationError: an expectation could not be evaluated.
    """
    if spec.window is not None and spec.time_column is None:
        raise ValueError(
            "a window of a dataset needs time_column, which places a row in it; give no window to judge the whole dataset"
        )
    dataset = resolve_dataset(spec.dataset, time_column=spec.time_column)
    rows = delta.read_table(
        dataset.uri, version=dataset.version, window=spec.window, time_column=spec.time_column
    ).collect()
    if rows.height == 0:
        raise InsufficientDataError(f"window {spec.window} of {dataset.uri} has no rows: nothing to validate")
    suite = great_expectations.load_suite(spec.suite)
    report = great_expectations.validate_frame(rows, suite, engine=spec.engine)
    failed = [result for result in report["results"] if not result["success"]]
    engines = [result["meta"]["engine"] for result in report["results"]]
    return ValidateResult(
        dataset=dataset,
        window=spec.window,
        success=report["success"],
        suite_name=report["suite_name"],
        row_count=rows.height,
        evaluated=len(report["results"]),
        failed=len(failed),
        failures=tuple(_brief(result) for result in failed[:SHOWN_FAILURES]),
        engines={engine: engines.count(engine) for engine in sorted(set(engines))},
        headline=_headline(failed, len(report["results"]), rows.height),
    )


def _brief(result: dict[str, Any]) -> dict[str, Any]:
    config, numbers = result["expectation_config"], result["result"]
    return {
        "expectation": config["type"],
        "kwargs": config["kwargs"],
        "severity": config["severity"],
        "unexpected_count": numbers.get("unexpected_count"),
        "unexpected_percent": numbers.get("unexpected_percent"),
        "observed_value": numbers.get("observed_value"),
        "examples": [str(value)[:60] for value in numbers.get("partial_unexpected_list", [])[:5]],
    }


def _headline(failed: list[dict[str, Any]], total: int, row_count: int) -> str:
    if not failed:
        return f"all {total} expectations hold on {row_count} rows"
    first = failed[0]["expectation_config"]
    column = first["kwargs"].get("column", "the table")
    count = failed[0]["result"].get("unexpected_count")
    rows = f" ({count} rows)" if count is not None else ""
    more = f" and {len(failed) - 1} more" if len(failed) > 1 else ""
    return f"{len(failed)} of {total} expectations failed on {row_count} rows: {first['type']} on {column}{rows}{more}"


STEP = Step(name="validate", spec=ValidateSpec, result=ValidateResult, run=run)
