"""What judged expectations mean: who gates, in which words it is told, and as what quality others read it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]

#: Great Expectations' own words; only the first gates.
SEVERITIES = ("critical", "warning", "info")

#: A result tells of this many failed expectations; the rest is counted.
SHOWN_FAILURES = 10
#: Of each, so many values are shown.
SHOWN_EXAMPLES = 5
#: Name under which Airflow's data quality provider looks for a summary in an asset's event.
QUALITY_KEY = "airflow.dataquality.result"
#: What a failed expectation that does not gate costs of the score, as in that provider.
_WARNED = 0.25

_SHOWN_WIDTH = 60
#: Of an argument, or an observed value, so many items and characters of each: a set may have thousands.
_ITEMS, _CHARACTERS = 20, 100
#: What a result says without showing a value.
_COUNTS = frozenset({"element_count", "unexpected_count", "missing_count", "missing_percent"}) | {
    f"unexpected_percent{ending}" for ending in ("", "_total", "_nonmissing")
}
#: Of an expectation, what people and inference write about it, which may quote values.
_WORDS = ("notes", "description", "meta")
#: Arguments that name what an expectation is about, not what it asks.
SUBJECTS = ("column", "column_A", "column_B", "column_list")


def gates(result: Result) -> bool:
    """Tell whether a judged expectation stops the dataset."""
    return not result["success"] and result["expectation_config"]["severity"] == SEVERITIES[0]


def name_expectation(config: Mapping[str, Any]) -> str:
    """Give an expectation in one line.

    >>> name_expectation({"type": "expect_column_values_to_be_between", "kwargs": {"column": "fare", "min_value": 0}})
    'expect_column_values_to_be_between(fare, min_value=0)'
    """
    kwargs = config.get("kwargs", {})
    subjects = [_join(kwargs[name]) for name in SUBJECTS if kwargs.get(name)]
    asked = [f"{name}={value}" for name, value in kwargs.items() if name not in SUBJECTS]
    return f"{config['type']}({', '.join(subjects + asked)})"[:200]


def hide_values(results: Iterable[Result], private: Collection[str]) -> list[dict[str, Any]]:
    """Leave out what expectations show of private columns: values, positions and what was observed; counts stay.

    An expectation of Great Expectations' own that names no column may show any, and is told without values as well.

    >>> shown = {"unexpected_count": 1, "partial_unexpected_list": ["Ann"], "observed_value": None}
    >>> result = {"expectation_config": {"kwargs": {"column": "name"}}, "result": shown, "meta": {"engine": "polars"}}
    >>> hide_values([result], ["name"])[0]["result"]
    {'unexpected_count': 1, 'values_hidden': True}
    """
    return [
        {**result, "result": _without_values(result["result"])}
        if may_show(result["expectation_config"]["kwargs"], private, result["meta"]["engine"])
        else dict(result)
        for result in results
    ]


def hide_arguments(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Leave out what expectations with hidden values ask for: limits and sets are often taken from data.

    >>> config = {"type": "expect_column_values_to_be_in_set", "kwargs": {"column": "name", "value_set": ["Ann"], "mostly": 0.9}}
    >>> hide_arguments([{"expectation_config": config, "result": {"values_hidden": True}}])[0]["expectation_config"]["kwargs"]
    {'column': 'name', 'mostly': 0.9}
    """
    return [
        {**result, "expectation_config": without_arguments(result["expectation_config"])}
        if result["result"].get("values_hidden")
        else dict(result)
        for result in results
    ]


def without_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give an expectation with what it is about, and without what it asks and what is written about it."""
    kept = {name: value for name, value in config.get("kwargs", {}).items() if name in (*SUBJECTS, "mostly")}
    return {name: value for name, value in config.items() if name not in _WORDS} | {"kwargs": kept}


def tell_failures(results: Iterable[Result], ids: Mapping[int, Any] | None = None) -> list[dict[str, Any]]:
    """Give the failed expectations briefly, those that gate first.

    :param ids: what names a row, by its position; then ``row_ids`` tells the rows.
    """
    failed = sorted(
        (result for result in results if not result["success"]),
        key=lambda result: SEVERITIES.index(result["expectation_config"]["severity"]),
    )
    return [_brief(result, ids or {}) for result in failed[:SHOWN_FAILURES]]


def shown_positions(results: Iterable[Result]) -> set[int]:
    """Find the positions of the rows that failed expectations show."""
    return {
        position
        for result in results
        if not result["success"]
        for position in result["result"].get("partial_unexpected_index_list") or []
        if isinstance(position, int)
    }


def tell_verdict(results: Sequence[Result], row_count: int) -> str:
    """Give the verdict in one line, and the first expectation that broke.

    >>> tell_verdict([{"success": True}], 7)
    'all 1 expectations hold on 7 rows'
    """
    failures = tell_failures(results)
    if not failures:
        return f"all {len(results)} expectations hold on {row_count} rows"
    count = sum(not result["success"] for result in results)
    gating = sum(gates(result) for result in results)
    first = failures[0]
    rows = f" ({first['unexpected_count']} rows)" if first["unexpected_count"] is not None else ""
    more = f" and {count - 1} more" if count > 1 else ""
    none = "" if gating == count else f", {gating or 'none'} of them critical"
    return (
        f"{count} of {len(results)} expectations failed on {row_count} rows{none}: "
        f"{first['expectation']} on {_join(first['kwargs'].get('column', 'the table'))}{rows}{more}"
    )


def draw_failures(failures: Sequence[Mapping[str, Any]]) -> str:
    """Lay failed expectations out as a table for a task's log.

    >>> fare = {"expectation": "expect_column_values_to_be_between", "kwargs": {"column": "fare", "min_value": 0}}
    >>> fare |= {"unexpected_count": 66, "unexpected_percent": 0.66, "observed_value": None, "examples": ["-4.0", "-52.0"]}
    >>> print(draw_failures([fare | {"severity": "critical", "row_ids": ["a7", "b9"]}]))
    severity  expectation                                            broken       examples
    critical  expect_column_values_to_be_between(fare, min_value=0)  66 (0.66 %)  -4.0, -52.0; rows a7, b9
    """
    lines = [("severity", "expectation", "broken", "examples")]
    for failure in failures:
        count, percent = failure["unexpected_count"], failure["unexpected_percent"]
        share = f" ({percent:.3g} %)" if percent is not None else ""
        seen = failure.get("row_ids") or []
        rows = f"; rows {', '.join(map(str, seen[:SHOWN_EXAMPLES]))}" if seen else ""
        lines.append(
            (
                failure["severity"],
                name_expectation({"type": failure["expectation"], "kwargs": failure["kwargs"]}),
                f"observed {failure['observed_value']}" if count is None else f"{count}{share}",
                ", ".join(failure["examples"]) + rows,
            )
        )
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        "  ".join([*(text.ljust(width) for text, width in zip(line, widths, strict=False)), line[3]]).rstrip()
        for line in lines
    )


def sum_up_quality(
    *,
    key: str,
    suite_name: str | None,
    table: str,
    evaluated: int,
    failed: int,
    failed_critical: int,
    failures: Iterable[Mapping[str, Any]],
) -> dict[str, Any]:
    """Give a verdict in the words of Airflow's ``common.dataquality``, whose ``require_quality`` gates on ``score``.

    :param key: of this run of the suite.
    :param failures: as :func:`tell_failures` gives them; their names are bounded as they are.
    :returns: ``score`` is the share of expectations that hold, where one that failed and is not critical counts a quarter.

    >>> sum_up_quality(key="k", suite_name="s", table="t", evaluated=10, failed=3, failed_critical=1, failures=[])["score"]
    0.85
    """
    told: dict[bool, list[str]] = {True: [], False: []}
    for failure in failures:
        name = name_expectation({"type": failure["expectation"], "kwargs": failure["kwargs"]})
        told[failure["severity"] == SEVERITIES[0]].append(name)
    warned = failed - failed_critical
    return {
        "run_uid": key,
        "ruleset": suite_name,
        "table": table,
        "score": round(1.0 - (failed_critical + _WARNED * warned) / evaluated, 4) if evaluated else None,
        "passed": evaluated - failed,
        "warned": warned,
        "failed": failed_critical,
        "errored": 0,
        "failed_rules": sorted(told[True]),
        "warned_rules": sorted(told[False]),
    }


def _without_values(found: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name in _COUNTS} | {"values_hidden": True}


def may_show(kwargs: Mapping[str, Any], private: Collection[str], engine: str) -> bool:
    """Tell whether what is said of an expectation may hold a value of a private column.

    :param engine: who judges.
    """
    named = {
        str(name)
        for value in kwargs.values()
        for name in (value if isinstance(value, list | tuple) else [value])
    }
    about = any(kwargs.get(name) for name in SUBJECTS)
    condition = str(kwargs.get("row_condition") or "")
    asked = bool(named & set(private)) or any(name in condition for name in private)
    return bool(private) and (asked or (not about and engine != "polars"))


def _brief(result: Result, ids: Mapping[int, Any]) -> dict[str, Any]:
    config, numbers = result["expectation_config"], result["result"]
    told = {
        "expectation": config["type"],
        "kwargs": _bounded(config["kwargs"]),
        "severity": config["severity"],
        "unexpected_count": numbers.get("unexpected_count"),
        "unexpected_percent": numbers.get("unexpected_percent"),
        "observed_value": _bounded(numbers.get("observed_value")),
        "examples": [
            str(value)[:_SHOWN_WIDTH] for value in numbers.get("partial_unexpected_list", [])[:SHOWN_EXAMPLES]
        ],
    }
    rows = [ids[one] for one in numbers.get("partial_unexpected_index_list") or [] if one in ids]
    return told | {"row_ids": [str(row)[:_SHOWN_WIDTH] for row in rows]} if rows else told


def _bounded(value: Any) -> Any:
    """Cut what may be of any length.

    >>> _bounded({"value_set": list(range(3000))})["value_set"][18:]
    [18, 19, '… 2980 more']
    """
    if isinstance(value, str):
        return value if len(value) <= _CHARACTERS else f"{value[:_CHARACTERS]}…"
    if isinstance(value, Mapping):
        return {name: _bounded(item) for name, item in list(value.items())[:_ITEMS]}
    if not isinstance(value, list | tuple | set | frozenset):
        return value
    more = [f"… {len(value) - _ITEMS} more"] if len(value) > _ITEMS else []
    return [_bounded(item) for item in list(value)[:_ITEMS]] + more


def _join(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
