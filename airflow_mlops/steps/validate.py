"""Validate: a Great Expectations suite over one window of a dataset version, and rows that break it set aside."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.checks.data_docs import PastVerdict
from airflow_mlops.core.checks.validation import unexpected_rows
from airflow_mlops.core.checks.verdict import (
    gates,
    hide_arguments,
    hide_values,
    name_expectation,
    shown_positions,
    tell_failures,
    tell_verdict,
    without_arguments,
)
from airflow_mlops.core.codec import to_dict
from airflow_mlops.core.data.dataset import DatasetVersion, count_rows
from airflow_mlops.core.windows import Window
from airflow_mlops.exceptions import InsufficientDataError
from airflow_mlops.integrations import delta, great_expectations
from airflow_mlops.steps.base import Step
from airflow_mlops.steps.common import DatasetRef, resolve_dataset, work_key
from airflow_mlops.steps.validation.named_rows import rows_by_name
from airflow_mlops.steps.validation.page import REPORTS, write_page
from airflow_mlops.steps.validation.quarantine import SetAside

if TYPE_CHECKING:
    import polars as pl

    from airflow_mlops.services import Services


ENGINES = ("auto", "great_expectations")


@dataclass(frozen=True, kw_only=True, slots=True)
class Quarantine:
    """Where rows go that break critical expectations, and how many may.

    :param table: URI of the Delta table; created when missing.
    :param budget: largest share of the rows, in ``[0, 1]``; with more nothing is written.
    """

    table: str
    budget: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.budget < 1.0:
            raise ValueError(
                f"quarantine_budget is a share of rows in [0, 1), got {self.budget}; 0.01 is one of a hundred"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidateSpec:
    """What to validate.

    :param dataset: dataset version, or table URI for its newest.
    :param suite: path of the suite's JSON file, or the suite itself.
    :param time_column: needed with ``window``.
    :param window: judge only these rows; ``None`` judges the whole version.
    :param engine: ``auto`` or ``great_expectations``.
    :param id_column: names the rows in the evidence.
    :param allow_empty: judge also where there are no rows.
    :param quarantine: set rows aside that break critical expectations; ``None`` leaves them.
    :param private_columns: columns whose values no evidence shows.
    :param expectation_modules: modules with expectations of one's own.
    :param report: when a page is written to MLflow, if the services name one: ``always``, ``failed`` (also where rows
        were set aside) or ``never``.
    :param history: earlier verdicts, for the page.
    """

    dataset: DatasetRef
    suite: str | dict[str, Any]
    time_column: str | None = None
    window: Window | None = None
    engine: str = "auto"
    id_column: str | None = None
    allow_empty: bool = False
    quarantine: Quarantine | None = None
    private_columns: tuple[str, ...] = ()
    expectation_modules: tuple[str, ...] = ()
    report: str = "always"
    history: tuple[PastVerdict, ...] = ()

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"unknown engine {self.engine!r}; known: {', '.join(ENGINES)}")
        if self.report not in REPORTS:
            raise ValueError(f"unknown report {self.report!r}; known: {', '.join(REPORTS)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidateResult:
    """Verdict of the suite, with the first failures.

    :param dataset: what goes on: the version that was judged, or the one without the rows that were set aside.
    :param success: no critical expectation failed, or the rows that broke one were set aside.
    :param row_count: rows that were judged.
    :param failed: expectations that failed, of any severity.
    :param failed_critical: of these, critical ones.
    :param failures: the first of them.
    :param quarantined: rows that were set aside.
    :param quarantine: where they are; its digest is that of its list of files.
    :param report_url: page that shows it; ``None`` when none was written.
    """

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
    failed_critical: int = 0
    quarantined: int = 0
    quarantine: DatasetVersion | None = None
    report_url: str | None = None


def run(spec: ValidateSpec, services: Services) -> ValidateResult:
    """Judge the suite, and set rows aside where that is asked for and enough.

    :raises InsufficientDataError: no rows; an empty window proves nothing.
    :raises ExpectationError: an expectation could not be evaluated.
    :raises CommitConflictError: the window was written again after the version that was judged; the table stays.
    """
    if spec.window is not None and spec.time_column is None:
        raise ValueError(
            "a window of a dataset needs time_column, which places a row in it; give no window to judge the whole dataset"
        )
    dataset = resolve_dataset(spec.dataset, time_column=spec.time_column)
    rows = delta.read_table(
        dataset.uri, version=dataset.version, window=spec.window, time_column=spec.time_column
    )
    named = [*spec.private_columns, *([spec.id_column] if spec.id_column is not None else [])]
    delta.require_columns(named, rows.collect_schema().names(), dataset.uri)
    row_count = count_rows(rows)
    if row_count == 0 and not spec.allow_empty:
        raise InsufficientDataError(f"window {spec.window} of {dataset.uri} has no rows: nothing to validate")
    suite = great_expectations.load_suite(spec.suite)
    report = great_expectations.validate_frame(
        rows, suite, engine=spec.engine, modules=spec.expectation_modules, private=spec.private_columns
    )
    results = report["results"]
    engines = [result["meta"]["engine"] for result in results]
    success = not any(map(gates, results))
    headline = tell_verdict(results, row_count)
    shown = hide_arguments(hide_values(results, spec.private_columns))
    aside = None
    if spec.quarantine is not None and not success:
        told, aside = _set_aside(spec, spec.quarantine, dataset, suite, rows, shown)
        headline = f"{headline}; {told}"
    ids = _ids(spec, rows, shown)
    outcome = ValidateResult(
        dataset=aside.kept if aside else dataset,
        window=spec.window,
        success=success or aside is not None,
        suite_name=report["suite_name"],
        row_count=row_count,
        evaluated=len(results),
        failed=sum(not result["success"] for result in results),
        failed_critical=sum(map(gates, results)),
        failures=tuple(tell_failures(shown, ids)),
        engines={engine: engines.count(engine) for engine in sorted(set(engines))},
        headline=headline,
        quarantined=aside.count if aside else 0,
        quarantine=aside.quarantined if aside else None,
    )
    wanted = spec.report == "always" or (spec.report == "failed" and outcome.failed)
    if services.tracking_uri is None or not wanted:
        return outcome
    url = write_page(
        services,
        to_dict(outcome),
        report | {"results": shown},
        judged=dataset,
        key=work_key("validate", to_dict(replace(spec, dataset=dataset, history=())), suite),
        notes=[item.get("notes") for item in _shown(suite, shown)],
        row_ids=ids,
        id_column=None if spec.id_column in spec.private_columns else spec.id_column,
        history=spec.history,
    )
    return replace(outcome, report_url=url)


def _shown(suite: dict[str, Any], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the suite's expectations as they may be shown, those with hidden values without arguments and notes."""
    return [
        without_arguments(item) if result["result"].get("values_hidden") else item
        for item, result in zip(suite["expectations"], results, strict=True)
    ]


def _ids(spec: ValidateSpec, rows: pl.LazyFrame, results: list[dict[str, Any]]) -> dict[int, Any]:
    """Name the rows that the evidence shows, by position."""
    import polars as pl

    positions = shown_positions(results) if spec.id_column is not None else set()
    if spec.id_column is None or spec.id_column in spec.private_columns or not positions:
        return {}
    named = rows.select(spec.id_column).with_row_index("\0row")
    wanted = pl.Series(sorted(positions), dtype=pl.get_index_type()).implode()
    return dict(named.filter(pl.col("\0row").is_in(wanted)).collect(engine="streaming").rows())


@dataclass(frozen=True, kw_only=True, slots=True)
class _Aside:
    """What was set aside, and what goes on."""

    count: int
    kept: DatasetVersion
    quarantined: DatasetVersion


def _set_aside(
    spec: ValidateSpec,
    quarantine: Quarantine,
    dataset: DatasetVersion,
    suite: dict[str, Any],
    rows: pl.LazyFrame,
    results: list[dict[str, Any]],
) -> tuple[str, _Aside | None]:
    """Divide the rows, if every critical expectation that failed is about single rows and few enough rows break one.

    :param results: with nothing private in them.
    :returns: what was done and why, in words; nothing was written where the second is ``None``.
    """
    import polars as pl

    names = [name_expectation(item) for item in _shown(suite, results)]
    schema = rows.collect_schema()
    failed = [index for index, result in enumerate(results) if gates(result)]
    theirs = [index for index in failed if results[index]["meta"]["engine"] != "polars"]
    compiled = unexpected_rows(schema, suite["expectations"])
    broken = {index: compiled[index] for index in failed if index in compiled and index not in theirs}
    if spec.id_column is not None:
        broken |= rows_by_name(
            rows, suite, theirs, id_column=spec.id_column, modules=spec.expectation_modules
        )
    beyond = [index for index in failed if index not in broken]
    if beyond:
        first = names[beyond[0]]
        without = ", or no id_column tells which rows Great Expectations means" if beyond[0] in theirs else ""
        return f"quarantine can't help: {first} is not about single rows{without}", None
    reasons = [(names[index], broken[index]) for index in failed]
    bad = pl.any_horizontal(*(one for _, one in reasons))
    count = int(rows.select(bad.sum()).collect(engine="streaming").item())
    total = count_rows(rows)
    share = f"{count} of {total} rows ({count / total:.3%})"
    if count / total > quarantine.budget:
        return f"{share} break a critical one, the quarantine's budget is {quarantine.budget:.3%}", None
    left = great_expectations.validate_frame(
        rows.filter(~bad),
        suite,
        engine=spec.engine,
        modules=spec.expectation_modules,
        private=spec.private_columns,
    )
    still = [index for index, result in enumerate(left["results"]) if gates(result)]
    if still:
        first = names[still[0]]
        return f"without the {count} rows that break a critical one, {first} still fails", None
    aside = SetAside(
        dataset=dataset,
        window=spec.window,
        time_column=spec.time_column,
        table=quarantine.table,
        reasons=reasons,
        count=count,
        # Another attempt would resolve a table to its newest version; a version is what it is.
        newest=isinstance(spec.dataset, str),
    )
    quarantined, kept = aside.write(suite["expectations"])
    return f"{share} are in {quarantine.table}, the rest goes on", _Aside(
        count=count, quarantined=quarantined, kept=kept
    )


STEP = Step(name="validate", spec=ValidateSpec, result=ValidateResult, run=run)
