"""The page of a validation: verdict, what each expectation asked and found, and the values that broke it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.checks.verdict import SEVERITIES, SUBJECTS, Result
from airflow_mlops.core.page import Page, Section, Table

if TYPE_CHECKING:
    from airflow_mlops.core.data.dataset import DatasetVersion

#: Most expectations a page shows of those that failed, and of those that hold; the rest is in ``validation.json``.
_EXPECTATIONS = 200
#: Most failed expectations whose values are shown.
_WITH_VALUES = 20
#: Longest value that is shown.
_WIDTH = 120


@dataclass(frozen=True, kw_only=True, slots=True)
class PastVerdict:
    """What an earlier validation of the same table concluded.

    :param recorded_at: when.
    :param version: of the table.
    :param window: what was judged of it, in words.
    :param success: whether it was accepted.
    :param headline: its verdict in one line.
    """

    recorded_at: datetime
    version: int
    window: str | None
    success: bool
    headline: str


def describe_validation(
    outcome: Mapping[str, Any],
    results: Sequence[Result],
    *,
    judged: DatasetVersion,
    notes: Sequence[str | None] = (),
    row_ids: Mapping[int, Any] | None = None,
    id_column: str | None = None,
    history: Iterable[PastVerdict] = (),
) -> Page:
    """Compose the page of a validation.

    :param outcome: result of the step.
    :param results: every expectation's, in Great Expectations' shape, with values that may be shown.
    :param judged: the version that was judged; where rows were set aside another one goes on.
    :param notes: what the suite says of each expectation beside its arguments.
    :param row_ids: what names a row, by its position.
    :param id_column: column the names are from.
    :param history: earlier verdicts, the newest first.
    """
    told = list(zip(results, [*notes, *[None] * len(results)], strict=False))
    failed = sorted((one for one in told if not one[0]["success"]), key=lambda one: _rank(one[0]))
    sections = (
        _dataset(outcome, judged),
        _aside(outcome),
        Section(title="Failed", tables=_listed("Expectations that failed", failed)),
        *(_values(one, row_ids or {}, id_column) for one in failed[:_WITH_VALUES]),
        Section(title="Held", tables=_listed("Expectations that hold", [one for one in told if one[0]["success"]])),
        _history(history),
    )  # fmt: skip
    return Page(
        title=f"{_name(judged.uri)}: validation",
        lead=str(outcome["headline"]),
        verdict=_verdict(outcome),
        sections=tuple(section for section in sections if not section.empty),
    )


def _verdict(outcome: Mapping[str, Any]) -> str:
    if not outcome["success"]:
        return "failed"
    return "quarantined" if outcome.get("quarantine") else "passed"


def _name(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1]


def _rank(result: Result) -> int:
    return SEVERITIES.index(result["expectation_config"]["severity"])


def _dataset(outcome: Mapping[str, Any], judged: DatasetVersion) -> Section:
    window = outcome.get("window")
    other = outcome["failed"] - outcome["failed_critical"]
    facts = (
        ("Table", judged.uri),
        ("Version judged", str(judged.version)),
        ("Digest", judged.dataset_digest),
        ("Window", f"{window['start']} to {window['end']}" if window else "the whole version"),
        ("Rows judged", f"{outcome['row_count']:,}"),
        ("Suite", str(outcome.get("suite_name") or "without a name")),
        ("Expectations", f"{outcome['evaluated']} judged; {outcome['failed_critical']} critical and {other} other ones failed"),
        ("Judged by", ", ".join(f"{engine} ({count})" for engine, count in outcome["engines"].items())),
    )  # fmt: skip
    return Section(title="Dataset", facts=facts)


def _aside(outcome: Mapping[str, Any]) -> Section:
    """Tell where rows were set aside, if any were."""
    aside = outcome.get("quarantine")
    if not aside:
        return Section(title="Quarantine")
    count, kept = outcome["quarantined"], outcome["dataset"]
    return Section(
        title="Quarantine",
        facts=(
            ("Rows set aside", f"{count:,} of {outcome['row_count']:,} ({_percent(100 * count / outcome['row_count'])})"),
            ("They are in", f"{aside['uri']}, version {aside['version']}"),
            ("What goes on", f"version {kept['version']} with {kept['row_count']:,} rows"),
        ),
    )  # fmt: skip


def _listed(title: str, told: Sequence[tuple[Result, str | None]]) -> tuple[tuple[str, Table], ...]:
    if not told:
        return ()
    more = f" (the first {_EXPECTATIONS} of {len(told)})" if len(told) > _EXPECTATIONS else ""
    header = ("Expectation", "Allowed", "Observed", "Missing", "Severity", "Engine")
    noted = any(note for _, note in told[:_EXPECTATIONS])
    rows = tuple(
        (*_row(result), note or "") if noted else _row(result) for result, note in told[:_EXPECTATIONS]
    )
    return ((title + more, Table(header=(*header, "Note") if noted else header, rows=rows)),)  # fmt: skip


def _row(result: Result) -> tuple[str, ...]:
    config, found = result["expectation_config"], result["result"]
    return (
        _subject(config),
        _allowed(config["kwargs"]),
        _observed(found),
        f"{found['missing_count']:,}" if found.get("missing_count") else "",
        config["severity"],
        str(result["meta"]["engine"]).replace("_", " "),
    )


def _subject(config: Mapping[str, Any]) -> str:
    """Give an expectation's type, and the columns it is about.

    >>> _subject({"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "fare"}})
    'column values to not be null (fare)'
    """
    about = [config["kwargs"][name] for name in SUBJECTS if config["kwargs"].get(name)]
    words = config["type"].removeprefix("expect_").replace("_", " ")
    columns = ", ".join(
        ", ".join(map(str, one)) if isinstance(one, list | tuple) else str(one) for one in about
    )
    return f"{words} ({columns})" if columns else words  # fmt: skip


def _allowed(kwargs: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{name} {_value(value)}"
        for name, value in kwargs.items()
        if name not in SUBJECTS and value is not None
    )


def _observed(found: Mapping[str, Any]) -> str:
    count = found.get("unexpected_count")
    if count is None:
        observed = found.get("observed_value")
        text = f"{observed:.6g}" if isinstance(observed, float) else _value(observed)
        return text if observed is not None else ""
    percent = found.get("unexpected_percent")
    share = f" ({_percent(percent)})" if count and percent is not None else ""
    return f"{count:,} unexpected{share}"


def _percent(percent: float) -> str:
    return f"{percent:.3g} %"


def _values(one: tuple[Result, str | None], row_ids: Mapping[int, Any], id_column: str | None) -> Section:
    """Show values that broke an expectation, by the rows they are in where these have names."""
    config, found = one[0]["expectation_config"], one[0]["result"]
    values = found.get("partial_unexpected_list") or []
    positions = found.get("partial_unexpected_index_list") or []
    if found.get("values_hidden"):
        return Section(title=_subject(config), notes=("Its values are not shown: a column is private.",))
    named = [row_ids.get(position) for position in positions if isinstance(position, int)]
    if id_column and len(named) == len(values) and any(name is not None for name in named):
        header = (id_column, "Value")
        rows = tuple((_value(name), _value(value)) for name, value in zip(named, values, strict=True))
    else:
        header = ("Value", "Times among those shown")
        counts = found.get("partial_unexpected_counts") or []
        if any("value" not in item for item in counts):  # values that can't be counted, such as lists
            counts = [{"value": value} for value in values]
        rows = tuple((_value(item["value"]), str(item.get("count", ""))) for item in counts)
    if not rows:
        return Section(title=_subject(config))
    title = f"The first {len(values)} of {found.get('unexpected_count', len(values)):,}"
    return Section(title=_subject(config), tables=((title, Table(header=header, rows=rows)),))


def _history(history: Iterable[PastVerdict]) -> Section:
    rows = tuple(
        (
            f"{past.recorded_at:%Y-%m-%d %H:%M} UTC",
            str(past.version),
            past.window or "the whole version",
            "accepted" if past.success else "not accepted",
            past.headline,
        )
        for past in history
    )
    header = ("When", "Version", "Window", "Verdict", "Why")
    return Section(
        title="Before", tables=(("Earlier verdicts on this table", Table(header=header, rows=rows)),) if rows else ()
    )  # fmt: skip


def _value(value: Any) -> str:
    """Give a value as text in which what can't be seen is named.

    >>> _value(None), _value(""), _value(" a"), _value(0.1), _value(["a", 1])
    ('missing', "''", "' a'", '0.1', 'a, 1')
    """
    if value is None or value != value or str(value) == "NaT":  # NaN
        return "missing"
    if isinstance(value, list | tuple):
        return ", ".join(map(_value, value))[:_WIDTH]
    text = str(value)
    shown = text if isinstance(value, str) and text and text == text.strip() else None
    text = shown if shown is not None else repr(value) if isinstance(value, str) else text
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"
