"""The contract of a model's training as expectations of what its service is asked, and values that differ for the same row."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from airflow_mlops.core.profiles.profile_columns import CategoricalProfile, NumericProfile

if TYPE_CHECKING:
    import polars as pl

    from airflow_mlops.core.model.signature import FieldSpec
    from airflow_mlops.core.profiles.profile import Profile
    from airflow_mlops.core.profiles.profile_columns import ColumnProfile

Expectation = Mapping[str, Any]

#: How GX's pandas engine names what a log holds of an input.
TYPES = {"number": "float64", "string": "str"}
#: Behind the name of an input, the same in the training table.
TABLE = " (table)"
#: So many standard errors are left to chance: inputs are many, and each window is judged.
_SIGMAS = 4.0
#: Share of the rows that differ that have to follow a pattern for it to be told.
_PATTERN_SHARE = 0.9
#: Arguments that name columns.
_COLUMNS = ("column", "column_A", "column_B", "column_list", "column_set")

Pattern = Literal["default", "factor", "offset", "missing", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedDifference:
    """An input whose value at the service is another one than in the training table, for the same row.

    :param feature: the input.
    :param rows: rows that were compared.
    :param different: rows whose values differ.
    :param share: of the rows, in ``[0, 1]``.
    :param pattern: how: ``default`` (the service has one value for all of them), ``factor`` or ``offset`` (a unit, or a way of
        computing it), ``missing`` (null at the service) or ``none``.
    :param value: the default, factor (served by table) or offset (served less table), as text; empty with the other patterns.
    :param examples: first rows: prediction id, served and table's value.
    """

    feature: str
    rows: int
    different: int
    share: float
    pattern: Pattern
    value: str
    examples: tuple[dict[str, str | None], ...]


def contract_of(
    fields: Iterable[FieldSpec], trained: Profile, *, share: float, rows: int, there: Mapping[str, int]
) -> list[dict[str, Any]]:
    """Give what a model's package says of its training rows as expectations.

    They are those that :func:`airflow_mlops.core.checks.skew.find_skew` judges from profiles; here rows are judged, so that they can be named,
    and few requests may be unlike the training by chance.

    :param trained: profile of the training rows.
    :param share: share of the requests that may be unlike the training rows, beyond those rows that already were.
    :param rows: how many requests are judged.
    :param there: in how many of them an input is not null; those that are not there were never sent.
    """
    found = []
    for item in fields:
        profile = trained.column(item.name)
        found.append(_expect("column_to_exist", item.name, "the model takes it"))
        nulls = profile.null_count / max(profile.row_count, 1)
        found.append(
            _expect(
                "column_values_to_not_be_null",
                item.name,
                f"null in {nulls:.2%} of the training rows",
                mostly=_mostly(nulls + share, profile.row_count, rows),
            )
        )
        found += _of_values(profile, share, there.get(item.name, 0))
    return found


def _of_values(profile: ColumnProfile, share: float, rows: int) -> list[dict[str, Any]]:
    if isinstance(profile, NumericProfile) and profile.layout.kind == "number" and profile.count:
        limits = _limits(profile)
        note = "the smallest and the largest of the training"
        mostly = _mostly(share, profile.count, rows)
        return [_expect("column_values_to_be_between", profile.name, note, mostly=mostly, **limits)]
    if isinstance(profile, CategoricalProfile) and profile.layout.kind == "category" and profile.count:
        others = profile.other_count / profile.count
        note = (
            f"categories of the training; {others:.2%} of its rows had others, too rare to be known by name"
        )
        values, mostly = list(profile.layout.categories), _mostly(others + share, profile.count, rows)
        return [_expect("column_values_to_be_in_set", profile.name, note, value_set=values, mostly=mostly)]
    return []


def _limits(profile: NumericProfile) -> dict[str, Any]:
    """Give the smallest and the largest training value; of 32 bits so that the same number in more digits, or in fewer, is inside."""
    low, high = profile.minimum or 0.0, profile.maximum or 0.0
    if profile.layout.is_single:
        low, high = min(low, float(str(np.float32(low)))), max(high, float(str(np.float32(high))))
    return {"min_value": low, "max_value": high}


def _conditional_on(condition: Any) -> set[str]:
    """Find the columns that a row condition names, in each of the forms Great Expectations takes.

    >>> sorted(_conditional_on('`odd name` > 1 and kind == "a" and fare.notnull()')), _conditional_on('col("fare") > 1')
    (['fare', 'kind', 'odd name'], {'fare'})
    >>> _conditional_on({"type": "comparison", "column": {"name": "fare"}, "operator": ">", "parameter": 1})
    {'fare'}
    """
    if isinstance(condition, Mapping):
        column = condition.get("column")
        own = {str(column["name"])} if isinstance(column, Mapping) and "name" in column else set()
        inner = [one for one in condition.values() if isinstance(one, Mapping | list)]
        return own.union(*map(_conditional_on, inner))
    if isinstance(condition, list):
        return set().union(*(_conditional_on(one) for one in condition if isinstance(one, Mapping)))
    if not isinstance(condition, str):
        return set()
    called = set(re.findall(r"""col\(["']([^"']+)["']\)""", condition))
    if called:
        return called
    quoted = set(re.findall("`([^`]+)`", condition))
    try:
        tree = ast.parse(re.sub("`[^`]+`", "None", condition.strip()), mode="eval")
    except SyntaxError:  # Great Expectations says what is wrong with it
        return quoted
    called_by = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return quoted | {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called_by
    }


def about_inputs(
    expectations: Iterable[Expectation], inputs: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Divide a training suite: what is about inputs of the model, and what says nothing of requests (labels, keys, the table).

    >>> fare = {"type": "expect_column_values_to_not_be_null", "kwargs": {"column": "fare"}}
    >>> rows = {"type": "expect_table_row_count_to_equal", "kwargs": {"value": 9}}
    >>> about_inputs([fare, rows], ["fare"]) == ([fare], [rows])
    True
    """
    kept: list[dict[str, Any]] = []
    left: list[dict[str, Any]] = []
    for item in expectations:
        named = [item.get("kwargs", {}).get(name) for name in _COLUMNS]
        columns = {one for value in named if value for one in ([value] if isinstance(value, str) else value)}
        columns |= _conditional_on(item.get("kwargs", {}).get("row_condition"))
        about = bool(columns) and columns <= set(inputs) and not item["type"].startswith("expect_table")
        (kept if about else left).append(dict(item))
    return kept, left


def as_contract(
    frame: pl.DataFrame, fields: Iterable[FieldSpec]
) -> tuple[pl.DataFrame, list[dict[str, Any]]]:
    """Give logged inputs as the model declares them.

    :returns: with the rows what of them is no such value: an input of another type, by what is left of it. An infinite number is
        none, too; NaN is a missing one.
    """
    import polars as pl

    problems: list[dict[str, Any]] = []
    for item in fields:
        if item.name not in frame.columns:
            continue
        column = frame[item.name]
        wanted = pl.Float64 if item.type == "number" else pl.String
        cast = column.cast(wanted, strict=False)
        lost = column.is_not_null() & cast.is_null()
        if column.dtype != wanted and column.null_count() < len(column):
            examples = (column.filter(lost) if lost.any() else column.drop_nulls()).head(5).to_list()
            problems.append(
                {"column": item.name, "type": item.type, "examples": examples, "lost": int(lost.sum())}
            )
        if item.type == "number":
            cast = cast.fill_nan(None)
        frame = frame.with_columns(cast.alias(item.name))
    return frame, problems


def same_within(served: pl.Expr, table: pl.Expr, *, number: bool, tolerance: float) -> pl.Expr:
    """Tell whether two values are the same: two missing ones are, an infinite one is like no other.

    :param tolerance: difference that is none, in proportion to the larger of the two.
    """
    import polars as pl

    if not number:
        return served.eq_missing(table)
    close = (served - table).abs() <= tolerance * pl.max_horizontal(served.abs(), table.abs())
    close &= served.is_finite() & table.is_finite()
    return served.eq_missing(table) | close.fill_null(value=False)


def describe_difference(
    feature: str, pairs: pl.DataFrame, *, rows: int, number: bool, tolerance: float, examples: int = 5
) -> ServedDifference:
    """Say how values differ.

    :param pairs: rows that differ: ``prediction_id``, ``served`` and ``table``.
    :param rows: rows that were compared.
    """
    pattern, value = _pattern(pairs, number=number, tolerance=max(tolerance, 1e-6))
    shown = pairs.head(examples).rows(named=True)
    return ServedDifference(
        feature=feature,
        rows=rows,
        different=pairs.height,
        share=pairs.height / rows if rows else 0.0,
        pattern=pattern,
        value=value[:60],
        examples=tuple(
            {name: None if one is None else str(one)[:60] for name, one in row.items()} for row in shown
        ),
    )


def _pattern(pairs: pl.DataFrame, *, number: bool, tolerance: float) -> tuple[Pattern, str]:
    import polars as pl

    needed = _PATTERN_SHARE * pairs.height
    served = pairs["served"]
    if served.null_count() >= needed:
        return "missing", ""
    counts = served.drop_nulls().value_counts(sort=True)
    if counts["count"][0] >= needed and pairs["table"].n_unique() > 1:
        return "default", str(counts["served"][0])
    if not number:
        return "none", ""
    # Values are compared as floats of the log and the table: a factor is found up to their rounding.
    for pattern, measured in (
        ("factor", pl.col("served") / pl.col("table")),
        ("offset", pl.col("served") - pl.col("table")),
    ):
        values = pairs.select(measured.alias("x")).to_series()
        values = values.filter(values.is_finite().fill_null(value=False))
        middle = values.median()
        if not isinstance(middle, float) or pairs.height < 3:
            continue
        near = int(((values - middle).abs() <= max(tolerance, 1e-3) * abs(middle)).sum())
        if near >= needed:
            return ("factor" if pattern == "factor" else "offset"), f"{middle:.6g}"
    return "none", ""


def _expect(kind: str, column: str, notes: str, **kwargs: Any) -> dict[str, Any]:
    return {
        "type": f"expect_{kind}",
        "kwargs": {"column": column, **kwargs},
        "severity": "critical",
        "notes": notes,
    }


def _mostly(unlike: float, trained: int, asked: int) -> float:
    """Give the share that has to fit, where the others are so many in the long run: of few rows chance takes more.

    >>> _mostly(0.01, 10_000, 50), _mostly(0.01, 10_000, 100_000)
    (0.933574, 0.985826)
    """
    if not 0.0 < unlike < 1.0:
        return max(0.0, 1.0 - unlike)
    chance = _SIGMAS * math.sqrt(unlike * (1.0 - unlike) * (1.0 / max(trained, 1) + 1.0 / max(asked, 1)))
    return max(0.0, round(1.0 - unlike - chance, 6))
