"""Judging rows by compiled expectations: counts in one streaming pass, evidence from the rows that break them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from airflow_mlops.core.checks.expectation_rules import ROWS, RowRule, Rule, TableRule, UniqueRule, enough
from airflow_mlops.core.checks.expectations import compile_expectation
from airflow_mlops.core.data.dataset import row_count

if TYPE_CHECKING:
    import polars as pl

Expectation = Mapping[str, Any]

#: How many offending values a result shows; Great Expectations shows as many.
SHOWN_VALUES = 20

#: Rows whose values are told apart at once. More are taken in several goes, by hash, so that memory does not grow with them.
_ROWS_AT_ONCE = 2_000_000

#: Names that no column has, for what is counted beside the columns.
_ROW, _TIMES = "\0row", "\0times"


def judge_compiled(frame: pl.LazyFrame, expectations: Sequence[Expectation]) -> list[dict[str, Any] | None]:
    """Judge what can be judged in polars.

    :param frame: the rows; read once, and once more for each expectation whose evidence has to be found.
    :returns: per expectation its result in the shape of Great Expectations' ``SUMMARY``; ``None`` where it has to judge.
    """
    schema = frame.collect_schema()
    rules = [compile_expectation(item["type"], item.get("kwargs", {}), schema) for item in expectations]
    measures = _measure(frame, rules)
    return [
        None
        if rule is None or any(measures[name] for name in rule.guards)
        else _result(item, rule, _Counted(frame, measures, index))
        for index, (item, rule) in enumerate(zip(expectations, rules, strict=True))
    ]


def unexpected_rows(schema: pl.Schema, expectations: Iterable[Expectation]) -> dict[int, pl.Expr]:
    """Give what is true on the rows that break an expectation, by its position, for those that judge rows one by one.

    :returns: nothing for an expectation that is not covered, or not about single rows.
    """
    found = {}
    for index, item in enumerate(expectations):
        rule = compile_expectation(item["type"], item.get("kwargs", {}), schema)
        if isinstance(rule, RowRule):
            found[index] = rule.unexpected()
    return found


def shape_result(
    item: Expectation, *, success: bool, result: Mapping[str, Any], engine: str
) -> dict[str, Any]:
    """Give a result in Great Expectations' shape.

    :param engine: who judged.
    """
    return {
        "success": success,
        "expectation_config": {
            "type": item["type"],
            "kwargs": dict(item.get("kwargs", {})),
            "severity": item.get("severity", "critical"),
        },
        "result": dict(result),
        "exception_info": {"raised_exception": False, "exception_message": None, "exception_traceback": None},
        "meta": {"engine": engine},
    }


class _Counted:
    """What was counted about the rows, and the rows themselves for what was not."""

    def __init__(self, frame: pl.LazyFrame, measures: Mapping[str, Any], index: int) -> None:
        self.frame = frame
        self.measures = measures
        self.rows: int = measures[ROWS]
        self.considered: int = measures.get(f"considered:{index}", self.rows)
        self.unexpected: int = measures.get(f"unexpected:{index}", 0)


def _measure(frame: pl.LazyFrame, rules: Sequence[Rule | None]) -> dict[str, Any]:
    """Count everything in one pass, but for what needs a column as a whole."""
    wanted: dict[str, pl.Expr] = {ROWS: row_count()}
    apart = [rule.apart for rule in rules if isinstance(rule, TableRule) and rule.apart is not None]
    for index, rule in enumerate(rules):
        if rule is None:
            continue
        wanted |= rule.guards
        if isinstance(rule, TableRule):
            wanted |= rule.measures
            continue
        if rule.considered is not None:
            wanted[f"considered:{index}"] = rule.considered.sum()
        if isinstance(rule, RowRule):
            wanted[f"unexpected:{index}"] = rule.unexpected().sum()
    measured = frame.select(**wanted).collect(engine="streaming").row(0, named=True)
    for measure in apart:
        measured |= measure(frame, _ROWS_AT_ONCE)
    return measured


def _result(item: Expectation, rule: Rule, counted: _Counted) -> dict[str, Any]:
    if isinstance(rule, TableRule):
        success, shown = rule.judge(counted.measures)
        return shape_result(item, success=success, result=shown, engine="polars")
    if isinstance(rule, UniqueRule):
        unexpected, first = _repeated(counted.frame, rule, counted.considered)
        evidence = _repeated_rows(counted.frame, rule, first) if unexpected else []
    else:
        unexpected = counted.unexpected
        evidence = _broken_rows(counted.frame, rule) if unexpected else []
    return shape_result(
        item,
        success=enough(counted.considered, unexpected, rule.mostly),
        result=_counts(rule, counted, unexpected) | _evidence(rule, evidence),
        engine="polars",
    )


def _counts(rule: RowRule | UniqueRule, counted: _Counted, unexpected: int) -> dict[str, Any]:
    of_all = _percent(unexpected, counted.rows)
    counts = {"element_count": counted.rows, "unexpected_count": unexpected}
    if rule.considered is None:
        return counts | {"unexpected_percent": of_all}
    absent = counted.rows - counted.considered
    of_considered = _percent(unexpected, counted.considered)
    return counts | {
        "unexpected_percent": of_considered,
        "missing_count": absent,
        "missing_percent": _percent(absent, counted.rows),
        "unexpected_percent_total": of_all,
        "unexpected_percent_nonmissing": of_considered,
    }


def _percent(part: int, whole: int) -> float | None:
    return part / whole * 100 if whole else None


def _evidence(rule: RowRule | UniqueRule, rows: list[dict[str, Any]]) -> dict[str, Any]:
    positions = [row.pop(_ROW) for row in rows]
    single = len(rule.shown) == 1
    tuples: list[Any] = [next(iter(row.values())) if single else tuple(row.values()) for row in rows]
    return {
        "partial_unexpected_list": rows
        if isinstance(rule, UniqueRule) and not single
        else [_shown(value) for value in tuples],
        "partial_unexpected_counts": _times(tuples),
        "partial_unexpected_index_list": positions,
    }


def _times(values: list[Any]) -> list[dict[str, Any]]:
    try:
        counts = Counter(values)
    except TypeError:  # lists and structures; Great Expectations says it in these words
        return [{"error": "partial_exception_counts requires a hashable type"}]
    return [{"value": _shown(value), "count": count} for value, count in _in_order(counts)]


def _shown(value: Any) -> Any:
    """Give a value as Great Expectations shows it, which knows neither decimals nor bytes in JSON."""
    if isinstance(value, Decimal):
        return float(value)
    return str(value) if isinstance(value, bytes) else value


def _in_order(counts: Counter[Any]) -> list[tuple[Any, int]]:
    try:
        return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    except TypeError:  # some are missing
        return sorted(counts.items(), key=lambda pair: (-pair[1], str(pair[0])))


def _broken_rows(frame: pl.LazyFrame, rule: RowRule) -> list[dict[str, Any]]:
    found = frame.with_row_index(_ROW).filter(rule.unexpected()).select(_ROW, *rule.shown)
    return found.head(SHOWN_VALUES).collect(engine="streaming").rows(named=True)


def _repeated(frame: pl.LazyFrame, rule: UniqueRule, considered: int) -> tuple[int, pl.DataFrame]:
    """Count the rows that share their values with others.

    :returns: with the count, the repeated values that come first: those of the first rows to be shown.
    """
    import polars as pl

    keys = _considered_keys(frame, rule)
    parts = considered // _ROWS_AT_ONCE + 1
    count, first = 0, []
    for part in range(parts):
        mine = keys.filter(pl.struct(rule.columns).hash() % parts == part) if parts > 1 else keys
        times = mine.group_by(rule.columns).agg(pl.len().alias(_TIMES), pl.col(_ROW).min())
        found = times.filter(pl.col(_TIMES) > 1).collect(engine="streaming")
        count += int(found[_TIMES].sum())
        first.append(found.bottom_k(SHOWN_VALUES, by=_ROW))
    return count, pl.concat(first).bottom_k(SHOWN_VALUES, by=_ROW).select(rule.columns)


def _considered_keys(frame: pl.LazyFrame, rule: UniqueRule) -> pl.LazyFrame:
    """Give the rows that count, with NaN as the null it is to pandas."""
    import polars as pl

    schema = frame.collect_schema()
    values = [
        pl.col(name).fill_nan(None) if schema[name].is_float() else pl.col(name) for name in rule.columns
    ]
    return frame.with_row_index(_ROW).filter(rule.considered).select(_ROW, *values)


def _repeated_rows(frame: pl.LazyFrame, rule: UniqueRule, first: pl.DataFrame) -> list[dict[str, Any]]:
    found = _considered_keys(frame, rule).join(
        first.lazy(), on=list(rule.columns), how="semi", nulls_equal=True, maintain_order="left"
    )
    return found.head(SHOWN_VALUES).collect(engine="streaming").rows(named=True)
